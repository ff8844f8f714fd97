"""Ideogram 4 on the card you own, and what each precision costs.

    detect -> plan -> fetch -> quantize -> load -> generate -> compare

Each word is a package: machine/, planning/, hub/, prepare/ (the process; quantization/ has the formats), model/,
generation/, comparison/. Importing this package imports neither torch nor gradio.

Its modules (this list is made by tools/docs.py):

    __main__.py    `python -m ideogram_app`: the command line, whose commands stand in cli/app.py.
    errors.py      Errors that a user may see: `AppError` and its seven kinds, because callers tell exactly these seven
                   apart.
    files.py       Files and folders: atomic writes, hashes, locks, free and taken bytes of a disk, and the default
                   folders.
    recipe_api.py  The documented import path of interop/quant_config.py: recipes for people's own diffusers scripts.
    records.py     Records: `Request`, `Event`, `Result` and `Fallback`, frozen dataclasses without tensors that turn
                   into JSON.
    text.py        Sizes, durations, moments, PSNR and lists formatted as text for people.
    wire.py        JSON of frozen dataclasses, to and from, without loss.
    benchmark/     Benchmark: seconds a step of our recipes beside stock diffusers, on this device, in one session.
    catalog/       What exists, as frozen rows without torch: models, recipes, presets, speed-ups, the text encoder.
    checkpoints/   Files on disk: safetensors and GGUF headers, weight files, spans of tensors, prefetching.
    cli/           The command line: flags, progress and results on a terminal, and serving the page.
    comparison/    Compare: one request drawn with several recipes, measured, laid out and kept in the history.
    generation/    Generate: one picture as an iterator of events, from a caption to a PNG, tried again when memory runs
                   out.
    hub/           Fetch: files from the Hugging Face Hub, resumed where they stopped; the only package that touches the
                   network.
    interop/       Prepared weights in stock diffusers, and quantization configurations for other people's scripts.
    kernels/       Fast twins of what runs between and inside matrix products: Triton, CPU, attention, kernel selection.
    machine/       Detect: what this machine is, what it can do, how fast it is and what is free; hardware is asked and
                   timed here.
    model/         Load: files to modules on a device, whole or offloaded, and the cache of what stays loaded.
    planning/      Plan: which recipe, where its weights live, what that takes of memory and time, and what to try with
                   less.
    prepare/       Quantization process: source weights to a prepared folder, resumable after a kill at any moment.
    quantization/  Number formats in plain torch, the reference for kernels: INT8, FP8, NF4, K-quants, rotation.
    studio/        The one worker: its queue, its state, the services it calls, and the stages of a first run.
    ui/            The page: it formats what the studio knows and hands on what the user asks, and knows no tensors.
"""

__version__ = "0.1.0"
