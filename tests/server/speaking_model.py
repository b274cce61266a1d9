"""A model that says one text, whatever it is asked: each of its tokens has one that follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from cascade_llm.engine.tokenizer import Tokenizer, load_tokenizer
from cascade_llm.loader.resolve import open_checkpoint
from tests.models.checkpoints import tiny_model

__all__ = ["save_speaking"]

END = "<|im_end|>"


def save_speaking(folder: Path, text: str, chat_template: str) -> Path:
    """A checkpoint with SmolLM2's tokenizer that answers a prompt which ends with a line break."""
    tokenizer = load_tokenizer(open_checkpoint("smollm2").tokenizer_source)
    assert tokenizer is not None
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": chat_template, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    first = tokenizer.encode("\n", add_special_tokens=False)
    chain = [*first, *distinct_tokens(tokenizer, text, frozenset(first)), tokenizer.special_ids[END]]
    model = tiny_model(
        "llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=-(-len(chain) // 48) * 48,
        num_hidden_layers=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif "o_proj" in name or "down_proj" in name or "embed" in name or "lm_head" in name:
                parameter.zero_()  # nothing but the token itself tells what follows
        for place, (token, following) in enumerate(pairwise(chain)):
            model.get_input_embeddings().weight[token, place] = 1.0
            model.get_output_embeddings().weight[following, place] = 10.0  # whatever the temperature
    model.save_pretrained(folder)
    return folder


def distinct_tokens(tokenizer: Tokenizer, text: str, taken: frozenset[int]) -> Sequence[int]:
    """Tokens that spell an ASCII text, none of them twice, nor one of `taken`."""
    known = {token.replace("\u0120", " "): number for token, number in tokenizer.backend.get_vocab().items()}
    steps = [
        [(end, known[text[at:end]]) for end in range(min(len(text), at + 12), at, -1) if text[at:end] in known]
        for at in range(len(text))
    ]
    later = [frozenset(token for step in steps[at:] for _, token in step) for at in range(len(text))]
    dead: set[tuple[int, frozenset[int]]] = set()

    def spell(at: int, used: frozenset[int]) -> list[int] | None:
        if at == len(text):
            return []
        state = (at, used & later[at])
        for end, token in () if state in dead else steps[at]:
            if token not in used and (rest := spell(end, used | {token})) is not None:
                return [token, *rest]
        dead.add(state)
        return None

    found = spell(0, taken)
    assert found is not None, "some token would have to be there twice"
    return found
