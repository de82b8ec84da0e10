"""Profiles: which layers a draft leaves out, and how it was found."""
