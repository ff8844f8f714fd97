"""Number formats in plain torch, the reference for kernels: INT8, FP8, NF4, K-quants, rotation.

Its modules (this list is made by tools/docs.py):

    fp8.py        FP8: float8_e4m3fn weights, one float32 scale a row: the form in which Ideogram publishes its
                  transformers.
    fp8_codes.py  FP8 on devices whose torch has no float8: codes moved as bytes, widened by a table of 256 numbers.
    int8.py       INT8 (W8A8) in plain torch: weights with one scale a row times activations with one scale a token.
    k_quants.py   GGUF block formats Q4_K, Q5_K, Q6_K and Q8_0 (K-quants): encode floats to bytes, decode bytes to
                  floats.
    k_search.py   Scale search for K-quants: the steps, scales and minima that make a block closest to its weights.
    nf4.py        NF4, the 4-bit format of bitsandbytes, in plain torch: sixteen fixed levels, one scale for every 64
                  weights.
    rotation.py   Hadamard rotation, block-diagonal (ConvRot): spreads outlier channels over their block of 256 before
                  rounding.
    rows.py       Rows of a matrix: runs of bounded size, and dequantization with one scale a row; imported without
                  torch.
    k_fast/       The K-quant search for CPUs, compiled by Numba: the fits of `k_search.py` bit for bit, ten times
                  faster.
"""
