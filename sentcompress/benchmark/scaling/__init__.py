"""The scaling law: finished runs of several sizes and budgets, put on straight lines in log-log."""
