"""Benchmarks, one command each, from the repository's folder: ``python -m benchmarks.NAME``."""
