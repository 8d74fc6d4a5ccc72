"""Recurrent layers, one linear map a time step: every step is a use of the same weights, cross terms count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch_private import builtins
from ..recording import Recorder
from .products import linear


def _lstm(x: Tensor, h: Sequence[Tensor], w: Sequence[Tensor | None], tape: Recorder) -> tuple[Tensor, ...]:
    i, f, g, o = (x + linear(h[0], w[0], w[1], tape=tape)).chunk(4, 1)
    c = f.sigmoid() * h[1] + i.sigmoid() * g.tanh()
    y = o.sigmoid() * c.tanh()
    return (y if w[2] is None else linear(y, w[2], tape=tape)), c


def _gru(x: Tensor, h: Sequence[Tensor], w: Sequence[Tensor | None], tape: Recorder) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), linear(h[0], w[0], w[1], tape=tape).chunk(3, 1)
    z = (xz + hz).sigmoid()
    return ((1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h[0],)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable:
    def cell(x: Tensor, h: Sequence[Tensor], w: Sequence[Tensor | None], tape: Recorder) -> tuple[Tensor, ...]:
        return (activation(x + linear(h[0], w[0], w[1], tape=tape)),)

    return cell


CELLS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn(torch.tanh), "rnn_relu": _rnn(torch.relu)}


def recurrent(name: str, *args, tape: Recorder):
    """Do what `torch.nn.LSTM`, `GRU` and `RNN` call.

    Arguments: (input, hx, weights, bias?, layers, dropout, train, bidirectional?, batch_first) or, for packed
    sequences, (data, batch sizes, hx, weights, ...).
    """
    cell = CELLS[name]
    packed = isinstance(args[3], (list, tuple))
    if packed:
        data, sizes, hx, weights, biased, layers, dropout, train, both = args
        steps = list(data.split(sizes.tolist()))
    else:
        data, hx, weights, biased, layers, dropout, train, both, first = args
        steps = list(data.unbind(1 if first else 0))
    states = list(hx) if name == "lstm" else [hx]
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)
    finals: list[list[Tensor]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w = list(weights[k * each : (k + 1) * each])
            w_ih, w_hh, *rest = w
            b_ih, b_hh = rest[:2] if biased else (None, None)
            projection = rest[-1] if len(rest) > (2 if biased else 0) else None
            h = [s[k] for s in states]
            out: list[Tensor] = []
            ended: list[list[Tensor]] = []  # states of packed sequences that are over, forwards
            for x in reversed(steps) if direction else steps:
                here = len(x)
                if here < len(h[0]):
                    ended.append([s[here:] for s in h])
                    h = [s[:here] for s in h]
                elif here > len(h[0]):
                    h = [torch.cat([s, full[k][len(s) : here]]) for s, full in zip(h, states, strict=True)]
                if direction and packed and not out:
                    h = [s[:here] for s in h]
                    ended = []
                h = list(cell(linear(x, w_ih, b_ih, tape=tape), h, (w_hh, b_hh, projection), tape))
                out.append(h[0])
            for rest_of in reversed(ended):
                h = [torch.cat(pair) for pair in zip(h, rest_of, strict=True)]
            finals.append(h)
            outputs.append(out[::-1] if direction else out)
        steps = [torch.cat(states, 1) for states in zip(*outputs, strict=True)] if both else outputs[0]
        if dropout and train and layer < layers - 1:
            steps = [builtins.dropout(x, dropout, True) for x in steps]
    y = torch.cat(steps) if packed else torch.stack(steps, 1 if first else 0)
    return y, *(torch.stack(states) for states in zip(*finals, strict=True))


def recurrent_cell(name: str, input: Tensor, hx, w_ih, w_hh, b_ih=None, b_hh=None, *, tape: Recorder):
    """Do what `torch.nn.LSTMCell`, `GRUCell` and `RNNCell` call."""
    h = hx if name == "lstm_cell" else (hx,)
    cell = CELLS[name.removesuffix("_cell")]
    out = cell(linear(input, w_ih, b_ih, tape=tape), h, (w_hh, b_hh, None), tape)
    return out if name == "lstm_cell" else out[0]
