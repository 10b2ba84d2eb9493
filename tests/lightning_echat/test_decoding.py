"""One decoder for all tasks: what it may write, and that batches, packing and the cache change nothing."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_echat import decoding
from lightning_echat.contracts import IGNORE_INDEX, GeneratedReply, PackedBatch, UserError
from lightning_echat.data.batching import collate
from lightning_echat.decoding import DecodingConfig, Generation, extract_prompts, generate
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.sampling import SamplingConfig, choose
from lightning_echat.testing import dummy_batch, tiny_model
from lightning_echat.tokens.speech_codes import SPEECH_CHUNK, TEXT_CHUNK
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, task_from_name

TASKS = [task_from_name(name, labels=("age", "emotion")) for name in ALL_TASK_NAMES]
SHORT = DecodingConfig(max_text_ids=20, max_speech_ids=30)


def said(replies: list[GeneratedReply]) -> list[tuple]:
    return [(r.reference.key, r.text_ids, r.speech_codes.tolist(), r.finished) for r in replies]


def lively(tokens, seed: int = 0) -> EChatModel:
    """A model whose ids vary, which untrained ones this small do not, in float64, so that nearly equal ids are few."""
    model = tiny_model(tokens, seed=seed).double()
    with torch.no_grad():
        for parameter in model.lm.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_of_all_tasks_is_answered_as_each_alone(tokens, tokenizer, seed):
    model = lively(tokens, seed)
    together = said(generate(model, dummy_batch(tokenizer, TASKS, exchanges=2), tokenizer, SHORT))
    alone = [
        said(generate(model, dummy_batch(tokenizer, [task], first=number, exchanges=2), tokenizer, SHORT))[0]
        for number, task in enumerate(TASKS)
    ]
    assert together == alone
    # The answers differ from one another, else this would show nothing.
    assert len({tuple(text) for _, text, _, _ in together}) > len(TASKS) // 2
    assert len({tuple(codes) for _, _, codes, _ in together if codes}) > 2


def test_packed_and_padded_batches_hold_the_same_prompts(tokenizer):
    padded = extract_prompts(dummy_batch(tokenizer, TASKS, exchanges=2), padding=tokenizer.vocabulary.padding)
    packed = extract_prompts(
        dummy_batch(tokenizer, TASKS, exchanges=2, per_row=4), padding=tokenizer.vocabulary.padding
    )
    for name in PackedBatch.__slots__:
        ours, theirs = getattr(packed, name), getattr(padded, name)
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs), name
    strip = [replace(reference, row=0, start=0, length=0) for reference in packed.references]
    assert strip == [replace(reference, row=0, start=0, length=0) for reference in padded.references]


def test_a_clip_belongs_to_its_dialogue_whatever_the_order_of_those_asked(tokenizer):
    batch, padding = dummy_batch(tokenizer, TASKS, per_row=4), tokenizer.vocabulary.padding
    prompts = extract_prompts(batch, padding=padding)
    turned = extract_prompts(replace(batch, references=batch.references[::-1]), padding=padding)
    assert torch.equal(turned.clip_rows, len(TASKS) - 1 - prompts.clip_rows)
    assert torch.equal(turned.clip_starts, prompts.clip_starts)


def test_targets_are_not_looked_at(tokens, tokenizer):
    model, batch = lively(tokens), dummy_batch(tokenizer, TASKS)
    blind = replace(batch, input_ids=batch.input_ids.clone(), labels=torch.full_like(batch.labels, IGNORE_INDEX))
    for reference in batch.references:
        blind.input_ids[reference.row, reference.prompt_length :] = 7
    assert said(generate(model, batch, tokenizer, SHORT)) == said(generate(model, blind, tokenizer, SHORT))


def test_each_prompt_is_that_of_a_dialogue_without_target(tokenizer):
    """What a metric asks while training is what a chat asks."""
    batch = dummy_batch(tokenizer, TASKS, per_row=5)
    prompts = extract_prompts(batch, padding=tokenizer.vocabulary.padding)
    for row, reference in enumerate(prompts.references):
        ids = prompts.input_ids[row, : reference.prompt_length]
        assert tokenizer.decode(ids[-1:].tolist()) == "<|im_end|>"
        assert int((prompts.document_ids[row] > 0).sum()) == reference.prompt_length
    placeholders = (prompts.input_ids == tokenizer.vocabulary.audio_placeholder).nonzero().tolist()
    spans = zip(prompts.clip_rows.tolist(), prompts.clip_starts.tolist(), prompts.clip_lengths.tolist(), strict=True)
    assert [[row, place] for row, start, length in spans for place in range(start, start + length)] == placeholders


@pytest.mark.parametrize("name", ["speech_to_text.label_thinking", "speech_to_speech.interleaved", "text_to_speech"])
@torch.no_grad()
def test_every_step_of_the_cache_is_a_full_pass(tokens, tokenizer, name):
    """The answer is read again as one row without a cache; each id must be the best one there."""
    model = lively(tokens, seed=2)
    longest = dummy_batch(tokenizer, [task_from_name(name), task_from_name("text_to_text")], exchanges=3)
    reply = generate(model, longest, tokenizer, SHORT)[0]
    prompts = extract_prompts(longest, padding=0)
    length = prompts.references[0].prompt_length
    embeddings, _ = model.hear(prompts, model.lm.embed(prompts.input_ids))
    vocabulary = tokenizer.vocabulary
    codes = (reply.speech_codes + vocabulary.first_code).tolist()
    text = [*reply.text_ids, vocabulary.end_of_text]
    spoken = [vocabulary.speech_boundary, *codes, vocabulary.speech_boundary]
    row = embeddings[:1, :length]
    checked = {"text": 0, "speech": 0}
    kind = "speech" if name == "text_to_speech" else "text"
    wanted = len(reply.text_ids) + len(codes)
    while wanted > 0:
        hidden = model.lm(row, position_ids=None, attention_mask=None)[0, -1]
        stream, head, base = (
            (text, model.lm.text_head, 0) if kind == "text" else (spoken, model.lm.speech_head, vocabulary.first_code)
        )
        expected = stream[checked[kind]]
        if expected not in (vocabulary.speech_boundary, vocabulary.end_of_text):
            assert int(head(hidden).argmax()) + base == expected
            wanted -= 1
        row = torch.cat([row, model.lm.embed(torch.tensor([[expected]]))], dim=1)
        checked[kind] += 1
        if name.endswith("interleaved"):
            chunk, other = (TEXT_CHUNK, "speech") if kind == "text" else (SPEECH_CHUNK, "text")
            text_over = checked["text"] == len(text)
            kind = other if checked[kind] % chunk == 0 and not (kind == "speech" and text_over) else kind
        elif kind == "text" and checked["text"] == len(text):
            kind = "speech"
    assert sum(checked.values()) >= 15


def test_an_empty_batch_has_no_answers(model, tokenizer):
    assert generate(model, collate([], padding=0), tokenizer, SHORT) == []


WARM = SamplingConfig(temperature=1.5)
SAMPLED = replace(SHORT, thinking=WARM, text=WARM, speech=WARM, seed=3)


def test_sampling_follows_from_its_seed(tokens, tokenizer):
    model, batch = lively(tokens), dummy_batch(tokenizer, TASKS[:4])
    first = said(generate(model, batch, tokenizer, SAMPLED))
    torch.manual_seed(99)
    assert said(generate(model, batch, tokenizer, SAMPLED)) == first
    assert said(generate(model, batch, tokenizer, replace(SAMPLED, seed=4))) != first
    best = SamplingConfig(temperature=1.5, top_k=1)
    assert said(generate(model, batch, tokenizer, replace(SAMPLED, thinking=best, text=best, speech=best))) == said(
        generate(model, batch, tokenizer, SHORT)
    )


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_what_an_item_draws_does_not_depend_on_its_neighbours(tokens, tokenizer, penalty):
    model = lively(tokens)
    drawn = SamplingConfig(temperature=1.5, top_p=0.9, repetition_penalty=penalty)
    config = replace(SAMPLED, thinking=drawn, text=drawn, speech=drawn)
    together = said(generate(model, dummy_batch(tokenizer, TASKS), tokenizer, config))
    for number in (0, 4, 8, len(TASKS) - 1):
        alone = generate(model, dummy_batch(tokenizer, [TASKS[number]], first=number), tokenizer, config)
        assert said(alone)[0] == together[number]


def test_each_phase_is_sampled_as_its_own_options_say(tokens, tokenizer):
    names = ["text_to_speech", "text_to_text", "speech_to_text.label_thinking"]
    model, batch = lively(tokens), dummy_batch(tokenizer, [task_from_name(name) for name in names])
    best = said(generate(model, batch, tokenizer, SHORT))
    # An untrained model does not close its thinking, so all that its third answer holds is thinking.
    for phase, changed in (("speech", 0), ("text", 1), ("thinking", 2)):
        drawn = said(generate(model, batch, tokenizer, replace(SHORT, **{phase: SamplingConfig(temperature=2.0)})))
        assert [ours != theirs for ours, theirs in zip(drawn, best, strict=True)] == [i == changed for i in range(3)]


def test_the_penalty_stops_codes_from_repeating_and_silence_is_exempt(tokens, tokenizer):
    model, batch = tiny_model(tokens), dummy_batch(tokenizer, [task_from_name("text_to_speech")])
    with torch.no_grad():
        # Code 0 is always the best, then 1, 2, …; the boundary is the last.
        model.lm.speech_head.weight.zero_()
        model.lm.speech_head.bias.copy_(torch.linspace(1.0, 0.5, 65))

    def codes(**options) -> list[int]:
        return generate(model, batch, tokenizer, replace(SHORT, **options))[0].speech_codes.tolist()

    assert codes() == [0] * 29
    strict = SamplingConfig(repetition_penalty=10.0, repetition_window=40)
    assert codes(speech=strict) == list(range(29))
    assert codes(speech=strict, silence_codes=(2,)) == [0, 1] + [2] * 27
    # What has left the window is free again.
    assert codes(speech=replace(strict, repetition_window=3)) == [n % 4 for n in range(29)]


def test_ids_of_a_model_in_half_precision_are_chosen_in_full(tokens, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(decoding, "choose", lambda logits, *rest: seen.append(logits.dtype) or choose(logits, *rest))
    model, batch = tiny_model(tokens).bfloat16(), dummy_batch(tokenizer, [task_from_name("text_to_speech.interleaved")])
    generate(model, batch, tokenizer, replace(SAMPLED, max_text_ids=8, max_speech_ids=20))
    assert len(seen) > 8 and set(seen) == {torch.float32}


def test_every_step_draws_anew(tokens, tokenizer):
    model, batch = tiny_model(tokens), dummy_batch(tokenizer, [task_from_name("text_to_speech")])
    with torch.no_grad():
        model.lm.speech_head.weight.zero_()
        model.lm.speech_head.bias.zero_()
        model.lm.speech_head.bias[-1] = -100.0
    (reply,) = generate(model, batch, tokenizer, replace(SHORT, speech=SamplingConfig(temperature=1.0)))
    # 29 draws out of 64 codes, all equally likely.
    assert len(reply.speech_codes.unique()) > 15


def test_ids_that_nothing_spells_are_never_written(tokens, tokenizer):
    model, batch = tiny_model(tokens), dummy_batch(tokenizer, [task_from_name("transcribe")])
    before, spelled = said(generate(model, batch, tokenizer, SHORT)), len(tokenizer.tokenizer)
    assert spelled < tokens.text_vocabulary_size

    def prefer_the_rest(_, __, logits: Tensor) -> Tensor:
        return torch.cat([logits[:, :spelled], logits[:, spelled:] + 1e3], dim=1)

    model.lm.text_head.register_forward_hook(prefer_the_rest)
    assert said(generate(model, batch, tokenizer, SHORT)) == before


def test_text_is_kept_from_repeating_by_an_option_of_its_own(tokens, tokenizer):
    model, batch = tiny_model(tokens), dummy_batch(tokenizer, [task_from_name("transcribe")])
    # Id 0 is always the best, then 1, 2, …
    model.lm.text_head.register_forward_hook(lambda *_: torch.linspace(1.0, 0.5, 260)[None])
    strict = SamplingConfig(repetition_penalty=10.0)
    assert generate(model, batch, tokenizer, SHORT)[0].text_ids == [0] * 20
    assert generate(model, batch, tokenizer, replace(SHORT, text=strict))[0].text_ids == list(range(20))
    assert generate(model, batch, tokenizer, replace(SHORT, thinking=strict))[0].text_ids == [0] * 20


def test_a_reply_says_whether_it_came_to_its_end_which_is_no_part_of_its_text(tokens, tokenizer):
    model, batch = tiny_model(tokens), dummy_batch(tokenizer, [task_from_name("transcribe")])
    end = tokenizer.vocabulary.end_of_text
    wanted = iter([5, 6, end, 5, 6, 7])
    model.lm.text_head.register_forward_hook(lambda *_: torch.eye(260)[next(wanted)][None])
    for limit, ids, finished in ((3, [5, 6], True), (3, [5, 6, 7], False)):
        (reply,) = generate(model, batch, tokenizer, replace(SHORT, max_text_ids=limit))
        assert (reply.text_ids, reply.finished) == (ids, finished)
        assert reply.text == tokenizer.decode(ids)


def test_a_silence_code_outside_the_codebook_is_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"silence_codes: 64 .* 0 to 63"):
        generate(model, dummy_batch(tokenizer, TASKS[:1]), tokenizer, replace(SHORT, silence_codes=(64,)))


def test_requests_in_threads_are_answered_as_alone(tokens, tokenizer):
    model = lively(tokens)
    batches = [dummy_batch(tokenizer, TASKS, first=50 * number) for number in range(3)]
    alone = [said(generate(model, batch, tokenizer, SAMPLED)) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda batch: said(generate(model, batch, tokenizer, SAMPLED)), batches))
    assert together == alone


def test_rows_that_are_done_leave_the_batch(tokens, tokenizer):
    """Written answers end before spoken ones begin to: from then on the language model reads fewer rows."""
    model = lively(tokens)
    names = ["text_to_speech", "label", "label", "label"]
    batch = dummy_batch(tokenizer, [task_from_name(name, labels=("age",)) for name in names])
    rows: list[int] = []
    handle = model.lm.causal_lm.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    replies = generate(model, batch, tokenizer, replace(SHORT, max_text_ids=5))
    handle.remove()
    assert rows[:5] == [4] * 5 and rows[-1] == 1
    alone = generate(model, dummy_batch(tokenizer, [task_from_name("text_to_speech")]), tokenizer, SHORT)
    assert said(replies)[0] == said(alone)[0]


def test_ranks_that_must_go_on_take_a_step_each_time(tokens, tokenizer):
    """A rank whose rows are done makes the forward calls of the longest among the ranks, and its answers stay."""
    model, batch = lively(tokens), dummy_batch(tokenizer, TASKS[:2])
    expected = said(generate(model, batch, tokenizer, SHORT))
    passes: list[bool] = []
    handle = model.lm.causal_lm.get_decoder().register_forward_hook(lambda *_: passes.append(True))
    asked: list[bool] = []

    def goes_on(writing: bool) -> bool:
        asked.append(writing)
        return len(asked) <= 90

    replies = generate(model, batch, tokenizer, SHORT, goes_on=goes_on)
    handle.remove()
    assert not asked[-1] and len(passes) == 90
    assert said(replies) == expected


def test_a_generation_can_be_watched_step_by_step(tokens, tokenizer):
    model, batch = lively(tokens), dummy_batch(tokenizer, TASKS[-1:])
    generation = Generation(model, batch, tokenizer, SHORT)
    lengths = []
    while not generation.done:
        generation.step()
        lengths.append(len(generation.writers[0].written.ids))
    assert lengths == list(range(1, len(lengths) + 1))
    assert said(generation.replies()) == said(generate(model, batch, tokenizer, SHORT))


def test_timings_are_told(model, tokenizer):
    reply = generate(model, dummy_batch(tokenizer, TASKS[:1]), tokenizer, replace(SHORT, max_text_ids=2))[0]
    assert set(reply.timings) == {"prefill", "total"}
    assert 0 < reply.timings["prefill"] <= reply.timings["total"]
