"""Flow and vocoder as their stages leave them: the way from a checkpoint, or from a finished folder, to the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.flow_matching import FlowMatching
from lightning_echat.nn.token2wav.synthesizer import TOKEN2WAV_NAME, FlowToken2Wav, flow_config, vocoder_config
from lightning_echat.nn.token2wav.vocoder import HiFiGANVocoder
from lightning_echat.nn.weights import latest_checkpoint, read_checkpoint

PartName = Literal["flow", "vocoder"]
_KEY = "echat_token2wav"


def part_settings(name: PartName, settings: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of its network, as plain values."""
    return {"part": name, "settings": settings}


def read_part(path: str | Path, *, name: PartName) -> FlowMatching | HiFiGANVocoder:
    """The trained flow or vocoder of a checkpoint, a run folder, or a token2wav folder.

    Raises:
        UserError: There is none.
    """
    if (Path(path) / TOKEN2WAV_NAME).is_file():
        found = getattr(FlowToken2Wav.load(Path(path)), name)
        if not isinstance(found, FlowMatching | HiFiGANVocoder):
            raise UserError(f"{path} has no trained {name}: it speaks by Griffin-Lim")
        return found
    checkpoint_path = latest_checkpoint(path)
    checkpoint = read_checkpoint(checkpoint_path)
    kept = checkpoint.get(_KEY) or {}
    if kept.get("part") != name:
        what = f"a {kept['part']}" if kept else "no part of token-to-speech"
        raise UserError(f"{checkpoint_path} holds {what}, not a {name}; give the run of the stage that trains it")
    part = (
        FlowMatching(flow_config(kept["settings"]))
        if name == "flow"
        else HiFiGANVocoder(vocoder_config(kept["settings"]))
    )
    prefix = f"{name}."
    state: dict[str, Tensor] = checkpoint["state_dict"]
    part.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    return part


def load_part(part: nn.Module, path: str | Path, *, name: PartName) -> str:
    """Fill a flow or a vocoder with trained weights, and say so in one line.

    Raises:
        UserError: They are of another size or predict something else, or there are none.
    """
    trained = read_part(path, name=name)
    if isinstance(trained, FlowMatching) and isinstance(part, FlowMatching):
        was, is_ = trained.config.predicts, part.config.predicts
        if was != is_:
            raise UserError(
                f"init_from {path}: the flow there predicts the {was}, not the {is_}; set flow.predicts: {was}"
            )
    found, own = trained.state_dict(), part.state_dict()
    differing = sorted(key for key in found.keys() | own.keys() if _shape(found, key) != _shape(own, key))
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"init_from {path}: the {name} there is of another size ({', '.join(differing[:3])}{more}); "
            "give the config that it was trained with"
        )
    part.load_state_dict(found)
    return f"init_from: all {len(own)} weights of the {name} come from {path}"


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
