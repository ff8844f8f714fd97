"""Detect: what this machine is, what it can do, how fast it is and what is free; hardware is asked and timed here."""
