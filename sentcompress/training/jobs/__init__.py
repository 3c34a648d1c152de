"""What is trained: a SentenceVAE, a graft, a token-level model."""
