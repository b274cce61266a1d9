"""The stages in their order. Limits are for an H200; together they are longer than the budget, which cuts the last."""

from __future__ import annotations

from scripts.gpu_suite.runner import Stage

__all__ = ["STAGES"]

CHILD = "scripts.gpu_suite.stage"
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86", "--print-limit", "20")

STAGES = (
    Stage(name="machine", module=CHILD, limit_s=60, about="what is there, and how fast it copies and multiplies"),
    Stage(name="smoke", module=CHILD, limit_s=120, about="each FlashInfer call once against torch"),
    Stage(
        name="sanitizer",
        module=CHILD,
        limit_s=60,
        about="the same under compute-sanitizer",
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        wrapper=SANITIZER,
    ),
    Stage(name="replay", module=CHILD, limit_s=90, about="replayed graphs against float64 attention, step by step"),
    Stage(name="engine", module=CHILD, limit_s=120, about="the engine's ways of running against each other"),
    Stage(
        name="blocking",
        module=CHILD,
        limit_s=100,
        about="the same, every launch waited for: a difference is a race",
        environment={"CUDA_LAUNCH_BLOCKING": "1"},
    ),
    Stage(name="weights", module=CHILD, limit_s=70, about="quantized products against their values, and dense ones"),
    Stage(name="experts", module=CHILD, limit_s=40, about="the grouped product of a layer's experts, from a graph"),
    Stage(name="ranks", module=CHILD, limit_s=120, about="two GPUs that share a model, beside one; their exchanges"),
    Stage(name="timing", module=CHILD, limit_s=150, about="times of decode steps, on host and device"),
    Stage(name="profile", module=CHILD, limit_s=60, about="which kernels a decode step's time goes to"),
    Stage(name="attention", module=CHILD, limit_s=120, about="attention alone, cascade against plain; cost constants"),
    Stage(name="experiments", module=CHILD, limit_s=300, about="what else may be asked", optional=True),
)
