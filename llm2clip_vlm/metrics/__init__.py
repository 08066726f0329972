"""One protocol for each metric: retrieval, zero-shot, separability, and their statistics."""
