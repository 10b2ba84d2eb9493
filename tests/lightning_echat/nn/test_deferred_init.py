"""Weights that come after the sharding are those of an ordinary construction, and no rank holds them all."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig, WhisperModel

from lightning_echat.contracts import UserError
from lightning_echat.nn.deferred_init import DeferredInit, local, part_of, to_memory
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.nn.speech_language_model import LoRAConfig
from lightning_echat.nn.weight_sources import read_pretrained
from lightning_echat.parallel import ShardedStrategy
from lightning_echat.testing import tiny_network_config
from lightning_echat.tokens.dialogue_template import TokensConfig
from lightning_echat.tokens.vocabulary import Vocabulary
from tests.ranks import run_on_ranks
from tests.tiny_training import make_stage, make_trainer


def build(network: NetworkConfig, tokens: TokensConfig, vocabulary: Vocabulary) -> EChatModel:
    torch.manual_seed(3)
    return EChatModel(network, tokens=tokens, vocabulary=vocabulary)


def build_deferred(network: NetworkConfig, tokens: TokensConfig, vocabulary: Vocabulary) -> tuple[EChatModel, int]:
    """The model on the CPU, and how many of its weights were read."""
    with DeferredInit() as deferred:
        model = build(network, tokens, vocabulary)
    assert all(parameter.is_meta for parameter in model.parameters())
    deferred.name(model)
    to_memory(model, torch.device("cpu"))
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    read = read_pretrained(model, network)
    deferred.fill(model, but=read)
    return model, len(read)


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    named = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, expected)]
    assert named[0].keys() == named[1].keys()
    for name, tensor in named[1].items():
        assert torch.equal(named[0][name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["whole", "lora"])
def test_deferred_weights_are_those_of_an_ordinary_construction(tied, lora, tokens, tokenizer):
    """Buffers too, and the generator goes on from where it would have."""
    network = tiny_network_config(auxiliary_labels=("age",), depthwise_kernel=3, lora=lora)
    llm = replace(network.llm, architecture={**network.llm.architecture, "tie_word_embeddings": tied})
    network = replace(network, llm=llm)
    expected = build(network, tokens, tokenizer.vocabulary)
    after = torch.rand(3)
    model, _ = build_deferred(network, tokens, tokenizer.vocabulary)
    torch.manual_seed(3)
    with DeferredInit():
        EChatModel(network, tokens=tokens, vocabulary=tokenizer.vocabulary)
    assert torch.equal(torch.rand(3), after)
    assert_same(model, expected)
    assert (model.lm.text_head.weight is model.lm.causal_lm.get_input_embeddings().weight) == tied


def pretrained(folder: Path, *, shard_size: str = "20KB") -> NetworkConfig:
    """The tiny network with an encoder and a language model from disk, the latter in several files."""
    torch.manual_seed(5)
    tiny = tiny_network_config(depthwise_kernel=3)
    sizes = dict(tiny.llm.architecture)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    llm.to(torch.bfloat16).save_pretrained(folder / "llm", max_shard_size=shard_size)
    encoder = tiny.encoder
    options: dict[str, Any] = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 9}
    marks: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        d_model=encoder.width,
        encoder_layers=encoder.layers,
        encoder_attention_heads=encoder.heads,
        encoder_ffn_dim=encoder.feedforward,
        num_mel_bins=80,
        **options,
        **marks,
    )
    WhisperModel(config).save_pretrained(folder / "whisper")
    return replace(
        tiny,
        encoder=replace(encoder, pretrained=True, weights=str(folder / "whisper")),
        llm=replace(tiny.llm, pretrained=True, weights=str(folder / "llm"), architecture={}),
    )


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["whole", "lora"])
def test_pretrained_weights_are_read_as_hugging_face_reads_them(tmp_path, lora, tokens, tokenizer):
    network = pretrained(tmp_path)
    network = replace(network, llm=replace(network.llm, lora=lora))
    assert len(list((tmp_path / "llm").glob("*.safetensors"))) > 1
    expected = build(network, tokens, tokenizer.vocabulary)
    expected.encoder.load_whisper()
    model, read = build_deferred(network, tokens, tokenizer.vocabulary)
    assert_same(model, expected)
    assert read > 40


def test_pretrained_weights_that_are_not_there_or_do_not_fit_are_told(tmp_path, tokens, tokenizer):
    network = pretrained(tmp_path, shard_size="1GB")
    other = replace(network, encoder=replace(network.encoder, layers=3))
    with pytest.raises(UserError, match=r"speech encoder .* lacks .*layers\.2"):
        build_deferred(other, tokens, tokenizer.vocabulary)
    other = replace(network, encoder=replace(network.encoder, feedforward=32))
    with pytest.raises(UserError, match=r"speech encoder .* has other sizes"):
        build_deferred(other, tokens, tokenizer.vocabulary)
    other = replace(network, encoder=replace(network.encoder, weights=str(tmp_path / "none")))
    with pytest.raises(UserError, match="cannot load speech encoder"):
        build_deferred(other, tokens, tokenizer.vocabulary)
    (tmp_path / "llm" / "model.safetensors").rename(tmp_path / "llm" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"language model .* has no model\.safetensors"):
        build_deferred(network, tokens, tokenizer.vocabulary)


def peak_bytes() -> int:
    """The most that this process has held of what is its own and of mapped files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found.group(1))


