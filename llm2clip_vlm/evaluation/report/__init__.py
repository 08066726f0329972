"""Comparisons and reports as charts and pages."""
