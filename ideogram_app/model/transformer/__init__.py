"""Both transformers, written for drawing one picture at a time, and how a checkpoint fills them."""
