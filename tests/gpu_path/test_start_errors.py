"""What can be wrong with a GPU machine when an engine starts: each is an error of ours, at start, with its cure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cascade_llm.attention.flashinfer import kernels as flashinfer_kernels
from cascade_llm.config import EngineOptions
from cascade_llm.device.ranks import Ranks
from cascade_llm.errors import BackendError, CapacityError, CascadeError, ConfigError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.worker import memory, worker
from cascade_llm.worker.graph_sampling import NO_MEMORY
from cascade_llm.worker.pool_sizes import PoolShape
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


def without_memory(*arguments: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


# -- no GPU, or not a usable one ---------------------------------------------------------------------------------------


@needs_no_gpu
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"attention_backend": "flashinfer"}, BackendError, r"needs a CUDA GPU, the device is cpu.*'auto' takes one"),
        ({"attention_backend": "flashinfer", "device": "cpu"}, BackendError, "needs a CUDA GPU"),
        ({"device": "cuda"}, ConfigError, "torch sees 0 CUDA devices: use cpu"),
        ({"device": "cuda:3"}, ConfigError, "torch sees 0 CUDA devices"),
    ],
)
def test_no_gpu(tiny: Path, options: dict[str, str], kind: type[CascadeError], words: str) -> None:
    with pytest.raises(kind, match=words):
        tiny_llm(tiny, **options)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU and a package, as far as they are asked before anything is allocated."""
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(worker, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(flashinfer_kernels, "package_reasons", list)
    monkeypatch.setattr(flashinfer_kernels, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(flashinfer_kernels, "load_flashinfer_ops", lambda prebuilt: None)


Change = Callable[[pytest.MonkeyPatch], None]


def old_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))


def no_package(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flashinfer_kernels, "package_reasons", lambda: ["flashinfer-python is not installed (pip ...)"])


def untested_package(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flashinfer_kernels, "package_reasons", lambda: ["flashinfer-python 9.9 is untested here"])


def broken_package(patch: pytest.MonkeyPatch) -> None:
    def broken(prebuilt: Path | None) -> None:
        raise BackendError("FlashInfer cannot be imported (no libcudart)")

    patch.setattr(flashinfer_kernels, "load_flashinfer_ops", broken)


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flashinfer_kernels, "find_nvcc", lambda: None)


def nothing(patch: pytest.MonkeyPatch) -> None:
    return


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (old_gpu, {}, "needs compute capability 8.0 or newer, the GPU has 7.5"),
        (no_package, {}, "flashinfer-python is not installed"),
        (untested_package, {}, "9.9 is untested"),
        (broken_package, {}, "cannot be imported"),
        (no_compiler, {}, r"are not built \(.*appending to pages.*no nvcc.*kernels build"),
        (nothing, {"dtype": "float32"}, "bfloat16 and float16, not float32"),
        (nothing, {"kv_cache_dtype": "fp8_e4m3"}, "head_dim 64: leave out kv_cache_dtype"),
    ],
)
def test_a_gpu_that_cannot_serve(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, change: Change, options: dict[str, str], words: str
) -> None:
    """By name it is an error before anything is loaded; `auto` would take torch."""
    change(monkeypatch)
    with pytest.raises(BackendError, match=words):
        tiny_llm(tiny, **{"dtype": "bfloat16", "attention_backend": "flashinfer", **options})


