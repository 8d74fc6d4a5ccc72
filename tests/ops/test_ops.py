"""What every public op promises besides its value: derivatives, opcheck, compilation, vmap, and errors that help."""

from importlib.util import find_spec

import pytest
import torch
from cases import make
from differentiable import FUNCTIONS, double
from torch.library import opcheck

import projgrad

ops = torch.ops.projgrad


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_pass_gradcheck_twice(name):
    function, inputs = FUNCTIONS[name]
    args = inputs()
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_derivative_at_fixed_rank():
    """With a duplicated row the projection is smooth only in directions that keep the rank; those are right."""
    u, G = double(6), double(2, 6)
    function = lambda u, G: projgrad.project_out(u, torch.cat([G, 3 * G[:1], 0 * G[:1]]))  # noqa: E731
    assert torch.autograd.gradcheck(function, (u, G))
    plain = torch.autograd.grad(projgrad.project_out(u, G).square().sum(), (u, G))
    doubled = torch.autograd.grad(function(u, G).square().sum(), (u, G))
    torch.testing.assert_close(plain, doubled)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_into_one_graph(name):
    function, inputs = FUNCTIONS[name]
    args = inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), function(*args))

    def backward(f):
        out = f(*args)
        out = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(sum(o.square().sum() for o in out), args)

    torch.testing.assert_close(backward(compiled), backward(function))


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    u, G = make("random", torch.float32)
    compiled = torch.compile(lambda u, G: 2 * projgrad.project_out(u, G), fullgraph=True)
    torch.testing.assert_close(compiled(u, G), 2 * projgrad.project_out(u, G))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_flat_ops_pass_opcheck(dtype, device):
    u, G = make("directions", dtype, device)
    u.requires_grad_(), G.requires_grad_()
    opcheck(ops.gram.default, (G, u, False))
    opcheck(ops.subtract.default, (u.detach(), G.detach(), torch.zeros(6, 3, dtype=torch.float64, device=device)))
    opcheck(ops.project_out.default, (u, G, 0.1, None))


def test_opcheck_of_transposed_input(device):
    u, c = torch.randn(9, 2, device=device).mT, torch.zeros(2, 3, dtype=torch.float64, device=device).mT
    G = torch.randn(3, 9, device=device)
    opcheck(ops.project_out.default, (u, G, 0.0, None))
    opcheck(ops.subtract.default, (u, G, c))


def test_forward_mode_is_refused_not_zero():
    u, G = torch.randn(9), torch.randn(3, 9)
    for call in (
        lambda t: projgrad.project_out(t, G),
        lambda t: projgrad.gram(G, t)[1],
        lambda t: projgrad.gram_solve(torch.eye(9), t),
    ):
        with pytest.raises(RuntimeError, match="forward-mode derivatives"):
            torch.func.jvp(call, (u,), (u,))


def test_derivatives_of_tiny_rows_stay_in_range():
    G = torch.randn(3, 9)
    G[1] *= 1e-20
    G.requires_grad_()
    projgrad.gram(G).diagonal().log().sum().backward()
    rows = G.detach().double()
    torch.testing.assert_close(G.grad, (2 * rows / rows.square().sum(1, keepdim=True)).float())
    G.grad = None
    projgrad.project_out(torch.randn(9), G, damping=0.1).sum().backward()
    assert G.grad.isfinite().all()


def test_gram_solve_passes_opcheck(device):
    A = torch.randn(2, 4, 9, device=device)
    K, b = (A @ A.mT).requires_grad_(), torch.randn(2, 4, 3, device=device, requires_grad=True)
    opcheck(ops.gram_solve.default, (K, b, 0.0, None))
    opcheck(ops.gram_solve.default, (K.double(), b.double(), 0.5, 1e-3))


def test_vmap_equals_the_stack_of_the_calls():
    u, G = torch.randn(4, 9), torch.randn(4, 3, 9)
    expected = torch.stack([projgrad.project_out(a, b) for a, b in zip(u, G, strict=True)])
    torch.testing.assert_close(torch.vmap(projgrad.project_out)(u, G), expected)
    one = torch.stack([projgrad.project_out(a, G[0]) for a in u])
    torch.testing.assert_close(torch.vmap(projgrad.project_out, in_dims=(0, None))(u, G[0]), one)
    K, v = torch.vmap(projgrad.gram)(G, u)
    torch.testing.assert_close(K[2], projgrad.gram(G[2]))
    torch.testing.assert_close(torch.vmap(projgrad.gram_solve)(K, v), projgrad.gram_solve(K, v))
    shared = torch.vmap(projgrad.gram_solve, in_dims=(None, 0))(K[0], v)
    torch.testing.assert_close(shared, torch.stack([projgrad.gram_solve(K[0], b) for b in v]))


