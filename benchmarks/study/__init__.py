"""One-shot training against dedicated networks, its parts and its variants."""
