"""The flow of the released CosyVoice-300M-25Hz, from the user's `flow.pt`: a table of names, and shapes that must fit.

docs/token2wav.md says what of the released token-to-speech is taken over and what is not.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching

FLOW_NAME = "flow.pt"

_ENCODER = {
    "attention.query": "self_attn.linear_q",
    "attention.key": "self_attn.linear_k",
    "attention.value": "self_attn.linear_v",
    "attention.output": "self_attn.linear_out",
    "attention.position": "self_attn.linear_pos",
    "attention.content_bias": "self_attn.pos_bias_u",
    "attention.position_bias": "self_attn.pos_bias_v",
    "attention_norm": "norm_mha",
    "feedforward_norm": "norm_ff",
    "feedforward.0": "feed_forward.w_1",
    "feedforward.3": "feed_forward.w_2",
}
_BLOCK = {
    "attention_norm": "norm1",
    "query": "attn1.to_q",
    "key": "attn1.to_k",
    "value": "attn1.to_v",
    "output": "attn1.to_out.0",
    "feedforward_norm": "norm3",
    "feedforward.0": "ff.net.0.proj",
    "feedforward.3": "ff.net.2",
}
_LEVEL = {
    "first.layers": "0.block1.block",
    "second.layers": "0.block2.block",
    "time.1": "0.mlp.1",
    "residual": "0.res_conv",
}
_PARTS = {
    "encoder.embedding": "input_embedding",
    "encoder.input": "encoder.embed.out",
    "encoder.norm": "encoder.after_norm",
    "encoder.projection": "encoder_proj",
    "encoder.stretched.layers": "length_regulator.model",
    "speaker": "spk_embed_affine_layer",
    "estimator.time.0": "decoder.estimator.time_mlp.linear_1",
    "estimator.time.2": "decoder.estimator.time_mlp.linear_2",
    "estimator.final.layers": "decoder.estimator.final_block.block",
    "estimator.output": "decoder.estimator.final_proj",
}
_LEVELS = {"down": "down_blocks", "middle": "mid_blocks", "up": "up_blocks"}


def released_name(name: str, config: FlowConfig) -> str:
    """The name that a parameter of `FlowMatching` has in the released file."""
    if match := re.match(r"encoder\.layers\.(\d+)\.(.*)$", name):
        return f"encoder.encoders.{match[1]}.{_renamed(match[2], _ENCODER)}"
    if match := re.match(r"estimator\.(down|middle|up)\.(\d+)\.transformer\.(\d+)\.(.*)$", name):
        return f"decoder.estimator.{_LEVELS[match[1]]}.{match[2]}.1.{match[3]}.{_renamed(match[4], _BLOCK)}"
    if match := re.match(r"estimator\.(down|up)\.(\d+)\.resize\.(.*)$", name):
        # Only where the rate changes is the convolution inside a module of its own.
        inner = "conv." if int(match[2]) < len(config.estimator.channels) - 1 else ""
        return f"decoder.estimator.{_LEVELS[match[1]]}.{match[2]}.2.{inner}{match[3]}"
    if match := re.match(r"estimator\.(down|middle|up)\.(\d+)\.(.*)$", name):
        return f"decoder.estimator.{_LEVELS[match[1]]}.{match[2]}.{_renamed(match[3], _LEVEL)}"
    return _renamed(name, _PARTS)


def read_released_flow(path: Path, config: FlowConfig | None = None) -> FlowMatching:
    """The flow of a released file.

    Args:
        path: `flow.pt`, or the folder that holds it.
        config: Sizes, where they are not those of CosyVoice-300M-25Hz.

    Raises:
        UserError: The file cannot be read, a weight is missing, unknown or of another shape.
    """
    path = path / FLOW_NAME if path.is_dir() else path
    try:
        released: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['?'])[0]}") from error
    flow = FlowMatching(config or FlowConfig())
    own = flow.state_dict()
    names = {name: released_name(name, flow.config) for name in own}
    found = {name: released[theirs] for name, theirs in names.items() if theirs in released}
    problems = [f"lacks {names[name]}" for name in own if name not in found]
    problems += [f"has unknown {theirs}" for theirs in sorted(released.keys() - set(names.values()))]
    problems += [
        f"has {names[name]} of shape {list(tensor.shape)}, not {list(own[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise UserError(f"{path} is no flow of CosyVoice-300M-25Hz: it {', '.join(problems[:3])}{more}")
    flow.load_state_dict(found)
    return flow


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name with its beginning replaced by the table's entry, of which the longest that fits counts."""
    fitting = [key for key in table if name == key or name.startswith(f"{key}.")]
    if not fitting:
        raise KeyError(name)
    key = max(fitting, key=len)
    return table[key] + name[len(key) :]
