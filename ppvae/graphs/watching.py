"""What a captured graph has frozen: plain values that the programs behind it read."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None), Tensor)
# What torch keeps in every module for itself.
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}


class Watch:
    """Notices when a number, a flag or a tensor that a program reads becomes another one.

    A graph has Python's numbers frozen into it, and uses the tensors that were there. Changes in
    place of tensors are seen by the graph itself, and are no change here.

    Args:
        objects: Modules (with all their parts), functions (their closures and the global names
            that they use), and other objects (their attributes).
        entries: Further keys of dictionaries, watched whatever their values are.
        ignoring: Names of attributes that are not watched.
    """

    def __init__(
        self,
        objects: Iterable[Any],
        entries: Iterable[tuple[Mapping[Any, Any], Any]] = (),
        ignoring: Collection[str] = (),
    ) -> None:
        self._entries: list[tuple[Mapping[Any, Any], Any]] = []
        self._cells: list[CellType] = []
        self._names: list[str] = []
        self._ignoring = ignoring
        seen: set[int] = set()
        for item in objects:
            for part in item.modules() if isinstance(item, nn.Module) else [item]:
                if id(part) not in seen:
                    seen.add(id(part))
                    self._add_object(part)
        for place, key in entries:
            self._entries.append((place, key))
            self._names.append(key if isinstance(key, str) else type(key).__name__)
        self._names += ["a variable of a closure"] * len(self._cells)
        self._seen = self._now()

    def _add_object(self, item: Any) -> None:
        if isinstance(item, FunctionType):
            self._add(item.__globals__, item.__code__.co_names)
            self._cells += [c for c in item.__closure__ or () if _is_plain(_content(c))]
            return
        self._add(vars(item), vars(item))
        if isinstance(item, nn.Module):
            self._add(item._parameters, item._parameters)
            self._add(item._buffers, item._buffers)

    def _add(self, place: Mapping[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            own = key in _TORCHS_OWN or key in self._ignoring or key.startswith("_pyro")
            if not own and key in place and _is_plain(place[key]):
                self._entries.append((place, key))
                self._names.append(key)

    def _now(self) -> list[Any]:
        now = [place.get(key, _Missing) for place, key in self._entries]
        return now + [_content(cell) for cell in self._cells] if self._cells else now

    def changed(self) -> str | None:
        """The name of something that is no longer what it was, `None` where all is."""
        now = self._now()
        if all(map(operator.is_, now, self._seen)):
            return None
        for name, one, other in zip(self._names, self._seen, now, strict=True):
            if one is not other and not _equal(one, other):
                return name
        return None


class _Missing:
    """Stands for what is not there."""


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Not filled yet.
        return _Missing


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(
            a is b or _equal(a, b) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, Tensor) or one is _Missing:
        return False
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))
