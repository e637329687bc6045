"""The layer against its equations, evaluated directly; its promises about batches, masks, dtypes and bad input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ait
from tests.nn.direct import direct_layer
from tests.tolerances import RELATIVE, assert_close

SIZES: dict[str, Any] = dict(num_slots=5, slot_dim=8, num_heads=3)


def make_layer(dim: int = 16, seed: int = 0, **arguments: Any) -> ait.GlobalWorkspaceLayer:
    """A small layer whose every weight is random, LayerNorms and biases included."""
    torch.manual_seed(seed)
    arguments = {**SIZES, "write_dropout": 0.0, "top_k": 4, **arguments}
    layer = ait.GlobalWorkspaceLayer(dim, generator=torch.Generator().manual_seed(seed), **arguments)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return layer


def direct(layer: ait.GlobalWorkspaceLayer, x: Tensor, **arguments: Any):
    weights = dict(layer.named_parameters()) | {"workspace.memory.gamma": layer.workspace.memory.gamma.clone()}
    arguments = {"num_heads": 3, "k": 4, **arguments}
    return direct_layer(weights, x, **arguments)


def gradients(layer: nn.Module, loss: Tensor, x: Tensor) -> dict[str, Tensor]:
    trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    return dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))


def weigh(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


EQUATION_CASES = {
    "published": (dict(), dict()),
    "one token a row": (dict(top_k=1), dict(k=1)),
    "default ratio": (dict(top_k=None), dict(k=1)),
    "ratio": (dict(top_k=None, top_k_ratio=0.3), dict(k=9)),
    "no bottleneck": (dict(top_k=None, top_k_ratio=1.0), dict(k=28)),
    "k beyond all tokens": (dict(top_k=1000), dict(k=1000)),
    "three steps": (dict(steps=3, beta=0.7), dict(steps=3, beta=0.7)),
    "fast memory": (dict(alpha=1.0, balance_weight=0.5), dict(alpha=1.0, sigma=0.5)),
    "many slots, so projected keys": (dict(num_slots=21), dict()),
    "dropout": (dict(write_dropout=0.5), dict(dropout=0.5)),
}


@pytest.mark.parametrize("case", EQUATION_CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_two_training_steps_equal_the_equations_with_every_gradient(case: str, masked: bool) -> None:
    layer_arguments, direct_arguments = EQUATION_CASES[case]
    layer = make_layer(dtype=torch.float64, **layer_arguments)
    for step in range(2):
        x = torch.randn(4, 7, 16, dtype=torch.float64, requires_grad=True)
        mask = torch.rand(4, 7) < 0.3 if masked else None
        if masked and "k" in direct_arguments and direct_arguments["k"] == 9:
            assert mask is not None and 0 < mask.sum() < 19, "the ratio counts masked tokens, too"
        torch.manual_seed(step)
        expected = direct(layer, x, mask=mask, **direct_arguments)
        expected_gradients = gradients(layer, weigh(expected.output) + 10 * expected.balance_loss, x)
        torch.manual_seed(step)
        output, loss = layer(x, mask, return_aux=True)
        assert_close(output, expected.output, "output")
        assert_close(loss, expected.balance_loss, "balance loss")
        assert_close(layer.workspace.memory.gamma, expected.memory, "memory")
        for name, gradient in gradients(layer, weigh(output) + 10 * loss, x).items():
            assert_close(gradient, expected_gradients[name], f"step {step}, gradient of {name}")


def test_eval_equals_the_equations_without_the_write_and_leaves_the_memory_alone() -> None:
    layer = make_layer(dtype=torch.float64).eval()
    before = layer.workspace.memory.gamma.clone()
    x = torch.randn(4, 7, 16, dtype=torch.float64)
    output, loss = layer(x, return_aux=True)
    assert_close(output, direct(layer, x, writes=False).output, "output")
    assert loss == 0
    assert torch.equal(layer.workspace.memory.gamma, before)


def test_float32_layer_equals_the_equations_in_float64() -> None:
    layer = make_layer()
    x = torch.randn(4, 7, 16)
    expected = direct(copy.deepcopy(layer).double(), x.double())
    output, loss = layer(x, return_aux=True)
    assert_close(output, expected.output, "output", dtype=torch.float32)
    assert_close(loss, expected.balance_loss, "balance loss", dtype=torch.float32)
    assert_close(layer.workspace.memory.gamma, expected.memory, "memory", dtype=torch.float32)


def test_memory_is_normalized_when_read() -> None:
    layer, scaled = make_layer(dtype=torch.float64), make_layer(dtype=torch.float64)
    with torch.no_grad():
        scaled.workspace.memory.gamma.mul_(torch.rand(5, 1, dtype=torch.float64) + 0.5)
    x = torch.randn(4, 7, 16, dtype=torch.float64)
    for mode in (False, True):
        assert_close(scaled.train(mode)(x), layer.train(mode)(x), "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absorbed_and_projected_selection_agree(dtype: torch.dtype) -> None:
    absorbed, projected = make_layer(dtype=dtype), make_layer(dtype=dtype)
    assert absorbed.workspace.writer is not None and projected.workspace.writer is not None
    assert not absorbed.workspace.writer.selects_on_keys
    projected.workspace.writer.selects_on_keys = True
    x, mask = torch.randn(6, 7, 16, dtype=dtype), torch.rand(6, 7) < 0.2
    for _ in range(2):
        outputs = [layer(x, mask, return_aux=True) for layer in (absorbed, projected)]
        assert_close(outputs[1][0], outputs[0][0], "output")
        assert_close(outputs[1][1], outputs[0][1], "balance loss")


def test_the_cheaper_selection_is_picked() -> None:
    def picks_keys(**arguments: Any) -> bool:
        writer = ait.GlobalWorkspaceLayer(768, device="meta", **arguments).workspace.writer
        assert writer is not None
        return writer.selects_on_keys

    assert not picks_keys(num_slots=32, slot_dim=32)
    assert picks_keys(num_slots=128, slot_dim=32)


def test_absorbed_selection_holds_no_keys_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    seen: list[tuple[int, ...]] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: seen.append((out := linear(*a)).shape) or out)
    layer.workspace(torch.randn(9, 16))
    assert seen and all(9 not in shape for shape in seen)


@pytest.mark.parametrize("top_k", [2, 50])
def test_masked_tokens_write_as_if_they_were_not_there_and_are_still_read(top_k: int) -> None:
    masked, dropped = (make_layer(dtype=torch.float64, top_k=top_k, num_heads=2) for _ in range(2))
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 4:] = True
    output, loss = masked(x, mask, return_aux=True)
    expected, expected_loss = dropped(x[:, :4], return_aux=True)
    assert_close(output[:, :4], expected, "output")
    assert_close(loss, expected_loss, "balance loss")
    assert_close(masked.workspace.memory.gamma, dropped.workspace.memory.gamma, "memory")
    masked.eval()
    assert torch.equal(masked(x, mask), masked(x)), "without a write, the mask changes nothing"


@pytest.mark.parametrize("top_k", [2, 50])
def test_garbage_in_masked_tokens_reaches_neither_memory_nor_loss(top_k: int) -> None:
    layer = make_layer(top_k=top_k)
    x, mask = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 2:] = True
    x = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    output, loss = layer(x, mask, return_aux=True)
    assert torch.isfinite(loss) and torch.isfinite(layer.workspace.memory.gamma).all()
    assert torch.isfinite(output[~mask]).all()
    assert layer.workspace.memory.skipped_updates == 0


@pytest.mark.parametrize("top_k", [2, 50])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_a_batch_without_an_unmasked_token_writes_nothing(top_k: int, semantics: str) -> None:
    layer = make_layer(top_k=top_k, semantics=semantics)
    before = layer.workspace.memory.gamma.clone()
    x = torch.randn(3, 6, 16, requires_grad=True)
    output, loss = layer(x, torch.ones(3, 6, dtype=torch.bool), return_aux=True)
    (weigh(output) + loss).backward()
    assert loss == 0
    assert torch.equal(layer.workspace.memory.gamma, before)
    assert layer.workspace.memory.skipped_updates == 0
    assert torch.equal(output, layer.eval()(x)) or semantics == "released"
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", [(0, 7, 16), (3, 0, 16), (1, 1, 16), (5, 16), (2, 3, 4, 16), (2, 2, 3, 2, 16)])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_any_middle_dimensions_and_empty_batches(shape: tuple[int, ...], semantics: str) -> None:
    layer, flat = (make_layer(semantics=semantics) for _ in range(2))
    before = layer.workspace.memory.gamma.clone()
    x = torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    output = layer(x, mask)
    assert output.shape == shape
    (weigh(output) + ait.balance_loss(layer)).backward()
    if x.numel():
        assert torch.equal(output.flatten(0, -2), flat(x.flatten(0, -2), mask.flatten()))
        assert torch.isfinite(ait.balance_loss(flat))
    else:
        assert torch.equal(layer.workspace.memory.gamma, before)


def test_strided_input_gives_the_same_bits() -> None:
    layer, strided = (make_layer() for _ in range(2))
    x = torch.randn(7, 4, 16).transpose(0, 1)
    assert torch.equal(strided(x), layer(x.contiguous()))


@pytest.mark.parametrize("reader", ["hopfield", "attention"])
@pytest.mark.parametrize("memory", ["ewma", "learned", "fixed"])
def test_in_eval_an_image_does_not_depend_on_its_neighbours(memory: str, reader: str) -> None:
    layer = make_layer(memory=memory, reader=reader)
    layer(torch.randn(4, 7, 16))
    layer.eval()
    x, other = torch.randn(4, 7, 16), torch.randn(4, 7, 16)
    other[2] = x[2]
    assert torch.equal(layer(x)[2], layer(other)[2])
    assert_close(layer(x)[:2], layer(x[:2]), "another batch size")


def test_in_training_images_share_the_memory() -> None:
    first, second = (make_layer() for _ in range(2))
    x = torch.randn(4, 7, 16)
    other = x.clone()
    other[0] = torch.randn(7, 16)
    assert not torch.equal(first(x)[2], second(other)[2])


@pytest.mark.parametrize(
    "ratio, num_tokens, k",
    [
        (1 / 64, 32768, 512),
        (1 / 64, 6400, 100),
        (1 / 64, 65, 2),
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.07, 100, 7),
        (0.7, 10, 7),
        (1e-12, 5, 1),
        (1.0, 9, 9),
    ],
)
def test_capacity_is_the_ratio_rounded_up_without_rounding_errors(ratio: float, num_tokens: int, k: int) -> None:
    assert make_layer(top_k=None, top_k_ratio=ratio).workspace.capacity(num_tokens) == k


@pytest.mark.parametrize("reader", ["hopfield", "attention"])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
@pytest.mark.parametrize("memory", ["ewma", "learned", "fixed"])
def test_every_trainable_parameter_gets_a_gradient(memory: str, semantics: str, reader: str) -> None:
    layer = make_layer(memory=memory, semantics=semantics, reader=reader, write_dropout=0.1)
    weigh(layer(torch.randn(4, 7, 16))).add(ait.balance_loss(layer)).backward()
    missing = [n for n, p in layer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing
    frozen = {n for n, p in layer.named_parameters() if not p.requires_grad}
    without = {f"workspace.writer.{n}" for n in ("value.weight", "out.weight", "norm.weight", "norm.bias")}
    assert frozen == (without if memory == "ewma" and semantics == "released" else set())
    assert any(n.startswith("workspace.writer") for n, _ in layer.named_parameters()) == (memory == "ewma")
    assert ("workspace.memory.gamma" in dict(layer.named_parameters())) == (memory == "learned")


def test_released_writer_learns_nothing_without_a_balance_loss() -> None:
    layer = make_layer(semantics="released", balance_weight=0.0)
    assert not any(p.requires_grad for p in layer.workspace.writer.parameters())
    weigh(layer(torch.randn(4, 7, 16))).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reader", ["hopfield", "attention"])
def test_half_precision_module_keeps_the_memory_in_float32(dtype: torch.dtype, reader: str) -> None:
    # All tokens are let in: a rounded token may change the choice of a few.
    layer = make_layer(reader=reader, top_k=1000)
    reference = copy.deepcopy(layer)
    layer = layer.to(dtype)
    reference.load_state_dict(layer.state_dict())  # the rounded weights
    x = torch.randn(4, 7, 16).to(dtype).requires_grad_()
    output = layer(x)
    (weigh(output).float() + ait.balance_loss(layer)).backward()
    assert output.dtype == dtype and layer.workspace.memory.gamma.dtype == torch.float32
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())
    torch.testing.assert_close(output.float(), reference(x.float()), rtol=0, atol=20 * RELATIVE[dtype][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("semantics", ["differentiable", "released"])
def test_autocast_runs_the_memory_in_float32(dtype: torch.dtype, semantics: str) -> None:
    layer = make_layer(semantics=semantics)
    x = torch.randn(4, 7, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        output, loss = layer(x, return_aux=True)
        layer(x.to(dtype))
    assert layer.workspace.memory.gamma.dtype == loss.dtype == torch.float32
    norms = torch.linalg.vector_norm(layer.workspace.memory.gamma, dim=-1)
    assert_close(norms, torch.ones(5), "norms: 1e-3 if bfloat16 had a hand in it")
    (weigh(output).float() + loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


def test_workspace_alone_takes_tokens_of_another_floating_dtype() -> None:
    workspace = make_layer().workspace
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert workspace(torch.randn(4, 7, 16, dtype=dtype)).dtype == dtype
    assert workspace.bfloat16()(torch.randn(4, 7, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_selection_dtype_changes_the_choice_alone() -> None:
    exact, coarse = (make_layer(dim=64, selection_dtype=d, top_k=64) for d in (None, torch.bfloat16))
    x = torch.randn(64, 16, 64)
    assert not torch.equal(exact(x), coarse(x)), "one kept token in a few hundred differs"
    same, coarse = (make_layer(dim=64, selection_dtype=d, top_k=2000) for d in (None, torch.bfloat16))
    assert torch.equal(same(x), coarse(x)), "nothing is chosen where all are taken"


def test_meta_device_gives_shapes() -> None:
    layer = make_layer(device="meta")
    assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)


def test_deepcopy_and_pickle_after_a_training_pass() -> None:
    layer = make_layer()
    x = torch.randn(4, 7, 16)
    layer(x)
    assert ait.balance_loss(layer).requires_grad
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="balance_loss: expected a forward pass"):
            ait.balance_loss(twin)
        original = copy.deepcopy(layer)
        assert torch.equal(twin(x), original(x))
        assert torch.equal(twin.workspace.memory.gamma, original.workspace.memory.gamma)


def test_no_grad_and_inference_mode_give_the_same_bits() -> None:
    outputs, memories = [], []
    x = torch.randn(4, 7, 16)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        layer = make_layer()
        with mode():
            outputs.append(layer(x).clone())
            outputs[-1] = layer(x)
        memories.append(layer.workspace.memory.gamma.clone())
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert torch.equal(memories[0], memories[1]) and torch.equal(memories[0], memories[2])


def test_training_is_deterministic_bit_for_bit() -> None:
    def train() -> list[Tensor]:
        layer = make_layer(write_dropout=0.1)
        torch.manual_seed(5)
        for _ in range(2):
            weigh(layer(torch.randn(8, 7, 16))).add(ait.balance_loss(layer)).backward()
        return [p.grad for p in layer.parameters()] + [layer.workspace.memory.gamma]

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))


def test_representation_names_what_was_asked_for() -> None:
    text = repr(make_layer(top_k=None, top_k_ratio=0.25, semantics="released", steps=3))
    for part in ("top_k_ratio=0.25", "semantics='released'", "steps=3", "5 slots of width 8", "'ewma'", "free rows"):
        assert part in text
    assert "top_k=4" in repr(make_layer()) and "reader): AttentionReader" in repr(make_layer(reader="attention"))


BAD_ARGUMENTS = [
    (dict(dim=0), "dim >= 1"),
    (dict(dim=16.0), "dim to be an integer"),
    (dict(dim=True), "dim to be an integer"),
    (dict(hidden_dim=0), "hidden_dim >= 1"),
    (dict(num_slots=0), "num_slots >= 1"),
    (dict(num_slots=True), "num_slots to be an integer"),
    (dict(slot_dim=-1), "slot_dim >= 1"),
    (dict(num_heads="8"), "num_heads to be an integer"),
    (dict(top_k=0), "top_k >= 1"),
    (dict(top_k=-3), "top_k >= 1"),
    (dict(top_k=1.5), "top_k to be an integer"),
    (dict(top_k=True), "top_k to be an integer"),
    (dict(top_k=4, top_k_ratio=0.5), "top_k or top_k_ratio, not both"),
    *[(dict(top_k_ratio=v), "top_k_ratio to be a finite number in (0, 1]") for v in (0, -0.1, 1.01, np.nan, "1", True)],
    (dict(memory="ema"), "memory to be one of 'ewma', 'learned', 'fixed'"),
    (dict(memory=None), "memory to be one of"),
    (dict(semantics="paper"), "semantics to be one of 'differentiable', 'released'"),
    (dict(reader="hop"), "reader to be one of 'hopfield', 'attention'"),
    *[(dict(alpha=v), "alpha to be a finite number in (0, 1]") for v in (0.0, 1.5, np.nan, None, True, 10**400)],
    *[(dict(beta=v), "beta to be a finite number in (0, inf)") for v in (0.0, -1, np.inf, np.nan)],
    *[(dict(beta=v), "beta to be a finite number in (0, inf) as torch.float32") for v in (1e300, 1e-300)],
    *[(dict(dtype=v), "dtype float32") for v in (torch.complex64, torch.int64, torch.float8_e4m3fn, "float32")],
    (dict(steps=0), "steps >= 1"),
    (dict(steps=10_001), "steps of at most 10000"),
    (dict(steps=2.0), "steps to be an integer"),
    *[(dict(tol=v), "tol to be a finite number in [0, inf)") for v in (-1e-3, np.inf, np.nan)],
    *[(dict(balance_weight=v), "balance_weight to be a finite number in [0, inf)") for v in (-1, np.nan, np.inf)],
    *[(dict(write_dropout=v), "write_dropout to be a finite number in [0, 1)") for v in (-0.1, 1.0, np.nan)],
    (dict(selection_dtype=torch.int8), "selection_dtype None, float32, bfloat16 or float16"),
    (dict(selection_dtype="bfloat16"), "selection_dtype None, float32, bfloat16 or float16"),
    (dict(generator=0), "generator to be a torch.Generator or None"),
]


@pytest.mark.parametrize("arguments, expected", BAD_ARGUMENTS, ids=lambda value: str(value)[:60])
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=r"GlobalWorkspace.*: expected ") as error:
        ait.GlobalWorkspaceLayer(**{"dim": 16, **arguments})
    assert expected in str(error.value) and "got" in str(error.value)


def test_numpy_numbers_are_welcome() -> None:
    layer = ait.GlobalWorkspaceLayer(16, **SIZES, top_k_ratio=np.float32(0.5), alpha=np.float64(0.2), beta=2)
    assert type(layer.workspace.alpha) is float and type(layer.workspace.top_k_ratio) is float
    layer = ait.GlobalWorkspaceLayer(np.int64(16), top_k=np.int64(4), num_slots=np.int32(5), steps=np.uint8(2))
    assert type(layer.workspace.top_k) is int
    layer(torch.randn(3, 5, 16)).sum().backward()


def test_a_double_layer_takes_a_beta_that_float32_cannot_hold() -> None:
    assert ait.GlobalWorkspaceLayer(16, beta=1e300, dtype=torch.float64).workspace.reader.beta == 1e300


def test_everything_after_dim_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        ait.GlobalWorkspaceLayer(16, 64)  # type: ignore[misc]


BAD_INPUTS = {
    "width": (torch.zeros(4, 7, 12), None, r"expected input of shape (B, *, 16), got (4, 7, 12)"),
    "rank": (torch.zeros(16), None, r"expected input of shape (B, *, 16), got (16,)"),
    "no tensor": ([[0.0] * 16], None, r"expected input to be a tensor of shape (B, *, 16), got list"),
    "integers": (
        torch.zeros(4, 7, 16, dtype=torch.int64),
        None,
        "expected input of dtype torch.float32, got torch.int64",
    ),
    "dtype": (torch.zeros(4, 7, 16).double(), None, "expected input of dtype torch.float32, got torch.float64"),
    "complex": (torch.zeros(4, 7, 16, dtype=torch.complex64), None, "expected input of dtype torch.float32"),
    "device": (torch.zeros(4, 7, 16, device="meta"), None, "expected input on the layer's device, cpu, got meta"),
    "mask shape": (torch.zeros(4, 7, 16), torch.zeros(4, dtype=torch.bool), "key_padding_mask of shape (4, 7)"),
    "mask dtype": (torch.zeros(4, 7, 16), torch.zeros(4, 7), "key_padding_mask of dtype torch.bool (True = ignore)"),
    "mask no tensor": (torch.zeros(4, 7, 16), [[False] * 7] * 4, "key_padding_mask of shape (4, 7), one entry a token"),
    "mask device": (torch.zeros(4, 7, 16), torch.zeros(4, 7, dtype=torch.bool, device="meta"), "on the device of the"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("alone", [False, True], ids=["layer", "workspace"])
def test_a_bad_input_is_named_and_changes_nothing(case: str, alone: bool) -> None:
    x, mask, expected = BAD_INPUTS[case]
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError) as error:
        (layer.workspace if alone else layer)(x, mask)
    message = str(error.value)
    name = "GlobalWorkspace:" if alone else "GlobalWorkspaceLayer:"
    expected = expected.replace("dtype torch.float32", "dtype torch.float32 or ") if alone else expected
    assert message.startswith(name) and expected.split(" or ,")[0].split(" or  ")[0] in message
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_autocast_refuses_float64_with_a_float32_layer() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="input of dtype"):
        make_layer()(torch.zeros(4, 7, 16, dtype=torch.float64))
