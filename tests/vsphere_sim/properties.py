"""Managed objects, and the property collector's view of them.

Source: the vSphere Web Services API reference, PropertyCollector, and its programming guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyVmomi import vmodl

from tests.vsphere_sim.soap import serialized

_KINDS = vmodl.query.PropertyCollector
_revisions = itertools.count(1)


class Properties(dict[str, Any]):
    """Properties by name. Notes the revision at which each was set last."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.newest = next(_revisions)
        self.revisions = dict.fromkeys(values, self.newest)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.touch(name)

    def touch(self, *names: str) -> None:
        """These were changed in place."""
        self.newest = next(_revisions)
        self.revisions.update(dict.fromkeys(names, self.newest))


@dataclass(eq=False)
class Managed:
    """A managed object: its reference and properties (pyVmomi's values). `computed`: those that are
    made when they are read. `parent`: that it has in the inventory."""

    ref: Any
    properties: Properties
    parent: Managed | None = None
    computed: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def moid(self) -> str:
        """Its id."""
        moid: str = self.ref._moId
        return moid

    def get(self, path: str) -> Any:
        """A property by its path (`info.state`); None where there is none."""
        value: Any = self
        kind = type(self.ref)
        for name in path.split("."):
            value = self._own(name) if value is self else getattr(value, name, None)
            if value is None:
                return None
            if type(value) is list:  # a plain list as the typed array that it stands for
                value = kind._GetPropertyInfo(name).type(value)
            kind = type(value)
        return value

    def _own(self, name: str) -> Any:
        made = self.computed.get(name)
        return made() if made else self.properties.get(name)

    def within(self, other: Managed) -> bool:
        """Whether it is below the other in the inventory."""
        found: Managed | None = self.parent
        while found is not None and found is not other:
            found = found.parent
        return found is not None


def content(objects: Iterable[Managed], spec: Any) -> Iterator[Any]:
    """What RetrieveProperties answers for objects that a filter has chosen."""
    for found in objects:
        paths = _paths(found, spec)
        if paths is not None:
            values = _values(found, paths)
            yield _KINDS.ObjectContent(
                obj=found.ref,
                propSet=[vmodl.DynamicProperty(name=k, val=v) for k, v in values.items()],
            )


def _paths(found: Managed, spec: Any) -> list[str] | None:
    """What a filter wants to know of an object; None: nothing of its kind."""
    wanted = [s for s in spec.propSet if isinstance(found.ref, s.type)]
    if not wanted:
        return None
    return [p for s in wanted for p in (list(found.properties) if s.all else s.pathSet)]


def _values(found: Managed, paths: Iterable[str]) -> dict[str, Any]:
    """Unset properties and empty lists are left out, as servers do."""
    values = {path: found.get(path) for path in paths}
    return {k: v for k, v in values.items() if not (v is None or (isinstance(v, list) and not v))}


@dataclass(slots=True)
class _Known:
    """What a filter has told of an object: up to which revision, and the values told since the
    first time, as XML."""

    found: Managed
    revision: int
    told: dict[str, str] = field(default_factory=dict)


class Watch:
    """One filter of a collector: what has changed since it was last asked.

    An object that was not touched costs a comparison of numbers: there may be ten thousand.
    """

    def __init__(self, ref: Any, spec: Any) -> None:
        self.ref = ref
        self.spec = spec
        self._known: dict[str, _Known] = {}

    def forget(self) -> None:
        """As if it had never been asked: version ""."""
        self._known.clear()

    def changes(self, objects: Iterable[Managed]) -> list[Any]:
        """ObjectUpdates; all properties of an object that is new; `leave` for one that is gone."""
        updates, seen = [], set()
        for found in objects:
            seen.add(found.moid)
            known = self._known.get(found.moid)
            if known is not None and known.revision == found.properties.newest:
                continue
            paths = _paths(found, self.spec)
            if paths is None:
                continue
            if known is None:
                self._known[found.moid] = _Known(found, found.properties.newest)
                values = _values(found, paths)
                changed = [_KINDS.Change(name=k, op="assign", val=v) for k, v in values.items()]
                updates.append(_KINDS.ObjectUpdate(kind="enter", obj=found.ref, changeSet=changed))
            elif changed := list(_changed(known, paths)):
                updates.append(_KINDS.ObjectUpdate(kind="modify", obj=found.ref, changeSet=changed))
        for moid in [moid for moid in self._known if moid not in seen]:
            gone = self._known.pop(moid).found
            updates.append(_KINDS.ObjectUpdate(kind="leave", obj=gone.ref))
        return updates


def _changed(known: _Known, paths: Iterable[str]) -> Iterator[Any]:
    """Of what was set since: what differs from what was told, where that was kept."""
    found = known.found
    for path in paths:
        if found.properties.revisions.get(path.partition(".")[0], 0) > known.revision:
            value = found.get(path)
            text = "" if value is None else serialized(value)
            if known.told.get(path) != text:
                known.told[path] = text
                yield _KINDS.Change(name=path, op="assign", val=value)
    known.revision = found.properties.newest
