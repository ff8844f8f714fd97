"""Load: files to modules on a device, whole or offloaded, and the cache of what stays loaded.

Its modules (this list is made by tools/docs.py):

    cache.py            What stays loaded from one picture to the next: both transformers, and the text encoder where
                        there is room for it.
    components.py       What stands around the transformers: tokenizer, text encoder, decoder of pictures, the
                        scheduler's shift.
    fill.py             Fill a module that was built on the meta device: a tensor by its name, and no hole left at the
                        end.
    loader.py           From files to modules: both transformers in a recipe's storage.
    reference_model.py  diffusers' own transformer, filled from our files: the truth behind the backbone, and what is
                        calibrated.
    vae.py              The decoder of FLUX.2's autoencoder, written for inference: latents to pixels.
    offload/            Offload: blocks that live in RAM or on disk and are copied to the device ahead of their use.
    text_encoder/       Captions to text features: tokenizer, Qwen3-VL's text side, and where it runs.
    transformer/        Both transformers, written for drawing one picture at a time, and how a checkpoint fills them.
"""
