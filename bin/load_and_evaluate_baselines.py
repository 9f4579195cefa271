"""Command line of patchcore.cli.load_and_evaluate_baselines."""

from patchcore.cli import load_and_evaluate_baselines

if __name__ == "__main__":
    load_and_evaluate_baselines()
