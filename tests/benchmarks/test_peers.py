"""Other engines: processes of their own that answer, fail, hang and end; transformers for real."""

from __future__ import annotations

import os
import signal
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest

from benchmarks.peer_environment import (
    DRIVERS,
    PEERS,
    PeerInterpreter,
    PeerKind,
    _check_import,
    find_peer,
    install_peer,
)
from benchmarks.peer_process import PeerProcess
from benchmarks.peer_side import PeerSide, peer_for
from cascade_llm.bench.latency import LatencyReport, measure_latency, summary_spread
from cascade_llm.bench.online import AllAtOnce, AtConcurrency, AtRate
from cascade_llm.bench.setup import open_model
from cascade_llm.bench.sides import opened_sides
from cascade_llm.bench.throughput import compare
from cascade_llm.bench.workloads import ChatWorkload, RandomWorkload, RolloutWorkload, SharedPrefixWorkload
from cascade_llm.errors import BackendError, ConfigError
from tests.patience import PATIENCE_S

OPTIONS = {"dtype": "float32", "page_size": 4, "num_threads": 1}
SHARED = SharedPrefixWorkload(prefix_len=20, num_requests=3, suffix_len=4, output_len=5)

DRIVER = """
import os, subprocess, sys, time
sys.path.insert(0, {drivers!r})
from driver_loop import Driver, Timing, serve

class Counting(Driver):
    def start(self, command):
        print("noise on standard output")
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return {{"child": self.child.pid, "threads": os.environ["OMP_NUM_THREADS"]}}
    def load(self, requests, temperature, top_p):
        pass
    def run_online(self, queue, now_s):
        timings = {{}}
        while queue:
            for arrival in queue.take(now_s(), 0):
                timings[arrival.request_index] = timing = Timing(arrival.arrival_s, 1)
                timing.token_times_s, timing.end_s = None, now_s() + 0.001
                queue.end(arrival.request_index, timing.end_s, arrival.token_ids)
        return timings
    def run(self, output_len):
        if output_len == 99:
            time.sleep(60)
        if output_len == 98:
            os._exit(3)
        if output_len == 97:
            raise ValueError("no such thing")
        return sum(r["n"] * (output_len or r["output_len"]) for r in self.requests)

serve(Counting())
"""


@pytest.fixture
def counting(tmp_path: Path) -> PeerInterpreter:
    driver = tmp_path / "counting_driver.py"
    driver.write_text(DRIVER.format(drivers=str(DRIVERS)))
    return PeerInterpreter("counting", Path(sys.executable), driver)


@pytest.fixture
def process(counting: PeerInterpreter) -> PeerProcess:
    return PeerProcess(counting, {"OMP_NUM_THREADS": "1"})


def start(process: PeerProcess) -> int:
    child = process.ask({"op": "start"}, timeout_s=PATIENCE_S)["flags"]["child"]
    assert isinstance(child, int)
    requests = [{"token_ids": [1], "output_len": 4, "n": 2}]
    process.ask({"op": "load", "requests": requests, "temperature": 0.0, "top_p": 1.0}, timeout_s=PATIENCE_S)
    return child