def large_network(lora: LoRAConfig | None = None) -> NetworkConfig:
    """250 MB, its largest parameter 4 MB."""
    tiny = tiny_network_config(lora=lora)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    return replace(tiny, llm=replace(tiny.llm, architecture={**tiny.llm.architecture, **sizes}))


def build_on_ranks(network: NetworkConfig, tokens: TokensConfig, folder: Path) -> None:
    """What a run does before its first step; writes down the weights and what building them took."""
    stage = make_stage(tokens, network=network)
    trainer = make_trainer(folder, strategy=ShardedStrategy(), devices=2)
    trainer.strategy.connect(stage)
    stage._trainer = trainer
    trainer.strategy.setup_environment()
    before = peak_bytes()
    torch.manual_seed(3)
    stage.configure_model()
    took = peak_bytes() - before
    parts = {name: (part_of(p), local(p.detach())) for name, p in stage.named_parameters()}
    torch.save({"took": took, "parts": parts}, folder / f"{trainer.global_rank}.pt")


def assert_parts_make(expected: nn.Module, folder: Path) -> None:
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False)["parts"] for rank in (0, 1)]
    for name, tensor in expected.named_parameters():
        halves = [rank[f"model.{name}"] for rank in ranks]
        assert sum(own.numel() for _, own in halves) == tensor.numel(), name
        for part, own in halves:
            assert torch.equal(own, tensor[part]), name


def test_no_rank_holds_the_whole_model_while_it_is_built(tmp_path, tokens, tokenizer):
    """Half of it on each of two ranks, and one parameter whole."""
    network = large_network()
    run_on_ranks(build_on_ranks, network, tokens, tmp_path)
    expected = build(network, tokens, tokenizer.vocabulary)
    whole = sum(parameter.nbytes for parameter in expected.parameters())
    assert whole > 240e6
    for rank in (0, 1):
        took = torch.load(tmp_path / f"{rank}.pt", mmap=True, weights_only=False)["took"]
        assert 0.4 * whole < took < 0.7 * whole, f"{took / whole:.2f} of {whole / 1e6:.0f} MB"
    assert_parts_make(expected, tmp_path)


def test_pretrained_weights_reach_the_shards(tmp_path, tokens, tokenizer):
    network = pretrained(tmp_path)
    run_on_ranks(build_on_ranks, network, tokens, tmp_path)
    expected = build(network, tokens, tokenizer.vocabulary)
    expected.encoder.load_whisper()
    assert_parts_make(expected, tmp_path)
