"""``python -m zoo verify``: what a file is, whether it is the recorded one, fits its scheme and has its accuracy."""

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import quant_train
from utils.errors import UserError
from utils.flag_checks import check
from utils.run_log import logging_to_console
from utils.train_flags import build_parser
from zoo import manifest, recipes, store
from zoo.kinds import Found, check_scheme, identify
from zoo.manifest import FLOAT, Entry, Own

PUBLISHED_IMAGES = 50_000  # ImageNet's validation images
PUBLISHED_TOLERANCE = 0.5  # percent: model_zoo.md itself says that files differ a little from their rows
FLOAT_TOLERANCE = 5  # images: float networks are computed in another order on other machines


@dataclass(frozen=True)
class Check:
    """One line of the answer.  ok: None where there is nothing to compare with."""

    what: str
    ok: bool | None
    text: str

    def __str__(self) -> str:
        word = {True: "ok", False: "DIFFERS", None: "-"}[self.ok]
        return f"{self.what:<9} {word:<8} {self.text}"


@dataclass(frozen=True)
class Target:
    """The file to look at, the entry it belongs to, and the record of its download; None where there is none."""

    path: Path
    entry: Entry | None
    record: store.Record | None
    whole: bool = False  # all files of the download


def verify(
    target: str, zoo_dir: Path, *, data: str | None = None, scheme: str | None = None, arch: str | None = None
) -> Iterator[Check]:
    """Format, hashes, scheme and, with ``data``, accuracy of a file or an entry, one after the other.

    target: path of a file, or name of an entry that is already here.  scheme, arch: what to check against; None for
    the entry's, or what the file says.  Raises UserError for what cannot be read at all.
    """
    subject = find_target(target, zoo_dir)
    found = identify(subject.path)
    named = f", names {found.arch}" if found.arch else ""
    scheme_named = f" {found.scheme}" if found.arch and found.scheme else ""
    yield Check("format", True, f"{found.kind}{named}{scheme_named}: {found.details}")
    yield _hash(subject, zoo_dir)
    entry = subject.entry
    arch = arch or (entry.arch if entry else None)
    scheme = scheme or _expected_scheme(entry, found)
    yield _scheme(found, arch, scheme)
    if data is not None:
        yield _accuracy(subject, found, data, arch, scheme)


def _expected_scheme(entry: Entry | None, found: Found) -> str | None:
    """The scheme that an entry says its file has, as `bit_config.load_scheme` takes it; None to ask the file."""
    if entry is None or entry.scheme == FLOAT:
        return None
    recipe = recipes.load().get(entry.name)
    if isinstance(entry, Own) and recipe is not None and recipe.scheme.endswith(".yaml"):
        return os.path.relpath(manifest.MANIFEST.parents[1] / recipe.scheme)
    return entry.scheme if found.original or isinstance(entry, Own) else None


def find_target(target: str, zoo_dir: Path) -> Target:
    """What a user means: the name of an entry, or a file, which may be one of the zoo.

    Raises UserError for neither, and for an entry that was not downloaded.
    """
    entries = manifest.load()
    path = Path(target)
    entry = next((entry for entry in entries if entry.name == target), None)
    if isinstance(entry, Own):
        return Target(entry.path, entry, None)
    if entry is not None:
        done = store.stored(entry.name, zoo_dir)
        if done is None:
            raise UserError(f"{target} is not in {zoo_dir}; get it with python -m zoo download {target}")
        return Target(done.checkpoint, entry, done.record, whole=True)
    if not path.exists():
        try:
            manifest.find(target)
        except UserError as error:
            raise UserError(f"there is no file {target}, and {error}") from error
    return Target(path, *_owner(path, zoo_dir, entries))


def _owner(path: Path, zoo_dir: Path, entries: tuple[Entry, ...]) -> tuple[Entry | None, store.Record | None]:
    """The entry whose file this is: by its place in the repository or the cache, else by its content."""
    place = path.resolve()
    for entry in entries:
        if isinstance(entry, Own) and entry.path.resolve() == place:
            return entry, None
        if place.is_relative_to((zoo_dir / entry.name).resolve()):
            return entry, store.read_record(entry.name, zoo_dir)
    if path.is_file():
        digest = store.sha256(path)
        return next((entry for entry in entries if isinstance(entry, Own) and entry.sha256 == digest), None), None
    return None, None


