"""What stands for `echat fit` in the tests of sweeps; it imports next to nothing, as every trial imports it."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

TYPES = {"model.lr": float, "model.layers": int, "pause": float, "trainer.default_root_dir": str, "ckpt_path": str}


def resolve(words: list[str]) -> dict[str, Any]:
    """What stands for the parser: options of known types; a config file that is JSON holds some of them."""
    assert words[0] == "fit"
    values: dict[str, Any] = {"model.lr": 0.1, "model.layers": 1, "pause": 0.0}
    rest = words[1:]
    while rest:
        name, equals, value = rest.pop(0).removeprefix("--").partition("=")
        value = value if equals else rest.pop(0)
        given = json.loads(Path(value).read_text()) if value.endswith(".json") else {name: value}
        for key, entry in given.items():
            if key == "config":
                continue
            if key not in TYPES:
                _refuse(f"unknown key {key!r}")
            if TYPES[key] is int and (isinstance(entry, float) or not str(entry).isdigit()):
                _refuse(f"{key}: expected int, got {entry!r}")
            values[key] = TYPES[key](entry)
    return {
        **values,
        "trainer": {"logger": [{"class_path": "CSVLogger"}]},
        "data": {"init_args": {"validation": {"dev": {}}}},
    }


def _refuse(message: str) -> NoReturn:
    from lightning_echat.contracts import UserError

    raise UserError(message)


def toy_command(words: list[str]) -> None:
    """What stands for `echat fit`: nine validations, of which an earlier attempt may have done some."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    values = resolve(words)
    folder = Path(values["trainer.default_root_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if Path("fail.txt").exists():
        # Past pytest, which holds sys.stderr.
        os.write(2, b"echat: error: out of luck\n")
        raise SystemExit(1)
    loss = abs(math.log10(values["model.lr"]) + 2) + values["model.layers"]
    done = len(list(folder.glob("metrics*.csv")))
    with (folder / "metrics.csv").open("a", newline="") as stream:
        writer = csv.writer(stream)
        if not done:
            writer.writerow(["step", "val/dev/loss"])
        for step in range(9):
            writer.writerow([step, loss + 1 / (step + 1)])
            stream.flush()
            time.sleep(values["pause"])
