"""Drives vLLM at its own defaults, which compile the model: the offline engine, or the one that its server runs."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from typing import Any

from arrivals import Arrival, ArrivalQueue
from driver_loop import Driver, Timing, serve


class VllmDriver(Driver):
    """One `vllm.LLM`, or one `AsyncLLM` where requests arrive one by one."""

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Context, lanes, dtype and threads are the load's; everything else is vLLM's choice."""
        import vllm

        options = {
            "model": command["model"],
            "dtype": command["dtype"],
            "max_model_len": command["max_model_len"],
            "max_num_seqs": command["max_num_seqs"],
        }
        if not command["has_tokenizer"]:
            options["skip_tokenizer_init"] = True
        self._params, self._vllm = vllm.SamplingParams, vllm
        self._loop = asyncio.new_event_loop() if command["online"] else None
        self._request_ids = itertools.count()
        config = self._start_engine(options)
        variables = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "OMP_"))}
        return {
            "version": vllm.__version__,
            "engine": type(self._engine).__name__,
            **{name: value for name, value in options.items() if name != "model"},
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "compilation": str(config.compilation_config.mode),
            "prefix_caching": config.cache_config.enable_prefix_caching,
            **variables,
        }

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """See `Driver`."""
        self._sampling = {"temperature": temperature, "top_p": top_p, "ignore_eos": True}

    def run(self, output_len: int | None) -> int:
        """See `Driver`."""
        prompts = [{"prompt_token_ids": request["token_ids"]} for request in self.requests]
        params = [
            self._params(**self._sampling, n=request["n"], max_tokens=output_len or request["output_len"])
            for request in self.requests
        ]
        outputs = self._engine.generate(prompts, params, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    def run_online(self, queue: ArrivalQueue, now_s: Callable[[], float]) -> dict[int, Timing]:
        """See `Driver`."""
        return self._loop.run_until_complete(self._run_online(queue, now_s))

    def reset(self) -> None:
        """See `Driver`."""
        reset = self._engine.reset_prefix_cache()
        if not (reset if self._loop is None else self._loop.run_until_complete(reset)):
            raise RuntimeError("vLLM did not reset its prefix cache")

    def _start_engine(self, options: dict[str, Any]) -> Any:
        if self._loop is None:
            self._engine = self._vllm.LLM(**options)
            return self._engine.llm_engine.vllm_config
        asyncio.set_event_loop(self._loop)

        async def start() -> Any:  # its tasks belong to the running loop
            return self._vllm.AsyncLLMEngine.from_engine_args(self._vllm.AsyncEngineArgs(**options))

        self._engine = self._loop.run_until_complete(start())
        return self._engine.vllm_config

    async def _run_online(self, queue: ArrivalQueue, now_s: Callable[[], float]) -> dict[int, Timing]:
        timings: dict[int, Timing] = {}
        running: set[asyncio.Task[Any]] = set()
        while queue or running:
            for arrival in queue.take(now_s(), len(running)):
                timings[arrival.request_index] = Timing(arrival.arrival_s, self.requests[arrival.request_index]["n"])
                running.add(asyncio.create_task(self._answer(arrival, timings[arrival.request_index], now_s)))
            wait_s = queue.wait_s(now_s(), len(running))
            if not running:
                await asyncio.sleep(wait_s)
                continue
            ended, running = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                index, said = task.result()
                queue.end(index, timings[index].end_s, said)
        return timings

    async def _answer(self, arrival: Arrival, timing: Timing, now_s: Callable[[], float]) -> tuple[int, list[int]]:
        """Returns the request's index, and its prompt with the first sample."""
        request, said = self.requests[arrival.request_index], list(arrival.token_ids)
        params = self._params(
            **self._sampling,
            n=request["n"],
            max_tokens=request["output_len"],
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": arrival.token_ids}
        async for output in self._engine.generate(prompt, params, request_id=str(next(self._request_ids))):
            at_s = now_s()
            for sample in output.outputs:
                timing.token_times_s[sample.index].extend([at_s] * len(sample.token_ids))
                if sample.index == 0:
                    said.extend(sample.token_ids)
        timing.end_s = now_s()
        return arrival.request_index, said


if __name__ == "__main__":  # vLLM's workers import this file again
    serve(VllmDriver())
