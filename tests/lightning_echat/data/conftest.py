from pathlib import Path

import pytest

from lightning_echat.testing import tiny_tokens_config, write_dummy_shards
from lightning_echat.tokens.dialogue_template import TokensConfig


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> TokensConfig:
    return tiny_tokens_config(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Three shards of eight dialogues."""
    return write_dummy_shards(Path(tmp_path_factory.mktemp("shards")), shards=3, samples_per_shard=8)
