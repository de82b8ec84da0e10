"""One file per command. Parses, calls, prints; imports no torch before a command runs."""
