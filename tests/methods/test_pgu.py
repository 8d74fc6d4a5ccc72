"""PGU: its bases against the published construction, what a step does and leaves alone."""

import copy
import math

import published_pgu
import pytest
import torch
import torch.nn.functional as F
from published_pgu import NETWORKS, angle, correlated, fitted, parameters, perceptron, sgd
from torch import nn

from projgrad.methods.pgu import spectra
from projgrad.methods.pgu.input_moments import InputMoments, _pieces
from projgrad.methods.pgu.loss import unlearning_loss
from projgrad.methods.pgu.pgu import PGU

F64 = torch.float64
pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:PGU protects nothing")]


# The subspaces


@pytest.mark.parametrize("name", NETWORKS)
def test_bases_span_the_published_subspaces(name):
    model = NETWORKS[name]().double()
    x = torch.randn(24, 3, 16, 16, dtype=F64)
    model(x)  # statistics of the norms
    model.eval()
    pgu = PGU(model, sgd(model), gamma=0.95).fit(x.split(10))
    published = published_pgu.bases(model, x, 0.95, strided=False)
    right = published_pgu.bases(model, x, 0.95, strided=True)
    assert {f"{layer}.weight" for layer in right} == set(pgu.bases)
    assert sum(M.shape[1] > 0 for M in right.values()) >= len(right) - 1
    strided = 0
    for layer, M in right.items():
        ours = pgu.bases[f"{layer}.weight"].M[0]
        assert ours.shape == M.shape and M.shape[1] < M.shape[0]
        assert angle(ours, M) <= 1e-6
        if getattr(model.get_submodule(layer), "stride", (1, 1)) == (1, 1):
            assert published[layer].shape == M.shape and angle(ours, published[layer]) <= 1e-6
        else:
            strided += 1
            assert published[layer].shape != M.shape or angle(ours, published[layer]) > 1e-3
    assert strided == {"AllCNN": 2, "SmallVGG": 0, "ResNet-18": 6}[name]


# module, input without the samples
LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear_3d": (lambda: nn.Linear(7, 5), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 7, 8)),
    "stride": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0)), (3, 7, 9)),
    "dilation": (lambda: nn.Conv2d(3, 5, 3, dilation=(2, 1), padding=2), (3, 7, 8)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, stride=2), (6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 7, 8)),  # one side more
    "valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 6, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2, dilation=2), (4, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (6, 4, 3)),
    "transposed_groups": (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2, dilation=2), (6, 5)),
    "transposed_3d": (lambda: nn.ConvTranspose3d(4, 2, 2), (4, 2, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_in_the_span_are_left_alone(name, monkeypatch):
    """With all directions of the training inputs kept, a step changes what the layer makes of others, but not of them.
    That is what the projection is for."""
    monkeypatch.setattr(spectra, "rank", lambda values, *_: (values > 1e-12 * values[:, :1]).sum(-1))
    build, shape = LAYERS[name]
    layer = build().double()
    channels = (1,) * (len(shape) - 1) + shape[-1:] if "linear" in name else shape[:1] + (1,) * (len(shape) - 1)
    few = torch.randn(1, *channels, dtype=F64).expand(1, *shape).contiguous()  # patches differ only at the border
    other = torch.randn(5, *shape, dtype=F64)
    pgu = PGU(layer, sgd(layer)).fit([few])
    before = layer(few).detach(), layer(other).detach()
    record = pgu.step(lambda: layer(other).square().sum())
    moved = [(layer(x) - y).abs().max().item() for x, y in zip((few, other), before, strict=True)]
    assert 0 < record.rank < record.width and record.residual < 1e-13
    assert moved[1] > 0.1 and moved[0] < 1e-12 * moved[1], moved


@pytest.mark.parametrize("name", LAYERS)
def test_moments_reproduce_the_map(name):
    """trace(W C Wᵀ) is the squared norm of what the layer's matrix makes of all rows; chunked to single rows alike."""
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(3, *shape, dtype=F64)
    moments = InputMoments({"weight": layer.weight})
    with torch.no_grad(), moments:
        y = layer(x)
    W, C = moments.views["weight"].matrix(layer.weight), moments.moments["weight"]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # patches of the output overlap: compare rows with channels
        rows = x.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)
        torch.testing.assert_close(C, rows.mT @ rows)
        d, m = torch.randn_like(W), moments.views["weight"]
        assert m.weight(d, layer.weight.shape).shape == layer.weight.shape
        torch.testing.assert_close(m.matrix(m.weight(d, layer.weight.shape)), d)
        return
    shape = [1, -1] + [1] * (y.ndim - 2)
    y = y - (layer.bias.view(shape) if isinstance(layer, nn.modules.conv._ConvNd) else layer.bias)
    torch.testing.assert_close((W @ C * W).sum(), y.square().sum())


def test_pieces_are_all_rows():
    x = torch.randn(2, 3, 4, 5, 2, 2)
    whole = x.double().reshape(2, 60, 4)
    for budget in (1, 200, 1000, 5000, 1 << 20):
        pieces = list(_pieces(x, 2, budget))
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=0)
        assert all(p.numel() * 8 <= max(budget, 64) for p in pieces)


