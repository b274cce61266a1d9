#!/usr/bin/env python
"""Decode steps of a mixture of experts, cascade on and off, by processor time: random weights, one shared prefix.

    PYTHONPATH=. scripts/experts_engine.py [--quantization q4_k] [--rows 16,64] [--prefix 512] [--tokens 24]

Of half Qwen3-30B-A3B's width: 8 layers, hidden size 1,024, 64 experts of 384, 8 of them a row. One thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from cascade_llm import LLM, SamplingParams

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "dtype": "bfloat16",
}


def decode_s(llm: LLM, rows: int, prefix: int, tokens: int) -> float:
    """Processor seconds of a decode step: of a long answer, less those of a short one."""
    prompts = [[*(7 + i % 4000 for i in range(prefix)), 20 + row] for row in range(rows)]
    took = []
    for count in (2, 2, 2 + tokens):  # the first fills the prefix cache
        before = time.process_time()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        took.append(time.process_time() - before)
    return (took[2] - took[1]) / tokens


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--rows", default="16,64")
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        for rows in map(int, arguments.rows.split(",")):
            seconds = []
            for cascade in (True, False):
                with LLM(
                    folder,
                    load_format="dummy",
                    device="cpu",
                    dtype="bfloat16",
                    num_threads=1,
                    max_num_seqs=rows,
                    max_model_len=arguments.prefix + 128,
                    quantization=arguments.quantization,
                    enable_cascade_attention=cascade,
                ) as llm:
                    seconds.append(decode_s(llm, rows, arguments.prefix, arguments.tokens))
            on, off = (1e3 * s for s in seconds)
            print(
                f"{rows} rows behind {arguments.prefix}: cascade {on:.1f} ms a step, without {off:.1f}: {off / on:.2f}x"
            )


if __name__ == "__main__":
    main()
