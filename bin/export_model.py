"""Command line of patchcore.cli.export_model."""

from patchcore.cli import export_model

if __name__ == "__main__":
    export_model()
