"""Command line of patchcore.cli.run_sweep."""

from patchcore.cli import run_sweep

if __name__ == "__main__":
    run_sweep()
