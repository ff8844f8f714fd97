"""What exists, as frozen rows without torch: models, recipes, presets, speed-ups, the text encoder."""
