"""What decides whether a step must run again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_echat.contracts import UserError
from lightning_echat.recipes.recipe_file import Recipe

_SOURCES = ("lightning_echat", "datamodules", "callbacks")
_PLANS = ("studies", "recipes")
_COMPUTES_WITH = ("torch", "lightning", "transformers")


def fingerprints(recipe: Recipe, *, code: str) -> dict[str, str]:
    """Step name -> what decides whether it must run again. Reads files and changes nothing.

    Args:
        recipe: The steps in order.
        code: Stands for the project's source and its libraries, see `code_fingerprint`.

    Raises:
        UserError: A step reads what neither exists nor is made before it.
    """
    prints: dict[str, str] = {}
    makers: dict[Path, str] = {}
    for step in recipe.steps:
        parts = [code, *step.command]
        for path in map(_path_in, step.command):
            parts += [prints[name] for name in _makers_of(path, makers)]
            # Words that are files: configs, prompt sets, recordings. What lies in the run's folder the run has made.
            if _is_file(path) and not path.absolute().is_relative_to(recipe.out.absolute()):
                parts.append(content_hash(path))
        for path in step.inputs:
            if names := _makers_of(path, makers):
                parts += [prints[name] for name in names]
            elif path.exists():
                parts.append(content_hash(path))
            else:
                raise UserError(f"step {step.name!r} reads {path}, which neither exists nor is made by an earlier step")
        prints[step.name] = hash_of(parts)
        makers.update({path: step.name for path in step.outputs})
    return prints


def dependencies(recipe: Recipe) -> dict[str, set[str]]:
    """Step name -> the earlier steps that make what it reads."""
    found: dict[str, set[str]] = {}
    makers: dict[Path, str] = {}
    for step in recipe.steps:
        read = [*map(_path_in, step.command), *step.inputs]
        found[step.name] = {name for path in read for name in _makers_of(path, makers)}
        makers.update({path: step.name for path in step.outputs})
    return found


def _path_in(word: str) -> Path:
    """The path that a word of a command may be: `x.yaml`, or the value of `--config=x.yaml`."""
    return Path(word.partition("=")[2] or word)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Some words are too long for a path.
        return False


def _makers_of(path: Path, makers: Mapping[Path, str]) -> list[str]:
    """The steps one of whose outputs `path` is, lies in, or holds."""
    path = path.absolute()
    absolute = {made.absolute(): name for made, name in makers.items()}
    return [name for made, name in absolute.items() if path.is_relative_to(made) or made.is_relative_to(path)]


def hash_of(parts: Sequence[str]) -> str:
    """One hash of several texts, which it keeps apart."""
    # JSON keeps the parts apart: ["ab", "c"] is not ["a", "bc"].
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Of a file its bytes; of a folder the names and sizes in it, as a corpus is too large to read at every start."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return hash_of(
        [f"{file.relative_to(path)} {file.stat().st_size}" for file in sorted(path.rglob("*")) if file.is_file()]
    )


def code_fingerprint() -> str:
    """The project's own source, and the versions of what it computes with.

    Without what only plans runs and tabulates them: hours of training are not void because a table looks different.
    """
    parts = [f"{name} {version(name)}" for name in _COMPUTES_WITH]
    for package in _SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            files = sorted(
                path
                for path in Path(folder).rglob("*")
                if path.suffix in (".py", ".yaml", ".html", ".json") and path.parent.name not in _PLANS
            )
            parts += [f"{package} {file.relative_to(folder)} {content_hash(file)}" for file in files]
    return hash_of(parts)
