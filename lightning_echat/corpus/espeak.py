"""espeak-ng in this process, through ctypes: text and a voice file in, samples out.

The library comes with the pip package `espeakng-loader` (GPL-3, an extra of its own: never vendored, never imported
before it is needed). It keeps state between utterances (the phase of the flutter, noise), so that a sentence would
sound slightly different after another one. The corpus must not depend on who worked on what before; the library is
therefore unloaded after every utterance, which costs 0.3 ms.
"""

from __future__ import annotations

import _ctypes
import ctypes
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from lightning_echat.contracts import UserError

ESPEAK_RATE = 22_050
"""Hz, the rate the library synthesizes at."""

_SYNCHRONOUS = 2
_UTF8 = 1
_RATE, _VOLUME = 1, 2
_ON_SAMPLES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _find_library() -> tuple[str, bytes]:
    """Paths of the shared library and of its data folder."""
    try:
        loader = importlib.import_module("espeakng_loader")
    except ImportError:
        raise UserError(
            "synthesis needs the package espeakng-loader: pip install 'lightning-echat[synthesis]'"
        ) from None
    return loader.get_library_path(), loader.get_data_path().encode()


class Espeak:
    """The synthesizer. One object a process; the library's state is global.

    Raises:
        UserError: The package with the library is not installed, or the library does not start.
    """

    def __init__(self) -> None:
        self._library_path, self._data_path = _find_library()
        self._chunks: list[NDArray[np.int16]] = []
        # Kept as an attribute: the library calls it long after this line, and ctypes does not keep it alive.
        self._on_samples = _ON_SAMPLES(self._collect)

    def version(self) -> str:
        """The library's version, for instance "1.52"."""
        with self._loaded() as library:
            library.espeak_Info.restype = ctypes.c_char_p
            return library.espeak_Info(None).decode().split()[0]

    def speak(self, text: str, *, voice_lines: Sequence[str], rate: int, noise_seed: int) -> NDArray[np.float32]:
        """Synthesize one utterance.

        Args:
            text: The words.
            voice_lines: Lines of an espeak-ng voice file.
            rate: Words a minute, 80 to 450.
            noise_seed: Seeds the library's own noise (breath, roughness).

        Returns:
            [samples] in [-1, 1] at `ESPEAK_RATE`, silence at the ends included.
        """
        with self._loaded() as library, tempfile.NamedTemporaryFile("w", suffix=".voice") as voice_file:
            voice_file.write("\n".join(["name corpus", *voice_lines, ""]))
            voice_file.flush()
            library.espeak_ng_SetRandSeed(ctypes.c_long(noise_seed))
            self._check(library.espeak_ng_SetVoiceByFile(voice_file.name.encode()), "voice file")
            self._check(library.espeak_SetParameter(_RATE, rate, 0), "rate")
            # 50 instead of the default 100 leaves head room: with raised formants the default clips inside.
            self._check(library.espeak_SetParameter(_VOLUME, 50, 0), "volume")
            encoded = text.encode()
            self._check(library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _UTF8, None, None), "synthesis")
        samples = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)
        return samples.astype(np.float32) / 32768.0

    def _collect(self, samples, count: int, _events: int | None) -> int:
        """Callback of the library; 0 asks it to go on."""
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    @contextmanager
    def _loaded(self) -> Iterator[ctypes.CDLL]:
        """The freshly loaded library, unloaded at the end."""
        library = ctypes.CDLL(self._library_path)
        self._chunks.clear()
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, self._data_path, 0)
            if rate != ESPEAK_RATE:
                # It holds the path of its data in 160 bytes, which a deep virtual environment exceeds.
                raise UserError(f"espeak-ng did not start from {self._data_path.decode()}; is the path too long?")
            library.espeak_SetSynthCallback(self._on_samples)
            yield library
            library.espeak_Terminate()
        finally:
            _ctypes.dlclose(library._handle)

    @staticmethod
    def _check(status: int, what: str) -> None:
        """Raise when the library reports an error."""
        if status != 0:
            raise RuntimeError(f"espeak-ng refused the {what}: error {status:#x}")
