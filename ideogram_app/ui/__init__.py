"""The page: it formats what the studio knows and hands on what the user asks, and knows no tensors."""
