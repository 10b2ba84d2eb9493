"""Runs as a cluster starts them: torchrun and the command line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_echat.testing import tiny_network_config
from lightning_echat.tokens.dialogue_template import TokensConfig
from tests.ranks import free_port
from tests.slurm_stub import SlurmStub, filled_in
from tests.tiny_training import recorded

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def write_config(
    folder: Path, tokens: TokensConfig, *callbacks: dict[str, Any], num_nodes: int, devices: int, **sharding: Any
) -> Path:
    """An experiment of four optimizer steps that saves at each."""
    sharding = {"timeout": "0:01:00", **sharding}
    saving = {"save_last": "link", "save_top_k": -1, "every_n_train_steps": 1}
    trainer = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": devices,
        "num_nodes": num_nodes,
        "max_steps": 4,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,
        "strategy": {"class_path": "lightning_echat.parallel.ShardedStrategy", "init_args": sharding},
        "callbacks": [
            {"class_path": "callbacks.stage_checkpoint.StageCheckpoint", "init_args": saving},
            {"class_path": "tests.tiny_training.Record", "init_args": {"folder": str(folder)}},
            *callbacks,
        ],
    }
    stage = {"tokens": asdict(tokens), "network": asdict(tiny_network_config())}
    config = {
        "trainer": trainer,
        "model": {"class_path": "lightning_echat.stages.empathy.EmpathyStage", "init_args": stage},
        "data": {"class_path": "tests.tiny_training.TinyData"},
    }
    folder.mkdir(parents=True)
    path = folder / "experiment.yaml"
    # Through JSON's types: tuples have no plain YAML.
    path.write_text(yaml.safe_dump(yaml.load(yaml.dump(config), _PlainLoader)))
    return path


class _PlainLoader(yaml.SafeLoader):
    """Reads Python's tuples as lists."""


def _as_list(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _as_list)


