"""Fast twins of what runs between and inside matrix products: Triton, CPU, attention, kernel selection.

Its modules (this list is made by tools/docs.py):

    attention.py  Attention of one picture: which exact scaled-dot-product backend runs on which GPU generation.
    choice.py     Kernel selection: which set of kernels (Triton, int_mm, processor, plain) runs on a device, and why.
    contract.py   The kernels' interface: one signature for each operation of a block, whoever implements it.
    plain.py      Reference kernels in plain torch: what the fast ones are judged by, and what runs elsewhere.
    processor.py  CPU kernels: INT8 products by oneDNN on prepacked weights, the rest in runs of rows that fit a cache.
    fused/        Fused Triton kernels: those of `kernels.contract`, each one launch, judged by `kernels.plain`.
"""
