"""The property collector, and container views.

Source: the vSphere Web Services API reference: PropertyCollector, ViewManager.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from pyVmomi import vim, vmodl

from tests.vsphere_sim.calls import Call, Part, unlocked
from tests.vsphere_sim.properties import Managed, Watch, content
from tests.vsphere_sim.soap import SoapFault

_COLLECTOR = vmodl.query.PropertyCollector


class _Waiting:
    """A collector: its filters, the last version that it told, and updates that did not fit."""

    def __init__(self) -> None:
        self.watches: list[Watch] = []
        self.version = ""
        self.rest: list[tuple[Watch, list[Any]]] = []
        self.cancelled = False


class Collector(Part):
    """Reads many properties at once, and waits for changes."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._collectors: dict[str, _Waiting] = {}
        self._of_filter: dict[str, tuple[_Waiting, Watch]] = {}
        self._pages: dict[str, tuple[list[Any], int]] = {}

    def made(self, found: Managed) -> bool:
        """Whether a client made this collector: it ends with the server."""
        return isinstance(found.ref, _COLLECTOR) and found.moid != "propertyCollector"

    def Fetch(self, _call: Call, of: Managed, prop: str) -> Any:
        """One property."""
        return of.get(prop)

    # -- views -----------------------------------------------------------------------------------

    def CreateContainerView(
        self, _call: Call, _of: Managed, container: Any, type: list[Any], recursive: bool
    ) -> Any:
        """Those of these types in a container; recursive: with all below. It keeps up with the
        inventory until it is destroyed."""
        inside, kinds = self.model.of(container), tuple(type) or (vim.ManagedEntity,)
        root = inside.parent is None

        def shown() -> list[Any]:
            return [
                found.ref
                for found in self.model.objects.values()
                if isinstance(found.ref, kinds)
                and found is not inside
                and ((root and recursive) or _contains(inside, found, recursive))
            ]

        view = self.model.add(vim.view.ContainerView, "session-view", container=container)
        view.computed["view"] = shown
        return view.ref

    def DestroyView(self, _call: Call, of: Managed) -> None:
        """It is gone."""
        self.model.forget(of)

    # -- what a filter chooses -------------------------------------------------------------------

    def _chosen(self, spec: Any) -> list[Managed]:
        found: dict[str, Managed] = {}
        for wanted in spec.objectSet:
            start = self.model.objects.get(wanted.obj._moId)
            if start is None:
                continue
            if not wanted.skip:
                found[start.moid] = start
            named: dict[str, Any] = {}
            _collect_names(wanted.selectSet, named)
            self._walk(start, wanted.selectSet, named, found, set())
        return list(found.values())

    def _walk(
        self,
        start: Managed,
        sets: Iterable[Any],
        named: dict[str, Any],
        found: dict[str, Managed],
        seen: set[tuple[str, str]],
    ) -> None:
        """A selection without a type names a TraversalSpec of the same filter; one leads from an
        object of its type along its path."""
        for each in sets:
            step = each if isinstance(each, _COLLECTOR.TraversalSpec) else named[each.name]
            if not isinstance(start.ref, step.type):
                continue
            value = start.get(step.path) or []
            for ref in value if isinstance(value, list) else [value]:
                child = self.model.objects.get(ref._moId)
                key = (ref._moId, step.name or step.path)
                if child is None or key in seen:
                    continue
                seen.add(key)
                if not step.skip:
                    found[child.moid] = child
                if step.selectSet:
                    self._walk(child, step.selectSet, named, found, seen)

    # -- reading ---------------------------------------------------------------------------------

    def RetrieveProperties(self, _call: Call, _of: Managed, specSet: list[Any]) -> Any:
        """The old way, without pages."""
        return [row for spec in specSet for row in content(self._chosen(spec), spec)]

    def RetrievePropertiesEx(
        self, _call: Call, _of: Managed, specSet: list[Any], options: Any
    ) -> Any:
        """More than maxObjects come in pages: the rest with a token."""
        rows = [row for spec in specSet for row in content(self._chosen(spec), spec)]
        return self._page(rows, options.maxObjects or len(rows) or 1)

    def ContinueRetrievePropertiesEx(self, _call: Call, _of: Managed, token: str) -> Any:
        """The next page."""
        if token not in self._pages:
            raise SoapFault(vmodl.fault.InvalidArgument(invalidProperty="token"))
        return self._page(*self._pages.pop(token))

    def CancelRetrievePropertiesEx(self, _call: Call, _of: Managed, token: str) -> None:
        """The rest is not wanted."""
        self._pages.pop(token, None)

    def _page(self, rows: list[Any], size: int) -> Any:
        if not rows:
            return None
        token = None
        if len(rows) > size:
            token = str(self.model.number())
            self._pages[token] = (rows[size:], size)
        return _COLLECTOR.RetrieveResult(objects=rows[:size], token=token)

    # -- waiting ---------------------------------------------------------------------------------

    def CreatePropertyCollector(self, _call: Call, _of: Managed) -> Any:
        """One of a client's own: each thread needs one."""
        made = self.model.add(_COLLECTOR, "collector")
        self._collectors[made.moid] = _Waiting()
        return made.ref

    def DestroyPropertyCollector(self, _call: Call, of: Managed) -> None:
        """With its filters."""
        self.model.forget(of)
        self._collectors.pop(of.moid, None)

    def CreateFilter(self, _call: Call, of: Managed, spec: Any, partialUpdates: bool) -> Any:
        """What to wait for."""
        made = self.model.add(_COLLECTOR.Filter, "filter")
        waiting = self._collectors.setdefault(of.moid, _Waiting())
        waiting.watches.append(Watch(made.ref, spec))
        self._of_filter[made.moid] = (waiting, waiting.watches[-1])
        return made.ref

    def DestroyPropertyFilter(self, _call: Call, of: Managed) -> None:
        """No longer."""
        waiting, watch = self._of_filter.pop(of.moid)
        waiting.watches.remove(watch)
        self.model.forget(of)

    def CancelWaitForUpdates(self, _call: Call, of: Managed) -> None:
        """WaitForUpdatesEx then throws RequestCanceled."""
        self._collectors.setdefault(of.moid, _Waiting()).cancelled = True

    @unlocked
    def WaitForUpdatesEx(self, call: Call, of: Managed, version: str, options: Any) -> Any:
        """Nothing where nothing changes within maxWaitSeconds; without that, it waits for ever.
        More than maxObjectUpdates come with `truncated` set, the rest in the next call."""
        patience_s = options.maxWaitSeconds if options is not None else None
        most = options.maxObjectUpdates if options is not None else None
        until = None if patience_s is None else time.monotonic() + patience_s
        with self.model.changed:
            waiting = self._begin(of, version)
            while True:
                if of.moid not in self.model.objects:  # the server was restarted
                    raise SoapFault(vmodl.fault.ManagedObjectNotFound(obj=of.ref))
                if self.model.sessions_part.user(call.session) is None:
                    raise SoapFault(vim.fault.NotAuthenticated(privilegeId="System.View"))
                if waiting.cancelled:
                    waiting.cancelled = False
                    raise SoapFault(vmodl.fault.RequestCanceled())
                if found := self._look(waiting, most):
                    return found
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self.model.changed.wait(left)

    def _begin(self, of: Managed, version: str) -> _Waiting:
        """Version "" begins anew, with all values; another than the last one is refused:
        InvalidCollectorVersion."""
        waiting = self._collectors.setdefault(of.moid, _Waiting())
        if not version:
            waiting.rest = []
            for watch in waiting.watches:
                watch.forget()
        elif version != waiting.version:
            raise SoapFault(vmodl.query.InvalidCollectorVersion())
        return waiting

    def _look(self, waiting: _Waiting, most: int | None) -> Any:
        pending = waiting.rest
        if not pending:
            looked = ((w, w.changes(self._chosen(w.spec))) for w in waiting.watches)
            pending = [(watch, updates) for watch, updates in looked if updates]
        if not pending:
            return None
        sets, waiting.rest, left = [], [], most or sum(len(u) for _, u in pending)
        for watch, updates in pending:
            now, rest = updates[:left], updates[left:]
            left -= len(now)
            if now:
                sets.append(_COLLECTOR.FilterUpdate(filter=watch.ref, objectSet=now))
            if rest:
                waiting.rest.append((watch, rest))
        waiting.version = str(self.model.number())
        return _COLLECTOR.UpdateSet(
            version=waiting.version, filterSet=sets, truncated=bool(waiting.rest)
        )


def _contains(inside: Managed, found: Managed, recursive: bool) -> bool:
    return found.within(inside) if recursive else found.parent is inside


def _collect_names(sets: Iterable[Any], named: dict[str, Any]) -> None:
    for each in sets:
        if isinstance(each, _COLLECTOR.TraversalSpec):
            if each.name:
                named[each.name] = each
            _collect_names(each.selectSet, named)
