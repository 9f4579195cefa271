"""Command line of patchcore.cli.run_patchcore."""

from patchcore.cli import run_patchcore

if __name__ == "__main__":
    run_patchcore()
