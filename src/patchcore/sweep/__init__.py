"""Sweeps: many variants, classes and seeds as one file, what is left to do of them, and the comparison over all."""
