"""The network over many processes: how it is cut, and checkpoints that every rank writes its part of.

Sharding is PyTorch's FSDP2 (`fully_shard`) on Lightning's `ModelParallelStrategy`. The stage is the one root, and the
steps that Lightning and callbacks call are its entries, as with DDP. Its own unit holds what is no block: embeddings
and heads (tied in many models, and called once per chunk by the loss), norms and convolutions. Whole while a step
runs, they are gathered once a step. Each block of the encoder, the adapter and the language model is a unit of its own,
gathered when it computes. With tensor parallelism the blocks of the language model are cut over the ranks of a group
first, and by FSDP over the groups; all else is sharded over all ranks as ever. `docs/distributed.md` says when to use
which strategy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.nn.deferred_init import to_memory
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.nn.sharded_files import check_sharded
from lightning_echat.nn.sharded_saving import BackgroundSaving, commit, discard, problem_of, shards_of, write_rest
from lightning_echat.nn.tensor_parallel import cut_language_model


class ShardedStrategy(ModelParallelStrategy):
    """FSDP: parameters, gradients and optimizer state are spread over the ranks.

    Args:
        replicas: Copies of the sharded model (HSDP). 1 shards over all ranks; "nodes" shards within a node and
            replicates across nodes, so that parameters never travel between nodes and only gradients do.
        tensor_parallel: Ranks, next to each other, that compute every batch together: the language model's blocks are
            cut over them. Must divide the heads of the language model, and the GPUs of a node.
        compute: Type of parameters and activations in a step. Master weights, gradients' sums and the optimizer stay
            float32, as do the losses; norms compute in float32 on what they are given.
        cpu_offload: Keep shards and optimizer state in the host's memory. Slow; for models that fit no other way.
        async_saving: Train on while a checkpoint is written, from a copy of the shards in the host's memory. It gets
            its name, and what it replaces is deleted, once all of it is on disk.
        timeout: A collective call that other ranks do not join fails after this long, on every rank.
        process_group_backend: gloo or nccl; empty for the device's own.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        tensor_parallel: int = 1,
        compute: Literal["float32", "bfloat16"] = "float32",
        cpu_offload: bool = False,
        async_saving: bool = False,
        timeout: timedelta = timedelta(minutes=10),
        process_group_backend: str | None = None,
    ) -> None:
        # Lightning's own default is tensor parallel over a node: every rank would be given the same batch.
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=tensor_parallel,
            timeout=timeout,
            process_group_backend=process_group_backend,
        )
        self.replicas = replicas
        self.tensor_parallel = tensor_parallel
        self.compute = compute
        self.cpu_offload = cpu_offload
        self.async_saving = async_saving
        self._time_limit = timeout
        self._saving: BackgroundSaving | None = None
        self._saving_group: dist.ProcessGroup | None = None
        self._shard_mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Connect the ranks, and lay them out as replicas of shards."""
        ranks = self.num_nodes * self.num_processes
        replicas = self.num_nodes if isinstance(self.replicas, str) else self.replicas
        self._check_layout(ranks, replicas)
        self._data_parallel_size = ranks // self.tensor_parallel
        if self.cpu_offload and self.on_gpu and self._process_group_backend is None:
            # The gradient's norm is then summed in the host's memory, which NCCL does not reach.
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()
        kind = self.root_device.type
        if replicas == 1:
            self._shard_mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
        else:
            shape = (replicas, ranks // replicas)
            self._shard_mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))

    def _check_layout(self, ranks: int, replicas: int) -> None:
        for what, number in (("replicas", replicas), ("tensor_parallel", self.tensor_parallel)):
            if number < 1 or ranks % number:
                raise UserError(f"strategy.{what} is {number}, which does not divide the {ranks} processes of this run")
        if replicas > 1 and self.tensor_parallel > 1:
            raise UserError("strategy.replicas and strategy.tensor_parallel do not go together; leave one at 1")
        if self.num_processes % self.tensor_parallel:
            raise UserError(
                f"strategy.tensor_parallel is {self.tensor_parallel}, which does not divide the {self.num_processes} "
                f"processes of a node; a group that spans nodes would wait for the network in every layer"
            )
        if (precision := self.precision_plugin.precision) != "32-true":
            raise UserError(
                f"trainer.precision is {precision}, which would round the weights that a sharded run keeps; leave it "
                f"at 32-true and give strategy.compute: bfloat16"
            )

    @property
    def group(self) -> DeviceMesh:
        """The ranks that compute this one's batches together with it."""
        return self.device_mesh["tensor_parallel"]

    def shard(self, stage: L.LightningModule, model: EChatModel, *, entries: tuple[str, ...]) -> None:
        """Cut the network of a stage. Parameters must be marked as trained or frozen by now; they get memory here.

        Args:
            stage: Becomes the root.
            model: Its network, on the meta device.
            entries: The stage's methods that run the network.
        """
        assert self._shard_mesh is not None
        # Our own modules cast what they are given; a cast by the root would copy the batch.
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, self.compute), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        options: dict[str, Any] = {"mesh": self._shard_mesh, "mp_policy": policy}
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.on_gpu) if self.cpu_offload else OffloadPolicy()
        if self.tensor_parallel > 1:
            cut_language_model(model.lm.causal_lm, self.group)
            over_groups: dict[str, Any] = options | {"mesh": self.device_mesh["data_parallel"]}
            for block in language_blocks(model):
                fully_shard(block, **over_groups)
        for block in blocks(model):
            if not isinstance(block, FSDPModule):
                fully_shard(block, **options)
        fully_shard(stage, **options)
        # On the GPU at once: the host never holds the shards.
        to_memory(stage, torch.device("cpu") if self.cpu_offload else self.root_device)
        for entry in entries:
            register_fsdp_forward_method(stage, entry)
        # One that is left whole would be trained by each rank on its own, without a word.
        whole = [name for name, parameter in stage.named_parameters() if not isinstance(parameter, DTensor)]
        assert not whole, f"not sharded: {whole}"

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks compute on GPUs."""
        return self.root_device.type == "cuda"

    def model_to_device(self) -> None:
        """Move what is not there yet; offloaded shards stay where they are, buffers go."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Every rank writes its shards to a folder of another name, which is renamed once all is on disk.

        Raises:
            UserError: On every rank, where one of them could not write. What was saved before is untouched.
        """
        self.wait_for_saving()
        path = Path(self.broadcast(str(filepath)))
        partial = path.with_name(f".{path.name}.partial")
        problem = f"cannot save checkpoint {path}"
        with self._together(problem, otherwise=lambda: discard(partial)):
            if self.is_global_zero:
                discard(partial)
                partial.mkdir(parents=True)
        if self.async_saving:
            with self._together(problem, otherwise=lambda: discard(partial)):
                if self.is_global_zero:
                    write_rest(checkpoint, partial)
            with self._together(problem, otherwise=lambda: discard(partial)):
                self._saving = self._start_saving(checkpoint, partial, path)
            return
        with self._together(problem, otherwise=lambda: discard(partial)):
            super().save_checkpoint(checkpoint, partial, storage_options)
        with self._together(problem, otherwise=lambda: discard(partial)):
            if self.is_global_zero:
                commit(partial, path)

    def _start_saving(self, checkpoint: dict[str, Any], partial: Path, path: Path) -> BackgroundSaving:
        """Copy the shards and write them in a thread, with collective calls of its own that meet no others."""
        if self._saving_group is None:
            group: Any = dist.new_group(backend="gloo", timeout=self._time_limit)
            self._saving_group = group
        written = async_save(shards_of(checkpoint), checkpoint_id=partial, process_group=self._saving_group)
        assert isinstance(written, Future)
        return BackgroundSaving(written, partial, path, commits=self.is_global_zero)

    def wait_for_saving(self) -> None:
        """Until the checkpoint that is being written in the background is whole: a collective call.

        Raises:
            UserError: On every rank, where one of them could not write it. What was saved before is untouched.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._together(f"cannot save checkpoint {saving.path}", otherwise=lambda: discard(saving.partial)):
                saving.committed.result()

    def once_saved(self, action: Callable[[], None]) -> None:
        """Call `action` on rank 0 once what is being saved is whole; at once where nothing is, never where it fails."""
        if self.is_global_zero:
            if self._saving is None:
                action()
            else:
                self._saving.then(action)

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Delete a checkpoint, but not before what takes its place is whole."""
        self.once_saved(lambda: super(ShardedStrategy, self).remove_checkpoint(Path(filepath)))

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Each rank reads its part, whatever the number of ranks that wrote; a single file is read too."""
        path = Path(self.broadcast(str(checkpoint_path)))
        loaded: dict[str, Any] = {}
        problem = f"cannot load checkpoint {path}"
        with self._together(problem):
            if path.is_dir():
                check_sharded(path)
            elif not path.is_file():
                raise FileNotFoundError("it is not there; all nodes must see the run's folder")
        with self._together(problem):
            loaded = super().load_checkpoint(path, weights_only)
        return loaded

    @contextmanager
    def _together(self, what: str, *, otherwise: Callable[[], None] | None = None) -> Iterator[None]:
        """Ends on all ranks alike: when one fails, all raise and name it; none waits for a rank that is gone.

        Args:
            what: Opens the message.
            otherwise: What rank 0 does after a failure.
        """
        problem, own = "", None
        try:
            yield
        except (OSError, RuntimeError, ValueError, KeyError, UserError, CheckpointException) as error:
            own, problem = error, problem_of(error, self.global_rank)
        problems: list[str] = [problem] * self.world_size
        if dist.is_initialized():
            dist.all_gather_object(problems, problem)
        if any(problems):
            if otherwise is not None and self.is_global_zero:
                otherwise()
            raise UserError(f"{what}: {next(text for text in problems if text)}") from own


