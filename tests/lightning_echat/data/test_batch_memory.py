"""All tensors of a batch lie in one storage, which is handed over whole."""

import pickle
from dataclasses import fields
from unittest import mock

import pytest
import torch

from lightning_echat.contracts import PackedBatch
from lightning_echat.data import batch_memory
from lightning_echat.data.batch_memory import HandedBatch, allocate
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.stream_helpers import source, training

FIELDS = {
    "flags": ((3, 5), torch.bool),
    "ids": ((2, 7), torch.int64),
    "none": ((0, 4), torch.float32),
    "mels": ((2, 16, 80), torch.float32),
}


def tensors(batch: PackedBatch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def loader(tmp_path, tokens):
    def make(num_workers: int) -> TrainingLoader:
        return training(tokens, [source(tmp_path / "shards")], workers=num_workers)

    write_dummy_shards(tmp_path / "shards", shards=2, samples_per_shard=4)
    return make


def test_tensors_are_zeros_in_one_storage_and_do_not_overlap():
    made = allocate(FIELDS)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()} == FIELDS
    assert len({tensor.untyped_storage().data_ptr() for tensor in made.values()}) == 1
    assert all(not tensor.any() for tensor in made.values())
    for number, tensor in enumerate(made.values(), start=1):
        tensor.fill_(number % 2 if tensor.dtype == torch.bool else number)
    assert made["flags"].all() and (made["ids"] == 2).all() and (made["mels"] == 4).all()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in made.values() if tensor.numel())


def test_what_is_handed_over_is_the_batch(loader):
    batch = next(iter(loader(0)))
    assert len(tensors(batch)) > 10
    handed = pickle.loads(pickle.dumps(HandedBatch.of(batch))).batch()
    assert tensors(handed).keys() == tensors(batch).keys()
    assert all(torch.equal(tensor, tensors(batch)[name]) for name, tensor in tensors(handed).items())
    assert handed.references == batch.references


def test_a_batch_of_tensors_from_elsewhere_is_not_handed_over_in_part(loader):
    batch = next(iter(loader(0)))
    batch.labels = batch.labels.clone()
    with pytest.raises(AssertionError):
        HandedBatch.of(batch)


def test_a_worker_process_hands_over_one_piece_of_shared_memory(loader):
    # What is not shared to begin with would be copied on its way, which the receiver cannot tell.
    with mock.patch.object(batch_memory, "get_worker_info", return_value=object()):
        assert all(tensor.is_shared() for tensor in allocate(FIELDS).values() if tensor.numel())
    batch = next(iter(loader(1)))
    assert all(tensor.is_shared() for tensor in tensors(batch).values() if tensor.numel())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(batch).values()}) == 1
    assert not next(iter(loader(0))).input_ids.is_shared()
