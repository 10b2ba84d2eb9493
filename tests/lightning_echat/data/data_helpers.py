"""Hand-made shards, sound and broken."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

SIDECAR = {
    "schema": 1,
    "speaker": "s1",
    "turns": [
        {"role": "user", "text": "hi", "audio": "0.wav", "seconds": 0.5, "labels": {"emotion": "sad"}},
        {"role": "assistant", "text": "oh", "labels": {"emotion": "calm"}, "codes": [1, 2]},
    ],
}


def wav(seconds: float = 0.5, *, rate: int = 16000, channels: int = 1, value: float | None = None, **kwargs) -> bytes:
    time = np.arange(round(seconds * rate)) / rate
    signal = 0.3 * np.sin(2 * np.pi * 440 * time) if value is None else np.full(len(time), value)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([signal] * channels, axis=1), rate, format="WAV", **kwargs)
    return buffer.getvalue()


def members(key: str = "a", *, sidecar=SIDECAR, audio: bytes | None = None) -> dict[str, bytes]:
    text = sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode()
    return {f"{key}.json": text, f"{key}.0.wav": wav() if audio is None else audio}


def write_tar(path: Path, content: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in content.items() if isinstance(content, dict) else content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
