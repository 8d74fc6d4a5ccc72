"""Which sources of a forward pass are read, and which of their uses belong together."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch

from ..recording.recording import Recording
from ..recording.sites import Source
from ..rules.rule import Rule


class UsePlan:
    """What a pass does with the uses it meets.

    uses: how many arrive for each key (a parameter, or a part of one), to be joined. missing: uses of every parameter
    that are still to come. wanted: by site, the sources, by index, whose uses count; and of those that are a whole
    parameter, used once, the name. maps: parameters used through something computed from them, to be mapped back.
    """

    def __init__(self, recording: Recording, loops: Mapping[str, str]) -> None:
        self.loops = loops
        self.uses: dict[tuple, int] = defaultdict(int)
        self.missing: dict[str, int] = defaultdict(int)
        used: dict[str, dict[int, Source]] = defaultdict(dict)
        sites = [site for site in recording.sites if site.layout is not None]
        for site in sites:
            for source in site.sources:
                if not source.settled or source.site is site:
                    for name in self._names(source):
                        used[name][id(source)] = source
        self.maps = {name for name, sources in used.items() if not _direct(recording, name, list(sources.values()))}
        while True:  # a source of several parameters makes all of them mapped
            more = {n for sources in used.values() for s in sources.values() if s.names & self.maps for n in s.names}
            if more - loops.keys() <= self.maps:
                break
            self.maps |= more - loops.keys()
        wanted = {site: [k for k, s in enumerate(site.sources) if self._wants(s)] for site in sites}
        for site, indices in wanted.items():
            for source in [site.sources[k] for k in indices]:
                if not self.mapped(source):
                    key = self.key(undo_transpose(recording, source, None)[0])
                    self.uses[key] += 1
                    self.missing[key[0]] += 1
        self.wanted = {
            site: [(k, self._only_use(site.sources[k])) for k in indices] for site, indices in wanted.items() if indices
        }

    def _wants(self, source: Source) -> bool:
        return not source.settled and bool(self._names(source))

    def _names(self, source: Source) -> Collection[str]:
        """Return the parameters of a source that are not left to a loop."""
        return source.names - self.loops.keys() if self.loops else source.names

    def _only_use(self, source: Source) -> str | None:
        if not source.whole or self.mapped(source):
            return None
        (name,) = source.names
        return name if self.missing[name] == 1 else None

    def mapped(self, source: Source) -> bool:
        return bool(self.maps) and not self.maps.isdisjoint(source.names)

    def key(self, source: Source) -> tuple:
        (name,) = source.names
        return name, _part(source)


def _part(source: Source) -> object:
    """Return what identifies the part of its one parameter that a source is."""
    return "whole" if source.whole else source.window or id(source)


def _direct(recording: Recording, name: str, sources: list[Source]) -> bool:
    """Return whether the parameter is used only through disjoint parts of itself (or the same part again)."""
    if len(sources) == 1 and sources[0].whole:
        return True
    if any(len(s.names) > 1 or not (s.whole or s.window or s.rows is not None) for s in sources):
        return False
    sources = [undo_transpose(recording, source, None)[0] for source in sources]
    parts = {_part(source): source for source in sources}
    if len(parts) == 1:
        return True
    if any(s.window is None for s in parts.values()):
        return False
    return _disjoint(recording.parameters[name].numel(), tuple(s.window for s in parts.values()))


@functools.lru_cache(4096)
def _disjoint(numel: int, windows: tuple) -> bool:
    index = torch.arange(numel)
    touched = torch.cat([index.as_strided(*window).flatten() for window in windows])
    return len(touched.unique()) == len(touched)


def undo_transpose(recording: Recording, source: Source, rule: Rule | None) -> tuple[Source, Rule | None]:
    """Return a use of Wᵀ as a use of W, and any other use as it is."""
    if source.whole or source.window is None or len(source.window[0]) != 2:
        return source, rule
    (name,) = source.names
    whole = recording.whole(name)
    size, stride, offset = source.window
    if whole.window == source.window:
        return whole, rule
    if whole.window == (size[::-1], stride[::-1], offset):
        return whole, None if rule is None else rule.transposed()
    return source, rule
