from pathlib import Path

import pytest

from lightning_echat.testing import tiny_tokens_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer


@pytest.fixture(scope="session")
def compact(tmp_path_factory) -> DialogueTokenizer:
    """Byte-level tokenizer with the compact prompts: every id of a row can be written down by hand."""
    return DialogueTokenizer.from_config(tiny_tokens_config(Path(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="session")
def english(tmp_path_factory) -> DialogueTokenizer:
    folder = Path(tmp_path_factory.mktemp("tokenizer"))
    return DialogueTokenizer.from_config(tiny_tokens_config(folder, prompt_set="english"))
