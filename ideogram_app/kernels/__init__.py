"""Fast twins of what runs between and inside matrix products: Triton, CPU, attention, kernel selection.

Its modules (this list is made by tools/docs.py):

    attention.py  Softmax attention over one picture's tokens, every token seeing every other, by the best exact backend
                  there is.
    choice.py     Which kernels run: the one place that picks, with its reason.
    compiled.py   The plain kernels between two matrices, each compiled by `torch.compile`, on request.
    contract.py   What a set of kernels is: one signature for each, whoever implements it.
    plain.py      Every kernel in plain torch: the truth that the others are judged by, and what runs where nothing else
                  does.
    processor.py  The kernels for processors: INT8 products by oneDNN on weights in its own order, the rest in runs that
                  fit a cache.
    fused/        The kernels of `kernels.contract` in Triton: each one launch, each judged by its twin in
                  `kernels.plain`.
"""
