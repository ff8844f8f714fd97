"""Measurements behind the program's numbers: scripts to run one by one, results/, and counting/ that they share."""
