"""The page: it formats what the studio knows and hands on what the user asks, and knows no tensors.

Its modules (this list is made by tools/docs.py):

    api.py           The public endpoints, for gradio_client and plain HTTP: system_info, status, prepare, compare.
    charts.py        Time and memory as bars: HTML tables whose cells are drawn as bars, so that they are read aloud as
                     numbers.
    form.py          What can be asked for: model, prompt, preset, size, seed and the precisions to compare.
    gallery.py       Earlier comparisons as a list of small pictures; one click opens one again.
    guide_card.py    The first run as a card at the top of the page: seven stages, one of them open, with its facts and
                     its one button.
    machine_card.py  The machine, the plan for the chosen model, and *Why?*: every reason and every recipe that was
                     passed over.
    memory_bar.py    What memory is in use now, as one slim bar for the device and one for RAM, and what is kept loaded
                     in it.
    offers.py        When memory ran out: what can be tried, as buttons; and what a picture gave up that was drawn with
                     less.
    page.py          The page: its blocks, and what happens when something is pressed. `build(studio, model) ->
                     gr.Blocks`.
    panes.py         Everything on the page that follows from the studio's state, as one tuple of HTML, and what of it
                     has changed.
    results.py       Pictures side by side with their numbers underneath: live while they are drawn, exact when they are
                     done.
    slider.py        Two pictures, one divider: a gr.HTML component around `<input type="range">`, so the keyboard works
                     as it should.
    source_card.py   The published weights of a model: what a download takes, whether it is allowed, how far it is, and
                     its end.
    style.py         How the page looks and how it is served: theme, style.css, and the flags of `launch`.
    weights.py       Which recipes of a model are at hand, what each is, and a button that prepares one.
    words.py         Phrases of the page about what is going on, and the escaping of everything that comes from outside.
"""
