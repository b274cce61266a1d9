"""The one door to hubs: from a hub's name to what it is asked through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from cascade_llm.errors import ModelNotFoundError
from cascade_llm.loader.hub import Hub
from cascade_llm.loader.hub_name import HUGGINGFACE, MODELSCOPE
from cascade_llm.loader.huggingface import HuggingFaceHub
from cascade_llm.loader.modelscope import ModelScopeHub

__all__ = ["open_hub", "open_hubs"]

OPENERS: Mapping[str, Callable[[], Hub]] = {HUGGINGFACE: HuggingFaceHub, MODELSCOPE: ModelScopeHub}


def open_hub(name: str) -> Hub:
    """The hub of a `HubName`. Raises `ModelNotFoundError` where its client is not installed."""
    return OPENERS[name]()


def open_hubs() -> list[Hub]:
    """All of them whose clients are installed."""
    hubs = []
    for name in OPENERS:
        with suppress(ModelNotFoundError):
            hubs.append(open_hub(name))
    return hubs
