from __future__ import annotations

import struct
from ctypes import Structure, c_bool, c_char_p, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch

from oracles import llama_cpp
from quantkit.errors import ModelError
from quantkit.formats.imatrix import Imatrix, read_imatrix, write_imatrix
from quantkit.maths.gram import Importance


class _GGUFParams(Structure):
    _fields_: ClassVar = [("no_alloc", c_bool), ("context", c_void_p)]


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _by_hand() -> bytes:
    """A file of two tensors as llama.cpp's imatrix lays it out: header, four keys, four tensors on 32 bytes."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    header += _text("general.type") + struct.pack("<I", 8) + _text("imatrix")
    header += _text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + _text("wiki.txt")
    header += _text("imatrix.chunk_count") + struct.pack("<II", 4, 7)
    header += _text("imatrix.chunk_size") + struct.pack("<II", 4, 512)
    for name, count, offset in (
        ("blk.0.attn_q.weight.in_sum2", 3, 0),
        ("blk.0.attn_q.weight.counts", 1, 32),
        ("blk.0.ffn_down.weight.in_sum2", 9, 64),
        ("blk.0.ffn_down.weight.counts", 1, 128),
    ):
        header += _text(name) + struct.pack("<IQIQ", 1, count, 0, offset)
    header += b"\0" * (-len(header) % 32)
    data = struct.pack("<3f", 1.5, 0.0, 3.25) + b"\0" * 20 + struct.pack("<f", 3584.0) + b"\0" * 28
    data += struct.pack("<9f", *range(9)) + b"\0" * 28 + struct.pack("<f", 3584.0) + b"\0" * 28
    return header + data


def _matrix() -> Imatrix:
    entries = {
        "blk.0.ffn_down.weight": Importance(torch.arange(9.0), 3584),
        "blk.0.attn_q.weight": Importance(torch.tensor([1.5, 0.0, 3.25]), 3584),
    }
    return Imatrix(entries, ("wiki.txt",), 7, 512)


def _same(found: Imatrix, expected: Imatrix) -> None:
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].squares, entry.squares)
        assert found.entries[name].count == entry.count
    assert (found.datasets, found.chunks, found.chunk_size) == (
        expected.datasets,
        expected.chunks,
        expected.chunk_size,
    )


def test_writes_the_bytes_of_a_file_laid_out_by_hand(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.imatrix", _matrix())
    assert (tmp_path / "m.imatrix").read_bytes() == _by_hand()


def test_reads_a_file_laid_out_by_hand_and_writes_it_again(tmp_path: Path) -> None:
    path, again = tmp_path / "m.gguf", tmp_path / "again.gguf"
    path.write_bytes(_by_hand())
    found = read_imatrix(path)
    _same(found, _matrix())
    write_imatrix(again, found)
    assert again.read_bytes() == _by_hand()
    assert torch.equal(found.entries["blk.0.attn_q.weight"].mean, torch.tensor([1.5, 0.0, 3.25]) / 3584)


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", _matrix())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [tensor.name for tensor in reader.tensors][:2] == [
        "blk.0.attn_q.weight.in_sum2",
        "blk.0.attn_q.weight.counts",
    ]
    np.testing.assert_array_equal(reader.tensors[2].data, np.arange(9, dtype=np.float32))
    assert reader.fields["imatrix.datasets"].contents() == ["wiki.txt"]


@pytest.mark.engine
def test_llama_cpp_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(path, _matrix())
    lib = llama_cpp.library()
    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = c_void_p, [c_char_p, _GGUFParams]
    context = lib.gguf_init_from_file(str(path).encode(), _GGUFParams(True, None))
    assert context

    def ask(name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(lib, name)
        kinds = {bytes: c_char_p, int: c_int64}
        function.restype, function.argtypes = result, [c_void_p, *(kinds[type(given)] for given in arguments)]
        return function(context, *arguments)

    names = [ask("gguf_get_tensor_name", c_char_p, index) for index in range(ask("gguf_get_n_tensors", c_int64))]
    assert names == [
        b"blk.0.attn_q.weight.in_sum2",
        b"blk.0.attn_q.weight.counts",
        b"blk.0.ffn_down.weight.in_sum2",
        b"blk.0.ffn_down.weight.counts",
    ]
    assert [ask("gguf_get_tensor_size", c_size_t, index) for index in range(4)] == [12, 4, 36, 4]
    for key, value in ((b"imatrix.chunk_count", 7), (b"imatrix.chunk_size", 512)):
        assert ask("gguf_get_val_u32", c_uint32, ask("gguf_find_key", c_int64, key)) == value
    datasets = ask("gguf_find_key", c_int64, b"imatrix.datasets")
    assert ask("gguf_get_arr_n", c_size_t, datasets) == 1
    lib.gguf_free.argtypes = [c_void_p]
    lib.gguf_free(context)


def _legacy(end: bytes) -> bytes:
    data = struct.pack("<i", 2)
    for name, values in (("blk.0.attn_q.weight", (3.0, 0.0, 6.5)), ("output.weight", (1.0, 2.0))):
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 2, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + end


@pytest.mark.parametrize(
    ("end", "chunks", "datasets"),
    [(b"", 0, ()), (struct.pack("<i", 5), 5, ()), (struct.pack("<ii", 5, 8) + b"wiki.txt", 5, ("wiki.txt",))],
)
def test_reads_the_older_layout(tmp_path: Path, end: bytes, chunks: int, datasets: tuple[str, ...]) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(_legacy(end))
    found = read_imatrix(path)
    assert (found.chunks, found.datasets, found.chunk_size) == (chunks, datasets, 0)
    assert torch.equal(found.entries["blk.0.attn_q.weight"].mean, torch.tensor([1.5, 0.0, 3.25]))
    assert found.entries["output.weight"].count == 2


def test_nothing_seen_counts_every_column_alike() -> None:
    assert torch.equal(Importance(torch.zeros(3), 0).mean, torch.ones(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_legacy(b"")[:-3], r"byte \d+: expected 8 more, the file has 77"),
        (struct.pack("<i", -1), "byte 0: found -1, expected 1 or more"),
        (b"", "byte 0: expected 4 more"),
        (_by_hand().replace(b"imatrix.datasets", b"imatrix.datazets")[:-64], "lie beyond the end of the file"),
        (_by_hand().replace(struct.pack("<f", 3.25), struct.pack("<f", float("nan"))), "finite"),
        (_by_hand().replace(b".counts", b".coumts"), "blk.0.attn_q.weight: sums without counts"),
        (_by_hand().replace(b".in_sum2", b".in_sums"), "holds no importance of any tensor"),
        (_by_hand().replace(b"general.type", b"general.tipe"), "not an importance matrix"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.imatrix"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_imatrix(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing: cannot be read"):
        read_imatrix(tmp_path / "nothing")
