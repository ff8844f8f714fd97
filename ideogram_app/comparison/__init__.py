"""Compare: one request drawn with several recipes, measured, laid out and kept in the history."""
