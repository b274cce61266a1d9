"""MXFP4 as gpt-oss ships it: the matrices of all experts of a layer, in blocks of 32 inputs with a power of two each.

    gate_up_proj_blocks  [experts, 2 * inner, hidden / 32, 16] uint8
    gate_up_proj_scales  [experts, 2 * inner, hidden / 32] uint8
    down_proj_blocks     [experts, hidden, inner / 32, 16] uint8
    down_proj_scales     [experts, hidden, inner / 32] uint8

A byte holds two neighbouring inputs, the lower half first; a scale is an exponent with 127 added. The outputs of gate
and up alternate. Format: OCP Microscaling 1.0, and the model card of openai/gpt-oss-20b.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cascade_llm.loader.quantized.e2m1 import E2M1, exponent_scales, scales_of_exponents
from cascade_llm.loader.quantized.format import QuantizedFormat
from cascade_llm.loader.quantized.grid import unpaired
from cascade_llm.loader.quantized.parts import MatrixParts
from cascade_llm.weights.codes import Codes
from cascade_llm.weights.format import StoredTensor, Unread

__all__ = ["MXFP4"]

BLOCK_LEN, BLOCK_BYTES = 32, 16
STACKS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parts whose outputs alternate in each tensor."""
PART_NAME = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<part>\w+)\.weight")


class MXFP4(QuantizedFormat):
    """See the module."""

    method = "mxfp4"
    markers = tuple(f"{name}_blocks" for name in STACKS)
    suffixes = (*markers, *(f"{name}_scales" for name in STACKS))

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`; of the configuration nothing changes how experts are stored."""

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return False

    def stored_name(self, name: str) -> str:
        """See `Checkpoint.stored_name`."""
        match = PART_NAME.fullmatch(name)
        stacks = (stack for stack, parts in STACKS.items() if match and match["part"] in parts)
        return next((f"{match['experts']}.{stack}_blocks" for stack in stacks if match), name)

    def check(self, parts: MatrixParts) -> None:
        """See `QuantizedFormat`."""
        for name in STACKS:
            blocks = parts.shape(f"{name}_blocks")
            if len(blocks) != 4 or blocks[3] != BLOCK_BYTES or 0 in blocks or blocks[1] % len(STACKS[name]):
                raise parts.error(f"{name}_blocks", f"has shape {list(blocks)}, not [experts, outputs, blocks, 16]")
            exponent_scales(parts, f"{name}_scales", blocks[:3], f": {name}_blocks has {list(blocks)}")
            parts.tensor(f"{name}_blocks", (torch.uint8,))

    def shapes(self, parts: MatrixParts) -> Iterator[tuple[str, tuple[int, ...]]]:
        """See `QuantizedFormat`."""
        for name, alternating in STACKS.items():
            num_experts, outputs, num_blocks, _ = parts.shape(f"{name}_blocks")
            shape = outputs // len(alternating), num_blocks * BLOCK_LEN
            yield from ((f"{expert}.{part}.weight", shape) for expert in range(num_experts) for part in alternating)

    def tensors(self, parts: MatrixParts) -> Iterator[tuple[str, StoredTensor]]:
        """See `QuantizedFormat`: `N.gate_proj.weight` and so on, of each expert N."""
        for name, alternating in STACKS.items():
            blocks, scales = (
                parts.tensor(f"{name}_blocks", (torch.uint8,)),
                parts.tensor(f"{name}_scales", (torch.uint8,)),
            )
            for expert in range(len(blocks)):
                for first, part in enumerate(alternating):
                    rows = slice(first, None, len(alternating))
                    matrix = UnreadBlocks(blocks[expert, rows], scales[expert, rows])
                    yield f"{expert}.{part}.weight", matrix.stored()
            parts.release((f"{name}_blocks", f"{name}_scales"))


@dataclass(frozen=True, eq=False)
class UnreadBlocks(Unread):
    """A part of one expert's matrix; a row of its data is the blocks, then the scales."""

    blocks: torch.Tensor
    """[outputs, blocks, 16], a view of the file."""
    scales: torch.Tensor
    """[outputs, blocks], too."""
    dtype = torch.uint8

    @property
    def num_bytes(self) -> int:
        """See `Unread`."""
        return self.blocks.nbytes + self.scales.nbytes

    def rows(self, rows: slice) -> UnreadBlocks:
        """See `Unread`."""
        return UnreadBlocks(self.blocks[rows], self.scales[rows])

    def columns(self, part: slice) -> StoredTensor | None:
        """See `Unread`."""
        if part.start % BLOCK_LEN or part.stop % BLOCK_LEN:
            return None
        blocks = slice(part.start // BLOCK_LEN, part.stop // BLOCK_LEN)
        return UnreadBlocks(self.blocks[:, blocks], self.scales[:, blocks]).stored()

    def stored(self) -> StoredTensor:
        """The part as a tensor."""
        outputs, num_blocks = self.scales.shape
        return StoredTensor("MXFP4", (outputs, num_blocks * BLOCK_LEN), self, _decoded, _codes)

    def read(self) -> torch.Tensor:
        """See `Unread`."""
        return torch.cat((self.blocks.flatten(1), self.scales), dim=1)


def _codes(rows: torch.Tensor) -> Codes:
    """Of rows, uint8 [rows, 17 * blocks]."""
    num_blocks = rows.shape[1] // (BLOCK_BYTES + 1)
    blocks, scales = rows[:, : num_blocks * BLOCK_BYTES], rows[:, num_blocks * BLOCK_BYTES :]
    return Codes(E2M1, unpaired(blocks), scales_of_exponents(scales))


def _decoded(rows: torch.Tensor) -> torch.Tensor:
    return _codes(rows).dequantized()
