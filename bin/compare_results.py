"""Command line of patchcore.cli.compare_results."""

from patchcore.cli import compare_results

if __name__ == "__main__":
    compare_results()
