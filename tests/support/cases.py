"""One list of inputs for all ops: name -> (u, G) in float64, to be rounded to the dtype under test."""

import importlib.util

import pytest
import torch

TRITON = importlib.util.find_spec("triton") is not None  # it has no build for some systems: all but CUDA works there
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
N, P = 6, 300


def _rows(n=N, p=P):
    return torch.randn(n, p, dtype=torch.float64)


def _scaled(*scales):
    G = _rows()
    for j, scale in enumerate(scales):
        G[j] *= scale
    return G


def _duplicated():
    G = _rows()
    G[3], G[5] = G[0], -2 * G[1]
    return G


def _zero():
    G = _rows()
    G[0], G[4] = 0, 0
    return G


def _u(G, m=None):
    return torch.randn(*(() if m is None else (m,)), G.shape[1], dtype=torch.float64)


def _pair(G, m=None):
    return _u(G, m), G


CASES = {
    "random": lambda: _pair(_rows()),
    "duplicated": lambda: _pair(_duplicated()),
    "zero_rows": lambda: _pair(_zero()),
    "all_zero": lambda: _pair(_rows() * 0),
    "tiny": lambda: _pair(_scaled(1e-20, 1, 1e-20)),
    "huge": lambda: _pair(_scaled(1, 1e15, 1, 1e15)),
    "tiny_and_huge": lambda: _pair(_scaled(1e-20, 1e15, 1, 1e-20, 1e15)),
    "correlated": lambda: _pair(_rows() + 30 * _rows(1)),
    "more_samples_than_parameters": lambda: _pair(_rows(12, 7)),
    "as_many": lambda: _pair(_rows(5, 5)),
    "u_in_span": lambda: (lambda G: (torch.ones(N, dtype=torch.float64) @ G, G))(_rows()),
    "u_zero": lambda: (lambda G: (0 * G[0], G))(_rows()),
    "directions": lambda: _pair(_rows(), 3),
    "no_direction": lambda: _pair(_rows(), 0),
    "transposed_storage": lambda: _pair(torch.randn(P, N, dtype=torch.float64).mT),
    "every_other": lambda: (torch.randn(2 * P, dtype=torch.float64)[::2], _rows(2 * N, 2 * P)[::2, ::2]),
    "one_sample": lambda: _pair(_rows(1)),
    "one_parameter": lambda: _pair(_rows(2, 1)),
    "no_samples": lambda: _pair(_rows(0)),
    "no_parameters": lambda: _pair(_rows(3, 0)),
    "odd_sizes": lambda: _pair(_rows(67, 331), 2),
    "many_chunks": lambda: _pair(_rows(9, 20_011)),
}

# These do not survive rounding to bfloat16 or float16: out of range, or no longer what their name says.
FLOAT_ONLY = {"tiny", "huge", "tiny_and_huge", "correlated", "u_in_span"}


def implementations(table):
    """The names in a table of implementations; Triton's interpreter and the emulator never meet the extension."""
    mark = pytest.mark.same_without_extension
    return [pytest.param(x, marks=mark) if "triton" in x or "emulated" in x else x for x in table]


def make(name, dtype, device="cpu"):
    """u and G of a case, with their strides."""

    def convert(t):
        out = torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device)
        return out.copy_(t)

    torch.manual_seed(0)
    u, G = CASES[name]()
    return convert(u), convert(G)


def _layer(n, t, i, o):
    return torch.randn(n, t, i, dtype=torch.float64), torch.randn(n, t, o, dtype=torch.float64)


def _scaled_layer(*scales):
    a, b = _layer(5, 3, 20, 30)
    for j, scale in enumerate(scales):
        b[j] *= scale
    return a, b


def _padded_layer():
    a, b = _layer(4, 9, 20, 30)
    b[1, 3:], b[2] = 0, 0
    return a, b


# The factors of one linear layer: name -> (a [n, t, i], b [n, t, o]) in float64.
FACTORS = {
    "random": lambda: _layer(6, 5, 33, 17),
    "one_position": lambda: _layer(9, 1, 64, 48),
    "no_position_dimension": lambda: tuple(x[:, 0] for x in _layer(9, 1, 64, 48)),
    "one_sample": lambda: _layer(1, 7, 20, 30),
    "one_of_all": lambda: _layer(1, 1, 1, 1),
    "long": lambda: _layer(3, 130, 40, 9),
    "wide_output": lambda: _layer(4, 3, 5, 301),
    "wide_input": lambda: _layer(4, 3, 301, 5),
    "many_samples": lambda: _layer(67, 3, 19, 23),
    "tiny": lambda: _scaled_layer(1e-20, 1, 1e-20),
    "huge": lambda: _scaled_layer(1, 1e15, 1, 1e15),
    "tiny_and_huge": lambda: _scaled_layer(1e-20, 1e15, 1, 1e-20),
    "padded": _padded_layer,
    "transposed_storage": lambda: tuple(x.mT.contiguous().mT for x in _layer(6, 5, 33, 17)),
    "positions_first": lambda: tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in _layer(6, 5, 33, 17)),
    "every_other": lambda: tuple(x[::2, ::2, ::2] for x in _layer(12, 10, 66, 34)),
    "no_samples": lambda: _layer(0, 3, 20, 30),
    "no_positions": lambda: _layer(3, 0, 20, 30),
    "no_inputs": lambda: _layer(3, 2, 0, 30),
    "no_outputs": lambda: _layer(3, 2, 20, 0),
}


def make_factors(name, dtypes, device="cpu"):
    """a and b of a layer in their dtypes, with their strides."""
    torch.manual_seed(0)
    return tuple(
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
        for x, dtype in zip(FACTORS[name](), dtypes, strict=True)
    )
