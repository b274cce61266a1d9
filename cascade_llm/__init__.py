"""cascade-llm: LLM inference that attends shared prefixes once per step for the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["LLM", "CascadeError", "RequestOutput", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from cascade_llm.errors import CascadeError
    from cascade_llm.llm import LLM
    from cascade_llm.outputs import RequestOutput
    from cascade_llm.sampling_params import SamplingParams

_HOMES = {
    "LLM": "cascade_llm.llm",
    "CascadeError": "cascade_llm.errors",
    "RequestOutput": "cascade_llm.outputs",
    "SamplingParams": "cascade_llm.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import cascade_llm` alone loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cascade_llm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
