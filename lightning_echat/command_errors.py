"""What a user can cause, told in one line: what is wrong, where, and the nearest valid choice.

The parser (jsonargparse) knows all of this but says it in a block of ten lines, errors of loader workers arrive as
the text of a traceback, and Lightning wraps its advice over several lines. This file turns each into one line;
whatever it does not recognise is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import yaml

_LONGEST_LINE = 400
_MISTAKES = (
    "UserError",
    "SetupError",
    "MisconfigurationException",
    "FileNotFoundError",
    "PermissionError",
    "IsADirectoryError",
    "NotADirectoryError",
)
"""Exception classes that are a user's mistake, by name: importing torch and Lightning for them would cost seconds."""


class SetupError(Exception):
    """A mistake found before anything ran. Every rank finds it alike, so rank 0 alone reports it."""


class ParseProblem(Exception):
    """What the parser has to say about the arguments, in its own many lines."""


if TYPE_CHECKING:
    from jsonargparse import ArgumentParser as _Parser
else:
    _Parser = object


class RaisesProblems(_Parser):
    """Mixed into a jsonargparse parser: its errors are raised, to be explained, where it would print and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `ParseProblem`; parsers of nested classes raise as ever, their messages become part of the outer's."""
        if self.exit_on_error:
            raise ParseProblem(message) from ex
        super().error(message, ex)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for the end of a message: '; did you mean …?', or empty where nothing is near.

    A dotted name is compared as a whole first, then by its leading part: `modl.width` is near `model`.
    """
    known = list(known)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {near[0]!r}?"
    head, _, rest = name.partition(".")
    heads = {key.partition(".")[0] for key in known}
    if rest and head not in heads and (near := difflib.get_close_matches(head, sorted(heads), n=1)):
        return f"; did you mean {near[0]!r}?"
    return ""


def one_line(text: str) -> str:
    """Text of several lines as one, cut where it grows unreadable."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 2] + " …"


def explain_exception(error: BaseException) -> str | None:
    """The line for an exception that a user can cause, None for one that is our bug."""
    if (line := _from_traceback_text(str(error))) is not None:
        return line
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, OSError) and names & set(_MISTAKES):
        return one_line(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    if isinstance(error, yaml.YAMLError):
        return _explain_yaml(error)
    return one_line(str(error)) if names & set(_MISTAKES) else None


def explain_lost_rank(error: BaseException, *, rank: int) -> str | None:
    """The line for a collective call that the other ranks did not complete, None for anything else.

    Every rank that waits says so, so the one to look at is the one that is silent.
    """
    said = str(error)
    lost, late = any(sign in said for sign in _LOST), any(sign in said for sign in _LATE)
    if not (lost or late) or (call := _collective_of(error)) is None:
        return None
    what = "was left alone: another rank has died" if lost else "waited in vain: another rank stands still"
    return one_line(f"rank {rank} {what}; its call was {call}. The rank that prints no such line is the one to look at")


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_LATE = ("Timed out waiting", "Application timeout", "Wait timeout", "caught collective operation timeout")
"""How gloo, NCCL and their store word that a peer has gone, or does not come."""


def _collective_of(error: BaseException) -> str | None:
    """Name of the collective call that an exception comes from, and where our own code or FSDP made it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [i for i, frame in enumerate(frames) if "torch/distributed" in frame.filename]
    if not inside:
        return None
    names = [frames[i].name for i in inside if frames[i].filename.endswith(("distributed_c10d.py", "_ops.py"))]
    name = next((name for name in names if name not in ("wrapper", "wait")), frames[inside[-1]].name)
    own = [frame for frame in frames if any(part in frame.filename for part in ("lightning", "callbacks"))]
    return f"{name}, made by {own[-1].name}" if own else name


def _from_traceback_text(text: str) -> str | None:
    """The mistake inside the text of a traceback, which is how errors of loader workers and child ranks arrive."""
    if "Traceback (most recent call last)" not in text:
        return None
    last = next((match for line in reversed(text.splitlines()) if (match := _EXCEPTION_LINE.match(line))), None)
    if last is None or last["name"] not in _MISTAKES:
        return None
    return one_line(re.sub(r"^\[Errno \d+\] ", "", last["message"]))


_EXCEPTION_LINE = re.compile(r"(?:\w+\.)*(?P<name>\w+): (?P<message>.*)")


def check_config_files(args: Sequence[str]) -> list[Path]:
    """The files given with --config. Refuse one that is missing or is no YAML mapping: the parser would not name it."""
    files = []
    for position, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in ("-c", "--config"):
            files.append(Path(value if equals else next(iter(args[position + 1 :]), "")))
    for file in files:
        if not file.is_file():
            near = nearest(file.name, [path.name for path in file.parent.glob("*.y*ml")])
            raise SetupError(f"no config file {str(file)!r}{near}")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SetupError(f"{file}: {_explain_yaml(error)}") from error
        if not isinstance(content, dict | None):
            raise SetupError(f"{file}: must hold keys and values, found a {type(content).__name__}")
    return files


def _explain_yaml(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return one_line(f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f"no YAML: {problem}")


def explain_parse_error(message: str, *, known_keys: Iterable[str], files: Sequence[Path] = ()) -> str:
    """The parser's message of many lines -> one line.

    Args:
        message: As jsonargparse words it.
        known_keys: Keys that the command takes, for the hint.
        files: Config files that were read, to say where a wrong key stands.
    """
    message = message.replace("\r", "")
    if match := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", message):
        return _unknown_key(match[1], known_keys, files)
    if match := re.match(r"unrecognized arguments: (.*)", message):
        word = match[1].split()[0].partition("=")[0]
        key = word.lstrip("-")
        return _unknown_key(key, known_keys, ()) if word.startswith("-") else f"unexpected argument {word!r}"
    first, *inner = re.findall(r'Parser key "([^"]+)":?', message) or [""]
    where = ".".join([first, "init_args", *inner] if inner else [first])
    if match := re.search(r"Problem with given class_path '([^']+)':\n(.*)", message, flags=re.DOTALL):
        return _explain_class(where, match[1], match[2], files)
    detail = _explain_value(message)
    return f"{where}: {detail}" if where else detail


def _unknown_key(key: str, known_keys: Iterable[str], files: Sequence[Path], owner: str = "") -> str:
    of = f" of {owner}" if owner else ""
    return f"unknown key {key!r}{of}{_place_of(key, files)}{nearest(key, known_keys)}"


def _place_of(key: str, files: Sequence[Path]) -> str:
    """' (FILE line N)' of the first line that gives the key's last part a value."""
    last = key.rpartition(".")[2]
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(rf"(?:^|[\s{{,.]){re.escape(last)}\s*:", line):
                return f" ({file} line {number})"
    return ""


def _explain_class(where: str, class_path: str, detail: str, files: Sequence[Path]) -> str:
    """A problem with the class that a YAML names, or with one of its arguments."""
    if match := re.search(r"Option '([^']+)' is not accepted", detail):
        return f"{where}: " + _unknown_key(match[1], _arguments_of(class_path), files, class_path)
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", detail):
        return f"{where}: " + _unknown_key(f"{match[1]}.{match[2]}", _arguments_of(class_path), files, class_path)
    if match := re.search(r"unrecognized arguments: --([^=\s]+)", detail):
        return f"{where}: " + _unknown_key(match[1], _arguments_of(class_path), files, class_path)
    return f"{where}: {_explain_value(detail)}" + ("" if class_path in detail else f" (for {class_path})")


def _arguments_of(class_path: str) -> list[str]:
    """Names of all arguments of a class: dotted for the nested ones, and the fields of every config inside.

    None where the class cannot be read, which costs only the hint.
    """
    from jsonargparse import ArgumentParser

    module, _, name = class_path.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), name)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(owner, fail_untyped=False)
        return [*parser.get_defaults().keys(), *_field_names(list(get_type_hints(owner.__init__).values()))]
    except Exception:  # any failure here would hide the mistake that is being explained
        return []


