"""Number formats in plain torch, the reference for kernels: INT8, FP8, NF4, K-quants, rotation.

Its modules (this list is made by tools/docs.py):

    fp8.py       float8_e4m3fn weights, one float32 scale a row: the form in which Ideogram publishes its transformers.
    int8.py      INT8 weights, one scale a row, times INT8 activations, one scale a token: W8A8 in plain torch.
    k_quants.py  GGUF's block formats Q4_K, Q5_K, Q6_K and Q8_0: floats to bytes and back.
    k_search.py  Which scales make a K-quant block closest to its weights.
    nf4.py       NF4, the 4-bit format of bitsandbytes: sixteen fixed levels, one scale for every 64 weights, in plain
                 torch.
    rotation.py  A block-diagonal Hadamard rotation: outlier channels are spread over their block of 256 before anything
                 is rounded.
    rows.py      Rows of a matrix: runs of so many at a time, and values times one scale a row; imported without torch.
    k_fast/      The K-quant search for CPUs, compiled by Numba: the fits of `k_search.py` bit for bit, ten times
                 faster.
"""
