"""Quantized safetensors: a module per way to store them, all read as `Codes`."""
