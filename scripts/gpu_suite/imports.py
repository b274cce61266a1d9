"""What cannot be imported on a machine: asked before anything else is, so it needs nothing itself."""

from __future__ import annotations

import importlib

__all__ = ["REQUIRED", "check_imports"]

IMPORTS = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf", "numpy", "xxhash", "click",
           "rich", "psutil", "flashinfer", "tvm_ffi", "matplotlib", "cascade_llm.llm")  # fmt: skip
REQUIRED = ("torch", "cascade_llm.llm")
"""Without these nothing can be measured; cascade_llm.llm brings what it cannot do without."""


def check_imports() -> dict[str, str | None]:
    """The reason for each module that cannot be imported, printed at once; None for the others."""
    found: dict[str, str | None] = {}
    for name in IMPORTS:
        try:
            importlib.import_module(name)
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"cannot import {name}: {found[name]}", flush=True)
    return found
