"""What is measured: kinds of traffic, each a small record that makes the same requests for the same seed.

Prompts are token ids at random unless a workload says otherwise: what a step costs depends on lengths and on what is
shared, not on what the tokens mean.
"""

from __future__ import annotations

import functools
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cascade_llm.bench.load import Load, LoadRequest
from cascade_llm.errors import ConfigError, PromptError

__all__ = [
    "WORKLOADS",
    "ChatWorkload",
    "DocumentsWorkload",
    "FileWorkload",
    "ForestWorkload",
    "PromptEncoder",
    "RandomTokens",
    "RandomWorkload",
    "RolloutWorkload",
    "SharedPrefixWorkload",
    "Vocabulary",
    "Workload",
]


class PromptEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens."""

    size: int
    load_tokenizer: Callable[[], PromptEncoder | None] = lambda: None

    def encoder(self, purpose: str) -> PromptEncoder:
        """The tokenizer; `ConfigError` where the model has none."""
        tokenizer = self.load_tokenizer()
        if tokenizer is None:
            raise ConfigError(f"{purpose} needs a tokenizer and the model has none: use another workload or model")
        return tokenizer


class Workload(ABC):
    """A kind of traffic; its fields are options of the command line, their docstrings the help."""

    name: ClassVar[str]
    temperature: ClassVar[float] = 0.0
    """Of a run that does not say another: 0 is greedy."""

    def load(self, vocabulary: Vocabulary, *, temperature: float | None = None, top_p: float = 1.0) -> Load:
        """The requests; raises `ConfigError` for sizes out of range."""
        self._check()
        chosen = self.temperature if temperature is None else temperature
        return Load(self.name, tuple(self._requests(vocabulary)), chosen, top_p)

    @abstractmethod
    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]: ...

    def _check(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every workload is a dataclass
            value = getattr(self, field.name)
            least = 0 if field.name in ("seed", "prefix_len", "system_len") else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{field.name} is {value}: it must be {least} or larger")


@dataclass(frozen=True, kw_only=True)
class RandomWorkload(Workload):
    """nano-vLLM's benchmark: nothing is shared, lengths are uniform; with the defaults its very tokens."""

    name: ClassVar[str] = "random"
    temperature: ClassVar[float] = 0.6

    num_requests: int = 256
    """Requests, all there at once."""
    min_len: int = 100
    """Tokens of the shortest prompt, and of the shortest output."""
    max_len: int = 1024
    """Tokens of the longest prompt, and of the longest output."""
    seed: int = 0
    """Of lengths and token ids."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        if self.min_len > self.max_len:
            raise ConfigError(f"min_len {self.min_len} exceeds max_len {self.max_len}: lower it")
        rng = random.Random(self.seed)
        top = min(10_000, vocabulary.size - 1)
        prompts = [
            [rng.randint(0, top) for _ in range(rng.randint(self.min_len, self.max_len))]
            for _ in range(self.num_requests)
        ]
        return [LoadRequest(prompt, rng.randint(self.min_len, self.max_len)) for prompt in prompts]


@dataclass(frozen=True, kw_only=True)
class SharedPrefixWorkload(Workload):
    """One system prompt for every request; with prefix_len 0 nothing is shared."""

    name: ClassVar[str] = "shared-prefix"

    prefix_len: int = 2048
    """Tokens that all requests share."""
    num_requests: int = 32
    """Requests, all there at once."""
    suffix_len: int = 32
    """Own prompt tokens of each request."""
    output_len: int = 64
    """Generated tokens of each request."""
    seed: int = 0
    """Of the token ids."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        tokens = RandomTokens(vocabulary, self.seed)
        prefix = tokens.draw(self.prefix_len)
        return [LoadRequest(prefix + tokens.draw(self.suffix_len), self.output_len) for _ in range(self.num_requests)]


@dataclass(frozen=True, kw_only=True)
class ForestWorkload(Workload):
    """Groups of prompts, each group behind a prefix of its own, mixed in random order; SGLang's sizes by default."""

    name: ClassVar[str] = "forest"

    groups: int = 64
    """Prefixes."""
    prompts_per_group: int = 16
    """Prompts behind each prefix."""
    prefix_len: int = 2048
    """Tokens of each prefix."""
    suffix_len: int = 128
    """Own prompt tokens of each prompt."""
    output_len: int = 256
    """Generated tokens of each prompt."""
    seed: int = 0
    """Of token ids and order."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        tokens = RandomTokens(vocabulary, self.seed)
        prefixes = [tokens.draw(self.prefix_len) for _ in range(self.groups)]
        requests = [
            LoadRequest(prefix + tokens.draw(self.suffix_len), self.output_len)
            for prefix in prefixes
            for _ in range(self.prompts_per_group)
        ]
        tokens.rng.shuffle(requests)
        return requests


@dataclass(frozen=True, kw_only=True)
class RolloutWorkload(Workload):
    """Several samples of each prompt, as reinforcement learning and best-of-n draw them."""

    name: ClassVar[str] = "rollout"
    temperature: ClassVar[float] = 1.0

    prompts: int = 8
    """Prompts."""
    samples: int = 16
    """Samples of each."""
    prompt_len: int = 512
    """Tokens of each prompt."""
    output_len: int = 256
    """Generated tokens of each sample."""
    seed: int = 0
    """Of the token ids."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        tokens = RandomTokens(vocabulary, self.seed)
        return [LoadRequest(tokens.draw(self.prompt_len), self.output_len, self.samples) for _ in range(self.prompts)]


