"""The description of the public implementation's data: which format it has, and where its files are.

A description is a small YAML file whose name ends in `.reference.yaml` (docs/data_format.md). It stands wherever shards
are named. `list_units` names what can be read on its own, a list file, a tar, or a list with its tar, as
DESCRIPTION::FILES.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from glob import glob
from os.path import normpath
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import yaml

from lightning_echat.contracts import SampleRejected, UserError
from lightning_echat.data.reference_tags import LABEL_SPELLINGS, REPLY_EMOTION, read_task
from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS

DESCRIPTION_SUFFIX = ".reference.yaml"
UNIT_MARK = "::"
PAIR_MARK = "|"
_TAR_ROOT = "combines_tar_root.txt"

ReferenceFormat = Literal["raw", "shard", "combine"]


@dataclass(frozen=True, kw_only=True)
class ReferenceData:
    """A description: what must be known of the public implementation's data to read it.

    Attributes:
        format: raw: JSON lines and recordings. shard: tars. combine: JSON lines, and tars with the recordings.
        data: Files or globs, relative to the description. raw: lists of JSON lines. shard: tars, or lists of tars.
            combine: lists of JSON lines, or lists of such lists.
        root: Folder, relative to the description, that paths inside lists start from and that none may leave.
        strip: Leading folders of paths inside lists that are left out, where the data has been moved.
        tars: combine: folder of the tars; without it, the one that combines_tar_root.txt beside the list names.
        task: Task tag of rows that have none.
        only: Task tags; rows of other tasks are passed over.
        reply_emotion: Label of replies that carry no tag; without it they have none.
        spellings: Label set (or reply_emotion) -> spelling -> label, besides those that are known.
    """

    format: ReferenceFormat
    data: tuple[str, ...]
    path: Path
    root: str = "."
    strip: str = ""
    tars: str = ""
    task: str = ""
    only: tuple[str, ...] = ()
    reply_emotion: str = ""
    spellings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """`root` as a path that holds no `..`."""
        return Path(normpath(self.path.parent.absolute() / self.root))

    def locate(self, name: str) -> Path:
        """A path inside a list -> the file. Links are followed, `..` and absolute paths out of `root` are not.

        Raises:
            SampleRejected: It leaves the root.
        """
        plain = normpath(name)
        if self.strip:
            plain = plain.removeprefix(normpath(self.strip) + "/")
        path = Path(normpath(self.base / plain))
        if not path.is_relative_to(self.base):
            raise SampleRejected("path outside root", f"{name} leaves {self.base}{self._moved(name)}")
        return path

    def missing(self, name: str) -> SampleRejected:
        """What to say of a recording that is not there."""
        return SampleRejected("missing audio", f"{self.locate(name)} does not exist{self._moved(name)}")

    def _moved(self, name: str) -> str:
        """A hint, if the file stands below `root` without some of its leading folders."""
        parts = PurePosixPath(normpath(name)).parts
        for place in range(1, len(parts)):
            rest = PurePosixPath(*parts[place:])
            if ".." not in rest.parts and is_file(self.base / rest):
                return f"; {rest} exists there: add strip: {PurePosixPath(*parts[:place])} to {self.path.name}"
        return f"; see root and strip in {self.path.name}"


def is_reference(path: str) -> bool:
    """Whether a path names a description, or a unit of one."""
    return path.partition(UNIT_MARK)[0].endswith(DESCRIPTION_SUFFIX)


def list_units(path: Path) -> list[str]:
    """What the data of a description can be divided into, in order.

    Raises:
        UserError: The description is wrong, or files that it names are missing.
    """
    data = load_description(path)
    units = [unit for pattern in data.data for file in _files(data, pattern) for unit in _units(data, file)]
    if not units:
        raise UserError(f"{path}: {', '.join(data.data)} list nothing")
    return [f"{path}{UNIT_MARK}{unit}" for unit in dict.fromkeys(units)]


def files_of_unit(unit: str) -> list[Path]:
    """The files behind a unit; of any other path, the path itself."""
    description, mark, names = unit.partition(UNIT_MARK)
    return [Path(description), *map(Path, names.split(PAIR_MARK))] if mark else [Path(unit)]


def load_description(path: Path) -> ReferenceData:
    """Read and check a description.

    Raises:
        UserError: What is wrong in it, and the nearest valid choice.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    known = [entry.name for entry in fields(ReferenceData) if entry.name != "path"]
    if not isinstance(content, dict):
        raise UserError(f"{path} is no description; it has the keys {', '.join(known)}")
    for key in content:
        _check_choice(key, known, f"{path}: unknown key")
    for key in ("format", "data"):
        if not content.get(key):
            raise UserError(f"{path}: {key} is missing")
    _check_choice(content["format"], get_args(ReferenceFormat), f"{path}: unknown format")
    content |= {key: _strings(path, key, content[key]) for key in ("data", "only") if content.get(key)}
    data = ReferenceData(path=path, **{key: value for key, value in content.items() if value is not None})
    _check_values(data)
    return data


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _check_values(data: ReferenceData) -> None:
    for name in ("root", "strip", "tars", "task", "reply_emotion"):
        if not isinstance(value := getattr(data, name), str):
            raise UserError(f"{data.path}: {name} is {value!r}, a text is due")
    if not data.base.is_dir():
        raise UserError(f"{data.path}: root {data.base} is no folder")
    for tag in (*data.only, *([data.task] if data.task else [])):
        try:
            read_task(tag)
        except SampleRejected as error:
            raise UserError(f"{data.path}: {error}") from error
    if data.reply_emotion:
        _check_choice(data.reply_emotion, REPLY_EMOTIONS, f"{data.path}: unknown reply_emotion")
    spellings = data.spellings
    if not isinstance(spellings, Mapping) or not all(isinstance(own, Mapping) for own in spellings.values()):
        raise UserError(f"{data.path}: spellings reads label set -> spelling -> label")
    for name, own in spellings.items():
        _check_choice(name, LABEL_SPELLINGS, f"{data.path}: unknown label set")
        labels = REPLY_EMOTIONS if name == REPLY_EMOTION else LABEL_SETS[name]
        for label in own.values():
            _check_choice(label, labels, f"{data.path}: unknown {name}")


