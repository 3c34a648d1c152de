"""How we measure (docs/measures.md): causality, quality, reconstruction, speed, memory, data, and the report."""
