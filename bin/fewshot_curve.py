"""Command line of patchcore.cli.fewshot_curve."""

from patchcore.cli import fewshot_curve

if __name__ == "__main__":
    fewshot_curve()
