"""Restore one volume of a backup from a disk store, from docs/store-format.md alone.

    python independent_reader.py STORE BACKUP VOLUME OUTPUT

It shares no code with offload and needs only Python, blake3 and zstandard. It reads no local cache
and, with `--packs`, no index objects either. It stops at anything that is not as it was written.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

CONTEXT = "offload store v1 2026-11-21 "
ENTRY = struct.Struct("<32sBBHIIQ")
RECORD_BYTES, TRAILER_BYTES, SECTOR = 56, 64, 512
DATA, DELTA, PAGE = 1, 2, 3


def check(good: bool, what: object) -> None:
    if not good:
        sys.exit(f"damaged: {what}")


def unseal(path: Path, key: bytes | None, name: str = "") -> dict[str, Any]:
    body, _, rest = path.read_bytes().partition(b"\n")
    digest = (blake3(body + b"\n" + name.encode(), key=key) if key else blake3(body)).hexdigest()
    check(rest == b"blake3:" + digest.encode() + b"\n", path)
    value: dict[str, Any] = json.loads(body)
    return value


class Store:
    def __init__(self, folder: Path, packs_only: bool) -> None:
        self.folder = folder
        self.about = unseal(folder / "store.json", None)
        check(self.about["format"] == "offload-store", "store.json")
        check(self.about["version"] == 1 and self.about["encryption"] is None, "version")
        id_key = bytes.fromhex(self.about["id_key"])
        self.keys = {
            purpose: blake3(id_key, derive_key_context=CONTEXT + purpose).digest()
            for purpose in ("data", "delta", "page", "mac")
        }
        self.places: dict[bytes, tuple[str, int, int, int, int, int]] = {}
        if packs_only:
            self.read_footers()
        else:
            self.read_indexes()

    def read_indexes(self) -> None:
        for path in sorted((self.folder / "index").iterdir()):
            raw = path.read_bytes()
            check(
                blake3(raw[:-32] + f"index/{path.name}".encode(), key=self.keys["mac"]).digest()
                == raw[-32:],
                path,
            )
            check(raw[:8] == b"OFFLIDX1", path)
            (count,) = struct.unpack_from("<I", raw, 12)
            at = 16
            for _ in range(count):
                (length,) = struct.unpack_from("<H", raw, at)
                pack = raw[at + 2 : at + 2 + length].decode()
                at += 2 + length
                (entries,) = struct.unpack_from("<I", raw, at + 34)
                at += 38
                self.note(pack, raw[at : at + entries * ENTRY.size])
                at += entries * ENTRY.size
            check(at == len(raw) - 32, path)

    def read_footers(self) -> None:
        for path in sorted((self.folder / "packs").glob("*/*")):
            raw, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
            end = raw[-TRAILER_BYTES:]
            magic, at, count, version, mac, last = struct.unpack("<8sQII32s8s", end)
            check((magic, version, last) == (b"OFFLFOOT", 1, b"OFFLEND\n"), path)
            check(raw[:16] == b"OFFLPACK" + struct.pack("<II", 1, 0), path)
            body = raw[at:-TRAILER_BYTES]
            check(len(body) == count * ENTRY.size, path)
            covered = blake3(
                raw[:16] + body + end[:24] + name.encode(), key=self.keys["mac"]
            ).digest()
            check(covered == mac, path)
            self.note(name, body)

    def note(self, pack: str, entries: bytes) -> None:
        for ident, kind, encoding, version, raw, stored, offset in ENTRY.iter_unpack(entries):
            check(version == 0, "key version")
            self.places[ident] = (pack, kind, encoding, raw, stored, offset)

    def chunk(self, ident: bytes, wanted: int) -> bytes:
        check(ident in self.places, f"chunk {ident.hex()} is missing")
        pack, kind, encoding, raw_length, stored, offset = self.places[ident]
        check(kind == wanted, f"kind of chunk {ident.hex()}")
        with (self.folder / pack).open("rb") as file:
            file.seek(offset + RECORD_BYTES)
            payload = file.read(stored)
        check(len(payload) == stored, pack)
        if encoding == 1:
            payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=raw_length)
        key = self.keys[{DATA: "data", DELTA: "delta", PAGE: "page"}[kind]]
        check(len(payload) == raw_length, pack)
        check(blake3(payload, key=key).digest() == ident, f"chunk {ident.hex()} in {pack}")
        return payload


def levels_of(slots: int, width: int) -> int:
    levels, reach = 1, width
    while reach < slots:
        levels, reach = levels + 1, reach * width
    return levels


def leaves(store: Store, ident: bytes, level: int) -> Iterator[tuple[int, list[bytes] | None]]:
    """The leaf entries under a page: lists of ids, base first; None for zeros, with a count."""
    raw = store.chunk(ident, PAGE)
    magic, version, own_level, count = struct.unpack_from("<2sBBI", raw)
    check((magic, version, own_level) == (b"PG", 1, level), "page head")
    at = 8
    for _ in range(count):
        tag = raw[at]
        at += 1
        if tag == 0:
            yield store.about["page_entries"] ** level, None
            continue
        ids, at = [raw[at : at + 32]], at + 32
        if level:
            check(tag == 1, "page tag")
            yield from leaves(store, ids[0], level - 1)
            continue
        if tag == 2:
            deltas, at = raw[at], at + 1
            ids += [raw[at + 32 * i : at + 32 * i + 32] for i in range(deltas)]
            at += 32 * deltas
        yield 1, ids
    check(at == len(raw), "page length")


def chunk_of(store: Store, ids: list[bytes], length: int) -> bytearray:
    out = bytearray(store.chunk(ids[0], DATA))
    check(len(out) == length, "chunk length")
    for ident in ids[1:]:
        delta = store.chunk(ident, DELTA)
        sectors = -(-length // SECTOR)
        at = -(-sectors // 8)
        for sector in range(sectors):
            if delta[sector // 8] >> (sector % 8) & 1:
                start = sector * SECTOR
                size = min(SECTOR, length - start)
                out[start : start + size] = delta[at : at + size]
                at += size
        check(at == len(delta), "delta length")
    return out


def newest_root(store: Store, backup: str, volume: str, root: str) -> str:
    check(not (store.folder / "voids" / backup).exists(), f"backup {backup} was given up")
    found = (0, root)
    for path in (store.folder / "folds").glob("*"):
        if not (store.folder / "voids" / path.name).exists():
            fold = unseal(path, store.keys["mac"], f"folds/{path.name}")
            new = fold["backups"].get(backup, {}).get(volume)
            found = max(found, (fold["sequence"], new)) if new else found
    return found[1]


def restore(store: Store, backup: str, volume: str, output: Path) -> None:
    manifest = unseal(store.folder / "manifests" / backup, store.keys["mac"], f"manifests/{backup}")
    check(manifest["id"] == backup and manifest["version"] == 1, "manifest")
    image = next(i for i in manifest["images"] if i["volume"] == volume)
    root = newest_root(store, backup, volume, image["root"])
    size, chunk = image["size_bytes"], store.about["chunk_bytes"]
    slots = -(-size // chunk)
    top = levels_of(slots, store.about["page_entries"]) - 1
    slot = 0
    with output.open("wb") as out:
        for count, ids in leaves(store, bytes.fromhex(root), top):
            if ids is not None:
                out.seek(slot * chunk)
                out.write(chunk_of(store, ids, min(chunk, size - slot * chunk)))
            slot += count
        check(slot >= slots, "too few entries")
        out.truncate(size)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--packs"]
    opened = Store(Path(words[0]), "--packs" in sys.argv)
    restore(opened, words[1], words[2], Path(words[3]))
