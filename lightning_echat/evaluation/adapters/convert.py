"""`echat data items`: items of another benchmark's format as an item set of ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_echat.command_errors import nearest
from lightning_echat.contracts import SampleRejected, UserError
from lightning_echat.data.files import write_atomically
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.evaluation.adapters import echomind, voicebench


def items(source: Path, *, format: Literal["voicebench", "echomind"], out: Path, subset: str = "") -> None:
    """Write the items of another benchmark as the JSON lines that echat evaluate reads.

    Args:
        source: Its file: JSON lines of VoiceBench with the audio saved beside them, or script_info_….json of EchoMind.
        format: voicebench or echomind.
        out: The item set, NAME.jsonl, in the folder of `source`: paths of audio are relative to it.
        subset: Of VoiceBench, for instance commoneval or openbookqa.
    """
    if not source.is_file():
        raise UserError(f"no file {source}")
    if out.suffix != ".jsonl" or out.resolve().parent != source.resolve().parent:
        raise UserError(f"--out {out}: must be NAME.jsonl in {source.parent}, as paths of audio are relative to it")
    if format == "voicebench" and subset not in voicebench.KINDS:
        hint = nearest(subset, voicebench.KINDS)
        raise UserError(f"--subset {subset!r} is none of VoiceBench: {', '.join(voicebench.KINDS)}{hint}")
    counter = SkipCounter()
    written = []
    rows = _lines(source) if format == "voicebench" else _objects(source)
    make = partial(voicebench.item_row, subset=subset) if format == "voicebench" else _echomind_row
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, dict):
                raise SampleRejected("broken JSON", "no object")
            written.append(make(row, number=number))
            counter.keep()
        except SampleRejected as error:
            counter.reject(error, shard=source.name, key=f"item {number}")
    if not written:
        raise UserError(f"{source} holds nothing that can be used: {counter.summary()}")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    write_atomically(out, content=text.encode())
    skipped = f"; {counter.summary()}" if counter.skipped else ""
    Console().print(f"{out}: {len(written)} items{skipped}", highlight=False, soft_wrap=True)


def _echomind_row(row: dict[str, Any], *, number: int) -> dict[str, Any]:
    return echomind.item_row(row)


def _lines(path: Path) -> Iterator[Any]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield None


def _objects(path: Path) -> Iterable[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds no list of scripts")
    return rows
