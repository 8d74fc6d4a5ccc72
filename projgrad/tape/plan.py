"""Which sources of a forward pass are read, and which of their uses belong together."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from ..recording.recording import Source
from ..recording.structure import Structure
from ..rules.rule import Rule

if TYPE_CHECKING:
    from .tape import Tape


class UsePlan:
    """Which sources are read, which uses belong together, and which parameters need their uses mapped back."""

    def __init__(self, tape: Tape, structure: Structure) -> None:
        self.tape, self.loops = tape, structure.loops
        self.uses: dict[tuple, int] = defaultdict(int)
        self.left: dict[str, int] = defaultdict(int)
        used: dict[str, dict[int, Source]] = defaultdict(dict)
        sites = [s for s, layout in zip(tape.sites, structure.layouts, strict=True) if layout is not None]
        for site in sites:
            for source in site.sources:
                if not source.settled or source.site is site:
                    for name in source.names - self.loops.keys():
                        used[name][id(source)] = source
        self.maps = {name for name, some in used.items() if not _direct(tape, name, list(some.values()))}
        while True:  # a source of several parameters makes all of them mapped
            more = {n for some in used.values() for s in some.values() if s.names & self.maps for n in s.names}
            if more - self.loops.keys() <= self.maps:
                break
            self.maps |= more - self.loops.keys()
        for site in sites:
            for source in site.sources:
                if self.wants(source) and not self.mapped(source):
                    key = self.key(undo_transpose(tape, source, None)[0])
                    self.uses[key] += 1
                    self.left[key[0]] += 1

    def wants(self, source: Source) -> bool:
        return not source.settled and bool(source.names - self.loops.keys())

    def mapped(self, source: Source) -> bool:
        return bool(source.names & self.maps)

    def key(self, source: Source) -> tuple:
        (name,) = source.names
        return (name, "whole") if source.whole else (name, source.window or id(source))


def _direct(tape: Tape, name: str, sources: list[Source]) -> bool:
    """Whether the parameter is used only through disjoint parts of itself (or the same part again)."""
    if any(len(s.names) > 1 or not (s.whole or s.window or s.rows is not None) for s in sources):
        return False
    parts = {}
    for source in sources:
        source = undo_transpose(tape, source, None)[0]
        parts["whole" if source.whole else source.window or id(source)] = source
    if len(parts) == 1:
        return True
    if any(s.window is None for s in parts.values()):
        return False
    return _disjoint(tape.parameters[name].numel(), tuple(s.window for s in parts.values()))


@functools.lru_cache(4096)
def _disjoint(numel: int, windows: tuple) -> bool:
    index = torch.arange(numel)
    touched = torch.cat([index.as_strided(*window).flatten() for window in windows])
    return len(touched.unique()) == len(touched)


def undo_transpose(tape: Tape, source: Source, rule: Rule | None) -> tuple[Source, Rule | None]:
    """A use of Wᵀ as a use of W."""
    if source.whole or source.window is None or len(source.window[0]) != 2:
        return source, rule
    (name,) = source.names
    whole = tape._whole(name)
    size, stride, offset = source.window
    if whole.window == source.window:
        return whole, rule
    if whole.window == (size[::-1], stride[::-1], offset) and (rule is None or hasattr(rule, "transposed")):
        return whole, None if rule is None else rule.transposed()
    return source, rule
