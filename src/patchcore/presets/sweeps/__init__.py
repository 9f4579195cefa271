"""Sweeps as data files that a researcher edits; `bin/run_sweep.py NAME` finds them by name."""
