"""Fused Triton kernels: those of `kernels.contract`, each one launch, judged by `kernels.plain`.

Importing a module here imports Triton; nothing is compiled before the first launch. With TRITON_INTERPRET=1 in the
environment before that import, the same code runs on CPU tensors. NVIDIA's cards and AMD's have tiles of their own, and
`offline.py` compiles all of it for both; on AMD's nobody here has run it. Left out: search for launch parameters at run
time.

Its modules (this list is made by tools/docs.py):

    blocks.py     Building blocks of the row kernels in Triton: a row in registers, its norm, rotation and rounding.
    heads.py      Attention-head kernel in Triton: q/k norms and rotary embedding, in place in qkv.
    matmul.py     INT8 matrix product (W8A8) in Triton: rows times weights, both scales and the bias, in one launch.
    offline.py    Offline compilation of every kernel for every GPU generation: registers, shared memory, spills.
    q4_k.py       Q4_K dequantization in Triton: to INT8 with a scale a row (W4A8) or to the computing type (W4A16).
    rows.py       Row kernels in Triton, one launch each: RMS norm with modulation, residual, SwiGLU, quantization.
    signature.py  Compile-time signature of a Triton kernel: all its machine code depends on, to compile offline.
    tiles.py      Tile sizes of the INT8 product by compute capability and shape: a table, no autotuning at run time.
"""
