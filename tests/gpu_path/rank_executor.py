"""Ranks as threads behind the executor's interface, each on a GPU made of doubles."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cascade_llm.config import EngineOptions
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.worker.executor import Executor, PendingStep
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.rank_options import options_of_rank
from cascade_llm.worker.start_progress import OnStart
from cascade_llm.worker.worker import WorkerFacts, build_worker
from tests.gpu_path.double_gpu import double_gpu
from tests.gpu_path.gloo_ranks import join_by_gloo

__all__ = ["RankThreads"]

CPU = torch.device("cpu")


class RankThreads(Executor):
    """Stands where `ProcessExecutor` does."""

    def __init__(
        self, model: str | os.PathLike[str], options: EngineOptions, *, on_start: OnStart | None = None
    ) -> None:
        self._folder = TemporaryDirectory()
        count = options.tensor_parallel_size
        self._threads = [ThreadPoolExecutor(1) for _ in range(count)]

        def start(index: int) -> tuple[ModelRunner, WorkerFacts]:
            ranks = join_by_gloo(index, count, Path(self._folder.name) / "ranks", CPU)
            platform = double_gpu(exact=False).platform()
            checkpoint = open_checkpoint(model, load_format=options.load_format)
            return build_worker(options_of_rank(options, index), checkpoint, ranks=ranks, platform=platform)

        started = [thread.submit(start, index) for index, thread in enumerate(self._threads)]
        self._runners = [each.result()[0] for each in started]
        self.facts = started[0].result()[1]

    def submit(self, plan: StepPlan) -> PendingStep:
        """See `Executor`: the step runs to its end, on each rank in its own thread."""

        def work(runner: ModelRunner) -> StepResult:
            return runner.submit(plan)()

        done: list[Future[StepResult]] = [
            thread.submit(work, runner) for thread, runner in zip(self._threads, self._runners, strict=True)
        ]

        def first() -> StepResult:
            results = [each.result() for each in done]
            return results[0]

        return PendingStep(plan, first)

    def counters(self) -> dict[str, int]:
        """See `Executor`; of rank 0."""
        graphs = self._runners[0].graphs
        return graphs.counters.as_dict() if graphs is not None else {}

    def close(self) -> None:
        """See `Executor`."""
        for thread in self._threads:
            thread.shutdown()
        self._folder.cleanup()
