"""Decisions on new images: from Python, on files, and on files as they land."""
