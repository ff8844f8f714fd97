"""Files on disk: safetensors and GGUF, where each tensor lies, and reading ahead."""
