"""Converting holds one tensor at a time, and what it writes is an ordinary safetensors file."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_echat.checkpoints.planned_tensors import (
    PlannedTensor,
    merge_lora,
    open_tensors,
    write_safetensors,
    write_sharded,
)
from lightning_echat.contracts import UserError


def anonymous_memory() -> int:
    """Bytes of this process that are no mapped file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_library_reads_back_what_was_written(tmp_path):
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "wide": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "turned": torch.randn(4, 6).T,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    write_safetensors(tmp_path / "a.safetensors", {name: PlannedTensor.of(t) for name, t in tensors.items()})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_only_one_tensor_exists_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def make() -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    plans = {str(i): PlannedTensor(shape=(1000,), dtype=torch.float32, make=make) for i in range(6)}
    write_sharded(tmp_path, plans, max_shard_size="10KB")
    assert len(alive) == 6 and len(list(tmp_path.glob("*.safetensors"))) == 3
    # The one being made, and the one before until its name is taken over.
    assert most <= 2


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_checkpoint_is_mapped_and_not_read(tmp_path, name):
    tensors = {str(i): torch.ones(2_000_000) for i in range(8)}
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    del tensors
    before = anonymous_memory()
    found = open_tensors(tmp_path / name)
    total = sum(float(tensor.sum()) for tensor in found.values())
    assert total == 16_000_000
    assert anonymous_memory() - before < 16e6, "64 MB of weights went to memory of their own"


def test_low_rank_updates_are_merged_in_float32():
    weight, down, up = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    merged = merge_lora(PlannedTensor.of(weight.to(torch.bfloat16)), down, up, alpha=8)
    assert (merged.shape, merged.dtype) == ((6, 5), torch.bfloat16)
    wanted = (weight.to(torch.bfloat16).float() + 4 * up @ down).to(torch.bfloat16)
    assert torch.equal(merged.make(), wanted)


def test_parts_are_joined_in_order():
    parts = [PlannedTensor.of(torch.full((rows, 2), float(rows))) for rows in (1, 3)]
    joined = PlannedTensor.joined(parts)
    assert joined.shape == (4, 2) and joined.num_bytes == 32
    assert joined.make()[:, 0].tolist() == [1, 3, 3, 3]


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04torn")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name, told in (
        ("a.safetensors", "cannot read"),
        ("a.pt", "cannot read"),
        ("list.pt", "holds a list"),
        ("gone.pt", "no checkpoint at"),
    ):
        with pytest.raises(UserError, match=told):
            open_tensors(tmp_path / name)


@pytest.mark.parametrize("listed", ["../a.safetensors", "gone.safetensors"])
def test_an_index_never_leaves_its_folder(tmp_path, listed):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": listed}}))
    with pytest.raises(UserError, match="which is not in the folder"):
        open_tensors(folder)
