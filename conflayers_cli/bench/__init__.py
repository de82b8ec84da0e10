"""Measuring vanilla against speculative decoding; results, comparisons, tables, pictures."""
