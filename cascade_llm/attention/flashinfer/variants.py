"""How FlashInfer's attention kernels are compiled for a model: with a window, which is a module of its own, or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cascade_llm.attention.backend import AttentionSpec

__all__ = ["KernelVariant", "kernel_variants"]


class KernelVariant(NamedTuple):
    """One way to compile a kernel."""

    kernel: str
    for_windows: bool

    @property
    def purpose(self) -> str:
        """What reports call it."""
        return f"{self.kernel} with a window" if self.for_windows else self.kernel


def kernel_variants(spec: AttentionSpec, kernels: Iterable[str]) -> list[KernelVariant]:
    """What a model needs of these kernels: leaves of attention kinds with a window are computed with it, shared levels
    and edges without."""
    has_windows, reads_all = any(spec.window_lens), None in spec.window_lens
    return [
        KernelVariant(kernel, for_windows)
        for kernel in sorted(set(kernels))
        for for_windows in (False, True)
        if (has_windows if for_windows else reads_all or kernel == "prefill_fa2")
    ]
