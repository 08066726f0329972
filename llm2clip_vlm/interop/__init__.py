"""Weights of other projects, in and out: a table per format, and a certificate for each file."""
