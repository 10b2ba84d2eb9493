"""A later turn reads only what is new, and answers as if it had read everything."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_echat.contracts import DialogueSample, PackedBatch, Turn
from lightning_echat.conversation import ConversationMemory, GrowingCache
from lightning_echat.data.batching import collate
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.testing import dummy_audio, tiny_model
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.prompts import load_prompt_set
from lightning_echat.tokens.tasks import task_from_name

SHORT = DecodingConfig(max_text_ids=12, max_speech_ids=15)


def spread(model):
    """Ids vary, and in float64 hardly any two are nearly equal."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.lm.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    return model


def question(seed: int) -> Turn:
    return Turn(role="user", log_mel=LogMel()(dummy_audio(0.5 + 0.3 * seed, seed=seed)))


def prompt(tokenizer, turns: list[Turn], task: str) -> PackedBatch:
    sample = DialogueSample(turns=list(turns), key=f"turn-{len(turns)}")
    return collate([tokenizer.prompt(sample, task_from_name(task))], padding=tokenizer.vocabulary.padding)


def with_codes_in_history(tokenizer: DialogueTokenizer) -> DialogueTokenizer:
    prompts = load_prompt_set("compact")
    return DialogueTokenizer(
        tokenizer.tokenizer,
        vocabulary=tokenizer.vocabulary,
        prompt_set=replace(prompts, history=replace(prompts.history, speech_codes=True)),
        audio_strides=tokenizer.audio_strides,
    )


@pytest.mark.parametrize(
    "task",
    ["speech_to_text", "speech_to_speech", "speech_to_speech.label_thinking.interleaved"],
)
@pytest.mark.parametrize("spoken_history", [False, True])
def test_three_turns_with_memory_are_answered_as_without(tokens, tokenizer, task, spoken_history):
    tokenizer = with_codes_in_history(tokenizer) if spoken_history else tokenizer
    model, memory, turns = spread(tiny_model(tokens)), ConversationMemory(), []
    read: list[int] = []
    before = 0
    handle = model.lm.causal_lm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for number in range(3):
        turns.append(question(number))
        batch = prompt(tokenizer, turns, task)
        (fresh,) = generate(model, batch, tokenizer, SHORT)
        read.clear()
        (reply,) = generate(model, batch, tokenizer, SHORT, memory=memory)
        assert reply.text_ids == fresh.text_ids and torch.equal(reply.speech_codes, fresh.speech_codes)
        # What is read first is the part of the prompt that is new: at the least all up to the last answer is known.
        known = batch.references[0].prompt_length - read[0]
        assert known == memory.reused
        assert known >= before and (known > 0) == (number > 0)
        before = batch.references[0].prompt_length
        codes = reply.speech_codes if reply.speech_codes.numel() else torch.tensor([1, 2])
        turns.append(Turn(role="assistant", text=reply.text or "yes", speech_codes=codes))
    handle.remove()


def test_another_question_in_the_same_place_is_read(tokens, tokenizer):
    """Placeholders look alike whatever was said, so the audio itself is compared."""
    model, memory = spread(tiny_model(tokens)), ConversationMemory()
    first = prompt(tokenizer, [Turn(role="user", log_mel=LogMel()(dummy_audio(0.5, seed=1)))], "speech_to_text")
    other = prompt(tokenizer, [Turn(role="user", log_mel=LogMel()(dummy_audio(0.5, seed=2)))], "speech_to_text")
    assert torch.equal(first.input_ids, other.input_ids)
    generate(model, first, tokenizer, SHORT, memory=memory)
    (reply,) = generate(model, other, tokenizer, SHORT, memory=memory)
    assert 0 < memory.reused <= int(other.clip_starts[0])
    assert reply.text_ids == generate(model, other, tokenizer, SHORT)[0].text_ids
    generate(model, other, tokenizer, SHORT, memory=memory)
    assert memory.reused == other.references[0].prompt_length - 1


def test_an_answer_that_broke_off_leaves_a_memory_that_holds(tokens, tokenizer):
    model, memory = spread(tiny_model(tokens)), ConversationMemory()
    first, other = (prompt(tokenizer, [question(seed)], "speech_to_text") for seed in (0, 1))
    generate(model, first, tokenizer, SHORT, memory=memory)
    steps = iter([True, True, False])
    with pytest.raises(StopIteration):
        generate(model, other, tokenizer, SHORT, memory=memory, goes_on=lambda _: next(steps) or next(iter([])))
    (reply,) = generate(model, first, tokenizer, SHORT, memory=memory)
    assert reply.text_ids == generate(model, first, tokenizer, SHORT)[0].text_ids


def test_a_memory_holds_one_conversation(tokens, tokenizer):
    batch = collate(
        [
            tokenizer.prompt(DialogueSample(turns=[question(n)], key="d"), task_from_name("speech_to_text"))
            for n in (0, 1)
        ],
        padding=0,
    )
    with pytest.raises(ValueError, match="not 2"):
        generate(tiny_model(tokens), batch, tokenizer, SHORT, memory=ConversationMemory())


def test_a_growing_cache_holds_what_was_added():
    cache = GrowingCache()
    added: list[Tensor] = []
    for length in (3, 1, 1, 400, 1):
        keys = torch.randn(2, 3, length, 4)
        added.append(keys)
        held, values = cache.update(keys, 2 * keys, 0)
        assert torch.equal(held, torch.cat(added, dim=2)) and torch.equal(values, 2 * held)
    assert cache.get_seq_length() == 406
    cache.keep_rows(torch.tensor([1]))
    cache.keep_first(5)
    keys = torch.randn(1, 3, 1, 4)
    held, _ = cache.update(keys, keys, 0)
    assert torch.equal(held, torch.cat([torch.cat(added, dim=2)[1:, :, :5], keys], dim=2))


def test_a_step_of_a_growing_cache_copies_nothing():
    cache = GrowingCache()
    cache.update(torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4), 0)
    held, _ = cache.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4), 0)
    place = held.data_ptr()
    held, _ = cache.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4), 0)
    assert held.data_ptr() == place
