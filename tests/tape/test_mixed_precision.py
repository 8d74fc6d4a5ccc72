"""Models of several floating-point types: no step is refused for rounding, updates are as orthogonal as that allows."""

import math

import pytest
import torch
from steps import MODES
from torch import nn
from torch.nn import functional as F
from zoo import ZOO
from zoo.adapters import LLAMA
from zoo.case import next_token, to_ramp
from zoo.language import VOCABULARY, llama, tokens

import projgrad
from projgrad.tape.check import WeightStats, check_relative_error

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
pytestmark = [
    pytest.mark.same_without_extension,
    pytest.mark.filterwarnings("error:no rule covers", "error:the . losses are mixed"),
]


def rows(params, losses):
    """g_j (n, p) in float64: one backward pass of the same graph for every loss."""
    found = []
    for loss in losses:
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([g.double().flatten() for g in grads]))
    return torch.stack(found)


def cosine(G, params):
    """max_j |cos(g_j, update)| of what is in p.grad."""
    update = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in params])
    assert update.isfinite().all() and update.norm() > 0
    return float(((G @ update).abs() / G.norm(dim=1).clamp_min(1e-300) / update.norm()).max())


def known_to(dtype, t=1):
    """max_j |cos| that the arithmetic allows: g_j is a sum of t products, each rounded by eps / 2 and added with
    log2(t) + 1 roundings more, and what is written to p.grad is rounded like g_j."""
    return torch.finfo(dtype).eps * (2 + math.log2(t))


# (model, closure of a step, the type that limits what is known of g_j, positions that a gradient adds up)


class LowRank(nn.Module):
    """W x + B A x, with W in 16 bits and A, B in float32, as adapters are built by default."""

    def __init__(self, base, i, o, r=4):
        super().__init__()
        self.base = nn.Linear(i, o).to(base).requires_grad_(False)
        self.a, self.b = nn.Linear(i, r, bias=False), nn.Linear(r, o, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x.float())).to(x.dtype)


def written_low_rank(base):
    model = nn.Sequential(LowRank(base, 16, 32), nn.GELU(), LowRank(base, 32, 8))

    def closure(step):
        x, y = torch.randn(4 + 2 * step, 5, 16).to(base), torch.randint(8, (4 + 2 * step, 5))
        return lambda: F.cross_entropy(model(x).float().mT, y, reduction="none").mean(1)

    return model, closure, base, 5


def peft_low_rank(base):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama().to(base), peft.LoraConfig(task_type="CAUSAL_LM", **LLAMA)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    assert all(p.dtype == F32 for p in model.parameters() if p.requires_grad)

    def closure(step):
        ids = tokens(3 + 2 * step, 8)
        return lambda: next_token(model(input_ids=ids, use_cache=False).logits.float(), ids)

    return model, closure, base, 8


class Norm(nn.Module):
    """As in transformers: in float32 whatever the model is."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Inside(nn.Module):
    """A part that works in another type than what is around it."""

    def __init__(self, part, dtype):
        super().__init__()
        self.part, self.dtype = part.to(dtype), dtype

    def forward(self, x):
        return self.part(x.to(self.dtype)).to(x.dtype)


class Autocast(nn.Module):
    def __init__(self, part, dtype):
        super().__init__()
        self.part, self.dtype = part, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.part(x).float()


def between(middle, outside, limit):
    """Linear layers around something of another type."""
    model = nn.Sequential(nn.Linear(8, 12).to(outside), nn.Tanh(), middle, nn.Linear(12, 5).to(outside))

    def closure(step):
        x = torch.randn(4 + step, 3, 8, dtype=outside)
        return lambda: to_ramp(model(x).tanh())

    return model, closure, limit, 3


class Shuffled(nn.Module):
    """Tokens in an order that no operation proves, as experts take them."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        rows = x.flatten(0, 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
        return self.part(rows[order])[order.argsort()].view(x.shape)


def block():
    return nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 12))


