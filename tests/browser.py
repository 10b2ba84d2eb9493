"""Looks at a page with headless Chromium, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
)
_LISTEN = """<script>
window.errors = [];
window.addEventListener("error", (e) => window.errors.push(String(e.message || (e.target && e.target.src))), true);
console.error = (...words) => window.errors.push(words.join(" "));
</script>"""
_LOOK = """<script>
window.addEventListener("load", () => {
  const outside = [...document.querySelectorAll("[src], [href]")]
    .map((e) => e.getAttribute("src") || e.getAttribute("href") || e.getAttribute("xlink:href"))
    .filter((address) => address && !address.startsWith("data:") && !address.startsWith("#"));
  const seen = {
    errors: window.errors, outside: outside,
    images: [...document.images].map((e) => e.naturalWidth),
    loaded: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
    text: document.body.innerText,
  };
  const place = document.createElement("pre");
  place.id = "seen";
  place.textContent = JSON.stringify(seen);
  document.body.appendChild(place);
});
</script>"""


def look_at(page: Path, folder: Path) -> dict[str, Any]:
    """What Chromium makes of a page: `errors`, addresses `outside` of it, what it `loaded`, widths of `images`, `text`.

    Skips the test where no Chromium is found.
    """
    chromium = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no chromium here")
    text = page.read_text(encoding="utf-8")
    assert "<head>" in text and "</body>" in text
    copy = folder / "looked_at.html"
    copy.write_text(text.replace("<head>", f"<head>{_LISTEN}", 1).replace("</body>", f"{_LOOK}</body>", 1), "utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [chromium, *_FLAGS, profile, "--dump-dom", copy.absolute().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match is not None, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(html.unescape(match[1]))


def assert_self_contained(seen: dict[str, Any], *, images: int) -> None:
    """No errors, nothing from outside, and every image has a width."""
    assert seen["errors"] == [] and seen["outside"] == [] and seen["loaded"] == []
    assert len(seen["images"]) == images and all(width > 0 for width in seen["images"])
