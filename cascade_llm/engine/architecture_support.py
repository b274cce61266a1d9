"""Which architectures are served, from which kinds of files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cascade_llm.loader.gguf_architectures import GGUF_ARCHITECTURES
from cascade_llm.models.architectures import ARCHITECTURES

__all__ = ["ArchitectureSupport", "architecture_support", "markdown_table"]


@dataclass(frozen=True, kw_only=True)
class ArchitectureSupport:
    """One architecture."""

    name: str
    """`model_type` of config.json."""
    hf_class: str
    """Hugging Face's class; its folders hold plain or quantized safetensors."""
    wrapper: str | None
    """Another class, of whose models this architecture is the part that is served."""
    gguf: str | None
    """general.architecture of its GGUF files; None where they are not read."""

    @property
    def classes(self) -> str:
        """Both, for a table."""
        return self.hf_class if self.wrapper is None else f"{self.hf_class}; text of {self.wrapper}"


def architecture_support() -> Iterator[ArchitectureSupport]:
    """All, in the order of the registry."""
    names = {kind: name for name, held in GGUF_ARCHITECTURES.items() for kind in (held.hf_class, *held.also_holds)}
    for name, architecture in ARCHITECTURES.items():
        hf_class = architecture.hf_class
        yield ArchitectureSupport(name=name, hf_class=hf_class, wrapper=architecture.wrapper, gguf=names.get(hf_class))


def markdown_table() -> str:
    """As the README has it."""
    rows = [f"| {row.name} | {row.classes} | {row.gguf or 'not read'} |" for row in architecture_support()]
    return "\n".join(("| architecture | class | GGUF, as |", "| --- " * 3 + "|", *rows))
