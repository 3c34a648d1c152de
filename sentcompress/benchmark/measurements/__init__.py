"""One file a measurement: its report, rows, table, figure, and how it is measured."""
