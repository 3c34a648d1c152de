"""From documents to batches: segmentation, the token cache, samplers, prefetch."""
