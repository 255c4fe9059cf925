"""The list of the zoo: rows that the original published, and entries trained and measured by this project.

``manifest.json`` is data; programs write its part ``own`` (:func:`record`), nobody edits numbers there by hand.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from utils.atomic_file import write_text
from utils.errors import UserError

MANIFEST = Path(__file__).resolve().parent / "manifest.json"
ENTRIES = MANIFEST.parent / "entries"
VERSION = 1
FLOAT = "float"  # scheme of entries without quantization
HASH = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
DRIVE_ID = re.compile(r"[A-Za-z0-9_-]{10,100}")
BROKEN = "restore the file from the repository"

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A row of the original's model zoo: every figure is as printed there, none was measured here.

    scheme: key of `bit_config`, "float" for the baselines.  size_mb: "MB" as printed (MiB in fact, but for mixed
    ResNet50 rows).  bops_g: 1e9 bit operations.  speedup: against float, T4, batch 8; None where none is printed.
    top1: percent on ImageNet.  drive_id: file of the archive on Google Drive; or url: an https address of it.
    sha256: of the archive, None where nobody has recorded it.
    """

    name: str
    arch: str
    scheme: str
    description: str
    size_mb: float
    bops_g: float
    speedup: float | None
    top1: float
    sha256: str | None = None
    drive_id: str | None = None
    url: str | None = None

    @property
    def size(self) -> float:
        """What ``--max-size`` compares, MiB."""
        return self.size_mb


@dataclass(frozen=True)
class Own:
    """An entry that this project trained and measured; its file is in the repository.

    file: below zoo/entries, with "/".  sha256, bytes: of that file.  size_mib, bops_g: uniform convention of
    `cost_model`.  top1: percent on ``images`` validation images, of the integer graph (of the float network for
    float entries).  control_top1: of the float network after equal training, None for float entries.  trained_on: the
    data, in words.  recipe: the name in recipes.yaml and its profile.  machine, versions, commit, command: where the
    figures come from.  log: file of the training log, below zoo/entries.
    """

    name: str
    arch: str
    scheme: str
    file: str
    sha256: str
    bytes: int
    size_mib: float
    bops_g: float
    top1: float
    images: int
    trained_on: str
    recipe: str
    seed: int
    control_top1: float | None
    machine: str
    versions: dict[str, str]
    commit: str
    command: str
    log: str

    @property
    def size(self) -> float:
        """What ``--max-size`` compares, MiB."""
        return self.size_mib

    @property
    def path(self) -> Path:
        """The file itself."""
        return ENTRIES / self.file


Entry = Published | Own


@dataclass(frozen=True)
class Notes:
    """What holds for all published rows: where they are from, what may be done with them, how to read the figures."""

    source: str
    licence: str
    figures: str


@dataclass(frozen=True)
class Manifest:
    """The whole file."""

    notes: Notes
    published: tuple[Published, ...]
    own: tuple[Own, ...]


def load() -> tuple[Entry, ...]:
    """All entries: the published rows in the order of their tables, then our own by name.

    Raises UserError, naming the entry and the field, for a manifest that is missing or not as described here.
    """
    manifest = read(MANIFEST)
    return (*manifest.published, *manifest.own)


def find(name: str) -> Entry:
    """The entry of that name.  Raises UserError with the closest names for another one."""
    entries = {entry.name: entry for entry in load()}
    if name in entries:
        return entries[name]
    close = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "python -m zoo list shows all"
    raise UserError(f"the zoo has no entry {name!r}; {hint}")


def record(entry: Own, path: Path | None = None) -> None:
    """Add or replace one of our own entries in the manifest, atomically; entries stay sorted by name.

    Raises UserError for an entry that :func:`read` would refuse, for the name of a published row, and where the
    system refuses to write.
    """
    path = MANIFEST if path is None else path
    manifest = read(path)
    own = {old.name: old for old in manifest.own} | {entry.name: entry}
    rows = tuple(own[name] for name in sorted(own))
    text = to_json(Manifest(manifest.notes, manifest.published, rows))
    parse(json.loads(text), path)
    write_text(path, text)


def to_json(manifest: Manifest) -> str:
    """The text of the file: one field a line for our own entries, one row a line for published ones."""
    published = ",\n".join(f"   {json.dumps(asdict(row))}" for row in manifest.published)
    notes = json.dumps(asdict(manifest.notes), indent=1)[1:-1].strip("\n")
    own = json.dumps([asdict(row) for row in manifest.own], indent=1)
    return f'{{\n"version": {VERSION},\n"published": {{\n{notes},\n "rows": [\n{published}\n ]\n}},\n"own": {own}\n}}\n'


