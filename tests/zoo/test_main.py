"""The command line of ``python -m zoo``: help, one sentence for mistakes, exit status."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import refusal
from utils.errors import Interrupted
from zoo import __main__ as command
from zoo import manifest, store
from zoo.manifest import Published
from zoo.verify import Check

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("list", "download", "verify", "table", "train")


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert command.main(argv) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence of a command that fails."""
    return refusal(command.main, argv, capsys)


MISTAKES = {
    (): r"required: list \| download \| verify \| table \| train; see python -m zoo --help",
    ("frob",): r"invalid choice: 'frob' .*see python -m zoo --help",
    ("list", "--max-size", "-1"): r"-1 is not a positive number of MiB; see python -m zoo list --help",
    ("list", "--max-size", "nan"): r"nan is not a positive number of MiB",
    ("list", "--max-size", "x"): r"invalid number of MiB value: 'x'",
    ("list", "--own", "--published"): r"not allowed with argument --own",
    ("list", "--arch", "vgg"): r"no such entry of vgg",
    ("download",): r"required: NAME; see python -m zoo download --help",
    ("download", "resnet18_unifrom8"): r"no entry 'resnet18_unifrom8'; did you mean resnet18_uniform8 or ",
    ("verify", "nothing.pth"): r"there is no file nothing\.pth, and the zoo has no entry 'nothing\.pth'",
    ("verify", "resnet18_size0.5"): r"resnet18_size0\.5 is not in .*; get it with python -m zoo download",
    ("table", "--output", "/dev/null/x.csv"): r"cannot write /dev/null/x\.csv",
}


@pytest.mark.parametrize("argv", MISTAKES)
def test_mistakes(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache = ["--zoo-dir", str(tmp_path)] if argv[:1] in (("download",), ("verify",)) else []
    assert re.search(MISTAKES[argv], refused(capsys, *argv, *cache))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main([name, "--help"] if name else ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m zoo {name}".rstrip())
    if not name:
        for other in COMMANDS:
            assert re.search(rf"^    {other} ", text, re.MULTILINE)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown(capsys, "list")
    for entry in manifest.load():
        assert f"\n{entry.name} " in everything
    some = shown(capsys, "list", "--arch", "resnet50", "--max-size", "16.2", "--published")
    names = [line.split()[0] for line in some.splitlines() if line.startswith("resnet")]
    assert names == ["resnet50_size0.25", "resnet50_uniform4"]


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = shown(capsys, "table", "--output", str(tmp_path / "table.csv"))
    assert text.splitlines()[-2].startswith("agree to the last printed digit, of 22 quantized ResNet rows: ")
    assert (tmp_path / "table.csv").read_text().startswith("# cpu: ")
    assert "| row | size printed |" in shown(capsys, "table", "--markdown")


def test_download(
    capsys: pytest.CaptureFixture[str],
    drive_server: Any,
    entry: Published,
    good: bytes,
    zoo_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drive_server.content = good
    obtain = store.obtain
    monkeypatch.setattr(manifest, "find", lambda name: entry)
    monkeypatch.setattr(store, "obtain", lambda *a, **options: obtain(*a, **options, endpoint=drive_server.endpoint))
    first = shown(capsys, "download", entry.name, "--zoo-dir", str(zoo_dir)).splitlines()
    assert first[0] == str(zoo_dir / entry.name / "net" / "checkpoint.pth.tar")
    assert first[1].startswith(f"downloaded, archive of {len(good):,} bytes, sha256 ")
    assert first[2] == "no sha256 was known: this one is trusted and recorded, later downloads must have it"
    again = shown(capsys, "download", entry.name, "--zoo-dir", str(zoo_dir)).splitlines()
    assert again == [first[0], first[1].replace("downloaded", "already here")]
    (zoo_dir / "other.json").write_text((zoo_dir / f"{entry.name}.json").read_text())
    assert "note: the archive of other is the same file, so at least one name is wrong" in shown(
        capsys, "download", entry.name, "--zoo-dir", str(zoo_dir)
    )


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (None, 0), (False, 1)])
def test_verify_says_by_its_exit_status_whether_something_differs(
    ok: bool | None, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [Check("format", True, "a"), Check("hash", ok, "b"), Check("scheme", True, "c")]
    monkeypatch.setattr(command, "verify", lambda *args, **options: iter(lines))
    assert command.main(["verify", "x"]) == code
    assert capsys.readouterr().out.splitlines() == [str(line) for line in lines]


@pytest.mark.parametrize(("stop", "text"), [(KeyboardInterrupt(), "goes on from there"), (Interrupted("why"), "why")])
def test_ctrl_c(
    stop: BaseException, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_it(*args: Any, **options: Any) -> Any:
        raise stop

    monkeypatch.setattr(store, "obtain", raise_it)
    assert command.main(["download", "resnet18_uniform8"]) == 130
    assert text in capsys.readouterr().err


def test_as_a_module() -> None:
    line = [sys.executable, "-m", "zoo", "list", "--arch", "inceptionv3"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "inceptionv3_baseline" in done.stdout
    assert done.stderr == ""
