"""Frozen backbones, feature maps and patch embeddings."""
