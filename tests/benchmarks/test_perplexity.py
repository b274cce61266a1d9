"""Perplexity: a text in windows, by ours, by the dequantized twin and by another engine."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peer_environment import DRIVERS, PeerInterpreter
from benchmarks.perplexity import TWIN, ModelScores, Text, read_text, score_model, windows_of
from cascade_llm.bench.setup import open_model
from cascade_llm.errors import ConfigError
from tests.cli.conftest import Run
from tests.engine.tiny_llm import TOLERANCE

OPTIONS = {"dtype": "float32", "num_threads": 1}
WINDOWS = [[1, 5, 9, 2, 7, 3], [4, 4, 8, 1, 6, 2]]

DRIVER = """
import sys
sys.path.insert(0, {drivers!r})
from driver_loop import Driver, serve

class Even(Driver):
    def start(self, command):
        return {{}}
    def score(self, windows):
        return [[-0.5] * (len(window) - 1) for window in windows]

serve(Even())
"""


def test_ours_twin_and_another_engine_score_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    driver = tmp_path / "even_driver.py"
    driver.write_text(DRIVER.format(drivers=str(DRIVERS)))
    peer = PeerInterpreter("even", Path(sys.executable), driver)
    scores = score_model(open_model(str(tiny), OPTIONS), WINDOWS, with_twin=True, peer=peer)
    assert list(scores.logprobs) == ["rounded inputs", "exact inputs", TWIN, "even"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny)(torch.tensor(WINDOWS)).logits.log_softmax(-1)
    expected = [float(logits[w, i, token]) for w, ids in enumerate(WINDOWS) for i, token in enumerate(ids[1:])]
    for side in ("rounded inputs", "exact inputs", TWIN):
        assert scores.logprobs[side] == pytest.approx(expected, abs=TOLERANCE)
    assert scores.perplexity("even") == pytest.approx(math.exp(0.5))
    assert scores.mean_difference("even") == pytest.approx(
        sum(abs(value + 0.5) for value in scores.logprobs[TWIN]) / len(expected)
    )


def test_perplexity_is_of_the_mean_loss() -> None:
    scores = ModelScores("m", 1, {"F32": 1}, {"ours": [math.log(0.5), math.log(0.125)]})
    assert scores.perplexity("ours") == pytest.approx(4.0)
    assert scores.mean_difference("ours") is None, "no twin"


def test_a_text_is_cut_by_the_models_tokenizer(tiny_folder: Path, tiny: Path) -> None:
    model = open_model(str(tiny_folder), OPTIONS)
    windows = windows_of(model, read_text(None), num_tokens=60, window_len=16)
    assert [len(window) for window in windows] == [16] * 4
    with pytest.raises(ConfigError, match="short has 3 tokens: it takes 16"):
        windows_of(model, Text("short", "one two three"), num_tokens=16, window_len=16)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        windows_of(open_model(str(tiny), OPTIONS), read_text(None), num_tokens=16, window_len=16)


def test_the_command_tells_each_model_and_what_it_read(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    args = ("perplexity", "-m", tiny_folder, "--num-tokens", "32", "--window-len", "16", "--dtype", "float32")
    result = run(*args, "--no-twin", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["text"]["windows"] == 2
    (scores,) = told["results"]
    assert scores["num_tokens"] == {"rounded inputs": 30, "exact inputs": 30}
    assert scores["types"].keys() == {"F32"}
    refused = run(*args, "--text", tmp_path / "nothing.txt")
    assert "nothing.txt cannot be read" in " ".join(refused.stderr.split())
