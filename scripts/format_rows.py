#!/usr/bin/env python
"""What each quantized form of a model costs beside its dense copy: memory, processor time, and what it foretells.

    PYTHONPATH=. scripts/format_rows.py DENSE_FOLDER MODEL[+METHOD] ... [--turns 3] [--num-tokens 20480]

MODEL is a folder or a .gguf file; METHOD rounds it while it is loaded (`quantization=`). One thread. Engines of the
dense copy and of the model take turns in one process, and a turn costs the processor time it took: one request of 32
tokens that decodes 32, and a prompt of 256. Perplexity is that of `python -m benchmarks perplexity`, inputs of products
rounded where the form's products round them. Where `scripts/quantized_folders.py` left `twin_logprobs.json`,
log-probabilities are compared with it too, inputs exact and rounded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.perplexity import read_text, windows_of
from cascade_llm import LLM, SamplingParams
from cascade_llm.bench.setup import open_model
from cascade_llm.errors import CascadeError

TWIN_FILE = "twin_logprobs.json"
PROMPT_LEN, OUTPUT_LEN, LONG_LEN, WINDOW_LEN = 32, 32, 256, 512
OPTIONS: Mapping[str, Any] = {"max_model_len": WINDOW_LEN, "max_num_seqs": 8, "kv_cache_bytes": 256 << 20}
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


@dataclass(frozen=True)
class Form:
    """One way to hold the model."""

    source: str
    method: str | None

    @classmethod
    def named(cls, text: str) -> Form:
        """Of MODEL[+METHOD]."""
        source, _, method = text.partition("+")
        return cls(source, method or None)

    @property
    def name(self) -> str:
        """For a row."""
        return Path(self.source).name + ("" if self.method is None else f"+{self.method}")

    def llm(self, *, exact: bool = False) -> LLM:
        """An engine that keeps no prefix of one turn for the next."""
        own = {"quantization": self.method, "exact_activations": exact, "enable_prefix_caching": False}
        return LLM(self.source, num_threads=1, progress=False, **own, **OPTIONS)


def weight_bytes(llm: LLM) -> int:
    """What all matrices take in memory, the embedding too."""
    decoder = llm._engine.executor.runner.decoder  # type: ignore[attr-defined]
    held = {id(linear.matrix): linear.matrix.num_bytes for linear in decoder.linears}
    held[id(decoder.embedding.matrix)] = decoder.embedding.matrix.num_bytes
    return sum(held.values())


def turn(llm: LLM) -> tuple[float, float]:
    """Processor seconds of the decode steps, and of the long prompt."""
    took = []
    for length, count in ((PROMPT_LEN, 1), (PROMPT_LEN, 1 + OUTPUT_LEN), (LONG_LEN, 1)):
        before = time.process_time()
        llm.generate([list(range(100, 100 + length))], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        took.append(time.process_time() - before)
    return took[1] - took[0], took[2]


def ratios(dense: LLM, llm: LLM, turns: int) -> tuple[float, float]:
    """How many times as fast as dense: decode and prompt, medians of pairs."""
    turn(dense), turn(llm)
    pairs = []
    for number in range(turns):
        taken = {index: turn((dense, llm)[index]) for index in ((0, 1) if number % 2 else (1, 0))}
        pairs.append((taken[0], taken[1]))
    decode, prompt = (median(theirs[kind] / own[kind] for theirs, own in pairs) for kind in (0, 1))
    return decode, prompt


def logprobs(llm: LLM, windows: Sequence[Sequence[int]]) -> list[float]:
    """Of every token but the first of each window."""
    outputs = llm.generate([list(window) for window in windows], SCORE)
    return [scored.logprob for output in outputs for scored in output.prompt_logprobs or () if scored is not None]


def twin_of(form: Form) -> tuple[list[list[int]], list[float]] | None:
    """Token ids, and the log-probabilities that the tool's own twin gives them."""
    path = Path(form.source) / TWIN_FILE
    if not path.is_file():
        return None
    twin = json.loads(path.read_text(encoding="utf-8"))
    return twin["token_ids"], [value for row in twin["logprobs"] for value in row]


def difference(found: Sequence[float], wanted: Sequence[float]) -> str:
    """Mean and largest."""
    apart = [abs(own - theirs) for own, theirs in zip(found, wanted, strict=True)]
    return f"{sum(apart) / len(apart):.2g} (at most {max(apart):.2g})"


def row(form: Form, dense: LLM | None, windows: Sequence[Sequence[int]], turns: int) -> str:
    """One line; without a dense engine the form is the dense one."""
    twin = twin_of(form)
    with form.llm() as llm:
        told = [f"{form.name}: {weight_bytes(llm) / 1e6:.1f} MB"]
        if dense is not None and turns:
            told.append("decode {:.2f}, prompt {:.2f} times".format(*ratios(dense, llm, turns)))
        if twin is not None:
            told.append(f"from its twin {difference(logprobs(llm, twin[0]), twin[1])}")
        if windows:
            values = logprobs(llm, windows)
            told.append(f"perplexity {math.exp(-sum(values) / len(values)):.3f}")
    if twin is not None:
        with form.llm(exact=True) as llm:
            told.append(f"exact from its twin {difference(logprobs(llm, twin[0]), twin[1])}")
    return ", ".join(told)


def main(arguments: Sequence[str], tell: Callable[[str], object] = print) -> int:
    """One line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--turns", type=int, default=3, help="0: no speed")
    parser.add_argument("--num-tokens", type=int, default=20480, help="0: no perplexity")
    given = parser.parse_args(arguments)
    try:
        dense_form, windows = Form.named(given.dense), []
        if given.num_tokens:
            model, text = open_model(dense_form.source, {}), read_text(None)
            windows = windows_of(model, text, num_tokens=given.num_tokens, window_len=WINDOW_LEN)
        with dense_form.llm() as dense:
            for form in map(Form.named, given.models):
                is_dense = form == dense_form
                tell(row(form, None if is_dense else dense, windows, given.turns))
                sys.stdout.flush()
    except CascadeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
