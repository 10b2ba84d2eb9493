"""What all training stages share: the network, the loss and its division, the hand-over, and answers for callbacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from lightning_echat.collectives import any_rank, clip_gradients, gathered
from lightning_echat.contracts import DialogueReference, EChatOutput, GeneratedReply, PackedBatch, UserError
from lightning_echat.data.batching import collate
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.losses import TokenLoss, ctc_loss_sum, label_loss_sum, token_loss
from lightning_echat.metrics import MeanTokenLoss
from lightning_echat.nn.deferred_init import DeferredInit, local
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.nn.trainable_parts import frozen_in_eval, set_trainable
from lightning_echat.nn.weight_sources import read_pretrained
from lightning_echat.nn.weights import load_from, stored_settings
from lightning_echat.parallel import check_same_batch, compile_blocks, data_share, reshard, sharded
from lightning_echat.stages.evaluated_sets import set_keys
from lightning_echat.stages.resuming import (
    own_random_state,
    random_state,
    recount_batches,
    restore_random_state,
    set_random_state,
)
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.paralinguistics import LABEL_SETS


@dataclass(frozen=True, kw_only=True)
class AuxiliaryWeights:
    """Weights of the auxiliary losses on the encoder; they need `network.auxiliary_labels`.

    Every loss is a sum over its own targets and all are divided by the supervised ids, so a weight of 1 lets one
    character or one label count as much as one id. A transcript that is longer than its frames has no CTC loss.

    Attributes:
        ctc: Characters of the transcript, from encoder frames.
        text_ctc: Text ids of the transcript, from the adapter's outputs by the language model's own text head: what
            fills a placeholder then resembles the embedding of the word spoken there, which the language model can
            read at once. Its logits take clips · outputs · vocabulary.
        labels: Paralinguistic labels from pooled frames.
    """

    ctc: float = 0.0
    text_ctc: float = 0.0
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
        compile_blocks: Have each block of encoder, adapter and language model translated by torch.compile, which costs
            minutes at the start and gains where kernels are small. Answers are generated without.
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
        compile_blocks: bool = False,
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
        if self.auxiliary_weights != AuxiliaryWeights() and not network.auxiliary_labels:
            raise UserError(
                "auxiliary weights need heads: name label sets in network.auxiliary_labels, or give no weights"
            )
        self.decoding = decoding or DecodingConfig()
        self.compile_blocks = compile_blocks
        self.dialogue_tokenizer = DialogueTokenizer.from_config(tokens)
        self.model: EChatModel | None = None
        self._window_tokens: Tensor | None = None
        self._validation_losses: dict[str, MeanTokenLoss] = {}
        self._answered: tuple[PackedBatch, list[GeneratedReply]] | None = None
        self._random_state: Mapping[str, Tensor] | None = None
        self._asked_to_stop = False
        self._ranks_asked_to_stop: Tensor | int = 0

    def configure_model(self) -> None:
        """Build the network once the strategy is there; Lightning may call this more than once."""
        if self.model is not None:
            return
        strategy = sharded(self._trainer)
        if strategy is not None:
            # Each rank draws its part of the weights: what several hold must begin alike, whatever their seeds.
            set_random_state(strategy.broadcast(random_state()), strategy.root_device)
        # No rank of a sharded run ever holds the whole: it gets its shards first and their values after.
        deferred = DeferredInit() if strategy is not None else None
        with deferred or nullcontext():
            self.model = EChatModel(self.network, tokens=self.tokens, vocabulary=self.dialogue_tokenizer.vocabulary)
        # The auxiliary heads exist for training only, so they train whatever else does.
        auxiliary = ("auxiliary.*",) if self.model.auxiliary is not None else ()
        set_trainable(self.model, (*self.trainable_patterns, *auxiliary))
        if self.compile_blocks:
            compile_blocks(self.model)
        if strategy is not None and deferred is not None:
            deferred.name(self.model)
            strategy.shard(self, self.model, entries=("training_step", "_validate", "_answer"))
            deferred.fill(self.model, but=self._read_weights(self.model))
        else:
            self._read_weights(self.model)

    def _read_weights(self, model: EChatModel) -> set[str]:
        """From the stage before, or of the pretrained parts; returns the names of those that were read."""
        if self.init_from:
            came = load_from(model, self.init_from, new_parts=self.init_new_parts)
            rank_zero_only(sys.stdout.write)(f"{came.report}\n")
            return set(came.filled)
        if sharded(self._trainer) is not None:
            return read_pretrained(model, self.network)
        load_pretrained_parts(model)
        return set()

    def on_train_start(self) -> None:
        """Start an empty accumulation window, with dropout where something trains and nowhere else.

        Lightning leaves the mode as it finds it, and pretrained models come in eval mode.
        """
        assert self.model is not None
        self._window_tokens = None
        self.model.train()
        frozen_in_eval(self.model)
        restore_random_state(self._random_state, self.device)
        self._random_state = None

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
        self._validation_losses = {
            f"{key}/loss/{kind}": MeanTokenLoss().to(self.device)
            for key in self._set_keys()
            for kind in ("text", "speech")
        }

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch to its set's mean loss per supervised id."""
        loss = self._validate(batch)
        key = self._set_keys()[dataloader_idx]
        self._validation_losses[f"{key}/loss/text"].update(loss.text, loss.num_text)
        self._validation_losses[f"{key}/loss/speech"].update(loss.speech, loss.num_speech)

    def on_validation_epoch_end(self) -> None:
        """Log the means, reduced over ranks; a kind of target that no batch held is left out."""
        reshard(self)
        for key, metric in self._validation_losses.items():
            value = metric.compute()
            if not torch.isnan(value):
                # Every rank has the same value; without sync_dist Lightning warns that they might differ.
                self.log(key, value, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """As in validation: `test/<set>/loss/…` in place of `val/<set>/loss/…`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> list[GeneratedReply]:
        """The model's answers to every dialogue of the batch, which `callbacks.prediction_writer` writes down."""
        return self.answers(batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradient by the supervised ids of all ranks and the whole accumulation window.

        Lightning has divided each micro-batch by `accumulate_grad_batches` and DDP or FSDP has averaged over ranks:
        both are undone. Ranks that compute a batch together count its ids each and are averaged over each, which
        cancels. Clipping comes after this hook, so it sees the true norm. The same sum tells every rank whether one
        was asked to stop.
        """
        assert self._window_tokens is not None
        sums = torch.stack([self._window_tokens, self._window_tokens.new_tensor(int(self._asked_to_stop))])
        world = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            world = dist.get_world_size()
        total, self._ranks_asked_to_stop = sums
        scale = world * self.trainer.accumulate_grad_batches / total.clamp_min(1)
        for parameter in self._trainable_parameters():
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                gradient.mul_(scale.to(gradient))
        self._window_tokens = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does, but for a norm over gradients that are not all spread over the same ranks."""
        if gradient_clip_val and sharded(self._trainer) is not None and gradient_clip_algorithm != "value":
            clip_gradients(self._trainable_parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def ask_to_stop(self) -> None:
        """Let this rank tell the others, with the next optimizer step, that training shall end. Safe in a handler."""
        self._asked_to_stop = True

    @property
    def stopping(self) -> bool:
        """Whether a rank was asked to stop before the last optimizer step: the same on all ranks."""
        return bool(self._ranks_asked_to_stop)

    def configure_optimizers(self) -> Any:
        """The optimizer over what trains, and the schedule stepped at every optimizer step."""
        optimizer = self.optimizer_callable(self._parameter_groups())
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
            # Every length of what is written so far would be compiled anew.
            with torch.compiler.set_stance("force_eager"):
                self._answered = (batch, self._answer(batch))
            self.model.train(training)
            if training:
                frozen_in_eval(self.model)
            reshard(self)
        return self._answered[1]

    def _answer(self, batch: PackedBatch) -> list[GeneratedReply]:
        """Generate. Ranks that share a sharded network take the same steps until the last of them is done."""
        assert self.model is not None
        if sharded(self._trainer) is None:
            return generate(self.model, batch, self.dialogue_tokenizer, self.decoding)
        config = self.decoding
        asked = batch
        if not batch.references:
            # This rank has nothing to ask and yet must be there: it answers a question of one id, with one id.
            asked, config = self._no_question(batch), replace(config, max_text_ids=1)
        replies = generate(
            self.model,
            asked,
            self.dialogue_tokenizer,
            config,
            goes_on=lambda writing: any_rank(writing, batch.input_ids.device),
        )
        return replies if batch.references else []

    def _no_question(self, batch: PackedBatch) -> PackedBatch:
        padding = self.dialogue_tokenizer.vocabulary.padding
        nobody = DialogueReference(key="", task="text_to_text", prompt_length=1, length=1)
        empty = collate([], padding=padding, mel_bins=self.tokens.mel_bins)
        empty.references = [nobody]
        return self.trainer.strategy.batch_to_device(empty, batch.input_ids.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to build the network again, as plain values."""
        assert self.model is not None
        checkpoint["echat"] = stored_settings(self.tokens, self.network, self.model)
        # Of each share of the data: ranks that compute a batch together drop the same of it.
        _, shares = data_share(self.trainer)
        checkpoint["random_states"] = gathered(random_state())[:: self.trainer.world_size // shares]
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the share's random state until training starts, as what comes before draws too; begin a whole window."""
        recount_batches(checkpoint, accumulate=self.trainer.accumulate_grad_batches)
        share, shares = data_share(self.trainer)
        self._random_state = own_random_state(checkpoint, share=share, shares=shares)

    def _validate(self, batch: PackedBatch) -> TokenLoss:
        return self._losses(batch)[1]

    def _losses(self, batch: PackedBatch) -> tuple[EChatOutput, TokenLoss]:
        assert self.model is not None
        check_same_batch(self._trainer, batch)
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
        heard, weights = output.heard, self.auxiliary_weights
        characters, labels = self.model.auxiliary(heard.encoder_frames, heard.encoder_lengths)
        text = self.model.lm.text_head(heard.adapter_outputs) if weights.text_ctc else characters[:0]
        if batch.log_mels.shape[0] == 0:
            return 0.0 * sum(logits.sum() for logits in (characters, text, *labels.values()))
        label = label_loss_sum(labels, batch.clip_labels, tuple(LABEL_SETS))
        self.log("train/loss/labels", label.detach() / max(1, len(labels) * batch.log_mels.shape[0]))
        total = weights.labels * label + weights.ctc * self._ctc_loss(
            "ctc", characters, heard.encoder_lengths, batch.clip_characters, batch.clip_character_lengths
        )
        if weights.text_ctc:
            lengths, ids = heard.adapter_lengths, batch.clip_transcript_ids
            # No transcript holds the end of text: it stands for no target.
            blank = self.model.vocabulary.end_of_text
            total = total + weights.text_ctc * self._ctc_loss(
                "text_ctc", text, lengths, ids, batch.clip_transcript_lengths, blank=blank
            )
        return total

    def _ctc_loss(
        self, name: str, logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int = 0
    ) -> Tensor:
        """See `ctc_loss_sum`. Logs the mean a target, and the share of targets that fit into their frames."""
        loss, scored = ctc_loss_sum(logits, lengths, targets, target_lengths, blank=blank)
        self.log(f"train/loss/{name}", loss.detach() / scored.clamp_min(1))
        self.log(f"train/{name}_share", scored / target_lengths.sum().clamp_min(1))
        return loss

    def _log_training(self, loss: TokenLoss) -> None:
        """Log means; only at logging steps, as reading a count makes an accelerator wait."""
        if (self.global_step + 1) % cast(Any, self.trainer).log_every_n_steps:
            return
        for kind, value, count in _means(loss):
            if count:
                self.log(f"train/loss/{kind}", value, batch_size=count)
        mean = (loss.text + loss.speech).detach() / (loss.num_text + loss.num_speech).clamp_min(1)
        self.log("train/loss", mean, prog_bar=True, batch_size=1)

    def _set_keys(self) -> list[str]:
        """See `set_keys`; numbers where the datamodule names no sets."""
        return set_keys(self.trainer) or [f"{'test' if self.trainer.testing else 'val'}/{i}" for i in range(8)]

    def _parameter_groups(self) -> list[Any]:
        """What the optimizer is made of: parameters, or groups of them with settings of their own."""
        return list(self._trainable_parameters())

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
