"""The downloader against a server that imitates Drive: success or one clear sentence, and never half a file."""

import builtins
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from zoo import archive, drive, manifest, store, transfer
from zoo.manifest import Own, Published

ROOT = Path(__file__).resolve().parents[2]
NAME = "net_uniform8"


@pytest.fixture
def get(drive_server: Any, entry: Published, zoo_dir: Path, good: bytes) -> Callable[..., store.Stored]:
    """get("cut", 500, "whole"): downloads the entry; the server answers in that way."""
    drive_server.content = good

    def get(*answers: Any, force: bool = False, entry: Published = entry) -> store.Stored:
        if answers:
            drive_server.answers = list(answers)
        return store.obtain(entry, zoo_dir, force=force, endpoint=drive_server.endpoint)

    return get


def names(folder: Path) -> set[str]:
    """What is in the cache but for the lock, which is empty."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")} if folder.exists() else set()


def refused(get: Callable[..., Any], *answers: Any, **options: Any) -> str:
    """The sentence of a download that fails; nothing may be there under the final name."""
    with pytest.raises(UserError) as caught:
        get(*answers, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ---- success --------------------------------------------------------------------------------------------------------


def assert_complete(done: store.Stored, zoo_dir: Path, weights: bytes) -> None:
    assert done.checkpoint == zoo_dir / NAME / "net" / "checkpoint.pth.tar"
    assert done.checkpoint.read_bytes() == weights
    assert names(zoo_dir) == {NAME, f"{NAME}.json"}


WAYS = {
    "plain file": (["whole"], [None]),
    "a page to confirm": (["confirm"], [None, None]),
    "no length": (["without_length"], [None]),
    "no ranges": (["without_ranges"], [None]),
    "an error before": ([500, 503, 429, "whole"], [None] * 4),
    "cut without ranges": (["cut_without_ranges", "without_ranges"], [None] * 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_succeeds(way: str, get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes) -> None:
    answers, ranges = WAYS[way]
    assert_complete(get(*map(answer, answers)), zoo_dir, weights)
    asked = [text and text.split("=")[0] for text in drive_server.ranges]
    expected = [*ranges[:-1], None] if way != "cut without ranges" else [None, None, "bytes"]
    assert asked == expected


def test_a_connection_cut_at_half_is_resumed_where_it_broke(
    get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes, good: bytes
) -> None:
    assert_complete(get(answer("cut"), answer("whole")), zoo_dir, weights)
    assert drive_server.ranges == [None, None, f"bytes={len(good) // 2}-"]


def test_behind_a_page_to_confirm_only_the_file_is_asked_for_in_part(
    get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes, good: bytes
) -> None:
    page, rest = answer("confirm"), [answer("cut"), answer("confirm")]
    assert_complete(get(page, *rest), zoo_dir, weights)
    paths = [path.split("?")[0] for path, _ in drive_server.requests]
    assert paths == ["/uc", "/download", "/uc", "/download"]
    assert drive_server.ranges == [None, None, None, f"bytes={len(good) // 2}-"]


def test_a_later_call_goes_on_with_what_an_earlier_one_got(
    get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes, good: bytes
) -> None:
    refused(get, answer("cut"), answer(500))
    assert names(zoo_dir) == {f".{NAME}.part", f".{NAME}.part.json"}
    drive_server.requests.clear()
    assert_complete(get(answer("whole")), zoo_dir, weights)
    assert drive_server.ranges[-1] == f"bytes={len(good) // 2}-"


def test_a_part_of_another_version_is_thrown_away(
    get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes
) -> None:
    refused(get, answer("cut"), answer(500))
    note = zoo_dir / f".{NAME}.part.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"validator": '"another"'}))
    assert_complete(get(answer("whole")), zoo_dir, weights)


@pytest.mark.parametrize("note", ["", "[]", '{"total": 5}'])
def test_a_part_without_a_usable_note_is_thrown_away(
    get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes, note: str
) -> None:
    refused(get, answer("cut"), answer(500))
    (zoo_dir / f".{NAME}.part.json").write_text(note)
    drive_server.requests.clear()
    assert_complete(get(answer("whole")), zoo_dir, weights)
    assert drive_server.ranges == [None]


def test_a_file_that_became_another_on_the_server_is_fetched_anew(
    get: Any, answer: Any, drive_server: Any, zoo_dir: Path, weights: bytes, tar_gz: Any
) -> None:
    refused(get, answer("cut"), answer(500))
    drive_server.content = tar_gz(("net/checkpoint.pth.tar", weights))
    assert_complete(get(answer("whole")), zoo_dir, weights)
    assert drive_server.ranges[-1] is None


def test_the_second_call_does_not_contact_the_server(get: Any, drive_server: Any) -> None:
    first = get()
    drive_server.requests.clear()
    second = get()
    assert (second.checkpoint, second.record) == (first.checkpoint, first.record)
    assert (first.new, first.first, second.new, second.first) == (True, True, False, False)
    assert drive_server.requests == []


def test_the_first_download_is_recorded(
    get: Any, drive_server: Any, zoo_dir: Path, good: bytes, weights: bytes
) -> None:
    record = get().record
    assert record == store.read_record(NAME, zoo_dir)
    assert record.sha256 == hashlib.sha256(good).hexdigest()
    assert record.bytes == len(good)
    assert record.url == f"{drive_server.endpoint}?export=download&id=0123456789abcdef"
    assert record.files["net/checkpoint.pth.tar"] == (len(weights), hashlib.sha256(weights).hexdigest())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record.recorded)


def test_force_downloads_again_and_replaces(get: Any, drive_server: Any, zoo_dir: Path, weights: bytes) -> None:
    before = get().record
    (zoo_dir / NAME / "net" / "checkpoint.pth.tar").write_bytes(b"changed")
    done = get(force=True)
    assert_complete(done, zoo_dir, weights)
    assert done.record == before
    assert not done.first
    assert len(drive_server.requests) == 2


def test_a_file_placed_by_hand_is_taken_instead(
    get: Any, drive_server: Any, zoo_dir: Path, good: bytes, weights: bytes
) -> None:
    zoo_dir.mkdir(parents=True)
    (zoo_dir / f"{NAME}.tar.gz").write_bytes(good)
    done = get()
    assert done.checkpoint.read_bytes() == weights
    assert done.by_hand == zoo_dir / f"{NAME}.tar.gz"
    assert drive_server.requests == []
    assert (zoo_dir / f"{NAME}.tar.gz").read_bytes() == good


def test_a_plain_file_of_torch_save(get: Any, drive_server: Any, zoo_dir: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {"weight": torch.ones(3)}}, tmp_path / "plain")
    drive_server.content = (tmp_path / "plain").read_bytes()
    done = get()
    assert done.checkpoint == zoo_dir / NAME / "checkpoint.pth.tar"
    assert done.checkpoint.read_bytes() == drive_server.content


def test_a_tar_file_that_is_not_compressed(
    get: Any, drive_server: Any, tar_gz: Any, weights: bytes, zoo_dir: Path
) -> None:
    drive_server.content = tar_gz(("net/checkpoint.pth.tar", weights), mode="w:")
    assert_complete(get(), zoo_dir, weights)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a/quantized_checkpoint.pth.tar", "a/model_best.pth.tar", "a/checkpoint.pth.tar"], "a/checkpoint.pth.tar"),
        (["a/quantized_checkpoint.pth.tar", "a/model_best.pth.tar"], "a/model_best.pth.tar"),
        (["a/quantized_checkpoint.pth.tar", "a/resnet.pth", "a/log.log"], "a/resnet.pth"),
        (["a/._checkpoint.pth.tar", "a/b/checkpoint.pth.tar", "checkpoint.pth.tar"], "checkpoint.pth.tar"),
        (["quantized_checkpoint.pth.tar", "notes.txt"], "quantized_checkpoint.pth.tar"),
    ],
)
def test_which_file_of_an_archive_is_the_checkpoint(
    get: Any, drive_server: Any, tar_gz: Any, zoo_dir: Path, files: list[str], chosen: str
) -> None:
    drive_server.content = tar_gz(*((file, file.encode()) for file in files))
    assert get().checkpoint == zoo_dir / NAME / chosen


def test_archives_that_are_the_same_are_named(get: Any, entry: Published) -> None:
    """Some of the original's archives were the same file under two names."""
    assert get().twins == ()
    other = replace(entry, name="net_bops0.5")
    assert get(entry=other).twins == (NAME,)
    assert get(entry=other).twins == (NAME,)


