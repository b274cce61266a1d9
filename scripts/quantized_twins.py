"""What scripts share that compare a quantizing package's values with what we read of its files.

They run in an environment with that package beside torch and safetensors; see their heads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cascade_llm.loader.hf_folder import HuggingFaceCheckpoint

__all__ = ["Scheme", "Stored", "compare_schemes"]

Stored = tuple[Mapping[str, torch.Tensor], torch.Tensor]
"""What is stored of a matrix, by suffix, and the values that the package makes of it."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantize a model."""

    config: Mapping[str, Any]
    """`quantization_config` of config.json."""
    store: Callable[[torch.Tensor], Stored]
    """Of one matrix [out, in]."""


def compare_schemes(
    schemes: Mapping[str, Scheme], source: Path, target: Path, tell: Callable[[str], object] = print
) -> int:
    """Quantize the folder `source` by each scheme into a folder below `target`, and read it; one line for each.

    Returns 1 where a value differs in the package's dtype, else 0.
    """
    num_wrong = 0
    for name, scheme in schemes.items():
        folder = target / name
        theirs = _quantize(source, folder, scheme)
        ours = {key: values for key, values in HuggingFaceCheckpoint(folder).tensors() if key in theirs}
        wrong = [key for key, values in theirs.items() if not torch.equal(ours[key].to(values.dtype), values)]
        num_bytes = (folder / "model.safetensors").stat().st_size
        tell(f"{name}: {len(theirs)} matrices, {len(wrong)} differ, {num_bytes / 1e6:.1f} MB")
        num_wrong += len(wrong)
    return int(num_wrong > 0)


def _quantize(source: Path, target: Path, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Write the folder; returns what the package makes of its matrices, by the name of the tensor."""
    tensors, values = {}, {}
    for name, tensor in HuggingFaceCheckpoint(source).tensors():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor.clone()
            continue
        parts, values[name] = scheme.store(tensor)
        layer = name.removesuffix(".weight")
        tensors.update({f"{layer}.{suffix}": part.clone().contiguous() for suffix, part in parts.items()})
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors")
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields["quantization_config"] = dict(scheme.config)
    (target / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return values
