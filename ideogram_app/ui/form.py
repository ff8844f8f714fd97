"""Input form: model, prompt, preset, size, seed and recipes; its values as a `Request` and back.

Choices come from the tables of models, presets and recipes. Left out: free step counts and guidance, which belong to
a preset; the command line and `Request` take another guidance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import gradio as gr

from ideogram_app.catalog.models import MODELS, find_model
from ideogram_app.catalog.presets import PRESETS, find_preset, guidance_for
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.errors import CaptionError, RequestError
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import plan
from ideogram_app.records import REFERENCE, Request
from ideogram_app.studio.state import Machine
from ideogram_app.ui.words import esc, everyday_first, typed_of

# Title -> prompt; the first is what an empty form begins with.
EXAMPLES: dict[str, dict[str, str]] = {
    "miniature": {
        "Circle": "a large red circle at the center on a white background",
        "Two shapes": "a small blue square at the top left and a large yellow triangle at the right "
        "on a black background",
        "Word": "the word HELLO in black letters on a yellow background",
        "JSON": '{"compositional_deconstruction":{"background":"green","elements":[{"type":"obj","desc":'
        '"large white circle at the top"},{"type":"text","text":"TEA","desc":"white letters"}]}}',
    },
    "ideogram-4": {
        "Poster": "a poster for a night market, hand-lettered title OPEN LATE, warm lanterns over wet cobblestones",
        "Photograph": "a ceramic mug on a windowsill with the word SLOW painted on it, morning light, 35 mm photograph",
        "Illustration": "a flat illustration of a lighthouse at dusk, three colours, wide margins",
    },
}


@dataclass(frozen=True)
class Form:
    """The inputs, in the order in which `request_of` takes their values."""

    model: gr.Radio
    prompt: gr.Textbox
    preset: gr.Radio
    width: gr.Number
    height: gr.Number
    seed: gr.Number
    recipes: gr.CheckboxGroup
    savings: gr.CheckboxGroup
    adapt: gr.Checkbox

    @property
    def inputs(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Extras:
    """What stands around the inputs."""

    examples: gr.Dataset
    caption: gr.HTML
    guidance: gr.HTML
    random: gr.Button
    generate: gr.Button
    stop: gr.Button


def build_form(model: str) -> tuple[Form, Extras]:
    """Lay out the inputs, for a model."""
    chosen = gr.Radio(_titled(reversed(MODELS.values())), value=model, label="Model", elem_id="model")
    prompt = gr.Textbox(
        first_example(model),
        label="Prompt: a sentence or a JSON caption",
        placeholder="Say what to draw. Shift+Enter generates.",
        lines=2,
        max_lines=12,
        elem_id="prompt",
    )
    examples = gr.Dataset(components=[prompt], label="Examples", elem_id="examples", **example_rows(model))
    with gr.Accordion("The caption that the model reads", open=False, elem_id="caption-fold"):
        caption = gr.HTML(caption_note(first_example(model)), elem_id="caption", apply_default_css=False)
    recipes = gr.CheckboxGroup(_titled(everyday_first()), value=[REFERENCE], label="Compare", elem_id="recipes")
    presets = [(f"{row.name.split('-')[0].title()} {row.steps}", row.name) for row in PRESETS.values()]
    preset = gr.Radio(presets, value="default-20", label="Preset", elem_id="preset")
    guidance = gr.HTML(guidance_note("default-20", model), elem_id="guidance", apply_default_css=False)
    with gr.Row(elem_classes="numbers"):
        side: dict[str, Any] = {"minimum": 64, "maximum": 2048, "step": 16, "precision": 0, "min_width": 84}
        wide, high = find_model(model).default_size
        width = gr.Number(wide, label="Width", elem_id="width", **side)
        height = gr.Number(high, label="Height", elem_id="height", **side)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=84, elem_id="seed")
        random = gr.Button("Random", size="sm", min_width=72, elem_id="random-seed")
    with gr.Accordion("Leave something out, for speed", open=False, elem_id="savings-fold"):
        savings = gr.CheckboxGroup(
            _titled(SPEEDUPS.values()),
            label="Savings",
            info=" ".join(f"{row.title}: {row.summary}" for row in SPEEDUPS.values()),
            elem_id="savings",
        )
    adapt = gr.Checkbox(
        False,
        label="When memory runs out, go on with less",
        info="Streams more, then a smaller precision, then a smaller picture; each picture says what it gave up.",
        elem_id="adapt",
    )
    with gr.Row(elem_classes="actions"):
        generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
        stop = gr.Button("Stop", interactive=False, elem_id="stop", scale=1, min_width=80)
    form = Form(chosen, prompt, preset, width, height, seed, recipes, savings, adapt)
    return form, Extras(examples, caption, guidance, random, generate, stop)


def _titled(rows: Iterable[Any]) -> list[tuple[str, str]]:
    """Choices as Gradio takes them."""
    return [(row.title, row.name) for row in rows]


def first_example(model: str) -> str:
    """The prompt that an empty form begins with."""
    return next(iter(EXAMPLES[model].values()))


def example_rows(model: str) -> dict[str, Any]:
    """The examples of a model, as `gr.Dataset` takes them."""
    rows = EXAMPLES[model]
    return {"samples": [[text] for text in rows.values()], "sample_labels": list(rows)}


def request_of(
    model: str,
    prompt: str,
    preset: str,
    width: float,
    height: float,
    seed: float,
    recipes: list[str],
    savings: Sequence[str] = (),
    adapt: bool = False,
) -> Request:
    """The request that the inputs make; RequestError or CaptionError names what cannot be used."""
    for label, value in (("width", width), ("height", height), ("seed", seed)):
        if value is None:
            raise RequestError(f"The {label} is empty", do="Enter a whole number")
    caption = parse_prompt(prompt or "").caption
    numbers = int(width), int(height), int(seed)
    return Request(model, caption, tuple(recipes), preset, *numbers, savings=tuple(savings), adapt=bool(adapt))


def first_request(values: Sequence[Any], recipe: str) -> Request:
    """`request_of` the inputs, with one recipe; a model's first example where the prompt is empty."""
    model, prompt, *others = values
    return replace(request_of(model, prompt or first_example(model), *others), recipes=(recipe,))


