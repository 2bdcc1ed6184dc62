"""The file: one safetensors file that holds every precision of a network, and explains itself."""
