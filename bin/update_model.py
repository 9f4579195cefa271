"""Command line of patchcore.cli.update_model."""

from patchcore.cli import update_model

if __name__ == "__main__":
    update_model()
