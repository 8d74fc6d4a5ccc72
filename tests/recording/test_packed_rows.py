"""Several sequences in one row of the batch, and weights that the forward pass itself changes."""

import oracle
import pytest
import torch
from steps import ERROR, MODES, check, close, record, trained, truth
from torch import nn
from torch.nn import functional as F
from zoo.case import to_ramp
from zoo.functional import Uses

import projgrad

pytestmark = pytest.mark.usefixtures("float64")

no_loop = pytest.mark.filterwarnings("error:no rule covers", "error:the . losses are mixed")


class Packed(nn.Module):
    """A language model with block-diagonal attention and positions that start anew."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(19, 8), nn.Embedding(16, 8)
        self.qkv, self.norm, self.out = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 19)

    def forward(self, ids, places, mask):
        h = self.tokens(ids) + self.places(places)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # [rows, heads, t, 4]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).flatten(2)
        return self.out(self.norm(h + y))


def packed(rows, shared=0):
    """Owners [b, t], places and mask of rows of sequences with these lengths; the first `shared` tokens of a row are
    seen by all of its sequences."""
    owner, start = [], 0
    for row in rows:
        owner.append(torch.repeat_interleave(torch.arange(start, start + len(row)), torch.tensor(row)))
        start += len(row)
    owner = torch.stack(owner)
    places = torch.stack([torch.cat([torch.arange(k) for k in row]) for row in rows])
    t = owner.shape[1]
    mask = (owner[:, :, None] == owner[:, None]) & torch.ones(t, t, dtype=torch.bool).tril()
    mask[:, :, :shared] |= torch.arange(t)[:, None] >= torch.arange(shared)
    return owner, places, mask


def _by_mask(losses, owner, n):
    mask = (owner == torch.arange(n)[:, None]).to(losses.dtype)
    return (mask * losses).sum(1) / mask.sum(1)


def _by_split(losses, owner, n):
    return torch.stack([part.sum() for part in losses.split(torch.bincount(owner, minlength=n).tolist())])


REDUCED = {
    "index_add": lambda l, owner, n: l.new_zeros(n).index_add(0, owner, l),
    "scatter_add": lambda l, owner, n: l.new_zeros(n).scatter_add(0, owner, l),
    "mask": _by_mask,
    "matrix": lambda l, owner, n: F.one_hot(owner, n).to(l.dtype).mT @ l,
    "split": _by_split,
    "segments": lambda l, owner, n: torch.segment_reduce(l, "sum", lengths=torch.bincount(owner, minlength=n), axis=0),
}

# Lengths of the sequences in every row, step by step: as many tokens and samples, other borders.
ROWS = {
    "one_row": [[[4, 4, 4]], [[2, 7, 3]], [[6, 1, 5]], [[4, 4, 4]]],
    "two_rows": [[[6, 6], [6, 6]], [[5, 7], [4, 8]], [[12], [2, 6, 4]], [[6, 6], [6, 6]]],
}


def losses_of(model, reduce, batch, ids):
    owner, places, mask = batch
    n = int(owner.max()) + 1
    targets = ids.roll(-1, 1)
    losses = F.cross_entropy(model(ids, places, mask).flatten(0, 1), targets.flatten(), reduction="none")
    last = owner.roll(-1, 1) != owner  # its next token belongs to another sequence
    last[:, -1] = True
    return REDUCED[reduce](losses * ~last.flatten(), owner.flatten(), n)


@no_loop
@pytest.mark.parametrize("reduce", REDUCED)
@pytest.mark.parametrize("name", ROWS)
def test_sequences_of_other_lengths_in_every_step(name, reduce):
    model = Packed()
    for rows in ROWS[name]:
        batch, ids = packed(rows), torch.randint(19, (len(rows), sum(rows[0])))
        check(model, lambda batch=batch, ids=ids: losses_of(model, reduce, batch, ids))


@no_loop
@pytest.mark.parametrize("name", ROWS)
def test_they_are_the_sequences_alone(name):
    """Not only one loss of the graph at a time: every sequence in a row of its own."""
    model = Packed()
    for rows in ROWS[name]:
        ids = torch.randint(19, (len(rows), sum(rows[0])))
        batch = packed(rows)
        tape, losses = record(model, lambda batch=batch, ids=ids: losses_of(model, "index_add", batch, ids))
        G = []
        for j in range(len(losses)):
            alone = ids[batch[0] == j][None]
            (loss,) = losses_of(model, "index_add", packed([[alone.shape[1]]]), alone)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            G.append(torch.cat([g.flatten() for g in grads]))
        G = torch.stack(G)
        close(tape.gram(losses), G @ G.mT)


@pytest.mark.filterwarnings("ignore:the . losses are mixed", "ignore:no rule covers")
@pytest.mark.parametrize("name", ["prefix", "running_sum"])
def test_what_sequences_share_is_refused_or_exact(name):
    """Tokens that two sequences look at; a sum that runs over the row. Independent before, and again afterwards."""
    model = Packed()

    def closure(together, ids):
        rows = [[2, 7, 3]]
        if name == "prefix":
            return losses_of(model, "index_add", packed(rows, shared=2 * together), ids)
        owner, places, mask = packed(rows)
        h = model(ids, places, mask)
        h = h.cumsum(1) if together else h.tanh()
        return to_ramp(torch.zeros(3, 19).index_add(0, owner[0], h[0].sin()))

    for together in (False, True, False):
        ids = torch.randint(19, (1, 12))
        try:
            check(model, lambda together=together, ids=ids: closure(together, ids))
        except ValueError as error:
            assert together and "the losses share terms" in str(error)


# WeightStats that the forward pass changes.


def _renormed(m, x):
    with torch.no_grad():
        m.w.copy_(torch.renorm(m.w, 2, 0, 0.5))
    return m.tail(F.linear(x, m.w).tanh())


def _clamped(m, x):
    with torch.no_grad():
        m.w.clamp_(-0.3, 0.3)
    return m.tail(F.linear(x, m.w).tanh())


def _standardised(m, x):
    with torch.no_grad():
        m.w.sub_(m.w.mean(1, keepdim=True)).div_(m.w.std(1, keepdim=True))
    return m.tail(F.linear(x, m.w).tanh())


def _replaced(m, x):
    with torch.no_grad():
        m.w[:] = m.w.clamp(-0.3, 0.3)
        m.w.mul_(1.0).add_(0.0)
    return m.tail(F.linear(x, m.w).tanh())


def _spectral(m, x):
    """A power iteration on the buffers, and a weight made of the parameter."""
    with torch.no_grad():
        m.v = F.normalize(m.w.mT @ m.u, dim=0)
        m.u.copy_(F.normalize(m.w @ m.v, dim=0))
    return m.tail(F.linear(x, m.w / torch.dot(m.u, m.w @ m.v)).tanh())


def _derived(m, x):
    with torch.no_grad():
        m.w.clamp_(-0.5, 0.5)
    standard = (m.w - m.w.mean(1, keepdim=True)) / m.w.std(1, keepdim=True)
    return m.tail(F.linear(x, standard).tanh() + F.linear(x, m.w))


def _between_two_uses(m, x):
    h = x @ m.w.mT.clone()
    with torch.no_grad():
        m.w.clamp_(-0.4, 0.4)
    return m.tail((h + F.linear(x, m.w)).tanh())


CHANGED = [_renormed, _clamped, _standardised, _replaced, _spectral, _derived, _between_two_uses]


@pytest.mark.filterwarnings("ignore:the . losses are mixed")  # a loop is exact too
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("forward", CHANGED)
def test_weights_changed_in_the_forward_pass(forward, mode):
    """The update is orthogonal to the gradients at the weights that the forward pass leaves behind."""
    model = Uses(forward, w=(6, 8))
    model.tail = nn.Linear(6, 3)
    model.register_buffer("u", torch.ones(6))
    model.register_buffer("v", torch.ones(8))
    x = torch.randn(5, 8)
    with torch.no_grad():
        model(x)  # clamped, renormed and so on
    params, seen = trained(model), {}

    def retain():
        seen["u"] = model.u.clone()
        return to_ramp(model(x))

    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.0), alpha=0.0, **MODES[mode])
    for _ in range(3):
        unlearner.step(lambda: to_ramp(model(x.cos())).mean(), retain)
        update = {name: p.grad.clone() for name, p in params.items()}
        model.u.copy_(seen["u"])
        G = truth(model, to_ramp(model(x)))
        for names in [[name] for name in G] if mode == "per_tensor" else [list(G)]:
            g = oracle.matrix({name: G[name] for name in names})
            moved = torch.cat([update[name].flatten() for name in names])
            assert (g @ moved).abs().max() <= ERROR * g.norm() * max(float(moved.norm()), 1e-6)
        with torch.no_grad():
            for p in params.values():
                p.add_(0.1 * torch.randn_like(p))
            model(x)
