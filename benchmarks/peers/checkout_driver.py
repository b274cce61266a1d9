"""Drives another checkout of this repository through its public interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from arrivals import ArrivalQueue
from driver_loop import Driver, Timing, serve


class CheckoutDriver(Driver):
    """One `LLM` of the checkout that stands first on the path."""

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Model, dtype, threads, lanes, context and pool are the load's; all else is its own default."""
        import cascade_llm

        self._params = cascade_llm.SamplingParams
        self._llm = cascade_llm.LLM(
            command["model"],
            dtype=command["dtype"],
            device=command["device"],
            num_threads=command["num_threads"],
            max_model_len=command["max_model_len"],
            max_num_seqs=command["max_num_seqs"],
            max_num_batched_tokens=max(8192, command["max_num_seqs"]),
            kv_cache_bytes=command["kv_cache_bytes"],
        )
        return {
            "version": cascade_llm.__version__,
            "package": os.path.dirname(cascade_llm.__file__),
            "dtype": command["dtype"],
            "num_threads": command["num_threads"],
        }

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """See `Driver`."""
        self._sampling = {"temperature": temperature, "top_p": top_p, "ignore_eos": True}

    def run(self, output_len: int | None) -> int:
        """See `Driver`."""
        params = [
            self._params(n=r["n"], max_tokens=output_len or r["output_len"], seed=index, **self._sampling)
            for index, r in enumerate(self.requests)
        ]
        outputs = self._llm.generate([r["token_ids"] for r in self.requests], params)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    def run_online(self, queue: ArrivalQueue, now_s: Callable[[], float]) -> dict[int, Timing]:
        """Requests one by one are measured against other engines, not between checkouts."""
        raise NotImplementedError("another checkout is measured on whole loads only: leave out --against")

    def reset(self) -> None:
        """See `Driver`."""
        self._llm.reset_prefix_cache()


if __name__ == "__main__":
    serve(CheckoutDriver())
