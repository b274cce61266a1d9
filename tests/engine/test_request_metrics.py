"""What an output says of its steps, against what the engine counts."""

from __future__ import annotations

from pathlib import Path

from cascade_llm import SamplingParams
from cascade_llm.outputs import RequestMetrics
from tests.engine.tiny_llm import save_tiny, tiny_llm


def test_metrics_of_all_outputs_make_what_the_engine_counts(tmp_path: Path) -> None:
    prompts = [[*range(3, 35), 40 + i, *range(i)] for i in range(4)]
    with tiny_llm(save_tiny(tmp_path, num_hidden_layers=1), cascade_shared_prefix_len=4, num_threads=1) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True, n=2))
        stats, width = llm.stats(), llm.facts.kv_bytes_per_token
        whole = RequestMetrics()
        for output in outputs:
            assert output.metrics is not None
            whole.add(output.metrics)
        assert abs(whole.kv_bytes_read - stats["kv_bytes_read"]) <= width * len(prompts)
        assert abs(whole.kv_bytes_saved - stats["kv_bytes_saved"]) <= width * len(prompts)
        assert (whole.group_size, whole.num_levels > 1, whole.num_shared_steps > 0) == (8, True, True)
        alone = llm.generate(list(range(50, 70)), SamplingParams(max_tokens=3, ignore_eos=True))[0].metrics
        assert alone is not None
        assert (alone.num_steps, alone.num_shared_steps, alone.num_levels, alone.group_size) == (3, 0, 1, 1)
        assert (alone.kv_bytes_read, alone.kv_bytes_saved) == (width * (20 + 21 + 22), 0)