def _hash(subject: Target, zoo_dir: Path) -> Check:
    entry, record = subject.entry, subject.record
    if isinstance(entry, Own):
        digest = store.sha256(subject.path)
        same = digest == entry.sha256
        text = f"sha256 {digest} is that of {entry.name} in the manifest" if same else _other(digest, entry.sha256)
        return Check("hash", same, text)
    if record is None:
        digest = store.sha256(subject.path)
        return Check("hash", None, f"sha256 {digest}; no entry or download is known to compare it with")
    folder = zoo_dir / record.name
    files = list(record.files) if subject.whole else [str(subject.path.resolve().relative_to(folder.resolve()))]
    for file in files:
        expected = record.files.get(file, (0, "nothing"))[1]
        found = store.sha256(folder / file, f"checking {file}")
        if found != expected:
            return Check("hash", False, f"{file}: {_other(found, expected)}")
    known = "by the manifest" if entry and entry.sha256 else f"by the first download alone, {record.recorded}"
    return Check("hash", True, f"{len(files)} of {len(record.files)} files of {record.name} as recorded ({known})")


def _other(got: str, expected: str) -> str:
    return f"sha256 {got}, recorded is {expected}"


def _scheme(found: Found, arch: str | None, scheme: str | None) -> Check:
    try:
        text = check_scheme(found, arch, scheme)
    except UserError as error:
        return Check("scheme", False, str(error))
    if text is not None:
        return Check("scheme", True, text)
    if found.is_float and found.scheme == FLOAT and (arch or found.arch):
        return Check("scheme", None, "float, there are no bits to check")
    missing = "--arch" if arch is None and found.arch is None else "--scheme"
    return Check("scheme", None, f"nothing to check against; give {missing}")


def _accuracy(subject: Target, found: Found, data: str, arch: str | None, scheme: str | None) -> Check:
    top1, images = measure(found, data, arch, scheme)
    text, entry = f"top-1 {top1:.2f} % on {images} images", subject.entry
    if entry is None:
        return Check("accuracy", None, f"{text}; no entry is known to compare it with")
    difference = top1 - entry.top1
    if not isinstance(entry, Own):
        text += f", published (not measured here) {entry.top1:.2f} % on ImageNet, {difference:+.2f}"
        if images != PUBLISHED_IMAGES:
            return Check("accuracy", None, f"{text}; these are not its {PUBLISHED_IMAGES:,} validation images")
        return Check("accuracy", abs(difference) <= PUBLISHED_TOLERANCE, text)
    text += f", recorded {entry.top1:.2f} % on {entry.images} ({entry.machine}, commit {entry.commit})"
    if images != entry.images:
        return Check("accuracy", None, f"{text}; not the same images")
    slack = 100 * FLOAT_TOLERANCE / images if entry.scheme == FLOAT else 0.0
    return Check("accuracy", abs(difference) <= slack + 1e-9, text)


def measure(found: Found, data: str, arch: str | None, scheme: str | None) -> tuple[float, int]:
    """Top-1 in percent and number of images, by ``quant_train.py -e``; its files go to a temporary folder.

    Raises UserError as that does.
    """
    flags = [*found.flags, "-e", "--data", data]
    if found.original:
        flags += ["-a", arch] if arch else []
        flags += ["--quant-scheme", scheme] if scheme else []
    if found.pairs is None and not found.original:
        if arch is None:
            raise UserError(f"{found.path} does not say which network it is; give --arch")
        flags += ["-a", arch, "--quant-scheme", FLOAT]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        flags += ["--save-path", folder, "--report", str(report)]
        with logging_to_console():
            args = build_parser().parse_args(flags)
            check(args)
            quant_train.run(args, shlex.join(["python", "quant_train.py", *flags]))
        measured = json.loads(report.read_text(encoding="utf-8"))
    top1 = measured["top1_float"] if measured["top1_integer"] is None else measured["top1_integer"]
    return float(top1), int(measured["images"])
