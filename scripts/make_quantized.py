#!/usr/bin/env python
"""Make a model's quantized GGUF files with llama.cpp's own quantizer, and say which block types each really holds.

    PYTHONPATH=. scripts/make_quantized.py OUT_FOLDER --peer-python PYTHON [--model FILE] [TYPE ...]

PYTHON has `llama-cpp-python`. The model, SmolLM2 where none is given, becomes F16 first, and every other file is made
of that one. Rows that are no multiple of 256 long have no K type: the quantizer takes a neighbour, which is why what a
file holds is told.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peer_environment import DRIVERS, find_peer
from cascade_llm.errors import BackendError, CascadeError
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.resolve import open_checkpoint

TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "IQ4_NL")
LAST_LINES = 3


def quantize(python: Path, source: Path, target: Path, ftype: str) -> None:
    """One file; raises `BackendError` with the quantizer's last words."""
    command = [str(python), str(DRIVERS / "llama_cpp_quantize.py"), str(source), str(target), ftype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"llama.cpp made no {ftype}: {' | '.join(done.stderr.strip().splitlines()[-LAST_LINES:])}")


def describe(path: Path) -> str:
    """Size and matrices of each block type."""
    tensors = GGUFFile(path).tensors.values()
    types = Counter(tensor.type.name for tensor in tensors if len(tensor.shape) > 1)
    named = ", ".join(f"{count} {name}" for name, count in types.most_common())
    return f"{path.name}: {path.stat().st_size / 1e6:.1f} MB: {named}"


def main(arguments: Sequence[str], tell: Callable[[str], object] = print) -> int:
    """One line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("types", nargs="*", default=TYPES, metavar="TYPE")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--model", default="smollm2")
    given = parser.parse_args(arguments)
    try:
        python = find_peer("llama.cpp", given.peer_python).python
        source = open_checkpoint(given.model).tokenizer_source
        if source is None or not source.is_file():
            raise BackendError(f"{given.model} is no .gguf file: llama.cpp quantizes those")
        given.out.mkdir(parents=True, exist_ok=True)
        dense = given.out / f"{source.name.split('.')[0]}.F16.gguf"
        quantize(python, source, dense, "F16")
        tell(describe(dense))
        for ftype in given.types:
            target = dense.with_name(dense.name.replace("F16", ftype))
            quantize(python, dense, target, ftype)
            tell(describe(target))
    except CascadeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
