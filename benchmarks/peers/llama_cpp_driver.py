"""Drives llama.cpp through its own C interface: continuous batches, one unified cache, prefixes shared by `seq_cp`."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arrivals import ArrivalQueue
from driver_loop import Driver, Timing, serve

N_BATCH = 2048


@dataclass
class Sequence:
    """One sample of a request that has arrived."""

    row: int
    """Its number in the cache."""
    index: int
    sample: int
    token_ids: list[int]
    """Prompt, and what was generated."""
    end_len: int
    num_cached: int | None = None
    """Tokens whose K/V are there; None while it has not been begun."""


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
        later = [r for r in requests if r["goes_on"]]  # whose beginnings are the answers of others
        rows = sorted((r["token_ids"], r["output_len"]) for r in requests if r not in later for _ in range(r["n"]))
        num_rows = sum(r["n"] for r in requests)
        if num_rows > self._llama.llama_max_parallel_sequences():
            raise ValueError(f"llama.cpp runs {self._llama.llama_max_parallel_sequences()} sequences at most")
        self._rows = rows
        self._shared = [0] + [_common(before, ids) for (before, _), (ids, _) in itertools.pairwise(rows)]
        cells = sum(len(ids) - s + length for (ids, length), s in zip(rows, self._shared, strict=True))
        cells += sum(r["n"] * (len(r["token_ids"]) + r["output_len"]) for r in later)
        self._make_context(cells, num_rows)
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

    def run_online(self, queue: ArrivalQueue, now_s: Callable[[], float]) -> dict[int, Timing]:
        """See `Driver`; each step takes the next token of every sequence, then of prompts as many as fit the batch."""
        timings: dict[int, Timing] = {}
        running: list[Sequence] = []
        said: dict[int, list[int]] = {}
        first_rows = [0, *itertools.accumulate(request["n"] for request in self.requests)]
        while queue or running:
            for arrival in queue.take(now_s(), len({sequence.index for sequence in running})):
                index, request = arrival.request_index, self.requests[arrival.request_index]
                timings[index] = Timing(arrival.arrival_s, request["n"])
                end_len = len(arrival.token_ids) + request["output_len"]
                running += [
                    Sequence(first_rows[index] + sample, index, sample, list(arrival.token_ids), end_len)
                    for sample in range(request["n"])
                ]
            if not running:
                time.sleep(queue.wait_s(now_s(), 0))
                continue
            sampled, at_s = self._decode(self._step_items(running)), now_s()
            for sequence in running:
                if sequence.num_cached is not None:
                    self._texts[sequence.row] = sequence.token_ids[: sequence.num_cached]
                if sequence.row in sampled:
                    sequence.token_ids.append(sampled[sequence.row])
                    timings[sequence.index].token_times_s[sequence.sample].append(at_s)
                if len(sequence.token_ids) == sequence.end_len and sequence.sample == 0:
                    said[sequence.index] = sequence.token_ids
            ran = {sequence.index for sequence in running}
            running = [sequence for sequence in running if len(sequence.token_ids) < sequence.end_len]
            for index in ran - {sequence.index for sequence in running}:
                timings[index].end_s = at_s
                queue.end(index, at_s, said[index])
        return timings

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        """See `Driver`."""
        import numpy  # a dependency of the bindings

        self._make_context(max(map(len, windows)), 1)
        vocabulary = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        scores = []
        for token_ids in windows:
            self._llama.llama_memory_clear(self._memory, True)
            found: list[float] = []
            for begin in range(0, len(token_ids), N_BATCH):
                end = min(begin + N_BATCH, len(token_ids))
                self._run_batch([(token_ids[i], i, 0, True) for i in range(begin, end)])
                values = numpy.ctypeslib.as_array(
                    self._llama.llama_get_logits(self._context), (end - begin, vocabulary)
                )
                for logits, token in zip(values, token_ids[begin + 1 :], strict=False):
                    highest = logits.max()
                    total = numpy.exp(logits - highest).sum(dtype=numpy.float64)
                    found.append(float(logits[token] - highest - numpy.log(total)))
            scores.append(found)
        return scores

    def reset(self) -> None:
        """See `Driver`."""
        self._llama.llama_memory_clear(self._memory, True)
        self._cached = False
        self._texts = {}

    def _step_items(self, running: list[Sequence]) -> list[tuple[int, int, int, bool]]:
        """What `_decode` takes of one step."""
        begun = [sequence for sequence in running if sequence.num_cached is not None]
        begun.sort(key=lambda sequence: len(sequence.token_ids) - sequence.num_cached)  # single tokens first
        items: list[tuple[int, int, int, bool]] = []
        for sequence in begun:
            self._add_items(items, sequence)
        for sequence in running:
            if sequence.num_cached is not None or len(items) >= N_BATCH:
                continue
            best = max(self._texts, key=lambda row: _common(self._texts[row], sequence.token_ids), default=None)
            shared = 0 if best is None else _common(self._texts[best], sequence.token_ids)
            in_step = (
                _common(other.token_ids, sequence.token_ids) for other in running if other.num_cached is not None
            )
            if max(in_step, default=0) > shared + 1:
                continue  # more of it is there after this step, to be copied
            sequence.num_cached = min(shared, len(sequence.token_ids) - 1)
            self._copy(best, sequence.row, sequence.num_cached)
            self._add_items(items, sequence)
        return items

    def _add_items(self, items: list[tuple[int, int, int, bool]], sequence: Sequence) -> None:
        """As many of its tokens as the batch still holds."""
        begin, length = sequence.num_cached, len(sequence.token_ids)
        end = min(length, begin + N_BATCH - len(items))
        items += [(sequence.token_ids[i], i, sequence.row, i == length - 1) for i in range(begin, end)]
        sequence.num_cached = end

    def _copy(self, source: int | None, row: int, num_tokens: int) -> None:
        """Let a sequence begin with so many tokens of another, or keep its own."""
        if source == row:
            self._llama.llama_memory_seq_rm(self._memory, row, num_tokens, -1)
            return
        self._llama.llama_memory_seq_rm(self._memory, row, -1, -1)
        self._texts.pop(row, None)
        if num_tokens:
            self._llama.llama_memory_seq_cp(self._memory, source, row, 0, num_tokens)

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
        llama, sampled = self._llama, {}
        for start in range(0, len(items), N_BATCH):
            part = items[start : start + N_BATCH]
            self._run_batch(part)
            for index, (_, _, row, wanted) in enumerate(part):
                if wanted:
                    sampled[row] = llama.llama_sampler_sample(self._sampler, self._context, index)
        return sampled

    def _run_batch(self, items: list[tuple[int, int, int, bool]]) -> None:
        """One call for items as of `_decode`, which fit the batch."""
        batch = self._batch
        batch.n_tokens = len(items)
        for index, (token, position, row, wanted) in enumerate(items):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = wanted
        if status := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {status}")

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
        self._texts: dict[int, list[int]] = {}
        """By row: the tokens that are cached."""

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
    """Tokens of the common beginning, by halving: slices are compared fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


if __name__ == "__main__":
    serve(LlamaCppDriver())
