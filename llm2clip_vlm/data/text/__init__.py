"""Captions: records, draws, tables of tokens."""
