"""How well a model foretells a text, as the file has its weights and as others read the same file."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.peer_environment import PeerInterpreter
from benchmarks.peer_process import PeerProcess
from cascade_llm.bench.setup import BenchModel
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.errors import ConfigError
from cascade_llm.llm import LLM
from cascade_llm.loader.hf_folder import write_hf_folder
from cascade_llm.sampling_params import SamplingParams

__all__ = ["TWIN", "ModelScores", "Text", "read_text", "score_model", "windows_of"]

TWIN = "float32 twin"
ROUNDED, EXACT = "rounded inputs", "exact inputs"
POOL_BYTES = 256 << 20
SCORE_S = 3600.0


@dataclass(frozen=True)
class Text:
    """What is foretold."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The first digits of its SHA-256, so that another text of the same name is seen."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ModelScores:
    """One model's log-probabilities of the same tokens, by who computed them."""

    model: str
    num_bytes: int
    types: Mapping[str, int]
    """Bytes of each type that the file holds."""
    logprobs: Mapping[str, Sequence[float]]

    def perplexity(self, side: str) -> float:
        """The exponential of the mean loss of a token."""
        values = self.logprobs[side]
        return math.exp(-sum(values) / len(values))

    def mean_difference(self, side: str) -> float | None:
        """The mean absolute difference to the dequantized twin, nats a token; None where that was not computed."""
        if side == TWIN or TWIN not in self.logprobs:
            return None
        pairs = zip(self.logprobs[side], self.logprobs[TWIN], strict=True)
        return sum(abs(a - b) for a, b in pairs) / len(self.logprobs[side])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "num_bytes": self.num_bytes,
            "types": dict(self.types),
            "num_tokens": {side: len(values) for side, values in self.logprobs.items()},
            "perplexity": {side: self.perplexity(side) for side in self.logprobs},
            "mean_difference": {side: self.mean_difference(side) for side in self.logprobs},
        }


def read_text(path: Path | None) -> Text:
    """The text of a file, else the language reference that is in Python's own library."""
    if path is None:
        return Text("Python's pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)))
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a file of text in UTF-8") from None


def windows_of(model: BenchModel, text: Text, *, num_tokens: int, window_len: int) -> list[list[int]]:
    """The text's first tokens by this model's tokenizer, cut into windows; each is read by itself.

    Raises `ConfigError` where there is no tokenizer, or not so much text.
    """
    tokenizer = load_tokenizer(model.checkpoint.tokenizer_source)
    if tokenizer is None:
        raise ConfigError(f"{model.name} has no tokenizer, by which the text is cut: name first a model that has one")
    num_windows = -(-num_tokens // window_len)
    token_ids = tokenizer.encode(text.text, add_special_tokens=False)
    if len(token_ids) < num_windows * window_len:
        raise ConfigError(f"{text.name} has {len(token_ids):,} tokens: it takes {num_windows * window_len:,}")
    return [token_ids[start : start + window_len] for start in range(0, num_windows * window_len, window_len)]


def score_model(
    model: BenchModel,
    windows: Sequence[Sequence[int]],
    *,
    with_exact: bool = True,
    with_twin: bool,
    peer: PeerInterpreter | None = None,
) -> ModelScores:
    """One model by all sides, one after the other: ours, its dequantized twin, and another engine where given.

    Args:
        model: whose files are read
        windows: token ids, each window read by itself
        with_exact: whether ours is scored with exact inputs of products too
        with_twin: whether the dequantized weights are scored
        peer: the other engine
    """
    sides = dict(_own_scores(model, windows, with_exact))
    if with_twin:
        sides[TWIN] = _twin_scores(model, windows)
    if peer is not None:
        sides[peer.name] = _peer_scores(peer, model, windows)
    types = dict(model.checkpoint.bytes_by_type)
    return ModelScores(model.name, sum(types.values()), types, sides)


def _own_scores(
    model: BenchModel, windows: Sequence[Sequence[int]], with_exact: bool
) -> Iterator[tuple[str, list[float]]]:
    for side, exact in ((ROUNDED, False), (EXACT, True)):
        if exact and not with_exact:
            continue
        options = {**model.options, "exact_activations": exact}
        yield side, _scores(model.name, windows, options)


def _twin_scores(model: BenchModel, windows: Sequence[Sequence[int]]) -> list[float]:
    import torch

    with tempfile.TemporaryDirectory(prefix="cascade-llm-") as folder:
        write_hf_folder(model.checkpoint, Path(folder), torch.float32)
        return _scores(folder, windows, {**model.options, "dtype": "float32"})


def _scores(model: str, windows: Sequence[Sequence[int]], options: Mapping[str, Any]) -> list[float]:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    own = {"kv_cache_bytes": POOL_BYTES, "max_model_len": max(map(len, windows)), "progress": False}
    with LLM(model, **{**own, **options}) as llm:
        outputs = llm.generate([list(window) for window in windows], params)
    return [scored.logprob for output in outputs for scored in output.prompt_logprobs or () if scored is not None]


def _peer_scores(peer: PeerInterpreter, model: BenchModel, windows: Sequence[Sequence[int]]) -> list[float]:
    import torch

    num_threads = int(model.options.get("num_threads") or torch.get_num_threads())
    process = PeerProcess(peer, {"OMP_NUM_THREADS": str(num_threads)})
    try:
        command = {"device": model.device.type, "model": str(model.checkpoint.tokenizer_source)}
        process.ask({"op": "start", **command, "num_threads": num_threads}, timeout_s=SCORE_S)
        answer = process.ask({"op": "score", "windows": [list(window) for window in windows]}, timeout_s=SCORE_S)
    finally:
        process.close()
    return [value for window in answer["logprobs"] for value in window]
