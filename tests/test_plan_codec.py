"""Plans and results as bytes: what comes out is what went in, and anything else is refused by name."""

from __future__ import annotations

import contextlib
import gc
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm import plan_codec
from cascade_llm.errors import PlanError
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import (
    EMPTY,
    CascadeLevel,
    CascadePlan,
    LaneStart,
    PageCopy,
    StepPlan,
    StepResult,
    Tier,
    int_column,
)
from cascade_llm.plan_codec import LEVEL_COLUMNS, STEP_COLUMNS, PlanDecoder, PlanEncoder, decode_result, encode_result
from cascade_llm.sampling_params import SamplingParams
from tests.plan_cases import DRAWN, level_of, sequence_lists, step_of
from tests.scheduler.generated import generated_steps, random_config

WORDS = int_column([5, -(2**31)])
LANE_START = LaneStart(
    lane=3,
    epoch=2**40,
    params=SamplingParams(temperature=0.1, logit_bias={7: -1.5}, stop=["end", "\u00e4\n"], stop_token_ids=[4], seed=-9),
    seed=-(2**63),
    sample_index=2,
    prompt_token_ids=[1, 2, 3],
    output_token_ids=[],
    ending_token_ids=frozenset({0, 4}),
)


def full_step() -> StepPlan:
    """A plan in which no field is empty."""
    step = step_of((replace(DRAWN[2], num_new=3),), 4)
    windowed = CascadePlan((level_of([(3, (5, 6), 3)]),), 4, window_len=9)
    return replace(
        step,
        cascades=(step.cascade, windowed),
        layer_kinds=(0, 1, 1),
        window_slots=(step.slots,),
        sample_rows=int_column([0, 1, 2]),
        sample_lanes=int_column([10, 10, 10]),
        sample_positions=int_column([5, 6, 7]),
        lane_rows=int_column([0]),
        sample_mask_rows=int_column([0, -1, 0]),
        token_bitmasks=(WORDS,),
        draft_samples=int_column([0]),
        draft_lens=int_column([2]),
        prompt_logprob_rows=int_column([1]),
        prompt_logprob_token_ids=int_column([4]),
        prompt_logprob_counts=int_column([2]),
        lane_starts=(LANE_START,),
        page_copies=(PageCopy(1, 2), PageCopy(2**40, 9, Tier.REMOTE, Tier.HOST), PageCopy(3, 2, pool=1)),
        report=replace(step.report, num_levels=2, reason="none"),
    )


def levels(plan: StepPlan) -> list[CascadeLevel]:
    return [level for cascade in plan.cascades for level in cascade.levels]


def plain(plan: StepPlan) -> dict[str, Any]:
    """All that a plan says, as values that compare."""
    values: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(StepPlan)}
    values.update({name: values[name].tolist() for name in STEP_COLUMNS})
    values["cascades"] = [
        (c.page_size, c.window_len, [[getattr(level, n).tolist() for n in LEVEL_COLUMNS] for level in c.levels])
        for c in plan.cascades
    ]
    values["window_slots"] = [slots.tolist() for slots in plan.window_slots]
    values["token_bitmasks"] = [words.tolist() for words in plan.token_bitmasks]
    values["lane_starts"] = [
        replace(s, prompt_token_ids=list(s.prompt_token_ids), output_token_ids=list(s.output_token_ids))
        for s in plan.lane_starts
    ]
    return values


def kept_objects(plans: list[StepPlan]) -> list[set[tuple[int, int, str]]]:
    """Which levels and columns of each step are objects of the step before."""
    kept = []
    for earlier, later in pairwise(plans):
        pairs = [(i, j, a, b) for i, a in enumerate(levels(earlier)) for j, b in enumerate(levels(later))]
        whole = {(i, j, "level") for i, j, a, b in pairs if a is b}
        columns = {(i, j, n) for i, j, a, b in pairs for n in LEVEL_COLUMNS if getattr(a, n) is getattr(b, n)}
        steps = {(0, 0, n) for n in STEP_COLUMNS if getattr(earlier, n) is getattr(later, n)}
        kept.append(whole | columns | steps)
    return kept


def signed(message: bytes, change: Callable[[bytearray], Any]) -> bytes:
    """A message with another body, and the checksum of that."""
    body = bytearray(message[plan_codec.MESSAGE.size :])
    change(body)
    magic, version, kind, zero, number, _, _ = plan_codec.MESSAGE.unpack_from(message)
    return plan_codec.MESSAGE.pack(magic, version, kind, zero, number, zlib.crc32(body), len(body)) + body


# round trips


