"""The one door to attention backends: which one serves, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.kernels import reasons_against_flashinfer
from cascade_llm.attention.native_backend import NativeAttentionBackend
from cascade_llm.attention.native_kernels import reasons_against_native
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import BackendError

__all__ = ["REASONS_AGAINST", "BackendChoice", "select_backend"]

BACKENDS: dict[str, type[AttentionBackend]] = {
    "flashinfer": FlashInferAttentionBackend,
    "native": NativeAttentionBackend,
    "torch": TorchAttentionBackend,
}
"""By preference."""


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """The backend that serves, and what speaks against those that were preferred to it."""

    name: str
    backend: type[AttentionBackend]
    refused: tuple[tuple[str, str], ...]
    """(backend, reason), one per reason."""

    def describe(self) -> str:
        """One line for the log."""
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return f"attention backend: {self.name}" + (f" ({reasons})" if reasons else "")


def select_backend(name: str, spec: AttentionSpec) -> BackendChoice:
    """The backend of that name, or with `auto` the first of flashinfer, native and torch that nothing speaks against.

    Raises:
        BackendError: the named backend cannot serve this model on this device; lists the reasons
    """
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"unknown attention backend {name!r}: it must be auto, {', '.join(BACKENDS)}")
    refused: list[tuple[str, str]] = []
    for candidate in BACKENDS if name == "auto" else (name,):
        reasons = REASONS_AGAINST[candidate](spec)
        if not reasons:
            return BackendChoice(name=candidate, backend=BACKENDS[candidate], refused=tuple(refused))
        refused.extend((candidate, reason) for reason in reasons)
    listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in refused)
    cure = "" if name == "auto" else " (attention_backend='auto' takes one that can)"
    raise BackendError(f"no attention backend can serve: {listed}{cure}")


def _reasons_against_torch(spec: AttentionSpec) -> list[str]:
    reasons = []
    if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
        reasons.append(f"computes in floating-point types of 16 bits or more, not {spec.dtype}")
    if spec.num_qo_heads % spec.num_kv_heads:
        reasons.append(f"{spec.num_qo_heads} query heads cannot be shared out over {spec.num_kv_heads} KV heads")
    return reasons


REASONS_AGAINST: dict[str, Callable[[AttentionSpec], list[str]]] = {
    "flashinfer": reasons_against_flashinfer,
    "native": reasons_against_native,
    "torch": _reasons_against_torch,
}
"""By name; each returns no reason for a model that its backend can serve."""
