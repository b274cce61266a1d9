"""The recorded FlashInfer signatures: complete, well-formed, and those of the installed package where there is one."""

from __future__ import annotations

import copy
import importlib.util
import json
import keyword
import tomllib
from pathlib import Path
from typing import Any

import pytest

from scripts.flashinfer_signatures import ENGINE_CALLS, describe, differences, render, take_snapshot, to_json

EXPECTED = Path(__file__).with_name("flashinfer_signatures.json")
KINDS = {"POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads(EXPECTED.read_text())


def test_names_every_call_of_the_engine_and_no_other(expected: dict[str, Any]) -> None:
    assert list(expected["calls"]) == list(ENGINE_CALLS)


def test_is_of_the_version_that_the_package_pins(expected: dict[str, Any], repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["cuda"] == [f"flashinfer-python=={expected['flashinfer']}"]


@pytest.mark.parametrize("name", ENGINE_CALLS)
def test_parameters_are_well_formed(expected: dict[str, Any], name: str) -> None:
    parameters = expected["calls"][name]
    names = [entry["name"] for entry in parameters]
    assert names
    assert len(set(names)) == len(names)
    for entry in parameters:
        assert entry.keys() <= {"name", "kind", "default"}
        assert entry["name"].isidentifier()
        assert not keyword.iskeyword(entry["name"])
        assert entry["kind"] in KINDS
        assert " at 0x" not in entry.get("default", ""), "a default that differs on every run"
    # methods are recorded unbound: their first parameter is self
    if "." in name.split(":")[1]:
        assert names[0] == "self"


def test_written_form_reads_back_and_is_the_committed_text(expected: dict[str, Any]) -> None:
    assert json.loads(to_json(expected)) == expected
    assert to_json(expected) == EXPECTED.read_text()


def test_installed_package_has_these_signatures(expected: dict[str, Any]) -> None:
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer is not installed here; CI compares in an environment of its own")
    assert differences(expected, take_snapshot()) == []


def test_describe_keeps_order_kind_and_default() -> None:
    def call(first, /, second=1e-6, *rest, third="NHD", **others): ...

    assert describe(call) == [
        {"name": "first", "kind": "POSITIONAL_ONLY"},
        {"name": "second", "kind": "POSITIONAL_OR_KEYWORD", "default": "1e-06"},
        {"name": "rest", "kind": "VAR_POSITIONAL"},
        {"name": "third", "kind": "KEYWORD_ONLY", "default": "'NHD'"},
        {"name": "others", "kind": "VAR_KEYWORD"},
    ]
    assert render(describe(call)) == "(first, second=1e-06, *rest, third='NHD', **others)"


def _drop_parameter(snapshot: dict[str, Any]) -> None:
    del snapshot["calls"]["flashinfer:merge_state"][-1]


def _change_default(snapshot: dict[str, Any]) -> None:
    snapshot["calls"]["flashinfer:merge_state_in_place"][-1]["default"] = "0"


def _lose_call(snapshot: dict[str, Any]) -> None:
    snapshot["calls"]["flashinfer:append_paged_kv_cache"] = None


def _add_call(snapshot: dict[str, Any]) -> None:
    snapshot["calls"]["flashinfer:merge_more"] = []


def _change_version(snapshot: dict[str, Any]) -> None:
    snapshot["flashinfer"] = "0.0"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop_parameter, ["flashinfer:merge_state\n", "s_b"]),
        (_change_default, ["flashinfer:merge_state_in_place", "mask=None", "mask=0"]),
        (_lose_call, ["flashinfer:append_paged_kv_cache", "not there"]),
        (_add_call, ["flashinfer:merge_more", "not there"]),
        (_change_version, ["version", "0.0"]),
    ],
)
def test_differences_name_what_changed(expected: dict[str, Any], change: Any, words: list[str]) -> None:
    found = copy.deepcopy(expected)
    change(found)
    lines = differences(expected, found)
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert differences(expected, copy.deepcopy(expected)) == []
