"""What several processes do together in tests/methods/test_spread.py: every check runs on all of them at once."""

import contextlib
import copy
import datetime
import functools
import itertools
import runpy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from zoo import ZOO

import projgrad
from projgrad.tape import crossing

COUNTS = {2: (3, 2), 3: (1, 2, 1), 4: (3, 0, 1, 2)}  # retain samples of every process


@dataclass(frozen=True)
class Processes:
    """Those that take part: a mesh, this one's rank, and how many there are."""

    mesh: DeviceMesh

    @property
    def group(self):
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    def part(self, x: torch.Tensor, counts=None, dim: int = 0) -> torch.Tensor:
        """This process's share of samples."""
        counts = counts or COUNTS[self.size]
        return x.narrow(dim, sum(counts[: self.rank]), counts[self.rank])


class Tied(nn.Module):
    """Tokens in, tokens out by the same table, and a part that is frozen in between."""

    def __init__(self):
        super().__init__()
        self.table, self.frozen, self.norm = nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return F.linear(self.norm(torch.tanh(self.frozen(self.table(ids)))), self.table.weight)


def tied(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (n, 4), generator=generator)
    return Tied().double(), ids, ids.roll(1, 1)


def convolutions(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return nn.Sequential(*layers).double(), x, torch.randint(3, (n,), generator=generator)


def adapted(n, seed):
    """A decoder with adapters: GPT-2, in which LoRA lies beside transposed weights."""
    case = ZOO["lora_gpt2"]()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = case.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (n, 5), generator=generator)
    return case.model, ids, ids


MODELS = {"tied": tied, "convolutions": convolutions, "adapted": adapted}


def losses(model, x, y):
    out = model(x)
    out = getattr(out, "logits", out)
    if out.ndim == 2:
        return F.cross_entropy(out, y, reduction="none")
    return F.cross_entropy(out.mT, y, reduction="none").mean(1)


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def build(kind, n, seed=1):
    torch.manual_seed(0)
    return MODELS[kind](n, seed)


def shard(model, mesh, **options):
    """fully_shard, block by block; a table that is used twice stays with the root."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for module in [m for some in lists for m in some] or model.children():
        if not isinstance(module, nn.Embedding) and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model):
    """A copy of all weights, by name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in parameters.items()}


def assert_same(model, single, bound=1e-8, prefix=""):
    found = whole(model)
    for name, p in single.named_parameters():
        error = (found[prefix + name] - p.detach()).norm() / p.detach().norm()
        assert error <= bound, (name, float(error))


def assert_same_bits(model, processes):
    """The weights are the same everywhere, bit by bit."""
    for name, p in whole(model).items():
        bits = p.contiguous().flatten().view(torch.uint8)
        every = [torch.empty_like(bits) for _ in range(processes.size)]
        dist.all_gather(every, bits, group=processes.group)
        assert all(torch.equal(bits, other) for other in every), name


class Twins:
    """One model in one process, and the same spread over several: steps of both on the same samples."""

    def __init__(self, kind, processes, spread, **options):
        self.processes, counts = processes, COUNTS[processes.size]
        self.single, self.x, self.y = build(kind, sum(counts))
        _, self.fx, self.fy = build(kind, 2 * processes.size, seed=2)
        self.model = spread(copy.deepcopy(self.single))
        self.group = options.pop("process_group", None)
        make_optimizer = options.pop("optimizer", sgd)
        self.alone = projgrad.OrthoGrad(self.single, make_optimizer(self.single), **options)
        self.unlearner = projgrad.OrthoGrad(self.model, make_optimizer(self.model), process_group=self.group, **options)

    def step_alone(self):
        forget = lambda: losses(self.single, self.fx, self.fy).mean()  # noqa: E731
        return self.alone.step(forget, lambda: losses(self.single, self.x, self.y))

    def closures(self, model=None):
        model, part = model or self.model, self.processes.part
        twice = (2,) * self.processes.size
        fx, fy, x, y = part(self.fx, twice), part(self.fy, twice), part(self.x), part(self.y)
        if not len(x):  # not every model takes an empty batch
            return dict(forget=lambda: losses(model, fx, fy).mean(), retain=lambda: losses(model, fx, fy)[:0])
        return dict(forget=lambda: losses(model, fx, fy).mean(), retain=lambda: losses(model, x, y))

    def compare(self, steps=2, prefix="", bound=1e-8):
        for _ in range(steps):
            expected, record = self.step_alone(), self.unlearner.step(**self.closures())
            assert record.rank == expected.rank and record.residual <= max(1e-12, expected.residual * 10)
            numbers = ("preserved_norm", "forget_loss", "retain_loss")
            for name in numbers:
                assert abs(getattr(record, name) - getattr(expected, name)) <= 1e-8, name
        assert_same(self.model, self.single, bound, prefix)
        assert_same_bits(self.model, self.processes)
        return record


