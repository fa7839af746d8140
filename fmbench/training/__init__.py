"""A run: `run.py` is the straight line, the other modules are what it calls."""
