"""Which language models are cut over ranks, and which are refused. How they train: `test_parallel.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_echat.contracts import UserError
from lightning_echat.nn.tensor_parallel import cut_language_model

SIZES = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
QWEN = {"model_type": "qwen2", "intermediate_size": 48, "num_key_value_heads": 2, **SIZES}


def language_model(**config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        (QWEN, 3, "tensor_parallel is 3, which does not divide the language model's 4 (num_attention_heads)"),
        (QWEN, 4, "tensor_parallel is 4, which does not divide the language model's 2 (num_key_value_heads)"),
        (QWEN | {"intermediate_size": 49}, 2, "does not divide the language model's 49 (the width of layers.0.mlp"),
        ({"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 1}, 2, "GPT2LMHeadModel has no plan"),
        (QWEN | {"model_type": "qwen3", "head_dim": 6}, 2, "replicated_with_grad_allreduce for layers.*.self_attn.q_n"),
    ],
    ids=["heads", "key heads", "width", "no plan", "another plan"],
)
def test_what_cannot_be_cut_is_refused_in_one_line_and_left_whole(config, ranks, said):
    llm = language_model(**config)
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    with pytest.raises(UserError) as refused:
        cut_language_model(llm, mesh)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert all(type(parameter) is nn.Parameter for parameter in llm.parameters())
