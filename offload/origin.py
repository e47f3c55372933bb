"""What a view, a backup or a restore is made of, as a person writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from offload.errors import UsageError

FORMS = "timemark:ID[/VOLUME], backup:ID[/VOLUME], or the name of a group"

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # of groups, volumes and views

_ID = re.compile(r"[0-9a-z]+")


class OriginKind(StrEnum):
    """Where the bytes come from."""

    TIMEMARK = "timemark"
    BACKUP = "backup"
    GROUP = "group"  # a fresh TimeMark of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """`id` is a TimeMark's or a backup's id or a prefix of one, or a group's name.

    `volume` None means all volumes.
    """

    kind: OriginKind
    id: str
    volume: str | None = None

    def __str__(self) -> str:
        if self.kind is OriginKind.GROUP:
            return self.id
        return f"{self.kind}:{self.id}" + (f"/{self.volume}" if self.volume else "")


def parse_origin(text: str) -> Origin:
    """Read an ORIGIN. Raises UsageError (`bad-origin`) that names the accepted forms."""
    kind, colon, rest = text.partition(":")
    if not colon:
        if NAME.fullmatch(text):
            return Origin(kind=OriginKind.GROUP, id=text)
        raise _bad(text)
    wanted, slash, volume = rest.partition("/")
    if kind not in {OriginKind.TIMEMARK, OriginKind.BACKUP} or not _ID.fullmatch(wanted):
        raise _bad(text)
    if slash and not NAME.fullmatch(volume):
        raise _bad(text)
    return Origin(kind=OriginKind(kind), id=wanted, volume=volume or None)


def _bad(text: str) -> UsageError:
    return UsageError(f"'{text}' is no origin", code="bad-origin", hint=f"write {FORMS}")
