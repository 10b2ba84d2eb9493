"""Where and with what a result was made: stands beside every figure of a report."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

PACKAGES: tuple[str, ...] = (
    "lightning-echat",
    "torch",
    "torchaudio",
    "lightning",
    "transformers",
    "peft",
    "torchmetrics",
    "webdataset",
    "wandb",
    "numpy",
    "jiwer",
)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; a package that is absent is said to be."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def machine_facts() -> dict[str, Any]:
    """Cores this process may use, memory, platform and the names of the GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu_cores": _usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "torch_threads": torch.get_num_threads(),
    }


def _usable_cores() -> int:
    """Cores that the scheduler grants this process, which in a container may be fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    """Physical memory, None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(total / 2**30, 1)
