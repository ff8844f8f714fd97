"""Plan: which recipe, where its weights live, what that takes of memory and time, and what to try with less.

Its modules (this list is made by tools/docs.py):

    activations.py      Bytes beside the weights while a picture is drawn, moment by moment, from shapes alone.
    fallbacks.py        What can still be drawn when memory ran out: `rungs(...) -> (Fallback, ...)`, the first that
                        helps first, and pure.
    footprint.py        How many bytes a model takes: on the device, in RAM and on disk, counted before anything is
                        loaded.
    inputs.py           Plan inputs: a machine, a model, a picture, and the memory that may be used for it, as one
                        frozen `PlanInputs`.
    notes.py            What a plan says beside its decision: one table of rules, each a reason or nothing, in the order
                        of reading.
    oom.py              Out of memory, told apart: the device, RAM, RAM that can be locked, or what Windows is willing
                        to promise.
    option.py           One recipe placed on one machine, and what that takes of memory and time.
    peaks.py            What surrounds the steps of a picture on the device: the text encoder before them, the decoder
                        after them.
    placement.py        Where the weights of one recipe can live on one machine: on the device, on two of them, in RAM,
                        or on disk.
    planned_request.py  A request planned once: one plan for each of its recipes, made in the worker and carried down to
                        the picture.
    planner.py          Which recipe, where its weights live, and why: `plan(inputs) -> Plan`, a pure function without
                        torch.
    policy.py           Which of several placed recipes to take: quality first, unless it costs too much time.
    profile.py          The machine's profile: rates that were measured, and how near real pictures came to them.
    step_time.py        How long a step should take on a card with all weights at hand: counted flops over the card's
                        dense peak.
    streaming.py        Block streaming: how many blocks are offloaded, which, and the time of a step with their copies
                        overlapped.
"""
