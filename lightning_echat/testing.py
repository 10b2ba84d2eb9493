"""Small stand-ins for the real things, shipped for the tests of this project and of those who build on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, PackedBatch, TokenizedDialogue, Turn
from lightning_echat.data.batching import pack_rows
from lightning_echat.data.log_mel import LogMel
from lightning_echat.data.writers import AudioFormat, ShardWriter
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.nn.speech_adapter import SpeechAdapterConfig
from lightning_echat.nn.speech_encoder import SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LanguageModelConfig, LoRAConfig
from lightning_echat.nn.weights import stored_settings
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS
from lightning_echat.tokens.tasks import DialogueTask
from lightning_echat.tokens.thinking import write_natural_thinking

_WORDS = ("find", "me", "a", "quiet", "cafe", "near", "the", "old", "station", "please", "today", "with", "music")

CODEBOOK_SIZE = 64
"""Speech codes of the tiny vocabulary."""


def dummy_audio(seconds: float, *, seed: int = 0) -> Tensor:
    """[samples] of something voiced: a few harmonics of a wavering pitch in noise, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 90.0 + 160.0 * float(torch.rand((), generator=generator))
    phase = 2 * torch.pi * (pitch * time + torch.sin(5 * time))
    voice = sum((torch.sin(n * phase) / n for n in range(1, 6)), torch.zeros_like(time))
    return (0.2 * voice + 0.01 * torch.randn(len(time), generator=generator)).clamp(-1, 1)


def dummy_dialogue(
    number: int = 0, *, exchanges: int = 1, seconds: float | None = None, codes: bool = True
) -> DialogueSample:
    """A dialogue with everything that any task asks for, all of it following from `number`.

    Args:
        number: Names the dialogue and decides its content.
        exchanges: Pairs of a user and an assistant turn.
        seconds: Length of each query; drawn between 0.4 and 2 s where it is not given.
        codes: Whether replies carry speech codes.
    """
    random = Random(number)
    turns: list[Turn] = []
    for exchange in range(exchanges):
        length = random.uniform(0.4, 2.0) if seconds is None else seconds
        labels = {name: random.choice(known) for name, known in LABEL_SETS.items()}
        text = " ".join(random.choices(_WORDS, k=random.randint(3, 8)))
        emotion = random.choice(REPLY_EMOTIONS)
        turns.append(
            Turn(role="user", text=text, audio=dummy_audio(length, seed=100 * number + exchange), labels=labels)
        )
        reply_codes = [random.randrange(CODEBOOK_SIZE) for _ in range(random.randint(10, 40))]
        turns.append(
            Turn(
                role="assistant",
                text=" ".join(random.choices(_WORDS, k=random.randint(3, 12))),
                labels={"emotion": emotion},
                thinking=write_natural_thinking(text, labels, emotion),
                speech_codes=torch.tensor(reply_codes) if codes else None,
            )
        )
    return DialogueSample(
        turns=turns, key=f"dialogue-{number:06d}", speaker=f"s{number % 7:04d}", voice_type=f"type-{number % 3}"
    )


def write_dummy_shards(
    folder: Path,
    *,
    shards: int = 2,
    samples_per_shard: int = 8,
    exchanges: int = 1,
    first: int = 0,
    audio_format: AudioFormat = "wav",
) -> Path:
    """Write dummy dialogues number `first` and on as shards with an index. Returns the folder."""
    with ShardWriter(folder, audio_format=audio_format, dialogues_per_shard=samples_per_shard) as writer:
        for number in range(first, first + shards * samples_per_shard):
            writer.write(dummy_dialogue(number, exchanges=exchanges))
    return folder


def tiny_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of 259 ids that spells any text byte by byte. Returns the folder.

    Its special tokens are Qwen's: `<|im_end|>` ends a turn, `<|endoftext|>` pads.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0], additional_special_tokens=special[1:2]
    )
    fast.save_pretrained(folder)
    return folder


