"""Run by an interpreter that has llama.cpp: `SOURCE TARGET FTYPE`, with its own quantizer.

FTYPE is what follows `LLAMA_FTYPE_MOSTLY_` in its header. A source that is quantized already is dequantized first.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp


def main(source: str, target: str, ftype: str) -> int:
    """The exit status: 0 where the file was written."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    params.allow_requantize = True
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