@pytest.mark.usefixtures("hopper")
def test_a_head_size_that_no_kernel_serves(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen3", **{**SHAPE, "head_dim": 96})
    with pytest.raises(BackendError, match="head_dim is 96, its kernels take 64, 128, 256"):
        tiny_llm(folder, dtype="bfloat16", attention_backend="flashinfer")


@pytest.mark.usefixtures("hopper")
def test_auto_warns_where_a_gpu_is_served_without_flashinfer(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_compiler(monkeypatch)
    monkeypatch.setattr(worker, "_decoder", without_memory)  # there is no GPU to go on with
    monkeypatch.setattr(worker, "available_bytes", lambda device: 5)
    with pytest.raises(CapacityError):
        tiny_llm(tiny, dtype="bfloat16")
    (record,) = [record for record in caplog.records if record.name == "cascade_llm"]
    assert record.levelno == logging.WARNING
    assert record.message.startswith("attention backend: torch (not flashinfer: its kernels are not built")
    assert "not native" in record.message


@needs_no_gpu
def test_auto_says_once_what_it_chose_and_why_not_the_others(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cascade_llm"), tiny_llm(tiny):
        pass
    (record,) = [record for record in caplog.records if "attention backend" in record.message]
    assert (record.name, record.levelno) == ("cascade_llm", logging.INFO)
    assert "not flashinfer: needs a CUDA GPU, the device is cpu" in record.message


# -- too little memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("load_weights", r"no memory for the weights: [\d,]+ bytes were free"),
        ("PagedKVCache", "another process has taken memory since it was measured; lower gpu_memory_utilization"),
        ("LaneState", "lanes and workspaces beside the KV pool: lower gpu_memory_utilization or max_num_seqs"),
        ("FlashInferAttentionBackend", "lanes and workspaces"),
        ("CudaGraphs", "lanes and workspaces"),
    ],
)
def test_no_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch, part: str, words: str) -> None:
    original = getattr(worker, part)

    class Without(original if isinstance(original, type) else object):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            without_memory()

    monkeypatch.setattr(worker, part, Without if isinstance(original, type) else without_memory)
    with pytest.raises(CapacityError, match=words):
        gpu_llm(tiny, double_gpu())


def test_no_memory_for_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 20)
    options = EngineOptions(page_size=16, gpu_memory_utilization=0.5)
    shape = PoolShape(
        page_size=16, max_model_len=64, max_num_seqs=256, max_num_batched_tokens=8192, page_bytes=(1 << 17,)
    )
    with pytest.raises(CapacityError, match=r"one sequence of max_model_len 64 needs 524,288 bytes.*gpu_memory_util"):
        memory.pool_pages(options, shape, torch.device("cuda"), Ranks(), reserved_bytes=1 << 18)


def test_no_memory_for_the_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    decoder: Any = SimpleNamespace(device=torch.device("cpu"), forward=without_memory)
    with pytest.raises(CapacityError, match=r"a step of 2,048 tokens beside the weights: lower max_num_batched_tokens"):
        memory.step_bytes(decoder, EngineOptions(max_num_batched_tokens=2048), has_graphs=True)


def test_no_memory_for_sampling_graphs_is_said_and_served(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double, params = double_gpu(), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    capture = double.stream.capture

    def forward_only(work: Any) -> Any:
        return without_memory() if work.func.__name__ == "_choose" else capture(work)

    monkeypatch.setattr(double.stream, "capture", forward_only)
    prompts = random_forest(3, 8, 90, 40)
    with tiny_llm(tiny) as twin:
        expected = [output["token_ids"] for output in twin.generate(prompts, params)]
    with gpu_llm(tiny, double) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, params)] == expected
        counters, report = graphs_of(llm).counters, llm.facts.capture
        assert counters.graph_steps > 0
        assert counters.eagerly_sampled_steps[NO_MEMORY] > 0
        assert report is not None
        assert (report.dropped, report.num_graphs) == (
            (),
            len(graphs_of(llm)._shapes) + graphs_of(llm)._pieces.num_graphs,
        )
    assert any("no memory to capture sampling of 16 rows" in record.message for record in caplog.records)


# -- a kernel that does not compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Ninja build failed. Ninja output:\nfatal error: curand.h"), r"kernels build MODEL.*curand\.h"),
        (FileNotFoundError(2, "No such file or directory", "ninja"), "ninja was not found: activate the environment"),
    ],
)
def test_a_kernel_that_does_not_compile(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    double = double_gpu()

    def broken(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(double, "append_paged_kv_cache", broken)
    with pytest.raises(BackendError, match=f"(?s)could not be compiled; .*{words}"):
        gpu_llm(tiny, double)


def test_other_errors_stay_what_they_are(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "load_weights", lambda *arguments: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match=r"^a fault$"):
        gpu_llm(tiny, double_gpu())
