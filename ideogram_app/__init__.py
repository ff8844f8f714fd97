"""Ideogram 4 on the card you own, and what each precision costs.

The map, one home a word:

    detect    machine/hardware.py         what this machine is
    plan      planning/planner.py          which recipe, where it lives, and why
    fetch     checkpoints/        where weights come from and where they rest
    quantize  quantization/       INT8 and K-quants, legible; kernels/ holds their fast twins
    load      model/              store -> transformer, a Linear per storage
    generate  generation/draw.py             one request -> a stream of events
    compare   comparison/compare.py          one request through several recipes

Importing this package imports neither torch nor gradio.
"""

__version__ = "0.1.0"
