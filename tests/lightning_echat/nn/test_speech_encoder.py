from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperModel

from lightning_echat.contracts import UserError
from lightning_echat.nn.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from lightning_echat.tokens.speech_timing import num_embeddings

SMALL = SpeechEncoderConfig(pretrained=False, width=16, layers=2, heads=2, feedforward=32, max_positions=200)
WHISPER: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
DECODER: dict[str, Any] = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 50}
MARKS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PARITY = Path(__file__).parents[4] / "shared/reference/parity"


def encoder(**options) -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder(replace(SMALL, **options), mel_bins=80).eval()


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    """A random Whisper in a folder, in the sizes of `SMALL`."""
    torch.manual_seed(1)
    folder = Path(tmp_path_factory.mktemp("whisper"))
    WhisperModel(WhisperConfig(**WHISPER, **DECODER, **MARKS, num_mel_bins=80)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strides", [(1, 2), (2, 2)])
@pytest.mark.parametrize("kernel", [0, 5])
@pytest.mark.parametrize("lengths", [(50, 31, 8), (51, 30, 1), (53, 52, 5)])
@torch.no_grad()
def test_a_clip_gives_the_same_frames_alone_and_beside_junk(strides, kernel, lengths):
    network = encoder(strides=strides, depthwise_kernel=kernel)
    clips = [torch.randn(length, 80) for length in lengths]
    batch = 9 * torch.randn(len(clips), max(lengths), 80)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = clip
    together, together_lengths = network(batch, torch.tensor(lengths))
    for row, clip in enumerate(clips):
        alone, alone_length = network(clip[None], torch.tensor([len(clip)]))
        frames = int(alone_length)
        assert frames == int(together_lengths[row]) == alone.shape[1] == num_embeddings(len(clip), strides)
        torch.testing.assert_close(together[row, :frames], alone[0], atol=1e-5, rtol=0)
        assert not together[row, frames:].any()


@torch.no_grad()
def test_whisper_weights_give_what_hugging_face_gives_for_thirty_seconds(whisper):
    mels = torch.randn(1, 3000, 80)
    expected = WhisperModel.from_pretrained(whisper).get_encoder().eval()(mels.transpose(1, 2)).last_hidden_state
    network = encoder(weights=str(whisper), max_positions=3000)
    network.load_whisper()
    frames, lengths = network(mels, torch.tensor([3000]))
    assert lengths.tolist() == [1500]
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "sizes", [{"width": 32}, {"layers": 1}, {"layers": 3}, {"feedforward": 64}], ids=lambda sizes: str(sizes)
)
def test_whisper_weights_of_other_sizes_are_refused(whisper, sizes):
    with pytest.raises(UserError, match="speech encoder"):
        encoder(weights=str(whisper), **sizes).load_whisper()


def test_whisper_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot load speech encoder"):
        encoder(weights=str(tmp_path / "none")).load_whisper()


def test_whisper_weights_fill_an_encoder_with_depthwise_convolutions_of_its_own(whisper):
    network = encoder(weights=str(whisper), depthwise_kernel=3)
    own = network.get_parameter("convolutions.0.convolution.weight").clone()
    network.load_whisper()
    assert torch.equal(network.get_parameter("convolutions.0.convolution.weight"), own)
    assert torch.equal(
        network.conv1.weight, WhisperModel.from_pretrained(whisper).get_parameter("encoder.conv1.weight")
    )


def test_speech_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="max_positions"):
        encoder(max_positions=10)(torch.randn(1, 22, 80), torch.tensor([22]))


def test_a_depthwise_kernel_must_have_a_middle():
    with pytest.raises(UserError, match="odd"):
        encoder(depthwise_kernel=4)


@pytest.mark.skipif(not PARITY.is_dir(), reason="the reference's fixtures are not here")
@torch.no_grad()
def test_the_reference_encoder_is_reproduced():
    state = load_file(PARITY / "state_dict.safetensors")
    given = load_file(PARITY / "io.safetensors")
    network = SpeechEncoder(replace(SMALL, width=64, heads=4, feedforward=128), mel_bins=80).eval()
    network.load_state_dict(_from_reference(state))
    # The reference masks nothing before its convolutions, so only the clip that fills its batch is comparable.
    row = int(given["feats_lengths"].argmax())
    length = int(given["feats_lengths"][row])
    assert length == given["feats"].shape[1]
    frames, _ = network(given["feats"][row : row + 1], torch.tensor([length]))
    torch.testing.assert_close(frames[0], given["encoder_out"][row], atol=1e-4, rtol=0)


def _from_reference(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    words = {
        "embed.conv.0": "conv1",
        "embed.conv.2": "conv2",
        "encoders": "layers",
        "linear_q": "q_proj",
        "linear_k": "k_proj",
        "linear_v": "v_proj",
        "linear_out": "out_proj",
        "feed_forward.w_1": "fc1",
        "feed_forward.w_2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
        "after_norm": "layer_norm",
    }
    found = {}
    for name, tensor in state.items():
        if name.startswith("encoder.") and not name.endswith("pos_enc.pe"):
            own = name.removeprefix("encoder.")
            for theirs, ours in words.items():
                own = own.replace(theirs, ours)
            found[own] = tensor
    return found
