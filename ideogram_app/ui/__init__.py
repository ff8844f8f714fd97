"""The page: it formats what the studio knows and hands on what the user asks, and knows no tensors.

Its modules (this list is made by tools/docs.py):

    api.py           Public API endpoints, for gradio_client and plain HTTP: system_info, status, prepare, compare.
    form.py          Input form: model, prompt, preset, size, seed and recipes; its values as a `Request` and back.
    guide_card.py    First run card (onboarding) at the top of the page: seven stages with status, facts, progress and
                     one action.
    machine_card.py  Machine card: the hardware, the plan for the chosen model, and *Why?*: every reason and every
                     rejected recipe.
    memory_bar.py    Memory in use now: one slim bar for the device and one for RAM, and which weights stay loaded in
                     it.
    offers.py        Fallbacks when memory ran out, as buttons; and what a picture gave up that was drawn with less.
    page.py          Gradio page: layout of its blocks, wiring of its events, polling. `build(studio, model) ->
                     gr.Blocks`.
    results.py       Results: pictures side by side with their numbers, live while they are drawn; charts; running job;
                     history.
    slider.py        Image comparison slider: two pictures, one divider, around `<input type="range">`, so that the
                     keyboard works.
    style.py         Gradio theme, style.css, and the options of `launch`: how the page looks and how it is served.
    weights.py       Weights on disk: the published weights with their download, and every recipe with a button that
                     prepares it.
    words.py         HTML helpers of the page: escaping, links, buttons, progress bars, fact lists, and phrases about
                     progress.
"""
