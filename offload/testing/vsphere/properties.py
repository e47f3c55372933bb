"""The property collector: reading many properties at once, and waiting for changes.

Source: the vSphere Web Services API reference, PropertyCollector, and its programming guide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyVmomi import vmodl

from offload.testing.vsphere.soap import serialized

_KINDS = vmodl.query.PropertyCollector


@dataclass(eq=False)
class Managed:
    """A managed object: its reference and properties (pyVmomi's values)."""

    ref: Any
    properties: dict[str, Any] = field(default_factory=dict)

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
            value = self.properties.get(name) if value is self else getattr(value, name, None)
            if value is None:
                return None
            if type(value) is list:  # a plain list as the typed array that it stands for
                value = kind._GetPropertyInfo(name).type(value)
            kind = type(value)
        return value


def content(objects: Iterable[Managed], spec: Any) -> Iterator[Any]:
    """What RetrieveProperties answers for objects that a filter has chosen."""
    for found in objects:
        values = _values(found, spec)
        yield _KINDS.ObjectContent(
            obj=found.ref,
            propSet=[vmodl.DynamicProperty(name=k, val=v) for k, v in values.items()],
        )


def _values(found: Managed, spec: Any) -> dict[str, Any]:
    """Unset properties and empty lists are left out, as servers do."""
    paths = [p for s in spec.propSet if isinstance(found.ref, s.type) for p in s.pathSet]
    values = {path: found.get(path) for path in paths}
    return {k: v for k, v in values.items() if not (v is None or (isinstance(v, list) and not v))}


class Watch:
    """One filter of a collector: what has changed since it was last asked."""

    def __init__(self, ref: Any, spec: Any) -> None:
        self.ref = ref
        self.spec = spec
        self._last: dict[str, dict[str, str]] = {}

    def changes(self, objects: Iterable[Managed]) -> list[Any]:
        """ObjectUpdates; all properties of an object that is new."""
        now = {found.moid: (found, _values(found, self.spec)) for found in objects}
        updates = []
        for moid, (found, values) in now.items():
            before = self._last.get(moid)
            changed = [
                _KINDS.Change(name=path, op="assign", val=value)
                for path, value in values.items()
                if before is None or before.get(path) != serialized(value)
            ]
            if before is None or changed:
                kind = "enter" if before is None else "modify"
                updates.append(_KINDS.ObjectUpdate(kind=kind, obj=found.ref, changeSet=changed))
        self._last = {
            moid: {path: serialized(value) for path, value in values.items()}
            for moid, (_, values) in now.items()
        }
        return updates
