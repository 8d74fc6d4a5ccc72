"""What docs/replacing.md says: reference projectors as people have them, and what stands in for each, side by side."""

import copy
import itertools
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import projgrad
from bench import replacing
from bench.replacing import published_update
from projgrad import projectors

N = 6


class Problem:
    """A model, both losses, and the loss of one sample as vmap wants it."""

    def __init__(self, kind="cnn", dtype=torch.float32):
        torch.manual_seed(0)
        if kind == "cnn":
            layers = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(72, 5)
            shape = 1, 14, 14
        else:
            layers = nn.Linear(20, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5)
            shape = (20,)
        self.model = nn.Sequential(*layers).to(dtype)
        self.params = dict(self.model.named_parameters())
        self.xf, self.yf = torch.randn(4, *shape, dtype=dtype), torch.randint(5, (4,))
        self.x, self.y = torch.randn(N, *shape, dtype=dtype), torch.randint(5, (N,))

    def forget(self):
        return F.cross_entropy(self.model(self.xf), self.yf)

    def retain(self):
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def loss_of_one(self, params, x, y):
        return F.cross_entropy(functional_call(self.model, params, (x[None],)), y[None])

    def published(self, alpha, mask=None, loss_of_one=None):
        loss = loss_of_one or self.loss_of_one
        return list(published_update(self.model, self.forget(), loss, (self.x, self.y), alpha, mask).values())

    def ours(self, retain=None, alpha=0.5, **options):
        """The update and its record; the weights stay."""
        optimizer = torch.optim.SGD(self.params.values(), lr=0.0)
        record = projgrad.OrthoGrad(self.model, optimizer, alpha, **options).step(self.forget, retain or self.retain)
        return [p.grad for p in self.params.values()], record

    def explicit(self):
        """u [p] and G [n, p]."""
        params = list(self.params.values())
        flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])  # noqa: E731
        return flat(self.forget()), torch.stack([flat(loss) for loss in self.retain()])


def distance(update, reference):
    a, b = (torch.cat([t.double().flatten() for t in some]) for some in (update, reference))
    return float((a - b).norm() / b.norm())


# The published loop, and QR.


@pytest.mark.same_without_extension
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_published_loop_makes_the_same_update(kind, alpha):
    problem = Problem(kind)
    update, record = problem.ours(alpha=alpha, scope="per_tensor")
    assert distance(update, problem.published(alpha)) <= 2e-5
    assert record.tensors["0.weight"].rank == N


@pytest.mark.same_without_extension
def test_the_published_loop_takes_out_directions_that_no_gradient_has():
    """Of samples that repeat; the truth is in float64, tensor by tensor."""
    problem = Problem("mlp")
    problem.x[3:], problem.y[3:] = problem.x[:3], problem.y[:3]
    u, G = problem.explicit()
    sizes = [p.numel() for p in problem.params.values()]
    truth = [projectors.lstsq(a, b) for a, b in zip(u.split(sizes), G[:3].split(sizes, 1), strict=True)]
    update, record = problem.ours(alpha=0.0, scope="per_tensor")
    assert distance([-g for g in update], truth) <= 2e-5 and record.tensors["0.weight"].rank == 3
    loop = dict(zip(problem.params, problem.published(0.0), strict=True))
    assert distance(loop.values(), [-t for t in truth]) > 1e-2
    bias = problem.params["3.bias"]  # five elements, three gradients: the loop takes out all of it
    assert loop["3.bias"].abs().max() < 1e-6 and bias.grad.abs().max() > 1e-3


@pytest.mark.same_without_extension
def test_of_zero_gradients_the_published_loop_takes_out_the_first_coordinates():
    problem = Problem("mlp")
    nothing = lambda params, x, y: 0.0 * problem.loss_of_one(params, x, y)  # noqa: E731
    u = torch.autograd.grad(problem.forget(), list(problem.params.values()))
    for g, whole in zip(problem.published(0.0, loss_of_one=nothing), u, strict=True):
        expected = -whole.flatten()
        expected[:N] = 0.0
        torch.testing.assert_close(g.flatten(), expected)
    update, record = problem.ours(lambda: 0.0 * problem.retain(), alpha=0.0, scope="per_tensor")
    assert record.rank == 0 and distance(update, [-g for g in u]) <= 1e-6


