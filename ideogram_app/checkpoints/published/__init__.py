"""Any published layout of Ideogram 4's weights, read as tensors by one set of names."""
