"""Command line of patchcore.cli.run_fastflow."""

from patchcore.cli import run_fastflow

if __name__ == "__main__":
    run_fastflow()
