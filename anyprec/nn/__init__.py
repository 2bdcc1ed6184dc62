"""What a converted network is made of: fake quantization, quantizers, quantized layers and norms."""
