from dataclasses import replace

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.losses import token_loss
from lightning_echat.nn.auxiliary_heads import AuxiliaryHeads
from lightning_echat.nn.echat_model import document_mask, fill_placeholders
from lightning_echat.testing import dummy_batch, tiny_model, tiny_network_config
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, DialogueTask, task_from_name

TASKS = [task_from_name(name, labels=("age", "emotion")) for name in ALL_TASK_NAMES]
WRITTEN = DialogueTask(kind="text_to_text")


def test_clips_fill_their_placeholders_and_nothing_else(tokenizer):
    batch = dummy_batch(tokenizer, [WRITTEN])
    batch.clip_rows = torch.tensor([1, 0, 1])
    batch.clip_starts = torch.tensor([0, 2, 3])
    batch.clip_lengths = torch.tensor([2, 1, 2])
    # Clip c has outputs 10c + 1, 10c + 2, …; those behind its length are padding.
    adapted = (torch.tensor([[1.0, 2, 3], [11, 12, 13], [21, 22, 23]]))[..., None]
    filled = fill_placeholders(torch.zeros(2, 6, 1), adapted, batch)
    assert filled[..., 0].tolist() == [[0, 0, 11, 0, 0, 0], [1, 2, 0, 21, 22, 0]]


def test_a_position_sees_back_into_its_own_dialogue_only():
    mask = document_mask(torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]]))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert torch.equal(mask[1, 0], torch.ones(5, 5, dtype=torch.bool).tril())
    # Every position, padding too, sees something: attention over nothing would be NaN.
    assert mask.any(-1).all()
    assert document_mask(torch.tensor([[1, 1, 0], [1, 1, 1]])) is None


@pytest.mark.parametrize("per_row", [1, 3, len(TASKS)])
@torch.no_grad()
def test_a_dialogue_gives_the_same_alone_padded_and_packed(model, tokenizer, per_row):
    packed = dummy_batch(tokenizer, TASKS, per_row=per_row, exchanges=2)
    hidden = model(packed).hidden_states
    assert hidden.isfinite().all()
    for number, (task, reference) in enumerate(zip(TASKS, packed.references, strict=True)):
        alone = model(dummy_batch(tokenizer, [task], first=number, exchanges=2)).hidden_states[0]
        found = hidden[reference.row, reference.start : reference.start + reference.length]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_clip_says_changes_its_own_dialogue_only(model, tokenizer):
    heard = DialogueTask(kind="transcribe")
    batch = dummy_batch(tokenizer, [heard, heard, heard], per_row=3)
    before = model(batch).hidden_states[0]
    louder = replace(batch, log_mels=batch.log_mels.clone())
    louder.log_mels[1] += 0.5
    changed = (model(louder).hidden_states[0] - before).abs().amax(1) > 0
    middle = batch.references[1]
    first = middle.start + int(
        (batch.input_ids[0, middle.start :] == tokenizer.vocabulary.audio_placeholder).int().argmax()
    )
    assert changed[first : middle.start + middle.length].all()
    assert not changed[:first].any() and not changed[middle.start + middle.length :].any()


def test_a_batch_without_audio_reaches_every_part_with_a_gradient(tokens, tokenizer):
    """A rank that left a part out of its backward pass would leave the others waiting."""
    model = tiny_model(tokens, network=tiny_network_config(auxiliary_labels=("age",), depthwise_kernel=3)).train()
    batch = dummy_batch(tokenizer, [WRITTEN, WRITTEN])
    assert batch.log_mels.shape[0] == 0
    output = model(batch)
    assert output.heard.encoder_frames.shape[0] == 1
    loss = token_loss(
        output.hidden_states,
        batch.labels,
        batch.speech_scored,
        text_head=model.lm.text_head,
        speech_head=model.lm.speech_head,
    )
    assert model.auxiliary is not None
    characters, labels = model.auxiliary(output.heard.encoder_frames, output.heard.encoder_lengths)
    (loss.text + loss.speech + 0.0 * (characters.sum() + labels["age"].sum())).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    of_hearing = [g for name, g in gradients.items() if g is not None and name.startswith(("encoder.", "adapter."))]
    assert of_hearing and not any(gradient.any() for gradient in of_hearing)
    assert any(g.any() for name, g in gradients.items() if g is not None and name.startswith("lm."))


def test_a_silent_batch_gives_the_same_text_as_the_text_alone(model, tokenizer):
    with torch.no_grad():
        written = dummy_batch(tokenizer, [WRITTEN])
        hidden = model(written).hidden_states
        expected = model.lm(model.lm.embed(written.input_ids), position_ids=None, attention_mask=None)
    assert torch.equal(hidden, expected)


def test_strides_that_differ_from_those_of_the_placeholders_are_refused(tokens):
    with pytest.raises(UserError, match="audio_strides"):
        tiny_model(replace(tokens, audio_strides=(2, 2)))
    # A stride of 1 changes no length.
    tiny_model(replace(tokens, audio_strides=(1, 2, 1, 2, 2)))


def test_auxiliary_heads_pool_valid_frames_only():
    torch.manual_seed(0)
    heads = AuxiliaryHeads(4, label_sets=["age", "gender"])
    frames = torch.randn(2, 7, 4)
    junk = frames.clone()
    junk[0, 5:] = 99
    _, before = heads(frames, torch.tensor([5, 7]))
    _, after = heads(junk, torch.tensor([5, 7]))
    _, alone = heads(frames[:1, :5], torch.tensor([5]))
    assert {name: list(logits.shape) for name, logits in before.items()} == {"age": [2, 3], "gender": [2, 2]}
    for name in before:
        assert torch.equal(before[name], after[name])
        torch.testing.assert_close(before[name][:1], alone[name])


def test_an_auxiliary_head_for_what_is_no_label_set_is_refused(tokens):
    with pytest.raises(UserError, match="no label set 'mood'"):
        tiny_model(tokens, network=tiny_network_config(auxiliary_labels=("mood",)))


def test_the_tiny_model_is_tiny_and_follows_from_its_seed(tokens):
    first, same, other = tiny_model(tokens), tiny_model(tokens), tiny_model(tokens, seed=1)
    assert sum(parameter.numel() for parameter in first.parameters()) < 200_000
    assert torch.equal(first.encoder.conv1.weight, same.encoder.conv1.weight)
    assert not torch.equal(first.encoder.conv1.weight, other.encoder.conv1.weight)


@torch.no_grad()
def test_positions_of_packed_dialogues_restart(tokens, tokenizer):
    """Seen with a language model whose positions are absolute; rotary ones look alike wherever a dialogue stands."""
    network = tiny_network_config()
    sizes = {"model_type": "gpt2", "vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = tiny_model(tokens, network=replace(network, llm=replace(network.llm, architecture=sizes)))
    heard = DialogueTask(kind="transcribe")
    packed = dummy_batch(tokenizer, [heard, heard, heard], per_row=3)
    hidden = model(packed).hidden_states
    for number, reference in enumerate(packed.references):
        alone = model(dummy_batch(tokenizer, [heard], first=number)).hidden_states[0]
        found = hidden[0, reference.start : reference.start + reference.length]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_training_keeps_no_cache(model, tokenizer):
    kept = []
    decoder = model.lm.causal_lm.get_decoder()
    decoder.register_forward_hook(lambda module, given, output: kept.append(output.past_key_values))
    model(dummy_batch(tokenizer, [WRITTEN]))
    assert kept == [None]
