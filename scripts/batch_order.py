#!/usr/bin/env python3
"""What `cascade-llm batch` saves by its order: the same shuffled file in its own order and in the command's.

128 conversations behind 8 system messages of 600 words each, 24 tokens each. Prints both summaries, and the CPU time of
each process, its start included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = (
    "sea",
    "ship",
    "harbour",
    "rain",
    "hill",
    "stone",
    "light",
    "wind",
    "river",
    "road",
    "bread",
    "glass",
    "night",
    "paper",
    "garden",
    "letter",
    "clock",
)


def requests(seed: int = 0) -> list[str]:
    """The file's lines."""
    draw = random.Random(seed)
    systems = [" ".join(draw.choice(WORDS) for _ in range(600)) for _ in range(8)]
    lines = []
    for i in range(128):
        question = f"Question {i}: what is near the {WORDS[i % 17]}?"
        messages = [{"role": "system", "content": systems[i % 8]}, {"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        lines.append(json.dumps({"custom_id": f"r{i}", "url": "/v1/chat/completions", "body": body}))
    draw.shuffle(lines)
    return lines


def main() -> None:
    """Run both, as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-num-seqs", default="16")
    parser.add_argument("--num-threads", default="1")
    args = parser.parse_args()
    options = ["-m", args.model, "--max-num-seqs", args.max_num_seqs, "--num-threads", args.num_threads]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "in.jsonl")
        file.write_text("\n".join(requests()) + "\n")
        for run in range(2 * args.rounds):
            order = ["--in-order"] if run % 2 == 0 else []
            answers = Path(folder, f"{run}.jsonl")
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            command = [sys.executable, "-m", "cascade_llm", "batch", str(file), str(answers), *options, *order]
            subprocess.run(command, check=True)
            spent_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            print(f"{'in order' if order else 'ordered'}: {spent_s:.1f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
