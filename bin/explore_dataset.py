"""Command line of patchcore.cli.explore_dataset."""

from patchcore.cli import explore_dataset

if __name__ == "__main__":
    explore_dataset()
