"""Every layout in which the weights come gives the same folder, and what does not fit is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from lightning_echat import cli
from lightning_echat.checkpoints.from_reference import check_against_model, from_reference
from lightning_echat.checkpoints.reference_layout import Conversion, codebook_size, convert, infer_network
from lightning_echat.contracts import UserError
from lightning_echat.nn.weights import load_trained
from lightning_echat.testing import tiny_tokenizer
from lightning_echat.tokens.dialogue_template import TokensConfig


def lora_layout(released: dict[str, Tensor], *, rank: int = 4, alpha: float = 32) -> dict[str, Tensor]:
    """The same model as PEFT would have it: some of its weights split into a base and a low-rank update."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, tensor in released.items():
        if not name.startswith("llama_model."):
            found[name] = tensor
            continue
        wrapped = name.replace("llama_model.", "llama_model.base_model.model.", 1)
        layer, _, kind = wrapped.rpartition(".")
        if layer.endswith(("q_proj", "down_proj")):
            found[f"{layer}.base_layer.{kind}"] = tensor
        else:
            found[wrapped] = tensor
        if layer.endswith(("q_proj", "down_proj")) and kind == "weight":
            up = torch.randn(tensor.shape[0], rank, generator=generator)
            down = torch.randn(rank, tensor.shape[1], generator=generator)
            found[f"{layer}.lora_A.default.weight"], found[f"{layer}.lora_B.default.weight"] = down, up
            found[f"{layer}.base_layer.{kind}"] = tensor - alpha / rank * up @ down
    return found


def save_layout(path: Path, layout: str, released: dict[str, Tensor]) -> Path:
    file = path / ("a.safetensors" if layout == "safetensors" else "a.pt")
    if layout == "safetensors":
        save_file({name: tensor.clone() for name, tensor in released.items()}, file)
    elif layout == "deepspeed":
        torch.save({"module": released, "ds_version": "0.14", "dp_world_size": 8}, file)
    elif layout == "prefix":
        torch.save({f"module.{name}": tensor for name, tensor in released.items()}, file)
    elif layout == "before zip":
        torch.save(released, file, _use_new_zipfile_serialization=False)
    elif layout == "lora":
        torch.save(lora_layout(released), file)
    elif layout == "no doubles":
        doubles = ("llama_model.model.embed_tokens.weight", "lm_head.weight", "llama_model.lm_head.weight")
        torch.save({n: t for n, t in released.items() if n not in doubles and "ln_speech" not in n}, file)
    else:
        torch.save(released, file)
    return file


@pytest.mark.parametrize("layout", ["plain", "safetensors", "deepspeed", "prefix", "before zip", "no doubles", "lora"])
def test_every_layout_gives_the_same_weights(layout, released, converted, parity, tmp_path, capsys):
    file = save_layout(tmp_path, layout, released)
    from_reference(file, str(parity / "llm"), tmp_path / "out", encoder_heads=4)
    ours, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(converted / "model.safetensors")
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5 if layout == "lora" else 0, rtol=0)
    shown = capsys.readouterr().out
    assert ("4 updates merged with alpha 32" in shown) == (layout == "lora")
    assert ("left out: never used by the released code" in shown) == (layout != "no doubles")
    assert "2,173,057 parameters" in shown
    assert "--reference_repo CLONE" in shown
    assert "speech encoder: 4 attention heads\n" in shown
    # Nothing in the folder tells where it was made.
    assert str(parity) not in (tmp_path / "out/config.json").read_text()