def replicated(processes, **options):
    return lambda model: DistributedDataParallel(model, process_group=processes.group, **options)


class Uneven(nn.Module):
    """A model of which every process uses other parts: a weight or some of its columns, other rows, other lengths."""

    def __init__(self):
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(9, 6))
        self.extra, self.convolution = nn.Linear(6, 6), nn.Conv1d(1, 2, 3, padding=1)

    def losses(self, x, rank):
        """Of samples [n, t, 6] of a process."""
        h = x @ self.table[torch.tensor([rank, 8 - rank, 4])].mT  # [n, t, 3]
        h = F.linear(x, self.weight) if rank % 2 else h @ self.weight[:, :3].mT
        h = self.extra(h) if rank == 0 else h
        h = self.convolution(torch.tanh(h).flatten(0, 1)[:, None]).unflatten(0, h.shape[:2])
        return h.square().sum((1, 2, 3))

    def forgotten(self, x):
        return self.losses(x, 1).mean() - self.losses(x, 0).sum()


@contextlib.contextmanager
def raises(kind, words):
    try:
        yield
    except kind as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"nothing was raised where {words!r} was expected")


def check_replicas(processes):
    for kind in MODELS:
        for scope in ("global", "per_tensor") if processes.size == 2 else ("per_tensor",):
            Twins(kind, processes, replicated(processes), scope=scope).compare(prefix="module.")
    options = dict(find_unused_parameters=True, gradient_as_bucket_view=True)
    Twins("tied", processes, replicated(processes, **options), alpha=0.3, max_norm=0.1).compare(prefix="module.")


def check_learning_rates_and_damping(processes):
    def two_rates(model):
        first, *rest = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.1)

    Twins("tied", processes, replicated(processes), optimizer=two_rates).compare(prefix="module.")
    Twins("tied", processes, replicated(processes), damping=1e-2).compare(1, prefix="module.")


def check_the_module_inside(processes):
    """The step is given what is inside, and the closures run the wrapper or not."""
    twins = Twins("convolutions", processes, lambda model: model, process_group=processes.group)
    wrapper = DistributedDataParallel(twins.model, process_group=processes.group)
    twins.step_alone()
    twins.unlearner.step(**twins.closures(wrapper))
    twins.compare(1)
    out = losses(
        wrapper, processes.part(twins.x, (1,) * processes.size), processes.part(twins.y, (1,) * processes.size)
    )
    twins.model.zero_grad()
    out.mean().backward()  # the wrapper averages as before
    assert_same_bits(nn.ParameterList([p.grad for p in twins.model.parameters()]), processes)


def check_hard_rows(processes):
    """Gradients that are the same on several processes, zero, tiny and huge, in float32."""
    torch.manual_seed(0)
    model = nn.Linear(20, 3)
    x = torch.randn(6, 20)
    x[1], x[2], x[4] = x[0], 0.0, 1e12 * x[4]
    x[5] *= 1e-18
    fx = torch.randn(4, 20)
    single = copy.deepcopy(model)
    counts = (3, 3) if processes.size == 2 else (1, 2, 3, 0)
    forget, retain = (lambda m: m(fx).square().mean()), (lambda m, x: (m(x) * torch.tensor([1.0, -2, 3])).sum(1))
    record = projgrad.OrthoGrad(single, sgd(single), alpha=0).step(lambda: forget(single), lambda: retain(single, x))
    spread = DistributedDataParallel(model, process_group=processes.group)
    mine = processes.part(x, counts)
    found = projgrad.OrthoGrad(spread, sgd(spread), alpha=0).step(lambda: forget(spread), lambda: retain(spread, mine))
    assert found.rank == record.rank and found.residual <= 1e-6
    assert_same(spread, single, 1e-5, "module.")


