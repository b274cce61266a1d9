"""Doubles of what only a GPU machine has: a device's stream and FlashInfer's calls, stricter than the originals."""