def state_of(pid: int) -> str:
    """The kernel's letter for a process: T is stopped, Z ended, "" gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for(pid: int, states: tuple[str, ...]) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if state_of(pid) in states:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is in state {state_of(pid)!r}, not in {states}")


def test_answers_come_without_the_noise_and_children_rest_between(process: PeerProcess) -> None:
    child = start(process)
    answer = process.ask({"op": "run", "output_len": None, "reset": True}, timeout_s=PATIENCE_S)
    assert answer["num_generated"] == 8
    assert answer["elapsed_s"] >= 0
    wait_for(child, ("T",))
    assert process.ask({"op": "run", "output_len": 1, "reset": False}, timeout_s=PATIENCE_S)["num_generated"] == 2
    assert process.ask({"op": "memory"}, timeout_s=PATIENCE_S)["peak_bytes"] > 1 << 20
    process.close()
    wait_for(child, ("", "Z"))


@pytest.mark.parametrize(
    ("output_len", "timeout_s", "words"),
    [(97, PATIENCE_S, "ValueError: no such thing"), (98, PATIENCE_S, "has ended"), (99, 0.5, "has not answered for")],
)
def test_failures_are_told_with_the_engines_words(
    process: PeerProcess, output_len: int, timeout_s: float, words: str
) -> None:
    child = start(process)
    with pytest.raises(BackendError, match=words):
        process.ask({"op": "run", "output_len": output_len, "reset": False}, timeout_s=timeout_s)
    process.close()
    wait_for(child, ("", "Z"))


def test_an_engine_that_dies_between_commands_is_told(process: PeerProcess) -> None:
    start(process)
    os.killpg(process._process.pid, signal.SIGKILL)
    process._process.wait()
    with pytest.raises(BackendError, match=r"has ended.*noise on standard output"):
        process.ask({"op": "memory"}, timeout_s=PATIENCE_S)
    process.close()


def test_a_side_takes_one_load_after_the_other(counting: PeerInterpreter, tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    loads = model.load(SHARED), model.load(RolloutWorkload(prompts=2, samples=3, prompt_len=8, output_len=6))
    side = PeerSide(counting, model, *loads)
    assert side.flags["threads"] == "1"
    assert [side.run(run).num_generated for run in ("cold", "first", "warm")] == [15, 3, 15]
    side.use_load(loads[1])
    assert side.run("cold").num_generated == 36
    side.close()


@pytest.mark.slow
def test_transformers_runs_and_every_quantity_is_compared(tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    load = model.load(SHARED)
    peer = peer_for("transformers", model)
    assert peer.python == Path(sys.executable)
    report = compare(
        model, load, with_off=False, others=[partial(PeerSide, peer, model, load)], repeat=1, split_steps=False
    )
    assert list(report.readings) == ["cascade on", "transformers"]
    assert report.readings["transformers"]["cold"][0].num_generated == 15
    assert report.ratio("transformers", "cold").median > 0
    assert report.sides["transformers"]["num_threads"] == 1
    assert report.peak_memory_bytes.keys() == {"cascade on", "transformers"}


@pytest.mark.slow
def test_transformers_counts_each_rows_own_length(tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    load = model.load(RandomWorkload(num_requests=4, min_len=3, max_len=9), temperature=0.8, top_p=0.95)
    side = PeerSide(peer_for("transformers", model), model, load)
    assert side.run("cold").num_generated == load.num_generated
    assert side.run("first").num_generated == 4
    side.close()


@pytest.mark.slow
def test_transformers_meets_the_same_arrivals_and_every_token_has_a_time(tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    load = model.load(RolloutWorkload(prompts=3, samples=2, prompt_len=8, output_len=4))
    peer = peer_for("transformers", model)
    report = LatencyReport(model.name, load, AtRate(200.0, seed=1))
    with opened_sides(model, load, with_off=False, others=[partial(PeerSide, peer, model, load, online=True)]) as sides:
        measure_latency(report, sides, repeat=2)
        timings = sides[1].run_online(AtConcurrency(1)).timings
    assert "all that has arrived" in report.sides["transformers"]["batch"]
    assert report.runs["transformers"][0].num_generated == load.num_generated
    ratio = report.ratio("transformers", "itl", 50)
    assert ratio is not None
    assert 0 < ratio.low <= ratio.high
    for timing, later in zip(timings, [*timings[1:], None], strict=True):
        assert [len(times) for times in timing.token_times_s] == [4, 4]
        assert timing.end_s == max(times[-1] for times in timing.token_times_s)
        assert later is None or later.arrival_s >= timing.end_s, "one at a time"


@pytest.mark.slow
def test_conversations_run_on_a_peer_and_go_on_from_its_own_answers(tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    chat = model.load(ChatWorkload(conversations=2, turns=3, system_len=8, user_len=4, output_len=4, think_s=0.01))
    side = PeerSide(peer_for("transformers", model), model, chat)
    for load in (chat, chat.with_recorded_history()):
        side.use_load(load)
        run = side.run_online(AtRate(500.0))
        assert run.reading.num_generated == 6 * 4
        for index, request in enumerate(load.requests):
            if request.follows is not None:
                assert run.timings[index].arrival_s >= run.timings[request.follows].end_s + request.delay_s
    assert side.run("warm").num_generated == 6 * 4
    side.close()


def test_an_engine_that_hands_out_whole_answers_tells_no_times_of_tokens(counting: PeerInterpreter, tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    load = model.load(SHARED)
    report = LatencyReport(model.name, load, AllAtOnce())
    with opened_sides(
        model, load, with_off=False, others=[partial(PeerSide, counting, model, load, online=True)]
    ) as sides:
        measure_latency(report, sides, repeat=1)
    assert summary_spread(report.runs["counting"], "ttft", 50) is None
    assert report.ratios()["counting"].keys() == {"ttft", "itl", "e2e"}
    assert report.ratios()["counting"]["itl"] == {}
    assert report.ratios()["counting"]["e2e"]["p50"].median > 0


def test_what_a_peer_cannot_do_is_refused_before_it_is_started(tiny: Path) -> None:
    model = open_model(str(tiny), OPTIONS)
    with pytest.raises(ConfigError, match=r"llama.cpp reads .gguf files only"):
        peer_for("llama.cpp", model)
    dummy = open_model(str(tiny), {**OPTIONS, "load_format": "dummy"})
    with pytest.raises(ConfigError, match="real weights"):
        peer_for("transformers", dummy)


def test_a_missing_peer_says_how_to_get_it(own_cache: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        find_peer("vlm")
    with pytest.raises(BackendError, match=r"--install-peer.*--peer-python"):
        find_peer("vllm")
    with pytest.raises(BackendError, match="cannot import vllm"):
        find_peer("vllm", Path(sys.executable))
    with pytest.raises(BackendError, match="cannot be run"):
        find_peer("vllm", own_cache / "no-python")


def test_every_peer_has_its_driver() -> None:
    for kind in PEERS.values():
        assert (DRIVERS / kind.driver).is_file()


def add_package(folder: Path, name: str) -> None:
    """A wheel that holds one empty module."""
    files = {
        f"{name}.py": "",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{name}-1.0.dist-info/RECORD"] = "".join(f"{file},,\n" for file in files)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.fixture
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the user's settings name as the one place to find packages, and settings that would mislead."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    return folder


@pytest.mark.slow
def test_an_environment_is_made_once_by_the_users_own_settings(
    own_cache: Path, own_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_package(own_index, "small_engine")
    add_package(own_index, "unwanted_engine")
    kind = PeerKind(
        module="small_engine",
        driver="vllm_driver.py",
        requirements=("small_engine==1.0", "unwanted_engine"),
        unwanted=("unwanted_engine",),
    )
    monkeypatch.setitem(PEERS, "small", kind)
    with pytest.raises(BackendError, match="--install-peer"):
        find_peer("small")
    told: list[str] = []
    made = find_peer("small", install=True, on_install=told.append)
    assert made.python == own_cache / "peers" / "small" / "bin" / "python"
    assert [what.split()[0] for what in told] == ["making", "looking", "installing"]
    again = find_peer("small", install=True, on_install=told.append)
    assert again == find_peer("small") == made
    assert len(told) == 3, "the second call found it"
    with pytest.raises(BackendError, match="cannot import unwanted_engine"):
        _check_import("unwanted", made.python, "unwanted_engine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"No matching distribution found for small_engine==2\.0"),
        ({"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, "No matching distribution found"),
    ],
    ids=["no release", "no network"],
)
def test_what_cannot_be_installed_is_told_by_pips_words_before_anything_is(
    own_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    add_package(own_index, "small_engine")
    kind = PeerKind(module="x", driver="vllm_driver.py", requirements=("small_engine==2.0",))
    told: list[str] = []
    with pytest.raises(BackendError, match=rf"--dry-run.*{words}.*--peer-python"):
        install_peer(tmp_path / "environment", kind, on_install=told.append)
    assert [what.split()[0] for what in told] == ["making", "looking"]
    assert not (tmp_path / "environment").exists()


def test_an_unfinished_environment_counts_as_none(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "half", PeerKind(module="json", driver="vllm_driver.py", requirements=("half",)))
    (own_cache / "peers" / "half" / "bin").mkdir(parents=True)
    (own_cache / "peers" / "half" / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(BackendError, match="--install-peer"):
        find_peer("half")