def test_alpha_of_lora_comes_from_the_option_or_the_config(released, parity, tmp_path, capsys):
    file = save_layout(tmp_path, "lora", released)
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"lora_alpha": 16, "encoder_conf": {"attention_heads": 4, "output_size": 64}}))
    llm = str(parity / "llm")
    from_reference(file, llm, tmp_path / "a", reference_config=config)
    from_reference(file, llm, tmp_path / "b", reference_config=config, lora_alpha=32)
    shown = capsys.readouterr().out
    assert "alpha 16" in shown and "alpha 32" in shown
    name = "model.lm.llm.model.layers.0.self_attn.q_proj.weight"
    theirs = released["llama_model.model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(load_file(tmp_path / "b/model.safetensors")[name], theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(load_file(tmp_path / "a/model.safetensors")[name], theirs, atol=1e-2)
    assert load_trained(tmp_path / "a").model.encoder.config.heads == 4
    config.write_text(yaml.safe_dump({"encoder_conf": {"attention_heads": 16, "output_size": 1024}}))
    with pytest.raises(UserError, match="another checkpoint's: its encoder is 1024 wide, the tensors 64"):
        from_reference(file, llm, tmp_path / "c", reference_config=config)


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def wrong_input(kind: str, released: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = dict(released)
    if kind == "unknown":
        state["speech_model.weight"] = torch.zeros(3)
    elif kind == "missing":
        del state["speech_transformer.encoders.1.norm1.bias"], state["speech_llama_proj.bias"]
    elif kind == "shape":
        state["encoder.after_norm.bias"] = torch.zeros(5)
    elif kind == "double":
        state["lm_head.weight"] = state["lm_head.weight"] + 1
    elif kind == "key of an adapter":
        del state["speech_transformer.encoders.1.self_attn.linear_k.bias"]
    elif kind == "harmful":
        state["harm"] = Harmful()
    elif kind == "half":
        state["llama_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(4, 64)
    elif kind == "another model":
        state = {"weight": torch.zeros(2, 2)}
    elif kind == "no weights":
        state = {"epoch": 3}
    return state


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("unknown", r"1 unknown \(speech_model\.weight\)"),
        ("missing", r"2 missing \(adapter\.layers\.1\.norm1\.bias, …\)|2 missing \(adapter\.projection\.bias, …\)"),
        ("shape", r"1 of another shape \(encoder\.layer_norm\.bias: \[5\], not \[64\]"),
        ("double", "lm_head.weight and .* hold different values"),
        ("key of an adapter", r"in_proj_bias: \[128\], not \[192\]"),
        ("harmful", "objects besides tensors"),
        ("half", "lacks lora_B"),
        ("another model", "lacks encoder.conv1.weight; unknown in it: weight"),
        ("no weights", "holds no weights, only epoch"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, told, released, parity, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(wrong_input(kind, released), "a.pt")
    with pytest.raises(UserError, match=told) as error:
        from_reference(Path("a.pt"), str(parity / "llm"), Path("out"), encoder_heads=4)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]
    if kind == "missing":
        shown = capsys.readouterr().out
        assert "missing: adapter.layers.1.norm1.bias\n" in shown and "missing: adapter.projection.bias\n" in shown


def test_the_command_tells_in_one_line_what_is_wrong(released, parity, tmp_path, capsys):
    file = save_layout(tmp_path, "plain", released)
    start = ["convert", "from-reference", "--checkpoint", str(file), "--llm", str(parity / "llm")]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    for words, told in (
        (["--out", str(taken), "--encoder-heads", "4"], "is there already"),
        (["--out", str(tmp_path / "o"), "--encoder-heads", "7"], "do not divide"),
        (["--out", str(tmp_path / "o"), "--reference-repo", str(tmp_path / "none")], "no such folder"),
        (["--out", str(tmp_path / "o"), "--reference-repo", str(taken)], "has no wenet"),
        (["--out", str(tmp_path / "o"), "--reference-config", str(taken / "file")], "no keys and values"),
        (["--out", str(tmp_path / "o"), "--checkpoint", str(taken)], "no checkpoint at"),
        (["--out", str(tmp_path / "o"), "--checkpoint", str(taken / "file")], "holds objects|cannot read|damaged"),
        (["--out", str(tmp_path / "o"), "--llm", str(taken)], "cannot read the config of --llm"),
    ):
        with pytest.raises(SystemExit) as leaving:
            cli.main([*start, *words])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("echat:")]
        assert leaving.value.code == 2 and len(lines) == 1, words
        assert any(part in lines[0] for part in told.split("|")), lines[0]
    assert (taken / "file").read_text() == "mine"
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


QWEN_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}


def released_outline() -> dict[str, Tensor]:
    """Names and shapes of the released checkpoint, without content: the table of the specification."""
    wide: dict[str, tuple[int, ...]] = {
        "encoder.embed.conv.0.weight": (1024, 80, 3),
        "encoder.embed.conv.2.weight": (1024, 1024, 3),
        "encoder.embed.pos_enc.pe": (1, 30000, 1024),
        "speech_transformer.embed.pos_enc.pe": (1, 5000, 1024),
        "speech_transformer.embed.out.0.weight": (1024, 1024),
        "speech_llama_proj.weight": (2048, 1024),
        "speech_token_emded.weight": (4099, 2048),
        "speech_head.weight": (4097, 2048),
        "embed_tokens.weight": (151936, 2048),
        "lm_head.weight": (151936, 2048),
    }
    wide |= {f"down_sample_2.conv.{i}.weight": (1024, 1024, 3) for i in (1, 4, 7)}
    for norm in ("encoder.after_norm", "ln_speech", "speech_transformer.embed.out.1", "speech_transformer.after_norm"):
        wide[f"{norm}.weight"] = (1024,)
    for part, layers, feedforward in (("encoder", 24, 4096), ("speech_transformer", 4, 2560)):
        for i in range(layers):
            layer = f"{part}.encoders.{i}"
            wide |= {f"{layer}.self_attn.linear_{p}.weight": (1024, 1024) for p in ("q", "k", "v", "out")}
            wide |= {f"{layer}.feed_forward.w_1.weight": (feedforward, 1024)}
            wide |= {f"{layer}.feed_forward.w_2.weight": (1024, feedforward)}
            wide |= {f"{layer}.norm{n}.weight": (1024,) for n in (1, 2)}
    unbiased = ("pe", "embed_tokens.weight", "lm_head.weight", "speech_token_emded.weight")
    biases = {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in wide.items()
        if not name.endswith(unbiased) and not (name.startswith("encoder.") and "linear_k" in name)
    }
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN_3B))
        found = {name: torch.empty(shape) for name, shape in {**wide, **biases}.items()}
    return {**found, **{f"llama_model.{name}": tensor for name, tensor in llm.state_dict().items()}}