def read(path: Path) -> Manifest:
    """Read and check a manifest; raises UserError as :func:`load`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the zoo's list {path}: {error.strerror or error}; {BROKEN}") from error
    except ValueError as error:
        raise UserError(f"the zoo's list {path} is not JSON ({error}); {BROKEN}") from error
    return parse(content, path)


def parse(content: Any, path: Path) -> Manifest:
    """The manifest in parsed JSON; path: for messages.  Raises UserError, naming the first entry that is wrong."""
    try:
        _check_keys(content, ("version", "published", "own"), "the file")
        if content["version"] != VERSION:
            raise UserError(f"version {content['version']!r}, expected {VERSION}")
        section = content["published"]
        _check_keys(section, ("source", "licence", "figures", "rows"), "published")
        notes = _build(Notes, {key: section[key] for key in ("source", "licence", "figures")}, "published")
        published = tuple(_entry(Published, row, i) for i, row in enumerate(_rows(section["rows"], "published")))
        own = tuple(_entry(Own, row, i) for i, row in enumerate(_rows(content["own"], "own")))
        _check_names([*published, *own])
    except UserError as error:
        raise UserError(f"the zoo's list {path} is wrong: {error}; {BROKEN}") from error
    return Manifest(notes, published, own)


def _check_keys(content: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(content, Mapping) or set(content) != set(keys):
        got = sorted(content) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{where} has {got}, expected the keys {sorted(keys)}")


def _rows(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise UserError(f"{where} is {type(content).__name__}, expected a list of entries")
    return content


def _entry(kind: type[T], row: Any, number: int) -> T:
    name = row.get("name") if isinstance(row, Mapping) else None
    where = f"entry {name!r}" if isinstance(name, str) else f"entry number {number} of {kind.__name__.lower()}"
    entry = _build(kind, row, where)
    _CHECKS[kind](entry, where)
    return entry


def _build(kind: type[T], row: Any, where: str) -> T:
    """An instance of a dataclass whose fields have the annotated types; None defaults may be left out."""
    hints = get_type_hints(kind)
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is {type(row).__name__}, expected an object")
    needed = {field.name for field in fields(kind) if field.default is not None}  # type: ignore[arg-type]
    wrong = sorted((needed - set(row)) | (set(row) - set(hints)))
    if wrong:
        raise UserError(f"{where}: {wrong[0]!r} is {'unknown' if wrong[0] in row else 'missing'}")
    for key, value in row.items():
        if not _fits(value, hints[key]):
            raise UserError(f"{where}: {key} is {value!r}, expected {_words(hints[key])}")
    return kind(**row)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (UnionType, Union):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    return type(value) is hint


def _words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)


def _check_published(entry: Published, where: str) -> None:
    _check_common(entry, where)
    if (entry.drive_id is None) == (entry.url is None):
        raise UserError(f"{where}: expected either a drive_id or a url")
    if entry.drive_id is not None and not DRIVE_ID.fullmatch(entry.drive_id):
        raise UserError(f"{where}: drive_id {entry.drive_id!r} is no id of Google Drive")
    if entry.url is not None and not entry.url.startswith("https://"):
        raise UserError(f"{where}: url {entry.url!r} does not start with https://")
    _check_hash(entry.sha256, where)


def _check_own(entry: Own, where: str) -> None:
    _check_common(entry, where)
    _check_hash(entry.sha256, where)
    for key, text in (("file", entry.file), ("log", entry.log)):
        path = PurePosixPath(text)
        if path.is_absolute() or ".." in path.parts or "\\" in text or not path.name:
            raise UserError(f"{where}: {key} {text!r} is not a file below zoo/entries")
    if entry.images < 1 or entry.bytes < 1:
        raise UserError(f"{where}: images {entry.images} and bytes {entry.bytes} must be positive")
    if entry.control_top1 is not None and not 0 <= entry.control_top1 <= 100:
        raise UserError(f"{where}: control_top1 {entry.control_top1} is no percentage")


def _check_common(entry: Entry, where: str) -> None:
    if not NAME.fullmatch(entry.name):
        raise UserError(f"{where}: the name may have letters, digits, '.', '_' and '-' only")
    if not (entry.arch and entry.scheme):
        raise UserError(f"{where}: arch and scheme must not be empty")
    if entry.size <= 0 or entry.bops_g <= 0:
        raise UserError(f"{where}: size {entry.size} and BOPS {entry.bops_g} must be positive")
    if not 0 <= entry.top1 <= 100:
        raise UserError(f"{where}: top1 {entry.top1} is no percentage")


def _check_hash(text: str | None, where: str) -> None:
    if text is not None and not HASH.fullmatch(text):
        raise UserError(f"{where}: sha256 {text!r} is not 64 hexadecimal digits")


def _check_names(entries: Sequence[Entry]) -> None:
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the name {twice[0]!r} occurs twice")


_CHECKS: Mapping[type, Any] = {Published: _check_published, Own: _check_own}
