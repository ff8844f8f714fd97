"""The documented import path of interop/quant_config.py."""

from ideogram_app.interop.quant_config import *  # noqa: F403