def _field_names(hints: Sequence[Any]) -> list[str]:
    """Fields of the dataclasses in type hints, those inside lists and unions and other dataclasses included."""
    names: list[str] = []
    for hint in hints:
        inner = list(get_args(hint))
        if dataclasses.is_dataclass(hint):
            fields = get_type_hints(hint)
            names += fields
            inner += fields.values()
        names += _field_names(inner) if inner else []
    return names


def innermost(message: str) -> str:
    """What a constructor said, out of the parser's list of all types that it tried in vain."""
    if "Does not validate against" not in message:
        return message
    said = [line for line in re.findall(r"^ *- (.+)$", message, re.MULTILINE) if not line.startswith(_HOLLOW)]
    return said[0] if said else message


def _explain_value(detail: str) -> str:
    """A value that has the wrong type, names nothing, or is missing."""
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", detail):
        return f"no {match[2]!r} in {match[1]}{nearest(match[2], dir(importlib.import_module(match[1])))}"
    if match := re.search(r"No module named '([\w.]+)'", detail):
        return f"no module {match[1]!r}{nearest(match[1], ('lightning_echat', 'datamodules', 'callbacks'))}"
    if match := re.search(r"the following arguments are required: (.*)", detail):
        # Lightning's parser puts the command before each.
        names = [re.sub(r"^ *(?:fit|validate|test|predict)\.", "", name).strip() for name in match[1].split(",")]
        return f"missing: {', '.join(names)}"
    given = re.search(r"Given value: (?:NestedArg\(key='[^']*', val=)?(.*)", detail)
    value = given[1].rstrip(")") if given and "val=" in given[0] else given[1] if given else ""
    if match := re.search(r"does not correspond to a subclass of (\w+)", detail):
        return f"{value or 'the class'} is no {match[1]}"
    if match := re.search(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)", detail):
        names = [name.strip(" '") for name in match[1].split(",")]
        return f"{match[2]!r} is none of {', '.join(names)}{nearest(match[2], names)}"
    if match := re.search(r"Expected an? (.+?)\. Got value: (.*)", detail):
        return f"expected {_type_name(match[1])}, got {match[2].strip()!r}"
    if choices := re.findall(r"Expected a typing\.Literal\[(.*)\]", detail):
        names = dict.fromkeys(name.strip(" '") for choice in choices for name in choice.split(","))
        return f"{value} is none of {', '.join(names)}"
    if (said := innermost(detail)) != detail:
        return one_line(said)
    if expected := re.findall(r"Expected an? (<class '[^']+'>|[\w.\[\]]+)$", detail, flags=re.MULTILINE):
        names = dict.fromkeys(_type_name(name) for name in expected)
        return f"expected {' or '.join(names)}, got {value or 'something else'}"
    return one_line(detail)


_HOLLOW = ("Expected a", "Does not validate")
"""Openings of the parser's lines that say no more than that something is wrong."""


def _type_name(name: str) -> str:
    """<class 'int'> -> int, in the words of YAML."""
    plain = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", name)
    return {
        "NoneType": "null",
        "bool": "true or false",
        "str": "text",
        "list": "a list",
        "dict": "keys and values",
    }.get(plain, plain)
