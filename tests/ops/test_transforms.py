"""The public ops under the transformations of torch.func: grad, vjp, jacrev, vmap, and these in one another."""

import pytest
import torch
from differentiable import FUNCTIONS, double

import projgrad

LAYER = {
    "linear_gram": (projgrad.linear_gram, lambda: (double(3, 2, 4), double(3, 2, 5))),
    "linear_gram_across": (
        projgrad.linear_gram,
        lambda: (double(3, 2, 4), double(3, 2, 5), double(2, 3, 4), double(2, 3, 5)),
    ),
    "linear_dot": (projgrad.linear_dot, lambda: (double(3, 2, 4), double(3, 2, 5), double(5, 4))),
    "linear_dot_directions": (projgrad.linear_dot, lambda: (double(3, 4), double(3, 5), double(2, 5, 4))),
    "linear_combine": (projgrad.linear_combine, lambda: (double(3, 2, 4), double(3, 2, 5), double(3))),
    "linear_combine_weights": (projgrad.linear_combine, lambda: (double(3, 4), double(3, 5), double(2, 3))),
    "linear_moments": (projgrad.linear_moments, lambda: (double(3, 2, 4), double(3, 2, 5))),
}
ALL = FUNCTIONS | LAYER


def scalar_loss(function):
    """Not quadratic, so that the second derivatives depend on the first."""

    def call(*args):
        out = function(*args)
        return sum(o.square().sum() + (0.1 * o).sin().sum() for o in (out if isinstance(out, tuple) else (out,)))

    return call


@pytest.fixture(params=ALL)
def case(request):
    """Function, inputs, and the numbers of all inputs."""
    function, make = ALL[request.param]
    args = make()
    return function, args, tuple(range(len(args)))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_grad_and_vjp_equal_autograd(case):
    function, args, all_of_them = case
    expected = torch.autograd.grad(scalar_loss(function)(*args), args)
    close(torch.func.grad(scalar_loss(function), all_of_them)(*args), expected)
    value, pull = torch.func.vjp(scalar_loss(function), *args)
    close(value, scalar_loss(function)(*args))
    close(pull(torch.ones_like(value)), expected)


def test_jacobians_equal_autograd(case):
    function, args, all_of_them = case
    close(torch.func.jacrev(function, all_of_them)(*args), torch.autograd.functional.jacobian(function, args))


def test_second_derivatives_equal_autograd(case):
    function, args, all_of_them = case
    found = torch.func.jacrev(torch.func.jacrev(scalar_loss(function), all_of_them), all_of_them)(*args)
    close(found, torch.autograd.functional.hessian(scalar_loss(function), args))


def test_vmap_of_gradients_equals_the_gradients_one_by_one(case):
    """Per-sample gradients, of all inputs and with some of them shared; and the gradient of a vmap."""
    function, args, all_of_them = case
    grad = torch.func.grad(scalar_loss(function), all_of_them)
    many = tuple(torch.stack([a, a.flip(0), 2 * a]).detach() for a in args)
    each = [grad(*(a[j] for a in many)) for j in range(3)]
    close(torch.vmap(grad)(*many), tuple(map(torch.stack, zip(*each, strict=True))))
    if len(args) > 1 and function is not projgrad.linear_gram:
        shared = (many[0][0], *many[1:])
        each = [grad(shared[0], *(a[j] for a in shared[1:])) for j in range(3)]
        found = torch.vmap(grad, in_dims=(None, *[0] * (len(args) - 1)))(*shared)
        close(found, tuple(map(torch.stack, zip(*each, strict=True))))
    total = torch.func.grad(lambda *many: torch.vmap(scalar_loss(function))(*many).sum(), all_of_them)(*many)
    each = [grad(*(a[j] for a in many)) for j in range(3)]
    close(total, tuple(map(torch.stack, zip(*each, strict=True))))


def shapes(tensors):
    return [(t.shape, t.dtype) for t in (tensors if isinstance(tensors, tuple) else (tensors,))]


def test_vmap_over_nothing_has_the_shapes_of_one(case):
    """Has the shapes of one over something, and so have its gradients."""
    function, args, all_of_them = case
    one, none = (tuple(a.detach()[None].expand(n, *a.shape) for a in args) for n in (1, 0))

    def first(*args):  # vmap of torch itself adds no number to a scalar over nothing
        out = function(*args)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    for f in (function, torch.func.grad(first, all_of_them)):
        expected = [((0, *shape[1:]), dtype) for shape, dtype in shapes(torch.vmap(f)(*one))]
        assert shapes(torch.vmap(f)(*none)) == expected


def test_forward_mode_is_refused_not_zero(case):
    function, args, _ = case
    args = tuple(a.detach() for a in args)
    for call in (
        lambda: torch.func.jvp(function, args, args),
        lambda: torch.func.jacfwd(function)(*args),
        lambda: torch.func.hessian(scalar_loss(function))(*args),
    ):
        with pytest.raises(RuntimeError, match=r"forward-mode derivatives .* use reverse mode .*jacrev\(jacrev\(f\)\)"):
            call()


def test_information_about_a_projection_goes_through():
    u, G = torch.randn(4, 9), torch.randn(4, 3, 9)
    call = lambda u, G: projgrad.project_out(u, G, return_info=True)  # noqa: E731
    out, info = torch.vmap(call)(u, G)
    for j in range(4):
        torch.testing.assert_close((out[j], *(x[j] for x in info)), (lambda a, b: (a, *b))(*call(u[j], G[j])))
    gradient, found = torch.func.grad(lambda u: (lambda a, b: (a.sum(), b))(*call(u, G[0])), has_aux=True)(u[0])
    assert int(found.rank) == 3
    torch.testing.assert_close(gradient, projgrad.project_out(torch.ones(9), G[0]))
