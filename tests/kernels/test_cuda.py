"""The ops on a GPU: CUDA graphs, streams, devices, determinism, no waiting. What needs no GPU runs on the CPU too."""

import pytest
import torch

import projgrad
from projgrad.ops.gram import gram_few

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
needs_two = pytest.mark.skipif(not CUDA or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SYNC_DEBUG = "error"  # torch raises where an operation waits for the device


def flat(n, p, dtype=F32, parallel=None):
    """u and G; `parallel`: row 1 is at this angle to row 0, so that the projection is refined."""

    def make(device):
        G = torch.randn(n, p, device=device)
        if parallel is not None:
            G[1] = G[0] + parallel * G[1]
        return torch.randn(p, device=device).to(dtype), G.to(dtype)

    return make


def layer(n, t, i, o, dtype=F32):
    """a, b, u and c."""

    def make(device):
        a, b = torch.randn(n, t, i, device=device).to(dtype), torch.randn(n, t, o, device=device).to(dtype)
        return a, b, torch.randn(o, i, device=device).to(dtype), torch.randn(n, device=device, dtype=F64)

    return make


def systems(l, n, dtype=F32):
    def make(device):
        A = torch.randn(l, n, n + 2, dtype=dtype, device=device)
        return A @ A.mT, torch.randn(l, n, dtype=dtype, device=device)

    return make


def few(l, n, m, dtype=BF16):
    """g and u; row 0 is outside of float32's range of squares."""

    def make(device):
        g, u = torch.randn(l, n, 9000, device=device), torch.randn(l, m, 9000, device=device)
        g[:, 0] *= 1e-20 if dtype == BF16 else 1
        return g.to(dtype), u.to(dtype)

    return make


def coordinates(p, dtype=F32):
    """d, u, Σ g and Σ g² of eight samples."""

    def make(device):
        total = torch.randn(p, device=device)
        return *(torch.randn(p, device=device).to(dtype) for _ in range(2)), total, total.square()

    return make


def project(u, G):
    return projgrad.project_out(u, G)


def feasible(d, u, total, squares):
    return projgrad.feasible(d, u, total, squares, 8)


def gram_and_solve(u, G):
    K, v = projgrad.gram(G, u)
    return K, v, projgrad.gram_solve(K, v)


LAYER_OPS = {
    "linear_gram": lambda a, b, u, c: projgrad.linear_gram(a, b),
    "linear_gram_of_two": lambda a, b, u, c: projgrad.linear_gram(a, b, a[:2], b[:2]),
    "linear_dot": lambda a, b, u, c: projgrad.linear_dot(a, b, u),
    "linear_combine": lambda a, b, u, c: projgrad.linear_combine(a, b, c),
    "linear_moments": lambda a, b, u, c: projgrad.linear_moments(a, b),
}
# name -> (call, inputs on a device); those of GRAPHS are captured and must repeat the eager bits.
GRAPHS = {
    **{f"project_out_{n}": (project, flat(n, 3001)) for n in (1, 8, 64, 70)},
    "project_out_bfloat16": (project, flat(24, 3001, BF16)),
    "project_out_float64": (project, flat(5, 301, F64)),
    "project_out_refined": (project, flat(6, 1001, parallel=1e-5)),
    **{f"gram_and_solve_{n}": (gram_and_solve, flat(n, 3001)) for n in (8, 40, 130)},
    **{f"gram_few_{n}": (gram_few, few(3, n, 1)) for n in (1, 4, 8)},
    "gram_few_float16": (gram_few, few(2, 5, 0, F16)),
    "gram_few_unaligned": (lambda g, u: gram_few(g[..., 1:-7], u[..., 1:-7]), few(2, 4, 1)),
    **{f"gram_solve_{n}": (projgrad.gram_solve, systems(3, n)) for n in (16, 64, 100)},
    **{f"feasible_{name}": (feasible, coordinates(4099, t)) for name, t in (("float32", F32), ("bfloat16", BF16))},
}
CALLS = {
    **GRAPHS,
    **{
        f"{name}_{kind}": (call, make)
        for name, call in LAYER_OPS.items()
        for kind, make in {
            "one_position": layer(9, 1, 64, 48),
            "positions": layer(5, 37, 70, 33),
            "bfloat16": layer(4, 64, 64, 128, BF16),
        }.items()
    },
}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(as_tuple(first), as_tuple(second), strict=True))


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_same_bits_every_time(call, device):
    function, make = call
    inputs = make(device)
    first = function(*inputs)
    assert all(x.isfinite().all() for x in as_tuple(first))
    for _ in range(4):
        assert same_bits(function(*inputs), first)


@needs_cuda
def test_same_bits_on_every_stream(call):
    """Also where the inputs are still being computed on that stream when the call is made."""
    function, make = call
    inputs = make("cuda")
    expected = function(*inputs)
    late = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for x in late:
                x.zero_()
            torch.cuda._sleep(20_000_000)  # about 10 ms: a kernel on another stream would read zeros
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
            found = function(*late)
        stream.synchronize()
        assert same_bits(found, expected)


@needs_cuda
def test_the_host_does_not_wait(call):
    function, make = call
    inputs = make("cuda")
    function(*inputs)  # kernels are compiled at the first call
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(SYNC_DEBUG)
    try:
        function(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def replayed(function, make):
    """The results of a captured graph on new inputs, and the eager ones."""
    static, fresh = make("cuda"), make("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)
    for x, y in zip(static, fresh, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    found = tuple(x.clone() for x in as_tuple(out))
    return found, function(*fresh)


@needs_cuda
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_replay_has_the_eager_bits(name):
    found, expected = replayed(*GRAPHS[name])
    assert same_bits(found, expected)


@needs_cuda
@pytest.mark.parametrize("name", sorted(CALLS.keys() - GRAPHS.keys()))
def test_graph_replay_of_layers(name):
    """cuBLAS may choose another algorithm under capture: as close as two orders of float32 sums."""
    function, make = CALLS[name]
    found, expected = replayed(function, make)
    for a, b in zip(found, as_tuple(expected), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.double().abs().max()))


@needs_two
def test_another_device_than_the_current_one(call):
    function, make = call
    inputs = make("cuda:0")
    expected = function(*inputs)
    assert torch.cuda.current_device() == 0
    found = function(*(x.to("cuda:1") for x in inputs))
    assert all(x.device == torch.device("cuda", 1) for x in as_tuple(found))
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
