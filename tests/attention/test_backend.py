from __future__ import annotations

from array import array

import torch

from cascade_llm.attention.backend import column_tensor
from cascade_llm.plan import int_column


def test_a_whole_column_is_not_copied() -> None:
    owner = array("i", [3, 1, 2])
    tensor = column_tensor(int_column(owner))
    assert tensor.dtype == torch.int32
    assert tensor.data_ptr() == owner.buffer_info()[0]
    assert tensor.tolist() == [3, 1, 2]


def test_part_of_a_column() -> None:
    column = int_column([3, 1, 2, 9])
    assert column_tensor(column[1:3]).tolist() == [1, 2]
    assert column_tensor(column[::2]).tolist() == [3, 2]
    assert column_tensor(column[::-1]).tolist() == [9, 2, 1, 3]


def test_an_empty_column() -> None:
    for column in (int_column(()), int_column([1, 2])[2:]):
        tensor = column_tensor(column)
        assert (tensor.dtype, tensor.shape) == (torch.int32, (0,))
