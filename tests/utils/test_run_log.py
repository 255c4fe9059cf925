"""What a run prints and appends to its log."""

import errno
import os
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.run_log import log, log_to, logging_to_console


def test_lines_go_to_the_console_and_are_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "log.log"
    for word in ("one", "two"):
        with logging_to_console():
            log_to(path)
            log.info("line %s", word)
    assert capsys.readouterr().out == "line one\nline two\n"
    assert path.read_text() == "line one\nline two\n"
    assert not log.handlers


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*log\.log: .*; choose another place"):
        log_to(tmp_path / "file" / "log.log")


def test_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to_console():
        log_to(tmp_path / "log.log")

        def full(_: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(log.handlers[-1].stream, "write", full)
        with pytest.raises(UserError, match=r"cannot write the log .*No space left on device"):
            log.info("a line")
