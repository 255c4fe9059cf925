"""The cache folder: published checkpoints are downloaded into it once, our own entries are in the repository.

``ZOO_DIR/NAME/`` holds what the archive of NAME held; it appears by one rename, so it is complete or absent.
``ZOO_DIR/NAME.json`` is the record of the first download, which every later one has to match (trust on first use).
Hidden files beside them belong to downloads that are running or were interrupted.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from utils.atomic_file import write_text
from utils.errors import UserError
from zoo import archive, drive, manifest
from zoo.manifest import Entry, Own, Published
from zoo.transfer import Source, Unavailable, discard, transfer

try:
    import fcntl
except ImportError:  # not a POSIX system: downloads work, but two at once are not kept apart
    fcntl = None  # type: ignore[assignment]

VARIABLE = "HAWQ_ZOO_DIR"
FOLDER = Path("~/.cache/hawq-zoo")
CHECKPOINTS = ("checkpoint.pth.tar", "model_best.pth.tar")  # preferred, in this order
SUFFIXES = (".pth.tar", ".pth", ".pt", ".th")
INTEGERS_ONLY = "quantized_checkpoint.pth.tar"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Record:
    """What was downloaded.  sha256, bytes: of the archive.  files: path in the folder -> (bytes, sha256).

    checkpoint: the file to resume, a key of ``files``.  recorded: date and time of the first download, UTC.
    """

    name: str
    url: str
    sha256: str
    bytes: int
    recorded: str
    checkpoint: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Stored:
    """checkpoint: the file to use.  record: None for own entries.  new: it was not here before.

    by_hand: the archive it was unpacked from, None where that was downloaded.  first: nobody knew its hash.  twins:
    other entries in the cache with the very same archive.
    """

    checkpoint: Path
    record: Record | None
    new: bool = False
    by_hand: Path | None = None
    first: bool = False
    twins: tuple[str, ...] = ()


def default_folder() -> Path:
    """Of the cache: the environment variable HAWQ_ZOO_DIR, else ~/.cache/hawq-zoo."""
    return Path(os.environ.get(VARIABLE) or FOLDER).expanduser()


def fetch(name: str, zoo_dir: Path | None = None) -> Path:
    """The file of an entry that ``--resume`` (or ``--weights``) takes, downloaded where needed.

    name: of the manifest.  zoo_dir: cache folder, None for the default.  Raises UserError for another name, for a
    file of our own that is missing or changed, and for a download that fails.
    """
    return obtain(manifest.find(name), zoo_dir or default_folder()).checkpoint


def obtain(entry: Entry, zoo_dir: Path, *, force: bool = False, endpoint: str = drive.ENDPOINT) -> Stored:
    """The same with all that is known about the file.

    force: download again.  endpoint: of Drive, or of a server that imitates it.
    """
    if isinstance(entry, Own):
        check_own(entry)
        return Stored(entry.path, None)
    done = None if force else stored(entry.name, zoo_dir)
    if done is not None:
        return done
    with _refusals(entry, zoo_dir):
        zoo_dir.mkdir(parents=True, exist_ok=True)
        with _alone(zoo_dir / f".{entry.name}.lock"):
            done = None if force else stored(entry.name, zoo_dir)  # by another process, while this one waited
            return done or _download(entry, zoo_dir, _source(entry, endpoint))


def check_own(entry: Own) -> None:
    """Raises UserError where the file of an entry of our own is missing or not the recorded one."""
    if not entry.path.is_file():
        raise UserError(f"the file {entry.path} of {entry.name} is missing; restore it from the repository")
    if sha256(entry.path) != entry.sha256:
        raise UserError(f"{entry.path} is not the recorded file of {entry.name}; restore it from the repository")


def stored(name: str, zoo_dir: Path) -> Stored | None:
    """What an earlier download left, None if there is none; nothing is read but the record.

    Raises UserError where a file is gone or has another length.
    """
    folder = zoo_dir / name
    record = read_record(name, zoo_dir) if folder.is_dir() else None
    if record is None:
        return None
    for file, (size, _) in record.files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} was changed after the download; python -m zoo download {name} --force repeats it")
    return Stored(folder / record.checkpoint, record, twins=_twins(record, zoo_dir))


def read_record(name: str, zoo_dir: Path) -> Record | None:
    """The record of a download, None if there is none.  Raises UserError for one that cannot be read."""
    path = _record_path(name, zoo_dir)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {str(file): (int(size), str(digest)) for file, (size, digest) in content.pop("files").items()}
        return Record(**content, files=files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot use the record {path} ({error}); delete it and download {name} again") from error


def sha256(path: Path, label: str | None = None) -> str:
    """Hexadecimal SHA-256 of a file.  label: of a progress bar, None for none."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = tqdm(desc=label, total=size, unit="B", unit_scale=True, leave=False, disable=None if label else True)
    with bar, open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _record_path(name: str, zoo_dir: Path) -> Path:
    return zoo_dir / f"{name}.json"


def _source(entry: Published, endpoint: str) -> Source:
    if entry.drive_id is not None:
        return drive.drive_source(entry.drive_id, endpoint)
    assert entry.url is not None
    return Source(entry.url, entry.url)


