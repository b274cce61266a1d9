"""The tokenizer inside a GGUF file, built with the `tokenizers` library as the original model's tokenizer.json has it.

A GGUF holds vocabulary, merges and the name of a pre-tokenizer (tokenizer.ggml.pre). Names and what they mean are
llama.cpp's (`llama_vocab::impl::load`); a name that is not in the table is refused, since a wrong split of the text
still gives tokens, only not those that the model was trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from cascade_llm.errors import CascadeError, CheckpointError, UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile

__all__ = ["build_tokenizer"]

log = logging.getLogger("cascade_llm")

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""tokenizer.ggml.token_type"""

AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + AFTER_NUMBERS
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}" + AFTER_NUMBERS.replace(r"[\r\n]*", r"[\r\n/]*")
)
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}" + AFTER_NUMBERS.replace(r"[\r\n]*", r"[\r\n/]*")
)


class Family(NamedTuple):
    """How one family of byte-level BPE vocabularies treats text before and after the merges."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    """A whole word that is in the vocabulary is one token, whatever the merges say."""
    add_bos: bool = False
    """What holds where the file says nothing."""


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file, special tokens and their addition included.

    Raises `UnsupportedModelError` for a kind of tokenizer that is not implemented, `CheckpointError` for a
    vocabulary that contradicts itself.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            tokenizer, add_bos = _byte_level(file)
        elif kind == "llama":
            tokenizer, add_bos = _sentencepiece(file), True
        else:
            raise _unsupported(file, f"tokenizer {kind!r}", "gpt2 and llama")
        _add_tokens(tokenizer, file.metadata)
        _add_template(tokenizer, file.metadata, add_bos)
    except (CascadeError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises plain Exception, and its panics are not even that
        raise CheckpointError(f"{file.path}: its vocabulary makes no tokenizer: {error!r}") from error
    return tokenizer


def _byte_level(file: GGUFFile) -> tuple[Tokenizer, bool]:
    """GPT-2's byte-level BPE, as Llama 3, Qwen and SmolLM have it; and whether BOS is added by default."""
    families = _families()
    name = file.metadata.get("tokenizer.ggml.pre")
    if name is None:
        log.warning(
            "%s names no pre-tokenizer (tokenizer.ggml.pre), as files of before May 2024: text is split as for GPT-2, "
            "which gives other tokens than most newer models were trained on; convert the model again",
            file.path,
        )
        name = "default"
    if name not in families:
        raise _unsupported(file, f"pre-tokenizer {name!r}", ", ".join(families))
    family = families[name]
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=_vocab(file), merges=merges, ignore_merges=family.ignore_merges))
    if family.normalizer is not None:
        tokenizer.normalizer = family.normalizer
    tokenizer.pre_tokenizer = family.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, family.add_bos


def _families() -> Mapping[str, Family]:
    """tokenizer.ggml.pre and what it means."""
    gpt2 = Family(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    digits = Family(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    )
    llama3 = Family(_split(LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
    qwen2 = Family(_split(QWEN2_SPLIT), normalizer=normalizers.NFC())
    tekken = Family(_split(TEKKEN_SPLIT), ignore_merges=True, add_bos=True)
    return {
        **dict.fromkeys(("default", "gpt-2", "olmo"), gpt2),
        **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), digits),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), llama3),
        **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), Family(_split(LLAMA3_SPLIT))),
        "gpt-4o": Family(_split(GPT4O_SPLIT)),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), qwen2),
        "tekken": tekken,
    }


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(file: GGUFFile) -> Tokenizer:
    """SentencePiece BPE, as Llama 2 and Mistral have it: scores in the place of merges, unknown text as bytes."""
    vocab = _vocab(file)
    unk_id = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    merges = _merges_by_score(vocab, file.metadata["tokenizer.ggml.scores"], file.metadata["tokenizer.ggml.token_type"])
    unk_token = file.metadata["tokenizer.ggml.tokens"][unk_id]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix_space = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    # each piece of text, after a special token too, gets a space before it, also one that begins with a space
    prefix = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(vocab: Mapping[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first; of one score, the way that merges first."""
    merges = [
        (-scores[token_id], len(token[:cut]), len(token[cut:]), vocab[token[:cut]], vocab[token[cut:]], token, cut)
        for token, token_id in vocab.items()
        if types[token_id] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [(token[:cut], token[cut:]) for *_, token, cut in sorted(merges)]


def _vocab(file: GGUFFile) -> dict[str, int]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    for token_id, token in enumerate(tokens if len(vocab) < len(tokens) else ()):
        if vocab[token] != token_id:
            raise CheckpointError(
                f"{file.path}: the token {token!r} stands twice in its vocabulary, as {token_id} and {vocab[token]}: "
                "use the model's Hugging Face folder, or convert it again"
            )
    return vocab


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control and user-defined tokens are never cut; they keep the ids that the vocabulary gives them."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", ())
    for special, kind in ((True, CONTROL), (False, USER_DEFINED)):
        ids = (token_id for token_id, token_type in enumerate(types[: len(tokens)]) if token_type == kind)
        added = [AddedToken(tokens[token_id], normalized=False, special=special) for token_id in ids]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _add_template(tokenizer: Tokenizer, metadata: Mapping[str, Any], add_bos: bool) -> None:
    """What `add_special_tokens` puts around a text."""
    before, after = _ending(metadata, "bos", add_bos), _ending(metadata, "eos", False)
    template = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=before + after)


def _ending(metadata: Mapping[str, Any], name: str, default: bool) -> list[tuple[str, int]]:
    """The bos or eos token and its id, if it is to be added."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None or not metadata.get(f"tokenizer.ggml.add_{name}_token", default):
        return []
    return [(metadata["tokenizer.ggml.tokens"][token_id], token_id)]


def _unsupported(file: GGUFFile, what: str, known: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file.path}: {what} is not implemented ({known} are): "
        "use the model's Hugging Face folder, which holds a tokenizer.json"
    )
