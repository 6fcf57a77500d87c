"""What a captured graph has frozen: plain values that the programs behind it read."""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, islice
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, frozenset, dict)
# What torch keeps in every module for itself, but for what a run of it depends on.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
# Pyro's notes in modules, and the last values in its transforms.
_NOTES = ("_pyro", "_cached", "__")
# Libraries whose functions read no number that changes.
_LIBRARIES = frozenset({"torch", "pyro", "numpy", "ppvae", "xarray", "pandas", "zuko", "tqdm"})
# Objects of theirs that hold settings: the handlers of Pyro.
_HANDLERS, _RECORDS = "pyro.poutine.", "pyro.poutine.trace_struct"
# A longer list, or a larger array, is taken for data.
_MOST_ITEMS, _MOST_BYTES = 1000, 1 << 16


class Watch:
    """Notices when a number, a flag or a part that a program reads becomes another one.

    A graph has Python's numbers frozen into it, and uses the tensors and parts that were there.
    Changes in place of tensors are seen by the graph itself, and are no change here.

    Watched are attributes of modules, of their parts and of other objects, of their classes and of
    what they hold; closures, defaults, and the global names that functions use; lists and
    dictionaries of up to 1,000 items, and NumPy arrays of up to 64 KiB. Of what belongs to a
    library the numbers, parts and functions are watched alone.

    Args:
        objects: Modules, functions and other objects that a program is made of.
        entries: Further keys of dictionaries, watched whatever their values are.
        ignoring: Names of attributes that are not watched.
    """

    def __init__(
        self,
        objects: Iterable[Any],
        entries: Iterable[tuple[Mapping[Any, Any], Any]] = (),
        ignoring: Collection[str] = (),
    ) -> None:
        self._ignoring = frozenset(ignoring)
        self._places: dict[int, tuple[Mapping[Any, Any], dict[Any, None]]] = {}
        # Those of which a new key is a change too.
        self._whole: list[Mapping[Any, Any]] = []
        self._cells: list[CellType] = []
        self._lists: list[Collection[Any]] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        roots = list(objects)
        self._walk(roots)
        for place, key in entries:
            self._keys_of(place)[key] = None
        # With one key alone a getter would not return a tuple.
        places = [(p, [*k] * 2 if len(k) == 1 else [*k]) for p, k in self._places.values() if k]
        self._getters = [(place, operator.itemgetter(*keys)) for place, keys in places]
        self._entries = [(place, key) for place, keys in places for key in keys]
        self._seen, self._sizes, self._bytes = self._now()
        self._known = [set(place) for place in self._whole]

    def _walk(self, pending: list[Any]) -> None:
        seen: dict[int, Any] = {}  # Held, so that no number of an object is given away again.
        roots = {id(item) for item in pending}
        while pending:
            item = pending.pop()
            if id(item) in seen or isinstance(item, _PLAIN):
                continue
            seen[id(item)] = item
            if isinstance(item, dict):
                if len(item) <= _MOST_ITEMS:
                    pending += self._add(item, item)
                    self._whole.append(item)
            elif isinstance(item, _CONTAINERS):
                if len(item) <= _MOST_ITEMS:
                    self._lists.append(item)
                    pending += item
            elif isinstance(item, np.ndarray):
                if item.nbytes <= _MOST_BYTES and not item.dtype.hasobject:
                    self._arrays.append(item)
            elif isinstance(item, nn.Module):
                pending += self._attributes(item)
                parts = (item._parameters, item._buffers, item._modules)
                for part in parts:
                    pending += self._add(part, part)
                self._whole += [*parts, *(vars(item)[name] for name in _HOOKS)]
                pending.append(type(item))
            elif isinstance(item, FunctionType):
                pending += self._function(item)
            elif isinstance(item, MethodType):
                pending += [item.__self__, item.__func__]
            elif isinstance(item, functools.partial):
                pending += [item.func, item.args, item.keywords]
            elif isinstance(item, (staticmethod, classmethod)):
                pending.append(item.__func__)
            elif isinstance(item, property):
                pending.append(item.fget)
            elif isinstance(item, type):
                for kind in item.__mro__:
                    if not _of_library(kind):
                        pending += self._add(vars(kind), vars(kind))
            elif _has_settings(item) or (id(item) in roots and hasattr(item, "__dict__")):
                pending += self._attributes(item)
                pending.append(type(item))

    def _attributes(self, item: Any) -> list[Any]:
        place = vars(item)
        own = _TORCHS_OWN if isinstance(item, nn.Module) else frozenset()
        library = _of_library(type(item))
        self._whole.append(place)
        keys = [
            key
            for key, value in place.items()
            if key not in own and (not library or _is_setting(value))
        ]
        return self._add(place, keys)

    def _function(self, function: FunctionType) -> list[Any]:
        self._cells += function.__closure__ or ()
        out = [_content(cell) for cell in function.__closure__ or ()]
        out += [function.__defaults__, function.__kwdefaults__]
        if not _of_library(function):
            names = set(_names(function.__code__))
            found = self._add(function.__globals__, names & function.__globals__.keys())
            for value in found:
                if isinstance(value, ModuleType):
                    if not _of_library(value):
                        out += self._add(vars(value), names & vars(value).keys())
                else:
                    out.append(value)
        return out

    def _add(self, place: Mapping[Any, Any], keys: Iterable[Any]) -> list[Any]:
        """Watch keys of a place, and return what is there."""
        own, out = self._keys_of(place), []
        for key in keys:
            if not self._is_note(key):
                own[key] = None
                out.append(place[key])
        return out

    def _keys_of(self, place: Mapping[Any, Any]) -> dict[Any, None]:
        return self._places.setdefault(id(place), (place, {}))[1]

    def _is_note(self, key: Any) -> bool:
        return isinstance(key, str) and (key in self._ignoring or key.startswith(_NOTES))

    def _now(self) -> tuple[list[Any], list[int], list[bytes]]:
        """All values one after the other, the sizes of what may grow, and the arrays.

        Raises:
            KeyError: If one is not there any more.
        """
        values = chain.from_iterable([get(place) for place, get in self._getters])
        now = list(chain(values, map(_content, self._cells), *self._lists))
        sizes = [*map(len, self._lists), *map(len, self._whole)]
        return now, sizes, [array.tobytes() for array in self._arrays]

    def __bool__(self) -> bool:
        """Whether there is anything to notice."""
        return bool(self._seen or self._sizes or self._bytes)

    def changed(self) -> str | None:
        """The name of something that is no longer what it was, `None` where all is."""
        try:
            now, sizes, arrays = self._now()
        except KeyError as error:
            return _said(error.args[0])
        if sizes != self._sizes:
            count = len(self._lists)
            if sizes[:count] != self._sizes[:count]:
                return "the length of a list"
            for place, known in zip(self._whole, self._known, strict=True):
                for key in place:
                    if key not in known and not self._is_note(key):
                        return str(key)
            self._sizes = sizes
        if arrays != self._bytes:
            return "a NumPy array"
        if all(map(operator.is_, now, self._seen)):
            return None
        for at, (one, other) in enumerate(zip(self._seen, now, strict=True)):
            if one is not other and not _equal(one, other):
                return self._name(at)
        return None

    def put_back(self) -> None:
        """Undo what a run of the programs has set: of a capture that are tensors without data."""
        seen = iter(self._seen)
        for place, key in self._entries:
            value = next(seen)
            if isinstance(place, dict) and place.get(key, _Missing) is not value:
                place[key] = value
        for cell in self._cells:
            value = next(seen)
            if value is not _Missing and _content(cell) is not value:
                cell.cell_contents = value
        for items, size in zip(self._lists, self._sizes, strict=False):
            values = list(islice(seen, size))
            if isinstance(items, list) and not _equal(items, values):
                items[:] = values
        for place, known in zip(self._whole, self._known, strict=True):
            for key in [key for key in place if key not in known and not self._is_note(key)]:
                if isinstance(place, dict):
                    del place[key]

    def _name(self, at: int) -> str:
        if at < len(self._entries):
            return _said(self._entries[at][1])
        closure = at < len(self._entries) + len(self._cells)
        return "a variable of a closure" if closure else "an item of a list"


