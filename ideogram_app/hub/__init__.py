"""Fetch: files from the Hugging Face Hub, resumed where they stopped; the only package that touches the network."""