def tiny_tokens_config(folder: Path, *, prompt_set: str = "compact") -> TokensConfig:
    """Tokens of a tiny model, with its tokenizer written to `folder`."""
    return TokensConfig(
        tokenizer=str(tiny_tokenizer(folder)),
        text_vocabulary_size=260,
        codebook_size=CODEBOOK_SIZE,
        prompt_set=prompt_set,
    )


def tiny_network_config(
    *, auxiliary_labels: Sequence[str] = (), depthwise_kernel: int = 0, lora: LoRAConfig | None = None
) -> NetworkConfig:
    """A network of every part, two layers each and 90,000 parameters in all, for the tokens of `tiny_tokens_config`.

    It is built in 20 ms, loads nothing, and has no dropout, so that two passes agree.

    Args:
        auxiliary_labels: Label sets with an auxiliary head on the encoder.
        depthwise_kernel: See `SpeechEncoderConfig`.
        lora: Adapt the language model by LoRA.
    """
    return NetworkConfig(
        encoder=SpeechEncoderConfig(
            pretrained=False,
            width=32,
            layers=2,
            heads=2,
            feedforward=64,
            strides=(1, 2),
            depthwise_kernel=depthwise_kernel,
            max_positions=500,
        ),
        adapter=SpeechAdapterConfig(strides=(1, 2, 2), layers=2, heads=2, feedforward=64, dropout=0.0),
        llm=LanguageModelConfig(
            pretrained=False,
            architecture={
                "model_type": "qwen2",
                "vocab_size": 260,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
            lora=lora,
        ),
        auxiliary_labels=tuple(auxiliary_labels),
    )


def tiny_model(tokens: TokensConfig, *, network: NetworkConfig | None = None, seed: int = 0) -> EChatModel:
    """An untrained model in eval mode; the same seed gives the same weights, and leaves the global generator alone.

    Args:
        tokens: From `tiny_tokens_config`.
        network: Something else than `tiny_network_config()`.
        seed: Of the weights.
    """
    vocabulary = DialogueTokenizer.from_config(tokens).vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EChatModel(network or tiny_network_config(), tokens=tokens, vocabulary=vocabulary)
    return model.eval()


def dummy_tokenized(
    tokenizer: DialogueTokenizer,
    task: DialogueTask,
    *,
    number: int = 0,
    exchanges: int = 1,
    seconds: float | None = None,
) -> TokenizedDialogue:
    """Dummy dialogue `number` as ids, mels included (see `dummy_dialogue`)."""
    sample = dummy_dialogue(number, exchanges=exchanges, seconds=seconds)
    log_mel = LogMel()
    turns = [turn if turn.audio is None else replace(turn, log_mel=log_mel(turn.audio)) for turn in sample.turns]
    return tokenizer.tokenize(replace(sample, turns=turns), task)


def dummy_batch(
    tokenizer: DialogueTokenizer, tasks: Sequence[DialogueTask], *, per_row: int = 1, first: int = 0, exchanges: int = 1
) -> PackedBatch:
    """A batch of one dummy dialogue for each task, numbered from `first` on, `per_row` of them in a row."""
    dialogues = [
        dummy_tokenized(tokenizer, task, number=first + place, exchanges=exchanges) for place, task in enumerate(tasks)
    ]
    rows = [dialogues[start : start + per_row] for start in range(0, len(dialogues), per_row)]
    return pack_rows(rows, padding=tokenizer.vocabulary.padding)


def save_tiny_checkpoint(
    path: Path, model: EChatModel, tokens: TokensConfig, *, network: NetworkConfig | None = None, step: int = 7
) -> Path:
    """Write what `load_trained` and `init_from` read of a stage's checkpoint. Returns the path.

    Args:
        path: The .ckpt file.
        model: Its weights.
        tokens: What it was built with.
        network: What it was built with, where that is not `tiny_network_config()`.
        step: Optimizer steps that it claims to have been trained for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    settings = stored_settings(tokens, network or tiny_network_config(), model)
    torch.save({"state_dict": state, "echat": settings, "global_step": step}, path)
    return path
