"""Fused Triton kernels: those of `kernels.contract`, each one launch, judged by `kernels.plain`.

Importing a module here imports Triton; nothing is compiled before the first launch. With TRITON_INTERPRET=1 in the
environment before that import, the same code runs on CPU tensors. Left out: search for launch parameters at run time,
and kernels for other than NVIDIA cards, which Triton may run and nobody here has tried.

Its modules (this list is made by tools/docs.py):

    blocks.py     Pieces that row kernels are made of: one token's row held in registers, its statistics, its rotation,
                  its rounding.
    heads.py      The norms and rotary angles of attention heads, in place: qkv as its matrix leaves it, to q, k and v.
    kernels.py    The fused kernels as one set: `fused_kernels("triton")`, or "int_mm" where Triton compiles no INT8
                  product (Turing).
    matmul.py     INT8 rows times INT8 weights, and the scales that turn the sums into numbers, in one launch.
    offline.py    What every kernel needs on every card, from compiling them all on a machine without a GPU.
    q4_k.py       Q4_K weights to what a matrix product reads: INT8 with a scale a row (W4A8) or the computing type
                  (W4A16).
    rows.py       What stands between two matrices of a block, each one launch: norms with modulation, residuals,
                  SwiGLU, rounding.
    signature.py  One Triton kernel with everything its machine code depends on, so that it can be compiled on a machine
                  without a GPU.
    tiles.py      Which tile of the INT8 product a program makes: a table, read by capability and shape, never searched
                  at run time.
"""
