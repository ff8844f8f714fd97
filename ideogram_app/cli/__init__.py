"""The command line: flags, progress and results on a terminal, and serving the page."""
