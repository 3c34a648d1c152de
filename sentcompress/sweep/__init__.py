"""A grid of recipes: one run a cell, one table at the end."""
