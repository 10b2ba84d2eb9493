"""The tiny model and its tokenizer, shared by the tests of the library."""

from pathlib import Path

import pytest

from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.testing import tiny_model, tiny_tokens_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> TokensConfig:
    return tiny_tokens_config(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def tokenizer(tokens) -> DialogueTokenizer:
    return DialogueTokenizer.from_config(tokens)


@pytest.fixture
def model(tokens) -> EChatModel:
    return tiny_model(tokens)
