"""Byte ranges of remote files: fetched once, kept on the local disk while there is room.

What is kept lies in one file without a name, so that it is gone with the process however that ends. Nothing is ever
thrown out for something newer: every range is read once an epoch, so the newest is the one that is needed last.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass

from lum_ray.artifacts import UserError, reach, storage

CACHE_GIB = "LUM_RAY_CACHE_GIB"
"""The variable for how much a process keeps of remote timelines, in the folder for temporary files (TMPDIR)."""
DEFAULT_CACHE_GIB = 16.0


def cache_limit() -> int:
    """Bytes to keep: what the variable says, by default 16 GiB, but at most half of the disk's free space.

    Raises UserError where the variable is no number.
    """
    given = os.environ.get(CACHE_GIB)
    if not given:
        return min(int(DEFAULT_CACHE_GIB * 2**30), shutil.disk_usage(tempfile.gettempdir()).free // 2)
    try:
        return int(float(given) * 2**30)
    except ValueError:
        raise UserError(f"{CACHE_GIB}: expected a size in GiB such as 16, or 0 for none, got '{given}'") from None


class RangeCache:
    """Reads ranges of files, from several threads at once; a range that is kept is not asked of the store again."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._file = tempfile.TemporaryFile(prefix="lum_ray_cache_") if limit_bytes else None  # noqa: SIM115
        self._lock = threading.Lock()
        self._end = 0
        self._kept: dict[tuple[str, int, int], int] = {}  # (uri, begin, end) -> place in the file

    def read(self, uri: str, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes [begin, end) of the file at `uri`, and how many of them were asked of the store."""
        place = self._kept.get((uri, begin, end))
        if place is not None and self._file is not None:
            return os.pread(self._file.fileno(), end - begin, place), 0
        remote = storage(uri)

        def fetch() -> bytes:
            with remote.filesystem.open_input_file(remote.path) as stream:
                return bytes(stream.read_at(end - begin, begin))

        content = reach(uri, fetch)
        self._keep((uri, begin, end), content)
        return content, len(content)

    def _keep(self, key: tuple[str, int, int], content: bytes) -> None:
        with self._lock:
            if self._file is None or key in self._kept or self._end + len(content) > self.limit_bytes:
                return
            place, self._end = self._end, self._end + len(content)
        try:
            written = os.pwrite(self._file.fileno(), content, place)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = 0
        if written < len(content):
            self.limit_bytes = 0  # the disk is full: what is kept stays, the rest is read from the store
            return
        self._kept[key] = place


@dataclass
class Window(io.RawIOBase):
    """A file of which only [begin, begin + len(content)) can be read, for readers that know where to look."""

    content: bytes
    begin: int
    place: int = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.begin + len(self.content)}[whence]
        self.place = base + offset
        return self.place

    def read(self, size: int = -1) -> bytes:
        first = self.place - self.begin
        if first < 0:
            raise OSError(f"byte {self.place} was not fetched, only those from {self.begin} on")
        found = self.content[first:] if size < 0 else self.content[first : first + size]
        self.place += len(found)
        return found
