"""The options of `serve`, from the command line and from a file; servers themselves are in tests/server."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from cascade_llm.errors import ConfigError
from cascade_llm.server.options import ServerOptions
from tests.cli.conftest import Run

SHOW = "--print-config"


def test_help_lists_every_option_of_the_server(run: Run) -> None:
    text = run("serve", "--help").stdout
    assert "Server options:" in text
    for field in fields(ServerOptions):
        assert f"--{field.name.replace('_', '-')}" in text


def test_a_printed_config_is_read_again_and_the_command_line_goes_before_it(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    first = run(
        "serve", "large", "--port", "9", "--api-key", "a", "--api-key", "b", "--engine-seed", "4", "--print-config"
    )
    assert first.exit_code == 0, first.stderr
    path.write_text(first.stdout)
    expected = {"model": "large", "port": 9, "api_key": ["a", "b"], "engine_seed": 4, "log_level": "info"}
    assert yaml.safe_load(first.stdout) == expected
    again = run("serve", "--config", path, "--port", "10", "--no-enable-prefix-caching", "--print-config")
    assert again.exit_code == 2, "the flag is --disable-prefix-caching"
    again = run("serve", "--config", path, "--port", "10", "--disable-prefix-caching", "--print-config")
    assert yaml.safe_load(again.stdout) == {**expected, "port": 10, "enable_prefix_caching": False}
    path.write_text("max-num-seqs: 3\nstrict: true\n")
    assert yaml.safe_load(run("serve", "--config", path, "--print-config").stdout)["strict"] is True


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("prot: 3", "'port'"),
        ("- 3", "must map"),
        ("a: [", "cannot be read"),
        ("port: x", "integer"),
        ("port: 70000", "65535"),
    ],
)
def test_a_wrong_config_is_named(run: Run, tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    done = run("serve", "--config", path, "--print-config")
    assert done.exit_code != 0
    assert word in done.stderr


@pytest.mark.parametrize("wrong", [{"port": -1}, {"max_body_bytes": 0}, {"restarts": -1}, {"drain_timeout": -0.1}])
def test_values_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerOptions(**wrong)  # type: ignore[arg-type]
