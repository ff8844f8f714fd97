"""Number formats in plain torch, the truth that kernels are judged by: INT8, FP8, NF4, K-quants, rotation."""
