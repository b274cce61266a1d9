from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.safetensors_file import DTYPES, SafetensorsFile

MB = 1 << 20


def test_tensors_of_every_dtype_are_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    stored = {
        f"{name}.{index}": torch.arange(7 * index).view(7, index).to(torch.float32).to(dtype)
        for index, (name, dtype) in enumerate(DTYPES.items())
    }
    save_file({**stored, "scalar": torch.tensor(3.0), "none": torch.empty(0, 4)}, path)
    file = SafetensorsFile(path)
    with safe_open(path, framework="pt") as reference:
        assert file.names == list(reference.offset_keys())
        for name in file.names:
            ours, theirs = file.tensor(name), reference.get_tensor(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            assert torch.equal(as_bytes(ours), as_bytes(theirs)), name
            assert file.num_bytes(name) == theirs.nbytes
    assert len(file.names) == len(DTYPES) + 2


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def test_released_pages_are_gone_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({f"{i}": torch.full((8 * MB,), i, dtype=torch.uint8) for i in range(6)}, path)
    file = SafetensorsFile(path)
    start, grown = resident_file_bytes(), []
    for name in file.names:
        assert int(file.tensor(name).long().sum()) == int(name) * 8 * MB
        grown.append(resident_file_bytes() - start)
        file.release(name)
    assert max(grown) < 20 * MB, "a tensor and some pages beside it"
    assert max(grown) > 4 * MB, "else this measures nothing"
    assert int(file.tensor("3")[5]) == 3


def resident_file_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))


def test_a_tensor_lives_longer_than_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(9.0)}, tmp_path / "a.safetensors")
    tensor = SafetensorsFile(tmp_path / "a.safetensors").tensor("a")
    assert torch.equal(tensor, torch.arange(9.0))


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = b'{"odd":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0123")
    with pytest.raises(CheckpointError, match=r"tensor odd has dtype F4, which is not read"):
        SafetensorsFile(path).tensor("odd")


def test_what_does_not_begin_at_a_multiple_of_its_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = b'{"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    header += b'"odd":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x" + b"\x00\x00\x80\x3f")
    assert SafetensorsFile(path).tensor("odd").tolist() == [1.0]
