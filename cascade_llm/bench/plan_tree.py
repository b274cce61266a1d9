"""The tree of shared prefixes of a set of prompts, and the cascade plan of their decode step, without the model.

The scheduler itself is driven: it prefills all prompts and plans one decode step.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.select import select_backend
from cascade_llm.config import CascadeConfig, EngineOptions, ModelConfig, SchedulerConfig
from cascade_llm.device.devices import resolve_device, resolve_dtype, resolve_page_dtype
from cascade_llm.engine.cost_setup import attention_shape, choose_cost_model
from cascade_llm.engine.input_processor import InputProcessor, Prompt
from cascade_llm.engine.tokenizer import Tokenizer, load_tokenizer
from cascade_llm.errors import ConfigError, PromptError, RequestError, nearest_name_hint
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.plan import CascadePlan, CascadeReport, StepPlan, StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.cost_model import CostModel, plan_work
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from cascade_llm.scheduler.cascade.tree import PlannedRows, Run, attach_nodes, shared_forest
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sequence import Sequence as TokenSequence

__all__ = ["DecodeStep", "PrefixNode", "PrefixTree", "decode_step", "plan_prompts", "plan_tree"]

Messages = Sequence[Mapping[str, Any]]

MADE_UP_TOKEN = 0
TEXT_TOKENS, TEXT_LEN = 48, 60
"""How much of a run is shown: decoded tokens, and characters of these."""


@dataclass(frozen=True)
class PrefixNode:
    """A run of tokens that at least two prompts share; the root is empty and stands for all prompts."""

    start_len: int
    """Tokens before the run."""
    end_len: int
    num_sequences: int
    level: int | None
    """The level that reads it once for all, from 0; None where it is folded into what is below."""
    segment_len: int
    """Tokens of its segment: the run and what was folded into it from above; 0 without a level."""
    text: str
    """How the run begins."""
    prompts: tuple[int, ...]
    """Prompts that share nothing beyond this run."""
    children: tuple[PrefixNode, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the run."""
        return self.end_len - self.start_len

    @property
    def kv_tokens_saved(self) -> int:
        """Tokens of K/V that its segment does not read again, per decode step."""
        return self.segment_len * (self.num_sequences - 1)

    def walk(self) -> Iterator[PrefixNode]:
        """This node and all below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class PrefixTree:
    """What the prompts share, and what one decode step over all of them makes of it."""

    root: PrefixNode
    prompt_lens: tuple[int, ...]
    report: CascadeReport
    page_size: int
    kv_bytes_per_token: int
    costs: str
    """The cost model that decided: where its constants come from."""
    attention_s: float
    """Predicted, of one decode step over all layers."""
    attention_one_level_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON; K/V in bytes over all layers."""
        return {
            "num_sequences": len(self.prompt_lens),
            "prompt_lens": list(self.prompt_lens),
            "page_size": self.page_size,
            "costs": self.costs,
            "predicted_attention_s": self.attention_s,
            "predicted_attention_one_level_s": self.attention_one_level_s,
            "num_levels": self.report.num_levels,
            "num_groups": self.report.num_groups,
            "kv_bytes_read": self.report.kv_tokens_read * self.kv_bytes_per_token,
            "kv_bytes_one_level": self.report.kv_tokens_one_level * self.kv_bytes_per_token,
            "kv_bytes_saved": self.report.kv_tokens_saved * self.kv_bytes_per_token,
            "reason": self.report.reason,
            "tree": self._node_dict(self.root),
        }

    def _node_dict(self, node: PrefixNode) -> dict[str, Any]:
        return {
            "start_len": node.start_len,
            "num_tokens": node.num_tokens,
            "num_sequences": node.num_sequences,
            "level": node.level,
            "segment_len": node.segment_len,
            "kv_bytes_saved": node.kv_tokens_saved * self.kv_bytes_per_token,
            "text": node.text,
            "prompts": list(node.prompts),
            "children": [self._node_dict(child) for child in node.children],
        }


