"""Vision tower, projector and language model as one LLaVA."""
