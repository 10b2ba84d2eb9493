"""Stage 3, empathy: think about the words and the voice, then answer in text and speech. Everything trains."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_echat.contracts import PackedBatch, UserError, VoiceBatch
from lightning_echat.data.utterances import UtteranceConfig
from lightning_echat.metrics import MeanTokenLoss
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram
from lightning_echat.nn.token2wav.trained_parts import load_part, part_settings
from lightning_echat.parallel import sharded
from lightning_echat.stages.base import EChatStage
from lightning_echat.stages.token2wav import flow_loss_sum

_LOG = logging.getLogger(__name__)
_WARN_AFTER = 50
"""Batches in a row without the sound of one reply, after which a run that trains a flow says so."""


@dataclass(frozen=True, kw_only=True)
class JointFlowConfig:
    """A flow that trains beside the language model, on codes and sound of the replies in the same batches.

    It sees the codes of the data, so nothing of its loss reaches the language model. The squared error is a mean over
    the mel values of a code, so that a weight of 1 lets one code count as much as one supervised id; like every loss
    it is summed and divided by the supervised ids of all ranks and the accumulation window.

    Attributes:
        network: Sizes of the flow.
        weight: Of its loss.
        learning_rate: Of the flow; None for that of the rest.
        init_from: Run or checkpoint of a flow, or a token2wav folder, whose weights it begins with.
    """

    network: FlowConfig
    weight: float = 1.0
    learning_rate: float | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.weight <= 0 or (self.learning_rate is not None and self.learning_rate <= 0):
            raise UserError("flow: weight and learning_rate must be positive; give no flow to leave it as it is")


class EmpathyStage(EChatStage):
    """Speech in; thinking, text and speech codes out.

    Args:
        flow: Trains a flow as well; None, the default, leaves token-to-speech as it is.
        options: Of `EChatStage`.
    """

    default_trainable = ("*",)

    def __init__(self, *, flow: JointFlowConfig | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.flow_config = flow
        self.flow: FlowMatching | None = None
        self.mel = LogMelSpectrogram(flow.network.mel) if flow else None
        self._silent_batches = 0

    def setup(self, stage: str) -> None:
        """Have the data bring the sound of replies where a flow learns from it."""
        if self.flow_config is None:
            return
        if sharded(self._trainer) is not None or self.trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                "flow: it trains beside the empathy stage under DDP and mixed or full precision only; "
                "train it in a run of its own (experiments/token2wav_flow.yaml), which gives the same gradients"
            )
        if hasattr(data := getattr(self.trainer, "datamodule", None), "utterances"):
            network = self.flow_config.network
            cast(Any, data).utterances = UtteranceConfig(
                sample_rate=network.mel.sample_rate,
                code_rate=network.code_rate,
                codebook_size=network.codebook_size,
                speaker_size=network.speaker_size,
            )

    def configure_model(self) -> None:
        """Build the network, and the flow; Lightning may call this more than once."""
        super().configure_model()
        if self.flow_config is not None and self.flow is None:
            self.flow = FlowMatching(self.flow_config.network)
            if self.flow_config.init_from:
                report = load_part(self.flow, self.flow_config.init_from, name="flow")
                rank_zero_only(sys.stdout.write)(f"{report}\n")

    def on_train_start(self) -> None:
        """See `EChatStage`."""
        super().on_train_start()
        if self.flow is not None:
            self.flow.train()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of the batch, the flow's included."""
        total = super().training_step(batch, batch_idx)
        if self.flow is None:
            return total
        assert self.flow_config is not None
        loss, number = self._flow_loss(batch)
        if batch.replies is not None:
            self.log("train/loss/flow", loss.detach() / number, batch_size=len(batch.replies.lengths))
        self._note_silence(batch)
        mel, network = self.flow_config.network.mel, self.flow_config.network
        values = float(mel.samples_per_code(network.code_rate) / mel.hop) * mel.bins
        return total + self.flow_config.weight / values * loss

    def on_validation_epoch_start(self) -> None:
        """See `EChatStage`; and one for the flow of each set."""
        super().on_validation_epoch_start()
        if self.flow is not None:
            for key in self._set_keys():
                self._validation_losses[f"{key}/loss/flow"] = MeanTokenLoss().to(self.device)

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """See `EChatStage`; the flow's error is taken with the same noise and times at every validation."""
        super().validation_step(batch, batch_idx, dataloader_idx)
        if self.flow is not None and batch.replies is not None:
            generator = torch.Generator(self.device).manual_seed(batch_idx)
            key = self._set_keys()[dataloader_idx]
            self._validation_losses[f"{key}/loss/flow"].update(*self._flow_loss(batch, generator))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `EChatStage`; `echat convert token2wav` finds the flow in there."""
        super().on_save_checkpoint(checkpoint)
        if self.flow is not None:
            checkpoint["echat_token2wav"] = part_settings("flow", asdict(self.flow.config))

    def _flow_loss(self, batch: PackedBatch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Summed over valid mel values, and how many; 0 and 0, but part of the graph, where nobody is heard."""
        assert self.flow is not None and self.mel is not None
        return flow_loss_sum(self.flow, self.mel, batch.replies or self._nobody(), generator)

    def _nobody(self) -> VoiceBatch:
        """An utterance of no length: DDP waits for gradients of the flow on every rank."""
        assert self.flow_config is not None
        one = torch.ones(1, dtype=torch.long, device=self.device)
        samples = torch.zeros(1, 2 * self.flow_config.network.mel.fft, device=self.device)
        return VoiceBatch(codes=one[None] * 0, code_lengths=one, waveforms=samples, lengths=one * 0)

    def _note_silence(self, batch: PackedBatch) -> None:
        self._silent_batches = self._silent_batches + 1 if batch.replies is None else 0
        if self._silent_batches == _WARN_AFTER:
            _LOG.warning(
                "flow: %d batches in a row held no reply with codes and audio (rank %d); the flow learns nothing",
                _WARN_AFTER,
                self.global_rank,
            )

    def _parameter_groups(self) -> list[Any]:
        if self.flow is None or self.flow_config is None or self.flow_config.learning_rate is None:
            return super()._parameter_groups()
        own = {"params": list(self.flow.parameters()), "lr": self.flow_config.learning_rate}
        return [{"params": list(super()._trainable_parameters())}, own]

    def _trainable_parameters(self) -> Iterator[torch.nn.Parameter]:
        return chain(super()._trainable_parameters(), self.flow.parameters() if self.flow else ())
