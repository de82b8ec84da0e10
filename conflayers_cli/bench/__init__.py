"""Measuring: systems side by side, results, comparisons."""
