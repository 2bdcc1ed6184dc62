"""One-shot training inside other people's training loops; one file each, imported by its users."""
