"""What a converted network is made of: fake quantization, quantizers, layers and norms."""
