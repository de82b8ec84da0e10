"""Speculative decoding: who drafts, how far, and which drafted tokens are kept."""
