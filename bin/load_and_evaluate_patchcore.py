"""Command line of patchcore.cli.load_and_evaluate_patchcore."""

from patchcore.cli import load_and_evaluate_patchcore

if __name__ == "__main__":
    load_and_evaluate_patchcore()
