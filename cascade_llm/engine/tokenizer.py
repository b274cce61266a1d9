"""Text to token ids and back, and chat templates; the engine's one door to transformers.

Encoding and decoding go to the `tokenizers` object itself: the same ids as transformers' wrapper gives, from any
thread, and text that no clean-up of spaces has touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from cascade_llm.errors import CascadeError, CheckpointError, RequestError, UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.gguf_tokenizer import build_tokenizer
from cascade_llm.loader.hf_folder import read_json

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(source: Path | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint's `tokenizer_source`: a Hugging Face folder or a .gguf file; None for None.

    Raises `CheckpointError` when its files are broken, `UnsupportedModelError` for a kind that is not implemented.
    """
    if source is None:
        return None
    try:
        return Tokenizer(_from_gguf(source) if source.is_file() else _from_folder(source))
    except (CascadeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # from a missing file to a panic of the Rust library, which is no Exception
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the tokenizer in {source} cannot be loaded ({reason}): {_cure(source)}") from error


def _cure(source: Path) -> str:
    needs_sentencepiece = (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file()
    if needs_sentencepiece and find_spec("sentencepiece") is None:
        return "it has a tokenizer.model and no tokenizer.json, so pip install sentencepiece"
    return "copy it again"


class Tokenizer:
    """A fast tokenizer of transformers with its chat template; immutable, so that threads may share it."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self.backend: BackendTokenizer = hf_tokenizer.backend_tokenizer
        """The `tokenizers` object, for incremental decoding."""
        # a tokenizer.json may ask for both; a prompt is never cut, nor filled up
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Tokens that `skip_special_tokens` leaves out of the text."""
        self.vocab_size: int = self.backend.get_vocab_size(with_added_tokens=True)
        """Tokens, the added ones counted; a model's embedding may have more rows."""
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id
        eos = hf_tokenizer.eos_token_id
        self.eos_token_ids: frozenset[int] = frozenset() if eos is None else frozenset((eos,))
        """The tokenizer's own; a checkpoint's generation_config may add more."""

    def save(self, folder: Path) -> None:
        """Write it as files of a Hugging Face folder."""
        self._hf.save_pretrained(folder)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works without one being passed."""
        return self._hf.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens that are spelled out in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that make no character become U+FFFD, ids beyond the vocabulary nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **template_arguments: Any
    ) -> str:
        """A conversation as the model's own template writes it.

        Args:
            messages: each with "role" and "content", a string or a list of {"type": "text", "text": ...}
            template_arguments: what the template knows (tools, enable_thinking), or another `chat_template`

        Raises `RequestError` that names the message at fault, or when there is no template.
        """
        if not self.has_chat_template and template_arguments.get("chat_template") is None:
            raise RequestError(
                "the model has no chat template: give a plain prompt to generate(), or pass chat_template="
            )
        plain = _plain_messages(messages)
        try:
            return str(
                self._hf.apply_chat_template(
                    plain, tokenize=False, add_generation_prompt=add_generation_prompt, **template_arguments
                )
            )
        except Exception as error:  # a template is a program: it raises whatever it wants, by raise_exception() too
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **template_arguments: Any
    ) -> list[int]:
        """As `apply_chat_template`, tokenized. The template writes its own special tokens, none are added."""
        text = self.apply_chat_template(messages, add_generation_prompt, **template_arguments)
        return self.encode(text, add_special_tokens=False)

    def encode_continuation(
        self,
        history_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **template_arguments: Any,
    ) -> list[int]:
        """As `encode_chat`, but starting with `history_ids` where these spell the beginning of the same text.

        What a model generated is not always how a tokenizer would cut its text, so a conversation that is encoded
        anew each turn can lose its cached prefix. `history_ids` are the last prompt's and its output's together.
        A template that rewrites history (drops reasoning, strips spaces) gives the encoding of `encode_chat`.
        """
        text = self.apply_chat_template(messages, add_generation_prompt, **template_arguments)
        history = self.decode(history_ids, skip_special_tokens=False)
        if history_ids and text.startswith(history):
            new_text = text[len(history) :]
            new_ids = self.encode(new_text, add_special_tokens=False)
            # SentencePiece may put a space before a text of its own, which is no text of its own here
            last = history_ids[-1:]
            seam = self.decode([*last, *new_ids], skip_special_tokens=False)
            if seam == self.decode(last, skip_special_tokens=False) + new_text:
                return [*history_ids, *new_ids]
        return self.encode(text, add_special_tokens=False)


def _from_folder(folder: Path) -> Any:
    with _quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), BackendTokenizer):
        raise UnsupportedModelError(
            f"{folder}: {type(tokenizer).__name__} is no fast tokenizer: add the model's tokenizer.json to the folder"
        )
    template = folder / "chat_template.json"  # where older folders have it
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = read_json(template).get("chat_template")
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise CheckpointError(f"{folder}: chat_template is a {type(tokenizer.chat_template).__name__}, not a text")
    return tokenizer


def _from_gguf(path: Path) -> Any:
    file = GGUFFile(path)
    backend, metadata = build_tokenizer(file), file.metadata
    special = {
        f"{short}_token": metadata["tokenizer.ggml.tokens"][metadata[key]]
        for short, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in metadata
    }
    with _quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        template = metadata.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence its advice on other uses than this one, for as long as a tokenizer is loaded."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates take them: contents as one string. Names the first that cannot be."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f'messages is {messages!r}: give a list of {{"role": ..., "content": ...}}')
    if not messages:
        raise RequestError('messages is empty: give at least one {"role": "user", "content": ...}')
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f'messages[{index}] is {message!r}: give {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f'messages[{index}] has the role {role!r}: give "system", "user", "assistant" or "tool"')
    if content is None and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, list | tuple):
        content = "".join(_text_part(index, part) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"messages[{index}] has content of type {type(content).__name__}: give a string")
    return {**message, "content": content}


def _text_part(index: int, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError(f'messages[{index}] has a part that is no text: give {{"type": "text", "text": ...}}')
