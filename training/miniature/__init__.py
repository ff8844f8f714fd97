"""How the embedded model is made: a small world of coloured shapes and words, and a pipeline trained on it.

    scenes.py        captions and the pictures they describe
    tokenizer.py     a byte-level tokenizer with Qwen's chat template
    blueprint.py     the sizes of every part
    network.py       the training forward passes, equal to diffusers' and transformers' modules
    autoencoder.py   trains the VAE
    train.py         trains the text encoder and both transformers, writes assets/miniature
    score.py         measures on pixels whether a picture shows what its caption asked for
    evaluate.py      draws held-out captions through stock diffusers and scores them

`python -m training.miniature.train` makes the whole of it again.
"""
