"""One protocol for each metric: retrieval, zero-shot, separability, IoU, and their statistics."""
