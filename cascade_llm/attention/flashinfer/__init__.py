"""Attention by FlashInfer's kernels."""
