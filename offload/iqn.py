"""iSCSI qualified names.

Format: RFC 7143, 4.2.7.3 to 4.2.7.5 (`iqn.`, year and month, reversed domain name, optionally `:`
and text; `eui.` and 16, `naa.` and 16 or 32 hexadecimal digits), 223 bytes at most; characters:
RFC 3722, section 6.
"""

from __future__ import annotations

import re

_MAX_BYTES = 223
_IQN = re.compile(
    r"iqn\.\d{4}-(0[1-9]|1[0-2])\.[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
    r"(:[a-z0-9.:-]+)?"
)
_OTHER = re.compile(r"eui\.[0-9a-fA-F]{16}|naa\.([0-9a-fA-F]{16}|[0-9a-fA-F]{32})")


def check_iqn(name: str) -> None:
    """ValueError, with what is wrong, for a text that names no iSCSI node."""
    if len(name.encode()) > _MAX_BYTES:
        raise ValueError(f"an iSCSI name has at most {_MAX_BYTES} bytes: {name[:40]}…")
    if not _IQN.fullmatch(name) and not _OTHER.fullmatch(name):
        raise ValueError(
            f"'{name}' is no iSCSI name; one looks like iqn.2004-10.com.example:host "
            "(lower case; the year and month in which somebody owned the domain)"
        )


def view_iqn(prefix: str, instance: str, view_name: str, view_id: str) -> str:
    """The name of the target that presents a view: as long as the view lives, and never again."""
    readable = re.sub(r"[^a-z0-9.-]", "-", view_name)
    tail = f":{instance}.{view_id}"
    room = _MAX_BYTES - len(prefix) - len(tail) - 1
    return f"{prefix}{tail}.{readable[:room]}".rstrip(".-")
