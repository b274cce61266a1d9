"""Drives transformers' `generate`: static batches, padded on the left, no prefix cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from arrivals import ArrivalQueue
from driver_loop import Driver, Timing, serve

BATCH_TOKENS = 160_000
"""Tokens of K/V that one batch may come to, padding counted; else memory would end it."""


class TransformersDriver(Driver):
    """One `AutoModelForCausalLM`."""

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Dtype and threads are the load's; attention and compilation are transformers' choice."""
        import torch
        import transformers

        self._torch, self._criteria = torch, transformers.StoppingCriteriaList
        if command["device"] == "cpu":
            torch.set_num_threads(command["num_threads"])
        dtype = getattr(torch, command["dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(command["model"], dtype=dtype)
        self._model = model.to(command["device"]).eval()
        return {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "dtype": command["dtype"],
            "num_threads": command["num_threads"],
            "attention": self._model.config._attn_implementation,
            "batch": "static, padded on the left" + (", of all that has arrived" if command["online"] else ""),
        }

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """See `Driver`."""
        self._sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            self._sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    def run(self, output_len: int | None) -> int:
        """See `Driver`; a batch runs as long as its longest output, whose own length counts."""
        rows = [Row(r["token_ids"], output_len or r["output_len"]) for r in self.requests for _ in range(r["n"])]
        for batch in _batches(rows):
            self._generate(batch)
        if self._model.device.type == "cuda":
            self._torch.cuda.synchronize()
        return sum(row.output_len for row in rows)

    def run_online(self, queue: ArrivalQueue, now_s: Callable[[], float]) -> dict[int, Timing]:
        """See `Driver`; what arrives while batches run waits for their end."""
        timings: dict[int, Timing] = {}
        while queue:
            rows = []
            for arrival in queue.take(now_s(), 0):
                request = self.requests[arrival.request_index]
                timings[arrival.request_index] = Timing(arrival.arrival_s, request["n"])
                rows += [
                    Row(arrival.token_ids, request["output_len"], arrival.request_index, s) for s in range(request["n"])
                ]
            for batch in _batches(rows):
                self._generate_timed(batch, timings, now_s)
            for index in {row.index for row in rows}:
                timing = timings[index]
                timing.end_s = max(times[-1] for times in timing.token_times_s)
                queue.end(index, timing.end_s, next(row.said for row in rows if (row.index, row.sample) == (index, 0)))
            if queue and not rows:
                time.sleep(queue.wait_s(now_s(), 0))
        return timings

    def _generate_timed(self, batch: list[Row], timings: dict[int, Timing], now_s: Callable[[], float]) -> None:
        """A criterion that stops nothing is called after each token: its times are the tokens'."""
        times_s = []

        def note(ids: Any, scores: Any, **_: Any) -> Any:
            if ids.device.type == "cuda":
                self._torch.cuda.synchronize()
            times_s.append(now_s())
            return self._torch.zeros(len(ids), dtype=self._torch.bool, device=ids.device)

        answers = self._generate(batch, stopping_criteria=self._criteria([note]))
        for row, answer in zip(batch, answers, strict=True):
            timings[row.index].token_times_s[row.sample] = times_s[: row.output_len]
            row.said = [*row.token_ids, *answer[: row.output_len]]

    def _generate(self, batch: list[Row], **options: Any) -> list[list[int]]:
        """The answers, all of the longest one's length."""
        new, width = max(row.output_len for row in batch), max(len(row.token_ids) for row in batch)
        torch, device = self._torch, self._model.device
        pads = [width - len(row.token_ids) for row in batch]
        ids = torch.tensor([[0] * pad + row.token_ids for pad, row in zip(pads, batch, strict=True)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
                eos_token_id=None,
                **self._sampling,
                **options,
            )
        return output[:, width:].tolist()


@dataclass
class Row:
    """One sample of one request."""

    token_ids: list[int]
    output_len: int
    index: int = 0
    sample: int = 0
    said: list[int] = field(default_factory=list)
    """Prompt and answer, once it has ended."""


def _batches(rows: list[Row]) -> list[list[Row]]:
    """Rows of like length share a batch, as many as memory holds."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row.output_len, len(row.token_ids))):
        if batches:
            longest = max(len(other.token_ids) + other.output_len for other in [*batches[-1], row])
            if (len(batches[-1]) + 1) * longest <= BATCH_TOKENS:
                batches[-1].append(row)
                continue
        batches.append([row])
    return batches


if __name__ == "__main__":
    serve(TransformersDriver())
