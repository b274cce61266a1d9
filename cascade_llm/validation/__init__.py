"""Comparisons that prove the engine right."""