def plan_prompts(
    model: str, prompts: Sequence[Prompt | Messages], options: EngineOptions, *, costs: str | None = None
) -> PrefixTree:
    """The tree and plan of texts, token ids and conversations for a model, whose weights are not read.

    Raises:
        PromptError: names every prompt that the model cannot serve
        ModelError: the model's configuration or tokenizer cannot be read
    """
    checkpoint = open_checkpoint(model, load_format=options.load_format, revision=options.revision)
    config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    processor = InputProcessor(
        tokenizer,
        vocab_size=config.vocab_size,
        max_model_len=_max_model_len(config, options),
        ending_token_ids=config.ending_token_ids,
        seed=options.seed,
    )
    token_ids, stored_type = _read_all(processor, prompts), checkpoint.main_type
    return plan_tree(token_ids, config, options, tokenizer=tokenizer, costs=costs, stored_type=stored_type)


def plan_tree(
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    options: EngineOptions,
    *,
    tokenizer: Tokenizer | None = None,
    costs: str | None = None,
    stored_type: str | None = None,
) -> PrefixTree:
    """The tree and plan of prompts that fit the context, given as token ids.

    Args:
        tokenizer: for how runs begin; without it no text is shown
        costs: the device whose cost model decides; default the model that an engine with `options` plans with here
        stored_type: `Checkpoint.main_type`

    Raises `ConfigError` for a device that has no cost model.
    """
    spec = _attention_spec(config, options, stored_type)
    cost_model, source = _cost_model(spec, options, costs)
    decode_of = partial(
        decode_step,
        prompts,
        cost_model,
        page_size=options.page_size,
        max_model_len=_max_model_len(config, options),
        attention_kinds=config.attention_kinds,
        layer_kinds=config.layer_kinds,
    )
    scheduler, decode, _ = decode_of(cascade=options.cascade)
    plain = decode_of(cascade=CascadeConfig(enabled=False)).plan
    by_lane = {sequence.lane: sequence for sequence in scheduler.sequences()}
    ordered = [by_lane[lane] for lane in decode.sequence_lanes]
    return PrefixTree(
        root=_Reader(decode.cascade, ordered, tokenizer).node(_forest(ordered, options.page_size)),
        prompt_lens=tuple(map(len, prompts)),
        report=decode.report,
        page_size=options.page_size,
        kv_bytes_per_token=config.kv_bytes_per_token(spec.kv_number_bytes),
        costs=source,
        attention_s=_attention_s(decode, config, cost_model),
        attention_one_level_s=_attention_s(plain, config, cost_model),
    )


def _attention_s(plan: StepPlan, config: ModelConfig, costs: CostModel) -> float:
    """Of all layers, each by the plan of its attention kind."""
    kinds = [costs.plan_s(plan_work(cascade)) for cascade in plan.cascades]
    return sum([kinds[kind] for kind in plan.layer_kinds or [0] * config.num_layers])


def _attention_spec(config: ModelConfig, options: EngineOptions, stored_type: str | None) -> AttentionSpec:
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, config.dtype, device)
    pages = resolve_page_dtype(options, dtype, device, stored_type)
    return AttentionSpec.for_model(config, dtype, device, pages.dtype)


def _cost_model(spec: AttentionSpec, options: EngineOptions, device: str | None) -> tuple[CostModel, str]:
    """The named device's, or the engine's own choice on this machine; and where its constants come from."""
    if device is None:
        backend = select_backend(options.attention_backend, spec).name
        return choose_cost_model(spec, backend, num_threads=options.num_threads)
    if device not in DEVICE_COSTS:
        raise ConfigError(f"no cost model for the device {device!r}: {nearest_name_hint(device, DEVICE_COSTS)}")
    return CostModel(attention_shape(spec), DEVICE_COSTS[device]), f"table entry {device!r}, as asked"


def _max_model_len(config: ModelConfig, options: EngineOptions) -> int:
    return min(options.max_model_len or config.max_position_embeddings, config.max_position_embeddings)


def _read_all(processor: InputProcessor, prompts: Sequence[Prompt | Messages]) -> list[list[int]]:
    """Token ids of all prompts, or one error that names every bad one."""
    read: list[list[int]] = []
    bad: list[str] = []
    params = SamplingParams()
    for index, prompt in enumerate(prompts):
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        try:
            if is_chat:
                read.append(processor.read_chat(cast(Messages, prompt), {}, params).token_ids)
            else:
                read.append(processor.read_prompt(cast(Prompt, prompt), params).token_ids)
        except RequestError as error:
            bad.append(f"prompt {index}: {error}")
    if bad:
        raise PromptError(f"{len(bad)} of {len(prompts)} prompts cannot be served: {'; '.join(bad)}")
    if not read:
        raise PromptError("there is no prompt to plan: give at least one")
    return read