def values_of(request: Request) -> tuple[Any, ...]:
    """The inverse of `request_of`: what the inputs show for a request, in the order of `Form.inputs`."""
    numbers = request.width, request.height, request.seed
    named = list(request.recipes), list(request.savings), request.adapt
    return request.model, typed_of(request.caption), request.preset, *numbers, *named


def suggested_recipes(machine: Machine | None, model: str) -> list[str]:
    """What to compare when nothing is chosen: the reference where it fits on the device, and the plan's recipe."""
    if machine is None:
        return [REFERENCE]
    chosen = machine.plans[model].recipe
    reference = plan(PlanInputs.of(machine.hardware, model, recipe=REFERENCE))
    fits = reference.fits and reference.residency == "resident"
    return [name for name in RECIPES if name == chosen or (name == REFERENCE and (fits or not chosen))]


def caption_note(typed: str) -> str:
    """The caption as the text encoder gets it, or what is wrong with it."""
    try:
        prompt = parse_prompt(typed or "")
    except CaptionError as problem:
        return f'<p class="note bad">{esc(problem)}</p>'
    wrapped = "The sentence, wrapped into the smallest valid caption."
    note = wrapped if prompt.was_plain else "Checked, used as it is."
    return f'<p class="quiet">{note}</p><pre class="caption" tabindex="0">{esc(prompt.caption)}</pre>'


def guidance_note(preset: str, model: str) -> str:
    """The guidance that a preset means for a model."""
    row, shape = find_preset(preset), find_model(model)
    values = guidance_for(row, shape)
    last = sum(1 for value in values if value == values[-1])
    tail = f", {values[-1]:g} in the last {last} steps" if values[0] != values[-1] else ""
    own = " (the miniature's own)" if values != row.guidance else ""
    return f'<p class="quiet">{row.steps} steps, guidance {values[0]:g}{tail}{own}</p>'
