from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_echat.nn.speech_adapter import SpeechAdapter, SpeechAdapterConfig, interleaved_sinusoids
from lightning_echat.tokens.speech_timing import num_embeddings

PARITY = Path(__file__).parents[4] / "shared/reference/parity"


def adapter(*, layers: int = 2, strides: tuple[int, ...] = (1, 2, 2), width: int = 16, **sizes) -> SpeechAdapter:
    torch.manual_seed(0)
    options = {"heads": 2, "feedforward": 32, "dropout": 0.0, **sizes}
    config = SpeechAdapterConfig(strides=strides, layers=layers, **options)
    return SpeechAdapter(config, encoder_width=width, llm_width=24).eval()


@pytest.mark.parametrize("strides", [(1, 2, 2), (2, 2), (1, 2)])
@torch.no_grad()
def test_convolutions_never_look_ahead(strides):
    network = adapter(layers=0, strides=strides)
    frames = torch.randn(1, 40, 16)
    before, _ = network(frames, torch.tensor([40]))
    for changed in range(0, 40, 7):
        later = frames.clone()
        later[:, changed:] += 1
        after, _ = network(later, torch.tensor([40]))
        untouched = num_embeddings(changed, strides)
        assert torch.equal(before[:, :untouched], after[:, :untouched])
        assert not torch.equal(before[:, untouched:], after[:, untouched:])


@pytest.mark.parametrize("strides", [(1, 2, 2), (2, 2), (1, 2), (3,)])
def test_lengths_are_those_of_the_one_formula(strides):
    network = adapter(strides=strides)
    lengths = torch.arange(1, 30)
    embeddings, found = network(torch.zeros(29, 29, 16), lengths)
    assert torch.equal(found, num_embeddings(lengths, strides))
    assert embeddings.shape == (29, num_embeddings(29, strides), 24)


@torch.no_grad()
def test_a_clip_gives_the_same_embeddings_alone_and_beside_junk():
    network = adapter()
    clips = [torch.randn(length, 16) for length in (33, 32, 5)]
    batch = 9 * torch.randn(3, 33, 16)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = clip
    together, lengths = network(batch, torch.tensor([33, 32, 5]))
    for row, clip in enumerate(clips):
        alone, _ = network(clip[None], torch.tensor([len(clip)]))
        torch.testing.assert_close(together[row, : int(lengths[row])], alone[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_training_and_answering_compute_the_same():
    """In eval mode torch takes a fused path."""
    network = adapter()
    frames, lengths = torch.randn(2, 21, 16), torch.tensor([21, 12])
    answering, found = network(frames, lengths)
    training, _ = network.train()(frames, lengths)
    for row, length in enumerate(found.tolist()):
        torch.testing.assert_close(answering[row, :length], training[row, :length], atol=1e-5, rtol=0)


def test_positions_alternate_sine_and_cosine():
    code = interleaved_sinusoids(3, 4, torch.device("cpu"))
    two = torch.tensor(2.0)
    expected = torch.stack([two.sin(), two.cos(), (two / 100).sin(), (two / 100).cos()])
    torch.testing.assert_close(code[2], expected)
    assert code[0].tolist() == [0, 1, 0, 1]


@pytest.mark.skipif(not PARITY.is_dir(), reason="the reference's fixtures are not here")
@torch.no_grad()
def test_the_reference_adapter_is_reproduced():
    given = load_file(PARITY / "io.safetensors")
    state = load_file(PARITY / "state_dict.safetensors")
    feedforward = state["speech_transformer.encoders.0.feed_forward.w_1.weight"].shape[0]
    config = SpeechAdapterConfig(layers=4, heads=4, feedforward=feedforward)
    width, llm_width = 64, state["speech_llama_proj.weight"].shape[0]
    network = SpeechAdapter(config, encoder_width=width, llm_width=llm_width).eval()
    network.load_state_dict(_from_reference(state))
    lengths = (given["feats_lengths"] + 1) // 2
    embeddings, found = network(given["encoder_out"], lengths)
    for row, length in enumerate(found.tolist()):
        assert length == int(given["speech_mask"][row].sum())
        torch.testing.assert_close(embeddings[row, :length], given["speech_embeds"][row, :length], atol=1e-4, rtol=0)


def _from_reference(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for ours, theirs in (
            *((f"convolutions.{i}", f"down_sample_2.conv.{3 * i + 1}") for i in range(3)),
            ("embed.0", "speech_transformer.embed.out.0"),
            ("embed.1", "speech_transformer.embed.out.1"),
            ("norm", "speech_transformer.after_norm"),
            ("projection", "speech_llama_proj"),
        ):
            found[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
        for i in range(4):
            theirs, ours = f"speech_transformer.encoders.{i}", f"layers.{i}"
            parts = [state[f"{theirs}.self_attn.linear_{part}.{kind}"] for part in "qkv"]
            found[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{ours}.self_attn.out_proj.{kind}"] = state[f"{theirs}.self_attn.linear_out.{kind}"]
            found[f"{ours}.linear1.{kind}"] = state[f"{theirs}.feed_forward.w_1.{kind}"]
            found[f"{ours}.linear2.{kind}"] = state[f"{theirs}.feed_forward.w_2.{kind}"]
            found[f"{ours}.norm1.{kind}"] = state[f"{theirs}.norm1.{kind}"]
            found[f"{ours}.norm2.{kind}"] = state[f"{theirs}.norm2.{kind}"]
    return found
