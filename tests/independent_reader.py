"""Restore one volume of a backup from a disk store, from docs/store-format.md alone.

    python independent_reader.py STORE BACKUP VOLUME OUTPUT [--packs] [KIND:FILE]

KIND: file, passphrase, recovery. It shares no code with offload; `--packs`: read no index objects.
"""

import base64
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import zstandard
from argon2.low_level import Type, hash_secret_raw
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

DATA, DELTA, PAGE = 1, 2, 3


def check(good: bool, what: object) -> None:
    if not good:
        sys.exit(f"damaged: {what}")


def derive(secret: bytes, purpose: str) -> bytes:
    return blake3(secret, derive_key_context="offload store v1 2026-11-21 " + purpose).digest()


def two_lines(raw: bytes, tail: bytes, key: bytes | None, name: str) -> dict[str, Any]:
    body, _, rest = raw.partition(b"\n")
    digest = (blake3(body + tail, key=key) if key else blake3(body)).hexdigest()
    check(rest == f"blake3:{digest}\n".encode(), name)
    return dict(json.loads(body))


def open_ring(folder: Path, store_id: str, way: str) -> dict[str, Any]:
    kind, _, file = way.partition(":")
    text = Path(file).read_text().removesuffix("\n")
    if kind == "file":
        secret = bytes.fromhex(text.split(":")[1])
    elif kind == "recovery":
        secret = base64.b32decode(text.partition("-")[2].replace("-", ""))[:32]
    rings: list[dict[str, Any]] = []
    found = [two_lines(p.read_bytes(), b"", None, p.name) for p in (folder / "keys").iterdir()]
    for about in (about for about in found if about["kind"] == kind):
        box = bytes.fromhex(about.pop("wrapped"))
        if kind == "passphrase":
            salt, kdf = bytes.fromhex(about["kdf"]["salt"]), about["kdf"]
            costs = (kdf["time_cost"], kdf["memory_kib"], kdf["lanes"])
            key = hash_secret_raw(text.encode(), salt, *costs, 32, Type.ID)
        else:
            key = derive(secret, f"wrap {kind}")
        bound = {**about, "store": store_id}
        text_of = json.dumps(bound, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        with suppress(InvalidTag):
            rings.append(json.loads(AESGCM(key).decrypt(box[:12], box[12:], text_of.encode())))
    check(bool(rings), "no key fits")
    return max(rings, key=lambda ring: int(ring["versions"][-1]["number"]))


class Store:
    def __init__(self, folder: Path, packs_only: bool, way: str) -> None:
        self.folder = folder
        self.about = two_lines((folder / "store.json").read_bytes(), b"", None, "store.json")
        check(self.about["format"] == "offload-store" and self.about["version"] == 1, "version")
        ring = open_ring(folder, self.about["id"], way) if self.about["encryption"] else self.about
        id_key = bytes.fromhex(ring["id_key"])
        self.secret = {v["number"]: bytes.fromhex(v["secret"]) for v in ring.get("versions", [])}
        self.mac = {n: derive(s, "mac") for n, s in (self.secret or {0: id_key}).items()}
        self.ids = [b"", *(derive(id_key, purpose) for purpose in ("data", "delta", "page"))]
        self.places: dict[bytes, tuple[Any, ...]] = {}
        (self.read_footers if packs_only else self.read_indexes)()

    def cipher(self, version: int, purpose: str, salt: bytes, name: str) -> AESGCM:
        return AESGCM(
            blake3(salt + name.encode(), key=derive(self.secret[version], purpose)).digest()
        )

    def sealed(self, name: str) -> dict[str, Any]:
        raw = (self.folder / name).read_bytes()
        if not self.secret:
            return two_lines(raw, b"\n" + name.encode(), self.mac[0], name)
        magic, one, version, salt = struct.unpack_from("<8sHH32s", raw)
        check(magic == b"OFFLSEAL" and one == 1, name)
        cipher = self.cipher(version, "sealed", salt, name)
        return dict(json.loads(cipher.decrypt(bytes(12), raw[44:], raw[:44] + name.encode())))

    def read_indexes(self) -> None:
        for path in sorted((self.folder / "index").iterdir()):
            raw, name = path.read_bytes(), f"index/{path.name}"
            magic, version, _, count = struct.unpack_from("<8sHHI", raw)
            mac = blake3(raw[:-32] + name.encode(), key=self.mac[version]).digest()
            check(magic == b"OFFLIDX1" and mac == raw[-32:], path)
            at = 16
            for _ in range(count):
                (length,) = struct.unpack_from("<H", raw, at)
                pack, at = raw[at + 2 : at + 2 + length].decode(), at + 2 + length
                end = at + 38 + 52 * struct.unpack_from("<I", raw, at + 34)[0]
                self.note(pack, raw[at + 38 : end])
                at = end

    def read_footers(self) -> None:
        for path in sorted((self.folder / "packs").glob("*/*")):
            raw, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
            magic, at, count, one, mac, last = struct.unpack("<8sQII32s8s", raw[-64:])
            check((magic, one, last, raw[:8]) == (b"OFFLFOOT", 1, b"OFFLEND\n", b"OFFLPACK"), path)
            version = int.from_bytes(raw[12:16], "little")
            covered = raw[: 48 if version else 16] + raw[at:-40] + name.encode()
            good = blake3(covered, key=self.mac[version]).digest() == mac
            check(good and len(raw[at:-64]) == count * 52, path)
            self.note(name, raw[at:-64])

    def note(self, pack: str, entries: bytes) -> None:
        if (self.folder / pack).exists():  # a chunk that a prune has moved is at two places
            for ident, *place in struct.iter_unpack("<32sBBHIIQ", entries):
                self.places[ident] = (pack, *place)

    def chunk(self, ident: bytes, wanted: int) -> Any:
        check(ident in self.places, f"chunk {ident.hex()} is missing")
        pack, kind, encoding, _, raw_length, stored, offset = self.places[ident]
        with (self.folder / pack).open("rb") as file:
            head, _, payload = file.read(48), file.seek(offset + 56), file.read(stored)
        if version := int.from_bytes(head[12:16], "little"):
            fields = (b"CHNK", kind, encoding, version, raw_length, stored, ident)
            aad, nonce = struct.pack("<4sBBHII32s", *fields), struct.pack("<Q4x", offset)
            payload = self.cipher(version, "pack", head[16:], pack).decrypt(nonce, payload, aad)
        if encoding == 1:
            payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=raw_length)
        good = blake3(payload, key=self.ids[wanted]).digest() == ident
        check(good and (kind, raw_length) == (wanted, len(payload)), f"{ident.hex()} in {pack}")
        return payload

    def leaves(self, ident: bytes, level: int) -> Iterator[tuple[int, list[bytes]]]:
        raw = self.chunk(ident, PAGE)
        check(raw[:4] == bytes((*b"PG", 1, level)), "page head")
        at = 8
        for _ in range(int.from_bytes(raw[4:8], "little")):
            tag, first, at = raw[at], raw[at + 1 : at + 33], at + 1
            if tag == 0:
                yield self.about["page_entries"] ** level, []
                continue
            deltas, at = (raw[at + 32], at + 33) if tag == 2 else (0, at + 32)
            if level:
                yield from self.leaves(first, level - 1)
            else:
                yield 1, [first, *(raw[at + 32 * i : at + 32 * i + 32] for i in range(deltas))]
            at += 32 * deltas

    def slot(self, ids: list[bytes], length: int) -> bytearray:
        out = bytearray(self.chunk(ids[0], DATA))
        check(len(out) == length, "chunk length")
        for delta in (self.chunk(ident, DELTA) for ident in ids[1:]):
            at = -(-length // 4096)
            for start in range(0, length, 512):
                if delta[start // 4096] >> (start // 512 % 8) & 1:
                    size = min(512, length - start)
                    out[start : start + size] = delta[at : at + size]
                    at += size
            check(at == len(delta), "delta length")
        return out

    def root(self, backup: str, volume: str, own: str) -> bytes:
        void = [self.sealed(f"voids/{p.name}")["writer"] for p in (self.folder / "voids").glob("*")]
        check(backup not in void, f"backup {backup} was given up")
        found = (0, own)
        for name in (p.name for p in (self.folder / "folds").glob("*") if p.name not in void):
            fold = self.sealed(f"folds/{name}")
            new = fold["backups"].get(backup, {}).get(volume)
            found = max(found, (fold["sequence"], new)) if new else found
        return bytes.fromhex(found[1])

    def restore(self, backup: str, volume: str, output: Path) -> None:
        manifest = self.sealed(f"manifests/{backup}")
        image = next(i for i in manifest["images"] if i["volume"] == volume)
        size, chunk = image["size_bytes"], self.about["chunk_bytes"]
        slots, width, at = -(-size // chunk), self.about["page_entries"], 0
        top = next(level for level in range(64) if width ** (level + 1) >= slots)
        with output.open("wb") as out:
            for count, ids in self.leaves(self.root(backup, volume, image["root"]), top):
                if ids:
                    out.seek(at * chunk)
                    out.write(self.slot(ids, min(chunk, size - at * chunk)))
                at += count
            check(at >= slots, "too few entries")
            out.truncate(size)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--packs"]
    try:
        opened = Store(Path(words[0]), "--packs" in sys.argv, "".join(words[4:]))
        opened.restore(words[1], words[2], Path(words[3]))
    except (InvalidTag, zstandard.ZstdError, KeyError, struct.error) as error:
        sys.exit(f"damaged: {error!r}")
