"""Drives transformers' `generate`: static batches, padded on the left, no prefix cache."""

from __future__ import annotations

from typing import Any

from driver_loop import Driver, serve

BATCH_TOKENS = 160_000
"""Tokens of K/V that one batch may come to, padding counted; else memory would end it."""


class TransformersDriver(Driver):
    """One `AutoModelForCausalLM`."""

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Dtype and threads are the load's; attention and compilation are transformers' choice."""
        import torch
        import transformers

        self._torch = torch
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
            "batch": "static, padded on the left",
        }

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """Samples of one prompt become rows of their own; rows of like length share a batch."""
        rows = [(r["token_ids"], r["output_len"]) for r in requests for _ in range(r["n"])]
        rows.sort(key=lambda row: (row[1], len(row[0])))
        self._batches: list[list[tuple[list[int], int]]] = [[]]
        for row in rows:
            longest = max(len(ids) + output_len for ids, output_len in [*self._batches[-1], row])
            if self._batches[-1] and (len(self._batches[-1]) + 1) * longest > BATCH_TOKENS:
                self._batches.append([])
            self._batches[-1].append(row)
        self._sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            self._sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}

    def run(self, output_len: int | None) -> int:
        """See `Driver`; a batch runs as long as its longest output, whose own length counts."""
        total = 0
        for batch in self._batches:
            new = output_len or max(length for _, length in batch)
            width = max(len(ids) for ids, _ in batch)
            torch, device = self._torch, self._model.device
            ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in batch], device=device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch], device=device)
            with torch.inference_mode():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=0,
                    eos_token_id=None,
                    **self._sampling,
                )
            total += sum(output_len or length for _, length in batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return total


if __name__ == "__main__":
    serve(TransformersDriver())
