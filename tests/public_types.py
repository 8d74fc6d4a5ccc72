"""What a user writes, as a type checker sees it: `make types` checks this file, and nothing runs it.

Every public name is used as documented; assert_type holds what it gives. Where a comment asks a checker to ignore a
line, the line is wrong on purpose: a checker that no longer sees that complains about the comment.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import assert_type

import projgrad
from projgrad import evaluate
from projgrad.baselines import SCRUB, BaselineRecord, NegGradPlus, PCGrad, SalUn, npo_loss, simnpo_loss


def ops(G: Tensor, u: Tensor) -> None:
    assert_type(projgrad.gram(G), Tensor)
    assert_type(projgrad.gram(G, u), tuple[Tensor, Tensor])
    assert_type(projgrad.gram_solve(G, u, damping=0.1, rtol=None), Tensor)
    assert_type(projgrad.project_out(u, G), Tensor)
    out, info = projgrad.project_out(u, G, damping=0.1, return_info=True)
    assert_type(out, Tensor)
    assert_type(info, projgrad.ProjectionInfo)
    assert_type(info.residual, Tensor)
    assert_type(projgrad.basis_project(G, u), Tensor)
    assert_type(projgrad.feasible(u, u, u, u, 8, delta=0.1), Tensor)
    assert_type(projgrad.linear_gram(G, G), Tensor)
    assert_type(projgrad.linear_dot(G, G, u), Tensor)
    assert_type(projgrad.linear_combine(G, G, u), Tensor)
    assert_type(projgrad.linear_moments(G, G), tuple[Tensor, Tensor])
    assert_type(projgrad.projectors.qr(u, G), Tensor)
    assert_type(projgrad.projectors.lstsq(u, G), Tensor)
    assert_type(projgrad.projectors.qr_per_tensor(u, G, [20, 10]), Tensor)
    projgrad.gram(G, "u")  # type: ignore[call-overload]
    projgrad.gram_solve(G, u, damping="0.1")  # type: ignore[arg-type]


def tape(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with projgrad.per_sample(model) as tape:
        losses = cross_entropy(model(x), y, reduction="none")
    assert_type(tape, projgrad.Tape)
    assert_type(tape.gram(losses), Tensor)
    mean = assert_type(tape.combine(losses, losses), dict[str, Tensor])
    assert_type(tape.dot(losses, mean), Tensor)
    assert_type(tape.dot(losses, list(mean.values())), Tensor)
    assert_type(tape.moments(losses), tuple[dict[str, Tensor], dict[str, Tensor]])
    assert_type(tape.rows(losses), dict[str, Tensor])
    assert_type(tape.project_(losses, scope="per_tensor").preserved_norm, float)
    for line in tape.explain(losses):
        assert_type(line.bytes, int)
    assert_type(projgrad.functional.linear(x, y, tape=tape), Tensor)
    assert_type(projgrad.functional.conv2d(x, y, padding="same", tape=tape), Tensor)
    assert_type(projgrad.functional.layer_norm(x, (8,), y, tape=tape), Tensor)
    projgrad.per_sample(x)  # type: ignore[arg-type]


def methods(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> None:
    def forget() -> Tensor:
        return cross_entropy(model(x), y)

    def retain() -> Tensor:
        return cross_entropy(model(x), y, reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unlearner = projgrad.OrthoGrad(
        model, optimizer, alpha=0.5, scope="per_tensor", max_norm=1.0, projector=projgrad.projectors.qr
    )
    record = assert_type(unlearner.step(forget, retain), projgrad.StepRecord)
    assert_type(record.rank, int | None)
    assert_type(record.residual, float)
    assert_type(unlearner.step([forget, forget], [retain]), projgrad.StepRecord)
    micro = projgrad.micro_batches(lambda x, y: cross_entropy(model(x), y, reduction="none"), batches)
    assert_type(unlearner.backward(forget, micro), projgrad.StepRecord)
    unlearner.step(forget, 0.5)  # type: ignore[arg-type]
    projgrad.OrthoGrad(model, optimizer, 0.5, "global")  # type: ignore[call-arg]

    pgu = projgrad.PGU(model, optimizer, gamma={"default": 0.9}, rule="energy").fit([x]).forget([(x, y)])
    assert_type(pgu.step(lambda: (model(x), y)), projgrad.PGURecord)
    assert_type(pgu.step(forget).ranks, dict[str, int])
    assert_type(pgu.exposed, dict[str, float])
    assert_type(pgu.run(batches, lambda: (0.5, 0.5), epochs=5).reason, str)
    pgu.save("cache")
    assert_type(projgrad.PGU.load("cache", model, optimizer, 0.9, data=[x]), projgrad.PGU)
    assert_type(projgrad.unlearning_loss(model(x), y), Tensor)

    for method in (NegGradPlus(model, optimizer), PCGrad(model, optimizer, alpha=0.9), SalUn(model, optimizer, forget)):
        assert_type(method.step(forget, retain), BaselineRecord)
        projgrad.FeasibleUpdates(model, method)
    for base in (optimizer, torch.optim.AdamW(model.parameters())):
        projgrad.FeasibleUpdates(model, base)
    careful = projgrad.FeasibleUpdates(model, unlearner, delta=0.1, test="aggregate")
    assert_type(careful.step(forget, retain, check=retain), projgrad.FeasibleRecord)
    projgrad.FeasibleUpdates(model, pgu)
    SCRUB(model, optimizer, max_steps=3).step(forget, retain)
    projgrad.FeasibleUpdates(model, model)  # type: ignore[arg-type]
    assert_type(npo_loss(x, y), Tensor)
    assert_type(simnpo_loss(x, y, beta=2.5), Tensor)

    probed = assert_type(projgrad.probe(model, forget, lambda n: retain()[:n], sizes=(4, 8)), projgrad.Probe)
    assert_type(probed.rows[0], projgrad.ProbeRow)
    assert_type(probed.advice, str)


def scores(model: nn.Module, x: Tensor, y: Tensor) -> None:
    problem = evaluate.Classification(retain=(x, y), forget=(x, x, y), test=(x, y))
    found = evaluate.scores(problem, model, original=model)
    assert_type(found, dict[str, evaluate.metrics.Any])
    assert_type(projgrad.evaluate.tow({"forget": 0.5}, {"forget": 0.0}), float)
    assert_type(evaluate.distance(model, dict(model.named_parameters())), float)
    assert_type(evaluate.membership_auc(x, x, x), float)
    assert_type(projgrad.__version__, str)
