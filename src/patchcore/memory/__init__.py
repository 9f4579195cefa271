"""Coreset selection and nearest-neighbour search."""
