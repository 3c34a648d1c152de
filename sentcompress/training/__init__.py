"""How a model is trained: the loop, its jobs, checkpoints, and what a run shows and leaves on disk."""
