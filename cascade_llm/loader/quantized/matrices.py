"""The quantized matrices of a folder: which tensors belong to which, and all of them checked before one is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.quantized.format import QuantizedFormat
from cascade_llm.loader.quantized.parts import MatrixParts
from cascade_llm.loader.safetensors_file import SafetensorsFile
from cascade_llm.weights.format import StoredTensor

__all__ = ["check_quantized", "quantized_shapes", "read_quantized"]

log = logging.getLogger("cascade_llm")
WEIGHT = "weight"


def check_quantized(quantized: QuantizedFormat, homes: Mapping[str, SafetensorsFile]) -> None:
    """Look at the headers and the small tensors of all quantized matrices; `homes`: the file of every tensor.

    Raises:
        CheckpointError: tensors are broken, or the configuration contradicts them
    """
    names = sorted(set(_owners(quantized, homes).values()))
    if not names:
        raise CheckpointError(
            f"config.json: quantization_config ({quantized.method}) says that the weights are quantized, but no tensor "
            "is: remove quantization_config, or use the config.json that was saved with these weights"
        )
    for name in names:
        if quantized.is_ignored(name):
            raise CheckpointError(
                f"config.json: quantization_config says that {name} is not quantized, but its tensors are: use the "
                "config.json that was saved with these weights"
            )
        parts = MatrixParts(name, homes)
        quantized.check(parts)
        parts.release(quantized.suffixes)
    if any(_is_one_of(quantized.unread, name) for name in homes):
        log.info("the checkpoint rounds activations by scales of its own: they are not read")
    if quantized.input_bits is not None:
        log.info(
            "config.json: quantization_config rounds activations to %d bits: here only its weights are rounded so",
            quantized.input_bits,
        )


def quantized_shapes(
    quantized: QuantizedFormat, homes: Mapping[str, SafetensorsFile]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names that `read_quantized` gives, and their shapes; of tensors that `check_quantized` has looked at."""
    for name, owner in _in_order(quantized, homes):
        if owner is None:
            yield name, homes[name].shape(name)
        else:
            for below, shape in quantized.shapes(MatrixParts(owner, homes)):
                yield f"{owner}.{below}", shape


def read_quantized(
    quantized: QuantizedFormat, homes: Mapping[str, SafetensorsFile]
) -> Iterator[tuple[str, StoredTensor]]:
    """All weights in the order of `homes`, quantized ones as "NAME.weight" where the first tensor of them stands."""
    for name, owner in _in_order(quantized, homes):
        if owner is None:
            yield name, StoredTensor.plain(homes[name].tensor(name), partial(homes[name].release, name))
            homes[name].release(name)
        else:
            for below, stored in quantized.tensors(MatrixParts(owner, homes)):
                yield f"{owner}.{below}", stored
                stored.release()


def _in_order(quantized: QuantizedFormat, homes: Mapping[str, SafetensorsFile]) -> Iterator[tuple[str, str | None]]:
    """What is read, in the order of `homes`: a plain tensor with None, or the first tensor of a layer with its name."""
    owners = _owners(quantized, homes)
    done = set()
    for name in homes:
        owner = owners.get(name)
        if owner is None:
            if not _is_one_of(quantized.unread, name):
                yield name, None
        elif owner not in done:
            done.add(owner)
            yield name, owner


def _owners(quantized: QuantizedFormat, homes: Mapping[str, SafetensorsFile]) -> dict[str, str]:
    """The quantized layer of each tensor that belongs to one."""
    layers = {_layer(quantized.markers, name) for name in homes}
    layers |= {_layer((WEIGHT,), name) for name, file in homes.items() if file.type_name(name) in quantized.coded_types}
    owned = ((name, _layer(quantized.suffixes, name)) for name in homes)
    return {name: layer for name, layer in owned if layer is not None and layer in layers}


def _layer(suffixes: Iterable[str], name: str) -> str | None:
    """What stands before the suffix of a tensor's name; None where it has none of these."""
    return next((name[: -len(suffix) - 1] for suffix in suffixes if name.endswith(f".{suffix}")), None)


def _is_one_of(suffixes: Iterable[str], name: str) -> bool:
    return _layer(suffixes, name) is not None
