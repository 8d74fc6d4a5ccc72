"""The tape: products with the per-sample gradients of a model, made inside ordinary backward passes."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .._torch_private import compiles_itself, has_gradient_hooks, is_active, is_compiled, storage_id
from ..recording.graph import fingerprint
from ..recording.host_reads import HostReads
from ..recording.interception import Interception, Recomputing
from ..recording.losses import check_losses, check_shape, check_values
from ..recording.recording import Call, Site, Source
from ..recording.structure import Structure, announce, confirm, inspect
from ..recording.torch_names import COPIES, VIEWS, is_in_place
from ..rules.rule import Rows, Rule, joined
from .consumers import Consumer, FactoredGradient, Moments, Products
from .explain import Explain, Explanation
from .full_rows import looped, mapped
from .gradient_access import verify
from .plan import UsePlan, undo_transpose
from .project import Projection, project_

KNOWN = 1024  # graphs remembered for each model
Directions = Mapping[str, Tensor] | Sequence[Tensor]
_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Structure]] = weakref.WeakKeyDictionary()


def per_sample(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> Tape:
    """A tape that follows the parameters of a model through one forward pass, whatever the model is made of.

    Args:
        model: any module.
        parameters: those to follow, by name. Default: all that require gradients.

    Raises:
        ValueError: a model from `torch.compile`, or no parameter that requires gradients.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> with projgrad.per_sample(model) as tape:
        ...     losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> tape.gram(losses).shape
        torch.Size([5, 5])
    """
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to follow")
    followed = {id(p) for p in parameters.values()}
    fixed: list[Tensor] = []
    for module in model.modules():
        if is_compiled(module):
            raise ValueError("a compiled model hides its operations: pass the original module (`model._orig_mod`)")
        if compiles_itself(module):
            raise ValueError("model.compile() hides the model's operations: pass a module that was not compiled")
        fixed += [b for b in module.buffers(recurse=False)]
        fixed += [p for p in module.parameters(recurse=False) if not (id(p) in followed or p.requires_grad)]
        fixed += _tables(module)
    return Tape(parameters, fixed, _known.setdefault(model, {}))


def _tables(module: nn.Module) -> list[Tensor]:
    """Integer tensors that a module keeps as plain attributes, such as the ids of virtual tokens."""
    found = []
    for value in vars(module).values():
        for t in value.values() if isinstance(value, dict) else (value,):
            if isinstance(t, Tensor) and not t.dtype.is_floating_point:
                found.append(t)
    return found


class Tape:
    """Per-sample gradients g_j = ∂ℓ_j/∂θ of losses computed while the tape is active, never held all at once.

    Args:
        parameters: what to follow, by name.
        buffers: tensors that do not depend on the samples.
        known: structures found before, by the sites of a forward pass.

    Sample j is index j of the losses (n,); where the samples are inside the model is found from the gradients. Every
    method raises ValueError for losses of another shape, and RuntimeError once `project_` has freed their graph.
    """

    def __init__(self, parameters: Mapping[str, Tensor], buffers=(), known: dict | None = None) -> None:
        self.ref = weakref.ref(self)
        self.parameters = dict(parameters)
        for name, p in self.parameters.items():
            if p.is_complex():
                raise ValueError(f"parameter {name} is complex: inner products of its gradients are not defined here")
            if has_gradient_hooks(p):
                raise ValueError(
                    f"parameter {name} has gradient hooks, of yours or of a step that another thread takes on this "
                    "model: they would change or see what is not a gradient"
                )
        self.buffers = {id(b) for b in buffers}
        self.sources: dict[int, Source] = {}
        for name, p in self.parameters.items():
            window = (tuple(p.shape), p.stride(), 0) if p.is_contiguous() else None
            self.sources[id(p)] = Source(p, frozenset([name]), whole=True, window=window)
        self.sites: list[Site] = []
        self.unknown: dict[str, str] = {}
        device = next(iter(self.parameters.values())).device
        self.anchor = torch.zeros((), requires_grad=True, device=device)
        self.recomputing = False
        self.hooked = False  # whether a hook on a tensor of the forward pass may change its gradient
        self.forget_factors: dict[str, FactoredGradient] = {}  # factors of p.grad, as `accumulate_` found them
        self.wants_forget_factors = False  # whether such factors would have been of use
        self.rates: dict[str, float] = {}  # weights of the parameters in a projection, where they differ
        self.host_reads = HostReads()  # of the forward pass, answered when the structure is wanted
        self._receive: Callable | None = None
        self._known = {} if known is None else known
        self._structure: tuple[weakref.ref, Structure] | None = None
        self._mode = Interception(weakref.proxy(self))

    def __enter__(self) -> Tape:
        if is_active(self._mode):
            raise RuntimeError("this tape is already recording")
        self._mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._mode.__exit__(*error)

    # What interception calls.

    def source(self, t: Tensor) -> Source | None:
        source = self.sources.get(id(t))
        return source if source is not None and source.tensor is t else None

    def call(self, name: str, *tensors: object) -> Call:
        return Call(self, name, tensors)

    def register(self, site: Site) -> None:
        if not self.recomputing:  # checkpointing runs parts of the forward pass again, for their inputs only
            site.index = len(self.sites)
            self.sites.append(site)

    def note_unknown(self, names, operation: str) -> None:
        for name in names:
            self.unknown.setdefault(name, operation)

    def derive(self, out: Tensor, parents: Sequence[Source], name: str, ids: Tensor | None = None) -> Tensor:
        """Follow a tensor made of followed ones and constants."""
        in_place = is_in_place(name)
        if self.source(out) is not None and not in_place:
            return out
        source = Source(out, frozenset().union(*(p.names for p in parents)), tuple(parents))
        parent = parents[0]
        if len(parents) == 1 and not in_place and parent.window is not None:
            (only,) = parent.names
            p = self.parameters[only]
            if name in VIEWS and out.dtype == p.dtype and _shares(out, p):
                source.window = (tuple(out.shape), out.stride(), out.storage_offset() - p.storage_offset())
            elif name in COPIES and out.shape == parent.tensor.shape:
                source.window = parent.window
        if ids is not None and ids.ndim and ids.numel() and parent.whole:
            self._ask_distinct(source, ids.to(out.device))
        site = getattr(out.grad_fn, "site", None)
        if isinstance(site, Site):
            site.derived, source.site = True, site
        self.sources[id(out)] = source
        return out

    def _ask_distinct(self, source: Source, ids: Tensor) -> None:
        """Whether a table is read once at most in every row."""
        ordered = ids.flatten().sort().values

        def answer(distinct: list[float]) -> None:
            source.rows = ids if all(distinct) else None

        self.host_reads.defer(torch.cat([ordered[:1] >= 0, ordered[1:] != ordered[:-1]]).all(), answer)

    # What users call.

    def gram(self, losses: Tensor) -> Tensor:
        """K = G Gᵀ (n, n) in float64, in one backward pass without weight gradients."""
        self._verified(losses)
        consumer = Products(self)
        self._run(losses, consumer)
        return consumer.K

    def dot(self, losses: Tensor, direction: Directions) -> Tensor:
        """G u (n,) in float64; u: one tensor per parameter, by name or in order."""
        self._verified(losses)
        consumer = Products(self, self._named(direction), gram=False)
        self._run(losses, consumer)
        return consumer.v

    def combine(self, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Σ_j w_j g_j by name, one ordinary backward pass; weights (n,)."""
        check_losses(losses)
        if weights.shape != losses.shape:
            raise ValueError(f"weights must be (n,) = {tuple(losses.shape)}, one per loss; got {tuple(weights.shape)}")
        with self._again():
            grads = torch.autograd.grad(
                losses,
                list(self.parameters.values()),
                weights.to(losses.dtype),
                retain_graph=True,
                materialize_grads=True,
            )
        return dict(zip(self.parameters, grads, strict=True))

    def moments(self, losses: Tensor, weights: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Σ_j w_j g_j and Σ_j (w_j g_j)² by name, float32 or better, in one backward pass; weights (n,), 1 if None."""
        self._verified(losses)
        if weights is not None and weights.shape != losses.shape:
            raise ValueError(f"weights must be (n,) = {tuple(losses.shape)}, one per loss; got {tuple(weights.shape)}")
        consumer = Moments(self)
        self._run(losses, consumer, weights=weights)
        return consumer.first, consumer.second

    def project_(
        self,
        losses: Tensor,
        scope: str = "global",
        damping: float = 0.0,
        rtol: float | None = None,
        *,
        keep_output_gradients: bool = True,
        add: Tensor | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> Projection:
        """p.grad <- p.grad - Gᵀ c with G (p.grad - Gᵀ c) = 0, in place; no other buffer of the parameters' size.

        Args:
            losses: (n,).
            scope: "global" projects the concatenated gradient, "per_tensor" every tensor on its own, in one backward
                pass: it removes up to n dimensions from *each* tensor, so one of at most n elements becomes zero.
            damping, rtol: see `projgrad.project_out`.
            keep_output_gradients: with scope="global", keep what the backward pass finds at every layer and make Gᵀ c
                from that; the graph is freed. False makes it in a second backward pass, by plain autograd, which so
                checks every tensor each time, not only when the graph is new, and keeps the graph.
            add: (n,), w: also add Σ_j w_j g_j, in the same pass.
            rates: by what every parameter's gradient will be multiplied, by name, where that differs (learning rates
                of parameter groups). With scope="global" the multiplied result is then orthogonal, Σ_p rate_p G_p
                (p.grad - G_pᵀ c) = 0, and lengths in the record weigh every parameter by its rate.

        Raises:
            ValueError: an unknown scope; see also `per_sample`.
            FloatingPointError: NaN or Inf in p.grad, a loss or a per-sample gradient; p.grad are left or set to None.
            ArithmeticError: the result contradicts plain autograd: a rule misread the model. p.grad are set to None.
        """
        return project_(self, losses, scope, damping, rtol, keep_output_gradients, add, rates or {})

    def explain(self, losses: Tensor) -> Explanation:
        """What each parameter costs: its uses, rule, route, predicted bytes and flops, and bytes really in use.

        One backward pass. Print it for a table; it is a list of named tuples.
        """
        consumer = Explain(self)
        self._run(losses, consumer)
        return consumer.lines

    def accumulate_(self, loss: Tensor, weight: float) -> dict[str, FactoredGradient]:
        """p.grad += weight * ∂loss/∂p by plain autograd, for a scalar loss computed while the tape was active; and the
        factors of the gradients of linear layers, where they are shorter than the gradients."""
        outer: dict[str, FactoredGradient] = {}
        uses = Counter(name for site in self.sites for source in site.sources for name in source.names)

        def receive(site: Site, b: Tensor, saved: Sequence[Tensor]) -> None:
            first = site.sources[0]
            if site.name != "linear" or not saved or not first.whole:
                return
            p, q = b.detach().flatten(0, -2), saved[0].detach().flatten(0, -2)
            (name,) = first.names
            if uses[name] == 1 and 4 * len(p) * (p.shape[1] + q.shape[1]) < first.tensor.numel():
                outer[name] = FactoredGradient(p, q)

        self._receive = receive
        try:
            with self._again():
                inputs = [self.anchor, *self.parameters.values()]
                torch.autograd.backward(loss, torch.full_like(loss, weight), inputs=inputs)
        finally:
            self._receive = None
        return outer

    # Passes.

    def backward(
        self,
        losses: Tensor,
        weights: Tensor,
        receive: Callable,
        retain_graph: bool = True,
        watch: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:
        """One backward pass that visits the sites and makes no weight gradient but those of `watch`."""
        self._receive = receive
        try:
            with self._again():
                inputs = [self.anchor, *watch]
                return torch.autograd.grad(losses, inputs, weights, retain_graph=retain_graph, allow_unused=True)[1:]
        finally:
            self._receive = None

    def _again(self):
        return Recomputing(self)

    def structure(self, losses: Tensor) -> Structure:
        """How to read the sites; found once per forward pass, or known from an earlier one with the same sites."""
        if self._structure is not None and self._structure[0]() is losses:
            return self._structure[1]
        check_shape(losses)
        self.host_reads.defer(losses, lambda values: check_values(values) and None)
        graph, taps = fingerprint(self, losses)
        key = hash((len(losses), tuple(site.key for site in self.sites), graph, self.hooked))
        found = self._known.get(key)
        self.host_reads.flush()
        if found is None or not confirm(self, losses, found, taps):
            before, found = found, inspect(self, losses)
            if before is not None:  # the rules were compared; where the samples are was found anew
                found.compared = before.compared
            announce({k: v for k, v in found.loops.items() if before is None or k not in before.loops})
            # Nothing is kept that will not be used again.
            self._known[key] = found if found.lasting else replace(found, layouts=[])
            while len(self._known) > KNOWN:
                del self._known[next(iter(self._known))]
        for site, layout in zip(self.sites, found.layouts, strict=True):
            site.active = layout is not None
        self._structure = (weakref.ref(losses), found)
        return found

    def _verified(self, losses: Tensor) -> None:
        """Compare the rules with plain autograd, unless that was done for the same graph."""
        compared = self.structure(losses).compared
        if not compared.rules:
            verify(self, losses)
            compared.rules = True

    def _run(
        self,
        losses: Tensor,
        consumer: Consumer,
        retain_graph: bool = True,
        watch: Sequence[Tensor] = (),
        weights: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """One pass for a consumer, on w_j g_j; their sum for the parameters in `watch`, from plain autograd."""
        structure = self.structure(losses)
        n = len(losses)
        weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        plan = UsePlan(self, structure)
        waiting: dict[tuple, list[tuple[Source, Rule]]] = defaultdict(list)
        dense: dict[int, Tensor] = {}
        arrived: set[str] = set()

        def flush(key: tuple) -> None:
            pieces = waiting.pop(key)
            rule = joined([rule for _, rule in pieces])
            consumer.add(key[0], pieces[0][0], rule)
            arrived.add(key[0])
            plan.left[key[0]] -= len(pieces)
            if not plan.left[key[0]]:
                consumer.parameter_done(key[0])

        def receive(site: Site, b: Tensor, saved: Sequence[Tensor]) -> None:
            layout = structure.layouts[site.index]
            if layout is None or not any(plan.wants(s) for s in site.sources):
                return
            for source, rule in zip(site.sources, site.make(b, saved, layout, n), strict=True):
                if not plan.wants(source):
                    continue
                if plan.mapped(source):
                    d = rule.dense()
                    dense[id(source)] = dense[id(source)] + d if id(source) in dense else d
                    continue
                source, rule = undo_transpose(self, source, rule)
                key = plan.key(source)
                waiting[key].append((source, rule))
                if len(waiting[key]) == plan.uses[key]:
                    flush(key)

        keep = retain_graph or bool(structure.loops or plan.maps)
        watched = self.backward(losses, weights, receive, keep, watch)
        with torch.no_grad():
            for key in list(waiting):  # uses that no loss depends on never arrived
                flush(key)
            for name, left in plan.left.items():  # some uses arrived, and others never will
                if left and name in arrived:
                    consumer.parameter_done(name)
            for name, rows in mapped(self, plan, dense):
                consumer.add(name, self._whole(name), Rows(rows))
                consumer.parameter_done(name)
            for name, rows in looped(self, losses, structure.loops):
                consumer.add(name, self._whole(name), Rows(torch.einsum("n,n...->n...", weights.to(rows.dtype), rows)))
                consumer.parameter_done(name)
            consumer.finalize(n)
        return watched

    def _whole(self, name: str) -> Source:
        return self.sources[id(self.parameters[name])]

    def _named(self, direction: Directions) -> dict[str, Tensor]:
        if not isinstance(direction, Mapping):
            direction = dict(zip(self.parameters, direction, strict=True))
        for name, u in direction.items():
            if name not in self.parameters:
                raise ValueError(f"direction has {name!r}, which the tape does not follow")
            if u.shape != self.parameters[name].shape:
                shape = tuple(self.parameters[name].shape)
                raise ValueError(f"direction[{name!r}] must be {shape} like the parameter; got {tuple(u.shape)}")
        return dict(direction)


def _shares(out: Tensor, p: Tensor) -> bool:
    return storage_id(out) == storage_id(p)
