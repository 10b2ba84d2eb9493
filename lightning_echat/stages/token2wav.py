"""Token-to-speech: a stage that trains the flow from codes to mel, and one that trains the vocoder from mel to sound.

They are independent and may run side by side; `echat convert token2wav` joins what they leave.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lightning_echat.collectives import gathered
from lightning_echat.contracts import UserError, VoiceBatch
from lightning_echat.metrics import MeanTokenLoss
from lightning_echat.nn.token2wav.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram, MelConfig
from lightning_echat.nn.token2wav.trained_parts import PartName, load_part, part_settings
from lightning_echat.nn.token2wav.vocoder import HiFiGANVocoder, VocoderConfig
from lightning_echat.stages.resuming import own_random_state, random_state, recount_batches, restore_random_state

_MOST_SKIPPED = 50
"""Steps in a row whose gradient is not finite before a run stops."""


class _VoiceStage(L.LightningModule):
    """What both stages share: optimizers from YAML, steps that are dropped when their gradient is not finite.

    Args:
        optimizer: Builds the optimizer from the parameters.
        scheduler: Builds a learning-rate schedule that is stepped at every optimizer step; none for a constant rate.
        init_from: Checkpoint or run folder of the same stage, or a token2wav folder, whose weights are taken.
    """

    def __init__(
        self, *, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, init_from: str | None
    ) -> None:
        super().__init__()
        self.optimizer_callable, self.scheduler_callable = optimizer, scheduler
        self.init_from = init_from
        self._skipped_in_a_row = 0
        self._random_state: Mapping[str, Tensor] | None = None
        self._validation_losses: dict[str, MeanTokenLoss] = {}

    def _check_rate(self, mel: MelConfig) -> None:
        rate = getattr(getattr(self.trainer, "datamodule", None), "sample_rate", mel.sample_rate)
        if rate != mel.sample_rate:
            raise UserError(f"data.init_args.sample_rate is {rate} and the mel's {mel.sample_rate}; they must agree")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what a run needs to go on with the noise and times that would have followed."""
        checkpoint["random_states"] = gathered(random_state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's random state until training starts, as what comes before draws too."""
        recount_batches(checkpoint, accumulate=self.trainer.accumulate_grad_batches)
        self._random_state = own_random_state(checkpoint, share=self.global_rank, shares=self.trainer.world_size)

    def on_train_start(self) -> None:
        """Go on drawing where the checkpoint stands."""
        restore_random_state(self._random_state, self.device)
        self._random_state = None

    def on_validation_epoch_start(self) -> None:
        """One running mean per validation set, on every rank alike."""
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None) or ["0"]
        self._validation_losses = {name: MeanTokenLoss().to(self.device) for name in names}

    def on_validation_epoch_end(self) -> None:
        """Log the means over ranks."""
        for name, metric in self._validation_losses.items():
            value = metric.compute()
            if not torch.isnan(value):
                self.log(f"val/{name}/loss", value, sync_dist=True)

    def _add_validation_loss(self, loss_sum: Tensor, number: Tensor | int, dataloader_idx: int) -> None:
        list(self._validation_losses.values())[dataloader_idx].update(loss_sum, number)

    def _usable(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the gradient, the same on all ranks, is finite. One that is not is dropped and counted."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        usable = bool(norm.isfinite())
        self.log("train/skipped_steps", 0.0 if usable else 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        if usable:
            self._skipped_in_a_row = 0
            return True
        for parameter in parameters:
            parameter.grad = None
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise UserError(
                f"{_MOST_SKIPPED} steps in a row had a gradient that is not finite (last at step {self.global_step}); "
                "lower the learning rate, or look at the audio with echat data verify"
            )
        return False

    def _optimizer_of(self, parameters: Iterable[nn.Parameter]) -> tuple[Optimizer, list[Any]]:
        optimizer = self.optimizer_callable(list(parameters))
        if self.scheduler_callable is None:
            return optimizer, []
        return optimizer, [{"scheduler": self.scheduler_callable(optimizer), "interval": "step"}]

    def _take_from(self, part: nn.Module, name: PartName) -> None:
        if self.init_from:
            report = load_part(part, self.init_from, name=name)
            rank_zero_only(sys.stdout.write)(f"{report}\n")


class FlowStage(_VoiceStage):
    """Trains codes to mel by flow matching. `train/loss` is the mean squared error of what the flow `predicts`.

    Args:
        flow: Sizes.
        optimizer: See `_VoiceStage`.
        scheduler: See there.
        init_from: See there.
    """

    def __init__(
        self,
        *,
        flow: FlowConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler, init_from=init_from)
        self.config = flow
        self.mel = LogMelSpectrogram(flow.mel)
        self.flow: FlowMatching | None = None

    def setup(self, stage: str) -> None:
        """Refuse data of another rate; have it refuse unknown codes and bring the embeddings that the flow takes."""
        self._check_rate(self.config.mel)
        if hasattr(data := getattr(self.trainer, "datamodule", None), "codebook_size"):
            cast(Any, data).codebook_size = self.config.codebook_size
            cast(Any, data).speaker_size = self.config.speaker_size

    def configure_model(self) -> None:
        """Build the network; Lightning may call this more than once."""
        if self.flow is None:
            self.flow = FlowMatching(self.config)
            self._take_from(self.flow, "flow")

    def training_step(self, batch: VoiceBatch, batch_idx: int) -> Tensor:
        """The error summed over this rank, divided such that DDP's mean over ranks is one over all mel values."""
        loss, number = self._loss(batch)
        everyones, world = number.clone(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(everyones)
            world = dist.get_world_size()
        self.log("train/loss", loss.detach() / number, prog_bar=True, batch_size=len(batch.lengths))
        return loss * world / everyones

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop a gradient that is not finite."""
        self._usable(self.parameters())

    def validation_step(self, batch: VoiceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same error, with the same noise and times at every validation."""
        if len(batch.lengths):
            generator = torch.Generator(self.device).manual_seed(batch_idx)
            self._add_validation_loss(*self._loss(batch, generator), dataloader_idx)

    def configure_optimizers(self) -> Any:
        """One optimizer, stepped together with its schedule."""
        optimizer, schedulers = self._optimizer_of(self.parameters())
        return [optimizer], schedulers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to build the network again, and to go on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["echat_token2wav"] = part_settings("flow", asdict(self.config))

    def _loss(self, batch: VoiceBatch, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        assert self.flow is not None
        return flow_loss_sum(self.flow, self.mel, batch, generator)


def flow_loss_sum(
    flow: FlowMatching, mel: LogMelSpectrogram, batch: VoiceBatch, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """See `FlowMatching.loss_sum`; `mel` makes the features that the flow writes."""
    mels = mel(batch.waveforms, batch.lengths)
    frames = (batch.lengths // mel.config.hop).clamp_max(mels.shape[1])
    speakers = batch.speakers if flow.config.speaker_size else None
    return flow.loss_sum(batch.codes, batch.code_lengths, mels, frames, speakers=speakers, generator=generator)


@dataclass(frozen=True, kw_only=True)
class VocoderLosses:
    """Weights of the generator's losses; the defaults are HiFi-GAN's.

    Attributes:
        mel: Mean absolute difference of log-mels over the whole band.
        feature_matching: See `feature_matching_loss`.
        adversarial: See `adversarial_loss`.
        adversarial_from: Step from which the discriminators take part; before it the mel teaches alone.
    """

    mel: float = 45.0
    feature_matching: float = 2.0
    adversarial: float = 1.0
    adversarial_from: int = 0


class VocoderStage(_VoiceStage):
    """Trains mel to waveform as HiFi-GAN does. `train/loss` is the mean absolute difference of log-mels.

    With several processes the strategy must expect parameters without a gradient
    (`DDPStrategy(find_unused_parameters: true)`), as discriminators and generator are stepped in turn. Steps are those
    of the generator. Training data is to be cut into stretches (`data.init_args.segment_codes`).

    Args:
        vocoder: Sizes of the generator.
        discriminators: Sizes of the discriminators.
        losses: Weights.
        clip: Largest norm of a gradient, for generator and discriminators apart; `trainer.gradient_clip_val` does not
            act on two optimizers.
        optimizer: See `_VoiceStage`; one for the generator and one for the discriminators.
        scheduler: See there.
        init_from: See there.
    """

    def __init__(
        self,
        *,
        vocoder: VocoderConfig,
        discriminators: DiscriminatorConfig | None = None,
        losses: VocoderLosses | None = None,
        clip: float = 1000.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler, init_from=init_from)
        self.automatic_optimization = False
        self.config = vocoder
        self.discriminator_config = discriminators or DiscriminatorConfig()
        self.losses = losses or VocoderLosses()
        self.clip = clip
        self.mel = LogMelSpectrogram(vocoder.mel)
        self.whole_band = LogMelSpectrogram(_whole_band(vocoder.mel))
        self.vocoder: HiFiGANVocoder | None = None
        self.discriminators: Discriminators | None = None

    def setup(self, stage: str) -> None:
        """Refuse data of another rate."""
        self._check_rate(self.config.mel)

    def configure_model(self) -> None:
        """Build the networks; Lightning may call this more than once."""
        if self.vocoder is None:
            self.vocoder = HiFiGANVocoder(self.config)
            self._take_from(self.vocoder, "vocoder")
            self.discriminators = Discriminators(self.discriminator_config)

    def training_step(self, batch: VoiceBatch, batch_idx: int) -> None:
        """A step of the discriminators, then one of the generator."""
        assert self.vocoder is not None and self.discriminators is not None
        # Raw, as Lightning would count the discriminators' steps as well.
        _, judges = cast(list[Optimizer], self.optimizers(use_pl_optimizer=False))
        generator = cast(list[Any], self.optimizers())[0]
        real, made = self._resynthesized(batch)
        adversarial = self.global_step >= self.losses.adversarial_from
        if adversarial:
            loss = discriminator_loss(self.discriminators(real), self.discriminators(made.detach()))
            self._step(judges, loss, self.discriminators)
            self.log("train/loss/discriminators", loss.detach(), batch_size=len(real))
        distance = functional.l1_loss(self.whole_band(made), self.whole_band(real))
        loss = self.losses.mel * distance
        if adversarial:
            loss = loss + self._fooling(real, made)
        self._step(generator, loss, self.vocoder)
        self.log("train/loss", distance.detach(), prog_bar=True, batch_size=len(real))
        for scheduler in cast(list[Any], self.lr_schedulers() or []):
            scheduler.step()

    def validation_step(self, batch: VoiceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Difference of log-mels over the valid frames of whole utterances."""
        if not len(batch.lengths):
            return
        real, made = self._resynthesized(batch)
        difference = (self.whole_band(made) - self.whole_band(real)).abs()
        frames = batch.lengths // self.config.mel.hop
        valid = torch.arange(difference.shape[1], device=self.device) < frames[:, None]
        number = valid.sum() * difference.shape[-1]
        self._add_validation_loss((difference * valid[..., None]).sum(), number, dataloader_idx)

    def configure_optimizers(self) -> Any:
        """Two optimizers alike, the generator's first."""
        assert self.vocoder is not None and self.discriminators is not None
        parts = [self._optimizer_of(part.parameters()) for part in (self.vocoder, self.discriminators)]
        return [optimizer for optimizer, _ in parts], [s for _, schedulers in parts for s in schedulers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to build the generator again, and to go on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["echat_token2wav"] = part_settings("vocoder", asdict(self.config))

    def _resynthesized(self, batch: VoiceBatch) -> tuple[Tensor, Tensor]:
        """[B, samples] as recorded and as made of its mel, whole hops long."""
        assert self.vocoder is not None
        made = self.vocoder(self.mel(batch.waveforms))
        return batch.waveforms[:, : made.shape[1]], made

    def _fooling(self, real: Tensor, made: Tensor) -> Tensor:
        assert self.discriminators is not None
        # The discriminators learn nothing from this, and their gradients would cost a third of the step.
        self.discriminators.requires_grad_(False)
        judged_real, judged_made = self.discriminators(real), self.discriminators(made)
        self.discriminators.requires_grad_(True)
        adversarial = adversarial_loss(judged_made)
        matching = feature_matching_loss(judged_real, judged_made)
        self.log_dict(
            {"train/loss/adversarial": adversarial.detach(), "train/loss/feature_matching": matching.detach()},
            batch_size=len(real),
        )
        return self.losses.adversarial * adversarial + self.losses.feature_matching * matching

    def _step(self, optimizer: Any, loss: Tensor, part: nn.Module) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self._usable(part.parameters()):
            nn.utils.clip_grad_norm_(part.parameters(), self.clip)
        # Without gradients this changes nothing, and counts as a step on all ranks.
        optimizer.step()


def _whole_band(mel: MelConfig) -> MelConfig:
    """What the generator is judged by reaches above what it is given."""
    return MelConfig(**{**asdict(mel), "high": mel.sample_rate / 2})
