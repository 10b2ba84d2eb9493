import math
from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.opinion_scores import DNSMOS, NISQA, ScriptedPredictor


class Length(torch.nn.Module):
    """Stands for a predictor: its score is how many seconds at 16 kHz it hears."""

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(waveform).sum(dim=1) / 16_000.0


def test_a_predictor_of_opinion_scores_is_any_torchscript_of_a_waveform(tmp_path) -> None:
    torch.jit.script(Length()).save(str(tmp_path / "mos.pt"))
    predictor = ScriptedPredictor(tmp_path / "mos.pt")
    waveforms = [torch.zeros(8_000), torch.zeros(16_000)]
    assert predictor(waveforms, sample_rate=16_000) == pytest.approx(0.75)
    assert predictor(waveforms, sample_rate=8_000) == pytest.approx(1.5)
    assert math.isnan(predictor([], sample_rate=16_000))


def test_what_is_no_predictor_is_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "text.pt").write_text("nothing")
    torch.jit.script(torch.nn.Conv1d(1, 3, 3)).save(str(tmp_path / "many.pt"))
    for name, message in (("text.pt", "torch.jit.save"), ("none.pt", "torch.jit.save")):
        with pytest.raises(UserError, match=message) as refused:
            ScriptedPredictor(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="into one number") as refused:
        ScriptedPredictor(tmp_path / "many.pt")([torch.zeros(100)], sample_rate=16_000)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("predictor", "file"), [(DNSMOS, r"model_v8\.onnx"), (NISQA, r"nisqa\.tar")])
def test_a_folder_without_weights_is_refused_and_nothing_is_downloaded(tmp_path: Path, predictor, file: str) -> None:
    with pytest.raises(UserError, match=f"{predictor.label} needs .*{file}") as refused:
        predictor(tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def write_dnsmos(folder: Path, *, signal: float) -> None:
    """Networks of the shapes of the DNS challenge's, which answer with constants and the mean of what they read."""
    from onnx import TensorProto, helper, save

    for name, rank, scores in (("model_v8", 3, [2.0]), ("sig_bak_ovr", 2, [signal, 3.0, 2.5])):
        axes = helper.make_tensor("axes", TensorProto.INT64, [rank - 1], list(range(1, rank)))
        constant = helper.make_tensor("scores", TensorProto.FLOAT, [1, len(scores)], scores)
        nodes = [
            helper.make_node("ReduceMean", ["input_1", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "none"], ["nothing"]),
            helper.make_node("Unsqueeze", ["nothing", "last"], ["column"]),
            helper.make_node("Add", ["column", "scores"], ["out"]),
        ]
        last = helper.make_tensor("last", TensorProto.INT64, [1], [1])
        none = helper.make_tensor("none", TensorProto.FLOAT, [], [0.0])
        inputs = [helper.make_tensor_value_info("input_1", TensorProto.FLOAT, ["n", *["t", "m"][: rank - 1]])]
        outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", len(scores)])]
        graph = helper.make_graph(nodes, name, inputs, outputs, [axes, constant, last, none])
        (folder / "DNSMOS").mkdir(parents=True, exist_ok=True)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        save(model, str(folder / "DNSMOS" / f"{name}.onnx"))


def test_dnsmos_scores_with_the_networks_of_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("librosa", reason="needs pip install 'lightning-echat[quality]'")
    pytest.importorskip("onnx", reason="needs pip install 'lightning-echat[cosyvoice]'")
    waveforms = [0.1 * torch.randn(12_000), 0.1 * torch.randn(80_000)]
    for signal in (3.0, 4.0):
        write_dnsmos(folder := tmp_path / str(signal), signal=signal)
        scores = DNSMOS(folder)(waveforms, sample_rate=8_000)
        # The polynomials that torchmetrics has from the challenge.
        assert scores["signal"] == pytest.approx(-0.08397278 * signal**2 + 1.22083953 * signal + 0.0052439)
        assert scores["p808"] == pytest.approx(2.0)
        assert set(scores) == {"p808", "signal", "background", "overall"}
    (folder / "DNSMOS" / "model_v8.onnx").write_bytes(b"nothing")
    broken = tmp_path / "broken"
    folder.rename(broken)
    with pytest.raises(UserError, match=r"DNSMOS with the weights of .*broken") as refused:
        DNSMOS(broken)(waveforms, sample_rate=8_000)
    assert "\n" not in str(refused.value)


def write_nisqa(folder: Path, *, seed: int) -> None:
    """The layout of NISQA 2.0 with other sizes and random weights."""
    from torchmetrics.functional.audio.nisqa import _NISQADIM

    sizes = {
        **{"cnn_c_out_1": 4, "cnn_c_out_2": 4, "cnn_c_out_3": 8, "cnn_kernel_size": [3, 3], "cnn_dropout": 0.0},
        **{"cnn_pool_1": [24, 7], "cnn_pool_2": [12, 5], "cnn_pool_3": [6, 3]},
        **{"td_sa_d_model": 8, "td_sa_nhead": 1, "td_sa_h": 8, "td_sa_num_layers": 1, "td_sa_dropout": 0.0},
        **{"pool_att_h": 8, "pool_att_dropout": 0.0, "ms_fmax": 20_000, "ms_hop_length": 0.01, "ms_win_length": 0.02},
        **{"ms_n_fft": 4096, "ms_n_mels": 48, "ms_seg_length": 15, "ms_seg_hop_length": 4, "ms_max_segments": 1300},
    }
    torch.manual_seed(seed)
    folder.mkdir()
    torch.save({"args": sizes, "model_state_dict": _NISQADIM(sizes).state_dict()}, folder / "nisqa.tar")


def test_nisqa_scores_with_the_weights_of_the_folder_and_not_with_those_read_before(tmp_path: Path) -> None:
    pytest.importorskip("librosa", reason="needs pip install 'lightning-echat[quality]'")
    waveforms = [0.1 * torch.randn(16_000)]
    found = []
    for seed in (0, 1):
        write_nisqa(folder := tmp_path / str(seed), seed=seed)
        found.append(NISQA(folder)(waveforms, sample_rate=16_000))
        assert list(found[-1]) == ["overall", "noisiness", "discontinuity", "coloration", "loudness"]
    assert found[0] != found[1]
    with pytest.raises(UserError, match="NISQA with the weights of ") as refused:
        NISQA(folder)([torch.zeros(100)], sample_rate=16_000)
    assert "\n" not in str(refused.value)
