"""Training all bit-widths at once: the one-shot step, parameter groups, and a ready loop."""
