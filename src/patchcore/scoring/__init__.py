"""Anomaly maps, image scores and their calibration on normal images."""