def check_micro_batches(processes):
    """The losses of several forward passes, one after the other."""
    twins = Twins("tied", processes, replicated(processes))
    x, y = processes.part(twins.x), processes.part(twins.y)
    pieces = list(zip(x.split(2), y.split(2), strict=True)) if len(x) else [(x, y)]
    twins.step_alone()
    retain = lambda: torch.cat([losses(twins.model, a, b) for a, b in pieces])  # noqa: E731
    twins.unlearner.step(twins.closures()["forget"], retain)
    assert_same(twins.model, twins.single, 1e-8, "module.")


def check_lists_of_micro_batches(processes):
    """Lists of closures, of other lengths and sizes on every process: the step of one process with all samples."""
    for scope, reduction in (("global", "mean"), ("per_tensor", "sum")):
        model, forget, retain, unlearner = lists_of_micro_batches(processes, scope, reduction)
    before = whole(model)
    last = lambda: retain[-1]() * (float("nan") if processes.rank == 1 else 1.0)  # noqa: E731
    with raises(FloatingPointError, "NaN"):
        unlearner.step(forget, [*retain[:-1], last])
    with raises(ValueError, "without closures"):
        unlearner.step(forget, [] if processes.rank == 1 else retain)
    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())


def check_lists_in_the_metric_of_the_optimizer(processes):
    """The same with AdamW; an error after its step, on one process, leaves everything as it was on all of them."""
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for scope in ("global", "per_tensor"):
        more = dict(max_norm=0.5, metric="optimizer", max_passes=400)
        model, forget, retain, unlearner = lists_of_micro_batches(
            processes, scope, "mean", lambda m: adamw(m.parameters()), **more
        )
    before, states = whole(model), copy.deepcopy(list(unlearner.optimizer.state.values()))
    calls = itertools.count()

    def broken():
        if processes.rank == 1 and next(calls):
            raise KeyError("a file is missing")
        return retain[-1]()

    with raises((KeyError, RuntimeError), "a file is missing"):
        unlearner.step(forget, [*retain[:-1], broken])
    assert all(torch.equal(p, before[name]) for name, p in whole(model).items())
    for state, held in zip(unlearner.optimizer.state.values(), states, strict=True):
        assert state.keys() == held.keys() and all(torch.equal(value, held[key]) for key, value in state.items())
    unlearner.step(forget, retain)
    assert_same_bits(model, processes)


def lists_of_micro_batches(processes, scope, reduction, make=sgd, **more):
    """Compare two steps; return the model, the closures of this process, and its unlearner."""
    sizes = {2: ((2, 1), (2,)), 4: ((1, 2), (2,), (1, 1, 1), (1,))}[processes.size]  # of a process's micro-batches
    counts, pieces, times = [sum(some) for some in sizes], sizes[processes.rank], 1 if reduction == "mean" else 2
    single, x, y = build("tied", sum(counts))
    _, fx, fy = build("tied", 2 * processes.size, seed=2)
    model = replicated(processes)(copy.deepcopy(single))
    alone = projgrad.OrthoGrad(single, make(single), scope=scope, alpha=0.4, **more)
    options = dict(scope=scope, alpha=0.4, union_tolerance=1e-9, forget_reduction=reduction)
    unlearner = projgrad.OrthoGrad(model, make(model), **options | more)
    mine = zip(*(processes.part(z, counts).split(pieces) for z in (x, y)), strict=True)
    forgets = zip(*(processes.part(z, (2,) * processes.size).split(1) for z in (fx, fy)), strict=True)
    retain = [lambda a=a, b=b: losses(model, a, b) for a, b in mine]
    forget = [lambda a=a, b=b: losses(model, a, b).mean() for a, b in forgets]
    for _ in range(2):
        expected = alone.step(lambda: times * losses(single, fx, fy).mean(), lambda: losses(single, x, y))
        record = unlearner.step(forget, retain)
        assert record.micro_batches == sum(map(len, sizes)) and record.residual <= 1e-9
        for name in ("preserved_norm", "forget_loss", "retain_loss"):
            assert abs(getattr(record, name) - getattr(expected, name)) <= 1e-7, name
    assert_same(model, single, 1e-7, "module.")
    assert_same_bits(model, processes)
    return model, forget, retain, unlearner


