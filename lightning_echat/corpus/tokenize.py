"""`echat data tokenize`: speech codes for every reply of any number of shards.

Shards are copied member for member; only the sidecars change. One job is one shard, and a shard that exists is whole.
`tokenization.json` in the output folder says which tokenizer made the codes and, for each shard, what was tokenized and
what was skipped and why; a shard is done again only when its source is younger, or when it is not on that list.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lightning_echat.contracts import SAMPLE_RATE, SampleRejected, UserError
from lightning_echat.data.decoding import SIDECAR, ParsedDialogue, decode_waveform, parse_dialogue
from lightning_echat.data.files import TEMPORARY_SUFFIX, write_json
from lightning_echat.data.process_pool import count_cores, progress_bar, run_jobs
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shard_index import FOLDER_INDEX, write_index
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.tar_samples import StoredSample
from lightning_echat.data.writers import add_member
from lightning_echat.nn.token2wav.interface import SpeechTokenizer, load_speech_tokenizer, read_config
from lightning_echat.nn.token2wav.kmeans import CONFIG_NAME, fit_kmeans, log_mel_blocks

_MANIFEST = "tokenization.json"
_MAX_DIFFERENCE = 0.08
"""Seconds by which codes and audio may differ: two codes."""
_MAX_SECONDS = 60.0
_FIT_BLOCKS = 20_000
"""Blocks that a codebook is fitted on: 13 minutes of speech, which cost the fit a second or two."""
_TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """A shard to copy with codes."""

    source: Path
    target: Path
    speech_tokenizer: Path


@dataclass(slots=True, kw_only=True)
class ShardRecord:
    """What became of the turns of a shard.

    Attributes:
        dialogues: Dialogues copied.
        turns: Assistant turns that have codes now.
        codes: Codes written.
        skipped: Reason -> turns that got no codes.
        left_out: Reason -> dialogues that were not copied, since no reader could take them.
    """

    dialogues: int = 0
    turns: int = 0
    codes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)


def tokenize(
    shards_in: list[str] | str,
    out: Path,
    *,
    speech_tokenizer: Path,
    fit: bool = False,
    codebook_size: int = 256,
    workers: int | None = None,
    seed: int = 0,
) -> None:
    """Add speech codes to the assistant turns of shards.

    Args:
        shards_in: Folders, tar files or patterns. A folder is taken with all its subfolders of shards, whose names are
            kept, so that a corpus of several splits is tokenized at once.
        out: Folder for the new shards; what a run was interrupted in is continued.
        speech_tokenizer: Folder of the speech tokenizer.
        fit: Fit a k-means tokenizer first where that folder does not exist yet: on the split "train" if there is one,
            else on all shards.
        codebook_size: Number of codes of a tokenizer to fit.
        workers: Processes; one per core by default.
        seed: Of the fit.

    Raises:
        UserError: Shards or tokenizer are missing or damaged, or `out` holds codes of another tokenizer.
    """
    patterns = [shards_in] if isinstance(shards_in, str) else shards_in
    sources = find_shards(patterns, out=out)
    if fit:
        _fit_if_missing(speech_tokenizer, sources, codebook_size=codebook_size, seed=seed)
    load_speech_tokenizer(speech_tokenizer)
    records = _claim_folder(out, fingerprint=_fingerprint(speech_tokenizer))
    jobs = [
        ShardJob(source=source, target=out / name, speech_tokenizer=speech_tokenizer)
        for name, source in sources.items()
        if not _is_done(source, out / name, record=records.get(name.as_posix()))
    ]
    _run_jobs(jobs, out=out, records=records, workers=workers or count_cores())
    _finish(out, names=list(sources), records=records)


def find_shards(patterns: Sequence[str], *, out: Path) -> dict[Path, Path]:
    """Name under the output folder -> shard, for everything that the patterns name.

    Raises:
        UserError: A pattern matches nothing, two shards would get the same name, or a shard would replace itself.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        root = Path(pattern).expanduser()
        if root.is_dir():
            # The output may lie inside the corpus; it is no input of the next run.
            folders = [folder for folder in _shard_folders(root) if not folder.resolve().is_relative_to(out.resolve())]
            shards = [Path(path) for path in expand_shards([str(folder) for folder in folders or [root]])]
            named = {path.relative_to(root): path for path in shards}
        else:
            named = {Path(path).name: Path(path) for path in expand_shards([pattern])}
        for name, path in named.items():
            name = Path(name)
            if found.get(name, path) != path:
                raise UserError(f"{found[name]} and {path} would both become {out / name}; tokenize them apart")
            if (out / name).resolve() == path.resolve():
                raise UserError(f"{path} would be written over itself; choose another folder than {out}")
            found[name] = path
    return found


