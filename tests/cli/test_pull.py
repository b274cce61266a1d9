"""`pull` in processes of their own, against a hub on this machine; and engines that open what was pulled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cascade_llm.loader.hf_folder import INDEX
from tests.cli.conftest import process_args
from tests.loader.gguf_files import write_model
from tests.loader.hub_server import GATED, PRIVATE, HubServer, Repository, files_of
from tests.models.checkpoints import tiny_model

Pull = Callable[..., "subprocess.CompletedProcess[str]"]
PullEach = Callable[..., "list[subprocess.CompletedProcess[str]]"]
EACH = """
import json, sys
from click.testing import CliRunner
from cascade_llm.cli.main import cli
done = [(args, CliRunner().invoke(cli, args)) for args in json.loads(sys.argv[1])]
print(json.dumps([[args, result.exit_code, result.stdout, result.stderr] for args, result in done]))
"""


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder, max_shard_size="50KB")
    return files_of(folder)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


@pytest.fixture
def pull(hub: HubServer, tmp_path: Path, repo_root: Path, environment: dict[str, str]) -> Pull:
    def run(*args: str, command: str = "pull", **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            process_args(command, *args),
            cwd=repo_root,
            env={**environment, **hub.environment(tmp_path), **changes},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def add(hub: HubServer, name: str, files: dict[str, bytes], **facts: object) -> Repository:
    repository = hub.repositories[name] = Repository(**facts)  # type: ignore[arg-type]
    repository.commit(files)
    return repository


@pytest.fixture
def pull_each(hub: HubServer, tmp_path: Path, repo_root: Path, environment: dict[str, str]) -> PullEach:
    """Several pulls one after another in one process: starting one takes as long as the pull."""

    def run(*commands: Sequence[str], **changes: str) -> list[subprocess.CompletedProcess[str]]:
        done = subprocess.run(
            [sys.executable, "-c", EACH, json.dumps([["pull", *args] for args in commands])],
            cwd=repo_root,
            env={**environment, **hub.environment(tmp_path), **changes},
            capture_output=True,
            text=True,
            check=True,
        )
        return [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout)]

    return run


def failed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


SOURCES = pytest.mark.parametrize("prefix", ["hf://", pytest.param("ms://", marks=pytest.mark.slow)])


@SOURCES
def test_only_what_is_read_is_fetched_and_then_served_without_network(
    hub: HubServer, pull: Pull, tiny_files: dict[str, bytes], prefix: str
) -> None:
    others = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "README.md",
        "onnx/model.onnx",
        "consolidated.safetensors",
    ]
    template = "additional_chat_templates/tool_use.jinja"
    add(hub, "org/tiny", {**tiny_files, template: b"{}", **dict.fromkeys(others, b"0")})
    done = pull(prefix + "org/tiny")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert set(files_of(folder)) == {*tiny_files, template}
    assert {name: content for name, content in files_of(folder).items() if name != template} == tiny_files
    assert f"{len(tiny_files) + 1} of them" in " ".join(done.stderr.split())
    assert "model-00001-of-00006.safetensors" in done.stderr
    before = len(hub.requests)
    again = pull(prefix + "org/tiny", "--json")
    assert [file["was_cached"] for file in json.loads(again.stdout)["files"]] == [True] * (len(tiny_files) + 1)
    assert not [line for line in hub.requests[before:] if "safetensors" in line]
    before = len(hub.requests)
    offline = pull(prefix + "org/tiny", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, done.stdout)
    assert hub.requests[before:] == []


def test_what_is_in_the_cache_is_not_fetched_again(
    hub: HubServer, pull: Pull, tiny_files: dict[str, bytes], tmp_path: Path
) -> None:
    add(hub, "org/tiny", tiny_files)
    assert pull("org/tiny", "--include", "*-00001-of-*", "--include", "*.json").returncode == 0
    fetched = hub.fetched()
    assert "model-00001-of-00006.safetensors" in fetched
    assert "model-00002-of-00006.safetensors" not in fetched
    message = failed(pull("org/tiny", HF_HUB_OFFLINE="1"))
    assert "its download is not complete" in message
    assert "cascade-llm pull org/tiny" in message
    assert pull("org/tiny").returncode == 0
    assert sorted(hub.fetched()) == sorted(tiny_files)


@pytest.mark.parametrize(("prefix", "taken_up_at"), [("hf://", 10 << 20), ("ms://", 11_000_000)])
def test_a_connection_that_breaks_off_is_taken_up_where_it_was(
    hub: HubServer, pull: Pull, prefix: str, taken_up_at: int
) -> None:
    """Hugging Face's client writes pieces of 10 MiB, ModelScope's what has come."""
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * (12_000_000 // 256)}
    add(hub, "org/large", files)
    hub.drop_after = 11_000_000
    done = pull(prefix + "org/large")
    assert done.returncode == 0, done.stderr
    assert hub.drop_after is None
    assert hub.ranges == [f"bytes={taken_up_at}-"]
    assert files_of(Path(done.stdout.strip())) == files


@SOURCES
def test_ctrl_c_ends_a_download_in_the_middle_of_a_file(
    hub: HubServer, tmp_path: Path, repo_root: Path, environment: dict[str, str], prefix: str
) -> None:
    files = {"config.json": b"{}", "model.safetensors": bytes(80 << 20)}
    add(hub, "org/large", files)
    hub.delay_s = 0.02
    process = subprocess.Popen(
        process_args("pull", prefix + "org/large"),
        cwd=repo_root,
        env={**environment, **hub.environment(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while hub.sent < 1 << 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith("Interrupted.\n")
    assert hub.sent < 60 << 20


def test_a_revision_in_the_name_or_beside_it(hub: HubServer, pull_each: PullEach, tiny_files: dict[str, bytes]) -> None:
    repository = add(hub, "org/tiny", tiny_files)
    old = repository.commit({**tiny_files, "generation_config.json": b"{}"}, "v1")
    *found, newest, unknown, two = pull_each(
        ["org/tiny@v1"],
        ["org/tiny", "--revision", "v1"],
        [f"org/tiny@{old}"],
        ["org/tiny"],
        ["org/tiny@v2"],
        ["org/tiny@v1", "--revision", "v2"],
    )
    assert all(done.stdout.strip().endswith(old) for done in found)
    assert newest.returncode == 0
    assert not newest.stdout.strip().endswith(old)
    assert "org/tiny@v2: it has no revision 'v2'" in failed(unknown)
    assert "names a revision" in failed(two)


def test_a_cache_without_refs_names_what_it_holds(
    hub: HubServer, pull: Pull, pull_each: PullEach, tiny_files: dict[str, bytes], tmp_path: Path
) -> None:
    commit = add(hub, "org/tiny", tiny_files).commit(tiny_files)
    assert pull("org/tiny").returncode == 0
    (tmp_path / "huggingface" / "models--org--tiny" / "refs" / "main").unlink()
    unnamed, named = pull_each(["org/tiny"], [f"org/tiny@{commit}"], HF_HUB_OFFLINE="1")
    assert f"it holds other revisions, name one: org/tiny@{commit}" in failed(unnamed)
    assert named.returncode == 0


def test_gguf_files_are_named(hub: HubServer, pull_each: PullEach, tmp_path: Path) -> None:
    content = write_model(tmp_path / "tiny.gguf", tiny_model("llama")).read_bytes()
    add(
        hub,
        "org/tiny-GGUF",
        {
            "tiny-Q8_0.gguf": content,
            "Q4/tiny-00001-of-00002.gguf": b"GGUF1",
            "Q4/tiny-00002-of-00002.gguf": b"GGUF2",
            "README.md": b"",
        },
    )
    unnamed, whole, part, unknown, included = pull_each(
        ["org/tiny-GGUF"],
        ["org/tiny-GGUF:tiny-Q8_0.gguf"],
        ["ms://org/tiny-GGUF:Q4/tiny-00002-of-00002.gguf"],
        ["org/tiny-GGUF:other.gguf"],
        ["org/tiny-GGUF", "--include", "*Q8*"],
    )
    assert "name one: org/tiny-GGUF:Q4/tiny-00001-of-00002.gguf, org/tiny-GGUF:tiny-Q8_0.gguf" in failed(unnamed)
    assert Path(whole.stdout.strip()).read_bytes() == content
    assert Path(part.stdout.strip()).name == "tiny-00001-of-00002.gguf"
    assert len(list(Path(part.stdout.strip()).parent.glob("*.gguf"))) == 2
    assert "has no file other.gguf; it holds" in failed(unknown)
    assert included.returncode == 0


def test_pickles_are_refused_before_they_are_fetched(
    hub: HubServer, pull_each: PullEach, tiny_files: dict[str, bytes]
) -> None:
    add(hub, "org/pickled", {"config.json": tiny_files["config.json"], "pytorch_model.bin": b"0"})
    add(hub, "org/both", {"config.json": b"{}", "pytorch_model.bin": b"0", "model.safetensors": b"0"})
    pickled, both = pull_each(["org/pickled"], ["org/both", "--include", "*.bin"])
    assert "pytorch_model.bin alone, a format that runs code" in failed(pickled)
    assert "save_pretrained" in failed(pickled)
    assert "no file that is read matches *.bin" in failed(both)
    assert hub.fetched() == []


def test_a_gated_repository_says_what_to_do(hub: HubServer, pull_each: PullEach, tiny_files: dict[str, bytes]) -> None:
    add(hub, "org/gated", tiny_files, refused=GATED)
    done = pull_each(["hf://org/gated"], ["ms://org/gated"])
    for each, variable in zip(done, ("HF_TOKEN", "MODELSCOPE_API_TOKEN"), strict=True):
        assert "gated: ask for access on http" in failed(each)
        assert variable in failed(each)


def test_unknown_and_private_repositories(hub: HubServer, pull_each: PullEach, tiny_files: dict[str, bytes]) -> None:
    add(hub, "org/private", tiny_files, refused=PRIVATE)
    *hidden, unknown = pull_each(["org/private"], ["org/none"], ["ms://org/none@v1"])
    for done in hidden:
        assert "no such repository, or it is private: check the spelling" in failed(done)
    assert "no such repository, or it has no revision 'v1'" in failed(unknown)


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    hub: HubServer, pull: Pull, tiny_files: dict[str, bytes]
) -> None:
    add(hub, "org/big", tiny_files, stated_bytes={"model-00001-of-00006.safetensors": 10**16})
    message = failed(pull("org/big"))
    assert "10,000,000,000,213,3" in message
    assert "HF_HUB_CACHE" in message
    assert hub.fetched() == []


def test_a_large_model_that_is_not_implemented_is_told_before_its_weights_are_fetched(
    hub: HubServer, pull: Pull, tiny_files: dict[str, bytes]
) -> None:
    config = {**json.loads(tiny_files["config.json"]), "architectures": ["OddForCausalLM"]}
    large = {"model-00001-of-00006.safetensors": 10**8}
    add(hub, "org/odd", {**tiny_files, "config.json": json.dumps(config).encode()}, stated_bytes=large)
    done = pull("org/odd")
    assert done.returncode == 0, done.stderr
    assert "Warning: org/odd will not be served: architecture OddForCausalLM is not implemented" in done.stderr
    assert hub.fetched()[0] == "config.json"


def test_what_is_no_name_of_a_hub(hub: HubServer, pull_each: PullEach) -> None:
    names = ["../x/y", "/etc/passwd", "smollm2", "org/name:../x.gguf", "hf://..", "org/../name"]
    for done in pull_each(*([name] for name in names)):
        assert "is no model of a hub: write ORG/NAME" in failed(done), done.args
    assert hub.requests == []


def test_a_name_in_a_listing_that_leaves_the_folder_is_not_fetched(
    hub: HubServer, pull: Pull, tiny_files: dict[str, bytes], tmp_path: Path
) -> None:
    add(hub, "org/evil", {**tiny_files, "../evil.json": b"{}", "/evil.json": b"{}"})
    done = pull("org/evil")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.slow
def test_an_engine_opens_a_revision(
    hub: HubServer,
    pull: Pull,
    tiny_files: dict[str, bytes],
    tmp_path: Path,
    repo_root: Path,
    environment: dict[str, str],
) -> None:
    repository = add(hub, "org/tiny", {"config.json": b"{}"})
    repository.commit(tiny_files, "v1")
    code = (
        "from cascade_llm import LLM\n"
        "llm = LLM('org/tiny', revision='v1', distributed_executor_backend='mp', kv_cache_bytes=1 << 20)\n"
        "if __name__ == '__main__': print(llm.model_name, llm.facts.model.hidden_size)"
    )
    script = tmp_path / "script.py"
    script.write_text(code.replace("llm = LLM", "if __name__ == '__main__': llm = LLM"))
    done = subprocess.run(
        [sys.executable, script],
        cwd=repo_root,
        env={**environment, **hub.environment(tmp_path), "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["org/tiny", "48"]
    assert sum("/api/models/org/tiny/revision/" in line for line in hub.requests) == 2, "the rank asked as well"
    folder = next((tmp_path / "huggingface").rglob(INDEX)).parent
    (folder / "model-00002-of-00006.safetensors").resolve().write_bytes(b"half")
    message = failed(pull("-m", "org/tiny@v1", "x", command="generate", HF_HUB_OFFLINE="1"))
    assert "model-00002-of-00006.safetensors is not a whole safetensors file" in message