def check_uneven_uses(processes):
    """Shares that are factors of other lengths, gradients in full, and so many that they come in rounds."""
    torch.manual_seed(0)
    single = Uneven().double()
    inputs = [torch.randn(n, 2 + rank, 6, dtype=torch.float64) for rank, n in enumerate(COUNTS[processes.size])]
    mine, before = inputs[processes.rank], crossing.AT_ONCE
    for scope, at_once in itertools.product(("global", "per_tensor"), (before, 500)):
        alone, model = copy.deepcopy(single), copy.deepcopy(single)
        expected = projgrad.OrthoGrad(alone, sgd(alone, 1e-3), scope=scope).step(
            functools.partial(alone.forgotten, inputs[0]),
            lambda m=alone: torch.cat([m.losses(x, rank) for rank, x in enumerate(inputs)]),
        )
        unlearner = projgrad.OrthoGrad(model, sgd(model, 1e-3), scope=scope, process_group=processes.group)
        crossing.AT_ONCE = at_once
        retain = functools.partial(model.losses, mine, processes.rank)
        record = unlearner.step(functools.partial(model.forgotten, inputs[0]), retain)
        crossing.AT_ONCE = before
        assert record.rank == expected.rank
        assert_same(model, alone)


def check_failures(processes):
    """An error on one process stops all of them, changes nothing, and the next step is right."""
    twins = Twins("tied", processes, replicated(processes))
    closures, last = twins.closures(), processes.size - 1
    before = whole(twins.model)

    def broken(closure):
        def run():
            if processes.rank == last:
                raise KeyError("a file is missing")
            return closure()

        return run

    for name in closures:
        kind, words = (KeyError, "missing") if processes.rank == last else (RuntimeError, f"process {last} failed")
        with raises(kind, words):
            twins.unlearner.step(**closures | {name: broken(closures[name])})
    with raises(TypeError if processes.rank == 0 else Exception, "must be a function"):  # before anything is exchanged
        twins.unlearner.step(**closures | ({"forget": 1.0} if processes.rank == 0 else {}))
    made = closures["retain"]() * 1.0
    with raises(ValueError, "forward pass that was made before"):
        twins.unlearner.step(closures["forget"], lambda: made)
    nan = lambda: closures["retain"]() * (float("nan") if processes.rank == 0 else 1)  # noqa: E731
    with raises(FloatingPointError, "NaN or Inf in the losses"):
        twins.unlearner.step(closures["forget"], nan)
    mean = lambda: closures["retain"]().sum() if processes.rank == 0 else closures["retain"]()  # noqa: E731
    with raises(ValueError, "one loss per sample is needed"):
        twins.unlearner.step(closures["forget"], mean)
    with raises(ValueError, "no process has a retain sample"):
        twins.unlearner.step(closures["forget"], lambda: torch.zeros(0))
    with raises(ValueError, "disagree on the options"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model), alpha=0.1 * processes.rank).step(**closures)
    with raises(ValueError, "disagree on the options"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model, 0.1 + processes.rank)).step(**closures)
    with raises(ValueError, "disagree on the options"):
        optimizer = torch.optim.SGD(twins.model.parameters(), lr=0.1, weight_decay=0.1 * processes.rank)
        projgrad.OrthoGrad(twins.model, optimizer).step(**closures)
    with raises(ValueError, "not supported: the projection is made of the rules"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model), keep_output_gradients=False).step(**closures)
    static = DistributedDataParallel(build("tied", 1)[0], process_group=processes.group, static_graph=True)
    with raises(ValueError, "static_graph=True"):
        projgrad.OrthoGrad(static, sgd(static)).step(**twins.closures(static))
    assert all(p.grad is None for p in twins.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    twins.compare(1, prefix="module.")
    if processes.size == 2:
        with raises(ValueError, "over other processes than others"):
            projgrad.OrthoGrad(twins.model, sgd(twins.model), process_group=dist.group.WORLD).step(**closures)
    other = build("tied", 1)[0]
    if processes.rank == 0:
        with torch.no_grad():
            other.table.weight[0, 0] += 1
    with raises(ValueError, "processes 0 and 1 disagree on the weights"):
        projgrad.OrthoGrad(other, sgd(other), process_group=processes.group).step(**twins.closures(other))
    other.norm.weight.requires_grad_(processes.rank == 0)
    with raises(ValueError, "disagree on the parameters"):
        projgrad.OrthoGrad(other, sgd(other), process_group=processes.group).step(**twins.closures(other))


def check_scaler(processes):
    """A step with infinite losses on one process is skipped on all of them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    twins = Twins("tied", processes, replicated(processes), scaler=scaler)
    before, closures = whole(twins.model), twins.closures()
    forget = lambda: closures["forget"]() * (float("inf") if processes.rank == 1 else 1)  # noqa: E731
    assert twins.unlearner.step(forget, closures["retain"]).skipped
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(p, before[name]) for name, p in whole(twins.model).items())
    twins.compare(1, prefix="module.")


def check_shards(processes):
    for kind in MODELS:
        ways = ("global", True), ("per_tensor", False)
        for scope, after in ways if processes.size == 2 else ways[: 1 + (kind == "tied")]:
            spread = lambda model, after=after: shard(model, processes.mesh, reshard_after_forward=after)  # noqa: E731
            twins = Twins(kind, processes, spread, scope=scope, max_norm=0.1)
            with torch.no_grad():
                twins.closures()["forget"]()  # leaves the parameters of the root whole
            twins.compare()
            assert not twins.unlearner._spread.gathers_all  # the graph is known in the second step
            with torch.no_grad():
                twins.closures()["forget"]()
            projgrad.OrthoGrad(twins.model, twins.unlearner.optimizer)  # it finds the shards again


def check_refusals_of_shards(processes):
    twins = Twins("convolutions", processes, lambda model: shard(model, processes.mesh))
    closures, none = twins.closures(), processes.rank == 1
    with raises(ValueError, "runs the model too, on an empty batch"):
        nothing = lambda: closures["retain"]()[:0].detach()  # noqa: E731
        twins.unlearner.step(closures["forget"], nothing if none else closures["retain"])
    scaler = torch.amp.GradScaler("cpu")
    with raises(ValueError, "not supported with fully_shard"):
        projgrad.OrthoGrad(twins.model, sgd(twins.model), scaler=scaler).step(**closures)
    twins.unlearner = projgrad.OrthoGrad(twins.model, sgd(twins.model))
    twins.compare(1)


def check_adapters_that_stay_whole(processes):
    """Of a sharded model: added after fully_shard, they are copies that nothing averages but the step."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 11, bias=False)

        def forward(self, ids):
            return self.base(ids) + self.b(self.a(self.base.table(ids)))

    counts = COUNTS[processes.size]
    base, x, y = build("tied", sum(counts))
    single = Adapted(base).double()
    model = copy.deepcopy(single)
    fully_shard(model.base, mesh=processes.mesh)
    alone, spread = (projgrad.OrthoGrad(m, sgd(m), max_norm=0.1) for m in (single, model))
    fx, fy = x[: processes.size], y[: processes.size]
    ones = (1,) * processes.size
    for _ in range(2):
        alone.step(lambda: losses(single, fx, fy).mean(), lambda: losses(single, x, y))
        spread.step(
            lambda: losses(model, processes.part(fx, ones), processes.part(fy, ones)).mean(),
            lambda: losses(model, processes.part(x), processes.part(y)),
        )
    assert_same(model, single)


def check_mixed_precision(processes):
    """Parameters are gathered in bfloat16 and gradients summed in float32: as near to one process as that rounds."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    model = shard(copy.deepcopy(single), processes.mesh, mp_policy=policy)
    start = whole(single)
    x, y = torch.randn(sum(COUNTS[processes.size]), 8), torch.arange(sum(COUNTS[processes.size])) % 3
    forget, retain = (lambda m: losses(m, -x, y).float().mean()), (lambda m, x, y: losses(m, x, y).float())
    projgrad.OrthoGrad(single, sgd(single), alpha=0.1).step(lambda: forget(single), lambda: retain(single, x, y))
    record = projgrad.OrthoGrad(model, sgd(model), alpha=0.1).step(
        lambda: forget(model), lambda: retain(model, processes.part(x), processes.part(y))
    )
    assert record.residual < 0.05
    moved = [torch.cat([(whole(m)[name] - start[name]).flatten() for name in start]) for m in (single, model)]
    assert F.cosine_similarity(*moved, dim=0) > 0.99


def check_tensor_parallelism_is_refused(processes):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    parallelize_module(model, processes.mesh, {"0": ColwiseParallel()})
    x = torch.randn(3, 8)
    with raises(ValueError, "tensor parallelism is not supported"):
        projgrad.OrthoGrad(model, sgd(model)).step(lambda: model(x).sum(), lambda: model(x).sum(1))


def check_shards_of_replicas(mesh):
    """A mesh of two dimensions: shards over one, copies over the other."""
    everyone = dist.init_device_mesh("cpu", (4,))
    Twins("tied", Processes(everyone), lambda model: shard(model, mesh)).compare()


def check_example(_):
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "several_processes.py"))["main"]
    for way in ("ddp", "fsdp"):
        assert main(way, steps=2) < 1e-6


def check_timeout(_):
    """A process that never comes: the others stop with an error instead of waiting."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model, x, y = build("tied", 2)
    unlearner = projgrad.OrthoGrad(model, sgd(model), process_group=group)
    if dist.get_rank() == 3:
        time.sleep(4)
        return
    start = time.monotonic()
    with raises(RuntimeError, "the other processes did not answer"):
        unlearner.step(lambda: losses(model, x, y).mean(), lambda: losses(model, x, y))
    assert time.monotonic() - start < 60
    assert all(p.grad is None for p in model.parameters())


def check_failure_inside_a_sharded_model(_):
    """The others wait for shards that never come: they stop when the timeout of the group is over."""
    # Of processes that share no other mesh: torch takes meshes of the same processes for one, with one timeout.
    group = dist.new_group([0, 1, 2], timeout=datetime.timedelta(seconds=2))
    if dist.get_rank() == 3:
        return
    processes = Processes(DeviceMesh.from_group(group, "cpu"))
    twins = Twins("tied", processes, lambda model: shard(model, processes.mesh))
    forget = twins.closures()["forget"]

    def broken():
        if processes.rank == 2:
            raise KeyError("a file is missing")
        return forget()

    start = time.monotonic()
    with raises((KeyError, RuntimeError), ""):
        twins.unlearner.step(broken, twins.closures()["retain"])
    assert time.monotonic() - start < 60


CHECKS = {  # with how many processes
    check_replicas: (2, 4),
    check_shards: (2, 4),
    check_learning_rates_and_damping: (2,),
    check_the_module_inside: (2,),
    check_hard_rows: (2, 4),
    check_micro_batches: (2,),
    check_lists_of_micro_batches: (2, 4),
    check_lists_in_the_metric_of_the_optimizer: (2, 4),
    check_uneven_uses: (2, 4),
    check_failures: (2, 4),
    check_scaler: (2,),
    check_refusals_of_shards: (2,),
    check_adapters_that_stay_whole: (2,),
    check_mixed_precision: (2,),
    check_tensor_parallelism_is_refused: (2,),
}
ON_A_GRID = [check_shards_of_replicas, check_timeout, check_failure_inside_a_sharded_model, check_example]
