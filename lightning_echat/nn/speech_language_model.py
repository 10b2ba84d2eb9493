"""A text language model that also reads and writes speech codes.

Any Hugging Face causal language model, a speech embedding table beside its own, and a speech head beside its own. Text
rows and pretrained weights stay untouched; ids follow `tokens.vocabulary`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from lightning_echat.contracts import UserError
from lightning_echat.nn.deferred_init import DeferredInit
from lightning_echat.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation of the language model through PEFT.

    Attributes:
        rank, alpha, dropout: As in PEFT.
        targets: Names of the linear layers adapted; the defaults are the reference's.
    """

    rank: int = 64
    alpha: int = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Which language model, and where its weights come from.

    Attributes:
        weights: Folder or hub name; read only when `pretrained`.
        pretrained: Load `weights`. False builds `architecture` with random weights.
        architecture: `model_type` and sizes as in a Hugging Face config.json. Empty: taken from `weights`.
        lora: Adapt the language model by LoRA; its own weights are then frozen.
        gradient_checkpointing: Compute each layer again in backward instead of keeping what it computed: a third more
            computing, and memory for one layer's activations instead of all.
        rotary_bfloat16: Round the sines and cosines of rotary positions to bfloat16, as the released OSUM-EChat does:
            without it the losses of its weights differ by up to 4e-4.
    """

    weights: str = "Qwen/Qwen2.5-3B-Instruct"
    pretrained: bool = True
    architecture: dict[str, Any] = field(default_factory=dict)
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False
    rotary_bfloat16: bool = False


def _build_llm(config: LanguageModelConfig) -> PreTrainedModel:
    try:
        if config.architecture:
            sizes = dict(config.architecture)
            llm_config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        else:
            llm_config = AutoConfig.from_pretrained(config.weights)
        # Released weights are often bfloat16, which small updates do not reach: the trainer's precision decides.
        dtype = torch.get_default_dtype()
        deferred = DeferredInit.active()
        if config.pretrained and deferred is not None:
            # Loading draws no random numbers either; `weight_sources.read_pretrained` does it, shard by shard.
            with deferred.undrawn():
                return AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation="sdpa")
        if config.pretrained:
            return AutoModelForCausalLM.from_pretrained(
                config.weights, config=llm_config, dtype=dtype, attn_implementation="sdpa"
            )
        return AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation="sdpa")
    except KeyError as error:
        raise UserError(f"llm.architecture needs model_type, for instance qwen2 ({error})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load language model {config.weights!r}: {str(error).splitlines()[0]}") from error


def _round_to_bfloat16(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward hook of a rotary embedding."""
    return tuple(table.to(torch.bfloat16).to(table.dtype) for table in output)


def _round_rotary(llm: PreTrainedModel) -> None:
    rotary = [module for module in llm.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if not rotary:
        raise UserError("llm.rotary_bfloat16: this language model has no rotary positions")
    for module in rotary:
        module.register_forward_hook(_round_to_bfloat16)


class SpeechLanguageModel(nn.Module):
    """Embeds unified ids, runs the language model, and holds the two heads that `losses` and `decoding` score with."""

    def __init__(self, config: LanguageModelConfig, *, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        llm = _build_llm(config)
        rows = cast(nn.Embedding, llm.get_input_embeddings()).num_embeddings
        if rows != vocabulary.text_size:
            raise UserError(
                f"tokens.text_vocabulary_size is {vocabulary.text_size} but the language model embeds {rows} ids; "
                f"set it to {rows}"
            )
        self.width: int = llm.config.hidden_size
        if config.gradient_checkpointing:
            llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.rotary_bfloat16:
            _round_rotary(llm)
        if config.lora is not None:
            lora = LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,
                lora_dropout=config.lora.dropout,
                target_modules=list(config.lora.targets),
            )
            llm = get_peft_model(llm, lora)
        self.llm = llm
        self.speech_embedding = nn.Embedding(vocabulary.speech_rows, self.width)
        self.speech_head = nn.Linear(self.width, vocabulary.speech_size)
        std = getattr(llm.config, "initializer_range", 0.02)
        nn.init.normal_(self.speech_embedding.weight, std=std)
        nn.init.normal_(self.speech_head.weight, std=std)
        nn.init.zeros_(self.speech_head.bias)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model, inside its PEFT wrapper or not."""
        return cast(PreTrainedModel, self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm)

    @property
    def text_head(self) -> nn.Linear:
        """[T, D] weight that scores text ids; tied to the embedding in many models."""
        return cast(nn.Linear, self.causal_lm.get_output_embeddings())

    def embed(self, ids: Tensor) -> Tensor:
        """[…] unified ids -> […, D]. Audio placeholders get zeros, which the adapter's output replaces."""
        text_size = self.vocabulary.text_size
        is_text = ids < text_size
        text = self.causal_lm.get_input_embeddings()(ids.where(is_text, 0))
        speech_ids = (ids - text_size).clamp(0, self.vocabulary.speech_rows - 1)
        speech = self.speech_embedding(speech_ids) * (ids != self.vocabulary.audio_placeholder)[..., None]
        return torch.where(is_text[..., None], text, speech.to(text.dtype))

    def forward(
        self,
        embeddings: Tensor,
        *,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[R, T, D] embeddings -> [R, T, D] hidden states after the final norm.

        `position_ids` is None for 0, 1, 2, … in every row. `attention_mask` is None (causal), [R, T] over keys, or an
        explicit [R, 1, T, T] bool mask. Training passes no cache: with one, packed rows would see their neighbours.
        """
        output = self.causal_lm.get_decoder()(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state
