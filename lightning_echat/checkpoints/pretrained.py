"""`EChatModel` as a Hugging Face model: `EChatPretrainedModel.from_pretrained(FOLDER)` and `save_pretrained`.

The pair is thin: the config holds what a stage's checkpoint stores, the model holds an `EChatModel` as `.model`. It is
imported by path, so no code from the folder ever runs (`trust_remote_code` is neither needed nor used).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from lightning_echat.contracts import MODEL_TYPE, EChatOutput, PackedBatch
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.nn.speech_encoder import SpeechEncoder, sinusoids
from lightning_echat.nn.weights import network_from_settings
from lightning_echat.tokens.dialogue_template import TokensConfig
from lightning_echat.tokens.vocabulary import Vocabulary


class EChatPretrainedConfig(PreTrainedConfig):
    """`config.json` of a folder.

    Attributes:
        echat: `tokens`, `network`, `tied_weights` (name -> the name under which the files hold its tensor) and `step`.
        eos_token_id: The text id that ends a written turn.
        pad_token_id: The tokenizer's.
        tie_word_embeddings: The language model scores text with its embedding.
    """

    model_type = MODEL_TYPE
    echat: dict[str, Any] | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False


class EChatPretrainedModel(PreTrainedModel):
    """An `EChatModel` that Hugging Face's loading and saving understand.

    Attributes:
        model: The network.
    """

    config_class = EChatPretrainedConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: EChatPretrainedConfig) -> None:
        super().__init__(config)
        settings = config.echat
        if settings is None or config.eos_token_id is None:
            raise ValueError("the config lacks `echat` or `eos_token_id`; make the folder with echat convert to-hf")
        tokens = TokensConfig(**settings["tokens"])
        vocabulary = Vocabulary(
            text_size=tokens.text_vocabulary_size,
            codebook_size=tokens.codebook_size,
            end_of_text=config.eos_token_id,
        )
        self.model = EChatModel(network_from_settings(settings["network"]), tokens=tokens, vocabulary=vocabulary)
        self.post_init()
        # Hugging Face looks for tied weights in direct children only, and the language model lies deeper.
        self.all_tied_weights_keys.update(settings.get("tied_weights", {}))

    def forward(self, batch: PackedBatch) -> EChatOutput:
        """See `EChatModel`."""
        return self.model(batch)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill in what no file holds: the sinusoids of the encoder."""
        super()._init_weights(module)
        if isinstance(module, SpeechEncoder):
            init.copy_(module.positions, sinusoids(*module.positions.shape))