class _Missing:
    """Stands for what is not there."""


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # Not filled yet.
        return _Missing


def _said(key: Any) -> str:
    return key if isinstance(key, str) else f"the entry of a {type(key).__name__}"


def _names(code: CodeType) -> Iterable[str]:
    """The names that a function's code uses, and that of the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _of_library(item: Any) -> bool:
    named = item.__name__ if isinstance(item, ModuleType) else getattr(item, "__module__", None)
    top = (named or "builtins").split(".")[0]
    return top in _LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


def _is_setting(value: Any) -> bool:
    """Whether something that a library's object holds is a number, a part or a function."""
    if isinstance(value, _CONTAINERS):
        items = value.values() if isinstance(value, dict) else value
        return all(isinstance(item, (*_PLAIN, nn.Module)) for item in items)
    return isinstance(value, (*_PLAIN, nn.Module, FunctionType, MethodType, np.ndarray)) or (
        _has_settings(value)
    )


def _has_settings(item: Any) -> bool:
    """Whether an object is one of somebody's own class, or a handler or a setting of a library."""
    if not hasattr(item, "__dict__") or isinstance(item, (type, ModuleType)):
        return False
    kind = type(item)
    if not _of_library(kind):
        return True
    named = kind.__module__
    return (named.startswith(_HANDLERS) and named != _RECORDS) or (
        named.startswith("ppvae.") and not named.startswith(("ppvae.compiled", "ppvae.graphs"))
    )


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, Tensor):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and np.array_equal(one, other))
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)
