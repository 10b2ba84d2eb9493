"""The reference's fixtures: a tiny model in the released layout, inputs, and what the reference computed on them."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lightning_echat.checkpoints.from_reference import from_reference
from lightning_echat.checkpoints.reference_prompts import ReferencePrompts, reference_prompt_set
from lightning_echat.testing import tiny_tokens_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer

PARITY = Path(__file__).parents[4] / "shared/reference/parity"


@pytest.fixture(scope="session")
def parity() -> Path:
    if not PARITY.is_dir():
        pytest.skip("the reference's fixtures are not here")
    return PARITY


@pytest.fixture(scope="session")
def given(parity) -> dict[str, Tensor]:
    """Inputs of three rows, and intermediate outputs."""
    return load_file(parity / "io.safetensors")


@pytest.fixture(scope="session")
def expected(parity) -> dict:
    """Texts, losses by output type, and the ids of headers."""
    return json.loads((parity / "expected.json").read_text())


@pytest.fixture(scope="session")
def released(parity) -> dict[str, Tensor]:
    return load_file(parity / "state_dict.safetensors")


@pytest.fixture(scope="session")
def reference_prompts(parity) -> ReferencePrompts:
    words = json.loads((parity / "prompts.json").read_text())
    return ReferencePrompts(
        system=words["system_prompt_by_output_type"],
        user=words["user_header"],
        assistant=words["assistant_header"],
        instructions={"<TRANSCRIBE>": ["transcribe the speech"]},
    )


@pytest.fixture(scope="session")
def converted(parity, reference_prompts, tmp_path_factory) -> Path:
    """The fixture model as a folder, with the reference's prompts in place of the project's."""
    folder = Path(tmp_path_factory.mktemp("converted")) / "model"
    from_reference(parity / "state_dict.safetensors", str(parity / "llm"), folder, encoder_heads=4)
    content = reference_prompt_set(reference_prompts)
    (folder / "prompt_set.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def compact(tmp_path_factory) -> DialogueTokenizer:
    return DialogueTokenizer.from_config(tiny_tokens_config(Path(tmp_path_factory.mktemp("tokenizer"))))
