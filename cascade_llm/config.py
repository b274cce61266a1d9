"""Configuration: what a model is, what the user asked for, what was resolved from both.

`EngineOptions` holds the user's keywords as given. Everything that is found out at start (how many pages fit, which
dtype) becomes a value of its own, once, and nothing is patched afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from reprlib import repr as short_repr
from typing import Any

from cascade_llm.errors import ConfigError, nearest_name_hint

__all__ = ["CascadeConfig", "EngineOptions", "ModelConfig", "RopeConfig", "SchedulerConfig", "kinds_of_layers"]

MAX_CASCADE_LEVELS = 4
LIMITS: Mapping[str, int] = {
    "page_size": 2**20,
    "max_num_seqs": 2**31 - 1,
    "max_num_batched_tokens": 2**31 - 1,
    "num_threads": 1024,
    "max_model_len": 2**31 - 1,
    "kv_cache_bytes": 2**63 - 1,
    "tensor_parallel_size": 8,
}
"""The largest value of each option that is a count; more threads than these end a process, and a machine has 8 GPUs."""
RESOLVED = ("num_threads", "max_model_len", "kv_cache_bytes")
"""Those that may be None."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how it is stretched; fields as in Hugging Face's config."""

    theta: float = 10000.0
    rotary_dim: int | None = None
    """How many dimensions of a head are rotated, the first ones; None: all."""
    is_interleaved: bool = False
    """Whether neighbouring dimensions are rotated against each other, and not the two halves."""
    rope_type: str = "default"
    """default | linear | dynamic | llama3 | yarn | longrope"""
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    """Of longrope: what each wavelength is multiplied by up to the original length, and in `long_factors` beyond."""
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer; how its layers are composed is `models.architectures`' knowledge."""

    architecture: str
    """A key of `models.architectures.ARCHITECTURES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    gate_sizes: tuple[int, ...] = ()
    """Of each layer, the outputs of all gates, those of all experts together; empty where each has
    `intermediate_size`."""
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    """Of each layer, None where nothing is rotated; empty where all layers have `rope`."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """What a block adds to the residual stream is multiplied by it."""
    attention_multiplier: float | None = None
    """What q·k is multiplied by; None: 1 / sqrt(head_dim)."""
    logits_divisor: float = 1.0
    attention_soft_cap: float | None = None
    """Attention's scores s become cap * tanh(s / cap) (Gemma 2)."""
    final_soft_cap: float | None = None
    """So do the logits."""
    norm_offset: float = 0.0
    """Added to the weight of every norm (Gemma)."""
    tie_word_embeddings: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that only this architecture's composition of blocks reads."""
    attention_kinds: tuple[int | None, ...] = (None,)
    """What the kinds of attention read, the one that reads most first: all earlier tokens (None), or the last so
    many; see `kinds_of_layers`."""
    layer_kinds: tuple[int, ...] = ()
    """The kind of each layer; empty where all layers have kind 0."""
    dtype: str = "float32"
    """The checkpoint's own dtype: float32 | float16 | bfloat16."""
    ending_token_ids: frozenset[int] = frozenset()
    """End-of-sequence ids from generation_config.json, config.json or GGUF, together."""

    @property
    def sm_scale(self) -> float:
        """What q·k is multiplied by before the softmax."""
        return float(self.head_dim**-0.5) if self.attention_multiplier is None else self.attention_multiplier

    @property
    def total_gate_size(self) -> int:
        """The outputs of all gates of all layers."""
        return sum(self.gate_sizes) if self.gate_sizes else self.num_layers * self.intermediate_size

    def rope_of(self, layer: int) -> RopeConfig | None:
        """What a layer rotates by; None where it rotates nothing."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    def held_by_ranks(self, num_ranks: int) -> ModelConfig:
        """With the KV heads of all ranks together: where there are more ranks than KV heads, each holds one."""
        return replace(self, num_kv_heads=max(self.num_kv_heads, num_ranks))

    def kv_bytes_per_token(self, kv_number_bytes: float) -> int:
        """K and V of one token over all layers, where each number takes so many bytes with its share of a scale."""
        return self.kv_bytes_of_layers(self.num_layers, kv_number_bytes)

    def kv_bytes_of_layers(self, num_layers: int, kv_number_bytes: float) -> int:
        """The same of some of the layers."""
        return round(2 * num_layers * self.num_kv_heads * self.head_dim * kv_number_bytes)

    @property
    def layers_of_kinds(self) -> tuple[int, ...]:
        """How many layers are of each attention kind."""
        if not self.layer_kinds:
            return (self.num_layers,)
        return tuple(self.layer_kinds.count(kind) for kind in range(len(self.attention_kinds)))


def kinds_of_layers(windows: Sequence[int | None]) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """The attention kinds of a model, as `ModelConfig.attention_kinds` and `layer_kinds` have them.

    windows: [layers] how many tokens each layer reads, None for all earlier ones
    """
    kinds = tuple(sorted(set(windows), key=lambda window_len: (window_len is not None, -(window_len or 0))))
    return kinds, tuple(kinds.index(window_len) for window_len in windows) if len(kinds) > 1 else ()


def window_pages_needed(window_len: int, page_size: int, max_model_len: int, max_num_new: int) -> int:
    """Pages that one sequence may hold in the pool of a window: as far as `max_num_new` new tokens reach back, with a
    page that both ends cut, one behind, and one that a run of decode steps does not give up at once."""
    reached = -(-(window_len + max_num_new - 1) // page_size) + 3
    return min(-(-max_model_len // page_size), reached)


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """What the user decided about cascade attention; the rest is the cost model's."""

    enabled: bool = True
    shared_prefix_len: int | None = None
    """None trusts the cost model. A number gives a level to every run of that many tokens with two sharers."""
    max_levels: int = 3
    """The suffix level counted: 1 is plain attention."""

    def __post_init__(self) -> None:
        if not _is_integer(self.max_levels) or not 1 <= self.max_levels <= MAX_CASCADE_LEVELS:
            raise ConfigError(
                f"cascade_max_levels is {self.max_levels!r}: it must be 1 (plain attention) to {MAX_CASCADE_LEVELS}"
            )
        if self.shared_prefix_len is not None and not _is_positive_integer(self.shared_prefix_len):
            raise ConfigError(
                f"cascade_shared_prefix_len is {self.shared_prefix_len!r}: give 1 or more tokens, "
                "or None to leave the choice to the cost model"
            )

    @property
    def max_shared_levels(self) -> int:
        """How many levels above the leaf a plan may have."""
        return self.max_levels - 1 if self.enabled else 0


