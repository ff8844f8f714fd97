"""Quantize, the process: source weights to a prepared folder that survives being killed at any moment."""
