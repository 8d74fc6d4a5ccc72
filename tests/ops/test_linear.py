"""The ops on the factors of a linear layer: values by both routes, derivatives, compilation, properties, messages."""

import pytest
import torch
from cases import FACTORS, FLOAT_ONLY, make_factors
from factors import check, check_gram, layer, products, truth
from torch.library import opcheck

import projgrad
from projgrad.ops import linear_impl as implementation
from projgrad.ops import reference
from projgrad.ops.cost import CPU, linear_route

ops = torch.ops.projgrad
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (F64, F32)]
INPUTS = [(name, pair) for name in FACTORS for pair in DTYPES if name not in FLOAT_ONLY or {BF16, F16}.isdisjoint(pair)]
SMALL = 1 << 10  # bytes of a chunk: many chunks and tiles even for the sizes here


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_linear_gram_equals_the_loop_over_positions(name, dtypes, device):
    a, b = make_factors(name, dtypes, device)
    K = projgrad.linear_gram(a, b)
    assert K.dtype == F64 and torch.equal(K, K.mT)
    check_gram(K, *layer(name, dtypes, device), products(a, b))


@pytest.mark.parametrize("budget", [SMALL, CPU.chunk])
@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize("only", ["factors", "chunks"])
@pytest.mark.parametrize("name", FACTORS)
def test_both_routes_to_a_gram_matrix_are_exact(name, only, float64, budget):
    a, b = layer(name)
    n, t, i = a.shape
    u = torch.randn(2, b.shape[2], i)
    route = linear_route(n, t, i, b.shape[2], m=2, itemsize=8 if float64 else 4, budget=budget, only=only)
    if only == "factors":
        K = implementation.token_gram(a, b, float64, route.rows)
    else:
        K, v = implementation.gram_of_chunks(a, b, u, float64, route)
        check_dot(v, a, b, u, products(a, b, float64))
    assert torch.equal(K, K.mT)
    check_gram(K, a, b, products(a, b, float64))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_linear_gram_with_directions_equals_gram_and_dot(dtypes):
    """What the tape calls: K and v, on either route and with any chunk."""
    for name in ("one_position", "random", "long"):
        a, b = layer(name, dtypes)
        u = torch.randn(2, b.shape[2], a.shape[2])
        for float64, budget in ((False, CPU.chunk), (True, CPU.chunk), (False, SMALL)):
            K, v = implementation.gram_of_layer(a, b, u, float64, budget)
            check_gram(K, a, b, products(a, b, float64))
            check_dot(v, a, b, u, products(a, b, float64))


def check_dot(v, a, b, u, dtype):
    g, w = truth(a, b).flatten(1), u.double().flatten(1)
    scale = truth(a.abs(), b.abs()).flatten(1) @ w.abs().mT
    plain = (b.to(dtype).mT @ a.to(dtype)).flatten(1) @ u.to(dtype).flatten(1).mT
    check(v, g @ w.mT, scale, plain, dtype)


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_linear_dot_equals_the_loop_over_positions(name, dtypes, device):
    a, b = layer(name, dtypes, device)
    u = torch.randn(3, b.shape[2], a.shape[2], device=device).to(b.dtype)
    v = projgrad.linear_dot(a, b, u)
    assert v.dtype == F64
    check_dot(v.mT, a, b, u, products(a, b))
    torch.testing.assert_close(projgrad.linear_dot(a, b, u[1]), v[1], rtol=1e-12, atol=0)


