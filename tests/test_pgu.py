"""PGU: its bases against the published construction, what a step does and leaves alone, models of all kinds."""

import copy
import math

import published_pgu
import pytest
import torch
import torch.nn.functional as F
from pretend import Gpu, Pretend, to_device, values
from published_pgu import NETWORKS, angle, correlated, fitted, parameters, perceptron, sgd
from torch import nn

from projgrad.methods import spectra
from projgrad.methods.inputs import InputMoments, _pieces
from projgrad.methods.pgu import PGU
from projgrad.methods.pgu_loss import unlearning_loss
from projgrad.tape.check import exact_convolutions

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:PGU protects nothing")


# The subspaces


@pytest.mark.parametrize("name", NETWORKS)
def test_published_subspaces(name):
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


def test_gamma_by_layer():
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


def test_signs():
    for ascend, sign in ((True, 1), (False, -1)):
        pgu, x, y = fitted(ascend=ascend, gamma=0.3)
        before = F.cross_entropy(pgu.model(x[:5]), y[:5]).item()
        pgu.step(lambda pgu=pgu, x=x, y=y: F.cross_entropy(pgu.model(x[:5]), y[:5]))
        assert sign * (F.cross_entropy(pgu.model(x[:5]), y[:5]).item() - before) > 0


def test_clipping():
    pgu, x, y = fitted(max_norm=1e-3)
    before = parameters(pgu.model)
    pgu.step(lambda: 1e3 * F.cross_entropy(pgu.model(x[:5]), y[:5]))
    moved = math.hypot(*((a - b).norm() for a, b in zip(before, parameters(pgu.model), strict=True)))
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-5)


def test_soft_projection():
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


# Models


def warned(pgu, batches, match):
    with pytest.warns(UserWarning, match=match):
        return pgu.fit(batches)


class Tied(nn.Module):
    """An embedding with its head, a weight that is used twice, and others in ways that are no layers."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.stored = nn.Parameter(torch.randn(4, 4))  # inputs first
        self.scale = nn.Parameter(torch.randn(1, 4))
        self.both = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids):
        x = self.mix(self.table(ids))
        x = self.mix(x.tanh()) * self.scale
        x = torch.addmm(x[:, 0], x[:, 1], self.stored) + x[:, 2] @ self.stored
        return self.head(x @ self.both + x @ self.both.T)


def test_uses_of_weights():
    model, ids = Tied().double(), torch.randint(7, (30, 3))
    pgu = warned(PGU(model, sgd(model)), [ids], r"scale \(mul is not.*both \(matmul multiplies other inputs")
    assert set(pgu.bases) == {"mix.weight", "stored"}
    assert pgu.frozen["table.weight"] == "embedding" and "norms" in pgu.frozen["mix.bias"]
    with torch.no_grad():
        e = model.table(ids)
        first, second = e.flatten(0, 1), model.mix(e).tanh().flatten(0, 1)
        x = model.mix(second).view(30, 3, 4) * model.scale
    U, values = pgu.cache.spectra["mix.weight"]
    torch.testing.assert_close((U * values[:, None] @ U.mT)[0], first.T @ first + second.T @ second)
    U, values = pgu.cache.spectra["stored"]
    torch.testing.assert_close((U * values[:, None] @ U.mT)[0], x[:, 1].T @ x[:, 1] + x[:, 2].T @ x[:, 2])
    model(ids).square().sum().backward()
    D, M = model.stored.grad.T.clone(), pgu.bases["stored"].M[0]
    pgu.project_()
    torch.testing.assert_close(model.stored.grad.T, D - D @ M @ M.T)


class Copied(nn.Module):
    """A weight that a layer uses, and again as a part of another tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x):
        packed = torch.zeros(8, 4)
        packed[:4] = self.first.weight
        return self.last(F.linear(self.first(x), packed))


def test_a_weight_written_into_another_tensor_is_frozen():
    model = Copied()
    pgu = warned(PGU(model, sgd(model)), [torch.randn(9, 4)], "first.weight .__setitem__ is not a linear layer's use")
    assert set(pgu.bases) == {"last.weight"}


def test_precision_that_torch_cannot_tell(monkeypatch):
    """As after torch.backends.fp32_precision = "tf32"."""

    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    assert fitted(torch.float32)[0].cache.eps == torch.finfo(torch.float32).eps
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert fitted(torch.float32)[0].cache.eps == 2.0**-7


def test_convolutions_on_a_gpu_are_rounded_unless_told():
    def eps(x, *layers):
        with Gpu():
            model = to_device(nn.Sequential(*copy.deepcopy(layers)).float())
            return PGU(model, sgd(model)).fit([Pretend(x)]).cache.eps

    exact, x = torch.finfo(torch.float32).eps, torch.randn(5, 2, 6)
    convolutional = nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)
    assert eps(x, nn.Linear(6, 3)) == exact and eps(x, *convolutional) == 2.0**-10
    with exact_convolutions(True):
        assert eps(x, *convolutional) == exact


