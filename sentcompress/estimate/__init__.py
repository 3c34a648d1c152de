"""Predictions from shapes, before anything is trained or measured: parameters, memory, time and cost."""
