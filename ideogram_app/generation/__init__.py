"""Generate: one picture as an iterator of events, from a caption to a PNG, tried again when memory runs out."""
