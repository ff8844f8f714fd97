"""Fast twins of what runs between and inside matrix products: Triton, processors, attention, and which are chosen."""
