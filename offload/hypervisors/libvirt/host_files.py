"""Small files on a libvirt daemon's host: firmware variables.

Where the daemon is of this machine they are read and written as they are; elsewhere through the
storage pool that has their folder: there is no other way to a file with libvirt.
"""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from offload.errors import (
    BusyError,
    ConfigError,
    NotFoundError,
    PrivilegeError,
    UnavailableError,
)
from offload.filesystem import fsync_folder
from offload.libvirtd import Libvirt
from offload.machine import FILE_MAX

_NO_VOLUME = frozenset({49, 50})  # NO_STORAGE_POOL, NO_STORAGE_VOL


class HostFiles:
    """Files of the host of `link`."""

    def __init__(self, link: Libvirt) -> None:
        self._link = link

    def check(self, path: str) -> None:
        """Whether a file could be made there, as far as can be seen. Raises ConfigError
        (`no-pool`), UnavailableError."""
        if not self._link.local:
            self._pool(str(PurePosixPath(path).parent))

    def read(self, path: str) -> bytes:
        """Raises NotFoundError (`no-file`), PrivilegeError, UnavailableError, ConfigError
        (`no-pool`)."""
        if self._link.local:
            with _translated(path):
                return Path(path).read_bytes()
        volume = self._volume(path)
        if volume is None:
            raise NotFoundError(f"there is no {path} on {self._link.uri}", code="no-file")
        found = bytearray()
        with self._link.translated(f"cannot read {path}"):
            stream = self._link.connection.newStream(0)
            volume.download(stream, 0, FILE_MAX + 1, 0)
            while block := stream.recv(1 << 16):
                found += block
            stream.finish()
        return bytes(found)

    def write(self, path: str, content: bytes) -> None:
        """Make a file (0600), durably. Raises BusyError (`file-exists`), and what `read` raises."""
        if self._link.local:
            with _translated(path):
                _publish(Path(path), content)
            return
        place = PurePosixPath(path)
        volume = ET.Element("volume")
        ET.SubElement(volume, "name").text = place.name
        ET.SubElement(volume, "capacity", unit="bytes").text = str(len(content))
        target = ET.SubElement(volume, "target")
        ET.SubElement(target, "format", type="raw")
        ET.SubElement(ET.SubElement(target, "permissions"), "mode").text = "0600"
        pool = self._pool(str(place.parent))
        with self._link.translated(f"cannot write {path}"):
            made = pool.createXML(ET.tostring(volume, encoding="unicode"), 0)
            stream = self._link.connection.newStream(0)
            made.upload(stream, 0, len(content), 0)
            sent = 0
            while sent < len(content):
                sent += stream.send(content[sent : sent + (1 << 16)])
            stream.finish()

    def remove(self, path: str) -> None:
        """Also what was cut off in writing. Idempotent."""
        if self._link.local:
            with _translated(path):
                for found in (Path(path), _part(Path(path))):
                    found.unlink(missing_ok=True)
            return
        with contextlib.suppress(ConfigError):
            volume = self._volume(path)
            if volume is not None:
                with self._link.translated(f"cannot remove {path}"):
                    volume.delete(0)

    def _volume(self, path: str) -> Any:
        pool = self._pool(str(PurePosixPath(path).parent))
        with self._link.translated(f"cannot look for {path}"):
            pool.refresh(0)  # what others have made
            try:
                return pool.storageVolLookupByName(PurePosixPath(path).name)
            except self._link.api.libvirtError as error:
                if error.get_error_code() in _NO_VOLUME:
                    return None
                raise

    def _pool(self, folder: str) -> Any:
        with self._link.translated("cannot list its storage pools"):
            for pool in self._link.connection.listAllStoragePools(0):
                place = ET.fromstring(pool.XMLDesc(0)).findtext("target/path")  # noqa: S314
                if place is not None and pool.isActive() and str(PurePosixPath(place)) == folder:
                    return pool
        raise ConfigError(
            f"libvirt at {self._link.uri} has no storage pool in {folder}, and there is no other "
            "way to a file there",
            code="no-pool",
            hint=f"on that host: virsh pool-create-as NAME dir --target {folder}",
        )


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {path}", code="no-file") from error
    except FileExistsError as error:
        raise BusyError(f"there is a file {path} already", code="file-exists") from error
    except PermissionError as error:
        raise PrivilegeError(f"{path} may not be used by this user: {error.strerror}") from error
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}", code="file-unusable") from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _publish(path: Path, content: bytes) -> None:
    part = _part(path)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.link(part, path)  # never over what is there
        fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
