"""A file that is old or new but never half: kills at random moments, full disks, failing writers."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from utils.atomic_file import STALE_SECONDS, write_atomically
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

WRITES_FOREVER = """
import sys
from pathlib import Path
from utils.atomic_file import write_atomically
for number in range(10**9):
    line = f"{number:015d}\\n".encode()
    def write(file):
        for _ in range(200):
            file.write(line * 500)
    write_atomically(Path(sys.argv[1]), write)
"""


def written_by_others(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A Python process that runs `script` with the project on its path."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    """Until `path` exists, at most 60 seconds."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    moments = random.Random(0)
    for _ in range(12):
        with written_by_others(WRITES_FOREVER, path) as process:
            wait_for(path)
            time.sleep(moments.uniform(0.05, 0.25))
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 16 * 500 * 200
        assert content == content[:16] * (500 * 200)


def no_space(file: BinaryIO) -> None:
    """A writer that meets a full disk in the middle."""
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device; free space"):
        write_atomically(path, no_space)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from utils.atomic_file import write_atomically
from utils.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), lambda file: file.write(bytes(5000)))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def test_limit_of_the_system_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with written_by_others(LIMITED, path) as process:
        _, message = process.communicate()
    assert process.returncode == 1
    assert message.decode().startswith(f"error: cannot write {path}: File too large; ")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_folders_are_made_and_links_followed(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file"
    write_atomically(target, lambda file: None)
    link = tmp_path / "link"
    link.symlink_to(target)

    def write(file: BinaryIO) -> None:
        file.write(b"new")

    write_atomically(link, write)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "file" / "inside", lambda file: None)


def test_leftovers_of_killed_processes_go_after_an_hour(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".file.1.tmp", tmp_path / ".file.2.tmp"
    for path, age in ((old, STALE_SECONDS + 10), (fresh, STALE_SECONDS - 100)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age, time.time() - age))
    write_atomically(tmp_path / "file", lambda file: None)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".file.2.tmp", "file"]