G23, u3, K22, b2 = torch.ones(2, 3), torch.ones(3), torch.eye(2), torch.ones(2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: projgrad.project_out(torch.ones(4), G23), ValueError, r"u \(4,\) and G \(2, 3\)"),
        (lambda: projgrad.project_out(torch.ones(1, 1, 3), G23), ValueError, r"u must be .* got u \(1, 1, 3\)"),
        (lambda: projgrad.project_out(u3, u3), ValueError, r"G must be \(n, p\).* got shape \(3,\)"),
        (lambda: projgrad.project_out(u3.double(), G23), TypeError, r"u torch.float64 and G torch.float32"),
        (lambda: projgrad.project_out(u3.int(), G23.int()), TypeError, r"G must be float32.* got torch.int32"),
        (lambda: projgrad.project_out(u3.to("meta"), G23), ValueError, r"u on meta and G on cpu"),
        (lambda: projgrad.project_out(u3, G23, damping=-1.0), ValueError, r"damping must be .* got -1.0"),
        (lambda: projgrad.project_out(u3, G23, damping=float("nan")), ValueError, r"damping must be .* got nan"),
        (lambda: projgrad.project_out(u3, G23, rtol=1.0), ValueError, r"rtol must be in \[0, 1\).* got 1.0"),
        (lambda: projgrad.gram(torch.ones(2)), ValueError, r"gram: G must be \(n, p\)"),
        (lambda: projgrad.gram(G23, torch.ones(2)), ValueError, r"gram: u must .* got u \(2,\) and G \(2, 3\)"),
        (lambda: projgrad.gram(G23.bool()), TypeError, r"gram: G must be float32.* got torch.bool"),
        (lambda: projgrad.gram_solve(G23, b2), ValueError, r"K must be \(..., n, n\); got shape \(2, 3\)"),
        (lambda: projgrad.gram_solve(K22, u3), ValueError, r"got b \(3,\) and K \(2, 2\)"),
        (lambda: projgrad.gram_solve(K22.half(), b2.half()), TypeError, r"K must be float32 or float64"),
        (lambda: projgrad.gram_solve(K22, b2.double()), TypeError, r"K torch.float32 and b torch.float64"),
        (lambda: projgrad.gram_solve(K22, b2.to("meta")), ValueError, r"K on cpu and b on meta"),
        (lambda: projgrad.gram_solve(K22, b2, damping=-0.5), ValueError, r"damping must be .* got -0.5"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


OURS = ("gram_solve", "feasible")  # and with the extension:
OURS += ("gram", "linear_gram", "linear_gram_across", "project_out") if find_spec("projgrad._C") else ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_same_bits_for_any_number_of_threads(name, dtype, threads):
    """Where the README says so; products of torch may be others."""
    for n, t, i, o, p in (
        (2, 1, 33, 65, 100),
        (5, 7, 129, 65, 5001),
        (33, 16, 500, 301, 70003),
        (64, 2, 64, 128, 5001),
    ):
        G, u = torch.randn(n, p).to(dtype), torch.randn(p).to(dtype)
        a, b, K = torch.randn(n, t, i).to(dtype), torch.randn(n, t, o).to(dtype), projgrad.gram(G)
        call = {
            "gram": lambda G=G, u=u: projgrad.gram(G, u),
            "gram_solve": lambda K=K: (projgrad.gram_solve(K, K[0]),),
            "feasible": lambda u=u, n=n: (projgrad.feasible(u, -u, n * u, 2 * n * u.square(), n),),
            "linear_gram": lambda a=a, b=b: (projgrad.linear_gram(a, b),),
            "linear_gram_across": lambda a=a, b=b: (projgrad.linear_gram(a, b, a[:3], b[:3]),),
            "project_out": lambda G=G, u=u: (projgrad.project_out(u, G),),
        }[name]
        found = []
        for count in (1, 2, 3, 8):
            threads(count)
            found.append(call())
        assert all(map(torch.equal, found[0] * 3, sum(found[1:], ())))
