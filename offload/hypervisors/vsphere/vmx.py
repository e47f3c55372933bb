"""The text of a .vmx file: `key = "value"` lines.

The format is nowhere published whole; what is here is common knowledge of it: keys are told apart
without regard to case, `|XX` stands for the character of that hexadecimal number, and a disk is
`BUS:UNIT.fileName`, relative to the file's folder or absolute with the datastore's UUID or name
(/vmfs/volumes/…). Lines that are no assignments are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from uuid import UUID

_LINE = re.compile(r'^\s*([^#\s=][^\s=]*)\s*=\s*"([^"]*)"\s*$')
_DISK = re.compile(r"((?:scsi|sata|ide|nvme)\d+:\d+)\.filename")
_NIC = re.compile(r"(ethernet\d+)\.present")
_ESCAPED = re.compile(r"\|([0-9A-Fa-f]{2})")
_SPECIAL = re.compile(r'[|"\x00-\x1f]')
_VOLUMES = PurePosixPath("/vmfs/volumes")


class Vmx:
    """The lines, in their order."""

    def __init__(self, text: str) -> None:
        self._lines: list[tuple[str, str | None]] = []  # key and value, or a whole line and None
        for line in text.splitlines():
            found = _LINE.match(line)
            self._lines.append((found[1], _plain(found[2])) if found else (line, None))

    def get(self, key: str) -> str:
        """A value, "" where there is none."""
        for name, value in self._lines:
            if value is not None and name.lower() == key.lower():
                return value
        return ""

    def set(self, key: str, value: str) -> None:
        """Change a value, or add it."""
        for number, (name, old) in enumerate(self._lines):
            if old is not None and name.lower() == key.lower():
                self._lines[number] = (name, value)
                return
        self._lines.append((key, value))

    def drop(self, prefix: str) -> None:
        """Remove a key, and all that it begins with a dot after it."""
        low = prefix.lower()
        self._lines = [
            (name, value)
            for name, value in self._lines
            if value is None or (name.lower() != low and not name.lower().startswith(f"{low}."))
        ]

    def disks(self) -> Iterator[tuple[str, str]]:
        """Names (`scsi0:1`) and files of virtual disks."""
        for name, value in list(self._lines):
            found = _DISK.fullmatch(name.lower())
            if found and value and value.lower().endswith(".vmdk"):
                yield found[1], value

    def media(self) -> Iterator[str]:
        """Names of what has a file behind it and is no disk: ISO and floppy images."""
        for name, value in list(self._lines):
            low = name.lower()
            found = _DISK.fullmatch(low)
            if found and value and not value.lower().endswith(".vmdk"):
                yield found[1]
            elif low.startswith("floppy") and low.endswith(".filename"):
                yield low.partition(".")[0]

    def nics(self) -> Iterator[str]:
        """Names (`ethernet0`) of network cards."""
        for name, _value in list(self._lines):
            found = _NIC.fullmatch(name.lower())
            if found:
                yield found[1]

    def names(self) -> list[str]:
        """All keys, as they are written."""
        return [name for name, value in self._lines if value is not None]

    def text(self) -> str:
        """The file."""
        lines = [
            name if value is None else f'{name} = "{_escaped(value)}"'
            for name, value in self._lines
        ]
        return "\n".join(lines) + "\n"


def make_placeholder(
    vmx: Vmx, *, mark: str, mark_key: str, annotation: str, volumes: Mapping[str, str]
) -> list[str]:
    """Turn a VM's settings into those of its placeholder; notes of what was left out.

    `volumes`: by UUID and label of a production datastore, the UUID of its copy. A file on any
    other datastore is production's own: it is taken out.
    """
    notes = []
    for nic in vmx.nics():
        vmx.set(f"{nic}.startConnected", "FALSE")
    notes = _settle(vmx, volumes)
    vmx.set("annotation", annotation)
    vmx.set(mark_key, mark)
    return notes


def make_restored(
    vmx: Vmx, *, name: str, uuid: UUID, mark: tuple[str, str], volumes: Mapping[str, str]
) -> list[str]:
    """Turn a VM's settings into those of another one that is the same but for its identities: a
    new name, UUID, and MACs of the host's choice; notes of what was left out."""
    digits = [uuid.hex[i : i + 2] for i in range(0, 32, 2)]
    vmx.set("uuid.bios", f"{' '.join(digits[:8])}-{' '.join(digits[8:])}")
    for key in ("uuid.location", "vc.uuid"):  # made anew where they are not there
        vmx.drop(key)
    for nic in vmx.nics():
        vmx.set(f"{nic}.addressType", "generated")
        for key in ("address", "generatedAddress", "generatedAddressOffset"):
            vmx.drop(f"{nic}.{key}")
    vmx.set("displayName", name)
    vmx.set(*mark)
    return _settle(vmx, volumes)


def _settle(vmx: Vmx, volumes: Mapping[str, str]) -> list[str]:
    """Nothing but what is on the copies; notes."""
    notes = []
    for name, path in list(vmx.disks()):
        moved = _moved(path, volumes)
        if moved:
            vmx.set(f"{name}.fileName", moved)
        else:
            vmx.drop(name)
            notes.append(f"its disk {name} ({path}) is left out: it lies on no volume of the group")
    for name in list(vmx.media()):
        vmx.drop(name)
    for key in vmx.names():
        if vmx.get(key).startswith("/vmfs/") and not _DISK.fullmatch(
            key.lower()
        ):  # workingDir, sched.swap.derivedName …
            moved = _moved(vmx.get(key), volumes)
            vmx.set(key, moved) if moved else vmx.drop(key)
    if vmx.get("checkpoint.vmState"):
        vmx.drop("checkpoint.vmState")
        notes.append("the VM was suspended: its memory is left out")
    vmx.set("uuid.action", "create")  # asked at power-on only: moved or copied?
    return notes


def _moved(path: str, volumes: Mapping[str, str]) -> str:
    """A path on the copy; "" where there is none. Relative paths are in the VM's folder."""
    found = PurePosixPath(path)
    if not found.is_absolute():
        return "" if ".." in found.parts else path
    if not found.is_relative_to(_VOLUMES) or ".." in found.parts:
        return ""
    volume, *rest = found.relative_to(_VOLUMES).parts or ("",)
    copy = volumes.get(volume)
    return str(_VOLUMES.joinpath(copy, *rest)) if copy else ""


def _plain(value: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)


def _escaped(value: str) -> str:
    return _SPECIAL.sub(lambda found: f"|{ord(found[0]):02X}", value)
