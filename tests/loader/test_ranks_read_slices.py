"""What a rank reads of a checkpoint while it loads: its own slices of every matrix, in every kind of file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from cascade_llm.device.ranks import Ranks
from cascade_llm.device.torch_exchange import TorchExchange
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.loading import load_weights
from tests.loader.gguf_files import write_model
from tests.loader.quantized_files import WRITERS, Written, fp8, gptq, pack_quantized
from tests.loader.table_files import bnb4, nvfp4
from tests.models.checkpoints import empty_decoder, tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, **SIZES}
NUM_RANKS = 2


class BytesRead(TorchDispatchMode):
    """Counts what operators take of tensors that are views of mapped files; to look at a view is no reading."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.num_bytes = 0
        self._files = str(path.resolve())
        self._mapped: list[range] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.index.Tensor:  # which reads the rows that it was asked for
            self.num_bytes += found.nbytes if self._is_of_a_file(args[0].data_ptr()) else 0
            return found
        made = {leaf.untyped_storage().data_ptr() for leaf in plain_tensors(found)}
        for leaf in plain_tensors((args, kwargs)):
            if leaf.numel() and leaf.untyped_storage().data_ptr() not in made:
                self.num_bytes += leaf.nbytes if self._is_of_a_file(leaf.data_ptr()) else 0
        return found

    def _is_of_a_file(self, address: int) -> bool:
        if not self._mapped:  # they stay mapped as long as this counts
            lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if self._files in line]
            self._mapped = [range(*(int(number, 16) for number in line.split()[0].split("-"))) for line in lines]
        return any(address in span for span in self._mapped)


def plain_tensors(tree: Any) -> list[torch.Tensor]:
    """Those with a layout that is torch's own."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


def plain_folder(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def quantized_folder(writer: Callable[..., Written], model: PreTrainedModel, folder: Path) -> Path:
    """Every projection in that format."""
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if "_proj.weight" not in name:
            tensors[name] = tensor
            continue
        written = writer(0, *tensor.shape)
        config = written.config
        tensors.update({f"{name[:-6]}{suffix}": part.contiguous() for suffix, part in written.tensors.items()})
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    return folder


def gguf_file(kind: GGMLQuantizationType, model: PreTrainedModel, folder: Path) -> Path:
    return write_model(folder / "tiny.gguf", model, tensor_type=kind)


SOURCES: dict[str, Callable[[PreTrainedModel, Path], Path]] = {
    "plain": plain_folder,
    **{name: partial(quantized_folder, writer) for name, writer in WRITERS.items()},
    "gptq, 8 bits": partial(quantized_folder, partial(gptq, bits=8)),
    "pack-quantized": partial(quantized_folder, partial(pack_quantized, symmetric=False)),
    "fp8": partial(quantized_folder, partial(fp8, block=(32, 32))),
    "nvfp4": partial(quantized_folder, nvfp4),
    "bitsandbytes nf4": partial(quantized_folder, bnb4),
    "GGUF F16": partial(gguf_file, GGMLQuantizationType.F16),
}


def bytes_read(model: PreTrainedModel, source: Path, index: int, count: int) -> int:
    """By one rank, while it fills its decoder."""
    checkpoint = open_checkpoint(source)
    ranks = Ranks(index, count, TorchExchange(None)) if count > 1 else Ranks()
    decoder = empty_decoder(model, torch.bfloat16, ranks=ranks)  # in no type of the files: values are converted
    with torch.inference_mode(), BytesRead(source) as counter:
        load_weights(decoder, checkpoint.stored_tensors())
    return counter.num_bytes


@pytest.mark.parametrize(
    "name", [name if name == "gptq" else pytest.param(name, marks=pytest.mark.slow) for name in SOURCES]
)
def test_a_rank_reads_its_own_slices(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Norms and scales are read by all ranks, and one row of a matrix where a format asks for its layout."""
    model = tiny_model("llama", **SIZES)
    source = SOURCES[name](model, tmp_path)
    size = open_checkpoint(source).num_bytes
    whole = bytes_read(model, source, 0, 1)
    shares = [bytes_read(model, source, index, NUM_RANKS) for index in range(NUM_RANKS)]
    record_property("bytes", {"file": size, "one rank": whole, "each of two": shares})
    assert whole > 0.85 * size, "else this counts nothing"
    assert max(shares) < 0.62 * whole, (name, size, whole, shares)
    assert sum(shares) < 1.24 * whole


def test_interleaved_heads_of_blocks_are_read_by_their_own_rows(tmp_path: Path) -> None:
    path = gguf_file(GGMLQuantizationType.Q8_0, tiny_model("llama", **SIZES), tmp_path)
    stored = dict(open_checkpoint(path).stored_tensors())["model.layers.0.self_attn.q_proj.weight"]
    half = stored.rows(slice(64, 128))
    with BytesRead(path) as counter:
        data = half.data
    assert torch.equal(data, stored.data[64:])
    assert counter.num_bytes == half.num_bytes == stored.data.nbytes // 2
