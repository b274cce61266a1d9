from __future__ import annotations

import pytest

from cascade_llm.errors import ConfigError, ModelNotFoundError
from cascade_llm.loader.hub_name import HUGGINGFACE, MODELSCOPE, HubName, parse_hub_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName(HUGGINGFACE, "Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@main", HubName(HUGGINGFACE, "Qwen/Qwen3-0.6B", "main")),
        ("org/name@refs/pr/3", HubName(HUGGINGFACE, "org/name", "refs/pr/3")),
        ("org/name:Q8/a-00001-of-00002.gguf", HubName(HUGGINGFACE, "org/name", None, "Q8/a-00001-of-00002.gguf")),
        ("org/name@v1:a b.GGUF", HubName(HUGGINGFACE, "org/name", "v1", "a b.GGUF")),
        ("hf://org/name", HubName(HUGGINGFACE, "org/name")),
        ("ms://org/name@v1", HubName(MODELSCOPE, "org/name", "v1")),
        ("modelscope://org/name:a.gguf", HubName(MODELSCOPE, "org/name", None, "a.gguf")),
    ],
)
def test_forms(text: str, name: HubName) -> None:
    assert parse_hub_name(text) == name
    assert parse_hub_name(str(name)) == name


NO_NAMES = ["name", "../name", "org/..", "./name", "/org/name", "a/b/c", "org/name@", "org/name@../x", "org/name:"]
NO_NAMES += ["org/name:/etc/x.gguf", "org/name:../x.gguf", "org/name:a/../../x.gguf", "org/name:x.bin", "org/na me", ""]


@pytest.mark.parametrize("text", [*NO_NAMES, "org/name.gguf"])
def test_what_may_be_a_path_is_no_name(text: str) -> None:
    assert parse_hub_name(text) is None


@pytest.mark.parametrize("text", NO_NAMES)
@pytest.mark.parametrize("prefix", ["hf://", "ms://", "modelscope://"])
def test_after_a_prefix_it_must_be_a_name(prefix: str, text: str) -> None:
    with pytest.raises(ModelNotFoundError, match="ORG/NAME@REVISION"):
        parse_hub_name(prefix + text)


def test_revision_and_hub_beside_the_name() -> None:
    assert parse_hub_name("org/name", revision="v1", hub=MODELSCOPE) == HubName(MODELSCOPE, "org/name", "v1")
    assert parse_hub_name("org/name@v1", revision="v1") == HubName(HUGGINGFACE, "org/name", "v1")
    with pytest.raises(ConfigError, match="names a revision, and revision is 'v2'"):
        parse_hub_name("org/name@v1", revision="v2")
    with pytest.raises(ConfigError, match="source is 'huggingface'"):
        parse_hub_name("ms://org/name", hub=HUGGINGFACE)
    for revision in ("", "../x", "a b", "-x", "/x", 5):
        with pytest.raises(ConfigError, match="must be a branch, a tag or a commit"):
            parse_hub_name("org/name", revision=revision)  # type: ignore[arg-type]
