"""The freeze hooks for guests: written into a folder, for an administrator to copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import offload
from offload.errors import BusyError, NotFoundError, UnavailableError

DISPATCHER = "offload-fsfreeze-hook"
SETTINGS = "offload-hooks.conf"
HOOKS = "fsfreeze-hook.d"

_SOURCE = Path(offload.__file__).parent / "guest_hooks"
_LIBRARY = "offload-hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """`kept`: settings that were there are an administrator's."""

    files: tuple[Path, ...]
    kept: tuple[Path, ...]


def names() -> tuple[str, ...]:
    """Of the hooks."""
    return tuple(sorted(path.name for path in (_SOURCE / HOOKS).iterdir()))


def write(folder: Path, only: tuple[str, ...] = ()) -> Written:
    """Write the dispatcher, its settings and hooks (all, or `only` these); renews those of an
    earlier version.

    Raises NotFoundError (`unknown-hook`), BusyError (`not-ours`: a file of that name is somebody
    else's; nothing is written), UnavailableError (`cannot-write`).
    """
    unknown = [name for name in only if name not in names()]
    if unknown:
        raise NotFoundError(
            f"there is no hook {unknown[0]}",
            code="unknown-hook",
            hint=f"there are: {', '.join(names())}",
        )
    wanted = [f"{HOOKS}/{name}" for name in (only or names())]
    wanted = [DISPATCHER, _LIBRARY, SETTINGS, *wanted]
    kept = tuple(folder / SETTINGS for _ in range((folder / SETTINGS).exists()))
    files = [name for name in wanted if folder / name not in kept]
    try:
        for name in files:
            _refuse_foreign(folder / name)
        for name in files:
            _copy(_SOURCE / name, folder / name)
    except OSError as error:
        raise UnavailableError(
            f"cannot write the hooks: {error.filename}: {error.strerror}", code="cannot-write"
        ) from error
    return Written(files=tuple(folder / name for name in files), kept=kept)


def _refuse_foreign(path: Path) -> None:
    if path.exists() and _LIBRARY not in path.read_text(errors="replace") + path.name:
        raise BusyError(
            f"{path} exists and is not one of these hooks",
            code="not-ours",
            hint="move it away, or choose hooks with --only",
        )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    fresh.write_bytes(source.read_bytes())
    fresh.chmod(0o644 if target.name in (SETTINGS, _LIBRARY) else 0o755)
    fresh.replace(target)
