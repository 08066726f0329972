"""Benchmarks of vision towers and image-text encoders."""