# Ranks


def test_both_rules_by_hand():
    j = torch.arange(1, 1153, dtype=F64)
    assert int(spectra.rank(1 / j**2, 0.9, "singular")) == 537  # 46.6 %
    assert int(spectra.rank(1 / j**2, 0.9, "energy")) == 5  # 0.4 %
    values = torch.tensor([[16.0, 9.0, 4.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=F64)
    assert spectra.rank(values, 0.7).tolist() == [2, 0, 0]  # 4/10, 7/10, 9/10, 1
    assert spectra.rank(values, 0.69).tolist() == [1, 0, 0]
    assert spectra.rank(values, 0.7, "energy").tolist() == [1, 0, 0]  # 16/30, 25/30


def test_gamma_by_layer_sets_each_rank_and_freezes_at_one():
    model = perceptron()
    pgu = PGU(model, sgd(model), {"0.weight": 1.0, "2.weight": 0.3, "default": 0.9}).fit([correlated(30, 6)])
    assert set(pgu.bases) == {"2.weight", "4.weight"} and pgu.frozen["0.weight"] == "gamma is 1"
    for name, gamma in (("2.weight", 0.3), ("4.weight", 0.9)):
        assert pgu.bases[name].rank == int(spectra.rank(pgu.cache.spectra[name].values[0], gamma))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 6, dtype=F64)
    pgu.step(lambda: model(x).square().mean())
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"2.weight", "4.weight"}
    model(x).sum().backward()
    pgu.project_()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == changed


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_groups_of_different_rank(soft):
    layer = nn.Conv1d(4, 4, 1, groups=2, bias=False).double()
    x = torch.zeros(3, 4, 5, dtype=F64)
    x[:, :2] = torch.randn(3, 2, 5)  # the second group sees nothing
    pgu = PGU(layer, sgd(layer), 0.99999, soft=soft).fit([x])
    assert pgu.bases["weight"].ranks == [1, 0]  # of two directions the last is never counted
    layer(torch.randn(2, 4, 3, dtype=F64)).square().sum().backward()
    grad = layer.weight.grad.clone()
    pgu.project_()
    assert torch.equal(layer.weight.grad[2:], grad[2:]) and not torch.equal(layer.weight.grad[:2], grad[:2])
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_what_updates_can_still_act_on(soft):
    """By the inputs themselves; groups are summed, inputs of zeros have nothing to act on."""
    pgu, x, _ = fitted(soft=soft)
    M = pgu.bases["0.weight"].applied[0]
    assert list(pgu.exposed) == list(pgu.bases)
    assert pgu.exposed["0.weight"] == pytest.approx(float((x - x @ M @ M.T).square().sum() / x.square().sum()))
    layer = nn.Conv1d(4, 2, 1, groups=2).double()
    x = torch.randn(3, 4, 5, dtype=F64)
    pgu = PGU(layer, sgd(layer), 0.7, soft=soft).fit([x])
    left = [part - M @ M.T @ part for part, M in zip(x.chunk(2, 1), pgu.bases["weight"].applied, strict=True)]
    assert pgu.exposed["weight"] == pytest.approx(float(torch.cat(left).square().sum() / x.square().sum()))
    assert PGU(layer, sgd(layer)).fit([0 * x]).exposed["weight"] == 0


def test_a_first_direction_that_holds_all_is_pointed_out():
    model = perceptron()
    with pytest.warns(UserWarning, match=r"protects nothing of 0.weight.* larger gamma"):
        PGU(model, sgd(model), 0.5, "energy").fit([torch.randn(9, 6, dtype=F64) + 50])


