"""The kernels of `kernels.contract` in Triton: each one launch, each judged by its twin in `kernels.plain`.

    blocks.py     pieces of row kernels: a row in registers, its rotation, its rounding
    rows.py       norm, add_norm, add, swiglu, rows: one program a token
    heads.py      norms and rotary angles of attention heads
    matmul.py     INT8 products with both scales; tiles.py holds their sizes
    q4_k.py       Q4_K blocks to INT8 or to the computing type
    kernels.py    all of them as one set
    signature.py  what a compiler without a GPU has to know of a kernel; offline.py asks it

Importing a module here imports Triton; nothing is compiled before the first launch. With TRITON_INTERPRET=1 in the
environment before that import, the same code runs on CPU tensors. Left out: search for launch parameters at run time,
and kernels for other than NVIDIA cards, which Triton may run and nobody here has tried.
"""
