"""What a rank holds of a stored matrix: the same values, in the bits that they are stored in where a cut allows it."""

from __future__ import annotations

import pytest
import torch

from cascade_llm.device.ranks import Ranks, Share
from cascade_llm.device.torch_exchange import TorchExchange
from cascade_llm.loader.quantized.grid import integer_grid, stored_matrix
from cascade_llm.loader.stored_types import stored_types
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightOptions

TYPES = {f"{each.container} {each.name}": each.example for each in stored_types() if each.example is not None}
CUTS = [slice(0, 512), slice(256, 1024), slice(192, 384), slice(48, 80)]
FINE = slice(3, 40)


def noisy(stored: StoredTensor) -> StoredTensor:
    """The same with values that differ from input to input, as far as their type is bytes."""
    data = stored.data
    if data.dtype != torch.uint8 or stored.block is None:
        return stored
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 2, data.shape, dtype=torch.uint8, generator=generator)
    return StoredTensor(stored.format, stored.shape, data ^ noise, stored.decode, stored.codes, block=stored.block)


@pytest.mark.parametrize("name", TYPES)
def test_columns_have_the_same_values(name: str) -> None:
    whole = noisy(TYPES[name])
    values = whole.values().float()
    for part in [*CUTS, FINE]:
        cut = whole.columns(part)
        assert cut.shape == (whole.shape[0], part.stop - part.start)
        assert torch.equal(cut.values().float(), values[:, part]), part
        assert torch.equal(cut.rows(slice(3, 9)).values().float(), values[3:9, part])
        out = torch.empty(cut.shape)
        cut.write_to(out)
        assert torch.equal(out, values[:, part])
        if cut.codes is not None:
            assert torch.equal(cut.codes(cut.data).dequantized(), values[:, part]), part


@pytest.mark.parametrize("name", TYPES)
def test_codes_stay_codes_where_groups_are_cut_in_long_pieces(name: str) -> None:
    whole = TYPES[name]
    for part in CUTS:
        assert (whole.columns(part).codes is None) == (whole.codes is None), part
    if whole.codes is not None and whole.codes(whole.data[:1]).layout.group_len is not None:
        assert whole.columns(FINE).codes is None


def test_blocks_that_nobody_needs_are_not_read() -> None:
    whole = TYPES["GGUF Q4_K"]
    assert whole.columns(slice(256, 512)).data.shape[1] == whole.data.shape[1] // 4
    assert whole.columns(slice(192, 384)).data.shape[1] == whole.data.shape[1] // 2


def test_inputs_out_of_order_are_decoded() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8, generator=generator)
    scales = torch.rand(8, 4, generator=generator).half()
    order = torch.randperm(128, generator=generator)
    whole = stored_matrix(
        "gptq", integer_grid((8, 128), 4, 32, scales, None, order), lambda rows, part: codes[rows, part]
    )
    cut = whole.columns(slice(32, 96))
    assert cut.codes is None
    assert torch.equal(cut.values(), whole.values()[:, 32:96])


def test_shares_cover_a_dimension_once() -> None:
    for total, unit, count in [(97, 1, 3), (151936, 64, 7), (100, 64, 2), (8, 1, 8)]:
        shares = [Ranks(index, count, TorchExchange(None)).share(total, unit) for index in range(count)]
        assert [share.first for share in shares[1:]] == [share.slice.stop for share in shares[:-1]]
        assert (shares[0].first, shares[-1].slice.stop) == (0, total)
        assert max(share.size for share in shares) - min(share.size for share in shares) <= unit


def test_a_matrix_says_what_a_rank_holds() -> None:
    options = WeightOptions(dtype=torch.float32, device=torch.device("cpu"))
    outputs = {"q": Share(8, 4, 4), "k": Share(4, 2, 2)}
    spec = MatrixSpec("qk", 6, {"q": 8, "k": 4}, options, outputs=outputs)
    assert (spec.out_features, spec.held.out_features, spec.held.rows_of("k")) == (12, 6, slice(4, 6))
    values = torch.arange(48).view(8, 6).float()
    assert torch.equal(spec.held_part("q", StoredTensor.plain(values)).values(), values[4:])
    by_inputs = MatrixSpec("out", 6, {"o": 8}, options, Share(6, 3, 3))
    assert by_inputs.held.in_features == 3
    assert torch.equal(by_inputs.held_part("o", StoredTensor.plain(values)).values(), values[:, 3:])
    bias = torch.arange(8)
    assert torch.equal(by_inputs.held_part("o", StoredTensor.plain(bias)).values(), bias)