@pytest.mark.same_without_extension
def test_the_loop_leaves_nothing_of_a_channel_that_no_retain_sample_uses():
    torch.manual_seed(0)
    problem = Problem("mlp")
    problem.model = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 5))
    problem.params = dict(problem.model.named_parameters())
    with torch.no_grad():
        problem.model[0].weight[0] = torch.eye(20)[0]
        problem.x[:, 0], problem.xf[:, 0] = -5.0, 5.0
    (u, *_), G = problem.explicit()[0].split([80, 4, 20, 5])[1:], problem.explicit()[1][:, 80:84]
    assert u[0] and not G[:, 0].any() and N > 4
    update, _ = problem.ours(alpha=0.0, scope="per_tensor")
    torch.testing.assert_close(update[1][0], -u[0])
    assert abs(problem.published(0.0)[1][0]) < 1e-6


@pytest.mark.same_without_extension
def test_qr_as_the_projector_keeps_the_behaviour_of_qr():
    problem = Problem("mlp")
    nothing = lambda params, x, y: 0.0 * problem.loss_of_one(params, x, y)  # noqa: E731
    update, _ = problem.ours(lambda: 0.0 * problem.retain(), alpha=0.0, scope="per_tensor", projector=projectors.qr)
    assert distance(update, problem.published(0.0, loss_of_one=nothing)) <= 2e-5


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_vmap_and_qr_of_all_tensors_as_one(kind):
    problem = Problem(kind)
    u, G = problem.explicit()
    Q = torch.linalg.qr(G.mT).Q
    expected = 0.3 * G.mean(0) - 0.7 * (u - Q @ (Q.mT @ u))
    assert distance(problem.ours(alpha=0.3)[0], [expected]) <= 2e-5
    assert distance([0.3 * G.mean(0) - 0.7 * projgrad.project_out(u, G)], [expected]) <= 2e-5


def test_least_squares_of_torch():
    """Its default driver on the CPU finds the rank of repeated rows; it does not see a row of 1e-20."""
    u, G = torch.randn(300), torch.randn(8, 300)
    by_torch = lambda G: u - torch.linalg.lstsq(G.mT, u).solution @ G  # noqa: E731
    assert distance([projgrad.project_out(u, G)], [by_torch(G)]) <= 2e-5
    twice = torch.cat([G, G])
    assert distance([projgrad.project_out(u, twice)], [by_torch(twice)]) <= 2e-5
    tiny = G * torch.cat([torch.ones(7), torch.tensor([1e-20])])[:, None]
    truth = projectors.lstsq(u, G)
    assert distance([projgrad.project_out(u, tiny)], [truth]) <= 2e-5
    assert distance([by_torch(tiny)], [truth]) > 1e-3


# One row: PCGrad and A-GEM.


def surgery(gradients):
    """PCGrad: each gradient loses what points against the others, as they were at first; their sum."""
    total = torch.zeros_like(gradients[0])
    for i, g in enumerate(gradients):
        for j, other in enumerate(gradients):
            if i != j and g @ other < 0:
                g = g - (g @ other) / (other @ other) * other
        total = total + g
    return total


def test_pcgrad_of_two_tasks():
    """The forget objective in both senses: in one of them it is in conflict with the mean retain loss."""
    problem, conflicts = Problem("mlp"), []
    u, G = problem.explicit()
    for ascend in (True, False):
        d, r = -u if ascend else u, G.mean(0)
        conflicts.append(bool(d @ r < 0))
        mine = [projgrad.project_out(a, b[None]) if a @ b < 0 else a for a, b in ((d, r), (r, d))]
        assert distance([mine[0] + mine[1]], [surgery([d, r])]) <= 2e-5
        optimizer = torch.optim.SGD(problem.params.values(), lr=0.0)
        method = projgrad.baselines.PCGrad(problem.model, optimizer, alpha=0.5, ascend=ascend)
        method.step(problem.forget, problem.retain)
        assert distance([2 * p.grad.flatten() for p in problem.params.values()], [surgery([d, r])]) <= 2e-5
    assert sorted(conflicts) == [False, True]


def test_three_tasks_depend_on_their_order_and_a_span_does_not():
    g = torch.randn(3, 4)
    g[1], g[2] = g[1] - 2 * g[0], g[2] - 2 * g[0]
    assert (g[1:] @ g[0] < 0).all()
    taken = []
    for order in ((1, 2), (2, 1)):
        d = g[0]
        for other in g[list(order)]:
            d = d - (d @ other).clamp(max=0) / (other @ other) * other
        taken.append(d)
    assert distance(taken[:1], taken[1:]) > 1e-2
    spans = [projgrad.project_out(g[0], g[list(order)]) for order in ((1, 2), (2, 1))]
    assert (spans[0] - spans[1]).norm() <= 1e-5 * g[0].norm()


