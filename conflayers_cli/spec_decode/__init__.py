"""Drafting and verification: proposers, draft length, acceptance."""
