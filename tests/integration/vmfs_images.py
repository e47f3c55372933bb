"""VMFS images that ESXi made, unpacked: tests/data/vmfs/README.md."""

from __future__ import annotations

from pathlib import Path

import zstandard

PACKED = Path(__file__).parents[1] / "data" / "vmfs"
_BLOCK = 1 << 20
_ZEROS = bytes(_BLOCK)


def unpack(name: str, to: Path) -> None:
    """Write an image to a new file, sparse."""
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 28)
    with (PACKED / f"{name}.zst").open("rb") as packed, to.open("xb") as out:
        reader = unpacker.stream_reader(packed)
        at = 0
        while block := reader.read(_BLOCK):
            if block != _ZEROS[: len(block)]:
                out.seek(at)
                out.write(block)
            at += len(block)
        out.truncate(at)
