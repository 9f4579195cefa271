"""What is written to disk: run folders and model folders."""
