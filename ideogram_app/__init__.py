"""Ideogram 4 on the card you own, and what each precision costs.

    detect -> plan -> fetch -> quantize -> load -> generate -> compare

Each word is a package: machine/, planning/, hub/, prepare/ (the process; quantization/ has the formats), model/,
generation/, comparison/. Importing this package imports neither torch nor gradio.
"""

__version__ = "0.1.0"
