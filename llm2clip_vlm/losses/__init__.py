"""Contrastive losses as pure functions."""