def blocks(model: EChatModel) -> list[nn.Module]:
    """The repeated blocks of the network in the order in which they compute: what is sharded and compiled by itself."""
    return [*model.encoder.layers, *model.encoder.convolutions, *model.adapter.layers, *language_blocks(model)]


def language_blocks(model: EChatModel) -> list[nn.Module]:
    """The layers of the language model, whatever its family calls them."""
    llm = model.lm.causal_lm
    count = llm.config.num_hidden_layers
    for module in llm.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(f"{type(llm).__name__} has no list of its {count} layers, so it cannot be sharded; train it whole")


def compile_blocks(model: EChatModel) -> None:
    """Let torch.compile translate each block when it is first called; names of weights stay."""
    for block in blocks(model):
        block.compile()


def sharded(trainer: Trainer | None) -> ShardedStrategy | None:
    """The strategy of a run whose network is sharded.

    Raises:
        UserError: It is another that would have the stage cut itself: each rank would train a whole by itself.
    """
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        raise UserError(
            "trainer.strategy is ModelParallelStrategy, which leaves the network whole here; "
            "use lightning_echat.parallel.ShardedStrategy, and its tensor_parallel where it is asked for"
        )
    return strategy if isinstance(strategy, ShardedStrategy) else None


def first_of_group(trainer: Trainer) -> bool:
    """Whether no rank of a lower number has the same batches: what ranks add up is counted by those only."""
    return trainer.global_rank % _group_size(trainer) == 0


