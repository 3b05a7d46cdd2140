"""Pictures of runs, from their logs alone. Standard library and matplotlib."""
