"""Steps on the pretend GPU: the numbers of the CPU, no tensor on the wrong device, and how often the host waits."""

import copy

import pytest
import torch
from pretend import DEVICE, Gpu, Pretend, to_device, values
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO

import projgrad
from projgrad.tape.check import exact_convolutions

aten = torch.ops.aten

N, T, VOCABULARY = 6, 5, 11
pytestmark = [pytest.mark.same_without_extension, pytest.mark.filterwarnings("ignore:no rule covers")]


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.again = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        q, k, v = self.attention(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(self.again(x))))


class Decoder(nn.Module):
    def __init__(self, layers: int, tied: bool, d: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, d), nn.Embedding(T, d)
        self.blocks = nn.ModuleList([Block(d) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def perceptron():
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, VOCABULARY))


def next_token(logits, ids):
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


def steps(model, retain, forget, count, waited=None, **options):
    """Parameters after some steps of OrthoGrad and the last record; where the last step waited."""
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.01), **options)
    for _ in range(count):
        if waited is not None:
            waited.clear()
        record = unlearner.step(lambda: forget(model).mean(), lambda: retain(model))
    return {name: p.detach() for name, p in model.named_parameters()}, record


def on_both(model, inputs, loss, count=3, **options):
    """The same steps on the CPU and on the pretend GPU; the GPU with what it counted."""
    twin = copy.deepcopy(model)
    expected, record = steps(model, *(lambda m, x=x: loss(m(x), x) for x in inputs), count, **options)
    with Gpu() as gpu:
        moved = [Pretend(x) for x in inputs]
        closures = (lambda m, x=x: loss(m(x), x) for x in moved)
        found, again = steps(to_device(twin), *closures, count, gpu.waited, **options)
        assert all(p.device == DEVICE for p in found.values())
    return (expected, record), (values(found), again), gpu


def check(first, second, relative):
    (expected, record), (found, again) = first, second
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=relative, atol=relative)
    assert again.rank == record.rank and again.refinements == record.refinements
    assert again.preserved_norm == pytest.approx(record.preserved_norm, rel=1e-6)
    assert again.retain_loss == pytest.approx(record.retain_loss, rel=1e-6)


# Where a step waits: for the solution together with the losses and the lengths of p.grad, and for the self-check. What
# a graph is like was found in the first step. Besides, for whether positions that are looked up occur once each.
SOLVED, END, POSITIONS = "tape/systems.py", "tape/project.py", "recording/structure.py"
MODES = {
    "global": {},
    "two_passes": {"keep_output_gradients": False, "alpha": 0.0, "ascend": False},
    "per_tensor": {"scope": "per_tensor"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, layers, tied", [("global", 24, True), ("two_passes", 2, False), ("per_tensor", 24, False)]
)
def test_waits_of_a_decoder(mode, layers, tied):
    """However many layers it has."""
    options = MODES[mode]
    torch.manual_seed(0)
    ids = [torch.randint(VOCABULARY, (n, T)) for n in (N, 4)]
    *both, gpu = on_both(Decoder(layers, tied).double(), ids, next_token, 2, **options)
    check(*both, 1e-9)
    found = [where.split(":")[0] for where, count in gpu.waited.items() for _ in range(count)]
    assert sorted(found) == sorted([SOLVED, END, POSITIONS])


@pytest.mark.parametrize("mode", ["global", "per_tensor"])
def test_launches_of_a_decoder(mode):
    """Layers of equal shape are one group: a step starts few more kernels than the same step without projection."""
    torch.manual_seed(0)
    model = Decoder(16, True)
    with Gpu() as gpu:
        to_device(model)
        ids = [Pretend(torch.randint(VOCABULARY, (n, T))) for n in (N, 4)]
        closures = [lambda m, x=x: next_token(m(x), x) for x in ids]
        steps(model, *closures, 2, **MODES[mode])
        gpu.launched = 0
        steps(model, *closures, 1, **MODES[mode])
        ours, gpu.launched = gpu.launched, 0
        for closure in closures:
            closure(model).mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert ours <= 1.35 * gpu.launched


@pytest.mark.parametrize("mode", MODES)
def test_waits_of_a_perceptron(mode):
    """Single positions: the gradient to project is used as the factors it is made of."""
    options = MODES[mode]
    torch.manual_seed(0)
    x = [torch.randn(n, 16, dtype=torch.float64) for n in (N, 4)]
    *both, gpu = on_both(perceptron().double(), x, lambda y, x: y.square().mean(1), **options)
    check(*both, 1e-9)
    assert [where.split(":")[0] for where in gpu.waited.elements()] == [SOLVED, END]


@pytest.mark.parametrize("mode", ["global", "per_tensor"])
def test_refinement_is_decided_by_the_numbers_of_the_cpu(mode):
    """In float32, of gradients so nearly parallel that both refine, whatever the kernels round to."""
    torch.manual_seed(0)
    x = [torch.randn(1, 16) + 3e-4 * torch.randn(N, 16), torch.randn(4, 16)]
    *both, _ = on_both(perceptron(), x, lambda y, x: y.square().mean(1), 1, **MODES[mode])
    (expected, record), (found, again) = both
    assert record.refinements > 0 and again.refinements > 0 and record.rank == again.rank
    assert max(record.residual, again.residual) <= 1e-6
    for name, p in expected.items():  # what tells the gradients apart has four digits
        torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-5)


