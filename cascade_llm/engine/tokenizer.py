"""Text to token ids and back, and chat templates; the engine's one door to transformers.

A folder's tokenizer.json decides, read by the `tokenizers` package itself: transformers rebuilds some tokenizers by
the name of their class, with other ids than the file gives. Encoding and decoding go to the `tokenizers` object: from
any thread, and text that no clean-up of spaces has touched.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from cascade_llm.engine.chat_messages import plain_messages, text_of
from cascade_llm.engine.chat_template import ChatTemplate
from cascade_llm.errors import CascadeError, CheckpointError, PromptError, RequestError, UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.gguf_texts import GGUFTexts
from cascade_llm.loader.gguf_tokenizer import build_tokenizer
from cascade_llm.loader.hf_folder import read_json

__all__ = ["Tokenizer", "load_tokenizer"]

log = logging.getLogger("cascade_llm")
advice = logging.getLogger("cascade_llm.advice")
"""On requests; see `InputProcessor`."""

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TEMPLATE_ARGUMENTS = frozenset(("messages", "tools", "documents", "add_generation_prompt", *SPECIAL_NAMES))
"""What a template gets whether it asks for it or not."""
PROBES = ("Hello world", " Hello", "  two  spaces", "don't 12345", "na\u00efve \u4f60\u597d \U0001f44d", "a\n\n b\tc")
"""Texts on which two ways to load a tokenizer must agree."""


def load_tokenizer(source: Path | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint's `tokenizer_source`: a Hugging Face folder or a .gguf file; None for None.

    Raises `CheckpointError` when its files are broken, `UnsupportedModelError` for a kind that is not implemented.
    """
    if source is None:
        return None
    try:
        return _from_gguf(source) if source.is_file() else _from_folder(source)
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
    """A tokenizer with its special tokens and chat templates; immutable, so that threads may share it."""

    def __init__(
        self,
        backend: BackendTokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backend: the `tokenizers` object
            special_tokens: text by role: {"bos_token": "<s>", ...}
            chat_template: one, or several by name, of which "default" serves and "tool_use" where there are tools
        """
        self.backend = backend
        """For incremental decoding."""
        # a tokenizer.json may ask for both; a prompt is never cut, nor filled up
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        """Ids of the tokens that `skip_special_tokens` leaves out of the text, by their own text."""
        self.special_token_ids = frozenset(self.special_ids.values())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Tokens, the added ones counted; a model's embedding may have more rows."""
        self.bos_token_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_token_ids: frozenset[int] = frozenset() if eos is None else frozenset((eos,))
        """The tokenizer's own; a checkpoint's generation_config may add more."""
        self._sources = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
        self._templates: dict[str, ChatTemplate] = {}

    @cached_property
    def _splitting(self) -> BackendTokenizer:
        """A copy that reads special tokens in a text as plain text."""
        copy = BackendTokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Their texts by role: {"bos_token": "<s>", ...}."""
        return self._special_tokens

    @property
    def chat_template(self) -> str | list[dict[str, str]] | None:
        """Its text, or {"name", "template"} of each where there are several, as tokenizer_config.json has them."""
        if list(self._sources) == ["default"]:
            return self._sources["default"]
        return [{"name": name, "template": text} for name, text in self._sources.items()] or None

    @property
    def tool_template(self) -> ChatTemplate:
        """The template that serves where there are tools. Raises `RequestError` where there is none."""
        return self._template(None, tools=True)

    def save(self, folder: Path) -> None:
        """Write it as files of a Hugging Face folder."""
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        config["clean_up_tokenization_spaces"] = False
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Special tokens that are spelled out in it become their ids, with `split_special_tokens` those of their
        characters. A text that begins with the beginning-of-sequence token gets no second one.

        Raises `PromptError` for a text that no tokenizer can read.
        """
        backend = self._splitting if split_special_tokens else self.backend
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is no Exception
            raise PromptError(f"the text cannot be tokenized: {_unreadable(text) or error}") from error
        twice = add_special_tokens and ids[:2] == [self.bos_token_id] * 2
        return ids[1:] if twice else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that make no character become U+FFFD, ids beyond the vocabulary nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **arguments: Any,
    ) -> str:
        """A conversation as the model's own template writes it.

        Args:
            messages: each with "role" and "content", a string or a list of {"type": "text", "text": ...}; the parts
                of a list reach a template that reads parts, any other gets one text of all
            add_generation_prompt: end where the assistant's turn begins
            chat_template: another than the model's: its text, or the name of one of the model's
            continue_final_message: end where the last message's content does
            arguments: what the template knows (tools, enable_thinking)

        Raises `RequestError` that names the message at fault, or when there is no template.
        """
        template = self._template(chat_template, arguments.get("tools"))
        plain = plain_messages(messages, keeps_parts=template.reads_parts)
        if continue_final_message and not text_of(plain[-1]["content"]):
            raise RequestError("continue_final_message: the last message has no content to continue")
        if unknown := sorted(arguments.keys() - template.names - TEMPLATE_ARGUMENTS):
            advice.warning("the chat template reads no %s: it has no effect", ", ".join(unknown))
        if arguments.get("tools") and "tools" not in template.names:
            advice.warning("the chat template reads no tools: the model does not see them")
        variables = {"tools": None, "documents": None, **self._special_tokens, **arguments}
        return template.render(
            plain,
            continue_final_message,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            **variables,
        )

    def _template(self, given: str | None, tools: object) -> ChatTemplate:
        if given is not None and not isinstance(given, str):
            raise RequestError(f"chat_template is a {type(given).__name__}: give a text")
        named = given if given in self._sources else "tool_use" if tools and "tool_use" in self._sources else "default"
        source = self._sources.get(named) if given is None or given in self._sources else given
        if source is None:
            raise RequestError(
                "the model has no chat template: give a plain prompt to generate(), or pass chat_template="
                + (f" (its own are named {', '.join(self._sources)})" if self._sources else "")
            )
        if source not in self._templates:
            self._templates = {source: ChatTemplate(source)} | dict(list(self._templates.items())[:7])
        return self._templates[source]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        split_special_tokens: bool = False,
        **template_arguments: Any,
    ) -> list[int]:
        """As `apply_chat_template`, tokenized. The template writes its own special tokens, none are added.

        With `split_special_tokens` those alone count: what a message spells out is plain text.
        """
        if split_special_tokens and self.special_ids:
            return self._encode_split(messages, add_generation_prompt, template_arguments)
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, **template_arguments), False)

    def _encode_split(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, arguments: Mapping[str, Any]
    ) -> list[int]:
        """Special tokens in messages are marked, so that those of the template are all that is left."""
        special = re.compile("|".join(sorted(map(re.escape, self.special_ids), key=len, reverse=True)))
        written = json.dumps([messages, arguments.get("tools")], ensure_ascii=False, default=str)
        mark = next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in written)

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return special.sub(lambda found: found[0][0] + mark + found[0][1:], value)
            if isinstance(value, Mapping):
                return {key: marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list | tuple) else value

        options = {**arguments, "tools": marked(arguments.get("tools"))}
        text = self.apply_chat_template(marked(messages), add_generation_prompt, **options)
        ids, start = [], 0
        for found in (*special.finditer(text), None):
            end = len(text) if found is None else found.start()
            ids += self.encode(text[start:end].replace(mark, ""), False, split_special_tokens=True)
            if found is not None:
                ids.append(self.special_ids[found[0]])
                start = found.end()
        return ids

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


