"""Properties of many objects in one call.

Source: vSphere Web Services API, PropertyCollector. An object that went meanwhile is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyVmomi import vmodl

from offload.vsphere import Vsphere

_PAGE = 200  # objects in one answer


def read_each(vsphere: Vsphere, objects: Sequence[Any], *paths: str) -> dict[str, dict[str, Any]]:
    """Of objects of one kind, by reference; what is unset is left out. Raises faults of the API:
    NoPermission too, where a property is kept from us."""
    found: dict[str, dict[str, Any]] = {}
    todo = list(objects)
    while todo:
        try:
            found |= _page(vsphere, todo[:_PAGE], paths)
        except vmodl.fault.ManagedObjectNotFound as gone:
            # one that is gone spoils the call for all: the fault says which
            left = [managed for managed in todo if managed != gone.obj]
            if len(left) == len(todo):
                raise
            todo = left
        else:
            todo = todo[_PAGE:]
    return found


def _page(
    vsphere: Vsphere, objects: Sequence[Any], paths: Sequence[str]
) -> dict[str, dict[str, Any]]:
    kinds = vmodl.query.PropertyCollector
    wanted = kinds.FilterSpec(
        objectSet=[kinds.ObjectSpec(obj=managed) for managed in objects],
        propSet=[kinds.PropertySpec(type=type(objects[0]), pathSet=list(paths))],
    )
    result = vsphere.content.propertyCollector.RetrievePropertiesEx(
        [wanted], kinds.RetrieveOptions()
    )
    found: dict[str, dict[str, Any]] = {}
    while result is not None:
        for entry in result.objects:
            for missing in entry.missingSet or ():
                if not isinstance(missing.fault, vmodl.fault.ManagedObjectNotFound):
                    raise missing.fault
            found[entry.obj._moId] = {p.name: p.val for p in entry.propSet or ()}  # noqa: SLF001
        if not result.token:
            break
        result = vsphere.content.propertyCollector.ContinueRetrievePropertiesEx(result.token)
    return found
