"""Drives llama.cpp through its own C interface: continuous batches, one unified cache, prefixes shared by `seq_cp`."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

from driver_loop import Driver, serve

N_BATCH = 2048


class LlamaCppDriver(Driver):
    """One model and one context."""

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Weights as the file has them, threads the load's; the context is made when the load is known."""
        import llama_cpp

        self._llama, self._command = llama_cpp, command
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0 if command["device"] == "cpu" else 999
        self._model = llama_cpp.llama_model_load_from_file(command["model"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {command['model']}")
        self._context = None
        return {
            "version": llama_cpp.__version__,
            "num_threads": command["num_threads"],
            "weights": "as in the file",
            "cache": "unified, float16, prefixes shared by seq_cp",
            "n_batch": N_BATCH,
        }

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """Samples become sequences of their own; like beginnings become neighbours."""
        rows = sorted((r["token_ids"], r["output_len"]) for r in requests for _ in range(r["n"]))
        if len(rows) > self._llama.llama_max_parallel_sequences():
            raise ValueError(f"llama.cpp runs {self._llama.llama_max_parallel_sequences()} sequences at most")
        self._rows = rows
        self._shared = [0] + [_common(before, ids) for (before, _), (ids, _) in itertools.pairwise(rows)]
        cells = sum(len(ids) - s + length for (ids, length), s in zip(rows, self._shared, strict=True))
        self._make_context(cells, len(rows))
        self._make_sampler(temperature, top_p)

    def run(self, output_len: int | None) -> int:
        """See `Driver`."""
        lens = [output_len or length for _, length in self._rows]
        tokens = self._prompts()
        generated = [1] * len(lens)
        while live := [row for row, length in enumerate(lens) if generated[row] < length]:
            items = [(tokens[row], len(self._rows[row][0]) + generated[row] - 1, row, True) for row in live]
            sampled = self._decode(items)
            for row in live:
                tokens[row] = sampled[row]
                generated[row] += 1
        for row, (ids, _) in enumerate(self._rows):  # what was generated is forgotten, prompts stay
            self._llama.llama_memory_seq_rm(self._memory, row, len(ids) - 1, -1)
        self._cached = True
        return sum(lens)

    def reset(self) -> None:
        """See `Driver`."""
        self._llama.llama_memory_clear(self._memory, True)
        self._cached = False

    def _prompts(self) -> dict[int, int]:
        """Compute what is not cached of every prompt; the first token of each."""
        items: list[tuple[int, int, int, bool]] = []
        tokens: dict[int, int] = {}
        for row, (ids, _) in enumerate(self._rows):
            begin = len(ids) - 1
            if not self._cached:
                begin = min(self._shared[row], len(ids) - 1)
                if begin:
                    tokens.update(self._decode(items))  # the row before must be there to be copied
                    items = []
                    self._llama.llama_memory_seq_cp(self._memory, row - 1, row, 0, begin)
            items += [(ids[place], place, row, place == len(ids) - 1) for place in range(begin, len(ids))]
        tokens.update(self._decode(items))
        return tokens

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Run (token, position, sequence, whether to sample) and return the sampled tokens by sequence."""
        llama, batch, sampled = self._llama, self._batch, {}
        for start in range(0, len(items), N_BATCH):
            part = items[start : start + N_BATCH]
            batch.n_tokens = len(part)
            for index, (token, position, row, wanted) in enumerate(part):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = wanted
            if status := llama.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode gave {status}")
            for index, (_, _, row, wanted) in enumerate(part):
                if wanted:
                    sampled[row] = llama.llama_sampler_sample(self._sampler, self._context, index)
        return sampled

    def _make_context(self, cells: int, num_sequences: int) -> None:
        llama = self._llama
        if self._context is not None:
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_ctx = -(-(cells + num_sequences) // 256) * 256
        params.n_batch, params.n_seq_max, params.kv_unified = N_BATCH, num_sequences, True
        params.n_threads = params.n_threads_batch = self._command["num_threads"]
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(N_BATCH, 0, 1)
        self._cached = False

    def _make_sampler(self, temperature: float, top_p: float) -> None:
        llama = self._llama
        self._sampler = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        if temperature:
            llama.llama_sampler_chain_add(self._sampler, llama.llama_sampler_init_top_p(top_p, 1))
            llama.llama_sampler_chain_add(self._sampler, llama.llama_sampler_init_temp(ctypes.c_float(temperature)))
            llama.llama_sampler_chain_add(self._sampler, llama.llama_sampler_init_dist(0))
        else:
            llama.llama_sampler_chain_add(self._sampler, llama.llama_sampler_init_greedy())


def _common(a: list[int], b: list[int]) -> int:
    """Tokens of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    serve(LlamaCppDriver())
