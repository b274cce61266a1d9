"""What the API process and the engine process say to each other, as MessagePack over a local socket.

The API process sends `Command`s, the engine process sends `Report`s. Each is a message of its own; those of one
direction arrive in the order in which they were sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import msgspec

from cascade_llm.engine.output_queue import RequestGain
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Client
from cascade_llm.scheduler.sessions import SessionUse

if TYPE_CHECKING:  # imports torch
    from cascade_llm.llm import LLM

__all__ = [
    "Abort",
    "Answered",
    "Ask",
    "Close",
    "Command",
    "EngineFacts",
    "Failed",
    "Gains",
    "Ready",
    "Report",
    "Submit",
    "decode_command",
    "decode_report",
    "encode",
    "given_params",
]

DEFAULTS = SamplingParams()


class Submit(msgspec.Struct, tag=True, array_like=True):
    """Run this request."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    """The fields of `SamplingParams` that differ from their defaults."""
    seed: int
    priority: int
    only_whole: bool
    """Report nothing before its end."""
    session: SessionUse | None = None
    client: Client = Client()
    cache_salt: bytes = b""


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Nobody wants these any more."""

    request_ids: list[str]


class Ask(msgspec.Struct, tag=True, array_like=True):
    """Answer with `Answered` of the same number."""

    number: int
    what: str
    """health | stats | sessions | drop_session | sharing | sharing_with_tokens"""
    tenant: str | None = None
    """Whose sessions and steps; None is all."""
    session_id: str = ""
    """Which one to drop."""


class Close(msgspec.Struct, tag=True, array_like=True):
    """End the process."""


class EngineFacts(msgspec.Struct):
    """What the API process has to know of the engine."""

    model_name: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    ending_token_ids: list[int]
    seed: int
    has_prefix_cache: bool = True

    @classmethod
    def of(cls, llm: LLM) -> EngineFacts:
        """Those of an engine that is loaded."""
        own = llm.tokenizer.eos_token_ids if llm.tokenizer else frozenset()
        return cls(
            model_name=llm.model_name,
            vocab_size=llm.facts.model.vocab_size,
            max_model_len=llm.facts.max_model_len,
            max_num_seqs=llm.options.max_num_seqs,
            ending_token_ids=sorted(llm.facts.model.ending_token_ids | own),
            seed=llm.options.seed,
            has_prefix_cache=llm.options.enable_prefix_caching,
        )


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The model is loaded."""

    facts: EngineFacts


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The model cannot be loaded, or the loop has failed; the process ends."""

    reason: str


class Gains(msgspec.Struct, tag=True, array_like=True):
    """What requests gained."""

    gains: list[RequestGain]


class Answered(msgspec.Struct, tag=True, array_like=True):
    """The answer to an `Ask`."""

    number: int
    value: dict[str, Any]


Command = Submit | Abort | Ask | Close
Report = Ready | Failed | Gains | Answered

_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    """The message that the API process sent."""
    command: Command = _commands.decode(data)
    return command


def decode_report(data: bytes) -> Report:
    """The message that the engine process sent."""
    return _reports.decode(data)


def given_params(params: SamplingParams) -> Mapping[str, Any]:
    """The fields that differ from their defaults; `SamplingParams(**given)` is equal."""
    values = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: value for name, value in values.items() if value != getattr(DEFAULTS, name)}
