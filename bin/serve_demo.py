"""Command line of patchcore.cli.serve_demo."""

from patchcore.cli import serve_demo

if __name__ == "__main__":
    serve_demo()
