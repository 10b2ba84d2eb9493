import pytest
import torch
from torch import nn

from lightning_echat.contracts import UserError
from lightning_echat.nn.trainable_parts import frozen_in_eval, set_trainable


def test_patterns_choose_what_trains_and_freeze_the_rest(model):
    count = set_trainable(model, ["encoder.*", "lm.speech_head.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if name.startswith(("encoder.", "lm.speech_head."))}
    assert trained == expected
    assert count == sum(p.numel() for name, p in model.named_parameters() if name in expected)
    # A later choice undoes an earlier one.
    assert set_trainable(model, ["*"]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pattern", ["encodr.*", "encoder", "ENCODER.*"])
def test_a_pattern_that_matches_nothing_is_refused(model, pattern):
    with pytest.raises(UserError, match="the parts are adapter, encoder, lm"):
        set_trainable(model, ["lm.*", pattern])


def test_frozen_modules_leave_training_mode_and_others_stay():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()),
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.LayerNorm(2)),
    ).train()
    model.get_submodule("0").requires_grad_(False)
    model.get_submodule("1.2").requires_grad_(False)
    frozen_in_eval(model)
    assert {name: module.training for name, module in model.named_modules() if name} == {
        "0": False,
        "0.0": False,
        "0.1": False,
        "1": True,
        "1.0": True,
        "1.1": True,
        "1.2": False,
    }


def test_a_frozen_adapter_drops_nothing_while_the_encoder_trains(model, tokenizer):
    for module in model.adapter.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    set_trainable(model, ["encoder.*"])
    model.train()
    frames, lengths = torch.randn(1, 12, 32), torch.tensor([12])
    noisy = [model.adapter(frames, lengths)[0] for _ in range(2)]
    frozen_in_eval(model)
    calm = [model.adapter(frames, lengths)[0] for _ in range(2)]
    assert not torch.equal(*noisy)
    assert torch.equal(*calm)
