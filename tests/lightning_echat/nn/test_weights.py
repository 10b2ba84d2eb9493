"""From one stage's checkpoint to the next stage, and to a model that answers."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.nn.speech_language_model import LoRAConfig
from lightning_echat.nn.weights import latest_checkpoint, load_from, load_trained, read_checkpoint
from lightning_echat.testing import dummy_batch, save_tiny_checkpoint, tiny_model, tiny_network_config
from lightning_echat.tokens.tasks import DialogueTask

LORA = LoRAConfig(rank=2, alpha=4, dropout=0.0)


def test_a_trained_model_is_built_and_filled_from_its_checkpoint_alone(tmp_path, tokens, tokenizer):
    network = tiny_network_config(auxiliary_labels=("age",), depthwise_kernel=3, lora=LORA)
    pretrained = replace(network, encoder=replace(network.encoder, pretrained=True, weights=str(tmp_path / "gone")))
    model = tiny_model(tokens, network=network, seed=5)
    trained = load_trained(save_tiny_checkpoint(tmp_path / "a.ckpt", model, tokens, network=pretrained))
    assert (trained.step, trained.tokens, trained.model.training) == (7, tokens, False)
    batch = dummy_batch(tokenizer, [DialogueTask(kind="transcribe"), DialogueTask(kind="text_to_text")])
    with torch.no_grad():
        assert torch.equal(trained.model(batch).hidden_states, model(batch).hidden_states)


def test_a_hand_over_gives_the_next_stage_the_same_weights(tmp_path, tokens):
    before, after = tiny_model(tokens, seed=1), tiny_model(tokens, seed=2)
    report = load_from(after, save_tiny_checkpoint(tmp_path / "a.ckpt", before, tokens), new_parts=()).report
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in after.state_dict().items())
    size = len(before.state_dict())
    assert f"{size} of {size} weights" in report
    assert report.endswith("new in this stage: nothing")


def test_what_is_missing_must_be_announced(tmp_path, tokens):
    path = save_tiny_checkpoint(tmp_path / "a.ckpt", tiny_model(tokens, seed=1), tokens)
    grown = tiny_model(tokens, network=tiny_network_config(auxiliary_labels=("age",)), seed=2)
    fresh = grown.get_parameter("auxiliary.characters.weight").clone()
    with pytest.raises(
        UserError, match=r"lacks auxiliary\.characters\.weight, .* and 1 more; .*init_new_parts"
    ) as told:
        load_from(grown, path, new_parts=())
    assert "\n" not in str(told.value)
    report = load_from(grown, path, new_parts=("auxiliary.*",)).report
    assert torch.equal(grown.get_parameter("auxiliary.characters.weight"), fresh)
    assert torch.equal(grown.encoder.conv1.weight, tiny_model(tokens, seed=1).encoder.conv1.weight)
    assert "new in this stage: auxiliary." in report


def test_what_is_unknown_is_refused(tmp_path, tokens):
    model = tiny_model(tokens, network=tiny_network_config(auxiliary_labels=("age",)))
    with pytest.raises(UserError, match=r"has unknown auxiliary\.") as told:
        load_from(tiny_model(tokens), save_tiny_checkpoint(tmp_path / "a.ckpt", model, tokens), new_parts=("*",))
    assert "\n" not in str(told.value)


def test_another_shape_is_refused_even_where_the_part_is_new(tmp_path, tokens):
    wide = tiny_network_config()
    wide = replace(wide, adapter=replace(wide.adapter, feedforward=48))
    path = save_tiny_checkpoint(tmp_path / "a.ckpt", tiny_model(tokens, network=wide), tokens)
    with pytest.raises(UserError, match=r"has another shape for adapter\.layers\.0\.linear1\.weight") as told:
        load_from(tiny_model(tokens), path, new_parts=("adapter.*",))
    assert "\n" not in str(told.value)


def test_a_stage_may_add_lora_to_what_the_one_before_trained(tmp_path, tokens, tokenizer):
    before = tiny_model(tokens, seed=1)
    path = save_tiny_checkpoint(tmp_path / "a.ckpt", before, tokens)
    adapted = tiny_model(tokens, network=tiny_network_config(lora=LORA), seed=2)
    with pytest.raises(UserError, match=r"lacks .*\.lora_A"):
        load_from(adapted, path, new_parts=())
    load_from(adapted, path, new_parts=("*.lora_*",))
    batch = dummy_batch(tokenizer, [DialogueTask(kind="transcribe")])
    with torch.no_grad():
        torch.testing.assert_close(adapted(batch).hidden_states, before(batch).hidden_states)
    # The way back would need the two merged, which nothing does in silence.
    path = save_tiny_checkpoint(tmp_path / "b.ckpt", adapted, tokens)
    with pytest.raises(UserError, match=r"lacks lm\.llm\."):
        load_from(before, path, new_parts=())


def test_a_run_folder_names_its_newest_last_checkpoint(tmp_path, tokens):
    folder = tmp_path / "run" / "checkpoints"
    names = ["epoch=0-step=10.ckpt", "last.ckpt", "epoch=0-step=20.ckpt"]
    for age, name in enumerate(names):
        path = save_tiny_checkpoint(folder / name, tiny_model(tokens), tokens)
        os.utime(path, (1000 + age, 1000 + age))
    assert latest_checkpoint(tmp_path / "run") == folder / "last.ckpt"
    assert latest_checkpoint(folder) == folder / "last.ckpt"
    assert latest_checkpoint(folder / names[0]) == folder / names[0]
    # What Lightning calls the last one of a second run into the same folder.
    os.utime(save_tiny_checkpoint(folder / "last-v1.ckpt", tiny_model(tokens), tokens), (2000, 2000))
    assert latest_checkpoint(tmp_path / "run") == folder / "last-v1.ckpt"
    for name in ("last.ckpt", "last-v1.ckpt"):
        (folder / name).unlink()
    assert latest_checkpoint(tmp_path / "run") == folder / "epoch=0-step=20.ckpt"


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "harm": Harmful()}, "a.ckpt")
    with pytest.raises(UserError, match=r"cannot read checkpoint a\.ckpt"):
        read_checkpoint(Path("a.ckpt"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 torn"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="cannot read checkpoint") as told:
        load_trained(tmp_path)
    assert "\n" not in str(told.value)


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path, tokens):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_trained(tmp_path / "none")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="does not say how to build its network"):
        load_trained(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds no network weights"):
        load_from(tiny_model(tokens), tmp_path / "a.ckpt", new_parts=())
