from pathlib import Path

import pytest
import torch

from lightning_echat.checkpoints.cosyvoice_flow import read_released_flow, released_name
from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching

SMALL = FlowConfig(
    codebook_size=50,
    encoder=CodeEncoderConfig(width=16, layers=2, heads=2, feedforward=32),
    estimator=EstimatorConfig(channels=(16, 24), blocks=2, middle=2, heads=2, head_size=8),
)
LAYOUT = {
    # Written down from the public modules, so that a renamed part of ours cannot rename what is expected.
    "input_embedding.weight": [50, 16],
    "spk_embed_affine_layer.weight": [80, 192],
    "encoder.embed.out.0.weight": [16, 16],
    "encoder.embed.out.1.weight": [16],
    "encoder.after_norm.bias": [16],
    "encoder.encoders.1.self_attn.linear_pos.weight": [16, 16],
    "encoder.encoders.1.self_attn.pos_bias_u": [2, 8],
    "encoder.encoders.0.feed_forward.w_1.weight": [32, 16],
    "encoder.encoders.0.norm_mha.weight": [16],
    "encoder_proj.weight": [80, 16],
    "length_regulator.model.9.weight": [80, 80, 3],
    "length_regulator.model.12.bias": [80],
    "decoder.estimator.time_mlp.linear_1.weight": [64, 320],
    "decoder.estimator.down_blocks.0.0.block1.block.0.weight": [16, 320, 3],
    "decoder.estimator.down_blocks.0.0.mlp.1.weight": [16, 64],
    "decoder.estimator.down_blocks.0.0.res_conv.weight": [16, 320, 1],
    "decoder.estimator.down_blocks.0.1.1.attn1.to_q.weight": [16, 16],
    "decoder.estimator.down_blocks.0.1.1.attn1.to_out.0.bias": [16],
    "decoder.estimator.down_blocks.0.1.1.ff.net.0.proj.weight": [64, 16],
    "decoder.estimator.down_blocks.0.1.1.ff.net.2.weight": [16, 64],
    "decoder.estimator.down_blocks.0.1.1.norm3.weight": [16],
    "decoder.estimator.down_blocks.0.2.conv.weight": [16, 16, 3],
    "decoder.estimator.down_blocks.1.2.weight": [24, 24, 3],
    "decoder.estimator.mid_blocks.1.0.block2.block.1.weight": [24],
    "decoder.estimator.up_blocks.0.0.block1.block.0.weight": [16, 48, 3],
    "decoder.estimator.up_blocks.0.2.conv.weight": [16, 16, 4],
    "decoder.estimator.up_blocks.1.0.res_conv.weight": [16, 32, 1],
    "decoder.estimator.up_blocks.1.2.weight": [16, 16, 3],
    "decoder.estimator.final_block.block.0.weight": [16, 16, 3],
    "decoder.estimator.final_proj.weight": [80, 16, 1],
}


def released(path: Path) -> dict[str, torch.Tensor]:
    """Random weights in the released layout."""
    torch.manual_seed(0)
    state = {released_name(name, SMALL): torch.randn(t.shape) for name, t in FlowMatching(SMALL).state_dict().items()}
    torch.save(state, path / "flow.pt")
    return state


def test_the_layout_is_the_released_one(tmp_path: Path) -> None:
    state = released(tmp_path)
    assert {name: list(state[name].shape) for name in LAYOUT if name in state} == LAYOUT
    assert len(state) == len(FlowMatching(SMALL).state_dict())


def test_every_weight_comes_from_its_own_place(tmp_path: Path) -> None:
    state = released(tmp_path)
    flow = read_released_flow(tmp_path, SMALL)
    assert torch.equal(flow.encoder.embedding.weight, state["input_embedding.weight"])
    for name, tensor in flow.state_dict().items():
        assert torch.equal(tensor, state[released_name(name, SMALL)])


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    state = released(tmp_path)
    for change, message in (
        ({"encoder_proj.weight": torch.zeros(80, 15)}, r"has encoder_proj.weight of shape \[80, 15\], not \[80, 16\]"),
        ({"encoder.new.weight": torch.zeros(1)}, "has unknown encoder.new.weight"),
    ):
        torch.save({**state, **change}, tmp_path / "flow.pt")
        with pytest.raises(UserError, match=message):
            read_released_flow(tmp_path, SMALL)
    torch.save({name: t for name, t in state.items() if name != "encoder_proj.bias"}, tmp_path / "flow.pt")
    with pytest.raises(UserError, match=r"lacks encoder_proj\.bias"):
        read_released_flow(tmp_path, SMALL)
    (tmp_path / "flow.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot read"):
        read_released_flow(tmp_path, SMALL)