def _from_folder(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        return _by_transformers(folder)
    backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
    config = _optional_json(folder / "tokenizer_config.json")
    names = {**_optional_json(folder / "special_tokens_map.json"), **config}
    special = {name: _token_text(folder, name, names[name]) for name in SPECIAL_NAMES if names.get(name) is not None}
    tokenizer = Tokenizer(backend, special, _folder_template(folder, config))
    _compare_bos(folder, tokenizer, config.get("add_bos_token"))
    return tokenizer


def _compare_bos(folder: Path, tokenizer: Tokenizer, add_bos: object) -> None:
    """Say so where tokenizer_config.json adds a beginning-of-sequence token and tokenizer.json does not, or so."""
    adds = tokenizer.bos_token_id in tokenizer.encode("a")
    if isinstance(add_bos, bool) and tokenizer.bos_token_id is not None and adds != add_bos:
        log.warning(
            "%s: tokenizer_config.json has add_bos_token %s, tokenizer.json adds %s: tokenizer.json decides",
            folder,
            str(add_bos).lower(),
            "one" if adds else "none",
        )


def _token_text(folder: Path, name: str, value: object) -> str:
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise CheckpointError(f"{folder}: {name} of tokenizer_config.json is {value!r}, it must be a text")
    return text


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """From a file of its own, or tokenizer_config.json: one, or several by name."""
    named = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    elif template is None and (folder / "chat_template.json").is_file():  # where older folders have it
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        template = {str(entry.get("name")): entry.get("template") for entry in template}
    texts = template.values() if isinstance(template, dict) else () if template is None else (template,)
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise CheckpointError(f"{folder}: chat_template is a {wrong[0]}, not a text")
    if not named:
        return template
    return named | (template if isinstance(template, dict) else {"default": template} if template else {})


def _by_transformers(folder: Path) -> Tokenizer:
    """A folder without tokenizer.json: transformers makes one of what is there."""
    with _quiet_transformers():
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    backend = getattr(hf, "backend_tokenizer", None)
    if not isinstance(backend, BackendTokenizer):
        raise UnsupportedModelError(
            f"{folder}: {type(hf).__name__} is no fast tokenizer: add the model's tokenizer.json to the folder"
        )
    special = {name: str(getattr(hf, name)) for name in SPECIAL_NAMES if getattr(hf, name, None) is not None}
    template = hf.chat_template
    if template is None:
        template = _folder_template(folder, {})
    if not isinstance(template, str | dict | None):
        raise CheckpointError(f"{folder}: chat_template is a {type(template).__name__}, not a text")
    tokenizer = Tokenizer(backend, special, template)
    _compare_with_sentencepiece(folder / "tokenizer.model", tokenizer)
    return tokenizer


def _compare_with_sentencepiece(path: Path, tokenizer: Tokenizer) -> None:
    """Warn where transformers' conversion of a tokenizer.model gives other ids than the file itself."""
    if not path.is_file() or find_spec("sentencepiece") is None:
        return
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(path))
    different = [text for text in PROBES if original.encode(text) != tokenizer.encode(text, add_special_tokens=False)]
    if different:
        log.warning(
            "%s: transformers' conversion gives other tokens for %s: add the model's tokenizer.json to the folder",
            path,
            ", ".join(map(repr, different)),
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _from_gguf(path: Path) -> Tokenizer:
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
    return Tokenizer(backend, special, _gguf_templates(path, metadata))


def _gguf_templates(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Those of a GGUF file, by name: one, and others that a list names."""
    names = metadata.get("tokenizer.chat_templates", [])
    if not isinstance(names, list | GGUFTexts):
        raise CheckpointError(f"{path}: tokenizer.chat_templates is a {type(names).__name__}, not a list of names")
    keys = {str(name): f"tokenizer.chat_template.{name}" for name in names}
    if metadata.get("tokenizer.chat_template") is not None:
        keys["default"] = "tokenizer.chat_template"
    if wrong := [key for key in keys.values() if not isinstance(metadata.get(key), str)]:
        raise CheckpointError(f"{path}: {wrong[0]} is a {type(metadata.get(wrong[0])).__name__}, not a text")
    return {name: metadata[key] for name, key in keys.items()}


def _unreadable(text: object) -> str:
    """Why a text is none, where that can be said."""
    if not isinstance(text, str):
        return f"it is a {type(text).__name__}, give a text"
    for index, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            return (
                f"character {index} is {character!r}, half a surrogate pair: decode the text as what it was written in "
                "(a byte that is no UTF-8 comes so from the command line)"
            )
    return ""


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
