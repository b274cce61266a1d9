"""Filling a decoder: from a checkpoint's tensors under Hugging Face's names, or with random ones."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.kv_cache.paged_kv_cache import KVScale
from cascade_llm.models.architectures import ARCHITECTURES
from cascade_llm.models.decoder import Decoder
from cascade_llm.weights.format import StoredTensor

__all__ = ["KVScaleReader", "check_shapes", "init_dummy", "load_weights"]

T = TypeVar("T")

log = logging.getLogger("cascade_llm")

MAX_NAMED_PROBLEMS = 10
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DUMMY_PERIOD = 1_000_003
"""Random numbers that are drawn once and repeated; a prime, so that no two rows of a matrix are alike."""

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RECOMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Buffers that old checkpoints carry and nobody needs."""
SCALE_NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale")


def check_shapes(decoder: Decoder, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Compare the names and shapes that a checkpoint's headers tell with the decoder's, before weights are read.

    Raises as `load_weights` does.
    """
    shapes, expected = list(shapes), _Expected(decoder)
    if num_others := len(shapes) - sum(1 for _ in _named(decoder, shapes)):
        log.warning("%d tensors of parts beside the language model are left out: text alone is read", num_others)
    named = ((name, shape) for name, shape in _named(decoder, shapes) if SCALE_NAME.fullmatch(name) is None)
    problems = [expected.take(name, shape) for name, shape in named]
    expected.finish([problem for problem in problems if problem is not None])


def load_weights(decoder: Decoder, tensors: Iterable[tuple[str, StoredTensor]]) -> None:
    """Give a checkpoint's tensors to the decoder, one at a time.

    Recomputed rotary buffers are passed over, and a head that is equal to the embedding that it is tied to. Raises
    `CheckpointError` with every tensor that is missing, unexpected, wrongly shaped, of a dtype that is no plain float,
    or given twice.
    """
    expected = _Expected(decoder)
    problems: list[str] = []
    held: dict[str, StoredTensor] = {}
    for name, tensor in _named(decoder, tensors):
        if name in expected.tied:
            held[name] = tensor
        problem = expected.take(name, tensor.shape) or _dtype_problem(name, tensor)
        if problem is not None:
            problems.append(problem)
        elif name in expected.parameters:
            expected.parameters[name].load(tensor)
    if len(held) == 2 and not torch.equal(held[HEAD].values(), held[EMBEDDING].values()):
        problems.append(f"{HEAD} is another matrix than {EMBEDDING}, and the configuration ties them")
    expected.finish(problems)


def _named(decoder: Decoder, tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """By the names that the blocks have, without what belongs to parts that are not served."""
    own_name = ARCHITECTURES[decoder.config.architecture].tensor_name
    for name, tensor in tensors:
        if (own := own_name(name)) is not None:
            yield own, tensor


class _Expected:
    """The parameters of a decoder, and which of them no tensor was there for yet."""

    def __init__(self, decoder: Decoder) -> None:
        self.parameters = dict(decoder.named_parameters())
        whole = [name for name, parameter in self.parameters.items() if not parameter.stands_for]
        self._missing, self._num_expected = dict.fromkeys(whole), len(whole)
        self._architecture = decoder.config.architecture
        self.tied = (HEAD, EMBEDDING) if decoder.config.tie_word_embeddings else ()

    def take(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a tensor, or None."""
        parameter = self.parameters.get(name)
        if parameter is None:
            is_passed_over = name in self.tied or name.endswith(RECOMPUTED_SUFFIXES)
            return None if is_passed_over else f"{name} is not a tensor of {self._architecture}"
        names = parameter.stands_for or (name,)
        if any(own not in self._missing for own in names):
            return f"{name} is given twice"
        for own in names:
            del self._missing[own]
        if shape != parameter.shape:
            return f"{name} has shape {list(shape)}, the configuration says {list(parameter.shape)}"
        return None

    def finish(self, problems: list[str]) -> None:
        """Raise `CheckpointError` where there were any, or a parameter is without values."""
        if problems := [*problems, *(f"{name} is missing" for name in self._missing)]:
            raise CheckpointError(_summary(problems, self._num_expected))


def init_dummy(decoder: Decoder, seed: int = 0) -> None:
    """Random weights at the speed of a copy; matrices scaled by 1/sqrt(inputs), norms 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(DUMMY_PERIOD, generator=generator).to(decoder.dtype).to(decoder.device)
    start = 0
    for name, parameter in decoder.named_parameters():
        if parameter.stands_for:
            continue
        if name.endswith("norm.weight"):
            neutral = 1.0 - decoder.config.norm_offset
            values = torch.full(parameter.shape, neutral, dtype=decoder.dtype, device=decoder.device)
        else:
            count = math.prod(parameter.shape)
            values = numbers.roll(-start).repeat(-(-count // DUMMY_PERIOD))[:count].view(parameter.shape)
            values = values * parameter.shape[-1] ** -0.5
            start = (start + count) % DUMMY_PERIOD
        parameter.load(StoredTensor.plain(values))


class KVScaleReader:
    """Takes the scales of 8-bit pages out of a checkpoint's tensors: `model.layers.N.self_attn.k_scale` and `v_scale`,
    one number each."""

    def __init__(self, num_layers: int) -> None:
        self._found: list[dict[str, float]] = [{} for _ in range(num_layers)]

    def without_scales(self, tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[tuple[str, StoredTensor]]:
        """The other tensors; read to its end before `scales`. Raises `CheckpointError` for a scale that is none."""
        for name, tensor in tensors:
            match = SCALE_NAME.fullmatch(name)
            if match is None or int(match[1]) >= len(self._found):
                yield name, tensor
            else:
                self._found[int(match[1])][match[2]] = _scale(name, tensor.values())

    def scales(self) -> list[KVScale]:
        """Of each layer; 1 where the checkpoint says nothing."""
        return [KVScale(**found) for found in self._found]


def _scale(name: str, tensor: torch.Tensor) -> float:
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise CheckpointError(f"{name} must be one positive number, not {tensor.tolist()}: remove it, or mend the file")
    return value


def _dtype_problem(name: str, tensor: StoredTensor) -> str | None:
    if tensor.decode is None and tensor.dtype not in WEIGHT_DTYPES:
        return f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, not a plain float"
    return None


def _summary(problems: list[str], num_expected: int) -> str:
    named = "\n  ".join(problems[:MAX_NAMED_PROBLEMS])
    hidden = len(problems) - MAX_NAMED_PROBLEMS
    more = f"\n  and {hidden} more" if hidden > 0 else ""
    return (
        f"the checkpoint does not fit its configuration: {len(problems)} problems, {num_expected} tensors expected\n"
        f"  {named}{more}\nUse the config.json that was saved with these weights."
    )
