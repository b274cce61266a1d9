"""Which engine options validation takes from its user."""

from __future__ import annotations

__all__ = ["OPTIONS", "REPLAY_OPTIONS"]

OPTIONS = (
    "dtype",
    "kv_cache_dtype",
    "device",
    "num_threads",
    "tensor_parallel_size",
    "rank_timeout_s",
    "attention_backend",
    "page_size",
    "cascade_max_levels",
    "quantization",
    "enforce_eager",
    "load_format",
    "debug",
)
"""The others are set by validation itself, to what it reads."""

REPLAY_OPTIONS = ("device", "num_threads", "attention_backend", "enforce_eager", "load_format", "debug")
"""The others of a replay are those of the recording."""