def _shard_folders(root: Path) -> list[Path]:
    """The folder and those below it that hold shards."""
    return sorted({path.parent for path in root.rglob("*.tar")})


def _fit_if_missing(folder: Path, sources: dict[Path, Path], *, codebook_size: int, seed: int) -> None:
    """Fit and save a tokenizer unless the folder holds one, which then must have the size asked for."""
    if (folder / CONFIG_NAME).exists():
        size = read_config(folder).get("codebook_size")
        if size != codebook_size:
            raise UserError(
                f"{folder} holds a tokenizer of {size} codes, not {codebook_size}: pass"
                f" --codebook_size {size} or choose another folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no speech tokenizer: choose another folder")
    paths = [path for name, path in sources.items() if name.parts[0] == _TRAIN] or list(sources.values())
    Random(seed).shuffle(paths)
    tokenizer = fit_kmeans(_collect_blocks(paths), codebook_size=codebook_size, seed=seed)
    tokenizer.save(folder)
    report = tokenizer.report
    Console().print(
        f"{folder}: {codebook_size} codes fitted on {report.blocks / tokenizer.code_rate / 60:.1f} min of speech,"
        f" perplexity {report.perplexity:.0f}, {report.dead} unused and moved",
        highlight=False,
        soft_wrap=True,
    )


def _collect_blocks(paths: list[Path]) -> Tensor:
    """[at most _FIT_BLOCKS, block] of assistant speech, from as many of the shards as it takes."""
    blocks: list[Tensor] = []
    missing = _FIT_BLOCKS
    for waveform in _assistant_audio(paths):
        blocks.append(log_mel_blocks(waveform)[:missing])
        missing -= len(blocks[-1])
        if not missing:
            break
    if not blocks:
        raise UserError("the shards hold no assistant audio to fit a speech tokenizer on")
    return torch.cat(blocks)


def _assistant_audio(paths: list[Path]) -> Iterator[Tensor]:
    """Waveforms of assistant turns; what cannot be read is left out here and counted when it is tokenized."""
    for path in paths:
        for stored in read_shard(ShardPart(path=str(path)), counter=SkipCounter()):
            try:
                parsed = parse_dialogue(stored)
            except SampleRejected:
                continue
            for turn, audio in zip(parsed.sample.turns, parsed.audio, strict=True):
                if turn.role == "assistant" and audio is not None:
                    try:
                        yield decode_waveform(audio, max_seconds=_MAX_SECONDS)
                    except SampleRejected:
                        continue


