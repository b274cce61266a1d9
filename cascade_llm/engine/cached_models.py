"""What the hubs' caches hold: whether it is served here, and the memory that it would take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cascade_llm.config import EngineOptions, ModelConfig
from cascade_llm.device.devices import resolve_device, resolve_dtype, resolve_page_dtype
from cascade_llm.device.ranks import Ranks
from cascade_llm.engine.weight_support import TypeSupport, weight_support
from cascade_llm.errors import CapacityError, CascadeError
from cascade_llm.layers.rope import max_context_len
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.hf_folder import read_json
from cascade_llm.loader.hub import CachedModel, Hub, HubRefusal, RepositoryFile, cached_models
from cascade_llm.loader.hub_name import HubName
from cascade_llm.loader.quantized.select import quantized_format
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.weights.dense import Dense
from cascade_llm.worker.memory import pool_pages
from cascade_llm.worker.pool_sizes import PoolShape

Support = Mapping[tuple[str, str], TypeSupport]
"""By container and type."""

__all__ = ["CachedReport", "describe_cache", "reason_against"]


@dataclass(frozen=True, kw_only=True)
class CachedReport:
    """A model of a cache, as far as its headers tell."""

    model: str
    """The name that opens it."""
    hub: str
    revision: str
    """As the cache calls it: Hugging Face's the commit, ModelScope's the branch or tag."""
    path: str
    num_bytes: int
    """On the disk."""
    last_used: float
    """Seconds since 1970."""
    format: str
    """"safetensors" or "GGUF"."""
    types: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the weights by type; empty where the files are not whole."""
    quantization: str | None = None
    """The type of most bytes of a GGUF file, or the method that config.json names; None where weights are plain."""
    architecture: str | None = None
    """As its configuration says; None where there is none."""
    reason: str | None = None
    """Why it is not served; None where it is."""
    weights_bytes: int | None = None
    """An estimate of what the weights take in memory."""
    pool_bytes: int | None = None
    """Of the KV pool with default options, at most: memory is taken as pages are used."""


def describe_cache(hubs: Iterable[Hub]) -> Iterator[CachedReport]:
    """All models of these caches; reads headers only."""
    models = [model for hub in hubs for model in cached_models(hub)]
    if models:  # what is served is known from the compiled code, which in a checkout may have to be compiled
        support = {(row.container, row.type): row for row in weight_support()}
        yield from (_describe(model, support) for model in models)


def reason_against(hub: Hub, name: HubName, files: Iterable[RepositoryFile]) -> str | None:
    """Why a model would not be served, by its config.json, fetched for that; None where it would, or is unknown."""
    configs = [file for file in files if file.name == "config.json"]
    try:
        hf_config = read_json(hub.fetch(name, configs) / "config.json")
        model_config_from_hf(hf_config)
        quantized_format(hf_config)
    except HubRefusal:  # the rest will be refused too, and say so
        return None
    except CascadeError as error:
        return " ".join(str(error).split())
    return None


def _describe(model: CachedModel, support: Support) -> CachedReport:
    container = "safetensors" if model.name.file is None else "GGUF"
    known: dict[str, Any] = {
        "model": str(model.name),
        "hub": model.name.hub,
        "revision": model.revision,
        "path": str(model.path),
        "num_bytes": model.num_bytes,
        "last_used": model.last_used,
        "format": container,
    }
    try:
        hf_config = open_checkpoint(model.path, load_format="dummy").hf_config()
        known["architecture"] = _architecture(hf_config)
        known["quantization"] = _quantization(hf_config)
        checkpoint = open_checkpoint(model.path)
        known["types"] = dict(checkpoint.bytes_by_type)
        if container == "GGUF":
            known["quantization"] = checkpoint.main_type
        config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    except CascadeError as error:
        return CachedReport(**known, reason=" ".join(str(error).split()))
    known["weights_bytes"] = _weights_bytes(config, checkpoint, container, support)
    try:
        known["pool_bytes"] = _pool_bytes(config, checkpoint.main_type)
    except CapacityError as error:
        return CachedReport(**known, reason=str(error))
    return CachedReport(**known, reason=_unread(checkpoint, container, support, known["quantization"]))


def _architecture(hf_config: Mapping[str, Any]) -> str | None:
    classes = hf_config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else hf_config.get("model_type")
    return name if isinstance(name, str) else None


def _quantization(hf_config: Mapping[str, Any]) -> str | None:
    """The method that config.json names, and its bits."""
    quantization = hf_config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    method, bits = quantization.get("quant_method", "unknown"), quantization.get("bits")
    return f"{method}, {bits} bits" if isinstance(bits, int) else str(method)


def _unread(checkpoint: Checkpoint, container: str, support: Support, quantization: str | None) -> str | None:
    """A type that is not read; what a quantization keeps its codes in is its own affair."""
    if container == "safetensors" and quantization is not None:
        return None
    for name in checkpoint.bytes_by_type:
        if (row := support.get((container, name))) is None or row.held_as is None:
            return f"weights of type {name} are not read"
    return None


def _weights_bytes(config: ModelConfig, checkpoint: Checkpoint, container: str, support: Support) -> int:
    """Each type's bytes, by what it takes here; what is unknown takes what it takes in the file."""
    types = {name: support.get((container, name)) for name in checkpoint.bytes_by_type}
    total = sum(
        num_bytes if (row := types[name]) is None else int(num_bytes * row.growth)
        for name, num_bytes in checkpoint.bytes_by_type.items()
    )
    main = types.get(checkpoint.main_type or "")
    if config.tie_word_embeddings and main is not None and main.is_plain and main.held_as != Dense.name:
        total += config.vocab_size * config.hidden_size * _dtype(config).itemsize  # rows are looked up in dense ones
    return total


def _pool_bytes(config: ModelConfig, stored_type: str | None) -> int:
    options, device = EngineOptions(), resolve_device("auto")
    pages = resolve_page_dtype(options, _dtype(config), device, stored_type)
    pools = PoolShape.of(options, config, max_context_len(config), pages.dtype.itemsize)
    return pools.num_bytes(pool_pages(options, pools, device, Ranks()))


def _dtype(config: ModelConfig) -> torch.dtype:
    return resolve_dtype("auto", config.dtype, resolve_device("auto"))
