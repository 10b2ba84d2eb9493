"""What the HTML pages share: how a template becomes a page, and the frame around it, `templates/base.html`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from lightning_echat.data.files import write_atomically

_BASE = Path(__file__).parent / "templates"


def write_html(
    target: Path, template: Path, content: Mapping[str, Any], *, filters: Mapping[str, Callable[..., str]] | None = None
) -> Path:
    """Fill a template that extends `base.html` and write the page. Returns its path.

    Args:
        target: Where it goes; never seen half written.
        template: The file.
        content: Name -> value, `title` among them; texts are escaped.
        filters: What the template calls.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _BASE]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters or {})
    page = environment.get_template(template.name).render(**content)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content=page.encode())
    return target
