"""Measurements behind the program's numbers: scripts to run one by one, results/, and what they share in counting/."""