# ---- one sentence ---------------------------------------------------------------------------------------------------

REFUSALS = {
    "quota": ("quota", r"Google Drive says: Too many users have viewed or downloaded this file recently"),
    "page": ("html", r"Google Drive says: .*public link"),
    "page without its type": ("disguised_html", r"Google Drive says: .*public link"),
    "404": (404, r"status 404, it is not there"),
    "403": (403, r"Google Drive says|status 403"),
    "error that stays": (500, r"status 500, 5 times in a row"),
    "never more than half": ("cut_without_ranges", r"the transfer ended after \d+ of \d+ bytes, 5 times in a row"),
    "length too large": ("too_long", r"the transfer ended after \d+ of \d+ bytes, 5 times in a row"),
    "page that leads away": ("leading_away", r"leads to example\.org, which is not a host of 127\.0\.0\.1"),
    "redirect that leads away": ("redirecting_away", r"leads to example\.org, which is not a host of 127\.0\.0\.1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_is_refused(case: str, get: Any, answer: Any, zoo_dir: Path) -> None:
    kind, expected = REFUSALS[case]
    sentence = refused(get, answer(kind))
    assert re.match(
        rf"cannot download {NAME}: .*{expected}.*; try again later, or get the file from https://", sentence
    )
    assert f"place it as {zoo_dir / NAME}.tar.gz" in sentence
    assert names(zoo_dir) <= {f".{NAME}.part", f".{NAME}.part.json"}


def test_a_page_instead_of_a_plain_https_file(
    get: Any, answer: Any, drive_server: Any, entry: Published, monkeypatch: pytest.MonkeyPatch, zoo_dir: Path
) -> None:
    url = drive_server.endpoint
    monkeypatch.setattr(store, "_source", lambda entry, endpoint: transfer.Source(url, url))
    plain = replace(entry, drive_id=None, url="https://example.org/net.tar.gz")
    assert "a web page instead of the file" in refused(get, answer("html"), entry=plain)
    assert names(zoo_dir) == set()


def test_a_server_that_is_not_there(get: Any, entry: Published, drive_server: Any, zoo_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no connection to 127\.0\.0\.1:1 .*5 times in a row"):
        store.obtain(entry, zoo_dir, endpoint="http://127.0.0.1:1/uc")


def test_a_host_that_does_not_exist_is_not_asked_again(
    entry: Published, zoo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    tries = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        tries.append(args)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match=r"drive\.google\.com cannot be found; is there a network\?"):
        store.obtain(entry, zoo_dir)
    assert len(tries) == 1


def test_a_server_may_ask_for_a_pause(get: Any, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)
    get(answer(429, Retry_After="7"), answer(503, Retry_After="100000"), answer(500), answer("whole"))
    assert pauses == [7.0, transfer.LONGEST_WAIT, 0.0]


def test_pauses_grow_between_tries(get: Any, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(transfer, "BACK_OFF", (1.0, 2.0, 4.0))
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)
    refused(get, answer(500))
    assert pauses == [1.0, 2.0, 4.0]


def test_a_length_that_is_too_small_shows_in_the_archive(get: Any, answer: Any, zoo_dir: Path) -> None:
    assert re.search(f"{NAME} is cut short or damaged .*download it again", refused(get, answer("too_short")))
    assert names(zoo_dir) == set()


def test_a_wrong_hash_is_refused_and_the_right_one_taken(
    get: Any, entry: Published, good: bytes, zoo_dir: Path
) -> None:
    wrong, right = replace(entry, sha256="0" * 64), replace(entry, sha256=hashlib.sha256(good).hexdigest())
    sentence = refused(get, entry=wrong)
    assert re.search(rf"{NAME} has the sha256 {right.sha256}, the zoo's list has {'0' * 64}; do not use it", sentence)
    assert names(zoo_dir) == set()
    done = get(entry=right)
    assert (done.new, done.first) == (True, False)


def test_another_file_than_the_first_time_is_refused(
    get: Any, drive_server: Any, zoo_dir: Path, tar_gz: Any, weights: bytes
) -> None:
    get()
    drive_server.content = tar_gz(("checkpoint.pth.tar", b"other"))
    sentence = refused(get, force=True)
    assert f"to trust the new file delete {zoo_dir / NAME}.json" in sentence
    assert (zoo_dir / NAME / "net" / "checkpoint.pth.tar").read_bytes() == weights
    assert names(zoo_dir) == {NAME, f"{NAME}.json"}
    (zoo_dir / f"{NAME}.json").unlink()
    assert get().checkpoint.read_bytes() == b"other"


@pytest.mark.parametrize("harm", ["shorter", "gone"])
def test_a_stored_file_that_was_changed_is_not_handed_out(get: Any, zoo_dir: Path, harm: str) -> None:
    path = get().checkpoint
    path.write_bytes(b"short") if harm == "shorter" else path.unlink()
    assert refused(get) == f"{path} was changed after the download; python -m zoo download {NAME} --force repeats it"


def test_a_damaged_record_is_named(get: Any, zoo_dir: Path) -> None:
    get()
    (zoo_dir / f"{NAME}.json").write_text("{}")
    assert re.match(rf"cannot use the record {zoo_dir / NAME}\.json .*delete it", refused(get))


# ---- archives -------------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


HOSTILE: dict[str, tuple[Any, str]] = {
    "parent": (("../evil.pth", b"x"), r"'\.\./evil\.pth', which leads out of its folder"),
    "parent inside": (("net/../../evil.pth", b"x"), r"leads out of its folder"),
    "absolute": (("/tmp/evil.pth", b"x"), r"'/tmp/evil\.pth', which leads out of its folder"),
    "drive letter": (("C:/evil.pth", b"x"), r"leads out of its folder"),
    "backslash": (("..\\evil.pth", b"x"), r"leads out of its folder"),
    "symlink": (special("net/evil.pth", tarfile.SYMTYPE, "/etc/passwd"), r"a link to '/etc/passwd', not a file"),
    "symlink to a folder": (special("net", tarfile.SYMTYPE, ".."), r"a link to '\.\.', not a file"),
    "hardlink": (special("net/evil.pth", tarfile.LNKTYPE, "../../x"), r"a link to '\.\./\.\./x', not a file"),
    "device": (special("net/evil", tarfile.CHRTYPE), r"'net/evil', which is a device, not a file"),
    "pipe": (special("net/evil", tarfile.FIFOTYPE), r"'net/evil', which is a device, not a file"),
    "two in one place": (("net/checkpoint.pth.tar", b"again"), r"two members in one place, 'net/checkpoint\.pth\.tar'"),
    "file as folder": (("net/checkpoint.pth.tar/x", b"x"), r"two members in one place"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_is_refused(
    case: str, get: Any, drive_server: Any, tar_gz: Any, weights: bytes, zoo_dir: Path, tmp_path: Path
) -> None:
    member, expected = HOSTILE[case]
    drive_server.content = tar_gz(("net/checkpoint.pth.tar", weights), member)
    assert re.search(expected, refused(get))
    assert names(zoo_dir) == set()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")] == []


def test_our_own_checks_do_not_need_pythons_filter(
    get: Any, drive_server: Any, tar_gz: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_FILTER", None)
    for member, expected in HOSTILE.values():
        drive_server.content = tar_gz(("net/checkpoint.pth.tar", b"x"), member)
        assert re.search(expected, refused(get))


def test_a_truncated_archive_is_refused(get: Any, drive_server: Any, good: bytes, zoo_dir: Path) -> None:
    for length in (len(good) // 2, len(good) - 4, 100):
        drive_server.content = good[:length]
        assert re.search(r"cut short or damaged .*download it again", refused(get))
        assert names(zoo_dir) == set()


def test_a_flipped_byte_is_noticed(get: Any, drive_server: Any, good: bytes, zoo_dir: Path) -> None:
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    drive_server.content = bytes(damaged)
    assert re.search(r"cut short or damaged", refused(get))
    assert names(zoo_dir) == set()


def test_a_bomb_is_refused(
    get: Any, drive_server: Any, tar_gz: Any, zoo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 20)
    drive_server.content = tar_gz(("checkpoint.pth.tar", bytes(2 << 20)))
    assert "unpacks to more than 1 MiB" in refused(get)
    drive_server.content = tar_gz(*((f"{i}.pth", b"") for i in range(21)))
    assert "has more than 20 members" in refused(get)
    assert names(zoo_dir) == set()


def test_content_that_is_no_archive(get: Any, drive_server: Any, tar_gz: Any, zoo_dir: Path, weights: bytes) -> None:
    for content, expected in (
        (b"\x00" + weights, r"neither an archive \(tar\.gz\) nor a checkpoint"),
        (b"", r"neither an archive"),
        (b"PK\x03\x04" + weights, r"a file of torch\.save that is cut short"),
        (tar_gz(), r"an archive without files"),
        (tar_gz(("readme.txt", b"x")), r"has no checkpoint \(\.pth\.tar or \.pth\) but readme\.txt"),
    ):
        drive_server.content = content
        assert re.search(expected, refused(get))
        assert names(zoo_dir) == set()


# ---- disk -----------------------------------------------------------------------------------------------------------


class _FullFile:
    """A file on a disk that is full after a number of writes in all."""

    def __init__(self, file: Any, budget: list[int]) -> None:
        self.file, self.budget = file, budget

    def write(self, data: bytes) -> int:
        self.budget[0] -= 1
        if self.budget[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __enter__(self) -> "_FullFile":
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


WRITES = {transfer: 5, archive: 3}  # 300 kB in chunks of 64 KiB, and three files


@pytest.mark.parametrize("module", [transfer, archive])
def test_a_full_disk_leaves_nothing(
    get: Any, zoo_dir: Path, monkeypatch: pytest.MonkeyPatch, module: Any, weights: bytes
) -> None:
    """Full at every write in turn, until there is room for all."""
    budget = [0]

    def full(path: Any, mode: str = "r") -> Any:
        file = builtins.open(path, mode)  # noqa: SIM115
        return file if mode == "rb" else _FullFile(file, budget)

    monkeypatch.setattr(module, "open", full, raising=False)
    expected = re.escape(f"cannot store {NAME} in {zoo_dir}: No space left on device; free space or choose another")
    for room in range(WRITES[module]):
        budget[0] = room
        assert re.match(expected, refused(get))
        assert names(zoo_dir) == set()
    budget[0] = WRITES[module]
    assert_complete(get(), zoo_dir, weights)


@pytest.mark.parametrize("step", ["mkdir", "rename", "fsync", "replace"])
def test_a_full_disk_at_other_steps(get: Any, zoo_dir: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if step == "mkdir" else os, step, full)
    assert "No space left on device" in refused(get)
    monkeypatch.undo()
    assert not (zoo_dir / NAME).exists()
    assert names(zoo_dir) <= {f"{NAME}.json"}  # the hash is known even where the rename failed


def test_a_file_that_the_system_really_refuses(drive_server: Any, good: bytes, zoo_dir: Path) -> None:
    """With a limit on the size of files, which the system itself enforces."""
    drive_server.content = good
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(good) // 2}, {len(good) // 2}))\n"
    done = subprocess.run(command(drive_server, zoo_dir, limit), cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"UserError: cannot store {NAME} in {zoo_dir}: File too large; check the folder or choose" in done.stderr
    assert names(zoo_dir) == set()


def command(drive_server: Any, zoo_dir: Path, before: str = "") -> list[str]:
    """A process that downloads the entry and prints where the checkpoint is."""
    code = (
        f"{before}import sys; from pathlib import Path; from zoo import store; from zoo.manifest import Published\n"
        f"entry = Published({NAME!r}, 'resnet18', 'uniform8', '', 1., 2., 3., 70., drive_id='0123456789abcdef')\n"
        "print(store.obtain(entry, Path(sys.argv[1]), endpoint=sys.argv[2]).checkpoint)"
    )
    return [sys.executable, "-c", code, str(zoo_dir), drive_server.endpoint]


def test_a_folder_that_cannot_be_made(get: Any, zoo_dir: Path) -> None:
    zoo_dir.parent.mkdir()
    zoo_dir.write_text("a file")
    assert re.match(rf"cannot store {NAME} in {zoo_dir}: .*; check the folder or choose another", refused(get))


# ---- two at once, and stopped ---------------------------------------------------------------------------------------


def test_two_threads_at_once_download_once(get: Any, drive_server: Any, zoo_dir: Path, weights: bytes) -> None:
    done: list[store.Stored] = []
    threads = [threading.Thread(target=lambda: done.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4
    for each in done:
        assert_complete(each, zoo_dir, weights)
    assert sorted(each.new for each in done) == [False] * 3 + [True]
    assert len(drive_server.requests) == 1


def test_two_processes_at_once_download_once(drive_server: Any, good: bytes, zoo_dir: Path, weights: bytes) -> None:
    drive_server.content = good
    line = command(drive_server, zoo_dir)
    runs = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate()[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert set(printed) == {str(zoo_dir / NAME / "net" / "checkpoint.pth.tar")}
    assert names(zoo_dir) == {NAME, f"{NAME}.json"}
    assert len(drive_server.requests) == 1


def test_ctrl_c_keeps_what_arrived(
    get: Any, answer: Any, zoo_dir: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes, drive_server: Any
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transfer.time, "sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            get(answer("cut"), answer("whole"))
    assert names(zoo_dir) == {f".{NAME}.part", f".{NAME}.part.json"}
    with monkeypatch.context() as patched:
        patched.setattr(archive, "unpack", stop)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert names(zoo_dir) == {f".{NAME}.part", f".{NAME}.part.json"}
    drive_server.requests.clear()
    assert_complete(get(), zoo_dir, weights)
    assert drive_server.requests == []  # all of it was there


def test_what_killed_processes_left_is_cleaned(get: Any, zoo_dir: Path, weights: bytes) -> None:
    for leftover in (f".{NAME}.1.tmp", f".{NAME}.2.old"):
        (zoo_dir / leftover / "net").mkdir(parents=True)
    assert_complete(get(), zoo_dir, weights)


def test_a_folder_without_its_record_is_replaced(get: Any, zoo_dir: Path, weights: bytes) -> None:
    (zoo_dir / NAME).mkdir(parents=True)
    (zoo_dir / NAME / "half").write_text("")
    assert_complete(get(), zoo_dir, weights)
    assert not (zoo_dir / NAME / "half").exists()


# ---- names and folders ----------------------------------------------------------------------------------------------


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.default_folder() == tmp_path / ".cache" / "hawq-zoo"
    monkeypatch.setenv("HAWQ_ZOO_DIR", str(tmp_path / "x"))
    assert store.default_folder() == tmp_path / "x"


def test_fetch_by_name(get: Any, zoo_dir: Path, monkeypatch: pytest.MonkeyPatch, entry: Published) -> None:
    done = get()
    monkeypatch.setattr(manifest, "load", lambda: (entry,))
    assert store.fetch(NAME, zoo_dir) == done.checkpoint
    monkeypatch.setenv("HAWQ_ZOO_DIR", str(zoo_dir))
    assert store.fetch(NAME) == done.checkpoint
    with pytest.raises(UserError, match=r"the zoo has no entry 'net_uniform9'; did you mean net_uniform8\?"):
        store.fetch("net_uniform9")


def test_an_entry_of_our_own_is_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_entry: Own) -> None:
    monkeypatch.setattr(manifest, "ENTRIES", tmp_path)
    with pytest.raises(UserError, match=r"the file .*net\.safetensors of own_net is missing; restore it"):
        store.obtain(own_entry, tmp_path)
    own_entry.path.write_bytes(b"graph")
    with pytest.raises(UserError, match=r"is not the recorded file of own_net; restore it"):
        store.obtain(own_entry, tmp_path)
    right = replace(own_entry, sha256=hashlib.sha256(b"graph").hexdigest())
    assert store.obtain(right, tmp_path) == store.Stored(tmp_path / "net.safetensors", None)


def test_every_published_entry_has_an_address_at_drive() -> None:
    for entry in manifest.read(manifest.MANIFEST).published:
        source = store._source(entry, drive.ENDPOINT)
        assert source.url == f"https://drive.google.com/uc?export=download&id={entry.drive_id}"
        assert source.page == f"https://drive.google.com/file/d/{entry.drive_id}/view"
        source.check("https://drive.usercontent.google.com/download?id=1")
        source.check("https://doc-0g-cc-docs.googleusercontent.com/docs/x")
        for bad in ("http://drive.google.com/x", "https://google.com.evil.org/x", "https://evilgoogle.com/x"):
            with pytest.raises(transfer.Unavailable, match="which is not"):
                source.check(bad)
