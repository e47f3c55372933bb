"""Imports point down, and drivers know nothing of each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from offload import compose

ROOT = Path(__file__).parents[2]
PACKAGES = ("offload", "targets", "nbd_plugins")

# Families of drivers. What `compose` picks from is a driver; other modules of a family are its
# drivers' shared or private parts.
FAMILIES = ("offload.snapshots", "offload.quiescers", "offload.stores", "offload.images", "targets")

# A driver of one family that is built on another driver of it, by design: qemu-nbd serves a qcow2
# image over NBD.
BUILT_ON = {("offload.images.qcow2", "offload.images.nbd")}

# What may run programs itself: the gateway, and nobody else.
SUBPROCESS = {"offload.run"}

# What the plugin inside nbdkit may load of the project, directly: the less, the faster a view.
PLUGIN_MAY = {
    "offload.images", "offload.compose", "offload.sources", "offload.errors", "offload.image",
    "offload.model",
}  # fmt: skip


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


MODULES = {_module(path): path for path in _files()}


def imports_of(name: str) -> set[str]:
    """Modules that a module imports, anywhere in it, except for types only."""
    found: set[str] = set()
    tree = ast.parse(MODULES[name].read_text())
    skipped = {id(n) for node in ast.walk(tree) if _types_only(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
    return found


def _types_only(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _ours(name: str) -> set[str]:
    return {found for found in imports_of(name) if _inside(found, *PACKAGES)}


def _under(*packages: str) -> list[str]:
    return [name for name in MODULES if _inside(name, *packages)]


def test_the_table_of_modules_is_not_empty() -> None:
    assert "offload.model" in MODULES
    assert "offload.errors" in imports_of("offload.ids")


def test_model_and_errors_import_nothing_of_the_project() -> None:
    assert _ours("offload.model") == {"offload.machine"}
    assert _ours("offload.machine") == set()
    assert _ours("offload.errors") == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_downwards(name: str) -> None:
    ours = _ours(name)
    if not _inside(name, "offload.cli"):
        assert not [found for found in ours if _inside(found, "offload.cli")]
    # the undo actions are named as text and loaded when one runs: no import there
    if not _inside(name, "offload.cli", "offload.services", "offload.testing"):
        assert not [found for found in ours if _inside(found, "offload.services")]
    if not _inside(name, "offload.cli", "offload.services", "offload.catalog", "offload.testing"):
        assert not [found for found in ours if _inside(found, "offload.catalog")]
    if _inside(name, "offload.format"):
        assert not [found for found in ours if _inside(found, "offload.engine", *FAMILIES)]


def _drivers() -> set[str]:
    tables = (
        compose.PROVIDERS,
        compose.TARGETS,
        compose.STORES,
        compose.FREEZERS,
        compose.APPLICATIONS,
    )
    named = {place.partition(":")[0] for table in tables for place in table.values()}
    return named | {found for found in imports_of("offload.compose") if _inside(found, *FAMILIES)}


DRIVERS = _drivers()


def test_the_table_of_drivers_is_not_empty() -> None:
    assert {"offload.snapshots.reflink", "offload.images.file", "targets.nbd"} <= DRIVERS
    assert set(MODULES) >= DRIVERS
    assert all(any(_inside(driver, family) for driver in DRIVERS) for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_driver_imports_no_other_driver(family: str) -> None:
    for name in _under(family):
        for found in _ours(name):
            other = next((f for f in FAMILIES if _inside(found, f)), family)
            assert other == family, f"{name} imports {found} of another family"
            sibling = found in DRIVERS and (name, found) not in BUILT_ON
            assert not sibling, f"{name} imports the driver {found}"


def test_drivers_are_chosen_in_one_place() -> None:
    """Only `compose` knows the implementations, but for tests and a driver's own family."""
    for name in MODULES:
        if name == "offload.compose" or _inside(name, "offload.testing", *FAMILIES):
            continue
        found = _ours(name) & DRIVERS
        assert found <= KNOWN_DIRECT.get(name, set()), f"{name} imports {found}"


# Uses of one driver by name, each with its reason.
KNOWN_DIRECT: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_gateway_runs_programs(name: str) -> None:
    found = {f for f in imports_of(name) if f.partition(".")[0] in {"subprocess", "pty"}}
    if found and name not in SUBPROCESS:
        uses = _subprocess_calls(name)
        assert not uses, f"{name} uses {uses}: only offload.run starts programs"


def _subprocess_calls(name: str) -> set[str]:
    """Attributes of `subprocess` that a module uses, but for constants and types."""
    harmless = {"DEVNULL", "PIPE", "STDOUT", "Popen", "TimeoutExpired"}
    used = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "subprocess"
        ):
            used.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "subprocess.Popen":
            used.add("Popen()")
    return used - harmless


@pytest.mark.parametrize("name", sorted(MODULES))
def test_click_and_rich_stay_in_the_command_line(name: str) -> None:
    found = {f for f in imports_of(name) if f.partition(".")[0] in {"click", "rich"}}
    assert not found or _inside(name, "offload.cli")


@pytest.mark.parametrize("name", _under("nbd_plugins"))
def test_plugin_loads_little_of_the_project(name: str) -> None:
    found = {f for f in _ours(name) if not _inside(f, "nbd_plugins", *PLUGIN_MAY)}
    assert not found


def _at_import(name: str) -> set[str]:
    """What importing a module loads at once: imports outside of functions."""
    tree = ast.parse(MODULES[name].read_text())
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {
                inner if (inner := f"{base}.{alias.name}") in MODULES else base
                for alias in node.names
            }
    return found


def test_the_entry_point_loads_nothing_heavy() -> None:
    """`offload --help` reads a table: from `offload.cli.main`, all that is loaded is light."""
    todo, seen = ["offload.cli.main"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        if name in MODULES:
            todo += _at_import(name) - seen
    heavy = {"sqlalchemy", "alembic", "pydantic", "rich", "numpy", "nbd", "zstandard", "blake3"}
    assert not {name for name in seen if name.partition(".")[0] in heavy}
    assert "click" in seen