class Rounded(TorchDispatchMode):
    """Convolutions as of cuDNN: where torch lets it, and so by default, the last 13 bits of float32 are dropped."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        at = {aten.convolution.default: 2, aten.convolution_backward.default: 3}.get(func, 0)
        if torch.backends.cudnn.conv.fp32_precision == "tf32":
            args = (*((x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in args[:at]), *args[at:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("mode", ["global", "two_passes", "per_tensor"])
def test_convolutions_in_tf32_raise_no_false_alarm(mode, n):
    """No false alarm of the self-check, and orthogonal to the gradients of what the GPU computed."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
    ]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    x, y = 2 + torch.randn(n, 3, 12, 12), torch.arange(n) % 5
    u = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def record():
        with projgrad.per_sample(model) as tape:
            losses = F.cross_entropy(model(x), y, reduction="none")
        return tape, losses

    with Rounded(), Gpu():
        to_device(model)
        x, y = Pretend(x), Pretend(y)
        for name, p in model.named_parameters():
            p.grad = Pretend(u[name])
        tape, losses = record()
        scope, keep = "per_tensor" if mode == "per_tensor" else "global", mode == "global"
        done = tape.project_(losses, scope, keep_output_gradients=keep)
        tape, losses = record()
        with exact_convolutions(mode == "two_passes"):
            found = {name: p.grad for name, p in model.named_parameters()}
            v, K = tape.dot(losses, found).inner, tape.gram(losses).inner
    length = torch.cat([g.inner.double().flatten() for g in found.values()]).norm()
    assert (v.abs() / K.diagonal().sqrt() / length).max() <= 1e-6 and done.residual <= 1e-6
    assert torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.backends.cudnn.allow_tf32


CASES = """linear_3d conv2d conv2d_groups conv_transpose2d layer_norm batch_norm2d embedding_padding_idx
    embedding_bag_offsets embedding_bag_weighted lstm attention routed_experts relative_bias lerp checkpoint
    packed_weight_sliced tied_autoencoder weight_norm opaque_function"""


@pytest.mark.parametrize("name", CASES.split())
def test_products_of_the_zoo_are_those_of_the_cpu(name):
    case = ZOO[name]()
    twin = copy.deepcopy(case.model)
    expected = products(case, case.model, case.inputs, torch.ones(case.n, dtype=torch.float64))
    with Gpu():
        inputs = [Pretend(x) for x in case.inputs]
        found = products(case, to_device(twin), inputs, torch.ones(case.n, dtype=torch.float64, device=DEVICE))
    torch.testing.assert_close(values(found), expected, rtol=1e-9, atol=1e-12)


def products(case, model, inputs, add):
    def record():
        with projgrad.per_sample(model) as tape:
            losses = case.loss(model, *inputs)
        return tape, losses

    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tape, losses = record()
    found = [tape.gram(losses), tape.dot(losses, {name: torch.ones_like(p) for name, p in params.items()})]
    found += [tape.combine(losses, add), *tape.moments(losses)]
    for scope in ("global", "per_tensor"):
        tape, losses = record()
        for p in params.values():
            p.grad = torch.ones_like(p)
        tape.project_(losses, scope, add=add)
        found.append({name: p.grad for name, p in params.items()})
    return found


def test_a_table_indexed_from_the_cpu():
    """Torch allows it on a GPU."""
    torch.manual_seed(0)
    table, ids = nn.Embedding(7, 3).double(), torch.tensor([[0, 3], [3, 3], [6, 1]])
    with projgrad.per_sample(table) as tape:
        losses = table.weight[ids].square().sum((1, 2))
    expected = tape.gram(losses)
    with Gpu() as gpu:
        to_device(table)
        with projgrad.per_sample(table) as tape:
            losses = table.weight[ids].square().sum((1, 2))
        torch.testing.assert_close(values(tape.gram(losses)), expected)
    assert gpu.waited


def test_the_pretend_gpu_itself():
    x = torch.arange(6.0)
    with Gpu() as gpu:
        y = torch.arange(6.0, device=DEVICE)
        assert y.device == DEVICE and (y * 2).is_cuda and y.new_zeros(2).is_cuda and torch.zeros_like(y).is_cuda
        assert not gpu.waited
        for wait in (y.tolist, lambda: float(y.sum()), lambda: y[y > 2], y.cpu, lambda: x.to(DEVICE), y.unique):
            before = gpu.waited.total()
            wait()
            assert gpu.waited.total() > before
        for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: y[:, None] @ x[None], lambda: y.add_(x)):
            with pytest.raises(RuntimeError, match=r"on the CPU .* meets one on cuda:0"):
                mixed()
