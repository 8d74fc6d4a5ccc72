"""PGU on models of all kinds: which weights it projects, and what it says of the others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pretend import Gpu, Pretend, to_device, values
from published_pgu import fitted, sgd
from torch import nn

from projgrad.methods.pgu.pgu import PGU
from projgrad.tape.check import exact_convolutions

F64 = torch.float64
pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:PGU protects nothing")]


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


def test_all_uses_of_a_weight_are_summed_or_it_is_frozen():
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
def test_attention_has_the_moments_of_its_queries_keys_and_values(kind):
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
def test_pgu_projects_every_matrix_of_a_language_model(name):
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


def test_pgu_projects_the_adapters_of_a_language_model():
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
