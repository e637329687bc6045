"""hopfield_retrieve: values, gradients, energy, stopping, independence of tokens, determinism and abuse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import ait
from ait.ops import reference
from tests.ops import common
from tests.ops.common import DTYPES, LAYOUTS, THREADS, assert_same_bits, generator, needs_kernels, num_threads
from tests.tolerances import assert_close

NAMES = ("out", "steps_taken", "lse")

# (T tokens, M patterns, E width): odd sizes, whole and broken tiles and vectors, one of everything, more patterns than
# twice the width (no Gram matrix), and nothing.
SHAPES = [
    (100, 32, 64),
    (63, 33, 65),
    (7, 5, 3),
    (1, 1, 1),
    (50, 70, 17),
    (200, 17, 40),
    (0, 4, 8),
    (9, 4, 0),
]
# (steps, tol)
STEPS = [(1, 0.0), (3, 0.0), (6, 0.3)]


def sample_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, patterns_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    tokens, patterns, width = shape
    g = generator(tokens + patterns)
    state = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    p = torch.randn(patterns, width, generator=g, dtype=torch.float64)
    return state.to(dtype), p.to(patterns_dtype or dtype)


def inverse_temperature(width: int) -> float:
    """Weights neither uniform nor one-hot, and steps that do not magnify rounding."""
    return 0.5 / math.sqrt(max(width, 1))


def run_with_gradients(state: Tensor, patterns: Tensor, beta: float, steps: int, tol: float) -> dict[str, Tensor]:
    """Outputs and gradients of the operator, by name."""
    state, patterns = state.detach().requires_grad_(), patterns.detach().requires_grad_()
    outputs = ait.ops.hopfield_retrieve(state, patterns, beta, steps, tol)
    grad_out = torch.randn(state.shape, generator=generator(1), dtype=torch.float64).to(state.dtype)
    grads = torch.autograd.grad(outputs[0], (state, patterns), grad_out)
    return dict(zip((*NAMES, "grad_state", "grad_patterns"), (*outputs, *grads), strict=True))


def reference_with_gradients(state: Tensor, patterns: Tensor, beta: float, steps: int, tol: float) -> dict[str, Tensor]:
    """The same in float64, from the inputs as they are."""
    wide = state.detach().double(), patterns.detach().double()
    outputs = reference.hopfield_retrieve(*wide, beta, steps, tol)
    grad_out = torch.randn(state.shape, generator=generator(1), dtype=torch.float64).to(state.dtype).double()
    grads = reference.hopfield_retrieve_backward(grad_out, *wide, outputs[1], beta, steps)
    return dict(zip((*NAMES, "grad_state", "grad_patterns"), (*outputs, *grads), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps_tol", STEPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_match_the_reference(
    dtype: torch.dtype, steps_tol: tuple[int, float], shape: tuple[int, int, int]
) -> None:
    compute = reference.accumulate_dtype(dtype)
    for patterns_dtype in {torch.float32, dtype}:
        arguments = *sample_inputs(shape, dtype, patterns_dtype), inverse_temperature(shape[2]), *steps_tol
        actual, expected = run_with_gradients(*arguments), reference_with_gradients(*arguments)
        dtypes = (dtype, torch.int64, compute, dtype, patterns_dtype)
        for (name, value), expected_dtype in zip(actual.items(), dtypes, strict=True):
            assert value.dtype == expected_dtype
            if name == "steps_taken":
                assert torch.equal(value, expected[name])
            else:
                assert_close(value, expected[name], f"{name}, patterns {patterns_dtype}")


@needs_kernels  # library products depend on shapes and strides
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_memory_layout_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        inputs = sample_inputs(shape, dtype)
        expected = run_with_gradients(*inputs, 0.3, 3, 0.1)
        actual = run_with_gradients(*(LAYOUTS[layout](x) for x in inputs), 0.3, 3, 0.1)
        for name, value in actual.items():
            assert_same_bits(value, expected[name], f"{name}, {shape}")


@pytest.mark.parametrize("steps", [113, 114, 115, 300])
def test_gradients_pass_through_hundreds_of_steps(steps: int) -> None:
    # Between two opposite patterns, at the critical temperature, no step forgets its input exponentially fast; and so
    # many steps are not held at once, but computed again from checkpoints.
    direction = torch.randn(1, 6, generator=generator(0), dtype=torch.float64)
    patterns = torch.cat([direction, -direction])
    state = direction * torch.linspace(-0.4, 0.5, 60, dtype=torch.float64)[:, None]
    arguments = state, patterns, float(1 / direction.square().sum()), steps, 0.0
    actual, expected = run_with_gradients(*arguments), reference_with_gradients(*arguments)
    assert expected["grad_state"].abs().max() > 0.1
    for name in ("out", "grad_state", "grad_patterns"):
        assert_close(actual[name], expected[name], name)


def test_every_output_is_written() -> None:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        for shape in SHAPES:
            for steps, tol in STEPS:
                result = run_with_gradients(*sample_inputs(shape), inverse_temperature(shape[2]), steps, tol)
                for name, value in result.items():
                    assert not value.isnan().any(), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradcheck(steps: int) -> None:
    for shape in ((5, 4, 6), (4, 7, 2)):
        state, patterns = sample_inputs(shape, torch.float64)
        inputs = state.requires_grad_(), patterns.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, p: ait.ops.hopfield_retrieve(x, p, 0.7, steps)[0], inputs)


def test_gradcheck_through_the_steps_that_were_taken() -> None:
    state, patterns = sample_inputs((12, 5, 6), torch.float64)
    inputs = state.requires_grad_(), patterns.requires_grad_()
    _, steps_taken, _ = ait.ops.hopfield_retrieve(state, patterns, 1.2, 9, 0.05)
    assert steps_taken.unique().numel() > 2
    assert torch.autograd.gradcheck(lambda x, p: ait.ops.hopfield_retrieve(x, p, 1.2, 9, 0.05)[0], inputs)


def test_steps_taken_and_lse_are_not_differentiable() -> None:
    state, patterns = sample_inputs((5, 4, 6))
    out, steps_taken, lse = ait.ops.hopfield_retrieve(state.requires_grad_(), patterns.requires_grad_())
    assert out.requires_grad and not steps_taken.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        state, patterns = sample_inputs((9, 4, 8), dtype, torch.float32)
        args = state.requires_grad_(requires_grad), patterns.requires_grad_(requires_grad), 0.7, 3, 0.1
        torch.library.opcheck(torch.ops.ait.hopfield_retrieve.default, args)
    state, patterns = state.detach(), patterns.detach()
    out, steps_taken, _ = ait.ops.hopfield_retrieve(state, patterns, 0.7, 3, 0.1)
    backward = torch.ops.ait.hopfield_retrieve_backward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (out, state, patterns, steps_taken, 0.7, 3), test_utils=tests)


@pytest.mark.slow
def test_compiled_equals_eager_with_dynamic_sizes() -> None:
    def loss(state: Tensor, patterns: Tensor) -> tuple[Tensor, ...]:
        out, steps_taken, lse = ait.ops.hopfield_retrieve(state * 2, patterns, 0.3, 4, 0.2)
        return out, steps_taken, lse, out.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for tokens, patterns in ((40, 6), (57, 9), (5, 3)):
        results = []
        for function in (loss, compiled):
            inputs = [x.requires_grad_() for x in sample_inputs((tokens, patterns, 16))]
            outputs = function(*inputs)
            results.append((*outputs, *torch.autograd.grad(outputs[-1], inputs)))
        for eager, other in zip(*results, strict=True):
            assert_close(other, eager, dtype=torch.float32)


def test_one_step_is_attention_over_the_patterns() -> None:
    state, patterns = sample_inputs((50, 8, 24), torch.float64)
    out, steps_taken, lse = ait.ops.hopfield_retrieve(state, patterns, 0.9)
    expected = torch.nn.functional.scaled_dot_product_attention(state[None], patterns[None], patterns[None], scale=0.9)
    assert_close(out, expected[0])
    assert_close(lse, torch.logsumexp(0.9 * state @ patterns.T, -1))
    assert (steps_taken == 1).all()


def test_several_steps_equal_single_steps_in_a_row() -> None:
    state, patterns = sample_inputs((50, 8, 24), torch.float64)
    expected = state
    for steps in range(1, 12):
        expected, _, _ = ait.ops.hopfield_retrieve(expected, patterns, 0.4)
        out, steps_taken, _ = ait.ops.hopfield_retrieve(state, patterns, 0.4, steps)
        assert_close(out, expected, f"{steps} steps")
        assert (steps_taken == steps).all()


def test_a_token_stops_after_the_first_step_whose_change_is_below_tol() -> None:
    state, patterns = sample_inputs((200, 6, 24), torch.float64)
    for tol in (1e-2, 0.3, 1.0, 100.0):
        out, steps_taken, _ = ait.ops.hopfield_retrieve(state, patterns, 0.6, 20, tol)
        states = [state]
        for _ in range(20):
            states.append(ait.ops.hopfield_retrieve(states[-1], patterns, 0.6)[0])
        for t in range(200):
            changes = [float((b[t] - a[t]).norm()) for a, b in itertools.pairwise(states)]
            expected = next((i + 1 for i, change in enumerate(changes) if change < tol), 20)
            assert int(steps_taken[t]) == expected
            assert_close(out[t], states[expected][t])


def test_a_fixed_point_stops_at_once_and_zero_tol_never_stops() -> None:
    patterns = torch.eye(4, 8, dtype=torch.float64) * 50
    out, steps_taken, _ = ait.ops.hopfield_retrieve(patterns, patterns, 1.0, 5, 1e-9)
    assert (steps_taken == 1).all()
    assert_close(out, patterns)
    _, steps_taken, _ = ait.ops.hopfield_retrieve(patterns, patterns, 1.0, 5, 0.0)
    assert (steps_taken == 5).all()


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("beta", [0.05, 1.0, 8.0])
def test_energy_is_not_negative_and_never_rises_over_steps(beta: float, dtype: torch.dtype, slack: float) -> None:
    for shape in ((100, 32, 64), (50, 3, 5), (40, 90, 20)):
        state, patterns = sample_inputs(shape, dtype)
        previous = ait.ops.hopfield_energy(state, patterns, beta)
        assert (previous >= -slack * patterns.square().sum(-1).max()).all()
        # Energies are differences of larger terms: rounding is relative to those.
        largest_terms = state.square().sum(-1) + patterns.square().sum(-1).max()
        for steps in range(1, 9):
            out, _, _ = ait.ops.hopfield_retrieve(state, patterns, beta, steps)
            energy = ait.ops.hopfield_energy(out, patterns, beta)
            assert (energy <= previous + slack * largest_terms).all()
            previous = energy


def test_energy_equals_its_definition_and_is_differentiable_twice() -> None:
    state, patterns = sample_inputs((3, 4, 5), torch.float64)
    energy = ait.ops.hopfield_energy(state.reshape(1, 3, 5), patterns, 0.8)
    assert energy.shape == (1, 3)
    for t in range(3):
        xi, p = state[t].tolist(), patterns.tolist()
        logits = [0.8 * sum(a * b for a, b in zip(xi, row, strict=True)) for row in p]
        expected = -math.log(sum(math.exp(logit) for logit in logits)) / 0.8 + sum(a * a for a in xi) / 2
        expected += math.log(4) / 0.8 + max(sum(a * a for a in row) for row in p) / 2
        assert math.isclose(float(energy[0, t]), expected, rel_tol=1e-12)
    inputs = state.requires_grad_(), patterns.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, p: ait.ops.hopfield_energy(x, p, 0.8), inputs)


def test_the_update_is_the_energys_gradient_step() -> None:
    state, patterns = sample_inputs((20, 6, 9), torch.float64)
    state.requires_grad_()
    (gradient,) = torch.autograd.grad(ait.ops.hopfield_energy(state, patterns, 1.3).sum(), state)
    out, _, _ = ait.ops.hopfield_retrieve(state, patterns, 1.3)
    assert_close(out, state - gradient)


@needs_kernels  # library products depend on shapes and strides
@pytest.mark.parametrize(("steps", "tol"), STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype, steps: int, tol: float) -> None:
    for patterns, width in ((32, 64), (16, 40), (17, 33), (50, 9)):
        state, p = sample_inputs((1000, patterns, width), dtype, torch.float32)
        beta = inverse_temperature(width)
        together = ait.ops.hopfield_retrieve(state, p, beta, steps, tol)
        for tokens in (slice(0, 1), slice(611, 612), slice(500, 507), slice(3, 803)):
            part = ait.ops.hopfield_retrieve(state[tokens], p, beta, steps, tol)
            for name, a, b in zip(NAMES, part, together, strict=True):
                assert_same_bits(a, b[tokens], name)


@needs_kernels  # library products depend on shapes and strides
@pytest.mark.parametrize(("steps", "tol"), STEPS)
@pytest.mark.parametrize("shape", [(600, 32, 64), (333, 50, 9), (1500, 5, 130)], ids=str)
def test_same_bits_for_every_number_of_threads(shape: tuple, steps: int, tol: float) -> None:
    for dtype in (torch.float32, torch.float64):
        results = []
        for threads in THREADS:
            with num_threads(threads):
                inputs = sample_inputs(shape, dtype)
                results.append(run_with_gradients(*inputs, inverse_temperature(shape[2]), steps, tol))
        for other in results[1:]:
            for name, value in other.items():
                assert_same_bits(value, results[0][name], name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinite_token_touches_no_other(bad: float) -> None:
    for shape in ((100, 32, 20), (100, 33, 20), (100, 50, 20)):
        state, patterns = sample_inputs(shape)
        damaged = state.clone()
        damaged[41, 7] = bad
        others = torch.arange(100) != 41
        for steps, tol in STEPS:
            expected = ait.ops.hopfield_retrieve(state, patterns, 0.4, steps, tol)
            actual = ait.ops.hopfield_retrieve(damaged, patterns, 0.4, steps, tol)
            for name, a, e in zip(NAMES, actual, expected, strict=True):
                assert_same_bits(a[others], e[others], name)
            assert actual[0][41].isnan().all()
            assert int(actual[1][41]) == steps
        grads = []
        for x in (state, damaged):
            x = x.clone().requires_grad_()
            out, _, _ = ait.ops.hopfield_retrieve(x, patterns, 0.4, 3)
            grads.append(torch.autograd.grad(out.sum(), x)[0])
        assert_same_bits(grads[1][others], grads[0][others])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: type) -> None:
    state, patterns = sample_inputs((30, 8, 12))
    expected = ait.ops.hopfield_retrieve(state, patterns)
    with mode():
        outputs = ait.ops.hopfield_retrieve(state.requires_grad_(), patterns.requires_grad_())
    for name, a, b in zip(NAMES, outputs, expected, strict=True):
        assert not a.requires_grad
        assert_same_bits(a, b, name)


def test_double_backward_is_an_error() -> None:
    state, patterns = sample_inputs((5, 4, 6), torch.float64)
    state.requires_grad_()
    out, _, _ = ait.ops.hopfield_retrieve(state, patterns)
    (grad,) = torch.autograd.grad(out.square().sum(), state, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("patterns", [1, 5, 16, 32, 33])
def test_nan_and_infinite_logits_are_treated_as_by_softmax_and_logsumexp(patterns: int) -> None:
    # Width 1 and positive patterns: the logits have the sign of the state.
    p = torch.linspace(1, 2, patterns)[:, None]
    # Three times: whole vectors of tokens, and some more.
    state = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 3e38]).repeat(3)[:, None]
    for dtype in (torch.float32, torch.float64):
        actual = ait.ops.hopfield_retrieve(state.to(dtype), p.to(dtype))
        expected = reference.hopfield_retrieve(state.to(dtype), p.to(dtype), 1.0, 1, 0.0)
        for name, a, e in zip(NAMES, actual, expected, strict=True):
            assert_close(a, e, name, dtype)
    signs = torch.tensor([1.0, -1.0])[torch.arange(patterns) % 2][:, None] * p
    actual, expected = (f(state, signs, 1.0, 1, 0.0) for f in (ait.ops.hopfield_retrieve, reference.hopfield_retrieve))
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, name, torch.float32)


def test_equal_patterns_share_the_weights() -> None:
    patterns = torch.ones(7, 9) * 0.5
    out, _, lse = ait.ops.hopfield_retrieve(torch.randn(5, 9, generator=generator(0)), patterns, steps=3)
    assert_close(out, torch.full_like(out, 0.5))
    assert lse.isfinite().all()


def test_huge_inverse_temperature_picks_the_nearest_pattern() -> None:
    state, patterns = sample_inputs((40, 6, 8))
    out, _, _ = ait.ops.hopfield_retrieve(state, patterns, 1e6)
    assert_close(out, patterns[(state @ patterns.T).argmax(-1)])


@pytest.mark.parametrize(
    "changes",
    [
        {"state": torch.zeros(8)},
        {"state": torch.zeros(5, 8, 1)},
        {"state": torch.zeros(5, 7)},
        {"state": torch.zeros(5, 8, dtype=torch.int64)},
        {"state": torch.zeros(5, 8, dtype=torch.complex64)},
        {"patterns": torch.zeros(8)},
        {"patterns": torch.zeros(0, 8)},
        {"patterns": torch.zeros(3, 9)},
        {"patterns": torch.zeros(3, 8, dtype=torch.float64)},
        {"patterns": torch.zeros(3, 8, dtype=torch.bool)},
        {"beta": 0.0},
        {"beta": -1.0},
        {"beta": math.inf},
        {"beta": math.nan},
        {"steps": 0},
        {"steps": -(2**62)},
        {"steps": 10_001},
        {"steps": 2**62},
        {"tol": -1e-9},
        {"tol": math.inf},
        {"tol": math.nan},
    ],
    ids=str,
)
def test_wrong_arguments_are_errors(changes: dict) -> None:
    state, patterns = sample_inputs((5, 3, 8))
    args = {"state": state, "patterns": patterns, "beta": 1.0, "steps": 1, "tol": 0.0, **changes}
    with pytest.raises(ValueError, match="hopfield_retrieve: expected"):
        ait.ops.hopfield_retrieve(**args)
    if ait.ops._library.is_pure_python():
        return
    with pytest.raises(RuntimeError, match="hopfield_retrieve: expected"):
        torch.ops.ait.hopfield_retrieve(**args)
    if "tol" not in changes:
        tokens = args["state"].shape[0]
        saved = torch.zeros_like(args["state"]), args["state"], args["patterns"], torch.ones(tokens, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="hopfield_retrieve: expected"):
            torch.ops.ait.hopfield_retrieve_backward(*saved, args["beta"], args["steps"])


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {"grad_out": torch.zeros(5, 7)},
        {"grad_out": torch.zeros(5)},
        {"grad_out": torch.zeros(5, 8, dtype=torch.float64)},
        {"steps_taken": torch.ones(4, dtype=torch.int64)},
        {"steps_taken": torch.ones(5, dtype=torch.int32)},
        {"steps_taken": torch.ones(5, 1, dtype=torch.int64)},
        {"steps_taken": torch.tensor([1, 1, 0, 1, 1])},
        {"steps_taken": torch.tensor([1, 1, 4, 1, 1])},
        {"steps_taken": torch.tensor([1, 1, -(2**63), 2**62, 1])},
    ],
    ids=str,
)
def test_backward_checks_what_was_saved(changes: dict[str, Tensor]) -> None:
    state, patterns = sample_inputs((5, 3, 8))
    args = {"grad_out": state, "steps_taken": torch.ones(5, dtype=torch.int64), **changes}
    with pytest.raises(RuntimeError, match="hopfield_retrieve: expected"):
        torch.ops.ait.hopfield_retrieve_backward(
            args["grad_out"], state, patterns, args["steps_taken"], beta=1.0, steps=3
        )


def test_most_steps_run_and_differentiate() -> None:
    state, patterns = sample_inputs((3, 4, 5), torch.float64)
    result = run_with_gradients(state, patterns, 0.5, 10_000, 0.0)
    assert all(value.isfinite().all() for value in result.values())
    assert (result["steps_taken"] == 10_000).all()


def test_many_patterns() -> None:
    for patterns, width in ((3000, 3), (1000, 520)):
        state, p = sample_inputs((20, patterns, width))
        arguments = state, p, inverse_temperature(width), 2, 0.0
        actual, expected = run_with_gradients(*arguments), reference_with_gradients(*arguments)
        for name in ("out", "lse", "grad_state", "grad_patterns"):
            assert_close(actual[name], expected[name], name)


@needs_kernels  # library products depend on shapes and strides
def test_expanded_inputs_are_fine() -> None:
    state, patterns = sample_inputs((5, 3, 8))
    views = state[:1].expand(5, 8), patterns[:1].expand(3, 8)
    actual = run_with_gradients(*views, 1.0, 2, 0.0)
    expected = run_with_gradients(*(x.contiguous() for x in views), 1.0, 2, 0.0)
    for name, value in actual.items():
        assert_same_bits(value, expected[name], name)
    state.requires_grad_()
    ait.ops.hopfield_retrieve(state, patterns)[0].sum().backward()  # the incoming gradient is an expanded scalar
    assert state.grad is not None and state.grad.isfinite().all()


@needs_kernels
def test_tensors_without_dense_memory_are_errors_or_meta_results() -> None:
    state, patterns = sample_inputs((5, 3, 8))
    result = torch.ops.ait.hopfield_retrieve(state.to("meta"), patterns.to("meta"), 1.0, 1, 0.0)
    assert [x.device.type for x in result] == ["meta"] * 3
    with pytest.raises(RuntimeError):
        torch.ops.ait.hopfield_retrieve(state.to_sparse(), patterns, 1.0, 1, 0.0)
    # The reference operator takes over, and plain PyTorch can multiply by a sparse matrix.
    out = torch.ops.ait.hopfield_retrieve(state, patterns.to_sparse(), 1.0, 1, 0.0)[0]
    torch.testing.assert_close(out, torch.ops.ait.hopfield_retrieve(state, patterns, 1.0, 1, 0.0)[0])


@needs_kernels
def test_the_expected_instruction_set_runs() -> None:
    common.assert_expected_instruction_set()


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("capability", common.lesser_capabilities())
def test_core_checks_pass_at_every_instruction_set(capability: str) -> None:
    common.run_tests_at_capability(
        ["tests/ops/test_hopfield_retrieve.py"],
        capability,
        "match_the_reference or infinite or alone",
    )