MIXED = {
    "low_rank_bfloat16": lambda: written_low_rank(BF16),
    "low_rank_float16": lambda: written_low_rank(F16),
    "peft_bfloat16": lambda: peft_low_rank(BF16),
    "peft_float16": lambda: peft_low_rank(F16),
    "float32_norm_in_float64": lambda: between(Norm(12).double(), F64, F32),
    "float32_block_in_float64": lambda: between(Inside(block(), F32), F64, F32),
    "bfloat16_block_in_float32": lambda: between(Inside(block(), BF16), F32, BF16),
    "float16_block_in_float32": lambda: between(Inside(block(), F16), F32, F16),
    "shuffled_bfloat16": lambda: between(Shuffled(Inside(block(), BF16)), F32, BF16),
    "shuffled_float16": lambda: between(Shuffled(Inside(block(), F16)), F32, F16),
    "shuffled_float32": lambda: between(Shuffled(Inside(block(), F32)), F64, F32),
    "bfloat16_block_in_float64": lambda: between(Inside(block(), BF16), F64, BF16),
    "autocast_region_bfloat16": lambda: between(Autocast(block(), BF16), F32, BF16),
    "autocast_region_float16": lambda: between(Autocast(block(), F16), F32, F16),
}


def run(model, closure, bound, mode, steps=4):
    params = [p for p in model.parameters() if p.requires_grad]
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(params, lr=1e-2), alpha=0.0, **MODES[mode])
    for step in (0, 1, *[0] * (steps - 2)):  # also another number of samples, and the same again
        retain, forget = closure(step), closure(0)
        G = rows(params, retain())
        record = unlearner.step(lambda forget=forget: forget().mean(), retain)
        assert cosine(G, params) <= bound, (step, record)
        assert record.rank >= len(G) and record.discrepancy <= 5e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MIXED)
def test_every_step_is_orthogonal_as_far_as_the_arithmetic_goes(name, mode):
    model, closure, limit, t = MIXED[name]()
    run(model, closure, known_to(limit, t), mode)


@pytest.mark.parametrize("in_float64", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama_grouped_queries", "t5", "mixtral_batched_experts", "mamba"])
def test_transformers_in_float64_whose_norms_are_in_float32(name, mode, in_float64):
    """As they are, and with everything in float64."""
    case = ZOO[name]()
    loss = case.loss if in_float64 else case.loss.__wrapped__
    vocabulary = VOCABULARY

    def closure(step):
        inputs = [
            torch.randint(3, vocabulary, x.shape) if x.dtype == torch.long and x.max() > 1 else x for x in case.inputs
        ]
        return lambda: loss(case.model, *inputs)

    t = case.inputs[0].shape[1]
    run(case.model, closure, 1e-9 if in_float64 else known_to(F32, t), mode, steps=3)


class Narrow(nn.Module):
    """Weights in float64 that are multiplied in float32."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 48).double(), nn.Linear(48, 3).double()

    def forward(self, x):
        for layer in (self.first, self.last):
            x = F.linear(x, layer.weight.float(), layer.bias.float()).tanh()
        return x


@pytest.mark.parametrize("metric", ["gradient", "optimizer"])
@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("parts", [1, 2])
def test_float64_weights_that_are_multiplied_in_float32(parts, scope, metric):
    torch.manual_seed(0)
    model, x, y = Narrow(), torch.randn(10, 16), torch.arange(10) % 3
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=0.1), metric=metric, scope=scope)
    loss = F.cross_entropy
    chunks = zip(x.chunk(parts), y.chunk(parts), strict=True)
    retains = projgrad.micro_batches(lambda x, y: loss(model(x), y, reduction="none"), chunks)
    record = unlearner.step(lambda: loss(model(x[:4] + 1), y[:4]), retains if parts > 1 else retains[0])
    assert record.residual < (1e-4 if parts > 1 else 1e-6)


@pytest.mark.parametrize("difference", [1e-3, 1e-8, 1e-11, 1e-15])
def test_numbers_that_disagree_are_printed_with_the_digits_in_which_they_do(difference):
    with pytest.raises(ArithmeticError, match=r"disagree \((\S+) against (?!\1)\S+\)"):
        weights = WeightStats(1.0, 1.0, 1.0, 1.0, 0.0)
        check_relative_error("squared_norm", 1.0 + difference, weights, 0.0, difference / 4, F64, str)


# float16: what plain training can do, a step can do.


def classifier(half=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
    return model.half() if half else model


def half_losses(model, x, y):
    with torch.autocast("cpu", F16, enabled=model[0].weight.dtype == F32):
        logits = model(x)
    return F.cross_entropy(logits.float().mT, y, reduction="none").mean(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("n, t", [(4, 1), (8, 16), (16, 64), (64, 2)])
def test_float16_is_not_refused_nor_done_by_a_loop(n, t, half, mode):
    """Without a scaler, in the model's own type or under autocast: whatever plain gradients are finite."""
    model = classifier(half)
    x, y = torch.randn(n, t, 16).to(model[0].weight.dtype), torch.randint(8, (n, t))
    retain = lambda: half_losses(model, x, y)  # noqa: E731
    params = list(model.parameters())
    G = rows(params, retain())
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(params, lr=0.0), alpha=0.0, **MODES[mode])
    for _ in range(2):
        unlearner.step(lambda: half_losses(model, x.flip(0), y).mean(), retain)
        update = torch.cat([p.grad.double().flatten() for p in params])
        smallest = 2.0**-25 * update.norm() * G.shape[1] ** 0.5  # entries of g_j below it are lost
        u = torch.cat(
            [g.double().flatten() for g in torch.autograd.grad(half_losses(model, x.flip(0), y).mean(), params)]
        )
        size = update.norm() if mode != "per_tensor" else u.norm()  # or of what was projected, where little is left
        limit = known_to(F16, t) * torch.maximum(size, u.norm()) * G.norm(dim=1) + smallest
        assert ((G @ update).abs() <= limit).all()


