from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import ait
from ait.models import AssociativeTransformer, count_parameters, create_model
from ait.models import ait as ait_module
from tests.tolerances import assert_close

DIGITS = {"img_size": 8, "patch_size": 2, "in_chans": 1}
ABLATIONS = {
    "full": {},
    "no_self_attention": {"attention": False},
    "no_hopfield": {"reader": "attention"},
    "no_bottleneck": {"top_k_ratio": 1.0},
    "no_balance_loss": {"balance_weight": 0.0},
    "learned_memory": {"memory": "learned"},
    "fixed_memory": {"memory": "fixed"},
    "released": {"semantics": "released"},
    "released_no_balance_loss": {"semantics": "released", "balance_weight": 0.0},
    "question": {"question_dim": 18},
}


def digits_model(**options: object) -> AssociativeTransformer:
    torch.manual_seed(0)
    return create_model("ait_tiny", **DIGITS, **options)


def inputs(model: AssociativeTransformer, batch: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(1)
    question = [] if model.question_dim is None else [torch.randn(batch, model.question_dim)]
    return [torch.randn(batch, model.patch_embed.in_chans, *model.patch_embed.img_size), *question]


@pytest.mark.parametrize(
    ("name", "total", "memory_entries"),
    [
        ("ait_tiny", 749_002, 3 * 32 * 16),
        ("ait_small", 15_675_370, 2 * 32 * 32),
        ("ait_medium", 45_767_914, 6 * 32 * 32),
        ("ait_base", 90_906_730, 12 * 32 * 32),
    ],
)
def test_parameters_plus_memory_entries_on_cifar10(name: str, total: int, memory_entries: int) -> None:
    count = count_parameters(create_model(name, device="meta"))
    assert (count.total, count.memory_entries) == (total, memory_entries)


def test_defaults_are_the_base_size() -> None:
    assert count_parameters(AssociativeTransformer(device="meta")).total == 90_906_730


@pytest.mark.parametrize("image", [{}, DIGITS], ids=["cifar10", "digits"])
def test_the_tiny_models_differ_by_at_most_a_tenth_and_with_one_more_head_would_differ_by_more(image: dict) -> None:
    vit = count_parameters(create_model("vit_tiny", device="meta", **image)).total
    assert vit < count_parameters(create_model("ait_tiny", device="meta", **image)).total <= 1.1 * vit
    if image == DIGITS:
        larger = create_model("ait_tiny", device="meta", workspace_heads=4, **image)
        assert count_parameters(larger).total > 1.1 * vit


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_every_trainable_parameter_gets_a_gradient_after_at_most_one_step(options: dict) -> None:
    model = digits_model(top_k=8, **options) if "top_k_ratio" not in options else digits_model(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*inputs(model)), torch.arange(16) % 10)
        (loss + ait.balance_loss(model)).backward()
        optimizer.step()
    silent = [name for name, parameter in trainable.items() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_it_differs_from_the_vit_in_the_mlp_alone() -> None:
    vit, model = create_model("vit_tiny"), create_model("ait_tiny")
    shared = {name: value for name, value in vit.state_dict().items() if ".mlp." not in name}
    assert shared.keys() == {name for name in model.state_dict() if ".mlp." not in name}
    model.load_state_dict(shared, strict=False)
    for block, vit_block in zip(model.blocks, vit.blocks, strict=True):
        assert isinstance(block.mlp, ait.GlobalWorkspaceLayer)
        block.mlp = vit_block.mlp
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), vit(images))


