"""The file that an engine records its step plans to."""

from __future__ import annotations

from cascade_llm import __version__
from cascade_llm.config import EngineOptions
from cascade_llm.plan_file.header import PlanFileHeader
from cascade_llm.plan_file.writer import PlanFileWriter
from cascade_llm.worker.build import RunnerFacts

__all__ = ["begin_recording", "open_recorder"]


def open_recorder(options: EngineOptions) -> PlanFileWriter | None:
    """Open the file that `record_plans` names, if it names one. Raises `ConfigError` where it cannot be written."""
    if options.record_plans is None:
        return None
    return PlanFileWriter(options.record_plans, token_ids=options.record_token_ids)


def begin_recording(recorder: PlanFileWriter, options: EngineOptions, model_name: str, facts: RunnerFacts) -> None:
    """Write down what was found out at start."""
    model = facts.model
    header = PlanFileHeader(
        cascade_llm=__version__,
        model=model_name,
        num_layers=model.num_layers,
        num_qo_heads=model.num_qo_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        sm_scale=model.sm_scale,
        dtype=str(facts.dtype).removeprefix("torch."),
        page_size=options.page_size,
        total_pages=facts.total_pages,
        max_model_len=facts.max_model_len,
        max_num_seqs=options.max_num_seqs,
        token_ids=options.record_token_ids,
        kv_cache_dtype=options.kv_cache_dtype if facts.kv_dtype != facts.dtype else "auto",
    )
    recorder.begin(header)