def _strings(path: Path, key: str, value: object) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: {key} is {value!r}, a text or a list of texts is due")
    return tuple(str(entry) for entry in entries)


def _check_choice(value: object, known: Collection[object], what: str) -> None:
    if value not in known:
        names = [str(choice) for choice in known]
        near = difflib.get_close_matches(str(value), names, n=1)
        raise UserError(f"{what} {value!r}; {f'did you mean {near[0]!r}?' if near else 'known: ' + ', '.join(names)}")


def _files(data: ReferenceData, pattern: str) -> list[Path]:
    path = data.path.parent / pattern
    found = [path] if path.exists() else [Path(name) for name in sorted(glob(str(path)))]  # noqa: PTH207
    if not found:
        raise UserError(f"{data.path}: data {pattern!r} (as {path}) does not exist")
    if folder := next((name for name in found if name.is_dir()), None):
        raise UserError(f"{data.path}: data {folder} is a folder; name its files, for instance {pattern}/*.tar")
    return found


def _units(data: ReferenceData, file: Path) -> list[str]:
    """What one file of `data` stands for. A list of rows begins with a brace; no path does."""
    if data.format == "raw":
        if not _holds_rows(file):
            raise UserError(f"{data.path}: {file} does not begin with a JSON row, as data of format raw does")
        return [str(file)]
    if data.format == "shard" and file.suffix == ".tar":
        return [str(file)]
    if data.format == "combine" and _holds_rows(file):
        return [_pair(data, file, listed_in=file)]
    if data.format == "shard" and _holds_rows(file):
        raise UserError(f"{data.path}: {file} holds rows, where tars or lists of tars are due; see format")
    units: list[str] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        rows, mark, tar = line.strip().partition(PAIR_MARK)
        if mark and rows != "-":
            units.append(f"{_listed(data, rows, file)}{PAIR_MARK}{_listed(data, tar, file)}")
        elif data.format == "combine" and rows:
            units.append(_pair(data, _listed(data, rows, file), listed_in=file))
        elif tar or rows:
            units.append(str(_listed(data, tar or rows, file)))
    return units


def _holds_rows(file: Path) -> bool:
    with file.open("rb") as lines:
        return next((line.lstrip() for line in lines if line.strip()), b"").startswith(b"{")


def _pair(data: ReferenceData, rows: Path, *, listed_in: Path) -> str:
    """A list of rows with the tar of its name."""
    named = listed_in.parent / _TAR_ROOT
    if data.tars:
        folder = data.path.parent / data.tars
    elif named.is_file():
        folder = _listed(data, named.read_text(encoding="utf-8").strip(), named, folder=True)
    else:
        raise UserError(f"{data.path}: there is no {named}; add tars: FOLDER, where the tars of {rows.name} are")
    tar = folder / f"{rows.stem}.tar"
    if not tar.is_file():
        raise UserError(f"{data.path}: {rows.name} has no tar {tar}; add tars: FOLDER, where it is")
    return f"{rows}{PAIR_MARK}{tar}"


def _listed(data: ReferenceData, name: str, file: Path, *, folder: bool = False) -> Path:
    """The file or folder that a list names."""
    try:
        path = data.locate(name)
        if not (path.is_dir() if folder else path.is_file()):
            raise data.missing(name)
    except SampleRejected as error:
        raise UserError(f"{data.path}: {file} lists {name}: {str(error).partition(': ')[2]}") from error
    return path
