"""The reference's numbers, reproduced by the ordinary templates and the ordinary network on its converted weights."""

from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import IGNORE_INDEX, DialogueSample, PackedBatch, TokenizedDialogue, Turn
from lightning_echat.data.batching import pack_rows
from lightning_echat.losses import token_loss
from lightning_echat.nn.weights import TrainedModel, load_trained
from lightning_echat.tokens.tasks import task_from_name

TOLERANCE = 1e-4
TASKS = {
    "text": "transcribe",
    "s2t_chat": "speech_to_text",
    "s2t_chat_think": "speech_to_text.natural_thinking",
    "speech2text_token": "speech_to_speech",
    "speech2text_token_think": "speech_to_speech.natural_thinking",
    "speech2text_token_streaming": "speech_to_speech.interleaved",
    "text2token": "text_to_speech",
    "text2token_streaming": "text_to_speech.interleaved",
    "text2text": "text_to_text",
}
"""The reference's nine output types, and the task of ours that each is."""
ROWS = range(3)


@pytest.fixture(scope="module")
def trained(converted: Path) -> TrainedModel:
    return load_trained(converted)


@pytest.fixture(scope="module")
def dialogue(trained, given, expected):
    """Row `row` of the fixture as a dialogue of an output type: spoken or written query, reply, speech codes."""

    def make(output_type: str, row: int) -> TokenizedDialogue:
        text = expected["text"][row]
        thinking = expected["think_text"][row].removesuffix(text).removeprefix("<think>").removesuffix("<think end>")
        question = given["question"][row, : int(given["question_lengths"][row])].tolist()
        codes = given["speech_tokens"][row, 1 : int(given["speech_tokens_length"][row]) - 1]
        query = text if output_type == "text" else trained.tokenizer.decode(question)
        turns = [
            Turn(role="user", text=query, log_mel=given["feats"][row, : int(given["feats_lengths"][row])]),
            Turn(role="assistant", text=text, speech_codes=codes, thinking=thinking),
        ]
        sample = DialogueSample(turns=turns, key=str(row))
        return trained.tokenizer.tokenize(sample, task_from_name(TASKS[output_type]))

    return make


@torch.no_grad()
def losses_of(trained: TrainedModel, batch: PackedBatch) -> list[float]:
    """Mean loss of each dialogue of a batch, in reading order."""
    hidden = trained.model(batch).hidden_states
    found = []
    for reference in batch.references:
        mine = torch.full_like(batch.labels, IGNORE_INDEX)
        span = slice(reference.start, reference.start + reference.length)
        mine[reference.row, span] = batch.labels[reference.row, span]
        lm = trained.model.lm
        loss = token_loss(hidden, mine, batch.speech_scored, text_head=lm.text_head, speech_head=lm.speech_head)
        assert int(loss.num_text + loss.num_speech) > 2
        found.append(float((loss.text + loss.speech) / (loss.num_text + loss.num_speech)))
    return found


@torch.no_grad()
def test_encoder_and_adapter_are_the_references(trained, given):
    """In one batch, from features to speech embeddings.

    Behind a clip of odd length the reference's second convolution sees what its first made of padding, so its numbers
    for such a clip hold for this batch alone; here a clip has the same frames in any batch.
    """
    network = trained.model
    frames, lengths = network.encoder(given["feats"], given["feats_lengths"])
    embeddings, found = network.adapter(frames, lengths)
    assert found.tolist() == given["speech_mask"].sum(1).tolist()
    fills = given["feats"].shape[1]
    comparable = [row for row, n in enumerate(given["feats_lengths"].tolist()) if n == fills or n % 2 == 0]
    assert comparable == [0, 1]
    for row in comparable:
        valid, heard = int(lengths[row]), int(found[row])
        torch.testing.assert_close(frames[row, :valid], given["encoder_out"][row, :valid], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(embeddings[row, :heard], given["speech_embeds"][row, :heard], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_downsampled_frames_and_embeddings_are_the_references(trained, given):
    """From the reference's own encoder frames, all rows."""
    adapter = trained.model.adapter
    downsampled = []
    handle = adapter.embed.register_forward_pre_hook(lambda _, inputs: downsampled.append(inputs[0]))
    embeddings, found = adapter(given["encoder_out"], (given["feats_lengths"] + 1) // 2)
    handle.remove()
    for row, length in enumerate(found.tolist()):
        for ours, name in ((downsampled[0], "downsampled"), (embeddings, "speech_embeds")):
            torch.testing.assert_close(ours[row, :length], given[name][row, :length], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("output_type", TASKS)
def test_a_prompt_is_the_references_header_to_the_id(trained, dialogue, expected, given, output_type):
    """A header that differs by an id still gives losses that look right."""
    vocabulary = trained.tokenizer.vocabulary
    made = dialogue(output_type, 0)
    header = expected["header_ids"]["system_and_user"][output_type]
    ids = made.input_ids[: made.reference.prompt_length].tolist()
    assert ids[: len(header)] == header
    assert ids[-len(expected["header_ids"]["assistant"]) :] == expected["header_ids"]["assistant"]
    between = ids[len(header) : -len(expected["header_ids"]["assistant"])]
    if "speech2" in output_type or (output_type.startswith(("s2t", "text")) and made.clips):
        spoken = [vocabulary.input_speech_begin, *[vocabulary.audio_placeholder] * 27, vocabulary.input_speech_end]
        prompt = given["prompt"][0].tolist() if output_type == "text" else []
        assert between == prompt + spoken
    else:
        source = "question" if output_type == "text2text" else "target"
        length = int(given[f"{source}_lengths"][0]) - (source == "target")
        assert between == given[source][0, :length].tolist()


@pytest.mark.parametrize("output_type", TASKS)
def test_the_loss_of_a_row_is_the_references_alone_padded_and_packed(trained, dialogue, expected, output_type):
    wanted = expected["outputs"][output_type]["row_losses"]
    rows = [dialogue(output_type, row) for row in ROWS]
    padding = trained.tokenizer.vocabulary.padding
    alone = [losses_of(trained, pack_rows([[row]], padding=padding))[0] for row in rows]
    padded = losses_of(trained, pack_rows([[row] for row in rows], padding=padding))
    packed = losses_of(trained, pack_rows([rows], padding=padding))
    for found in (alone, padded, packed):
        assert found == pytest.approx(wanted, abs=TOLERANCE)
    # Rows that could be told from each other by nothing would all pass with one number.
    assert max(wanted) - min(wanted) > 100 * TOLERANCE or output_type == "s2t_chat_think"


def test_all_tasks_share_rows_and_keep_their_losses(trained, dialogue, expected):
    """Text and speech are scored by different softmaxes; a mixed batch must not mix those."""
    rows = [[dialogue(output_type, row) for row in ROWS] for output_type in TASKS]
    mixed = [list(column) for column in zip(*rows, strict=True)]
    found = losses_of(trained, pack_rows(mixed, padding=trained.tokenizer.vocabulary.padding))
    wanted = [expected["outputs"][output_type]["row_losses"][row] for row in ROWS for output_type in TASKS]
    assert found == pytest.approx(wanted, abs=TOLERANCE)