@pytest.mark.parametrize("kind", ["self", "cross", "other_widths"])
def test_attention(kind):
    more = {"kdim": 5, "vdim": 3} if kind == "other_widths" else {}
    model = nn.MultiheadAttention(4, 2, batch_first=True, **more).double().eval()
    q = torch.randn(6, 3, 4, dtype=F64)
    k = q if kind == "self" else torch.randn(6, 5, more.get("kdim", 4), dtype=F64)
    v = q if kind == "self" else torch.randn(6, 5, more.get("vdim", 4), dtype=F64)
    pgu = PGU(model, sgd(model), forward=lambda m, batch: m(*batch)).fit([(q, k, v)])
    rows = {"q_proj_weight": [q], "k_proj_weight": [k], "v_proj_weight": [v]}
    if kind != "other_widths":
        rows = {"in_proj_weight": [q] if kind == "self" else [q, k, v]}
    assert set(pgu.bases) == {*rows, "out_proj.weight"}
    for name, inputs in rows.items():
        U, values = pgu.cache.spectra[name]
        expected = sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x in inputs)
        torch.testing.assert_close((U * values[:, None] @ U.mT)[0], expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers(name):
    from zoo import language

    model = getattr(language, name)().eval()
    ids, mask = language.tokens(6, 5), torch.ones(6, 5, dtype=torch.long)
    batches = [{"input_ids": ids[:4], "attention_mask": mask[:4]}, {"input_ids": ids[4:], "attention_mask": mask[4:]}]
    pgu = PGU(model, sgd(model), gamma=0.6).fit(batches)
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2}
    frozen = {n for n in matrices if pgu.frozen.get(n) == "embedding"}
    assert set(pgu.bases) == matrices - frozen and frozen and len(pgu.bases) >= 8
    pgu.forget(batches[1:])
    logits = lambda: model(**batches[1], use_cache=False).logits[:, -1]  # noqa: E731
    assert pgu.step(lambda: (logits(), ids[4:, -1])).residual < 1e-4


def test_adapters():
    peft = pytest.importorskip("peft")
    from zoo import adapters, language

    config = peft.LoraConfig(task_type="CAUSAL_LM", **adapters.LLAMA)
    model, ids = peft.get_peft_model(language.llama(), config).eval(), language.tokens(6, 5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    pgu = PGU(model, sgd(model), gamma=0.6).fit([{"input_ids": ids}])
    held = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(pgu.cache.spectra) == set(pgu.bases) == held and all("lora" in name for name in held)
    pgu.forget([{"input_ids": ids[:2]}])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pgu.step(lambda: model(ids[:2], labels=ids[:2]).loss)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == held


@pytest.mark.parametrize("zero", ["first", "second"])
def test_adapters_are_protected_where_the_first_matrix_starts_at_zero(zero):
    """Kept inputs lie in 4 of 12 dimensions, up to a thousandth. The second matrix sees three numbers: all matter."""
    torch.manual_seed(0)
    first, second = nn.Linear(12, 3, bias=False), nn.Linear(3, 5, bias=False)
    model = nn.Sequential(first, second).double()
    nn.init.zeros_((first if zero == "first" else second).weight)
    scale = torch.tensor([1.0] * 4 + [1e-3] * 8, dtype=F64)
    kept, gone = scale * torch.randn(60, 12, dtype=F64), torch.randn(8, 12, dtype=F64)
    gamma = {"default": 0.9985, **({"1.weight": 1.0} if zero == "first" else {})}
    pgu = PGU(model, sgd(model), gamma).fit([kept, gone]).forget([gone])
    for _ in range(3):
        pgu.step(lambda: (model(gone) - 1).square().sum())
    moved, exposed = (model(kept).norm() / model(gone).norm()).item(), pgu.exposed
    if zero == "first":
        assert moved < 1e-2 and exposed["0.weight"] < 1e-5
    else:
        assert moved > 0.3 and exposed["1.weight"] > 0.02


def test_a_weight_that_is_only_derived_from_is_frozen():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    pgu = warned(PGU(model, sgd(model)), [torch.randn(9, 4)], r"original1 \(_weight_norm is not a linear layer")
    assert set(pgu.bases) == {"1.weight"}


def test_on_a_pretend_gpu(tmp_path):
    """The numbers of the CPU, no tensor on the wrong device, and how often a step waits for the device."""
    x, y = torch.randn(20, 4, 8, 8), torch.arange(20) % 5
    layers = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    model = nn.Sequential(*layers)

    def step(model, x, y, waited=None):
        PGU(model, sgd(model), 0.7).fit([x[:12], x[12:]]).forget([x[:4]]).save(tmp_path / "cache")
        pgu = PGU.load(tmp_path / "cache", model, sgd(model), 0.7)
        if waited is not None:
            waited.clear()
        return pgu.step(lambda: (model(x[:4]), y[:4]))

    with Gpu() as gpu:
        twin = to_device(copy.deepcopy(model))
        there = step(twin, Pretend(x), Pretend(y), gpu.waited)
    here = step(model, x, y)
    assert (there.ranks, there.preserved_norm, there.residual) == (here.ranks, here.preserved_norm, here.residual)
    assert all(map(torch.equal, model.parameters(), map(values, twin.parameters())))
    assert sum(gpu.waited.values()) == 6  # both ends of the labels, the loss, norms before, after and inside