def test_every_field_comes_back() -> None:
    step = full_step()
    step.check()
    empty = [field.name for field in fields(StepPlan) if not getattr(step, field.name)]
    assert not empty
    found = PlanDecoder().decode(PlanEncoder().encode(step))
    found.check()
    assert plain(found) == plain(step)
    assert found.page_copies[1].source_tier is Tier.REMOTE


@given(data=st.data(), page_size=st.sampled_from([1, 4, 16]))
def test_generated_plans_come_back(data: st.DataObject, page_size: int) -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    for _ in range(2):
        step = step_of(data.draw(sequence_lists(page_size)), page_size)
        assert plain(decoder.decode(encoder.encode(step))) == plain(step)


@pytest.mark.parametrize("kinds", [(None,), (9,), (None, 12)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_scheduled_plans_come_back_with_what_was_kept(seed: int, kinds: tuple[int | None, ...]) -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    config = replace(random_config(random.Random(seed)), attention_kinds=kinds)
    plans = [plan for plan, _ in generated_steps(seed, 25, config=config)]
    found = [decoder.decode(encoder.encode(plan)) for plan in plans]
    assert [plain(plan) for plan in found] == [plain(plan) for plan in plans]
    assert kept_objects(found) == kept_objects(plans)


TOKEN_LOGPROBS = st.builds(
    TokenLogprob,
    st.integers(0, 2**31 - 1),
    st.floats(allow_nan=False),
    st.integers(1, 2**31),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(allow_nan=False))).map(tuple),
)
RESULTS = st.builds(
    StepResult,
    step_id=st.integers(0, 2**62),
    token_ids=st.lists(st.integers(0, 2**31 - 1)),
    accepted_counts=st.lists(st.integers(0, 9)),
    logprobs=st.lists(st.none() | TOKEN_LOGPROBS),
    prompt_logprobs=st.lists(TOKEN_LOGPROBS),
    failed_samples=st.frozensets(st.integers(0, 99)),
    failure_detail=st.none() | st.text(st.characters(exclude_categories=("Cs",))),
)


@given(result=RESULTS)
def test_results_come_back(result: StepResult) -> None:
    message = encode_result(result)
    assert plan_codec.is_result(message)
    assert decode_result(message) == result


# identity


def test_an_unchanged_level_is_sent_once_and_is_the_same_object() -> None:
    big = replace(step_of(DRAWN, 4), step_id=1)
    encoder, decoder = PlanEncoder(), PlanDecoder()
    first, second = encoder.encode(big), encoder.encode(replace(big, step_id=2))
    assert len(second) < len(first) / 2
    found = [decoder.decode(first), decoder.decode(second)]
    assert found[0].cascade.levels == found[1].cascade.levels
    assert found[0].slots is found[1].slots
    assert found[0].prompt_logprob_rows is EMPTY


def test_an_object_that_comes_again_later_is_the_same_object() -> None:
    first, other = step_of(DRAWN, 4), step_of(DRAWN, 4)
    encoder, decoder = PlanEncoder(), PlanDecoder()
    found = [decoder.decode(encoder.encode(plan)) for plan in (first, other, first)]
    assert found[2].cascade.levels == found[0].cascade.levels
    assert found[1].cascade.levels[0] is not found[0].cascade.levels[0]


def test_the_map_from_layers_to_kinds_is_sent_once() -> None:
    step, encoder, decoder = full_step(), PlanEncoder(), PlanDecoder()
    found = [decoder.decode(encoder.encode(step)) for _ in range(2)]
    assert found[0].layer_kinds is found[1].layer_kinds
    assert decoder.decode(encoder.encode(replace(step, layer_kinds=()))).layer_kinds == ()


def test_what_has_died_is_forgotten_at_both_ends() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    sizes = []
    for i in range(40):
        decoder.decode(encoder.encode(replace(step_of(DRAWN, 4), step_id=i)))
        gc.collect(generation=1)  # what this step left; all of a test process would take long
        sizes.append((len(encoder._numbers), len(decoder._kept)))
    assert max(sizes[10:]) <= max(sizes[:10])


def test_what_was_not_used_for_long_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_codec, "MAX_KEPT", 30)
    encoder, decoder = PlanEncoder(), PlanDecoder()
    plans = [step_of(DRAWN, 4) for _ in range(20)]
    for plan in [*plans, *plans]:
        assert plain(decoder.decode(encoder.encode(plan))) == plain(plan)
        assert len(encoder._numbers) <= 30
        assert len(decoder._kept) <= 60


