from pathlib import Path

import pytest

SMALL = {
    "train_dialogues": 24,
    "train_speakers": 12,
    "validation_dialogues": 6,
    "validation_speakers": 6,
    "held_out_voices_dialogues": 6,
    "held_out_voices_speakers": 6,
    "held_out_types_dialogues": 6,
    "held_out_types_speakers": 6,
    "text_dialogues": 10,
    "dialogues_per_shard": 10,
    "workers": 1,
}


@pytest.fixture(scope="session")
def espeak():
    pytest.importorskip("espeakng_loader", reason="needs pip install 'lightning-echat[synthesis]'")
    from lightning_echat.corpus.espeak import Espeak

    return Espeak()


@pytest.fixture(scope="session")
def small_sizes() -> dict:
    return dict(SMALL)


@pytest.fixture(scope="session")
def small_corpus(espeak, small_sizes, tmp_path_factory) -> Path:
    from lightning_echat.corpus.synthesize import synthesize

    out = tmp_path_factory.mktemp("corpus") / "small"
    synthesize(out, **small_sizes)
    return out
