"""Methods that choose a plan, one file each."""