def training():
    """A model that stays as it is, so that both ways meet the same gradients; its optimizer, and the steps it took."""
    model, taken = classifier(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: taken.append(1))
    return model, optimizer, taken, torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [4, 33, 64])
@pytest.mark.parametrize("growing", [False, True])
def test_a_scaler_does_what_it_does_in_plain_training(growing, n, mode):
    """It skips the same steps, and its scale grows and falls alike."""
    histories = []
    for plain in (True, False):
        model, optimizer, taken, scaler = training()
        # The forget gradient has the weight 1 - alpha = 1, like the mean loss of plain training.
        unlearner = projgrad.OrthoGrad(model, optimizer, alpha=0.0, scaler=scaler, **MODES[mode])
        history = []
        for step in range(14):
            k = n + growing * step
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(k, 2, 16, generator=generator), torch.randint(8, (k, 2), generator=generator)
            losses = lambda model=model, x=x, y=y: half_losses(model, x, y)  # noqa: E731
            if plain:
                optimizer.zero_grad()
                scaler.scale(losses().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                unlearner.step(lambda losses=losses: losses().mean(), losses)
            history.append((scaler.get_scale(), len(taken)))
        histories.append(history)
    assert histories[0] == histories[1]
    assert 0 < histories[0][-1][1] < 14  # it did grow until a step was skipped


@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("mode", MODES)
def test_a_real_overflow_in_float16_is_skipped(mode, where):
    model, scaler = classifier(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = torch.randn(6, 2, 16), torch.randint(8, (6, 2))
    unlearner = projgrad.OrthoGrad(model, torch.optim.SGD(model.parameters(), lr=1e-3), scaler=scaler, **MODES[mode])

    def step(factor):
        loss = lambda name: half_losses(model, x, y) * (factor if name == where else 1.0)  # noqa: E731
        return unlearner.step(lambda: loss("forget").mean(), lambda: loss("retain"))

    assert not step(1.0).skipped
    before = [p.detach().clone() for p in model.parameters()]
    step(1e6)  # gradients of 1e9 at the logits
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not step(1.0).skipped
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
