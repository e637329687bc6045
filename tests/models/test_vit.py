from __future__ import annotations

import pytest
import torch

from ait.models import VisionTransformer, count_parameters, create_model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit_tiny", 698_602), ("vit_small", 14_800_234), ("vit_medium", 43_142_506), ("vit_base", 85_655_914)],
)
def test_parameter_counts_on_cifar10(name: str, parameters: int) -> None:
    assert count_parameters(create_model(name, device="meta")) == (parameters, 0)


def test_defaults_are_the_base_size() -> None:
    assert count_parameters(VisionTransformer(device="meta")).total == 85_655_914


@pytest.mark.parametrize("options", [{}, {"attention": False}, {"question_dim": 18}], ids=str)
def test_every_parameter_gets_a_gradient(options: dict) -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny", **options)
    question = [torch.randn(4, 18)] if "question_dim" in options else []
    model(torch.randn(4, 3, 32, 32), *question).square().sum().backward()
    silent = [name for name, parameter in model.named_parameters() if not (parameter.grad != 0).any()]
    assert silent == []


def test_without_attention_each_patch_is_on_its_own_before_the_head() -> None:
    torch.manual_seed(0)
    model = create_model("vit_tiny", attention=False)
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, :4, :4] += 1
    difference = (model.forward_features(images) != model.forward_features(changed)).any(-1)[0]
    assert difference[0] and not difference[1:].any()


def test_state_dict_round_trip_is_strict_and_bitwise() -> None:
    model, other = create_model("vit_tiny"), create_model("vit_tiny")
    images = torch.randn(2, 3, 32, 32)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(images), other(images))


def test_runs_under_bfloat16_autocast_and_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, images = create_model("vit_tiny"), torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    # Nine blocks' roundings of 2**-9 each on logits of order 1.
    torch.testing.assert_close(mixed.float(), expected, rtol=0, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(images.bfloat16()).float(), expected, rtol=0, atol=0.1)
