"""The passes over a recording: per-sample gradients, use by use, for a consumer."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import version
from ..recording.backward import backward, recomputing
from ..recording.recording import Recording
from ..recording.sites import Site, Source
from ..recording.structure import Structure, graph_key, structure_of
from ..rules.product import joined
from ..rules.rule import Rows, Rule
from .consumers import Consumer
from .full_rows import looped, mapped
from .plan import UsePlan, undo_transpose


class Passes:
    """Backward passes through the graph of a recorded forward pass.

    known: structures found before, by a hash of their graphs; new ones are added.
    """

    def __init__(self, recording: Recording, known: dict[int, Structure]) -> None:
        self.recording, self._known = recording, known
        self._latest: tuple[weakref.ref, int, Structure] | None = None  # of losses, and their version

    def structure(self, losses: Tensor, wait: bool = True) -> Structure:
        """Return how to read the sites; see `structure_of`. It is found once for every forward pass."""
        latest, self._latest = self._latest, None  # should this fail: the sites are about to change
        if latest is None or latest[0]() is not losses or latest[1] != version(losses):
            structure = structure_of(self.recording, losses, self._known, wait)
            latest = weakref.ref(losses), version(losses), structure
        self._latest = latest
        return latest[2]

    def known(self, losses: Tensor) -> Structure | None:
        """Return the structure that an equal graph had before, without looking at this one."""
        return self._known.get(graph_key(self.recording, losses))

    def run(
        self,
        losses: Tensor,
        consumer: Consumer,
        retain_graph: bool = True,
        watch: Sequence[Tensor] = (),
        weights: Tensor | None = None,
        collect: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Hand the per-sample gradients w_j g_j to a consumer, in one backward pass; weights: 1 if None.

        collect: the consumer keeps all rules: those that keep gradients may come at the end of the pass.

        Returns:
            Σ_j w_j g_j of the parameters in `watch`, from plain autograd in the same pass.
        """
        structure = self.structure(losses)
        n = len(losses)
        weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        recording, plan = self.recording, UsePlan(self.recording, structure.loops)
        waiting: dict[tuple, list[tuple[Source, Rule]]] = defaultdict(list)
        dense: dict[int, Tensor] = {}
        arrived: set[str] = set()

        def flush(key: tuple) -> None:
            pieces = waiting.pop(key)
            rule = joined([rule for _, rule in pieces])
            consumer.add(key[0], pieces[0][0], rule)
            arrived.add(key[0])
            plan.missing[key[0]] -= len(pieces)
            if not plan.missing[key[0]]:
                consumer.parameter_done(key[0])

        def receive(site: Site, b: Tensor, saved: Sequence[Tensor]) -> None:
            wanted = plan.wanted.get(site)
            if not wanted:
                return
            rules = site.make(b, saved, site.layout, n)
            for k, name in wanted:
                source, rule = site.sources[k], rules[k]
                if name is not None:
                    consumer.add(name, source, rule)
                    plan.missing[name] = 0
                    consumer.parameter_done(name)
                    continue
                if plan.mapped(source):
                    d = rule.dense()
                    dense[id(source)] = dense[id(source)] + d if id(source) in dense else d
                    continue
                source, rule = undo_transpose(recording, source, rule)
                key = plan.key(source)
                waiting[key].append((source, rule))
                if len(waiting[key]) == plan.uses[key]:
                    flush(key)

        keep = retain_graph or bool(structure.loops or plan.maps)
        watched = backward(recording, losses, weights, receive, structure.ends, keep, watch, collect)
        with torch.no_grad():
            for key in list(waiting):  # uses that no loss depends on never arrived
                flush(key)
            for name, missing in plan.missing.items():  # some uses arrived, and others never will
                if missing and name in arrived:
                    consumer.parameter_done(name)
            for name, rows in mapped(recording, plan, dense):
                consumer.add(name, recording.whole(name), Rows(rows))
                consumer.parameter_done(name)
            for name, rows in looped(recording, losses, structure.loops):
                weighted = torch.einsum("n,n...->n...", weights.to(rows.dtype), rows)
                consumer.add(name, recording.whole(name), Rows(weighted))
                consumer.parameter_done(name)
            consumer.finalize(n, losses.device)
        return watched

    def combine(self, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return Σ_j w_j g_j of every parameter, from one ordinary backward pass."""
        parameters, weights = self.recording.parameters, weights.to(losses.dtype)
        inputs = list(parameters.values())
        with recomputing(self.recording):
            grads = torch.autograd.grad(losses, inputs, weights, retain_graph=True, materialize_grads=True)
        return dict(zip(parameters, grads, strict=True))
