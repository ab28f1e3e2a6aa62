"""The streaming writer against the library's own reader: words, alignment, shards, full disks."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.errors import DataError
from quantkit.formats import safetensors_shard
from quantkit.formats.safetensors_stream import DTYPE_NAMES, SafetensorsStream, header_bound
from quantkit.model.safetensors_file import ALL_DTYPES, SafetensorsFile


def sample_tensors() -> dict[str, Tensor]:
    """Every dtype in sizes that do and do not fill whole words, a scalar, an empty tensor, a name that is not ASCII."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for index, dtype in enumerate(DTYPE_NAMES):
        for columns in (1, 3, 8):
            values = torch.randint(0, 2, (index + 1, columns), generator=generator)
            tensors[f"layer.{DTYPE_NAMES[dtype]}.{columns}"] = values.to(dtype)
    tensors["scalar"] = torch.tensor(7, dtype=torch.uint8)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["größe"] = torch.randn(5, 5, generator=generator)
    tensors["transposed"] = torch.randn(4, 6, generator=generator).T
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], names: list[str] | None = None, **settings: int) -> list[Path]:
    folder.mkdir()
    stream = SafetensorsStream(folder, list(tensors) if names is None else names, **settings)
    for name, tensor in tensors.items():
        assert stream.add({name: tensor}) == tensor.numel() * tensor.element_size()
    return stream.finish()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = sample_tensors()
    paths = write(tmp_path / "out", tensors)
    assert [path.name for path in paths] == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same(load_file(paths[0]), tensors)


def test_every_tensor_is_aligned_to_its_values(tmp_path: Path) -> None:
    tensors = sample_tensors()
    (path,) = write(tmp_path / "out", tensors)
    file = SafetensorsFile(path, ALL_DTYPES)  # refuses gaps and overlaps
    for name, entry in file.entries.items():
        assert entry.start % tensors[name].element_size() == 0, name
        assert torch.equal(file.read(name), tensors[name])


def test_metadata_and_header_room(tmp_path: Path) -> None:
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": torch.zeros(8, 8) for index in range(50)}
    (path,) = write(tmp_path / "out", tensors)
    content = path.read_bytes()
    room = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + room]
    assert json.loads(text)["__metadata__"] == {"format": "pt"}
    assert room % 8 == 0
    assert len(text.rstrip(b" ")) <= header_bound(tensors) <= room
    assert room - len(text.rstrip(b" ")) < 50 * len(tensors)  # digits that sizes and offsets did not need


def test_same_tensors_give_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", sample_tensors(), max_shard_bytes=300)
    second = write(tmp_path / "b", sample_tensors(), max_shard_bytes=300)
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_rows_in_parts_give_the_same_file_as_whole_tensors(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in sample_tensors().items() if tensor.dim() == 2 and len(tensor)}
    whole = write(tmp_path / "whole", tensors, max_shard_bytes=600)
    (tmp_path / "parts").mkdir()
    stream = SafetensorsStream(tmp_path / "parts", list(tensors), max_shard_bytes=600)
    for name, tensor in tensors.items():
        for first, rows in zip(range(0, len(tensor), 2), tensor.split(2), strict=True):
            stored = stream.add_rows(name, rows, tuple(tensor.shape), first)
            assert stored == rows.numel() * rows.element_size()
    parts = stream.finish()
    assert len(parts) > 2 and [path.name for path in parts] == [path.name for path in whole]
    assert [path.read_bytes() for path in parts] == [path.read_bytes() for path in whole]


def test_a_header_that_outgrows_its_room_costs_a_copy_only(tmp_path: Path) -> None:
    tensors = sample_tensors()
    (path,) = write(tmp_path / "out", tensors, names=[])
    assert_same(load_file(path), tensors)
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_what_waits_for_the_end_may_wait_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_memory,) = write(tmp_path / "a", sample_tensors())
    monkeypatch.setattr(safetensors_shard, "_TAIL_IN_MEMORY", 16)
    (on_disk,) = write(tmp_path / "b", sample_tensors())
    assert in_memory.read_bytes() == on_disk.read_bytes()


