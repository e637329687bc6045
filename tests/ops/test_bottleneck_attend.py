"""bottleneck_attend: values, gradients, special values, determinism and abuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ait
from ait.ops import reference
from tests.ops import common
from tests.ops.common import DTYPES, LAYOUTS, THREADS, assert_same_bits, generator, needs_kernels, num_threads
from tests.tolerances import assert_close

NAMES = ("pooled", "gates", "lse")

# (R rows, k entries, T tokens, E width): odd sizes, whole and broken vectors and blocks, one of everything, long
# lists of few rows (cut into parts), more tokens than rows visit at a time, tokens so wide that few are taken
# together, and nothing of each.
SHAPES = [
    (3, 5, 20, 7),
    (16, 33, 100, 64),
    (5, 63, 63, 100),
    (1, 1, 1, 1),
    (2, 1500, 2000, 19),
    (7, 90, 3000, 150),
    (4, 50, 120, 900),
    (0, 4, 9, 8),
    (3, 0, 9, 8),
    (3, 4, 0, 8),
    (3, 4, 9, 0),
]


def random_lists(rows: int, k: int, tokens: int, seed: int = 0) -> Tensor:
    """Ascending lists of random lengths, -1 behind them; the first one full, the last one empty."""
    g = generator(seed)
    lists = torch.full((rows, k), -1)
    for row in range(rows):
        most = min(k, tokens)
        length = most if row == 0 else int(torch.randint(0, most + 1, (1,), generator=g))
        if row == rows - 1 and rows > 1:
            length = 0
        lists[row, :length] = torch.randperm(tokens, generator=g)[:length].sort().values
    return lists


def sample_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, query_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, k, tokens, width = shape
    g = generator(rows + k)
    query = torch.randn(rows, width, generator=g, dtype=torch.float64) / max(1.0, math.sqrt(width) / 2)
    values = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    return query.to(query_dtype or dtype), values.to(dtype), random_lists(rows, k, tokens)


def gradients_like(outputs: tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    g = generator(seed)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]


def run_with_gradients(query: Tensor, tokens: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of the operator, by name."""
    query, tokens = query.detach().requires_grad_(), tokens.detach().requires_grad_()
    outputs = ait.ops.bottleneck_attend(query, tokens, indices)
    grads = torch.autograd.grad(outputs, (query, tokens), gradients_like(outputs))
    return dict(zip((*NAMES, "grad_query", "grad_tokens"), (*outputs, *grads), strict=True))


