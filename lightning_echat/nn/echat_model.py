"""The whole network: PackedBatch -> EChatOutput. It knows no loss and no Lightning."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_echat.contracts import EChatOutput, HeardSpeech, PackedBatch, UserError
from lightning_echat.nn.auxiliary_heads import AuxiliaryHeads
from lightning_echat.nn.speech_adapter import SpeechAdapter, SpeechAdapterConfig
from lightning_echat.nn.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LanguageModelConfig, SpeechLanguageModel
from lightning_echat.tokens.dialogue_template import TokensConfig
from lightning_echat.tokens.vocabulary import Vocabulary

_DUMMY_FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The parts of the network.

    Attributes:
        encoder, adapter, llm: Sizes and weights of each part.
        auxiliary_labels: Label sets with an auxiliary head on the encoder; empty for no auxiliary heads at all.
    """

    encoder: SpeechEncoderConfig = field(default_factory=SpeechEncoderConfig)
    adapter: SpeechAdapterConfig = field(default_factory=SpeechAdapterConfig)
    llm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    auxiliary_labels: tuple[str, ...] = ()


class EChatModel(nn.Module):
    """Hears clips, reads ids, and yields the hidden states that the heads score."""

    def __init__(self, config: NetworkConfig, *, tokens: TokensConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        strides = (*config.encoder.strides, *config.adapter.strides)
        # Strides of 1 change no length, so they are free to be left out of tokens.audio_strides.
        if [s for s in strides if s > 1] != [s for s in tokens.audio_strides if s > 1]:
            raise UserError(f"tokens.audio_strides {tokens.audio_strides} differ from the network's {strides}")
        self.vocabulary = vocabulary
        self.encoder = SpeechEncoder(config.encoder, mel_bins=tokens.mel_bins)
        self.lm = SpeechLanguageModel(config.llm, vocabulary=vocabulary)
        self.adapter = SpeechAdapter(config.adapter, encoder_width=config.encoder.width, llm_width=self.lm.width)
        self.auxiliary = (
            AuxiliaryHeads(config.encoder.width, label_sets=config.auxiliary_labels)
            if config.auxiliary_labels
            else None
        )

    def forward(self, batch: PackedBatch) -> EChatOutput:
        """Hidden states of every position.

        A batch without audio still runs encoder and adapter, on a dummy clip that counts for nothing: every rank then
        makes the same collective calls whatever its batch holds.
        """
        embeddings = self.lm.embed(batch.input_ids)
        embeddings, heard = self.hear(batch, embeddings)
        mask = document_mask(batch.document_ids)
        # Without a mask Hugging Face reads positions that restart, as those of padding do, as packed rows, and builds
        # one. Left out they count from 0, which is what the one dialogue of each row has.
        hidden = self.lm(embeddings, position_ids=None if mask is None else batch.position_ids, attention_mask=mask)
        return EChatOutput(hidden_states=hidden, heard=heard)

    def hear(self, batch: PackedBatch, embeddings: Tensor) -> tuple[Tensor, HeardSpeech]:
        """Encode the clips and put them in their placeholders' stead.

        Returns:
            [R, T, D] embeddings, and the clips.
        """
        silent = batch.log_mels.shape[0] == 0
        log_mels, lengths = batch.log_mels, batch.log_mel_lengths
        if silent:
            log_mels = embeddings.new_zeros(1, _DUMMY_FRAMES, batch.log_mels.shape[2])
            lengths = torch.full((1,), _DUMMY_FRAMES, device=embeddings.device)
        dtype = self.encoder.conv1.weight.dtype
        frames, frame_lengths = self.encoder(log_mels.to(dtype), lengths)
        adapted, adapted_lengths = self.adapter(frames, frame_lengths)
        heard = HeardSpeech(
            encoder_frames=frames,
            encoder_lengths=frame_lengths,
            adapter_outputs=adapted,
            adapter_lengths=adapted_lengths,
        )
        if silent:
            return embeddings + 0.0 * adapted.sum(), heard
        return fill_placeholders(embeddings, adapted, batch), heard


def fill_placeholders(embeddings: Tensor, adapted: Tensor, batch: PackedBatch) -> Tensor:
    """Write each clip's first `clip_lengths` adapter outputs over its span.

    Args:
        embeddings: [R, T, D].
        adapted: [C, n, D].
        batch: Names the spans.

    Returns:
        [R, T, D], a copy.
    """
    offsets = torch.arange(adapted.shape[1], device=adapted.device)
    valid = offsets[None] < batch.clip_lengths[:, None]
    rows = batch.clip_rows[:, None].expand_as(valid)[valid]
    columns = (batch.clip_starts[:, None] + offsets[None])[valid]
    return embeddings.index_put((rows, columns), adapted[valid].to(embeddings.dtype))


def document_mask(document_ids: Tensor) -> Tensor | None:
    """[R, T] document ids -> [R, 1, T, T] bool, True where a position may look: back, within its own dialogue.

    None when no row holds two dialogues: padding stands behind everything that counts, so causal attention is enough.
    """
    if int(document_ids.max()) <= 1:
        return None
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return same & causal
