from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.gguf_texts import GGUFTexts
from cascade_llm.loader.resolve import open_checkpoint
from tests.loader.gguf_files import write_gguf, write_model
from tests.models.checkpoints import tiny_model

KEYS: dict[str, Any] = {
    "test.text": "naïve ▁",
    "test.number": 7,
    "test.float": 0.5,
    "test.flag": True,
    "test.texts": ["a", "", "ß"],
    "test.numbers": [1, -2, 3],
    "test.floats": [0.5, -1.0],
}


def tiny_file(folder: Path) -> Path:
    tensors = {"b.weight": np.arange(96, dtype=np.float32).reshape(3, 32), "a.bias": np.ones(3, np.float32)}
    return write_gguf(
        folder / "tiny.gguf", "test", tensors=tensors, other_keys=KEYS, tensor_type=GGMLQuantizationType.Q8_0
    )


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """With lists in the place of texts that are read when they are asked for."""
    return {key: list(value) if isinstance(value, GGUFTexts) else value for key, value in metadata.items()}


def test_reads_what_gguf_s_own_reader_reads(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    file, oracle = GGUFFile(path), GGUFReader(path)
    assert plain(file.metadata) == {"general.architecture": "test", **KEYS}
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for theirs in oracle.tensors:
        ours = file.tensors[theirs.name]
        assert (ours.type, ours.num_bytes, ours.offset) == (theirs.tensor_type, theirs.n_bytes, theirs.data_offset)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert file.data(ours).tobytes() == theirs.data.tobytes()


@pytest.mark.slow
def test_smollm2_s_header_is_what_gguf_s_own_reader_reads() -> None:
    path = open_checkpoint("smollm2").tokenizer_source
    assert path is not None
    file, oracle = GGUFFile(path), GGUFReader(path)
    for name, field in oracle.fields.items():
        if not name.startswith("GGUF."):
            assert plain(file.metadata)[name] == field.contents(), name
    assert [(t.name, t.offset, t.num_bytes) for t in file.tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes) for t in oracle.tensors
    ]


def test_a_text_of_a_list_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    path.write_bytes(path.read_bytes().replace("ß".encode(), b"\xff\xff"))
    texts = GGUFFile(path).metadata["test.texts"]
    assert (len(texts), texts[0], texts[1]) == (3, "a", "")
    for read in (lambda: texts[-1], lambda: list(texts)):
        with pytest.raises(CheckpointError, match="is not UTF-8"):
            read()


def test_every_truncation_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    whole = path.read_bytes()
    padding = len(whole) - max(t.offset + t.num_bytes for t in GGUFFile(path).tensors.values())
    for size in range(len(whole) - padding):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated" if size >= 4 else "not a GGUF file"):
            GGUFFile(path)


def test_a_number_of_a_block_type_is_an_error(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    tensor = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 0, GGMLQuantizationType.Q4_1, 0)
    path = tmp_path / "number.gguf"
    path.write_bytes(header + tensor + bytes(64))
    with pytest.raises(CheckpointError, match="tensor a has rows of 1, no multiple of Q4_1's 32"):
        GGUFFile(path)


@given(data=st.data())
def test_corrupt_bytes_raise_nothing_but_errors_of_ours(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("corrupt")
    content = bytearray(tiny_file(folder).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "corrupt.gguf"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError, UnsupportedModelError):
        file = GGUFFile(path)
        assert all(file.data(tensor).size == tensor.num_bytes for tensor in file.tensors.values())


def test_wrong_magic_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match=r"not a GGUF file: it starts with b'PK"):
        GGUFFile(path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile(path)


@pytest.mark.parametrize(("version", "message"), [(1, "of version 1"), (9, "of version 9"), (3 << 24, "big-endian")])
def test_other_versions_are_refused(tmp_path: Path, version: int, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, 0, 0))
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def test_block_type_of_the_future_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    name = b"x.weight"
    tensor = struct.pack(f"<Q{len(name)}sIQIQ", len(name), name, 1, 32, 9999, 0)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor + bytes(256))
    with pytest.raises(UnsupportedModelError, match=r"x\.weight has block type 9999"):
        GGUFFile(path)


def test_truncated_weights_name_the_tensor(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"truncated: tensor \S+ ends at byte"):
        open_checkpoint(path)