class DecodeStep(NamedTuple):
    """A decode step over all prompts."""

    scheduler: FlashInferScheduler
    plan: StepPlan
    planning_s: float
    """What the scheduler took for it."""


def decode_step(
    prompts: Sequence[Sequence[int]],
    costs: CostModel,
    cascade: CascadeConfig,
    *,
    page_size: int,
    max_model_len: int,
    attention_kinds: Sequence[int | None] = (None,),
    layer_kinds: Sequence[int] = (),
) -> DecodeStep:
    """Prefill all prompts in one step and plan the next: what is asked is what they share, not how many fit.

    Tokens that a model would have drawn are made up, since a plan depends on lengths and prompts alone.

    Args:
        prompts: as token ids
        costs: what segments cost
        cascade: what the user decided
        page_size: tokens per page
        max_model_len: tokens of the longest sequence
        attention_kinds, layer_kinds: of the model
    """
    num_pages = sum(len(prompt) // page_size + 2 for prompt in prompts) + len(prompts)
    config = SchedulerConfig(
        page_size=page_size,
        total_pages=max(num_pages, -(-max_model_len // page_size)),
        max_model_len=max_model_len,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=sum(map(len, prompts)),
        cascade=cascade,
        attention_kinds=tuple(attention_kinds),
        layer_kinds=tuple(layer_kinds),
    )
    scheduler = FlashInferScheduler(config, costs)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for index, token_ids in enumerate(prompts):
        scheduler.add(Request(request_id=str(index), prompt_token_ids=token_ids, params=params, seed=0))
    prefill = scheduler.schedule()
    assert prefill is not None
    tokens = [MADE_UP_TOKEN] * len(prefill.sample_rows)
    scheduler.commit(prefill, StepResult(step_id=prefill.step_id, token_ids=tokens))
    start_s = time.perf_counter()
    decode = scheduler.schedule()
    planning_s = time.perf_counter() - start_s
    assert decode is not None
    assert decode.num_rows == decode.num_sequences == scheduler.num_running
    return DecodeStep(scheduler, decode, planning_s)


def _forest(sequences: list[TokenSequence], page_size: int) -> Run:
    """The shared runs as the planner saw them; `sequences` in the order of the plan's rows, one row each."""
    rows = [PlannedRows(sequence, sequence.planned_len - 1, 1) for sequence in sequences]
    nodes = attach_nodes(rows, page_size)
    root = nodes[0]
    while root.parent is not None:
        root = root.parent
    return shared_forest(nodes, [1] * len(rows), root)


class _Reader:
    """Reads off a decode step's plan what became of each shared run. Row i belongs to `sequences[i]`."""

    def __init__(self, cascade: CascadePlan, sequences: list[TokenSequence], tokenizer: Tokenizer | None) -> None:
        self._cascade, self._sequences, self._tokenizer = cascade, sequences, tokenizer

    def node(self, run: Run) -> PrefixNode:
        """A run and all below it."""
        size, rows = self._cascade.page_size, sorted(_rows(run))
        level, segment_len = self._segment(run, rows)
        token_ids = self._sequences[rows[0]].token_ids[run.start * size : run.end * size]
        return PrefixNode(
            start_len=run.start * size,
            end_len=run.end * size,
            num_sequences=len(rows),
            level=level,
            segment_len=segment_len,
            text=self._text(token_ids[:TEXT_TOKENS]),
            prompts=tuple(sorted(int(self._sequences[row].request.request_id) for row in run.members)),
            children=tuple(self.node(child) for child in run.children),
        )

    def _segment(self, run: Run, rows: list[int]) -> tuple[int | None, int]:
        """The level whose segment joins just these rows with the run's last page, and that segment's tokens."""
        if run.end == 0:
            return None, 0
        last_page = self._sequences[rows[0]].pages[run.end - 1]
        for depth, level in enumerate(self._cascade.shared_levels):
            segment = bisect_right(level.qo_indptr, rows[0]) - 1
            if list(level.rows(segment)) == rows and last_page in level.pages(segment):
                return depth, level.kv_len(segment, self._cascade.page_size)
        return None, 0

    def _text(self, token_ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        return " ".join(self._tokenizer.decode(token_ids, skip_special_tokens=False).split())[:TEXT_LEN]


def _rows(run: Run) -> Iterator[int]:
    yield from run.members
    for child in run.children:
        yield from _rows(child)
