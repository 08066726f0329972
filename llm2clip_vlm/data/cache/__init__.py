"""The embedding cache: rows found by the hash of their text."""
