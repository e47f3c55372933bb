"""The texts that VMs are made of: .vmx (settings), .vmdk (descriptor of a disk), .vmsd (snapshots).

Formats: .vmdk: VMware's "Virtual Disk Format 5.0" technical note; .vmx and .vmsd: `key = "value"`,
one a line, as they lie beside any VM.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r'^\s*([^#=\s][^=]*?)\s*=\s*"(.*)"\s*$')
_PLAIN = re.compile(r"^\s*(\w+)\s*=\s*\"?([^\"\n]*)\"?\s*$")
_EXTENT = re.compile(r'^RW (\d+) (\w+) "([^"]+)"', re.MULTILINE)
_SECTOR = 512
_ESCAPED = re.compile(r"\|([0-9A-Fa-f]{2})")


def parse(text: str) -> dict[str, str]:
    """Of .vmx and .vmsd. `|22` stands for a quotation mark, and so on."""
    found = (_LINE.match(line) for line in text.splitlines())
    return {m[1]: _ESCAPED.sub(lambda e: chr(int(e[1], 16)), m[2]) for m in found if m}


def compose(values: dict[str, str]) -> str:
    """The inverse."""
    return "".join(f'{key} = "{_escaped(value)}"\n' for key, value in values.items())


def _escaped(value: str) -> str:
    return "".join(f"|{ord(c):02X}" if c in '"|\n\r' else c for c in value)


def uuid_to_vmx(text: str) -> str:
    """`564d….` as `56 4d … -… …`, the way a .vmx has UUIDs."""
    digits = text.replace("-", "").ljust(32, "0")[:32]
    pairs = [digits[i : i + 2] for i in range(0, 32, 2)]
    return " ".join(pairs[:8]) + "-" + " ".join(pairs[8:])


def uuid_from_vmx(text: str) -> str:
    """As the API has it: 8-4-4-4-12."""
    digits = re.sub(r"[^0-9A-Fa-f]", "", text)
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return "-".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What a .vmdk says. `extent`: the file with the content; `kind` the extent's."""

    size_bytes: int
    kind: str  # VMFS | VMFSSPARSE | VMFSRDM | VMFSRDMP
    extent: str
    parent: str = ""  # file name of the parent's descriptor
    cid: str = "fffffffe"
    parent_cid: str = "ffffffff"


_TYPES = {
    "VMFS": "vmfs",
    "VMFSSPARSE": "vmfsSparse",
    "VMFSRDM": "vmfsRawDeviceMap",
    "VMFSRDMP": "vmfsPassthroughRawDeviceMap",
}


def write_descriptor(found: Descriptor) -> str:
    """The text of a .vmdk."""
    hint = f'parentFileNameHint="{found.parent}"\n' if found.parent else ""
    return (
        '# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\n'
        f"CID={found.cid}\nparentCID={found.parent_cid}\n"
        f'createType="{_TYPES[found.kind]}"\n{hint}\n'
        f'# Extent description\nRW {found.size_bytes // _SECTOR} {found.kind} "{found.extent}"\n\n'
        '# The Disk Data Base\n#DDB\nddb.adapterType = "lsilogic"\nddb.virtualHWVersion = "13"\n'
    )


def read_descriptor(text: str) -> Descriptor:
    """The inverse. Raises ValueError."""
    extent = _EXTENT.search(text)
    if not text.startswith("# Disk DescriptorFile") or extent is None:
        raise ValueError("no descriptor of a disk")
    values = {m[1]: m[2] for m in (_PLAIN.match(line) for line in text.splitlines()) if m}
    return Descriptor(
        size_bytes=int(extent[1]) * _SECTOR,
        kind=extent[2],
        extent=extent[3],
        parent=values.get("parentFileNameHint", ""),
        cid=values.get("CID", ""),
        parent_cid=values.get("parentCID", ""),
    )
