"""Gradio theme, style.css, and the options of `launch`: how the page looks and how it is served.

Fonts are those of the system, so nothing is fetched from elsewhere. The theme sets Gradio's own controls; style.css
the rest, through the same variables, for light and dark.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

CSS = Path(__file__).with_name("style.css")
SANS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# A control's look: variable of Gradio's theme -> in the light, and in the dark where it differs or must be repeated.
LOOK: dict[str, tuple[str, ...]] = {
    "body_background_fill": ("#fafaf9", "#111113"),
    "block_background_fill": ("transparent", "transparent"),
    "block_border_width": ("0px", "0px"),
    "block_padding": ("0px",),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_title_text_weight": ("600",),
    "block_title_text_size": ("13px",),
    "block_title_text_color": ("#3f3f46", "#d4d4d8"),
    "block_info_text_size": ("12px",),
    "block_info_text_color": ("#62626b", "#a1a1aa"),
    "input_background_fill": ("#ffffff", "#1a1a1d"),
    "input_border_color": ("#d8d8dc", "#3a3a40"),
    "input_border_width": ("1px", "1px"),
    "input_border_color_focus": ("#0f766e", "#2fb5a7"),
    "input_text_size": ("14px",),
    "color_accent": ("#0f766e",),
    "checkbox_background_color_selected": ("#0f766e", "#0f766e"),
    "checkbox_border_color_selected": ("#0f766e", "#2fb5a7"),
    "checkbox_border_color_focus": ("#0f766e", "#2fb5a7"),
    "checkbox_label_text_size": ("13px",),
    "checkbox_label_background_fill": ("#ffffff", "#1a1a1d"),
    "checkbox_label_border_color": ("#d8d8dc", "#3a3a40"),
    "checkbox_label_border_width": ("1px",),
    "button_primary_background_fill": ("#0f766e", "#0f766e"),
    "button_primary_background_fill_hover": ("#0b5f59", "#128277"),
    "button_primary_text_color": ("#ffffff",),
    "button_border_width": ("1px", "1px"),
    "button_primary_border_color": ("#0f766e", "#0f766e"),
    "button_secondary_background_fill": ("#ffffff", "#1f1f23"),
    "button_secondary_border_color": ("#d8d8dc", "#3a3a40"),
    "button_large_text_weight": ("600",),
}


def theme() -> gr.themes.Base:
    """Calm: neutral greys, one accent, thin borders, no shadows."""
    light = {name: values[0] for name, values in LOOK.items()}
    dark = {f"{name}_dark": values[1] for name, values in LOOK.items() if len(values) > 1}
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_sm,
        spacing_size=gr.themes.sizes.spacing_md,
        font=SANS,
        font_mono=MONO,
    ).set(**light, **dark)


def launch_options(output: Path, data: Path) -> dict[str, Any]:
    """Everything `launch` takes that does not depend on the user's flags.

    Only the output folder is readable from the page; weights and tokens are not.
    """
    return {
        "theme": theme(),
        "css_paths": CSS,
        "allowed_paths": [str(output)],
        "blocked_paths": [str(data)],
        "max_file_size": "25mb",
        "strict_cors": True,
        "run_history": False,
        "enable_monitoring": False,
        "footer_links": ["api"],
        "show_error": True,
        "ssr_mode": False,
        "quiet": True,
    }
