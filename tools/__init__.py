"""What tries to break the project: fuzzing, mutants, kills, soak."""
