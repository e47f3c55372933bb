"""What is made of properties that a server does not tell."""

from __future__ import annotations

from typing import Any

import pytest
from pyVmomi import vim, vmodl

from offload.hypervisors.vsphere.following import _update
from offload.vsphere import values_of

KINDS = vmodl.query.PropertyCollector
VM = vim.VirtualMachine("vm-7")
DENIED = vim.fault.NoPermission(object=VM, privilegeId="System.Read")
GONE = vmodl.fault.ManagedObjectNotFound(obj=VM)


def missing(fault: Any) -> list[Any]:
    return [KINDS.MissingProperty(path="config.uuid", fault=fault)]


def name() -> Any:
    return vmodl.DynamicProperty(name="name", val="web")


def test_property_that_may_not_be_read_is_an_error() -> None:
    """Half of what was asked for would choose half of a group."""
    with pytest.raises(vim.fault.NoPermission):
        values_of(KINDS.ObjectContent(obj=VM, propSet=[name()], missingSet=missing(DENIED)))
    with pytest.raises(vim.fault.NoPermission):
        _update(KINDS.ObjectUpdate(kind="enter", obj=VM, missingSet=missing(DENIED)))


def test_property_that_went_with_its_object_is_left_out() -> None:
    found = values_of(KINDS.ObjectContent(obj=VM, propSet=[name()], missingSet=missing(GONE)))
    assert found == {"name": "web"}
    assert _update(KINDS.ObjectUpdate(kind="enter", obj=VM, missingSet=missing(GONE))).values == {}


@pytest.mark.parametrize(
    ("op", "value"),
    [("assign", "esx2"), ("add", "esx2"), ("remove", None), ("indirectRemove", None)],
)
def test_change_that_takes_a_value_away_unsets_it(op: str, value: str | None) -> None:
    change = KINDS.Change(name="name", op=op, val="esx2")
    update = _update(KINDS.ObjectUpdate(kind="modify", obj=VM, changeSet=[change]))
    assert update.values == {"name": value}
    assert not update.gone


def test_object_that_leaves_is_gone() -> None:
    assert _update(KINDS.ObjectUpdate(kind="leave", obj=VM)).gone