def test_every_argument_of_the_layer_is_one_of_the_model_with_the_same_default_and_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer_arguments = dict(inspect.signature(ait.GlobalWorkspaceLayer).parameters)
    del layer_arguments["dim"], layer_arguments["generator"]
    model_arguments = inspect.signature(AssociativeTransformer).parameters
    model_name = {name: name for name in layer_arguments} | {"num_heads": "workspace_heads"}
    for name, parameter in layer_arguments.items():
        assert model_arguments[model_name[name]].default == parameter.default

    received = []

    def spy(dim: int, **arguments: object) -> torch.nn.Module:
        received.append(arguments)
        return torch.nn.Identity()

    monkeypatch.setattr(ait_module, "GlobalWorkspaceLayer", spy)
    given = {name: f"{name} was given" for name in layer_arguments} | {"device": "meta", "dtype": torch.float64}
    AssociativeTransformer(depth=2, **{model_name[name]: value for name, value in given.items()})
    assert received == [given, given]


def test_without_attention_tokens_meet_in_the_memory_alone() -> None:
    model, (images,) = digits_model(attention=False, depth=1), inputs(digits_model())
    changed = images.clone()
    changed[:, :, :2, :2] += 1
    model.eval()
    assert torch.equal(model.forward_features(images)[:, 1:], model.forward_features(changed)[:, 1:])
    model.train()
    assert not torch.equal(model.forward_features(images)[:, 1:], model.forward_features(changed)[:, 1:])


def test_without_balance_loss_it_is_zero() -> None:
    for weight in (0.0, 1e-2):
        model = digits_model(balance_weight=weight)
        model(*inputs(model))
        assert bool(ait.balance_loss(model) > 0) == (weight > 0)


def test_memory_moves_in_training_and_stands_still_in_eval() -> None:
    model = digits_model()
    memories = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("gamma")}
    assert len(memories) == 3
    model.eval()(*inputs(model))
    assert all(torch.equal(model.state_dict()[name], before) for name, before in memories.items())
    model.train()(*inputs(model))
    assert not any(torch.equal(model.state_dict()[name], before) for name, before in memories.items())


def test_in_eval_replacing_an_images_neighbours_changes_no_bit_of_its_logits() -> None:
    model = digits_model().eval()
    (images,) = inputs(model)
    others = torch.cat([images[:1], torch.randn_like(images[1:])])
    assert torch.equal(model(images)[0], model(others)[0])


def test_torch_manual_seed_suffices_to_make_a_model_again() -> None:
    first, second = digits_model().state_dict(), digits_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_state_dict_round_trip_is_strict_and_bitwise_memories_included(options: dict) -> None:
    model = digits_model(**options)
    model(*inputs(model))
    torch.manual_seed(5)
    other = create_model("ait_tiny", **DIGITS, **options)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(*inputs(model)), other.eval()(*inputs(model)))


def test_runs_and_learns_under_bfloat16_autocast_with_a_float32_memory() -> None:
    model = digits_model(top_k=8, write_dropout=0.0)
    (images,) = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        loss = F.cross_entropy(logits, torch.arange(16) % 10)
    (loss + ait.balance_loss(model)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {value.dtype for name, value in model.state_dict().items() if name.endswith("gamma")} == {torch.float32}
    # Rounding to 2**-9 a product, on logits of order 1; selected tokens may differ, too.
    torch.testing.assert_close(logits.float(), digits_model(top_k=8, write_dropout=0.0)(images), rtol=0, atol=0.1)


@pytest.mark.slow
def test_a_training_step_compiled_as_one_graph_equals_the_eager_one() -> None:
    """Logits, balance loss, every gradient, and what the step leaves in the memories of two layers."""
    results = []
    for compiled in (False, True):
        model = digits_model(top_k=8, write_dropout=0.0, depth=2)
        forward = torch.compile(model, fullgraph=True) if compiled else model
        logits = forward(*inputs(model))
        balance = ait.balance_loss(forward)
        (F.cross_entropy(logits, torch.arange(16) % 10) + balance).backward()
        grads = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        results.append({"logits": logits, "balance loss": balance, **grads, **model.state_dict()})
    expected, actual = results
    for name, value in expected.items():
        assert_close(actual[name].detach(), value.detach(), name, dtype=torch.float32)
