"""Runs a model: plans, cache, decoding. Knows nothing of files, YAML, Typer or Rich."""
