from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2Config, Qwen2ForCausalLM

from lightning_echat.contracts import UserError
from lightning_echat.nn.speech_language_model import LanguageModelConfig, LoRAConfig, SpeechLanguageModel
from lightning_echat.nn.trainable_parts import set_trainable
from lightning_echat.testing import dummy_batch, tiny_model, tiny_network_config
from lightning_echat.tokens.tasks import DialogueTask

ARCHITECTURE = tiny_network_config().llm
EMBEDDING = "llm.model.embed_tokens.weight"


def language_model(tokenizer, config: LanguageModelConfig = ARCHITECTURE) -> SpeechLanguageModel:
    torch.manual_seed(0)
    return SpeechLanguageModel(config, vocabulary=tokenizer.vocabulary).eval()


def test_every_kind_of_id_has_its_row(tokenizer):
    lm, vocabulary = language_model(tokenizer), tokenizer.vocabulary
    text, speech = lm.get_parameter(EMBEDDING), lm.speech_embedding.weight
    expected = {
        0: text[0],
        vocabulary.text_size - 1: text[-1],
        vocabulary.first_code: speech[0],
        vocabulary.first_code + 63: speech[63],
        vocabulary.speech_boundary: speech[64],
        vocabulary.input_speech_begin: speech[65],
        vocabulary.input_speech_end: speech[66],
        vocabulary.audio_placeholder: torch.zeros(32),
    }
    embedded = lm.embed(torch.tensor([list(expected)]))
    assert torch.equal(embedded[0], torch.stack(list(expected.values())))
    assert len(speech) == 67 and lm.speech_head.weight.shape == (65, 32)


def test_the_text_head_is_the_embedding_where_the_model_ties_them(tokenizer):
    tied = language_model(tokenizer)
    assert tied.text_head.weight is tied.causal_lm.get_input_embeddings().weight
    architecture = {**ARCHITECTURE.architecture, "tie_word_embeddings": False}
    untied = language_model(tokenizer, replace(ARCHITECTURE, architecture=architecture))
    assert untied.text_head.weight is not untied.causal_lm.get_input_embeddings().weight


def test_another_text_vocabulary_is_refused_with_the_right_size(tokenizer):
    config = replace(ARCHITECTURE, architecture={**ARCHITECTURE.architecture, "vocab_size": 300})
    with pytest.raises(UserError, match="set it to 300"):
        language_model(tokenizer, config)


def test_an_architecture_without_its_type_is_refused(tokenizer):
    with pytest.raises(UserError, match="model_type"):
        language_model(tokenizer, replace(ARCHITECTURE, architecture={"vocab_size": 260}))


def test_a_language_model_that_is_not_there_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot load language model"):
        language_model(tokenizer, LanguageModelConfig(weights=str(tmp_path / "none")))


@pytest.mark.parametrize("pretrained", [True, False])
def test_half_precision_weights_are_trained_in_the_precision_of_the_trainer(tokenizer, tmp_path, pretrained):
    """A released bfloat16 model trained in bfloat16 by accident does not move: its small updates round to nothing."""
    sizes = {k: v for k, v in ARCHITECTURE.architecture.items() if k != "model_type"}
    released = Qwen2ForCausalLM(Qwen2Config(**sizes))
    released.bfloat16()
    released.save_pretrained(tmp_path)
    lm = language_model(tokenizer, LanguageModelConfig(weights=str(tmp_path), pretrained=pretrained))
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}
    same = torch.equal(lm.get_parameter(EMBEDDING), released.get_parameter("model.embed_tokens.weight").float())
    assert same is pretrained


def test_under_lora_only_its_matrices_and_the_speech_parts_train(tokens):
    network = tiny_network_config(lora=LoRAConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj")))
    model = tiny_model(tokens, network=network)
    count = set_trainable(model, ["lm.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {
        "lm.speech_embedding.weight",
        "lm.speech_head.weight",
        "lm.speech_head.bias",
    }
    # Two layers, two targets, A and B each.
    assert len(trained) == 3 + 2 * 2 * 2
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(UserError, match="frozen by LoRA"):
        set_trainable(model, ["lm.llm.*embed_tokens.weight"])


def test_lora_starts_as_the_model_it_adapts(tokens, tokenizer):
    torch.manual_seed(3)
    adapted = language_model(tokenizer, replace(ARCHITECTURE, lora=LoRAConfig(rank=2)))
    ids = torch.arange(12)[None]
    positions = torch.arange(12)[None]
    with torch.no_grad():
        hidden = adapted(adapted.embed(ids), position_ids=positions, attention_mask=None)
        assert isinstance(adapted.llm, PeftModel)
        base: Any = adapted.llm.unload()
        expected = base.get_decoder()(inputs_embeds=adapted.embed(ids), position_ids=positions).last_hidden_state
    torch.testing.assert_close(hidden, expected)


def test_gradient_checkpointing_changes_no_gradient(tokens, tokenizer):
    batch, gradients = dummy_batch(tokenizer, [DialogueTask(kind="transcribe")]), []
    for checkpointed in (False, True):
        network = tiny_network_config()
        network = replace(network, llm=replace(network.llm, gradient_checkpointing=checkpointed))
        model = tiny_model(tokens, network=network, seed=1).train()
        calls: list[int] = []
        torch.manual_seed(2)
        attention = model.get_submodule("lm.llm.model.layers.0.self_attn")
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(batch).hidden_states.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (2 if checkpointed else 1)
    plain, again = gradients
    assert plain.keys() == again.keys() and plain
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=2)])
def test_rotary_positions_are_rounded_where_the_config_says_so(tokenizer, lora):
    config = replace(ARCHITECTURE, lora=lora)
    plain = language_model(tokenizer, config)
    rounded = language_model(tokenizer, replace(config, rotary_bfloat16=True))
    positions = torch.arange(50)[None]
    decoders: list[Any] = [lm.causal_lm.get_decoder() for lm in (plain, rounded)]
    tables = [decoder.rotary_emb(torch.zeros(1), positions) for decoder in decoders]
    for exact, coarse in zip(*tables, strict=True):
        assert coarse.dtype == torch.float32
        assert torch.equal(exact.bfloat16().float(), coarse) and not torch.equal(exact, coarse)


def test_a_language_model_without_rotary_positions_cannot_round_them(tokenizer):
    gpt2 = {"model_type": "gpt2", "vocab_size": 260, "n_embd": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(UserError, match="rotary_bfloat16"):
        language_model(tokenizer, LanguageModelConfig(pretrained=False, architecture=gpt2, rotary_bfloat16=True))
