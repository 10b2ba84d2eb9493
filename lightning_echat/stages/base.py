"""What all training stages share: the network, the loss and its division, the hand-over, and answers for callbacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from lightning_echat.contracts import EChatOutput, GeneratedReply, PackedBatch, UserError
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.losses import TokenLoss, ctc_loss_sum, label_loss_sum, token_loss
from lightning_echat.metrics import MeanTokenLoss
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.nn.trainable_parts import frozen_in_eval, set_trainable
from lightning_echat.nn.weights import load_from, stored_settings
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.paralinguistics import LABEL_SETS


@dataclass(frozen=True, kw_only=True)
class AuxiliaryWeights:
    """Weights of the auxiliary losses on the encoder; they need `network.auxiliary_labels`.

    Every loss is a sum over its own targets and all are divided by the supervised ids, so a weight of 1 lets one
    character or one label count as much as one id.

    Attributes:
        ctc: Characters of the transcript.
        labels: Paralinguistic labels from pooled frames.
    """

    ctc: float = 0.0
    labels: float = 0.0


class EChatStage(L.LightningModule):
    """One training stage. Subclasses say which parts train by default.

    Args:
        tokens: What data and model agree on; the CLI links it to the data.
        network: Sizes and weights of the network.
        optimizer: Builds the optimizer from the trainable parameters.
        scheduler: Builds a learning-rate schedule that is stepped at every optimizer step; none for a constant rate.
        trainable: Name patterns of the parts that train; empty for the stage's own choice.
        init_from: Checkpoint or run folder of the stage before, or a folder of `echat convert`.
        init_new_parts: Name patterns of weights that `init_from` need not have.
        auxiliary: Weights of the auxiliary losses.
        decoding: How callbacks generate answers.
    """

    default_trainable: tuple[str, ...] = ("*",)

    def __init__(
        self,
        *,
        tokens: TokensConfig,
        network: NetworkConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        trainable: list[str] | None = None,
        init_from: str | None = None,
        init_new_parts: list[str] | None = None,
        auxiliary: AuxiliaryWeights | None = None,
        decoding: DecodingConfig | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.network = network
        self.optimizer_callable = optimizer
        self.scheduler_callable = scheduler
        self.trainable_patterns = tuple(trainable or self.default_trainable)
        self.init_from = init_from
        self.init_new_parts = tuple(init_new_parts or ())
        self.auxiliary_weights = auxiliary or AuxiliaryWeights()
        if (self.auxiliary_weights.ctc or self.auxiliary_weights.labels) and not network.auxiliary_labels:
            raise UserError(
                "auxiliary weights need heads: name label sets in network.auxiliary_labels, or give no weights"
            )
        self.decoding = decoding or DecodingConfig()
        self.dialogue_tokenizer = DialogueTokenizer.from_config(tokens)
        self.model: EChatModel | None = None
        self._window_tokens: Tensor | None = None
        self._validation_losses: dict[str, MeanTokenLoss] = {}
        self._answered: tuple[PackedBatch, list[GeneratedReply]] | None = None

    def configure_model(self) -> None:
        """Build the network once the strategy is there; Lightning may call this more than once."""
        if self.model is not None:
            return
        self.model = EChatModel(self.network, tokens=self.tokens, vocabulary=self.dialogue_tokenizer.vocabulary)
        if self.init_from:
            report = load_from(self.model, self.init_from, new_parts=self.init_new_parts)
            rank_zero_only(sys.stdout.write)(f"{report}\n")
        else:
            load_pretrained_parts(self.model)
        # The auxiliary heads exist for training only, so they train whatever else does.
        auxiliary = ("auxiliary.*",) if self.model.auxiliary is not None else ()
        set_trainable(self.model, (*self.trainable_patterns, *auxiliary))

    def on_train_start(self) -> None:
        """Start an empty accumulation window, with dropout where something trains and nowhere else.

        Lightning leaves the mode as it finds it, and pretrained models come in eval mode.
        """
        assert self.model is not None
        self._window_tokens = None
        self.model.train()
        frozen_in_eval(self.model)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """The summed loss of the batch. `on_before_optimizer_step` divides its gradient."""
        output, loss = self._losses(batch)
        total = loss.text + loss.speech + self._auxiliary_loss(batch, output)
        supervised = loss.num_text + loss.num_speech
        self._window_tokens = supervised if self._window_tokens is None else self._window_tokens + supervised
        self._log_training(loss)
        return total

    def on_validation_epoch_start(self) -> None:
        """One running mean per validation set and kind of target, on every rank alike."""
        names = self._validation_names()
        self._validation_losses = {
            f"val/{name}/loss/{kind}": MeanTokenLoss().to(self.device) for name in names for kind in ("text", "speech")
        }

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to its set's mean loss per supervised id."""
        _, loss = self._losses(batch)
        name = self._validation_names()[dataloader_idx]
        self._validation_losses[f"val/{name}/loss/text"].update(loss.text, loss.num_text)
        self._validation_losses[f"val/{name}/loss/speech"].update(loss.speech, loss.num_speech)

    def on_validation_epoch_end(self) -> None:
        """Log the means, reduced over ranks; a kind of target that no batch held is left out."""
        for key, metric in self._validation_losses.items():
            value = metric.compute()
            if not torch.isnan(value):
                # Every rank has the same value; without sync_dist Lightning warns that they might differ.
                self.log(key, value, sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradient by the supervised ids of all ranks and the whole accumulation window.

        Lightning has divided each micro-batch by `accumulate_grad_batches` and DDP or FSDP has averaged over ranks:
        both are undone. Clipping comes after this hook, so it sees the true norm.
        """
        assert self._window_tokens is not None
        total = self._window_tokens.clone()
        world = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            world = dist.get_world_size()
        scale = world * self.trainer.accumulate_grad_batches / total.clamp_min(1)
        for parameter in self._trainable_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
        self._window_tokens = None

    def configure_optimizers(self) -> Any:
        """The optimizer over what trains, and the schedule stepped at every optimizer step."""
        optimizer = self.optimizer_callable(list(self._trainable_parameters()))
        if self.scheduler_callable is None:
            return optimizer
        scheduler = self.scheduler_callable(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def answers(self, batch: PackedBatch) -> list[GeneratedReply]:
        """The model's answers to every dialogue of a batch; remembered, so that callbacks share one generation."""
        assert self.model is not None
        if self._answered is None or self._answered[0] is not batch:
            training = self.model.training
            self.model.eval()
            self._answered = (batch, generate(self.model, batch, self.dialogue_tokenizer, self.decoding))
            self.model.train(training)
            if training:
                frozen_in_eval(self.model)
        return self._answered[1]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to build the network again, as plain values."""
        assert self.model is not None
        checkpoint["echat"] = stored_settings(self.tokens, self.network, self.model)

    def _losses(self, batch: PackedBatch) -> tuple[EChatOutput, TokenLoss]:
        assert self.model is not None
        output = self.model(batch)
        loss = token_loss(
            output.hidden_states,
            batch.labels,
            batch.speech_scored,
            text_head=self.model.lm.text_head,
            speech_head=self.model.lm.speech_head,
        )
        return output, loss

    def _auxiliary_loss(self, batch: PackedBatch, output: EChatOutput) -> Tensor | float:
        assert self.model is not None
        if self.model.auxiliary is None:
            return 0.0
        characters, labels = self.model.auxiliary(output.encoder_frames, output.encoder_lengths)
        if batch.log_mels.shape[0] == 0:
            return 0.0 * (characters.sum() + torch.stack([logits.sum() for logits in labels.values()]).sum())
        ctc = ctc_loss_sum(characters, output.encoder_lengths, batch.clip_characters, batch.clip_character_lengths)
        label = label_loss_sum(labels, batch.clip_labels, tuple(LABEL_SETS))
        self.log("train/loss/ctc", ctc.detach() / batch.clip_character_lengths.sum().clamp_min(1))
        self.log("train/loss/labels", label.detach() / max(1, len(labels) * batch.log_mels.shape[0]))
        return self.auxiliary_weights.ctc * ctc + self.auxiliary_weights.labels * label

    def _log_training(self, loss: TokenLoss) -> None:
        """Log means; only at logging steps, as reading a count makes an accelerator wait."""
        if (self.global_step + 1) % cast(Any, self.trainer).log_every_n_steps:
            return
        for kind, value, count in _means(loss):
            if count:
                self.log(f"train/loss/{kind}", value, batch_size=count)
        mean = (loss.text + loss.speech).detach() / (loss.num_text + loss.num_speech).clamp_min(1)
        self.log("train/loss", mean, prog_bar=True, batch_size=1)

    def _validation_names(self) -> list[str]:
        """Names of the validation sets, from the datamodule where it gives them."""
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None)
        return list(names) if names else [str(i) for i in range(8)]

    def _trainable_parameters(self) -> Iterator[torch.nn.Parameter]:
        return (p for p in cast(EChatModel, self.model).parameters() if p.requires_grad)


def _means(loss: TokenLoss) -> list[tuple[str, Tensor, int]]:
    """Kind, mean loss and number of targets, for text and speech ids."""
    return [
        ("text", loss.text.detach() / loss.num_text.clamp_min(1), int(loss.num_text)),
        ("speech", loss.speech.detach() / loss.num_speech.clamp_min(1), int(loss.num_speech)),
    ]


def load_pretrained_parts(model: EChatModel) -> None:
    """Fill in the pretrained speech encoder where the config asks for one; the language model loaded its own."""
    if model.encoder.config.pretrained:
        model.encoder.load_whisper()