def test_a_decoder_bounds_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    message = PlanEncoder().encode(full_step())
    monkeypatch.setattr(plan_codec, "MAX_KEPT", 5)
    with pytest.raises(PlanError, match="more levels and columns than can be kept"):
        PlanDecoder().decode(message)


# refusals


@pytest.mark.parametrize("message", [b"", b"CLLM", b"\x80\x04K\x01.", b"{}" * 50, encode_result(StepResult(step_id=0))])
def test_foreign_bytes(message: bytes) -> None:
    with pytest.raises(PlanError, match=r"no message of a plan|of kind 2, not 1"):
        PlanDecoder().decode(message)


def test_another_version() -> None:
    message = bytearray(PlanEncoder().encode(full_step()))
    message[4] = 9
    with pytest.raises(PlanError, match="of version 9, this decoder reads version 2"):
        PlanDecoder().decode(bytes(message))


def test_a_lost_or_repeated_message() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    messages = [encoder.encode(full_step()) for _ in range(3)]
    decoder.decode(messages[0])
    for wrong in (messages[0], messages[2]):
        with pytest.raises(PlanError, match=r"message \d where 2 was to come"):
            decoder.decode(wrong)
    decoder.decode(messages[1])


def test_a_message_cut_off_anywhere() -> None:
    for message, decode in (
        (PlanEncoder().encode(full_step()), PlanDecoder().decode),
        (encode_result(StepResult(step_id=1, token_ids=[1, 2], failure_detail="layer 3")), decode_result),
    ):
        for size in range(len(message)):
            with pytest.raises(PlanError, match=r"no message|bytes of"):
                decode(message[:size])
            if size >= plan_codec.MESSAGE.size:  # the length says so too
                with pytest.raises(PlanError):
                    decode(signed(message, lambda body, n=size: body.__delitem__(slice(n - 24, None))))


def test_a_flipped_bit_anywhere() -> None:
    """The checksum finds it; where it is made to fit, what comes out is a plan or an error by name."""
    message, rng = PlanEncoder().encode(full_step()), random.Random(0)
    for _ in range(2000):
        bit = rng.randrange(8 * len(message))
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PlanError):
            PlanDecoder().decode(bytes(damaged))
        place = rng.randrange(len(message) - plan_codec.MESSAGE.size)
        try:
            found = PlanDecoder().decode(
                signed(message, lambda body, n=place: body.__setitem__(n, body[n] ^ 1 << n % 8))
            )
        except PlanError:
            continue
        assert isinstance(found, StepPlan)


@given(body=st.binary(max_size=200))
def test_any_body_is_a_plan_or_an_error(body: bytes) -> None:
    for message, decode in (
        (PlanEncoder().encode(full_step()), PlanDecoder().decode),
        (encode_result(StepResult(step_id=1)), decode_result),
    ):
        with contextlib.suppress(PlanError):
            decode(signed(message, lambda old: old.__setitem__(slice(None), body)))


def test_a_size_is_not_believed() -> None:
    """A column that claims 2**32 - 1 entries is refused before memory is taken for it."""
    step_id, forgotten = struct.pack("<q", 0), struct.pack("<I", 2**32 - 1)
    with pytest.raises(PlanError, match=r"forgotten numbers takes 34359738360 bytes, 4 are left"):
        PlanDecoder().decode(
            signed(
                PlanEncoder().encode(full_step()), lambda b: b.__setitem__(slice(None), step_id + forgotten + b"1234")
            )
        )


def test_a_refused_message_changes_nothing() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    message = encoder.encode(full_step())
    with pytest.raises(PlanError, match="1 bytes too many"):
        decoder.decode(signed(message, lambda body: body.append(0)))
    assert plain(decoder.decode(message)) == plain(full_step())


def edited_params(old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    return signed(PlanEncoder().encode(full_step()), lambda body: body.__setitem__(slice(None), body.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"temperature":0.1', b'"temperature": -1', "sampling parameters of a lane: temperature"),
        (b'"temperature":0.1', b'"temperatude":0.1', "unknown sampling parameter 'temperatude'"),
        (b'"temperature":0.1', b'"temperature":0.x', "cannot be read"),
        (b'"logit_bias":[[7,-1.5]]', b'"logit_bias":[[[7]]]   ', "cannot be read"),
    ],
)
def test_wrong_sampling_parameters(old: bytes, new: bytes, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        PlanDecoder().decode(edited_params(old, new))


def test_the_codec_needs_the_standard_library_alone() -> None:
    code = "import sys, cascade_llm.plan_codec; assert not {'torch', 'numpy', 'pickle', 'xxhash'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
