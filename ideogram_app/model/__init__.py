"""Load: files to modules on a device, whole or offloaded, and the cache of what stays loaded.

Its modules (this list is made by tools/docs.py):

    cache.py             Model cache: transformers, and text encoder where it fits, stay loaded between pictures.
    components.py        Components beside the transformers: tokenizer, text encoder, VAE decoder, scheduler's shift.
    fill.py              Filling a module built on the meta device: a tensor by its name, an error where one is missing.
    loader.py            Loading both transformers of a recipe from prepared files to modules, resident or offloaded.
    reference_model.py   Reference model: diffusers' own transformers, filled from our files, to test and to calibrate.
    self_check.py        Self-check of what needs the model: a whole block per storage, a copy through the offload ring;
                         and when it is made.
    self_check_cases.py  Cases of the self-check that need the model: a whole block per storage, a copy through the
                         offload ring.
    vae.py               VAE decoder (FLUX.2's autoencoder), written for inference: latents to pixels, also in tiles.
    offload/             Offload: blocks that live in RAM or on disk and are copied to the device ahead of their use.
    text_encoder/        Captions to text features: tokenizer, Qwen3-VL's text side, and where it runs.
    transformer/         Both transformers, written for drawing one picture at a time, and how a checkpoint fills them.
"""
