"""Files that are either the old one or the complete new one, whatever happens while they are written."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

STALE_SECONDS = 3600.0


def write_atomically(path: Path, writer: Callable[[BinaryIO], None]) -> None:
    """Replace `path` by what `writer` writes into a temporary file beside it, fsynced and then renamed.

    Missing folders are made; a symbolic link is followed. A process killed at any moment leaves the old file or the
    new one, and perhaps a hidden temporary file, which a later write removes once it is an hour old.

    Raises UserError when the system refuses (no space, no permission, a file-size limit). Any other exception of
    `writer` passes through. In both cases the old file is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with open(temporary, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        _discard(temporary)
        reason = error.strerror or str(error)
        message = f"cannot write {path}: {reason}; free space or choose another place, an older file there is unchanged"
        raise UserError(message) from error
    except BaseException:
        _discard(temporary)
        raise
    _sync_folder(target.parent)


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` of a text in UTF-8."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, write)


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def _remove_stale(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