def data_share(trainer: Trainer) -> tuple[int, int]:
    """Which share of the data this rank computes, and of how many: the ranks of a group compute the same one."""
    size = _group_size(trainer)
    return trainer.global_rank // size, trainer.world_size // size


def _group_size(trainer: Trainer) -> int:
    strategy = sharded(trainer)
    return 1 if strategy is None else strategy.tensor_parallel


def check_same_batch(trainer: Trainer | None, batch: PackedBatch) -> None:
    """Stop where ranks that compute a batch together were not given the same: a collective call of their group.

    Raises:
        UserError: On every rank of the group.
    """
    strategy = sharded(trainer)
    if strategy is None or strategy.tensor_parallel == 1:
        return
    ids = batch.input_ids.flatten()
    places = torch.arange(1, len(ids) + 1, device=ids.device)
    clips = batch.log_mel_lengths
    own = torch.stack([places[-1:].sum(), (ids * places).sum(), clips.new_tensor(len(clips)), clips.sum()])
    others = [torch.empty_like(own) for _ in range(strategy.tensor_parallel)]
    dist.all_gather(others, own, group=strategy.group.get_group())
    if any(not torch.equal(own, other) for other in others):
        raise UserError(
            f"the {strategy.tensor_parallel} ranks of a tensor-parallel group read different batches, as where one of "
            f"them cannot read a file; start again from the last checkpoint"
        )


def reshard(stage: L.LightningModule) -> None:
    """Give up what the root still holds of the whole after a step without backward."""
    if isinstance(stage, FSDPModule):
        stage.reshard()
