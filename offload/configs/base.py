"""What all parts of the configuration are made of."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from offload.quantity import parse_duration


def seconds(value: object) -> object:
    """A duration as text ("30s", "2m") as seconds; anything else as it is."""
    return parse_duration(value) if isinstance(value, str) else value


Seconds = Annotated[float, BeforeValidator(seconds), Field(gt=0, le=86400)]


class Model(BaseModel):
    """A table of the file: frozen, and without keys that nobody knows.

    Its validator is made when it is first used: most tables are only parts of others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def absolute_path(value: Path | None) -> Path | None:
    """ValueError for a relative path."""
    if value is not None and not value.is_absolute():
        raise ValueError("must be an absolute path")
    return value


def tag_name(value: str) -> str:
    """ValueError for what is no tag of a backup."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError(
            f"{value!r} is no tag: up to 63 letters, digits, '.', '_', '-', the first no sign"
        )
    return value


def check_networks(value: tuple[str, ...]) -> tuple[str, ...]:
    """ValueError for what is neither an address nor a network."""
    for text in value:
        ipaddress.ip_network(text)  # its ValueError says what is wrong
    return value
