"""Detect: what this machine is, what it can do, how fast it is and what is free; hardware is asked and timed here.

Its modules (this list is made by tools/docs.py):

    attention.py       Attention of a device, without torch: the order in which PyTorch's backends are tried, and runs
                       where none is fused.
    capabilities.py    Device capabilities: computing type, INT8 units, kernels, pairs, obstacles, each answer with its
                       reason.
    clocks.py          Clocks, power and temperature of the first NVIDIA card now, and what holds its clocks down:
                       NVML's own words.
    copies.py          Copies from host memory to a device: pinned memory, a copy stream beside the compute stream,
                       events between the two.
    devices.py         Devices: what torch, NVML and the driver say of each GPU, question by question, as the fields of
                       `Hardware`.
    gpu_specs.py       Peak rates of graphics cards: dense teraflops, INT8 teraops, bytes a second over PCIe, by a
                       driver's name.
    hardware.py        Hardware detection: `detect(disk) -> Hardware`; devices.py asks for the devices, this file for
                       all the rest.
    memory.py          Memory in use now: of the first device and of RAM, by this process and by all others.
    memory_limit.py    Memory limit: on Windows and WSL torch is kept within the device memory that a plan may use.
    meter.py           Meter of seconds and peak bytes of each phase: the only file that synchronizes a device.
    microbench.py      Microbenchmarks: what a device does at best in matrix products, copies from RAM and reads from
                       disk.
    staging.py         Sizes of the pinned buffers and of the prefetch between files and a device; no torch.
    triton_support.py  Whether Triton works on this machine, asked once: why not, in words, and the one command that
                       helps.
    versions.py        Versions that a result was made with: of packages, from installed metadata alone, and of this
                       program.
"""
