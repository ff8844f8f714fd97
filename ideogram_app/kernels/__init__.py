"""Fast twins of what runs between and inside matrix products: Triton, CPU, attention, kernel selection.

Its modules (this list is made by tools/docs.py):

    attention.py       Attention of one picture: the best exact backend that PyTorch has for these tensors, asked for
                       once and named.
    choice.py          Kernel selection: which set of kernels (Triton, int_mm, torch, processor, plain) runs on a
                       device, and why.
    contract.py        The kernels' interface: one signature for each operation of a block, whoever implements it.
    dense.py           Dense product of a Linear: PyTorch's own, and in float32 on cards whose bfloat16 is emulated.
    plain.py           Reference kernels in plain torch: what the fast ones are judged by, and what runs elsewhere.
    processor.py       CPU kernels: INT8 products by oneDNN on prepacked weights, the rest in runs of rows that fit a
                       cache.
    runs.py            Plain kernels in runs of rows: what stands between two matrices where there is no Triton, in
                       bounded memory.
    torch_products.py  INT8 products of PyTorch itself, a run of rows at a time, and the two sets of kernels that need
                       no Triton.
    fused/             Fused Triton kernels: those of `kernels.contract`, each one launch, judged by `kernels.plain`.
"""
