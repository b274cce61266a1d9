"""Attention over a paged KV cache, level by level."""
