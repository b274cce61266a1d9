"""Drives vLLM's offline engine at its own defaults, which compile the model."""

from __future__ import annotations

import os
from typing import Any

from driver_loop import Driver, serve


class VllmDriver(Driver):
    """One `vllm.LLM`."""

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
        self._engine, self._params = vllm.LLM(**options), vllm.SamplingParams
        config = self._engine.llm_engine.vllm_config
        variables = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "OMP_"))}
        return {
            "version": vllm.__version__,
            **{name: value for name, value in options.items() if name != "model"},
            "compilation": str(config.compilation_config.mode),
            "prefix_caching": config.cache_config.enable_prefix_caching,
            **variables,
        }

    def load(self, requests: list[dict[str, Any]], temperature: float, top_p: float) -> None:
        """See `Driver`."""
        self._requests = requests
        self._sampling = {"temperature": temperature, "top_p": top_p, "ignore_eos": True}

    def run(self, output_len: int | None) -> int:
        """See `Driver`."""
        prompts = [{"prompt_token_ids": request["token_ids"]} for request in self._requests]
        params = [
            self._params(**self._sampling, n=request["n"], max_tokens=output_len or request["output_len"])
            for request in self._requests
        ]
        outputs = self._engine.generate(prompts, params, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)

    def reset(self) -> None:
        """See `Driver`."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")


if __name__ == "__main__":  # vLLM's workers import this file again
    serve(VllmDriver())
