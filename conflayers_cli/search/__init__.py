"""How to choose a skip plan: one file per method."""
