"""Quantization process: source weights to a prepared folder, resumable after a kill at any moment.

Its modules (this list is made by tools/docs.py):

    components.py    Components beside the transformers: the text encoder packed; tokenizer, scheduler and VAE copied as
                     they are.
    notices.py       Licence notices of a quantized copy, as Ideogram 4's licence demands: notice, mark, the source's
                     own texts.
    packing.py       Packing of a transformer or text encoder, in runs of rows: read, scale, pack, write, compare with
                     the source.
    run.py           Preparation run: from opened weights to a published folder, resumable; shared by transformers and
                     components.
    smoke_test.py    Smoke test of packed weights: they compute what the source computes, before a file gets its final
                     name.
    source_hash.py   Background SHA-256 of large source files, in a thread of its own while packing goes on.
    transformers.py  Quantize both transformers: any source, by a recipe, into a prepared folder of the store or
                     anywhere.
    calibration/     Calibration: what the model's inputs look like, and what smoothing and protection follow from that.
"""
