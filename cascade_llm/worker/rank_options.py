"""What ranks are started with, and what can be refused before one is."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from cascade_llm.attention.head_shares import HeadShares
from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.device.devices import resolve_device, thread_count
from cascade_llm.errors import ConfigError

__all__ = ["check_ranks", "options_of_rank"]

log = logging.getLogger("cascade_llm")


def check_ranks(options: EngineOptions, model: ModelConfig) -> None:
    """Raise `ConfigError` where the model or the machine cannot be shared by so many ranks; warn of those on a CPU."""
    count = options.tensor_parallel_size
    HeadShares.check(model, count)
    if count == 1:
        return
    if resolve_device(options.device).type != "cuda":
        log.warning(
            "%d ranks on one CPU, with num_threads %d each, wait for each other more than %d times a step: one rank "
            "with all threads (tensor_parallel_size 1) is faster, unless the machine has several memory nodes",
            count,
            options_of_rank(options, 0).num_threads,
            2 * model.num_layers,
        )
        return
    if ":" in options.device:
        raise ConfigError(
            f"device is {options.device!r} and tensor_parallel_size {count}: ranks take the first GPUs, so give "
            "'cuda', and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if count > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size is {count}, and torch sees {torch.cuda.device_count()} CUDA devices: each rank "
            "takes one"
        )


def options_of_rank(options: EngineOptions, index: int) -> EngineOptions:
    """With a device of the rank's own, or a share of the cores."""
    count = options.tensor_parallel_size
    if count == 1:
        return options
    if resolve_device(options.device).type == "cuda":
        return replace(options, device=f"cuda:{index}")
    return replace(options, num_threads=options.num_threads or max(1, thread_count(None) // count))
