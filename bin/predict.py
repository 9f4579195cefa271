"""Command line of patchcore.cli.predict."""

from patchcore.cli import predict

if __name__ == "__main__":
    predict()