@dataclass(frozen=True, kw_only=True)
class DocumentsWorkload(Workload):
    """Questions on long documents that stand behind one short instruction: three levels."""

    name: ClassVar[str] = "documents"

    documents: int = 4
    """Documents."""
    questions: int = 8
    """Questions on each."""
    system_len: int = 256
    """Tokens of the instruction before every document."""
    document_len: int = 4096
    """Tokens of each document."""
    question_len: int = 32
    """Tokens of each question."""
    output_len: int = 64
    """Generated tokens of each answer."""
    seed: int = 0
    """Of token ids and order."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        tokens = RandomTokens(vocabulary, self.seed)
        system = tokens.draw(self.system_len)
        documents = [system + tokens.draw(self.document_len) for _ in range(self.documents)]
        requests = [
            LoadRequest(document + tokens.draw(self.question_len), self.output_len)
            for document in documents
            for _ in range(self.questions)
        ]
        tokens.rng.shuffle(requests)
        return requests


@dataclass(frozen=True, kw_only=True)
class ChatWorkload(Workload):
    """Conversations of several turns behind one system prompt; each turn follows the answer before it."""

    name: ClassVar[str] = "chat"

    conversations: int = 16
    """Conversations."""
    turns: int = 4
    """Questions in each."""
    system_len: int = 512
    """Tokens of the system prompt that all share."""
    user_len: int = 64
    """Tokens of each question."""
    output_len: int = 64
    """Generated tokens of each answer."""
    think_s: float = 1.0
    """Mean time from an answer to the next question, exponential; only where requests arrive by the clock."""
    seed: int = 0
    """Of token ids and times."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        if not self.think_s >= 0:
            raise ConfigError(f"think_s is {self.think_s}: it must be 0 or larger")
        tokens, answers = RandomTokens(vocabulary, self.seed), RandomTokens(vocabulary, f"answers {self.seed}")
        system = tokens.draw(self.system_len)
        requests: list[LoadRequest] = []
        for turn in range(self.turns):
            for _ in range(self.conversations):
                own, before, delay_s = tokens.draw(self.user_len), None, 0.0
                if turn == 0:
                    own = system + own
                else:
                    before = len(requests) - self.conversations
                    delay_s = tokens.rng.expovariate(1 / self.think_s) if self.think_s else 0.0
                answer = answers.draw(self.output_len)
                requests.append(
                    LoadRequest(own, self.output_len, follows=before, delay_s=delay_s, recorded_answer=answer)
                )
        return requests


@dataclass(frozen=True, kw_only=True)
class FileWorkload(Workload):
    """Requests from a file of JSON lines: {"prompt": text or token ids, or "messages": [...], "output_len", "n"}."""

    name: ClassVar[str] = "file"

    file: str = ""
    """The file."""
    output_len: int = 64
    """Generated tokens of requests that do not say it themselves."""

    def _requests(self, vocabulary: Vocabulary) -> list[LoadRequest]:
        if not self.file:
            raise ConfigError("the workload file needs a file of JSON lines: give --file")
        try:
            lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{self.file} cannot be read as UTF-8 text: {error}") from error
        vocabulary = Vocabulary(vocabulary.size, functools.cache(vocabulary.load_tokenizer))
        return [
            self._request(f"{self.file}, line {number}", line, vocabulary)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]

    def _request(self, where: str, line: str, vocabulary: Vocabulary) -> LoadRequest:
        cure = 'write {"prompt": text or token ids} or {"messages": [...]}, with "output_len" and "n" where wanted'
        try:
            record = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{where} is no JSON ({error}): {cure}") from None
        known = {"prompt", "messages", "output_len", "n"}
        if not isinstance(record, dict) or not record.keys() <= known or ("prompt" in record) == ("messages" in record):
            raise PromptError(f"{where}: {cure}")
        output_len, n = record.get("output_len", self.output_len), record.get("n", 1)
        if not all(type(number) is int and number >= 1 for number in (output_len, n)):
            raise PromptError(f'{where}: "output_len" and "n" must be integers, 1 or larger')
        return LoadRequest(self._token_ids(where, record, vocabulary), output_len, n)

    def _token_ids(self, where: str, record: dict[str, Any], vocabulary: Vocabulary) -> list[int]:
        if "messages" in record:
            return vocabulary.encoder(where).encode_chat(record["messages"])
        prompt = record["prompt"]
        if isinstance(prompt, str):
            return vocabulary.encoder(where).encode(prompt)
        if not isinstance(prompt, list) or not all(type(t) is int and 0 <= t < vocabulary.size for t in prompt):
            raise PromptError(f"{where}: a prompt is a text, or token ids from 0 to {vocabulary.size - 1}")
        return prompt


WORKLOADS: Mapping[str, type[Workload]] = {
    workload.name: workload
    for workload in (
        RandomWorkload,
        SharedPrefixWorkload,
        ForestWorkload,
        RolloutWorkload,
        DocumentsWorkload,
        ChatWorkload,
        FileWorkload,
    )
}


class RandomTokens:
    """Token ids at random."""

    def __init__(self, vocabulary: Vocabulary, seed: int | str) -> None:
        self.rng, self._ids = random.Random(seed), range(vocabulary.size)

    def draw(self, length: int) -> list[int]:
        """So many ids."""
        return self.rng.choices(self._ids, k=length)
