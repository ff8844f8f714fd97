"""What this program wrote: packed files, their journal and manifest, and the store that holds them."""
