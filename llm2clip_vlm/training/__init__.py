"""Trainer arguments, parameter groups and callbacks around the Hugging Face Trainer."""
