"""Files that nobody ever sees half of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, *, content: bytes) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.write_bytes(content)
    temporary.replace(path)


def write_json(path: Path, *, content: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomically(path, content=(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