def test_a_gem_is_one_row_where_it_is_active():
    first, r = torch.randn(2, 500)
    for g in (first, -first):
        averaged = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
        mine = projgrad.project_out(g, r[None]) if g @ r < 0 else g
        assert distance([mine], [averaged]) <= 2e-5
    nothing = torch.zeros(500)
    assert torch.equal(projgrad.project_out(g, nothing[None]), g)  # where the formula divides 0 by 0
    assert (g - (g @ nothing) / (nothing @ nothing) * nothing).isnan().all()


# GEM: inequalities.


def gem(g, R, margin=0.0):
    """The dual of GEM: min over v ≥ margin of ‖g + Rᵀ v‖², by trying all sets of multipliers at their bound."""
    g, R = g.double(), R.double()
    best = None
    for free in itertools.product((False, True), repeat=len(R)):
        free = torch.tensor(free)
        v = torch.full((len(R),), margin, dtype=torch.float64)
        rest = g + v[~free] @ R[~free]
        if free.any():
            v[free] = torch.linalg.lstsq(R[free].mT, -rest).solution
        if (v >= margin - 1e-12).all() and (best is None or (g + v @ R).norm() < best[0].norm()):
            best = g + v @ R, v > 0
    return best


def test_gem_leaves_alone_what_helps_already():
    torch.manual_seed(0)
    differed = 0
    for _ in range(20):
        R = torch.randn(3, 40)
        g = torch.randn(40) + torch.randn(3) @ R
        result, active = gem(g, R)
        assert (R.double() @ result >= -1e-6).all()
        equal = projgrad.project_out(g, R)
        assert (R @ equal).abs().max() <= 1e-4  # all inner products are zero here
        assert distance([projgrad.project_out(g, R[active]) if active.any() else g], [result]) <= 2e-5
        if not active.all():
            differed += 1
            assert (equal - result).norm() > 1e-2 * result.norm()
            assert (result - g).norm() < (equal - g).norm()
    assert differed > 5
    helps = torch.linalg.pinv(R) @ torch.ones(3)  # an inner product of 1 with every row
    assert distance([gem(helps, R)[0]], [helps]) == 0.0 and projgrad.project_out(helps, R).norm() < 1e-5


def test_the_margin_of_gem_is_no_projection():
    g, R = torch.tensor([1.0, -1.0, 2.0]), torch.eye(3)[:2]
    assert torch.equal(gem(g, R)[0], torch.tensor([1.0, 0.0, 2.0]).double())
    assert torch.equal(projgrad.project_out(g, R), torch.tensor([0.0, 0.0, 2.0]))
    torch.testing.assert_close(gem(g, R, margin=0.5)[0], torch.tensor([1.5, 0.0, 2.0]).double())
    torch.testing.assert_close(gem(g, R, margin=3.0)[0], torch.tensor([4.0, 2.0, 2.0]).double())


# Gradient projection memory.


def memory(inputs, threshold):
    """M Mᵀ of the leading directions of inputs [rows, i] that hold less than the threshold of the energy."""
    U, S, _ = torch.linalg.svd(inputs.mT, full_matrices=False)
    energy = S.square().cumsum(0) / S.square().sum()
    return U[:, : int((energy < threshold).sum())]


@pytest.mark.parametrize("threshold", [0.7, 0.95])
def test_gradient_projection_memory(threshold):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4, bias=False)
    model = nn.Sequential(*layers)
    x = torch.randn(20, 2, 6, 6)
    patches = F.unfold(x, 3, stride=2, padding=1).mT.flatten(0, 1)  # [20 * 9, 18]
    bases = {"0.weight": memory(patches, threshold), "3.weight": memory(model[:3](x).detach(), threshold)}
    F.cross_entropy(model(torch.randn(8, 2, 6, 6)), torch.randint(4, (8,))).backward()
    expected = {}
    for name, p in model.named_parameters():
        D, M = p.grad.flatten(1), bases[name]
        expected[name] = (D - D @ (M @ M.mT)).view_as(p)
        assert distance([projgrad.basis_project(D, M)], [expected[name]]) <= 2e-5
    pgu = projgrad.PGU(model, torch.optim.SGD(model.parameters(), lr=0.1), threshold, "energy").fit([x])
    pgu.project_()
    assert {name: basis.rank for name, basis in pgu.bases.items()} == {name: M.shape[1] for name, M in bases.items()}
    for name, p in model.named_parameters():
        assert distance([p.grad], [expected[name]]) <= 2e-5


# A mask, a mean, a distillation loss.


