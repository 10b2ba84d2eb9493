import re
from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.interface import load_speech_tokenizer, load_token2wav

pytest.importorskip("s3tokenizer", reason="needs pip install 'lightning-echat[cosyvoice]'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The released network's layout with other sizes and random weights."""
    from s3tokenizer.model import ModelConfig, S3Tokenizer

    torch.manual_seed(0)
    sizes = ModelConfig(n_mels=128, n_audio_ctx=1500, n_audio_state=128, n_audio_head=2, n_audio_layer=2)
    model = S3Tokenizer("speech_tokenizer_v1_25hz", sizes)
    state = model.state_dict()
    state["quantizer._codebook.embed"] = torch.randn(4096, 128)
    torch.save(state, tmp_path / "speech_tokenizer_v1.pt")
    return tmp_path


def write_onnx(state: dict[str, torch.Tensor], path: Path) -> None:
    """The weights as the released file holds them: under the names of the nodes that read them, matrices turned."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, weights = [], []

    def add(name: str, kind: str, *tensors: torch.Tensor, inputs: tuple[str, ...] = ()) -> None:
        inputs = inputs or tuple(f"onnx::{kind}_{len(weights) + i}" for i in range(len(tensors)))
        weights.extend(
            numpy_helper.from_array(tensor.contiguous().numpy(), i) for tensor, i in zip(tensors, inputs, strict=True)
        )
        nodes.append(helper.make_node(kind, ["x", *inputs], [f"{name}_output"], name=name))

    for key, value in state.items():
        owner, _, leaf = key.removeprefix("encoder.").rpartition(".")
        place = "/" + re.sub(r"(blocks\.\d+|attn|mlp)\.", r"\1/", owner).replace("mlp/", "mlp/mlp.")
        if key == "quantizer._codebook.embed":
            add("/quantizer/rq/model/layers.0/_codebook/Pow_1", "Pow", value.T)
        elif key == "encoder.positional_embedding":
            add("/Slice", "Slice", value, inputs=("encoders.positional_embedding",))
        elif key.startswith("encoder.conv"):
            add(f"/{owner}/Conv", "Conv", value, inputs=(f"encoders.{owner}.{leaf}",))
        elif owner.endswith("_ln"):
            if leaf == "weight":
                add(f"{place}/LayerNormalization", "LayerNormalization", value, state[f"encoder.{owner}.bias"])
        elif value.ndim == 3:
            add(f"{place}/Conv", "Conv", value)
        else:
            add(f"{place}/{'MatMul' if leaf == 'weight' else 'Add'}", "MatMul", value.T if value.ndim == 2 else value)
    onnx.save(helper.make_model(helper.make_graph(nodes, "tokenizer", [], [], weights)), str(path))


def test_the_released_onnx_gives_the_codes_of_its_weights(folder: Path) -> None:
    expected = load_speech_tokenizer(folder)
    write_onnx(torch.load(folder / "speech_tokenizer_v1.pt", weights_only=True), folder / "speech_tokenizer_v1.onnx")
    (folder / "speech_tokenizer_v1.pt").unlink()
    tokenizer = load_speech_tokenizer(folder)
    waveforms, lengths = 0.1 * torch.randn(2, 16_000), torch.tensor([16_000, 9_000])
    codes, numbers = tokenizer.encode(waveforms, lengths=lengths)
    assert numbers.tolist() == [25, 15] and len(codes.unique()) > 1
    assert torch.equal(codes, expected.encode(waveforms, lengths=lengths)[0])


def test_codes_are_25_a_second_whatever_else_is_in_the_batch(folder: Path) -> None:
    tokenizer = load_speech_tokenizer(folder)
    assert (tokenizer.codebook_size, tokenizer.code_rate, tokenizer.sample_rate) == (4096, 25.0, 16_000)
    torch.manual_seed(1)
    waveforms, lengths = 0.1 * torch.randn(3, 16_010), torch.tensor([16_010, 8_000, 0])
    waveforms[1, 8_000:] = 5.0
    codes, numbers = tokenizer.encode(waveforms, lengths=lengths)
    assert numbers.tolist() == [26, 13, 0]
    assert codes.shape == (3, 26)
    assert not codes[1, 13:].any() and not codes[2].any()
    assert len(codes[0].unique()) > 1
    alone, _ = tokenizer.encode(waveforms[1:2, :8_000], lengths=lengths[1:2])
    assert torch.equal(alone[0], codes[1, :13])


def test_a_copy_of_the_folder_is_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    first = load_speech_tokenizer(folder)
    first.save(tmp_path / "copy")
    waveform = 0.1 * torch.randn(1, 6_400)
    ours, copied = (
        t.encode(waveform, lengths=torch.tensor([6_400])) for t in (first, load_speech_tokenizer(tmp_path / "copy"))
    )
    assert torch.equal(ours[0], copied[0])


def test_it_cannot_speak_and_says_what_can(folder: Path) -> None:
    with pytest.raises(UserError, match="echat convert token2wav"):
        load_token2wav(folder)


def test_weights_of_something_else_are_told_in_one_line(folder: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, folder / "speech_tokenizer_v1.pt")
    with pytest.raises(UserError, match="holds no 25 Hz speech tokenizer") as refused:
        load_speech_tokenizer(folder)
    assert "\n" not in str(refused.value)
    (folder / "speech_tokenizer_v1.onnx").write_bytes(b"no onnx")
    with pytest.raises(UserError, match=r"speech_tokenizer_v1\.onnx holds no"):
        load_speech_tokenizer(folder)
