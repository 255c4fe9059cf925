"""Unpacks a downloaded file into a folder; whatever an archive holds, nothing is written outside of that folder.

Archives are tar files, gzipped or not; a plain file of torch.save counts as an archive with itself in it.
"""

import contextlib
import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from tqdm import tqdm

from utils.errors import UserError

MAX_BYTES = 4 << 30  # unpacked: a file that inflates to more is refused
MAX_MEMBERS = 10_000
CHUNK = 1 << 20
GZIP, ZIP, PICKLE, TAR = b"\x1f\x8b", b"PK\x03\x04", b"\x80\x02", b"ustar"
PLAIN_NAME = "checkpoint.pth.tar"
UNSAFE = "nothing of it was kept, do not use this archive"
_FILTER = vars(tarfile).get("data_filter")  # absent in Python 3.11.0 to 3.11.3; our own checks refuse the same


class _Limited:
    """The bytes of a stream up to a limit; more raise UserError."""

    def __init__(self, stream: IO[bytes], limit: int, label: str) -> None:
        self.stream, self.left, self.limit, self.label = stream, limit, limit, label

    def read(self, count: int) -> bytes:
        data = self.stream.read(min(count, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.label} unpacks to more than {self.limit >> 20} MiB, which no checkpoint needs")
        return data


def unpack(path: Path, folder: Path, label: str) -> list[PurePosixPath]:
    """Write what ``path`` holds into ``folder``, which exists and is empty; returns the files there, in order.

    label: what to call it in messages.  Raises UserError for a file that is neither a tar file nor one of torch.save,
    is cut short or damaged, unpacks to more than ``MAX_BYTES``, or has a member that is not a plain file or folder
    inside.  Raises OSError where the system refuses to write.  What was written so far stays: delete the folder then.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(ZIP):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{label} is a file of torch.save that is cut short; download it again")
        return [_plain(path, folder)]
    if start.startswith(PICKLE):
        return [_plain(path, folder)]
    if start.startswith(GZIP) or start[257:262] == TAR:
        return _unpack_tar(path, start.startswith(GZIP), folder, label)
    raise UserError(f"{label} is neither an archive (tar.gz) nor a checkpoint of torch.save; it cannot be used")


def _plain(path: Path, folder: Path) -> PurePosixPath:
    with open(path, "rb") as source:
        _copy(source, folder / PLAIN_NAME)
    return PurePosixPath(PLAIN_NAME)


def _unpack_tar(path: Path, zipped: bool, folder: Path, label: str) -> list[PurePosixPath]:
    files: list[PurePosixPath] = []
    try:
        with _opened(path, zipped) as stream:
            limited = _Limited(stream, MAX_BYTES, label)
            with tarfile.open(fileobj=limited, mode="r|") as archive:  # type: ignore[call-overload]
                bar = tqdm(archive, desc=f"unpacking {label}", unit="file", leave=False, disable=None)
                for number, member in enumerate(bar):
                    if number == MAX_MEMBERS:
                        raise UserError(f"{label} has more than {MAX_MEMBERS} members, which no checkpoint needs")
                    files += _take(archive, member, folder, label)
            while limited.read(CHUNK):  # to the end, where gzip's checksum is
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{label} is cut short or damaged ({error}); download it again") from error
    if not files:
        raise UserError(f"{label} is an archive without files; it cannot be used")
    return files


@contextlib.contextmanager
def _opened(path: Path, zipped: bool) -> Iterator[Any]:
    with open(path, "rb") as file:
        if not zipped:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, label: str) -> list[PurePosixPath]:
    """Write one member; returns its path, nothing for a folder."""
    name = _checked_name(member, folder, label)
    if member.isdir():
        (folder / name).mkdir(parents=True, exist_ok=True)
        return []
    content = archive.extractfile(member)
    assert content is not None
    target = folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        size = _copy(content, target)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{label} has two members in one place, {member.name!r}; do not use this archive") from error
    if size != member.size:
        raise UserError(f"{label} is cut short or damaged ({member.name} has {size} of {member.size} bytes)")
    return [name]


def _checked_name(member: tarfile.TarInfo, folder: Path, label: str) -> PurePosixPath:
    """The member's path below the folder.  Raises UserError for everything but plain files and folders inside."""
    name, windows = PurePosixPath(member.name), PureWindowsPath(member.name)
    leaves = name.is_absolute() or windows.drive or windows.root or ".." in (*name.parts, *windows.parts)
    if leaves or "\\" in member.name or "\0" in member.name:
        raise UserError(f"{label} has the member {member.name!r}, which leads out of its folder; {UNSAFE}")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.issparse():
        raise UserError(f"{label} has the member {member.name!r}, which is {_kind(member)}, not a file; {UNSAFE}")
    if _FILTER is not None:
        try:
            _FILTER(member, str(folder))
        except tarfile.TarError as error:
            raise UserError(f"{label} has a member that Python refuses to unpack ({error}); {UNSAFE}") from error
    return name


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    return "a device" if member.isdev() else "of a special kind"


def _copy(source: IO[bytes], target: Path) -> int:
    """Write a stream to a new file and wait until the disk has it; returns the number of bytes."""
    size = 0
    with open(target, "xb") as file:
        while chunk := source.read(CHUNK):
            file.write(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size
