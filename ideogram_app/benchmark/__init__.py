"""How fast a step is: our recipes beside what stock diffusers does, on this device, in one run.

No checkpoint is needed: time depends on shapes and storages, not on what the weights say. Left out: quality, text
encoder and VAE, which `compare` measures on real pictures.
"""