# Steps


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
def test_a_step_written_out(dtype):
    pgu, x, y = fitted(dtype)
    model, eps = pgu.model, torch.finfo(dtype).eps
    before = dict(zip(dict(model.named_parameters()), parameters(model), strict=True))
    loss = unlearning_loss(model(x[:5]), y[:5])
    grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in pgu.bases])
    record = pgu.step(lambda: (model(x[:5]), y[:5]))
    projected = []
    for (name, kept), D in zip(pgu.bases.items(), grads, strict=True):
        M = kept.M[0].double()
        projected.append(D.double() - D.double() @ M @ M.T)
        expected = before[name].double() - 0.1 * projected[-1]
        bound = 8 * eps * (expected.abs() + D.double().norm())
        assert ((model.get_parameter(name).double() - expected).abs() <= bound).all()
        assert record.ranks[name] == M.shape[1]
    ratio = math.hypot(*(d.norm() for d in projected)) / math.hypot(*(d.double().norm() for d in grads))
    assert record.preserved_norm == pytest.approx(ratio, rel=16 * eps)
    assert record.residual <= 64 * eps and record.forget_loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.rank == sum(record.ranks.values()) and record.width == 6 + 10 + 8
    for name in ("0.bias", "2.bias", "4.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_autocast_does_not_reach_the_projection():
    pgu, x, y = fitted(torch.float32)
    loss = F.cross_entropy(pgu.model(x), y)
    grads = []
    for enabled in (False, True):
        pgu.model.zero_grad()
        loss.backward(retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            residual = pgu.project_().residual
        grads.append([pgu.model.get_parameter(name).grad.clone() for name in pgu.bases] + [torch.tensor(residual)])
    assert all(map(torch.equal, *grads))


def test_ascend_raises_the_loss_and_descend_lowers_it():
    for ascend, sign in ((True, 1), (False, -1)):
        pgu, x, y = fitted(ascend=ascend, gamma=0.3)
        before = F.cross_entropy(pgu.model(x[:5]), y[:5]).item()
        pgu.step(lambda pgu=pgu, x=x, y=y: F.cross_entropy(pgu.model(x[:5]), y[:5]))
        assert sign * (F.cross_entropy(pgu.model(x[:5]), y[:5]).item() - before) > 0


def test_max_norm_bounds_the_step_of_pgu():
    pgu, x, y = fitted(max_norm=1e-3)
    before = parameters(pgu.model)
    pgu.step(lambda: 1e3 * F.cross_entropy(pgu.model(x[:5]), y[:5]))
    moved = math.hypot(*((a - b).norm() for a, b in zip(before, parameters(pgu.model), strict=True)))
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-5)


def test_soft_projection_follows_its_equation_and_hardens_at_zero():
    """By its equation, and the hard one for soft → 0."""
    pgu, x, y = fitted(soft=0.5)
    (U, values), kept = pgu.cache.spectra["2.weight"], pgu.bases["2.weight"]
    k = kept.rank
    w = values[0, :k] / (values[0, :k] + 0.5 * values[0].mean())
    F.cross_entropy(pgu.model(x), y).backward()
    D = pgu.model[2].weight.grad.clone()
    pgu.project_()
    torch.testing.assert_close(pgu.model[2].weight.grad, D - D @ (U[0, :, :k] * w) @ U[0, :, :k].T)
    hard, nearly = (spectra.basis(pgu.cache.spectra["2.weight"], 0.8, "singular", s, F64).applied for s in (0.0, 1e-9))
    torch.testing.assert_close(nearly, hard, rtol=0, atol=1e-7)


def test_loss_by_its_formula():
    logits, labels = torch.randn(6, 4, dtype=F64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1)
    own = p[torch.arange(6), labels]
    expected = -(1 - (own - 0.05)).log().mean() - 0.2 * -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(unlearning_loss(logits, labels), expected)
    assert torch.autograd.gradcheck(unlearning_loss, (logits, labels))
    masked = torch.cat([logits.detach(), torch.full((6, 1), -math.inf)], 1).requires_grad_()  # a class that cannot be
    loss = unlearning_loss(masked, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(masked.grad[:, :4], torch.autograd.grad(expected, logits)[0])
    sure = torch.tensor([[80.0, 0.0]], requires_grad=True)
    loss = unlearning_loss(sure, torch.tensor([0]), offset=0.0)  # log(1 - p) with p that rounds to 1
    assert loss.item() == pytest.approx(80.0, rel=1e-6)
    loss.backward()
    assert sure.grad.tolist() == [[pytest.approx(1.0), pytest.approx(-1.0)]]