def _fingerprint(folder: Path) -> str:
    """sha256 over the files of a tokenizer folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != TEMPORARY_SUFFIX):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _claim_folder(out: Path, *, fingerprint: str) -> dict[str, Any]:
    """Make the output folder ours and return what an earlier run recorded of its shards.

    Raises:
        UserError: It holds something else, or codes of another tokenizer.
    """
    manifest = out / _MANIFEST
    if not manifest.exists():
        if out.exists() and (not out.is_dir() or any(out.rglob("*.tar"))):
            raise UserError(
                f"{out} exists and was not made by echat data tokenize (no {_MANIFEST}): choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        _write_manifest(out, fingerprint=fingerprint, records={})
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        made_with, records = content["speech_tokenizer"], dict(content["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} cannot be read ({error!r}); remove the folder and tokenize again") from error
    if made_with != fingerprint:
        raise UserError(f"{out} holds codes of another speech tokenizer: choose another folder, or remove it")
    for leftover in out.rglob(f"*.tar{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    return records


def _write_manifest(out: Path, *, fingerprint: str, records: dict[str, Any]) -> None:
    """Record which tokenizer was at work and what it has done."""
    shards = {name: records[name] for name in sorted(records)}
    write_json(out / _MANIFEST, content={"schema": 1, "speech_tokenizer": fingerprint, "shards": shards})


def _is_done(source: Path, target: Path, *, record: Any) -> bool:
    """Whether the target is recorded and not older than its source."""
    return record is not None and target.exists() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _run_jobs(jobs: list[ShardJob], *, out: Path, records: dict[str, Any], workers: int) -> None:
    """Do the jobs, on several processes where there are several; each is recorded as soon as it is done."""
    if not jobs:
        return
    fingerprint = _fingerprint(jobs[0].speech_tokenizer)
    with progress_bar("shards") as progress:
        bar = progress.add_task("tokenizing", total=len(jobs))
        for job, record in run_jobs(tokenize_shard, jobs, workers=workers):
            records[job.target.relative_to(out).as_posix()] = asdict(record)
            _write_manifest(out, fingerprint=fingerprint, records=records)
            progress.advance(bar)


def tokenize_shard(job: ShardJob) -> ShardRecord:
    """Copy a shard with codes in its sidecars.

    Raises:
        UserError: The shard is damaged: what follows the damage would be lost.
    """
    tokenizer = load_speech_tokenizer(job.speech_tokenizer)
    record, counter = ShardRecord(), SkipCounter()
    job.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.target.with_name(job.target.name + TEMPORARY_SUFFIX)
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for stored in read_shard(ShardPart(path=str(job.source)), counter=counter):
                try:
                    add_codes(stored, tokenizer=tokenizer, record=record)
                except SampleRejected as error:
                    _count(record.left_out, error.reason)
                    continue
                for suffix, content in stored.members.items():
                    add_member(tar, f"{stored.key}.{suffix}", content)
                record.dialogues += 1
        if counter.noticed:
            raise UserError(f"{job.source} cannot be copied whole: {counter.summary()}")
        temporary.replace(job.target)
    finally:
        temporary.unlink(missing_ok=True)
    return record


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1


def add_codes(stored: StoredSample, *, tokenizer: SpeechTokenizer, record: ShardRecord) -> None:
    """Put codes into the sidecar of a dialogue, in place; every assistant turn is either tokenized or counted.

    Codes that an assistant turn had before are of another tokenizer and are dropped when it gets no new ones.

    Raises:
        SampleRejected: The sidecar cannot be read.
    """
    parsed = parse_dialogue(stored)
    # The sidecar itself is edited, so that fields nobody here knows stay.
    sidecar = json.loads(stored.members[SIDECAR])
    for index, turn in enumerate(parsed.sample.turns):
        if turn.role != "assistant":
            continue
        sidecar["turns"][index].pop("codes", None)
        try:
            codes = _turn_codes(parsed, index, tokenizer=tokenizer)
        except SampleRejected as error:
            _count(record.skipped, error.reason)
            continue
        sidecar["turns"][index]["codes"] = codes
        record.turns += 1
        record.codes += len(codes)
    stored.members = {**stored.members, SIDECAR: json.dumps(sidecar, ensure_ascii=False).encode()}


def _turn_codes(parsed: ParsedDialogue, index: int, *, tokenizer: SpeechTokenizer) -> list[int]:
    """Codes of a turn.

    Raises:
        SampleRejected: It has no usable audio, or codes and stated duration disagree.
    """
    audio = parsed.audio[index]
    if audio is None:
        raise SampleRejected("no audio")
    waveform = decode_waveform(audio, max_seconds=_MAX_SECONDS)
    claimed = parsed.seconds[index]
    seconds = waveform.numel() / SAMPLE_RATE if claimed is None else claimed
    if tokenizer.sample_rate != SAMPLE_RATE:
        raise UserError(f"the speech tokenizer takes {tokenizer.sample_rate} Hz, dialogues have {SAMPLE_RATE} Hz")
    codes, lengths = tokenizer.encode(waveform[None], lengths=torch.tensor([waveform.numel()]))
    found = codes[0, : int(lengths[0])].tolist()
    if abs(len(found) / tokenizer.code_rate - seconds) > _MAX_DIFFERENCE:
        raise SampleRejected("codes and duration differ", f"{len(found)} codes for {seconds:.2f} s")
    return found


def _finish(out: Path, *, names: list[Path], records: dict[str, Any]) -> None:
    """An index per folder where it is missing or out of date, then one line on what there is and what was skipped."""
    for folder in sorted({(out / name).parent for name in names}):
        index, shards = folder / FOLDER_INDEX, list(folder.glob("*.tar"))
        if not index.exists() or any(shard.stat().st_mtime_ns > index.stat().st_mtime_ns for shard in shards):
            write_index(folder)
    used = [records[name.as_posix()] for name in names]
    turns, codes = sum(record["turns"] for record in used), sum(record["codes"] for record in used)
    line = f"{out}: {turns} turns, {codes} codes in {len(used)} shards"
    for field_name, what in (("skipped", "turns without codes"), ("left_out", "dialogues left out")):
        counts: Counter[str] = Counter()
        for record in used:
            counts.update(record[field_name])
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        line += f"; {counts.total()} {what}" + (f" ({reasons})" if reasons else "")
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
