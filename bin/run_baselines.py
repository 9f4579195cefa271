"""Command line of patchcore.cli.run_baselines."""

from patchcore.cli import run_baselines

if __name__ == "__main__":
    run_baselines()
