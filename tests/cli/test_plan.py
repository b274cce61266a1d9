"""`plan` draws what the library planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_llm.bench.plan_tree import plan_prompts
from cascade_llm.cli.charts import Span
from cascade_llm.cli.plan_drawing import tree_chart
from cascade_llm.config import EngineOptions
from tests.cli.conftest import Run

SHARED = "A shared beginning that is long enough for some pages of tokens, and then a little longer than that. " * 2
OPTIONS = ("--dtype", "float32", "--page-size", "8", "--cascade-shared-prefix-len", "8")


def test_json_and_drawing(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    prompts = [SHARED + "one", SHARED + "two", "something else"]
    file.write_text("\n".join(prompts))
    expected = plan_prompts(
        str(tiny_folder), prompts, EngineOptions(dtype="float32", page_size=8, cascade_shared_prefix_len=8)
    )
    result = run("plan", file, "-m", tiny_folder, "--json", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(json.dumps(expected.as_dict()))
    assert expected.report.num_groups == 1
    drawn = run("plan", file, "-m", tiny_folder, *OPTIONS)
    assert drawn.exit_code == 0
    (node,) = expected.root.children
    assert f"{node.num_tokens} tokens in 2 sequences  level 0, saves" in drawn.stdout
    assert "“A shared beginning" in drawn.stdout
    assert "2 prompts (0, 1)" in drawn.stdout
    assert "1 prompt (2)" in drawn.stdout
    assert "2 levels (the suffixes counted), 1 shared segment" in drawn.stdout
    assert "Predicted attention of that step, all layers: " in drawn.stdout
    assert "Cost model: table entry 'cpu'; " in drawn.stdout
    assert "\x1b" not in drawn.stdout, "no colours where it is no terminal"


def test_a_file_of_questions_behind_a_system_message(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text(SHARED)
    (tmp_path / "questions.txt").write_text("one\ntwo\nthree\n")
    args = ("plan", tmp_path / "questions.txt", "--system-file", tmp_path / "system.txt", "-m", tiny_folder, *OPTIONS)
    chat, plain = (json.loads(run(*args, *more, "--json").stdout) for more in (["--chat"], []))
    for planned in (chat, plain):
        (node,) = planned["tree"]["children"]
        assert (node["num_sequences"], node["level"], planned["num_levels"]) == (3, 0, 2)
    assert chat["tree"]["children"][0]["text"].startswith("<|im_start|>system A shared beginning")


def test_the_chart_s_spans_are_the_tree_s(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "prompts.txt", tmp_path / "tree.png"
    prompts = [SHARED + "one", SHARED + "two", "something else"]
    file.write_text("\n".join(prompts))
    result = run("plan", file, "-m", tiny_folder, "--plot", picture, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run("plan", file, "-m", tiny_folder, "--plot", picture, *OPTIONS)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "--force" in again.stderr
    assert run("plan", file, "-m", tiny_folder, "--plot", picture, "--force", *OPTIONS).exit_code == 0
    options = EngineOptions(dtype="float32", page_size=8, cascade_shared_prefix_len=8)
    tree = plan_prompts(str(tiny_folder), prompts, options)
    spans = tree_chart(tree).spans
    (node,) = tree.root.children
    assert [span for span in spans if span.series == "level 0"] == [
        Span(0, node.end_len, 0, 2, "level 0", f"{node.num_tokens} tokens\n2 sequences")
    ]
    own = [span for span in spans if span.series == "own tokens"]
    assert sum(span.height for span in own) == 3
    assert sorted({span.end for span in own}) == sorted(set(tree.prompt_lens))


def test_nothing_is_shared_for_a_reason(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    result = run("plan", tmp_path / "prompts.txt", "-m", tiny_folder)
    assert "Nothing is shared: no two sequences share a full page" in result.stdout


def test_mistakes(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n" + "word " * 600)
    result = run("plan", file, "-m", tiny_folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "prompt 1: the prompt has" in result.stderr
    result = run("plan", tmp_path / "none.txt")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    result = run("plan", file, "-m", tiny_folder, "--costs", "abacus", "--max-model-len", "4000")
    assert result.exit_code == 1
