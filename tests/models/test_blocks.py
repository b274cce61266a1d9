"""Compositions that no served architecture has yet: what the seams must hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.models import blocks
from cascade_llm.models import decoder as decoder_module
from cascade_llm.models.architectures import ARCHITECTURES, Architecture
from cascade_llm.models.blocks import (
    MLP,
    AttentionBlock,
    BlockOptions,
    DecoderLayer,
    GatedMLP,
    Parameter,
    below,
    linear_parameters,
)
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.loading import init_dummy, load_weights
from cascade_llm.weights.linear import Linear
from tests.models.checkpoints import Replay, empty_decoder, stored, tiny_model


class BestExpert(MLP):
    """Each row goes through the one expert that a router scores highest."""

    def __init__(self, options: BlockOptions, num_experts: int) -> None:
        self.router = options.linear("router", options.config.hidden_size, {"gate": num_experts}, bias=False)
        self.experts = [GatedMLP(options) for _ in range(num_experts)]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.router, *(linear for expert in self.experts for linear in expert.linears)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from linear_parameters(self.router)
        for i, expert in enumerate(self.experts):
            yield from below(f"experts.{i}", expert.named_parameters())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = self.router(x).argmax(-1), torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(x[chosen == i])
        return out


def _layer(options: BlockOptions, index: int) -> DecoderLayer:
    return DecoderLayer(options, index, AttentionBlock(options), BestExpert(options, num_experts=3))


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    experts = Architecture(hf_class="ExpertsForCausalLM", layer=_layer)
    monkeypatch.setattr(decoder_module, "ARCHITECTURES", {**ARCHITECTURES, "llama": experts})
    return empty_decoder(tiny_model("llama"))


def test_a_block_of_experts_is_named_filled_packed_and_run_as_any_other(decoder: Decoder) -> None:
    names = dict(decoder.named_parameters())
    assert "model.layers.2.mlp.experts.1.up_proj.weight" in names
    assert names["model.layers.0.mlp.gate.weight"].shape == (3, 48)
    assert len(decoder.linears) == 3 * (2 + 1 + 3 * 2) + 1
    init_dummy(decoder)
    rows = [(0, position, token) for position, token in enumerate((5, 9, 3, 77))]
    expected = Replay(decoder).step(rows)
    torch.testing.assert_close(Replay(decoder).step(rows), expected, rtol=1e-4, atol=1e-4)


def test_each_row_has_the_product_of_its_own_expert(decoder: Decoder) -> None:
    torch.manual_seed(0)
    state = {name: torch.randn(parameter.shape) for name, parameter in decoder.named_parameters()}
    load_weights(decoder, stored(state))
    x = torch.randn(9, 48)
    weights = {name.removeprefix("model.layers.1.mlp."): values for name, values in state.items()}
    got = decoder.layers[1].mlp(x)
    for row, expert in enumerate((x @ weights["gate.weight"].T).argmax(-1).tolist()):
        gate, up, down = (weights[f"experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        torch.testing.assert_close(got[row], down @ (F.silu(gate @ x[row]) * (up @ x[row])), rtol=1e-4, atol=1e-3)


def test_a_gated_product_of_many_rows_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = empty_decoder(tiny_model("llama"))
    init_dummy(decoder)
    mlp = decoder.layers[0].mlp
    x = torch.randn(23, decoder.config.hidden_size)
    expected = mlp(x)
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 8)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
