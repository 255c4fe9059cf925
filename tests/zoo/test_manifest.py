"""The zoo's list: the published rows as they were printed, and refusals that name what is wrong."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import bit_config
from utils.errors import UserError
from zoo import manifest
from zoo.manifest import Own, Published


@pytest.fixture
def path(tmp_path: Path, own_entry: Own) -> Path:
    """A copy of the manifest with one entry of our own."""
    content = manifest.read(manifest.MANIFEST)
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json(replace(content, own=(own_entry,))))
    return path


def test_published_rows_are_those_of_the_reference(shared: Path) -> None:
    rows = json.loads((shared / "reference" / "zoo_table.json").read_text())["rows"]
    expected = [{key: value for key, value in row.items() if key != "computed"} for row in rows]
    for row in expected:
        row["scheme"] = row["scheme"] or "float"
    published = [asdict(entry) for entry in manifest.read(manifest.MANIFEST).published]
    assert [{key: entry[key] for key in expected[0]} for entry in published] == expected


def test_every_scheme_of_a_published_row_is_known() -> None:
    entries = [entry for entry in manifest.load() if isinstance(entry, Published)]
    assert len(entries) == 27
    for entry in entries:
        assert entry.scheme == "float" or entry.scheme in bit_config.PUBLISHED[entry.arch]


def test_the_notes_say_where_figures_and_licence_come_from() -> None:
    notes = manifest.read(manifest.MANIFEST).notes
    assert "Zhen-Dong/HAWQ" in notes.source
    assert "1616df69fdd99f100a8d8a6e78742e0a89292634" in notes.source
    assert "MIT" in notes.licence
    assert "ImageNet" in notes.licence
    assert "not measured here" in notes.figures


def test_the_file_is_in_the_form_that_a_program_writes() -> None:
    assert manifest.MANIFEST.read_text() == manifest.to_json(manifest.read(manifest.MANIFEST))


def test_files_of_our_own_are_in_the_repository_with_their_logs() -> None:
    for entry in manifest.read(manifest.MANIFEST).own:
        assert entry.path.stat().st_size == entry.bytes
        assert (manifest.ENTRIES / entry.log).is_file()


def test_find_names_the_closest() -> None:
    assert manifest.find("resnet50_bops0.5").scheme == "bops_0.5"
    with pytest.raises(UserError, match=r"no entry 'ResNet50_bops_0.5'; did you mean resnet50_bops0\.5 or "):
        manifest.find("ResNet50_bops_0.5")
    with pytest.raises(UserError, match=r"no entry 'zzz'; python -m zoo list shows all"):
        manifest.find("zzz")


def test_record_adds_and_replaces_and_sorts(path: Path, own_entry: Own) -> None:
    before = manifest.read(path)
    first, changed = replace(own_entry, name="a_net"), replace(own_entry, top1=98.25)
    manifest.record(changed, path)
    manifest.record(first, path)
    after = manifest.read(path)
    assert after.own == (first, changed)
    assert (after.published, after.notes) == (before.published, before.notes)
    text = path.read_text()
    manifest.record(first, path)
    assert path.read_text() == text


def test_record_refuses_what_could_not_be_read_again(path: Path, own_entry: Own) -> None:
    text = path.read_text()
    for bad, expected in (
        (replace(own_entry, name="resnet18_uniform8"), "the name 'resnet18_uniform8' occurs twice"),
        (replace(own_entry, file="../net"), r"file '\.\./net' is not a file below zoo/entries"),
        (replace(own_entry, top1=float("nan")), "top1 is nan, expected float"),
    ):
        with pytest.raises(UserError, match=expected):
            manifest.record(bad, path)
        assert path.read_text() == text


def _own(content: Any) -> Any:
    return content["own"][0]


def _row(content: Any) -> Any:
    return content["published"]["rows"][0]


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "version": (lambda c: c.update(version=2), "version 2, expected 1"),
    "key missing": (lambda c: c.pop("own"), r"the file has \['published', 'version'\], expected the keys"),
    "section key": (lambda c: c["published"].pop("licence"), r"published has .* expected the keys"),
    "no list": (lambda c: c.update(own={}), "own is dict, expected a list"),
    "no object": (lambda c: c["own"].append(5), "entry number 1 of own is int, expected an object"),
    "field missing": (lambda c: _own(c).pop("seed"), "entry 'own_net': 'seed' is missing"),
    "name missing": (lambda c: _row(c).pop("name"), "entry number 0 of published: 'name' is missing"),
    "field unknown": (lambda c: _row(c).update(colour=1), "entry 'resnet18_baseline': 'colour' is unknown"),
    "type": (lambda c: _own(c).update(images="many"), "entry 'own_net': images is 'many', expected int"),
    "bool": (lambda c: _own(c).update(seed=True), "entry 'own_net': seed is True, expected int"),
    "null": (lambda c: _row(c).update(top1=None), "entry 'resnet18_baseline': top1 is None, expected float"),
    "union": (lambda c: _row(c).update(speedup="3x"), r"speedup is '3x', expected float \| None"),
    "versions": (lambda c: _own(c).update(versions={"torch": 2}), r"versions is \{'torch': 2\}, expected dict\[str"),
    "name": (lambda c: _row(c).update(name="../x"), r"the name may have letters"),
    "twice": (lambda c: _own(c).update(name="resnet18_size0.5"), "the name 'resnet18_size0.5' occurs twice"),
    "hash": (lambda c: _own(c).update(sha256="abc"), "sha256 'abc' is not 64 hexadecimal digits"),
    "percent": (lambda c: _own(c).update(top1=101), "top1 101 is no percentage"),
    "control": (lambda c: _own(c).update(control_top1=-1), "control_top1 -1 is no percentage"),
    "size": (lambda c: _row(c).update(size_mb=0), "size 0 and BOPS 1858 must be positive"),
    "images": (lambda c: _own(c).update(images=0), "images 0 and bytes 5 must be positive"),
    "absolute": (lambda c: _own(c).update(file="/etc/passwd"), "file '/etc/passwd' is not a file below zoo/entries"),
    "log": (lambda c: _own(c).update(log="a/../../b"), "log 'a/../../b' is not a file below zoo/entries"),
    "arch": (lambda c: _own(c).update(arch=""), "arch and scheme must not be empty"),
    "drive": (lambda c: _row(c).update(drive_id="a b"), "drive_id 'a b' is no id of Google Drive"),
    "address": (lambda c: _row(c).update(drive_id=None), "expected either a drive_id or a url"),
    "both": (lambda c: _row(c).update(url="https://x.org/y"), "expected either a drive_id or a url"),
    "http": (lambda c: _row(c).update(drive_id=None, url="http://x.org"), "does not start with https://"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_refused_by_name(case: str, path: Path) -> None:
    change, expected = WRONG[case]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=expected) as caught:
        manifest.read(path)
    assert str(caught.value).startswith(f"the zoo's list {path} is wrong: ")


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the zoo's list .*No such file"):
        manifest.read(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"is not JSON .*restore the file"):
        manifest.read(tmp_path / "bad.json")
