"""Calibration: what the model's inputs look like, and what smoothing and protection follow from that."""