def torchrun(config: Path, *options: str) -> list[str]:
    """The documented launch."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    fit = ["fit", "--config", str(config), "--ckpt_path", "last"]
    return [*launcher, "--no-python", sys.executable, "-c", "from lightning_echat.cli import main; main()", *fit]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": paths}
    return {**os.environ, **alone, **more}


def launch(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = torchrun(config, "--standalone", "--nproc-per-node", "2", *options)
    return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def calm(tmp_path_factory, tokens: TokensConfig) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    ended = launch(write_config(folder, tokens, num_nodes=1, devices=2))
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize(
    ("moment", "background"), [("step", False), ("checkpoint", False), ("checkpoint", True), ("validation", False)]
)
def test_torchrun_brings_a_killed_rank_back_and_the_run_ends_as_if_undisturbed(
    tmp_path, tokens, calm, moment, background
):
    """kill -9 of one rank; the restarted ranks go on from the last whole checkpoint, to the bit."""
    arguments = {"mark": str(tmp_path / "mark"), "moment": moment}
    kill = {"class_path": "tests.tiny_training.KillOnce", "init_args": arguments}
    config = write_config(tmp_path / "killed", tokens, kill, num_nodes=1, devices=2, async_saving=background)
    killed = launch(config, "--max-restarts", "1")
    assert killed.returncode == 0, killed.stderr[-2000:]
    assert (tmp_path / "mark").exists()
    assert "echat: rank 0 was left alone" in killed.stderr
    whole, weights = recorded(calm)
    rest, ends = recorded(tmp_path / "killed")
    assert len(whole) == 4 and rest == whole[2:]
    for name, tensor in weights.items():
        assert torch.equal(ends[name], tensor), name
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*")), "a half checkpoint is left"


def test_two_launches_as_on_two_nodes_train_as_one(tmp_path, tokens, calm):
    """Static rendezvous: a launcher a node, and replicas across nodes."""
    config = write_config(tmp_path / "nodes", tokens, num_nodes=2, devices=1)
    port = str(free_port())
    both = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    words = [[*torchrun(config, *both, "--node-rank", rank), "--trainer.strategy.replicas", "nodes"] for rank in "01"]
    nodes = [subprocess.Popen(each, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) for each in words]
    said = [node.communicate(timeout=400)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:]
    assert recorded(tmp_path / "nodes")[0] == pytest.approx(recorded(calm)[0], rel=1e-6)


ECHAT = f"""#!/bin/bash
exec {sys.executable} -c 'from lightning_echat.cli import main; main()' "$@"
"""


def test_a_slurm_job_whose_time_is_over_saves_goes_back_into_the_queue_and_ends_as_if_undisturbed(
    tmp_path, tokens, calm
):
    """The batch script itself, two nodes of one task each; the tasks get the signal that the script asks for."""
    wait = {"class_path": "tests.tiny_training.WaitOnce", "init_args": {"mark": str(tmp_path / "mark")}}
    config = write_config(tmp_path / "run", tokens, wait, num_nodes=2, devices=1)
    slurm = SlurmStub(tmp_path / "slurm", environment(MASTER_PORT=str(free_port())), {"echat": ECHAT})
    script = filled_in(ROOT / "experiments/trainer/slurm.sbatch", tmp_path / "job", nodes=2, ntasks_per_node=1)
    marks = [tmp_path / f"mark{rank}" for rank in (0, 1)]

    def in_the_third_step() -> bool:
        return all(mark.exists() for mark in marks)

    def go_on() -> None:
        for mark in marks:
            mark.unlink()

    codes = slurm.sbatch(script, "--config", str(config), ends_soon=in_the_third_step, then=go_on, within=300)
    assert codes == [143, 0], "\n".join(slurm.said(start)[-2000:] for start in range(len(codes)))
    assert slurm.said(0).count("SIGTERM: finishing the step, then saving") == 1
    # The step in which the signal came was finished and saved.
    assert recorded(tmp_path / "run")[0] == recorded(calm)[0][3:]
    for name, tensor in recorded(calm)[1].items():
        assert torch.equal(recorded(tmp_path / "run")[1][name], tensor), name


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two hosts with a wire between them: name -> address. Needs root."""
    addresses = {"echatA": "10.77.0.1", "echatB": "10.77.0.2"}
    try:
        for host in addresses:
            ip(f"netns add {host}")
        ip("link add echatA0 netns echatA type veth peer name echatB0 netns echatB")
        for host, address in addresses.items():
            ip(f"-n {host} addr add {address}/24 dev {host}0")
            ip(f"-n {host} link set {host}0 up")
            ip(f"-n {host} link set lo up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    else:
        yield addresses
    finally:
        for host in addresses:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def on_host(host: str, address: str, config: Path, log: Path) -> subprocess.Popen[bytes]:
    """The launch for several nodes, tried again until it ends well."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "test"]
    rendezvous += ["--rdzv-conf", f"is_host={int(host == 'echatA')}", "--local-addr", address]
    words = torchrun(config, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous)
    again = f"until {shlex.join(words)}; do sleep 1; done"
    inside = ["ip", "netns", "exec", host, "bash", "-c", again]
    # A session of its own, so that the loop and all that it started can be ended together.
    return subprocess.Popen(
        inside,
        cwd=ROOT,
        env=environment(GLOO_SOCKET_IFNAME=f"{host}0"),
        stderr=log.open("wb"),
        start_new_session=True,
    )


def until(there: Callable[[], bool], *, within: float, else_say: Callable[[], str]) -> None:
    ends = time.monotonic() + within
    while not there():
        assert time.monotonic() < ends, else_say()
        time.sleep(0.2)


def test_a_host_that_is_cut_off_and_comes_back_trains_on_as_if_nothing_had_been(tmp_path, tokens, calm, hosts):
    """Two hosts with addresses of their own; the wire is cut in the third step, until both have given up waiting."""
    wait = {"class_path": "tests.tiny_training.WaitOnce", "init_args": {"mark": str(tmp_path / "mark")}}
    config = write_config(tmp_path / "run", tokens, wait, num_nodes=2, devices=1, timeout="0:00:10")
    logs = {host: tmp_path / f"{host}.log" for host in hosts}

    def said() -> str:
        return "\n".join(f"{host}: {log.read_text()[-1500:]}" for host, log in logs.items())

    runs = [on_host(host, address, config, logs[host]) for host, address in hosts.items()]
    marks = [tmp_path / f"mark{rank}" for rank in (0, 1)]
    try:
        until(lambda: all(mark.exists() for mark in marks), within=120, else_say=said)
        ip("-n echatB link set echatB0 down")
        for mark in marks:
            mark.unlink()
        gave_up = ("waited in vain", "was left alone")
        logged = lambda: [log.read_text() for log in logs.values()]  # noqa: E731
        until(lambda: all(any(say in log for say in gave_up) for log in logged()), within=90, else_say=said)
        ip("-n echatB link set echatB0 up")
        until(lambda: all(run.poll() is not None for run in runs), within=240, else_say=said)
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGTERM)
    assert [run.returncode for run in runs] == [0, 0]
    assert recorded(tmp_path / "run")[0] == recorded(calm)[0][2:]
