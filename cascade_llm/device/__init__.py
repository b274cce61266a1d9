"""Streams, memory, devices, and compiling kernels for them."""
