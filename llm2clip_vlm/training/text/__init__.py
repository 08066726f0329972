"""Stage 1: the text encoder."""
