"""Fast twins of what runs between and inside matrix products: Triton, CPU, attention, kernel selection.

Its modules (this list is made by tools/docs.py):

    attention.py             Attention of one picture: the best exact backend that PyTorch has for these tensors, asked
                             for once and named.
    choice.py                Kernel selection: which set of kernels (Triton, int_mm, torch, processor, plain) runs on a
                             device, and why.
    contract.py              The kernels' interface: one signature for each operation of a block, whoever implements it.
    dense.py                 Dense product of a Linear: PyTorch's own, and in float32 on cards whose bfloat16 is
                             emulated.
    plain.py                 Reference kernels in plain torch: what the fast ones are judged by, and what runs
                             elsewhere.
    processor.py             CPU kernels: INT8 products by oneDNN on prepacked weights, the rest in runs of rows that
                             fit a cache.
    runs.py                  Plain kernels in runs of rows: what stands between two matrices where there is no Triton,
                             in bounded memory.
    self_check.py            Self-check of the kernels on the user's own device: each against its truth, wrong or slow
                             ones replaced by the next.
    self_check_assembly.py   Assembly of one `Kernels` from the implementations that a self-check found right, with a
                             name that says what and why.
    self_check_attention.py  Attention in the self-check: every backend by itself, at heads of 256 with the strides that
                             `heads` leaves.
    self_check_cases.py      Cases of the self-check: every kernel on the published widths, odd row counts and outliers,
                             beside its truth.
    self_check_record.py     Record of the self-check: what was found on which device with which versions, one JSON file
                             in the data folder.
    self_check_trial.py      One trial of the self-check: a piece of work in a thread of its own, with a limit, and what
                             went wrong with it.
    self_check_truths.py     Truths of the self-check: what a kernel must give, in float64 or exact integers on the
                             host, and a judge for each.
    torch_products.py        INT8 products of PyTorch itself, a run of rows at a time, and the two sets of kernels that
                             need no Triton.
    fused/                   Fused Triton kernels: those of `kernels.contract`, each one launch, judged by
                             `kernels.plain`.
"""
