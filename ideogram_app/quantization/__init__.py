"""Weights in fewer bits: plain torch, legible, the truth that kernels/ is judged by.

int8.py      one scale a row, activations rounded as they come: INT8 x INT8 -> INT32
fp8.py       float8_e4m3fn, one scale a row: the form in which Ideogram publishes
k_quants.py  GGUF's Q4_K, Q5_K, Q6_K and Q8_0: the bytes, drawn
k_search.py  which scales make a K-quant block closest to its weights
k_fast/      the same search compiled for CPUs, the same bytes
"""
