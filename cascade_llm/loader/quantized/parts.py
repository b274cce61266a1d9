"""The tensors that one quantized matrix is stored in, checked as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.safetensors_file import DTYPES, SafetensorsFile

__all__ = ["SCALE_DTYPES", "MatrixParts"]

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CURE = "quantize the model again, or download it again"


class MatrixParts:
    """Tensors "NAME.SUFFIX" of a folder; each may lie in another file."""

    def __init__(self, name: str, homes: Mapping[str, SafetensorsFile]) -> None:
        """`name`: of the layer; `homes`: the file of every tensor of the folder."""
        self.name, self._homes = name, homes

    def __contains__(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self._homes

    def shape(self, suffix: str) -> tuple[int, ...]:
        """From the header."""
        return self._home(suffix).shape(f"{self.name}.{suffix}")

    def matrix(self, suffix: str, dtypes: Sequence[torch.dtype]) -> tuple[int, int]:
        """The shape of a tensor that must have two dimensions, neither of them 0, and one of the dtypes."""
        self._check_dtype(suffix, dtypes)
        shape = self.shape(suffix)
        if len(shape) != 2 or 0 in shape:
            raise self.error(suffix, f"has shape {list(shape)}, it must be a matrix")
        return shape[0], shape[1]

    def tensor(
        self, suffix: str, dtypes: Sequence[torch.dtype], shape: Sequence[int] | None = None, why: str = ""
    ) -> torch.Tensor:
        """A view of the file; `why`: what the shape follows from."""
        self._check_dtype(suffix, dtypes)
        if shape is not None and self.shape(suffix) != tuple(shape):
            raise self.error(suffix, f"has shape {list(self.shape(suffix))}, not {list(shape)}" + why)
        return self._home(suffix).tensor(f"{self.name}.{suffix}")

    def scales(self, suffix: str, shape: Sequence[int], why: str = "") -> torch.Tensor:
        """As `tensor`; every one must be positive and finite."""
        scales = self.tensor(suffix, SCALE_DTYPES, shape, why)
        self._refuse_scales(suffix, scales, ~((scales > 0) & scales.isfinite()), "positive")
        return scales

    def scales_or_zeros(
        self, suffix: str, dtypes: Sequence[torch.dtype], shape: Sequence[int], why: str = ""
    ) -> torch.Tensor:
        """As `scales`, float32; one may be 0, which is what its group's weights then are."""
        scales = self.tensor(suffix, dtypes, shape, why).float()
        self._refuse_scales(suffix, scales, ~((scales >= 0) & scales.isfinite()), "positive or 0")
        return scales

    def number(self, suffix: str) -> torch.Tensor:
        """One positive number, float32 [1]."""
        return self.scales(suffix, () if self.shape(suffix) == () else (1,)).float().view(1)

    def release(self, suffixes: Sequence[str]) -> None:
        """Give back the memory that reading them has brought in."""
        for suffix in suffixes:
            if suffix in self:
                self._home(suffix).release(f"{self.name}.{suffix}")

    def error(self, suffix: str, problem: str) -> CheckpointError:
        """That names the tensor and its file."""
        full = f"{self.name}.{suffix}"
        return CheckpointError(f"{self._homes[full].path}: tensor {full} {problem}: {CURE}")

    def _refuse_scales(self, suffix: str, scales: torch.Tensor, wrong: torch.Tensor, must_be: str) -> None:
        if wrong.any():
            raise self.error(
                suffix, f"has {int(wrong.sum())} scales such as {float(scales[wrong][0])}; all must be {must_be}"
            )

    def _check_dtype(self, suffix: str, dtypes: Sequence[torch.dtype]) -> None:
        found = self._home(suffix).type_name(f"{self.name}.{suffix}")
        if DTYPES.get(found) not in dtypes:
            wanted = ", ".join(name for name, dtype in DTYPES.items() if dtype in dtypes)
            raise self.error(suffix, f"has dtype {found}; quantization_config asks for {wanted}")

    def _home(self, suffix: str) -> SafetensorsFile:
        full = f"{self.name}.{suffix}"
        if full in self._homes:
            return self._homes[full]
        paths = sorted({file.path for name, file in self._homes.items() if name.startswith(f"{self.name}.")})
        where = paths[0] if paths else "the checkpoint"
        raise CheckpointError(f"{where}: tensor {full} is missing, and {self.name} is quantized: {CURE}")
