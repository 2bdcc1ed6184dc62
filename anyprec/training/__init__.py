"""Training all bit-widths at once: the one-shot step, its losses and parameter groups, and a ready loop."""