@contextlib.contextmanager
def _refusals(entry: Published, zoo_dir: Path) -> Iterator[None]:
    """Turns what network and disk refuse into one sentence each."""
    try:
        yield
    except Unavailable as error:
        page = entry.url if entry.drive_id is None else drive.browser_page(entry.drive_id)
        raise UserError(
            f"cannot download {entry.name}: {error}; try again later, or get the file from {page} and place it as "
            f"{_by_hand(entry.name, zoo_dir)}"
        ) from error
    except OSError as error:
        remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        reason = f"cannot store {entry.name} in {zoo_dir}: {error.strerror or error}"
        raise UserError(f"{reason}; {remedy} or choose another one with --zoo-dir or {VARIABLE}") from error


def _by_hand(name: str, zoo_dir: Path) -> Path:
    return zoo_dir / f"{name}.tar.gz"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process downloads the same entry.  The system frees the lock of a process that died."""
    with open(path, "ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(entry: Published, zoo_dir: Path, source: Source) -> Stored:
    """Transfer, check, unpack, record, rename.

    A transfer that breaks off can be continued; after any other failure nothing stays.
    """
    part, by_hand = zoo_dir / f".{entry.name}.part", _by_hand(entry.name, zoo_dir)
    given = by_hand if by_hand.is_file() else None
    if given is None:
        try:
            transfer(source, part, entry.name)
        except OSError:
            _remove_part(part)
            raise
    new = zoo_dir / f".{entry.name}.{os.getpid()}.tmp"
    try:
        _clear(zoo_dir, entry.name)
        record = _unpacked(entry, given or part, new, source.url, zoo_dir)
        first = entry.sha256 is None and read_record(entry.name, zoo_dir) is None
        write_text(_record_path(entry.name, zoo_dir), json.dumps(asdict(record), indent=1) + "\n")
        _swap(new, zoo_dir / entry.name, zoo_dir / f".{entry.name}.{os.getpid()}.old")
    except (UserError, OSError):
        _remove_part(part)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _remove_part(part)
    checkpoint = zoo_dir / entry.name / record.checkpoint
    return Stored(checkpoint, record, new=True, by_hand=given, first=first, twins=_twins(record, zoo_dir))


def _remove_part(part: Path) -> None:
    with contextlib.suppress(OSError):
        discard(part)


def _clear(zoo_dir: Path, name: str) -> None:
    """Remove what killed processes left; the lock says that none is at work."""
    for pattern in (f".{name}.*.tmp", f".{name}.*.old"):
        for leftover in zoo_dir.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _unpacked(entry: Published, path: Path, new: Path, url: str, zoo_dir: Path) -> Record:
    """Check and unpack ``path`` into the folder ``new``.  Raises UserError for content that is not the expected."""
    digest, size = sha256(path, f"checking {entry.name}"), path.stat().st_size
    known = read_record(entry.name, zoo_dir)
    for expected, origin, remedy in (
        (entry.sha256, "the zoo's list", "do not use it; the file on the server was changed"),
        (
            known and known.sha256,
            "the first download",
            f"to trust the new file delete {_record_path(entry.name, zoo_dir)}",
        ),
    ):
        if expected is not None and expected != digest:
            raise UserError(f"{entry.name} has the sha256 {digest}, {origin} has {expected}; {remedy}")
    new.mkdir()
    files = archive.unpack(path, new, entry.name)
    hashes = {str(file): ((new / file).stat().st_size, sha256(new / file)) for file in files}
    chosen = _checkpoint(files, entry.name)
    recorded = known.recorded if known else datetime.now(UTC).isoformat(timespec="seconds")
    return Record(entry.name, url, digest, size, recorded, str(chosen), hashes)


def _checkpoint(files: Sequence[PurePosixPath], name: str) -> PurePosixPath:
    """The file to resume: a checkpoint of training before weights alone, those before integers alone."""

    def order(file: PurePosixPath) -> tuple[Any, ...]:
        rank = CHECKPOINTS.index(file.name) if file.name in CHECKPOINTS else len(CHECKPOINTS)
        return (file.name == INTEGERS_ONLY, rank, len(file.parts), str(file))

    usable = [file for file in files if file.name.endswith(SUFFIXES) and not file.name.startswith(".")]
    if not usable:
        shown = ", ".join(str(file) for file in files[:3])
        raise UserError(f"the archive of {name} has no checkpoint (.pth.tar or .pth) but {shown}; it cannot be used")
    return min(usable, key=order)


def _swap(new: Path, final: Path, old: Path) -> None:
    """Put ``new`` in the place of ``final``, which may exist."""
    if final.exists():
        os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old, ignore_errors=True)


def _twins(record: Record, zoo_dir: Path) -> tuple[str, ...]:
    """Names in the cache whose archive is the same, byte for byte."""
    names = [path.stem for path in sorted(zoo_dir.glob("*.json")) if path.stem != record.name]
    same = []
    for name in names:
        with contextlib.suppress(UserError):
            other = read_record(name, zoo_dir)
            if other is not None and other.sha256 == record.sha256:
                same.append(name)
    return tuple(same)