@pytest.mark.same_without_extension
def test_with_a_mask_the_published_loop_projects_nothing():
    """Where each tensor has n independent gradients outside of the mask; else it takes out arbitrary directions."""
    problem = Problem("mlp", torch.float64)
    generator = torch.Generator().manual_seed(1)
    mask = {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in problem.params.items()}
    wide = [name for name, p in problem.params.items() if p.ndim == 2]
    u, G = problem.explicit()
    sizes = [p.numel() for p in problem.params.values()]
    u, means = (dict(zip(problem.params, t.split(sizes), strict=True)) for t in (u, G.mean(0)))
    update = dict(zip(problem.params, problem.published(0.5, mask), strict=True))
    for name in wide:
        m = mask[name].flatten()
        torch.testing.assert_close(update[name].flatten(), 0.5 * ~m * means[name] - 0.5 * m * u[name])
    moved = torch.cat([(mask[name] * update[name]).flatten() for name in problem.params])
    cosines = G @ moved / G.norm(dim=1) / moved.norm()
    assert cosines.abs().max() > 0.05  # no retain loss is protected
    mask["0.weight"] = torch.ones_like(mask["0.weight"])
    update = dict(zip(problem.params, problem.published(0.0, mask), strict=True))
    assert not update["0.weight"].flatten()[:N].any() and update["0.weight"].flatten()[N:].all()
    optimizer = torch.optim.SGD(problem.params.values(), lr=0.1)
    unlearner = projgrad.OrthoGrad(problem.model, optimizer, 0.0, metric="optimizer", mask=mask)
    unlearner.step(problem.forget, problem.retain)
    moved = torch.cat([p.grad.flatten() for p in problem.params.values()])
    assert (G @ moved / G.norm(dim=1) / moved.norm()).abs().max() <= 1e-10 and moved.any()


@pytest.mark.same_without_extension
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_one_mean_loss_is_one_row(scope):
    problem = Problem()
    u, G = problem.explicit()
    mean, sizes = G.mean(0), [p.numel() for p in problem.params.values()]
    parts = [(u, mean)] if scope == "global" else zip(u.split(sizes), mean.split(sizes), strict=True)
    expected = [-(a - (a @ b) / (b @ b) * b) for a, b in parts]
    update, record = problem.ours(lambda: problem.retain().mean().reshape(1), alpha=0.0, scope=scope)
    assert distance(update, expected) <= 2e-5
    assert record.rank == (1 if scope == "global" else len(sizes))


@pytest.mark.same_without_extension
def test_distillation_losses_one_a_sample():
    """The divergence from a frozen teacher, whose batch mean of a batch of one is what the published code takes."""
    problem = Problem("mlp")
    teacher = copy.deepcopy(problem.model).requires_grad_(False)
    with torch.no_grad():
        for p in problem.params.values():
            p.add_(0.1 * torch.randn_like(p))

    def of_one(params, x, y):
        student = functional_call(problem.model, params, (x[None],)).log_softmax(1)
        return F.kl_div(student, teacher(x[None]).softmax(1), reduction="batchmean")

    def retain():
        return F.kl_div(problem.model(problem.x).log_softmax(1), teacher(problem.x).softmax(1), reduction="none").sum(1)

    update, record = problem.ours(retain, alpha=0.5, scope="per_tensor")
    assert distance(update, problem.published(0.5, loss_of_one=of_one)) <= 2e-5
    assert record.tensors["0.weight"].rank == N


@pytest.mark.same_without_extension
def test_the_first_step_of_distillation_protects_nothing():
    """Of a student that is its teacher: gradients are rounding, of which both ways take out n directions."""
    problem = Problem("mlp")
    target = problem.model(problem.x).softmax(1).detach()
    retain = lambda: F.kl_div(problem.model(problem.x).log_softmax(1), target, reduction="none").sum(1)  # noqa: E731
    _, G = problem.explicit()
    update, record = problem.ours(retain, alpha=0.0)
    moved = torch.cat([g.flatten() for g in update])
    assert abs(record.retain_loss) < 1e-6 and record.rank > 0
    assert (G @ moved / G.norm(dim=1) / moved.norm()).abs().max() > 0.01
    problem.y = target.argmax(1)
    update, record = problem.ours(alpha=0.0)
    assert record.retain_loss > 0.1 and record.rank == N and record.residual < 1e-6


# The command that measures.


@pytest.mark.same_without_extension
def test_the_command_compares_and_times_every_contender(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["replacing", "--tiny", "--rounds", "2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        replacing.main()
    assert end.value.code is None
    lines = (tmp_path / "replacing_cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + len(replacing.CONTENDERS) and len(capsys.readouterr().out.splitlines()) == len(lines) - 1
    row = dict.fromkeys(replacing.COLUMNS, 1.0) | {"case": "a", "contender": "b", "reference": "c", "error": 3e-5}
    monkeypatch.setattr(replacing, "rows_of", lambda *_: [row])
    with pytest.raises(SystemExit) as end:
        replacing.main()
    assert end.value.code == "b is wrong by 3.0e-05\n"