def test_shards_hold_what_they_may_and_groups_stay_together(tmp_path: Path) -> None:
    groups = [
        {f"{index}.weight": torch.full((10, 4), index), f"{index}.scale": torch.full((3,), index, dtype=torch.int8)}
        for index in range(7)
    ]  # 320 + 3 bytes each
    groups.insert(3, {"large": torch.arange(500)})
    stream = SafetensorsStream(tmp_path, [name for group in groups for name in group], max_shard_bytes=700)
    for group in groups:
        stream.add(group)
    paths = stream.finish()
    names = [f"model-{index:05d}-of-00005.safetensors" for index in range(1, 6)]
    assert [path.name for path in paths] == [*names, "model.safetensors.index.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == 7 * 323 + 4000
    found: dict[str, Tensor] = {}
    for path in paths[:-1]:
        shard = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in shard)
        size = sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
        assert size <= 700 or list(shard) == ["large"]
        found |= shard
    assert_same(found, {name: tensor for group in groups for name, tensor in group.items()})
    for number in range(7):
        assert index["weight_map"][f"{number}.weight"] == index["weight_map"][f"{number}.scale"]


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    stream = SafetensorsStream(tmp_path, ["a"])
    stream.add({"a": torch.zeros(2)})
    with pytest.raises(AssertionError, match="written twice: a"):
        stream.add({"a": torch.zeros(2)})


def fail_with(number: int):  # type: ignore[no-untyped-def]
    def fail(*_: object) -> None:
        raise OSError(number, "as the system says it")

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    stream = SafetensorsStream(tmp_path, ["a"])
    monkeypatch.setattr(safetensors_shard, "_write", fail_with(number))
    with pytest.raises(DataError, match=r"no space left: needed 4\.0 MB more, free [\d.]+ MB") as caught:
        stream.add({"a": torch.zeros(1_000_000)})
    assert caught.value.exit_code == 3
    assert caught.value.hint is not None and "--out" in caught.value.hint


def test_other_failures_of_writing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SafetensorsStream(tmp_path, ["a"])
    stream.add({"a": torch.zeros(4)})
    monkeypatch.setattr(safetensors_shard, "_write", fail_with(errno.EIO))
    with pytest.raises(DataError, match="cannot be written: as the system says it"):
        stream.finish()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        """Takes three bytes a call, as a system may."""

        def __init__(self) -> None:
            self.content = b""

        def write(self, data: memoryview) -> int:
            self.content += bytes(data[:3])
            return min(3, len(data))

    file = Short()
    safetensors_shard._write(file, memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert file.content == b"0123456789"


@pytest.mark.parametrize("room", ["planned", "outgrown"])
@pytest.mark.parametrize("beyond", ["a few tensors", "finished"])
def test_another_stream_goes_on_behind_any_checkpoint(tmp_path: Path, room: str, beyond: str) -> None:
    tensors = sample_tensors()
    items = [{name: tensor} for name, tensor in tensors.items()]
    names = list(tensors) if room == "planned" else []
    whole = write(tmp_path / "whole", tensors, names, max_shard_bytes=300)
    assert len(whole) > 3
    for behind in range(1, len(items)):
        folder = tmp_path / str(behind)
        folder.mkdir()
        first = SafetensorsStream(folder, names, max_shard_bytes=300)
        told = []
        for number, item in enumerate(items[:behind], 1):
            first.add(item)
            if number % 5 == 0 or number == behind:
                told.append(json.loads(json.dumps(first.checkpoint())))
        for item in items[behind:] if beyond == "finished" else items[behind : behind + 4]:
            first.add(item)
        if beyond == "finished":
            first.finish()
        second = SafetensorsStream(folder, names, max_shard_bytes=300)
        second.restore(told)
        for item in items[behind:]:
            second.add(item)
        made = second.finish()
        assert [path.name for path in made] == [path.name for path in whole]
        assert [path.read_bytes() for path in made] == [path.read_bytes() for path in whole]
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in made)


def test_a_file_that_was_lost_is_named(tmp_path: Path) -> None:
    first = SafetensorsStream(tmp_path, ["a"])
    first.add({"a": torch.zeros(4000)})
    told = [first.checkpoint()]
    path = tmp_path / ".model-00001.partial"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"\.model-00001\.partial: does not hold what the journal"):
        SafetensorsStream(tmp_path, ["a"]).restore(told)
    path.unlink()
    with pytest.raises(DataError, match=r"\.model-00001\.partial: does not hold what the journal"):
        SafetensorsStream(tmp_path, ["a"]).restore(told)
