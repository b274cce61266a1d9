"""Every error that cascade-llm raises on purpose.

CascadeError
├── ConfigError            an option of the engine is unknown, out of range or contradicts another
├── RequestError           a request cannot be served as it was asked
│   ├── PromptError        the prompt itself: empty, too long, a token id outside the vocabulary
│   └── SamplingParamsError
├── ModelError             the model cannot be served
│   ├── ModelNotFoundError
│   ├── CheckpointError    files are there but broken, or their tensors do not fit the configuration
│   └── UnsupportedModelError
├── CapacityError          memory, disk or page pool too small for what was asked
├── BackendError           an attention backend or a device that cannot be used
├── PlanError              a plan breaks an invariant of `cascade_llm.plan`
├── WorkerError            a process that runs steps has ended, or a step failed in it
│   └── RankError          an exchange with the other ranks failed: one of them has ended
├── GenerationError        a running request had to be ended (non-finite logits, a failed step)
└── EngineClosedError      the engine was used after `close()`

A message names what is wrong, where, and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "BackendError",
    "CapacityError",
    "CascadeError",
    "CheckpointError",
    "ConfigError",
    "EngineClosedError",
    "GenerationError",
    "ModelError",
    "ModelNotFoundError",
    "PlanError",
    "PromptError",
    "RankError",
    "RequestError",
    "SamplingParamsError",
    "UnsupportedModelError",
    "WorkerError",
    "nearest_name_hint",
]


class CascadeError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(CascadeError, ValueError):
    """An engine option is unknown, out of range, or contradicts another."""


class RequestError(CascadeError, ValueError):
    """A request cannot be served as it was asked."""


class PromptError(RequestError):
    """The prompt is empty, too long for the context, or holds an unknown token id."""


class SamplingParamsError(RequestError):
    """A sampling parameter is unknown or out of range."""


class ModelError(CascadeError):
    """The model cannot be served."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model folder, file, package or hub id of that name can be reached."""


class CheckpointError(ModelError, ValueError):
    """A checkpoint is truncated, corrupt, or its tensors do not fit its configuration."""


class UnsupportedModelError(ModelError, ValueError):
    """The architecture, or a field that changes its mathematics, is not implemented."""


class CapacityError(CascadeError, MemoryError):
    """The memory, the disk, or the page pool is too small for what was asked."""


class BackendError(CascadeError, RuntimeError):
    """An attention backend or a device cannot be used; the message lists the reasons."""


class PlanError(CascadeError, ValueError):
    """A plan breaks an invariant; it must not reach a kernel."""


class WorkerError(CascadeError, RuntimeError):
    """A process that runs steps has ended, or a step failed in it; the message says which and how."""


class RankError(WorkerError):
    """An exchange between ranks failed, as it does in all of them when one ends."""


class GenerationError(CascadeError, RuntimeError):
    """A running request was ended early, for a reason of its own.

    Raised by `LLM.generate` it carries `outputs`, those of all requests of the call: nothing that was computed is lost.
    """

    def __init__(self, message: str, outputs: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.outputs = list(outputs)


class EngineClosedError(CascadeError, RuntimeError):
    """The engine was used after `close()`."""


def nearest_name_hint(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the nearest known name, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