def test_dot_of_tiny_and_huge_keeps_its_precision():
    a, b = layer("tiny_and_huge")
    u = torch.randn(3, b.shape[2], a.shape[2])
    u *= torch.tensor([1e-25, 1e20, 0.0])[:, None, None]
    v = projgrad.linear_dot(a, b, u).mT
    torch.testing.assert_close(v, reference.linear_dot(a, b, u), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_linear_combine_equals_the_loop_over_positions(name, dtypes, device):
    a, b = layer(name, dtypes, device)
    c = torch.randn(2, a.shape[0], dtype=F64, device=device)
    dtype, rounded = products(a, b), torch.promote_types(*dtypes)
    out = projgrad.linear_combine(a, b, c)
    assert out.dtype == rounded
    g, size = truth(a, b).flatten(1), truth(a.abs(), b.abs()).flatten(1)
    x, y = (z.to(dtype).flatten(0, 1) for z in (a, b))
    plain = torch.stack([(y * w.to(dtype).repeat_interleave(a.shape[1])[:, None]).mT @ x for w in c]).to(rounded)
    check(out.flatten(1), c @ g, c.abs() @ size, plain.flatten(1), rounded)
    torch.testing.assert_close(projgrad.linear_combine(a, b, c[1]), out[1])


def test_combine_with_weights_outside_float32():
    """The coefficients of a projection on tiny gradients: c is 1 / 1e-45, c g is not."""
    a, b = layer()
    tiny, c = b * 1e-25, torch.full((6,), 1e45, dtype=F64)
    expected = reference.linear_combine(a, tiny, c[None])[0]
    error = projgrad.linear_combine(a, tiny, c) - expected
    assert error.abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("target", ["contiguous", "transposed", "half", "double"])
@pytest.mark.parametrize("budget", [SMALL, CPU.chunk])
def test_combine_accumulates_in_place(target, budget, monkeypatch):
    monkeypatch.setattr(implementation, "chunk_bytes", lambda device: budget)
    a, b = layer()
    c, before = torch.randn(6), torch.randn(17, 33)
    before = before.to({"half": BF16, "double": F64}.get(target, F32))
    out = (before.mT.contiguous().mT if target == "transposed" else before).clone()
    implementation.combine_of_layer_(out, a, b, c)
    expected = before.double() + torch.einsum("n,noi->oi", c.double(), truth(a, b))
    torch.testing.assert_close(out, expected.to(out.dtype))


@pytest.mark.parametrize("name, dtypes", INPUTS, ids=str)
def test_linear_moments_equal_the_loop_over_positions(name, dtypes, device):
    a, b = layer(name, dtypes, device)
    dtype, rounded = products(a, b), torch.promote_types(*dtypes)
    total, squares = projgrad.linear_moments(a, b)
    assert total.dtype == squares.dtype == rounded
    g, size = truth(a, b), truth(a.abs(), b.abs())
    rows = b.to(dtype).mT @ a.to(dtype)
    check(total, g.sum(0), size.sum(0), rows.sum(0).to(rounded), rounded)
    check(squares, g.square().sum(0), size.square().sum(0), rows.square().sum(0).to(rounded), rounded)


@pytest.mark.same_without_extension
@pytest.mark.parametrize("variation", [1.0, 1e-2, 1e-3, 1e-5, 1e-7])
def test_products_of_gradients_whose_tokens_nearly_cancel(variation):
    """Products of tokens in float32 lose a gradient that a sum of their outer products still has."""
    n, t, size = 6, 4, 256
    x = torch.randn(n, 1, size, dtype=F64) + variation * torch.randn(n, t, size, dtype=F64)
    y = torch.randn(n, t, size, dtype=F64)
    a, b = x.float(), (y - y.mean(1, keepdim=True)).float()
    a[0] = 0
    g = truth(a, b).flatten(1)
    K, lengths = g @ g.mT, g.norm(dim=1).clamp_min(1e-300)
    assert linear_route(n, t, size, size).name == "factors"
    across = projgrad.linear_gram(a[:3], b[:3], a[3:], b[3:])
    for found, wanted, rows, columns in (
        (projgrad.linear_gram(a, b), K, lengths, lengths),
        (across, K[:3, 3:], lengths[:3], lengths[3:]),
    ):
        assert ((found - wanted).abs() <= 2e-5 * rows[:, None] * columns).all()
    torch.testing.assert_close(implementation.squares_of_layer(a, b), K.diagonal(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("only", ["factors", "chunks"])
@pytest.mark.parametrize("t2", [3, 5])
def test_gram_of_two_groups_is_a_block_of_all(t2, only):
    (a, b), (a2, b2) = layer(), (torch.randn(4, t2, 33), torch.randn(4, t2, 17))
    expected = torch.einsum("joi,koi->jk", truth(a, b), truth(a2, b2))
    across = {
        "factors": lambda route: implementation.token_gram_across(a, b, a2, b2, route.rows),
        "chunks": lambda route: implementation.gram_of_chunks_across(a, b, a2, b2, route),
    }[only]
    for K in (
        projgrad.linear_gram(a, b, a2, b2),
        reference.linear_gram(a, b, a2, b2),
        across(linear_route(10, 5, 33, 17, only=only)),
        across(linear_route(10, 5, 33, 17, budget=SMALL, only=only)),
    ):
        torch.testing.assert_close(K, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(projgrad.linear_gram(a2, b2, a, b), expected.mT, rtol=1e-5, atol=1e-4)
    whole = projgrad.linear_gram(a, b)
    torch.testing.assert_close(projgrad.linear_gram(a[:2], b[:2], a[2:], b[2:]), whole[:2, 2:], rtol=1e-5, atol=1e-4)


def test_ops_of_a_layer_have_the_shapes_they_promise():
    a, b, u, c = torch.randn(4, 3, 5), torch.randn(4, 3, 6), torch.randn(2, 6, 5), torch.randn(2, 4)
    for x, y in ((a, b), (a[:, 0], b[:, 0])):
        assert projgrad.linear_gram(x, y).shape == (4, 4)
        assert projgrad.linear_gram(x, y, a[:2], b[:2]).shape == (4, 2)
        assert projgrad.linear_gram(x, y, a[:0], b[:0]).shape == (4, 0)
        assert [projgrad.linear_dot(x, y, w).shape for w in (u, u[0], u[:0])] == [(2, 4), (4,), (0, 4)]
        assert [projgrad.linear_combine(x, y, w).shape for w in (c, c[0], c[:0])] == [(2, 6, 5), (6, 5), (0, 6, 5)]
        assert [m.shape for m in projgrad.linear_moments(x, y)] == [(6, 5), (6, 5)]


@pytest.mark.parametrize("only", ["factors", "chunks"])
def test_permuted_samples_permute_the_result(only):
    a, b = layer("many_samples", (F64, F64))
    order = torch.randperm(a.shape[0])
    route = linear_route(*a.shape, b.shape[2], itemsize=8, budget=1 << 14, only=only)
    none = b.new_empty(0, b.shape[2], a.shape[2])
    call = {
        "factors": lambda a, b, w, r: implementation.token_gram(a, b, w, r.rows),
        "chunks": lambda a, b, w, r: implementation.gram_of_chunks(a, b, none, w, r)[0],
    }[only]
    K, permuted = call(a, b, False, route), call(a[order], b[order], False, route)
    torch.testing.assert_close(permuted, K[order][:, order], rtol=1e-12, atol=1e-12)
    assert torch.equal(K, call(a, b, False, route))


def test_autocast_changes_nothing_of_a_layer():
    a, b = layer("long")
    u, c = torch.randn(b.shape[2], a.shape[2]), torch.randn(a.shape[0])
    calls = (
        lambda: projgrad.linear_gram(a, b),
        lambda: projgrad.linear_gram(a[:, 0], b[:, 0]),
        lambda: projgrad.linear_dot(a, b, u),
        lambda: projgrad.linear_combine(a, b, c),
        lambda: projgrad.linear_moments(a, b)[1],
        lambda: projgrad.linear_moments(a[:, 0], b[:, 0])[1],
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


# Derivatives, compilation, vmap.


def _double(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


# name -> (public function, op, inputs that require gradients, further arguments of the op)
FUNCTIONS = {
    "gram": (projgrad.linear_gram, ops.linear_gram, lambda: (_double(3, 2, 4), _double(3, 2, 3)), (None, None)),
    "gram_of_two_groups": (
        projgrad.linear_gram,
        ops.linear_gram,
        lambda: (_double(3, 2, 4), _double(3, 2, 3), _double(2, 1, 4), _double(2, 1, 3)),
        (),
    ),
    "dot": (
        projgrad.linear_dot,
        ops.linear_dot,
        lambda: (_double(3, 2, 4), _double(3, 2, 3), _double(2, 3, 4)),
        (),
    ),
    "combine": (
        projgrad.linear_combine,
        ops.linear_combine,
        lambda: (_double(3, 2, 4), _double(3, 2, 3), _double(2, 3)),
        (),
    ),
    "moments": (projgrad.linear_moments, ops.linear_moments, lambda: (_double(3, 2, 4), _double(3, 2, 3)), ()),
    "moments_of_one_position": (
        projgrad.linear_moments,
        ops.linear_moments,
        lambda: (_double(3, 1, 4), _double(3, 1, 3)),
        (),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_a_layer_pass_gradcheck_twice(name):
    function, _, inputs, _ = FUNCTIONS[name]
    args = inputs()
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ops_of_a_layer_pass_opcheck(name, dtype):
    _, op, inputs, more = FUNCTIONS[name]
    opcheck(op.default, (*(x.detach().to(dtype).requires_grad_() for x in inputs()), *more))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fakes_have_the_shapes_and_dtypes_of_the_results(name):
    _, op, inputs, more = FUNCTIONS[name]
    args = [x.detach().float() for x in inputs()]
    args[1] = args[1].bfloat16()
    args[3:] = [x.bfloat16() for x in args[3:]]
    as_tuple = lambda out: out if isinstance(out, tuple) else (out,)  # noqa: E731
    real = as_tuple(op(*args, *more))
    fake = as_tuple(op(*(x.to("meta") for x in args), *more))
    assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in fake]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_into_one_graph(name):
    function, _, inputs, _ = FUNCTIONS[name]
    args = inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def with_gradients(f):
        out = f(*args)
        out = out if isinstance(out, tuple) else (out,)
        return *out, *torch.autograd.grad(sum(o.square().sum() for o in out), args)

    torch.testing.assert_close(with_gradients(compiled), with_gradients(function))


def test_vmap_of_a_layer_equals_the_stack_of_its_calls():
    a, b, u = torch.randn(4, 3, 2, 5), torch.randn(4, 3, 2, 6), torch.randn(6, 5)
    K = torch.vmap(projgrad.linear_gram)(a, b)
    torch.testing.assert_close(K, torch.stack([projgrad.linear_gram(*x) for x in zip(a, b, strict=True)]))
    v = torch.vmap(projgrad.linear_dot, in_dims=(0, 0, None))(a, b, u)
    torch.testing.assert_close(v[1], projgrad.linear_dot(a[1], b[1], u))
    squares = torch.vmap(projgrad.linear_moments)(a, b)[1]
    torch.testing.assert_close(squares[2], projgrad.linear_moments(a[2], b[2])[1])


def test_forward_mode_is_refused_not_zero():
    a, b = layer()
    with pytest.raises(RuntimeError, match="linear_gram: forward-mode derivatives"):
        torch.func.jvp(lambda a: projgrad.linear_gram(a, b), (a,), (a,))


# Messages.

A, B, U = torch.ones(3, 2, 4), torch.ones(3, 2, 5), torch.ones(5, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: projgrad.linear_gram(A, B[:2]),
            ValueError,
            r"linear_gram: a and b .* b \(2, 2, 5\)",
        ),
        (lambda: projgrad.linear_gram(A, B[:, :1]), ValueError, r"a \(3, 2, 4\) and b \(3, 1, 5\)"),
        (lambda: projgrad.linear_gram(A, B[:, 0]), ValueError, r"a \(3, 2, 4\) and b \(3, 5\)"),
        (lambda: projgrad.linear_gram(A[None], B[None]), ValueError, r"a \(1, 3, 2, 4\)"),
        (lambda: projgrad.linear_gram(A.int(), B), TypeError, r"a must be float32.* got torch.int32"),
        (lambda: projgrad.linear_gram(A, B.to("meta")), ValueError, r"a on cpu and b on meta"),
        (lambda: projgrad.linear_gram(A, B, A), ValueError, r"a2 and b2 belong together"),
        (lambda: projgrad.linear_gram(A, B, A, B[:2]), ValueError, r"a2 and b2 must be .* b2 \(2, 2, 5\)"),
        (lambda: projgrad.linear_gram(A, B, B, B), ValueError, r"the i of a .* a2 \(3, 2, 5\) and b2 \(3, 2, 5\)"),
        (lambda: projgrad.linear_gram(A, B, A.double(), B), TypeError, r"a2 torch.float64 and b2 torch.float32"),
        (lambda: projgrad.linear_gram(A, B, A.to("meta"), B.to("meta")), ValueError, r"a on cpu and a2 on meta"),
        (lambda: projgrad.linear_dot(A, B, U.mT), ValueError, r"linear_dot: u must be .* got u \(4, 5\)"),
        (lambda: projgrad.linear_dot(A, B, U[0]), ValueError, r"u must be .* got u \(4,\)"),
        (lambda: projgrad.linear_dot(A, B, U.int()), TypeError, r"u must be float32.* got torch.int32"),
        (lambda: projgrad.linear_dot(A, B, U.to("meta")), ValueError, r"u on meta and a on cpu"),
        (lambda: projgrad.linear_combine(A, B, U), ValueError, r"c must be .* got c \(5, 4\) and a \(3, 2, 4\)"),
        (lambda: projgrad.linear_combine(A, B, torch.ones(2)), ValueError, r"c must be \(n,\).* got c \(2,\)"),
        (lambda: projgrad.linear_combine(A, B, torch.ones(3).bool()), TypeError, r"c must be float32.* torch.bool"),
        (lambda: projgrad.linear_moments(A, B[0]), ValueError, r"linear_moments: a and b .* b \(2, 5\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The cost model.


@pytest.mark.parametrize(
    "n, t, i, o", [(1, 1, 1, 1), (7, 3, 5, 1000), (64, 1, 784, 1024), (16, 128, 512, 4000), (0, 0, 0, 0)]
)
@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("budget", [1 << 16, CPU.chunk])
def test_pieces_stay_within_the_budget(n, t, i, o, itemsize, budget):
    chunks = linear_route(n, t, i, o, itemsize=itemsize, budget=budget, only="chunks")
    assert 1 <= chunks.rows <= max(1, o) and 1 <= chunks.columns <= max(1, i)
    assert chunks.bytes == itemsize * n * chunks.rows * chunks.columns <= budget
    assert linear_route(n, t, i, o, itemsize=itemsize, budget=budget).bytes <= budget
    assert linear_route(n, t, i, o, only="factors").rows <= max(1, n)


def test_route_by_sequence_length():
    """Factors for single positions, chunks for long sequences, and no way back in between."""
    for n in (2, 16, 128):
        for width in (256, 1024):
            names = [linear_route(n, t, width, width).name for t in (1, 2, 4, 8, 16, 64, 256, 1024)]
            assert names[0] == "factors" and names[-1] == "chunks"
            assert names == sorted(names, reverse=True)


def test_flops_of_the_routes():
    n, t, i, o = 8, 4, 32, 64
    assert linear_route(n, t, i, o, only="chunks").flops == 2 * n * t * i * o + n * (n + 1) * i * o
    assert linear_route(n, t, i, o, only="factors").flops == n * t * (n * t + 1) * (i + o)
    for only in ("factors", "chunks"):
        more = [linear_route(n, t, i, o, m=m, only=only).flops for m in (0, 1, 2)]
        assert more[0] < more[1] < more[2]
