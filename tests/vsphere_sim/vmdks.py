"""Content of virtual disks on a Volume: flat files, and chains of deltas over them.

A delta holds the grains that were written since its snapshot; reading goes down the chain to the
first file that has the grain. Source: "Virtual Disk Format 5.0", on delta links.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tests.vsphere_sim.vmfs import GRAIN, File, Volume
from tests.vsphere_sim.vmx import Descriptor, read_descriptor, write_descriptor

_NUMBERED = re.compile(r"-\d{6}$")


def make_flat(volume: Volume, path: str, size_bytes: int) -> None:
    """A new disk: the descriptor `path` and its `-flat.vmdk`."""
    name = path.removesuffix(".vmdk")
    with volume.lock:
        volume.files[f"{name}-flat.vmdk"] = File(size_bytes=size_bytes)
        found = Descriptor(
            size_bytes=size_bytes, kind="VMFS", extent=posixpath.basename(f"{name}-flat.vmdk")
        )
        volume.write_text(path, write_descriptor(found))


def make_rdm(volume: Volume, path: str, size_bytes: int, device: str, *, physical: bool) -> None:
    """A mapping file: it points at a device by its identity, not at content in the volume."""
    pointer = path.removesuffix(".vmdk") + ("-rdmp.vmdk" if physical else "-rdm.vmdk")
    found = Descriptor(
        size_bytes=size_bytes,
        kind="VMFSRDMP" if physical else "VMFSRDM",
        extent=posixpath.basename(pointer),
    )
    volume.write_texts({pointer: device, path: write_descriptor(found)})


def descriptor(volume: Volume, path: str) -> Descriptor:
    """Of a disk. Raises FileNotFoundError, ValueError."""
    return read_descriptor(volume.text(path))


def chain(volume: Volume, path: str) -> Iterator[tuple[str, Descriptor]]:
    """Path and descriptor of a disk, then of its parents. Raises as `descriptor`."""
    while path:
        found = descriptor(volume, path)
        yield path, found
        path = beside(path, found.parent) if found.parent else ""


def beside(path: str, name: str) -> str:
    """A file in the same folder."""
    return posixpath.join(posixpath.dirname(path), name)


def grow(volume: Volume, path: str) -> str:
    """A delta over a disk; the path of the delta's descriptor."""
    with volume.lock:
        parent = descriptor(volume, path)
        stem = _NUMBERED.sub("", path.removesuffix(".vmdk"))
        number = 1
        while f"{stem}-{number:06d}.vmdk" in volume.files:
            number += 1
        made, extent = f"{stem}-{number:06d}.vmdk", f"{stem}-{number:06d}-delta.vmdk"
        volume.files[extent] = File(size_bytes=parent.size_bytes)
        delta = Descriptor(
            size_bytes=parent.size_bytes,
            kind="VMFSSPARSE",
            extent=posixpath.basename(extent),
            parent=posixpath.basename(path),
            parent_cid=parent.cid,
        )
        volume.write_text(made, write_descriptor(delta))
        return made


def merge(volume: Volume, path: str) -> str:
    """Write a delta into its parent and remove it; the parent's path. The grains of the delta are
    newer. What guests wrote to an RDM is not modelled: then there is nothing to write to."""
    with volume.lock:
        found = descriptor(volume, path)
        parent = beside(path, found.parent)
        delta, into = beside(path, found.extent), _content(volume, parent)
        # a rename of grains would do in one extent; a merge writes, as the real one does
        for number in list(volume.grains(delta)):
            data = volume.read_grain(delta, number)
            if data is not None and volume.files[into].text is None:
                volume.write_grain(into, number, data)
        volume.remove(path, delta)
        return parent


def drop(volume: Volume, path: str) -> None:
    """Remove one file of a chain without writing it anywhere: what a revert does to the delta."""
    volume.remove(path, beside(path, descriptor(volume, path).extent))


def read(volume: Volume, path: str, count: int, offset: int) -> bytes:
    """Content of a disk as the VM sees it, through its chain."""
    files = [beside(p, found.extent) for p, found in chain(volume, path)]
    out = bytearray()
    while len(out) < count:
        number, inside = divmod(offset + len(out), GRAIN)
        grains = (volume.read_grain(file, number) for file in files)
        data = next((grain for grain in grains if grain is not None), bytes(GRAIN))
        out += data[inside : inside + count - len(out)]
    return bytes(out)


def write(volume: Volume, path: str, data: bytes, offset: int) -> None:
    """What the guest writes: into the newest file of the chain."""
    with volume.lock:
        into, done = _content(volume, path), 0
        grown = False
        while done < len(data):
            number, inside = divmod(offset + done, GRAIN)
            piece = data[done : done + GRAIN - inside]
            whole = bytearray(read(volume, path, GRAIN, number * GRAIN))
            whole[inside : inside + len(piece)] = piece
            grown = grown or number not in volume.grains(into)
            volume.write_grain(into, number, bytes(whole))
            done += len(piece)
        if grown:
            volume.save()


def _content(volume: Volume, path: str) -> str:
    return beside(path, descriptor(volume, path).extent)


def resize(volume: Volume, path: str, size_bytes: int) -> None:
    """A flat disk grows."""
    with volume.lock:
        found = replace(descriptor(volume, path), size_bytes=size_bytes)
        volume.files[beside(path, found.extent)].size_bytes = size_bytes
        volume.write_text(path, write_descriptor(found))


def read_file(volume: Volume, path: str) -> bytes:
    """Content of one file, without its parents."""
    found, out = volume.files[path], bytearray()
    while len(out) < found.size_bytes:
        out += volume.read_grain(path, len(out) // GRAIN) or bytes(GRAIN)
    return bytes(out[: found.size_bytes])


def move(source: Volume, target: Volume, paths: Iterable[str]) -> None:
    """Files to another datastore, with their content."""
    with source.lock, target.lock:
        paths = list(paths)
        for path in paths:
            found = source.files[path]
            target.files[path] = File(text=found.text, size_bytes=found.size_bytes)
            for number in found.grains:
                data = source.read_grain(path, number)
                if data is not None and target.disks:
                    target.write_grain(path, number, data)
        target.save()
        source.remove(*paths)
