"""Trained networks for other libraries, one file per format. `export.py` is the command."""
