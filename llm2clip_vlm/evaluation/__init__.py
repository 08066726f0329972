"""Metrics, statistics, reports, and the lmms-eval adapter."""
