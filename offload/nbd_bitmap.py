"""Reading a dirty bitmap that QEMU offers with an NBD export (QEMU docs/interop/nbd.txt)."""

from __future__ import annotations

from offload.errors import UnavailableError
from offload.extents import Ranges, normalize

_DIRTY = 1  # NBD_STATE_DIRTY
_STATUS_MAX = 1 << 30  # replies of libnbd before 1.18 carry 32-bit lengths


def dirty_ranges(uri: str, bitmap: str) -> Ranges:
    """The ranges whose flag is set. Raises UnavailableError (`nbd-unavailable`, `no-bitmap`)."""
    import nbd

    context = f"qemu:dirty-bitmap:{bitmap}"
    found: list[tuple[int, int]] = []
    handle = nbd.NBD()
    try:
        handle.add_meta_context(context)
        handle.connect_uri(uri)
        if not handle.can_meta_context(context):
            raise UnavailableError(f"{uri} does not offer the bitmap {bitmap}", code="no-bitmap")
        size, at = handle.get_size(), 0
        while at < size:
            entries: list[int] = []

            def collect(
                name: str, _at: int, flat: list[int], _error: object, into: list[int] = entries
            ) -> int:
                if name == context:
                    into += flat
                return 0

            handle.block_status(min(_STATUS_MAX, size - at), at, collect)
            if not any(entries[::2]):
                raise UnavailableError(
                    f"{uri} gave an empty block status at {at}", code="nbd-unavailable"
                )
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                if flags & _DIRTY:
                    found.append((at, min(at + length, size)))
                at += length
        handle.shutdown()
    except nbd.Error as error:
        raise UnavailableError(f"{uri}: {error.string}", code="nbd-unavailable") from error
    return normalize(found)
