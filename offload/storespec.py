"""Where a store is and how it is opened, as one string without secrets.

The string goes where configuration does not reach: into the journal, the catalog, the servers of
views. Secrets are named by where they are read from, a file or a command, never by what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from offload.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """Where the secret that opens an encrypted store comes from.

    `kind` file (a key file), passphrase-file (its first line), recovery-file (a recovery key),
    command (its standard output, as a passphrase); `value` the path, or the command's words.
    """

    kind: str
    value: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """One store. `options` are the kind's own, e.g. the endpoint of S3."""

    url: str  # /folder, or KIND://place
    options: Mapping[str, str] = field(default_factory=dict)
    key: KeySource | None = None

    @property
    def kind(self) -> str:
        """`disk` for a folder, else what stands before `://`."""
        return self.url.partition("://")[0] if "://" in self.url else "disk"

    def text(self) -> str:
        """The spec as a string; the bare address where there is nothing else to say."""
        if not self.options and self.key is None:
            return self.url
        value: dict[str, object] = {"url": self.url, "options": dict(self.options)}
        if self.key is not None:
            value["key"] = {"kind": self.key.kind, "value": list(self.key.value)}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> StoreSpec:
        """The inverse of `text`. Raises UsageError (`bad-store-spec`)."""
        if not text.startswith("{"):
            return cls(url=text)
        try:
            value = json.loads(text)
            key = value.get("key")
            return cls(
                url=str(value["url"]),
                options={str(k): str(v) for k, v in value.get("options", {}).items()},
                key=key and KeySource(kind=str(key["kind"]), value=tuple(map(str, key["value"]))),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"a damaged record of a store: {error}", code="bad-store-spec"
            ) from error
