"""Stages 3 and 4: the VLM."""