def reference_with_gradients(query: Tensor, tokens: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """The same in float64, from the inputs as they are."""
    wide = query.double(), tokens.double(), indices
    outputs = reference.bottleneck_attend(*wide)
    incoming = gradients_like(reference.bottleneck_attend(query, tokens, indices))
    grads = reference.bottleneck_attend_backward(*[g.double() for g in incoming], *wide, *outputs[:2])
    return dict(zip((*NAMES, "grad_query", "grad_tokens"), (*outputs, *grads), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_match_the_reference(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    compute = reference.accumulate_dtype(dtype)
    for query_dtype in {torch.float32, dtype}:
        inputs = sample_inputs(shape, dtype, query_dtype)
        actual, expected = run_with_gradients(*inputs), reference_with_gradients(*inputs)
        for name, value in actual.items():
            assert value.dtype == {"grad_query": query_dtype, "grad_tokens": dtype}.get(name, compute)
            assert_close(value, expected[name], f"{name}, query {query_dtype}")


@needs_kernels  # library products depend on shapes and strides
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_memory_layout_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        inputs = sample_inputs(shape, dtype)
        expected = run_with_gradients(*inputs)
        actual = run_with_gradients(*(LAYOUTS[layout](x) for x in inputs))
        for name, value in actual.items():
            assert_same_bits(value, expected[name], f"{name}, {shape}")


def test_many_rows_may_list_the_same_tokens() -> None:
    # More entries for a range of tokens than a thread's scratch memory holds at once.
    query, tokens, _ = sample_inputs((4000, 1, 70, 9), torch.float64)
    indices = torch.arange(64) + torch.arange(4000)[:, None] % 40
    indices[indices >= 64] = -1
    actual, expected = (run(query, tokens, indices) for run in (run_with_gradients, reference_with_gradients))
    for name, value in actual.items():
        assert_close(value, expected[name], name)


def test_every_output_is_written_even_where_nothing_is_listed() -> None:
    query, tokens, _ = sample_inputs((4, 6, 50, 24))
    indices = torch.full((4, 6), -1)
    indices[0, :2] = torch.tensor([3, 40])
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        result = run_with_gradients(query, tokens, indices)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in result.items():
        assert not value.isnan().any(), name
    unlisted = torch.ones(50, dtype=torch.bool)
    unlisted[[3, 40]] = False
    assert (result["grad_tokens"][unlisted] == 0).all()


def test_gradcheck() -> None:
    query, tokens, indices = sample_inputs((4, 7, 11, 5), torch.float64)
    query.requires_grad_(), tokens.requires_grad_()

    def finite_outputs(query: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        pooled, gates, lse = ait.ops.bottleneck_attend(query, tokens, indices)
        return pooled, gates, lse[indices[:, 0] >= 0]

    assert torch.autograd.gradcheck(finite_outputs, (query, tokens))


@pytest.mark.parametrize("which", range(3), ids=NAMES)
def test_gradient_of_each_output_alone(which: int) -> None:
    query, tokens, indices = sample_inputs((4, 9, 30, 17), torch.float64)
    inputs = query.requires_grad_(), tokens.requires_grad_()
    outputs = ait.ops.bottleneck_attend(*inputs, indices)
    incoming = gradients_like(outputs)[which]
    grads: list[Tensor | None] = [None, None, None]
    grads[which] = incoming
    actual = torch.autograd.grad(outputs[which], inputs, incoming)
    expected = reference.bottleneck_attend_backward(*grads, query.detach(), tokens.detach(), indices, *outputs[:2])
    for name, a, e in zip(("grad_query", "grad_tokens"), actual, expected, strict=True):
        assert_close(a, e.detach(), name)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        query, tokens, indices = sample_inputs((3, 5, 20, 8), dtype, torch.float32)
        args = query.requires_grad_(requires_grad), tokens.requires_grad_(requires_grad), indices
        torch.library.opcheck(torch.ops.ait.bottleneck_attend.default, args)
    query, tokens = query.detach(), tokens.detach()
    pooled, gates, lse = ait.ops.bottleneck_attend(query, tokens, indices)
    backward = torch.ops.ait.bottleneck_attend_backward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (pooled, None, lse, query, tokens, indices, pooled, gates), test_utils=tests)


@pytest.mark.slow
def test_compiled_equals_eager_with_dynamic_sizes() -> None:
    def loss(query: Tensor, tokens: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        pooled, gates, lse = ait.ops.bottleneck_attend(query * 2, tokens, indices)
        return pooled, gates, lse, (pooled.square().sum() + gates.sum() + lse.sum())

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows, k, tokens in ((4, 6, 40), (4, 9, 57), (7, 3, 5)):
        query, values, _ = sample_inputs((rows, k, tokens, 16))
        indices = torch.stack([torch.randperm(tokens)[:k].sort().values for _ in range(rows)])
        results = []
        for function in (loss, compiled):
            inputs = query.clone().requires_grad_(), values.clone().requires_grad_()
            outputs = function(*inputs, indices)
            results.append((*outputs, *torch.autograd.grad(outputs[-1], inputs)))
        for eager, other in zip(*results, strict=True):
            assert_close(other, eager)


@needs_kernels  # library products depend on shapes and strides
@pytest.mark.parametrize(
    "shape", [(37, 45, 300, 130), (2, 3000, 4000, 33), (300, 5, 64, 48), (1500, 9, 2000, 300)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(dtype: torch.dtype, shape: tuple) -> None:
    results = []
    for threads in THREADS:
        with num_threads(threads):
            results.append(run_with_gradients(*sample_inputs(shape, dtype)))
    for other in results[1:]:
        for name, value in other.items():
            assert_same_bits(value, results[0][name], name)


@needs_kernels  # library products depend on shapes and strides
def test_a_row_does_not_depend_on_the_other_rows() -> None:
    query, tokens, indices = sample_inputs((40, 30, 200, 50))
    together = ait.ops.bottleneck_attend(query, tokens, indices)
    for rows in ([7], [7, 31], list(range(39))):
        alone = ait.ops.bottleneck_attend(query[rows], tokens, indices[rows])
        for name, a, b in zip(NAMES, alone, together, strict=True):
            assert_same_bits(a, b[rows], name)


@needs_kernels  # library products depend on shapes and strides
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [512, 500], ids=["whole lines", "broken lines"])
def test_a_token_gradient_too_large_for_the_caches_has_the_same_bits(width: int, dtype: torch.dtype) -> None:
    query, few, lists = sample_inputs((6, 20, 100, width), dtype)
    pooled, gates, lse = ait.ops.bottleneck_attend(query, few, lists)
    grads = gradients_like((pooled, gates, lse))
    num_tokens = (34 << 20) // (few.element_size() * width)
    places = torch.randperm(num_tokens, generator=generator(2))[:100].sort().values
    many = torch.zeros(num_tokens, width, dtype=dtype)
    many[places] = few
    where = torch.where(lists < 0, lists, places[lists.clamp(min=0)])
    small = torch.ops.ait.bottleneck_attend_backward(*grads, query, few, lists, pooled, gates)
    for threads in THREADS:
        with num_threads(threads):
            large = torch.ops.ait.bottleneck_attend_backward(*grads, query, many, where, pooled, gates)
        assert_same_bits(large[1][places], small[1], "grad_tokens")
        assert int(large[1].count_nonzero()) == int(small[1].count_nonzero())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: type) -> None:
    query, tokens, indices = sample_inputs((5, 8, 30, 12))
    expected = ait.ops.bottleneck_attend(query, tokens, indices)
    with mode():
        outputs = ait.ops.bottleneck_attend(query.requires_grad_(), tokens.requires_grad_(), indices)
    for name, a, b in zip(NAMES, outputs, expected, strict=True):
        assert not a.requires_grad
        assert_same_bits(a, b, name)


def test_double_backward_is_an_error() -> None:
    query, tokens, indices = sample_inputs((3, 4, 9, 5), torch.float64)
    query.requires_grad_()
    pooled, _, _ = ait.ops.bottleneck_attend(query, tokens, indices)
    (grad,) = torch.autograd.grad(pooled.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 65, 1500])
def test_nan_and_infinite_logits_are_treated_as_by_softmax_and_logsumexp(length: int, dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    cases = ([inf], [-inf], [nan], [inf, -inf], [inf, inf], [nan, inf], [nan, -inf], [-inf, -inf])
    for special in cases:
        for only_special in (False, True):
            # Width 2: the logit is the first component, the second is plain.
            logits = torch.full((length,), special[-1]) if only_special else torch.linspace(-1, 1, length)
            for i, value in enumerate(special[:length]):
                logits[(i * 977 + length // 2) % length] = value
            tokens = torch.stack([logits, torch.ones(length)], dim=1).to(dtype)
            query = torch.tensor([[1.0, 0.5]])
            indices = torch.arange(length)[None]
            actual = ait.ops.bottleneck_attend(query, tokens, indices)
            expected = reference.bottleneck_attend(query, tokens, indices)
            for name, a, e in zip(NAMES, actual, expected, strict=True):
                assert_close(a, e, f"{name} for logits {special}, alone: {only_special}")


def test_rows_without_a_finite_logit_give_zero_and_zero_gradients() -> None:
    tokens = torch.tensor([[-math.inf, 1.0], [-math.inf, 2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    query[:, 1] = 1.0
    query.requires_grad_()
    indices = torch.tensor([[0, 1, -1], [-1, -1, -1]])
    pooled, gates, lse = ait.ops.bottleneck_attend(query, tokens, indices)
    assert (pooled == 0).all() and (gates == 0).all() and (lse == -math.inf).all()
    grads = torch.autograd.grad((pooled, gates, lse), (query, tokens), gradients_like((pooled, gates, lse)))
    assert (grads[0] == 0).all() and (grads[1] == 0).all()


def test_what_a_row_does_not_list_never_reaches_it() -> None:
    query, tokens, indices = sample_inputs((6, 9, 40, 20))
    listed = set(indices[:3].flatten().tolist())
    expected = ait.ops.bottleneck_attend(query[:3], tokens, indices[:3])
    for token in range(40):
        if token not in listed:
            tokens[token] = math.nan
    actual = ait.ops.bottleneck_attend(query[:3], tokens, indices[:3])
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(a, e, name)


def test_gradients_at_padding_entries_are_ignored() -> None:
    query, tokens, indices = sample_inputs((4, 9, 40, 20), torch.float64)
    pooled, gates, lse = ait.ops.bottleneck_attend(query, tokens, indices)
    grads = gradients_like((pooled, gates, lse))
    saved = query, tokens, indices, pooled, gates
    expected = torch.ops.ait.bottleneck_attend_backward(*grads, *saved)
    grads[1][indices < 0] = math.nan
    actual = torch.ops.ait.bottleneck_attend_backward(*grads, *saved)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("magnitude", [1e4, -1e4, 1e30])
def test_huge_logits_do_not_overflow(magnitude: float) -> None:
    logits = magnitude + torch.arange(1500.0) * abs(magnitude) * 1e-6
    tokens = torch.stack([logits, torch.arange(1500.0)], dim=1)
    query, indices = torch.tensor([[1.0, 0.0]]), torch.arange(1500)[None]
    actual = ait.ops.bottleneck_attend(query, tokens, indices)
    expected = reference.bottleneck_attend(query.double(), tokens.double(), indices)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_close(a, e, name)


def test_equal_logits_share_the_gates() -> None:
    tokens = torch.ones(50, 6)
    indices = torch.arange(0, 50, 2)[None]
    _, gates, lse = ait.ops.bottleneck_attend(torch.ones(1, 6), tokens, indices)
    assert (gates == gates[0, 0]).all()
    assert_close(gates, torch.full_like(gates, 1 / 25))
    assert_close(lse, torch.tensor([6 + math.log(25)]))


def test_signed_zeros_in_the_inputs_change_nothing() -> None:
    query, tokens, indices = sample_inputs((4, 6, 20, 10))
    tokens[:, 3] = 0.0
    plus = ait.ops.bottleneck_attend(query, tokens, indices)
    tokens[:, 3] = -0.0
    minus = ait.ops.bottleneck_attend(query, tokens, indices)
    for a, b in zip(plus, minus, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"query": torch.zeros(3)},
        {"query": torch.zeros(3, 8, 1)},
        {"query": torch.zeros(3, 7)},
        {"query": torch.zeros(3, 8, dtype=torch.int64)},
        {"query": torch.zeros(3, 8, dtype=torch.float64)},
        {"query": torch.zeros(3, 8, dtype=torch.complex64)},
        {"tokens": torch.zeros(20)},
        {"tokens": torch.zeros(20, 9)},
        {"tokens": torch.zeros(20, 8, dtype=torch.int32)},
        {"indices": torch.zeros(3, dtype=torch.int64)},
        {"indices": torch.zeros(4, 2, dtype=torch.int64)},
        {"indices": torch.zeros(3, 2, dtype=torch.int32)},
        {"indices": torch.zeros(3, 2)},
    ],
    ids=str,
)
def test_wrong_shapes_and_dtypes_are_errors(changes: dict[str, Tensor]) -> None:
    query, tokens, indices = sample_inputs((3, 5, 20, 8))
    args = {"query": query, "tokens": tokens, "indices": indices, **changes}
    with pytest.raises(ValueError, match="bottleneck_attend: expected"):
        ait.ops.bottleneck_attend(**args)
    if not ait.ops._library.is_pure_python():
        with pytest.raises(RuntimeError, match="bottleneck_attend: expected"):
            torch.ops.ait.bottleneck_attend(**args)


BAD_LISTS = {
    "descending": [3, 2, -1],
    "duplicate": [2, 2, -1],
    "too large": [2, 20, -1],
    "far too large": [2, 2**62, -1],
    "negative": [-2, 3, -1],
    "far too negative": [-(2**63), 3, 4],
    "-1 before an index": [-1, 3, 4],
    "negative behind -1": [3, -1, -2],
}


@pytest.mark.parametrize("bad", BAD_LISTS, ids=str)
def test_bad_lists_are_errors_forward_and_backward(bad: str) -> None:
    query, tokens, _ = sample_inputs((3, 3, 20, 8))
    indices = torch.tensor([[0, 1, 2], BAD_LISTS[bad], [5, -1, -1]])
    with pytest.raises(RuntimeError, match=r"ascending and unique in \[0, 20\).*row 1"):
        ait.ops.bottleneck_attend(query, tokens, indices)
    pooled, gates, lse = torch.zeros(3, 8), torch.zeros(3, 3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="ascending and unique"):
        torch.ops.ait.bottleneck_attend_backward(pooled, gates, lse, query, tokens, indices, pooled, gates)


@needs_kernels
@pytest.mark.parametrize("argument", ["grad_pooled", "grad_gates", "grad_lse", "pooled", "gates"])
@pytest.mark.parametrize("damage", ["shape", "rank", "dtype"])
def test_backward_checks_what_was_saved(argument: str, damage: str) -> None:
    query, tokens, indices = sample_inputs((3, 5, 20, 8))
    pooled, gates, lse = ait.ops.bottleneck_attend(query, tokens, indices)
    args = {
        "grad_pooled": pooled,
        "grad_gates": gates,
        "grad_lse": lse,
        "query": query,
        "tokens": tokens,
        "indices": indices,
        "pooled": pooled,
        "gates": gates,
    }
    damaged = {"shape": lambda x: x[:1], "rank": lambda x: x[None], "dtype": lambda x: x.double()}
    args[argument] = damaged[damage](args[argument])
    with pytest.raises(RuntimeError, match=f"bottleneck_attend: expected {argument} of"):
        torch.ops.ait.bottleneck_attend_backward(**args)


def test_expanded_and_overlapping_inputs_are_fine() -> None:
    query, tokens, indices = sample_inputs((3, 5, 20, 8))
    views = query[:1].expand(3, 8), tokens[:1].expand(20, 8), indices[:1].expand(3, 5)
    actual, expected = run_with_gradients(*views), run_with_gradients(*(x.contiguous() for x in views))
    for name, value in actual.items():
        assert_same_bits(value, expected[name], name)
    outputs = ait.ops.bottleneck_attend(query.requires_grad_(), tokens, indices)
    outputs[0].sum().backward()  # the incoming gradient is an expanded scalar
    assert query.grad is not None and query.grad.isfinite().all()


@needs_kernels
def test_tensors_without_dense_memory_are_errors_or_meta_results() -> None:
    query, tokens, indices = sample_inputs((3, 5, 20, 8))
    result = torch.ops.ait.bottleneck_attend(query.to("meta"), tokens.to("meta"), indices.to("meta"))
    assert [x.device.type for x in result] == ["meta"] * 3
    for position in range(3):
        sparse = [query, tokens, indices]
        sparse[position] = sparse[position].to_sparse()
        with pytest.raises(RuntimeError):
            torch.ops.ait.bottleneck_attend(*sparse)


@needs_kernels
def test_the_expected_instruction_set_runs() -> None:
    common.assert_expected_instruction_set()


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("capability", common.lesser_capabilities())
def test_core_checks_pass_at_every_instruction_set(capability: str) -> None:
    common.run_tests_at_capability(
        ["tests/ops/test_bottleneck_attend.py"], capability, "match_the_reference or infinite"
    )
