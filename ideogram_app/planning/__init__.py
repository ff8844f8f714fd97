"""Plan: which recipe, where its weights live, what that takes of memory and time, and what to try with less.

Its modules (this list is made by tools/docs.py):

    activations.py      Activations in bytes: what is on a device beside the weights at each moment of a picture, from
                        shapes alone.
    assumptions.py      Assumed errors: how far a plan's numbers may be off before this machine has shown its own, with
                        their sources.
    downloads.py        Download time: expected seconds and their 90 % range, from an example rate or from what the line
                        has shown.
    failures.py         Failures in words: what any exception of one recipe is called, and what helps; one table.
    fallbacks.py        Fallbacks when memory ran out: `fallbacks(...) -> (Fallback, ...)`, the first that helps first,
                        and pure.
    footprint.py        Memory footprint of a model: bytes on the device, in RAM and on disk, counted before anything is
                        loaded.
    inputs.py           Plan inputs: a machine, a model, a picture, and the memory that may be used for it, as one
                        frozen `PlanInputs`.
    intervals.py        Prediction intervals: 90 % ranges round what a plan expects, from assumed widths and this
                        machine's own errors.
    kernel_bytes.py     Temporaries of kernels without Triton, in bytes: what kernels/runs.py and torch_products.py hold
                        for a moment.
    lost_device.py      Sticky device errors: those after which a device computes nothing more in this process, known by
                        their words.
    notes.py            Notes of a plan: what it says beside the decision, one table of rules, each a reason or nothing,
                        in reading order.
    oom.py              Out-of-memory errors, classified: the device, RAM, pinned memory (page-locked), or Windows'
                        commit limit.
    peaks.py            Predicted peaks of memory: the worst phase of a plan, and where the text encoder and the decoder
                        find room.
    placement.py        Placement of one recipe on one machine: resident on a device, on two, streamed from RAM, or
                        streamed from disk.
    planned_request.py  A planned request: one plan for each of its recipes, made in the worker and carried down to the
                        picture.
    planner.py          The plan: which recipe, where its weights live, and why; `plan(inputs) -> Plan`, a pure function
                        without torch.
    policy.py           Selection policy among placed recipes: quality first, unless it costs too much time.
    profile.py          Measured machine profile: peak rates of this machine, and how near real pictures came to them
                        (efficiency).
    step_time.py        Step time of a card with all weights resident: counted flops over the card's dense peak.
    streaming.py        Block streaming: how many blocks are offloaded, which, and the time of a step with their copies
                        overlapped.
    weight_bytes.py     Bytes of weights under a recipe: of one Linear, of a transformer on disk, and of one as it is
                        drawn with.
"""
