"""Plan: which recipe, where its weights live, what that takes of memory and time, and what to try with less."""