def _check_batch(max_num_batched_tokens: int, max_num_seqs: int) -> None:
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({max_num_batched_tokens}) is below max_num_seqs ({max_num_seqs}): "
            "every running sequence decodes a token a step, so raise the first or lower the second"
        )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """All that the scheduler knows of model and machine."""

    page_size: int
    total_pages: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    cache_salt: bytes = b""
    """Names model and adapter in every page key, so that pages of another model never match."""
    attention_kinds: tuple[int | None, ...] = (None,)
    """The window of each attention kind, the widest first; None reads all earlier tokens."""
    layer_kinds: tuple[int, ...] = ()
    """[layers] the kind of each layer; empty: all of the first."""
    window_pages: tuple[int, ...] = ()
    """Pages of the pool that each kind after the first has of its own; empty where all kinds have their pages in one
    pool, as they must where the first has a window."""

    def __post_init__(self) -> None:
        for name in ("page_size", "total_pages", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 1 or larger")
        _check_batch(self.max_num_batched_tokens, self.max_num_seqs)
        kinds = self.attention_kinds
        if (
            not kinds
            or kinds != kinds_of_layers(kinds)[0]
            or any(window is not None and window < 1 for window in kinds)
        ):
            raise ConfigError(
                f"attention_kinds is {kinds}: it must be windows of 1 or more tokens, each shorter than the one "
                "before; the first may be None"
            )
        if any(not 0 <= kind < len(self.attention_kinds) for kind in self.layer_kinds):
            raise ConfigError(
                f"layer_kinds is {self.layer_kinds}: there are {len(self.attention_kinds)} attention kinds"
            )
        needed = -(-self.max_model_len // self.page_size)
        if self.total_pages < needed:
            raise ConfigError(
                f"the KV pool has {self.total_pages} pages of {self.page_size} tokens, one sequence of max_model_len "
                f"{self.max_model_len} needs {needed}: give more memory (kv_cache_bytes, gpu_memory_utilization) or "
                f"set max_model_len to {self.total_pages * self.page_size} or less"
            )
        if self.window_pages and (kinds[0] is not None or len(self.window_pages) != len(kinds) - 1):
            raise ConfigError(f"window_pages is {self.window_pages}: it must be one for each window of {kinds}")
        for window_len, pages in self._windows_with_pools():
            needed = window_pages_needed(window_len, self.page_size, self.max_model_len, 1)
            if not needed <= pages <= self.total_pages:
                raise ConfigError(
                    f"the KV pool of the window of {window_len} has {pages} pages, it must have {needed} to "
                    f"{self.total_pages}: give more memory (kv_cache_bytes, gpu_memory_utilization)"
                )

    @property
    def most_rows_of_sequence(self) -> int:
        """Rows that a step may have of one sequence, so that it fits all pools by itself."""
        most = self.max_num_batched_tokens
        for window_len, pages in self._windows_with_pools():
            while window_pages_needed(window_len, self.page_size, self.max_model_len, most) > pages:
                most -= 1
        return most

    def _windows_with_pools(self) -> list[tuple[int, int]]:
        pools = zip(self.attention_kinds[1:], self.window_pages, strict=False)
        return [(window_len, pages) for window_len, pages in pools if window_len is not None]

    @property
    def layers_of_kinds(self) -> tuple[int, ...]:
        """How many layers are of each attention kind."""
        if not self.layer_kinds:
            return (1, *[0] * (len(self.attention_kinds) - 1))
        return tuple(self.layer_kinds.count(kind) for kind in range(len(self.attention_kinds)))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The keywords of `LLM`, checked for name and range; `None` means "resolve it"."""

    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N"""
    num_threads: int | None = None
    """CPU threads of a step; None: torch's own number, but no more than the physical cores of affinity and cgroup."""
    attention_backend: str = "auto"
    """auto | flashinfer | native | torch"""
    page_size: int = 16
    """Tokens per page of the KV pool: the unit in which prefixes are shared."""
    max_model_len: int | None = None
    """Tokens of a sequence, prompt and output together; None takes the model's context."""
    max_num_seqs: int = 256
    """Sequences that run at once."""
    max_num_batched_tokens: int = 8192
    """Rows of a step at most; longer prompts are prefilled in chunks."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's free memory that the KV pool may take."""
    kv_cache_bytes: int | None = None
    """Size of the KV pool, over all ranks; None takes what the sequences could need, as far as the memory gives it."""
    kv_cache_dtype: str = "auto"
    """auto (as dtype; float16 where dtype=auto gives float32) | float32 | bfloat16 | float16 | fp8_e4m3 | int8 (a scale
    per token and head; CPU only)"""
    enable_prefix_caching: bool = True
    """Keep the pages of prompts for later requests that begin alike."""
    enable_cascade_attention: bool = True
    """Read shared prefixes once per step; changes speed, never meaning."""
    cascade_shared_prefix_len: int | None = None
    """None trusts the cost model; a number gives a level to every run of that many tokens with two sharers."""
    cascade_max_levels: int = 3
    """The suffix level counted: 1 is plain attention."""
    quantization: str | None = None
    """None (as the checkpoint has them) | q4_k | q8_0 | int8 | int4 | fp8: what plain matrices are rounded to as they
    are loaded; on a GPU q4_k, int4 and fp8"""
    exact_activations: bool = False
    """Leave the inputs of products with quantized matrices as they are, instead of rounding them to 8 bits: slower."""
    tensor_parallel_size: int = 1
    """Ranks that share the model's matrices and heads: a GPU each, or a process with its share of the cores."""
    rank_timeout_s: float = 60.0
    """How long a rank in a process of its own may be silent, or hold up a step, before the engine ends."""
    distributed_executor_backend: str = "uni"
    """uni: steps run in this process | mp: in a spawned process of their own, as several ranks always do"""
    enforce_eager: bool = False
    """Never capture CUDA graphs; on the CPU, never replay a recorded step."""
    schedule_lag: int | None = None
    """Steps that are planned ahead of the last known result: None is 1 on CUDA, 0 on the CPU."""
    seed: int = 0
    """Of the draws of requests that have no seed, and of dummy weights."""
    revision: str | None = None
    """A branch, tag or commit of a hub's model; None is its main branch."""
    load_format: str = "auto"
    """auto | dummy (random weights from the configuration alone)"""
    debug: bool = False
    """Check every plan, and name the first layer whose output is not finite; slow."""
    record_plans: str | None = None
    """A file to write the step plans to, see `plan_file`; one that is there is replaced."""
    record_token_ids: bool = False
    """Write token ids, sampled tokens and stop strings to it as well, so that the engine can be replayed."""

    def __new__(cls, **kwargs: Any) -> EngineOptions:
        """Refuse unknown names, naming the nearest known one."""
        known = {f.name for f in fields(cls)}
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}: {nearest_name_hint(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._choice("dtype", ("auto", "float32", "bfloat16", "float16"))
        self._choice("attention_backend", ("auto", "flashinfer", "native", "torch"))
        self._choice("kv_cache_dtype", ("auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"))
        self._choice("quantization", (None, "q4_k", "q8_0", "int8", "int4", "fp8"))
        self._choice("load_format", ("auto", "dummy"))
        self._choice("distributed_executor_backend", ("uni", "mp"))
        for name, most in LIMITS.items():
            if getattr(self, name) is not None or name not in RESOLVED:
                self._positive(name, most)
        _check_batch(self.max_num_batched_tokens, self.max_num_seqs)
        for name in (
            "enable_prefix_caching",
            "enable_cascade_attention",
            "enforce_eager",
            "exact_activations",
            "debug",
            "record_token_ids",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device is {self.device!r}: it must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        revision: object = self.revision
        if revision is not None and not isinstance(revision, str):
            raise ConfigError(f"revision is {revision!r}: it must be a branch, tag or commit of a hub's model, or None")
        share = self.gpu_memory_utilization
        if not _is_number(share) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share!r}: it must be a number in (0, 1]")
        if not _is_integer(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed!r}: it must be an integer in [-2**63, 2**63)")
        if not _is_number(self.rank_timeout_s) or not self.rank_timeout_s > 0:
            raise ConfigError(f"rank_timeout_s is {self.rank_timeout_s!r}: it must be a number of seconds above 0")
        if self.schedule_lag is not None and not (_is_integer(self.schedule_lag) and 0 <= self.schedule_lag <= 1):
            raise ConfigError(f"schedule_lag is {self.schedule_lag!r}: it must be 0, 1 or None")
        CascadeConfig(shared_prefix_len=self.cascade_shared_prefix_len, max_levels=self.cascade_max_levels)
        self._check_recording()

    def _check_recording(self) -> None:
        path: object = self.record_plans
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
            object.__setattr__(self, "record_plans", path)
        if path is not None and (not isinstance(path, str) or not path):
            raise ConfigError(f"record_plans is {path!r}: it must be a file name, or None")
        if self.record_token_ids and path is None:
            raise ConfigError("record_token_ids is True: it needs record_plans, the file to write them to")

    @property
    def cascade(self) -> CascadeConfig:
        """The cascade part, as the scheduler takes it."""
        return CascadeConfig(
            enabled=self.enable_cascade_attention,
            shared_prefix_len=self.cascade_shared_prefix_len,
            max_levels=self.cascade_max_levels,
        )

    def given(self) -> Mapping[str, Any]:
        """The options that differ from their defaults, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def _choice(self, name: str, allowed: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}")

    def _positive(self, name: str, most: int) -> None:
        value = getattr(self, name)
        if not _is_positive_integer(value) or value > most:
            wanted = "1 or larger" if isinstance(value, int) and value < 1 else f"1 to {most:,}"
            raise ConfigError(f"{name} is {short_repr(value)}: it must be an integer, {wanted}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