def full_size(conversion: Conversion, tokenizer: Path) -> tuple:
    """What the command builds of a released checkpoint's sizes."""
    architecture = json.loads(Qwen2Config(**QWEN_3B).to_json_string(use_diff=False))
    network = infer_network(conversion, llm_name="qwen", architecture=architecture, encoder_heads=None)
    tokens = TokensConfig(
        tokenizer=str(tokenizer), text_vocabulary_size=151936, codebook_size=codebook_size(conversion)
    )
    return network, tokens


def test_the_released_checkpoints_names_and_shapes_fit(tmp_path, capsys):
    """888 tensors, as the specification counts them, and every parameter of the network has its own."""
    outline = released_outline()
    assert len(outline) == 888
    conversion = convert(outline, tied=True, lora_alpha=32)
    network, tokens = full_size(conversion, tiny_tokenizer(tmp_path))
    assert (network.encoder.layers, network.encoder.heads, network.encoder.feedforward) == (24, 16, 4096)
    assert (network.adapter.layers, network.adapter.feedforward, tokens.codebook_size) == (4, 2560, 4096)
    aliases = check_against_model(conversion, network, tokens, console=Console())
    assert aliases == {"lm.llm.lm_head.weight": "lm.llm.model.embed_tokens.weight"}
    assert capsys.readouterr().out == ""
    total = sum(torch.Size(tensor.shape).numel() for tensor in conversion.tensors.values())
    assert total == 3_458_799_617 - 2 * 1024
    assert set(conversion.dropped) == {
        "embed_tokens.weight",
        "lm_head.weight",
        "llama_model.lm_head.weight",
        "encoder.embed.pos_enc.pe",
        "speech_transformer.embed.pos_enc.pe",
        "ln_speech.weight",
        "ln_speech.bias",
    }
