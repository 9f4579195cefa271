"""Command line of patchcore.cli.load_and_evaluate_fastflow."""

from patchcore.cli import load_and_evaluate_fastflow

if __name__ == "__main__":
    load_and_evaluate_fastflow()
