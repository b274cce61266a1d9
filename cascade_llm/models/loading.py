"""Filling a decoder: from a checkpoint's tensors under Hugging Face's names, or with random ones."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.kv_cache.paged_kv_cache import KVScale
from cascade_llm.models.architectures import ARCHITECTURES
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.stored_names import StoredNames
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


def check_shapes(
    decoder: Decoder, shapes: Iterable[tuple[str, tuple[int, ...]]], stored_name: Callable[[str], str] = str
) -> None:
    """Compare the names and shapes that a checkpoint's headers tell with the decoder's, before weights are read.

    `stored_name`: see `Checkpoint`; messages have the names of the files. Raises as `load_weights` does.
    """
    shapes, expected = list(shapes), _Expected(decoder, stored_name)
    if num_others := len(shapes) - sum(1 for _ in _named(decoder, shapes)):
        log.warning("%d tensors of parts beside the language model are left out: text alone is read", num_others)
    for name, own, shape in _named(decoder, shapes):
        if SCALE_NAME.fullmatch(own) is None:
            expected.take(name, own, shape)
    expected.finish()


def load_weights(decoder: Decoder, tensors: Iterable[tuple[str, StoredTensor]]) -> None:
    """Give a checkpoint's tensors to the decoder, one at a time.

    Recomputed rotary buffers are passed over, and a head that is equal to the embedding that it is tied to. Raises
    `CheckpointError` with every tensor that is missing, unexpected, wrongly shaped, of a dtype that is no plain float,
    or given twice.
    """
    expected = _Expected(decoder)
    held: dict[str, StoredTensor] = {}
    for name, own, tensor in _named(decoder, tensors):
        if own in expected.tied:
            held[own] = tensor
        if expected.take(name, own, tensor.shape, _dtype_problem(tensor)) and own in expected.parameters:
            expected.parameters[own].load(tensor)
    if len(held) == 2 and not torch.equal(held[HEAD].values(), held[EMBEDDING].values()):
        expected.problems.append((HEAD, f"is another matrix than {EMBEDDING}, and the configuration ties them"))
    expected.finish()


def _named(decoder: Decoder, tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, str, T]]:
    """By the checkpoint's names and those that the blocks have, without what belongs to parts that are not served."""
    own_name = ARCHITECTURES[decoder.config.architecture].tensor_name
    for name, tensor in tensors:
        if (own := own_name(name)) is not None:
            yield name, own, tensor


class _Expected:
    """The parameters of a decoder, which of them no tensor was there for yet, and what was wrong with others."""

    def __init__(self, decoder: Decoder, stored_name: Callable[[str], str] = str) -> None:
        self.parameters = dict(decoder.named_parameters())
        self._whole = [name for name, parameter in self.parameters.items() if not parameter.stands_for]
        self._missing = dict.fromkeys(self._whole)
        self._architecture = decoder.config.architecture
        self.tied = (HEAD, EMBEDDING) if decoder.config.tie_word_embeddings else ()
        self.problems: list[tuple[str, str]] = []
        """Names of parameters, and what is wrong with their tensors."""
        stacks = {name: parameter.stands_for for name, parameter in self.parameters.items()}
        self._names = StoredNames(stacks, stored_name)

    def take(self, name: str, own: str, shape: tuple[int, ...], problem: str | None = None) -> bool:
        """Note what is wrong with a tensor: `problem`, or what is seen here. Returns whether there is nothing.

        Args:
            name: the checkpoint's
            own: the parameter's
            shape: as stored
            problem: what else is known to be wrong
        """
        self._names.learn(own, name)
        problem = self._problem(own, shape) or problem
        if problem is not None:
            self.problems.append((own, problem))
        return problem is None

    def _problem(self, own: str, shape: tuple[int, ...]) -> str | None:
        parameter = self.parameters.get(own)
        if parameter is None:
            is_passed_over = own in self.tied or own.endswith(RECOMPUTED_SUFFIXES)
            return None if is_passed_over else f"is not a tensor of {self._architecture}"
        names = parameter.stands_for or (own,)
        if any(each not in self._missing for each in names):
            return "is given twice"
        for each in names:
            del self._missing[each]
        if shape != parameter.shape:
            return f"has shape {list(shape)}, the configuration says {list(parameter.shape)}"
        return None

    def finish(self) -> None:
        """Raise `CheckpointError` where there were problems, or a parameter is without values."""
        of_tensors = self._names.by_tensor(self._whole)
        told = [f"{self._told(own, of_tensors)} {problem}" for own, problem in self.problems]
        for stored, names in of_tensors.items():
            missing = [name for name in names if name in self._missing]
            if missing and len(missing) == len(names):
                told.append(f"{stored} is missing")
            elif missing:
                told += (f"{stored} lacks its part {name}: this is missing" for name in missing)
        if told:
            raise CheckpointError(_summary(told, len(self._whole)))

    def _told(self, own: str, of_tensors: Mapping[str, list[str]]) -> str:
        """The file's name of a tensor, and its part where it holds several."""
        stored = self._names.of(own)
        return stored if own == stored or of_tensors.get(stored, [own]) == [own] else f"{stored}, its part {own},"


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


def _dtype_problem(tensor: StoredTensor) -> str | None:
    if tensor.decode is None and tensor.dtype not in WEIGHT_DTYPES:
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}, not a plain float"
    return None


def _summary(problems: list[str], num_expected: int) -> str:
    named = "\n  ".join(problems[:MAX_NAMED_PROBLEMS])
    hidden = len(problems) - MAX_NAMED_PROBLEMS
    more = f"\n  and {hidden} more" if hidden > 0 else ""
    return (
        f"the checkpoint does not fit its configuration: {len(problems)} problems, {num_expected} tensors expected\n"
        f"  {named}{more}\nUse the config.json that was saved with these weights."
    )
