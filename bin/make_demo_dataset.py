"""Command line of patchcore.cli.make_demo_dataset."""

from patchcore.cli import make_demo_dataset

if __name__ == "__main__":
    make_demo_dataset()
