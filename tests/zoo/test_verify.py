"""``python -m zoo verify``: every kind of file is recognised, and every harm to it named."""

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quant_train
from tests.utils.hawq import golden
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.hawq.files import HawqFile
from utils.integer_graph.serialize import load, save
from utils.models import create_model
from zoo import kinds, manifest, store
from zoo import verify as module
from zoo.manifest import Own, Published
from zoo.verify import Check, verify

SMALL = ("--data-percentage", "0.1", "--calib-images", "64", "--agreement-images", "8", "--batch-size", "100")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run on the digits at 4 bits."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--float-epochs", "1", "--epochs", "1", "--quant-scheme", "uniform4", "--save-path", str(folder)]
    assert quant_train.main([*flags, *SMALL]) == 0
    return folder


@pytest.fixture
def shipped(run: Path, own_entry: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """The run's graph as an entry of our own, with its true accuracy."""
    monkeypatch.setattr(manifest, "ENTRIES", tmp_path / "entries")
    (tmp_path / "entries").mkdir()
    shutil.copy(run / "model.safetensors", tmp_path / "entries" / own_entry.file)
    top1 = module.measure(kinds.identify(own_entry.path), "digits", None, None)[0]
    entry = replace(own_entry, scheme="uniform4", sha256=store.sha256(own_entry.path), top1=top1)
    monkeypatch.setattr(manifest, "load", lambda: (entry,))
    return entry


@pytest.fixture
def checks(zoo_dir: Path) -> Callable[..., dict[str, Check]]:
    """checks(file, scheme=...): the answer by what was checked."""
    return lambda target, **options: {check.what: check for check in verify(str(target), zoo_dir, **options)}


def verdicts(checks: dict[str, Check]) -> dict[str, bool | None]:
    return {what: check.ok for what, check in checks.items()}


# ---- kinds ----------------------------------------------------------------------------------------------------------


def test_integer_graph(run: Path, checks: Any) -> None:
    found = checks(run / "model.safetensors")
    assert verdicts(found) == {"format": True, "hash": None, "scheme": True}
    assert found["format"].text.startswith("integer graph, names digits uniform4: ")
    assert found["scheme"].text == "all 5 layers have the bits of uniform4"
    assert store.sha256(run / "model.safetensors") in found["hash"].text


def test_training_checkpoint(run: Path, checks: Any) -> None:
    found = checks(run / "checkpoint.pth.tar")
    assert verdicts(found) == {"format": True, "hash": None, "scheme": True}
    assert found["format"].text == "training checkpoint, names digits uniform4: after 1 epochs"


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.pth.tar"])
def test_another_scheme_differs_at_a_named_layer(run: Path, checks: Any, file: str) -> None:
    found = checks(run / file, scheme="uniform8")
    assert verdicts(found) == {"format": True, "hash": None, "scheme": False}
    assert found["scheme"].text == (
        f"{run / file} was not made with the scheme uniform8: features.unit.conv1.conv has the bits (4, 4) "
        "(weight, activation) there, (8, 8) in the scheme"
    )
    assert "no quantization scheme 'frob'" in checks(run / file, scheme="frob")["scheme"].text


def test_another_architecture_differs(run: Path, checks: Any) -> None:
    found = checks(run / "checkpoint.pth.tar", arch="resnet18")
    assert (found["scheme"].ok, found["scheme"].text) == (
        False,
        f"{run / 'checkpoint.pth.tar'} is of digits, not of resnet18",
    )


def test_a_graph_whose_weights_have_other_bits_than_it_says(run: Path, checks: Any, tmp_path: Path) -> None:
    graph = load(run / "model.safetensors")
    nodes = [
        replace(node, attrs={**node.attrs, "weight_bits": 5}) if node.attrs.get("weight_bits") == 4 else node
        for node in graph.nodes
    ]
    save(replace(graph, nodes=tuple(nodes)), tmp_path / "wider.safetensors")
    assert "has the bits (5, 4)" in checks(tmp_path / "wider.safetensors")["scheme"].text


def test_a_scheme_from_a_file_is_checked_when_it_is_given(run: Path, checks: Any, tmp_path: Path) -> None:
    saved = load_checkpoint(run / "checkpoint.pth.tar")
    save_checkpoint(tmp_path / "mine.pth.tar", saved | {"scheme": "mine"})
    (tmp_path / "mine.yaml").write_text((run / "scheme.yaml").read_text())
    assert checks(tmp_path / "mine.pth.tar")["scheme"] == Check(
        "scheme", None, "nothing to check against; give --scheme"
    )
    assert checks(tmp_path / "mine.pth.tar", scheme=str(tmp_path / "mine.yaml"))["scheme"].ok is True


def test_float_weights(checks: Any, tmp_path: Path, run: Path) -> None:
    state = create_model("digits").module.state_dict()
    torch.save(state, tmp_path / "float.pth")
    found = checks(tmp_path / "float.pth")
    assert (
        found["format"].text
        == f"float weights: {len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers"
    )
    assert found["scheme"] == Check("scheme", None, "nothing to check against; give --arch")
    assert (
        checks(tmp_path / "float.pth", arch="digits")["scheme"].text == "every tensor of digits is there in its shape"
    )
    wrong = checks(tmp_path / "float.pth", arch="resnet20_cifar10")["scheme"]
    assert wrong.ok is False
    assert "does not fit resnet20_cifar10: features.init_block.conv.weight has shape" in wrong.text
    torch.save({"state_dict": state}, tmp_path / "contained.pth")
    assert "float weights" in checks(tmp_path / "contained.pth")["format"].text


def test_float_training_checkpoint(checks: Any, tmp_path: Path) -> None:
    flags = ["--quant-scheme", "float", "--epochs", "0", "--float-epochs", "0", "--save-path", str(tmp_path)]
    assert quant_train.main(flags) == 0
    found = checks(tmp_path / "checkpoint.pth.tar")
    assert found["scheme"] == Check("scheme", None, "float, there are no bits to check")
    wrong = checks(tmp_path / "checkpoint.pth.tar", scheme="uniform8")["scheme"]
    assert (wrong.ok, wrong.text) == (
        False,
        f"{tmp_path / 'checkpoint.pth.tar'} is a float network, it was not made with the scheme uniform8",
    )


@pytest.mark.data
def test_checkpoint_of_the_original(shared: Path, checks: Any, tmp_path: Path) -> None:
    torch.save(golden.checkpoint_rule(shared).checkpoint("resnet18", "bops_0.5"), tmp_path / "checkpoint.pth.tar")
    found = checks(tmp_path / "checkpoint.pth.tar")
    assert found["format"].text == (
        "checkpoint of the original HAWQ, names resnet18: 320 entries, its integers are filled in"
    )
    assert found["scheme"].text == "the scheme bops_0.5 of resnet18 fits its integers; all entries are there"
    wrong = checks(tmp_path / "checkpoint.pth.tar", scheme="uniform8")["scheme"]
    assert wrong.ok is False
    assert "stage1.unit2.quant_convbn2.weight_integer has 4 bits there, 8 in the scheme; it fits bops_0.5" in wrong.text
    assert "not of resnet50" in checks(tmp_path / "checkpoint.pth.tar", arch="resnet50")["scheme"].text


@pytest.mark.data
def test_quantized_checkpoint_of_the_original(shared: Path, checks: Any, tmp_path: Path) -> None:
    """Five dicts; it names no architecture, so there is nothing to check until one is given."""
    state = golden.checkpoint_rule(shared).checkpoint("resnet18", "uniform4")["state_dict"]
    parts = ("convbn_scaling_factor", "fc_scaling_factor", "weight_integer", "bias_integer", "act_scaling_factor")
    content = {part: {key: value for key, value in state.items() if key.endswith(f".{part}")} for part in parts}
    path = tmp_path / "quantized_checkpoint.pth.tar"
    torch.save(content, path)
    found = checks(path)
    assert found["format"].text.startswith("quantized_checkpoint of the original HAWQ: ")
    assert found["scheme"] == Check("scheme", None, "nothing to check against; give --arch")
    assert "the scheme uniform4 of resnet18 fits its integers" in checks(path, arch="resnet18")["scheme"].text
    content["weight_integer"].pop("module.stage2.unit1.quant_convbn2.weight_integer")
    torch.save(content, path)
    missing = checks(path, arch="resnet18")["scheme"]
    assert missing.ok is False
    assert "stage2.unit1" in missing.text


class _Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch executed",)


def _cut(path: Path, source: Path) -> None:
    path.write_bytes(source.read_bytes()[:-100])


HARM: dict[str, tuple[str, Callable[[Path, Path], Any], str]] = {
    "graph cut short": ("x.safetensors", lambda p, r: _cut(p, r / "model.safetensors"), "not a complete safetensors"),
    "checkpoint cut short": ("x.pth.tar", lambda p, r: _cut(p, r / "checkpoint.pth.tar"), "damaged, cut short or not"),
    "code": ("x.pth", lambda p, r: p.write_bytes(pickle.dumps(_Code())), "x.pth"),
    "other content": ("x.pth", lambda p, r: torch.save([1, 2], p), "is none of: integer graph, training checkpoint"),
    "empty": ("x.pth", lambda p, r: torch.save({}, p), "is none of: integer graph, training checkpoint"),
    "folder": ("x.pth", lambda p, r: p.mkdir(), "is a folder"),
    "changed checkpoint": (
        "x.pth.tar",
        lambda p, r: save_checkpoint(p, {**load_checkpoint(r / "checkpoint.pth.tar"), "bits": 5}),
        "was changed after saving",
    ),
}


@pytest.mark.parametrize("case", HARM)
def test_what_cannot_be_used_is_one_sentence(case: str, run: Path, checks: Any, tmp_path: Path) -> None:
    name, harm, expected = HARM[case]
    harm(tmp_path / name, run)
    with pytest.raises(UserError, match=expected) as caught:
        checks(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


# ---- hashes ---------------------------------------------------------------------------------------------------------


def test_an_entry_of_our_own_by_name_and_by_file(shipped: Own, checks: Any, run: Path) -> None:
    for target in (shipped.name, shipped.path, run / "model.safetensors"):  # the last: a copy elsewhere
        found = checks(target)
        assert verdicts(found) == {"format": True, "hash": True, "scheme": True}
        assert found["hash"].text == f"sha256 {shipped.sha256} is that of own_net in the manifest"


def test_a_changed_entry_of_our_own_differs(shipped: Own, checks: Any) -> None:
    graph = load(shipped.path)
    save(replace(graph, meta={**graph.meta, "note": "changed"}), shipped.path)
    found = checks(shipped.name)
    assert verdicts(found) == {"format": True, "hash": False, "scheme": True}
    assert found["hash"].text.endswith(f", recorded is {shipped.sha256}")


@pytest.fixture
def downloaded(
    run: Path, entry: Published, zoo_dir: Path, tar_gz: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., store.Stored]:
    """An entry of the cache whose archive, placed by hand, has float weights of the digits."""
    torch.save(create_model("digits").module.state_dict(), run / "net.pth")
    row = replace(entry, arch="digits", scheme="float")
    monkeypatch.setattr(manifest, "load", lambda: (row,))

    def obtain() -> store.Stored:
        zoo_dir.mkdir(parents=True)
        archive = tar_gz(("net/net.pth", (run / "net.pth").read_bytes()), ("net/log.log", b"log"))
        (zoo_dir / f"{row.name}.tar.gz").write_bytes(archive)
        return store.obtain(row, zoo_dir)

    return obtain


def test_a_downloaded_entry(downloaded: Any, checks: Any, entry: Published, zoo_dir: Path) -> None:
    with pytest.raises(UserError, match=rf"{entry.name} is not in .*; get it with python -m zoo download {entry.name}"):
        checks(entry.name)
    done = downloaded()
    found = checks(entry.name)
    assert verdicts(found) == {"format": True, "hash": True, "scheme": True}
    recorded = f"as recorded (by the first download alone, {done.record.recorded})"
    assert found["hash"].text == f"2 of 2 files of {entry.name} {recorded}"
    assert checks(done.checkpoint)["hash"].text == f"1 of 2 files of {entry.name} {recorded}"


def test_a_downloaded_file_that_was_changed_differs(downloaded: Any, checks: Any, entry: Published) -> None:
    done = downloaded()
    log = done.checkpoint.with_name("log.log")
    log.write_bytes(b"LOG")
    found = checks(entry.name)
    assert found["hash"].ok is False
    assert found["hash"].text.startswith("net/log.log: sha256 ")
    shutil.copy(done.checkpoint, done.checkpoint.with_name("copy.pth"))
    assert checks(done.checkpoint.with_name("copy.pth"))["hash"].ok is False  # not of the archive


def test_neither_file_nor_entry(checks: Any) -> None:
    with pytest.raises(UserError, match=r"there is no file resnet18_size, and the zoo has no entry .*did you mean"):
        checks("resnet18_size")


# ---- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_of_an_entry_is_measured_and_compared(
    shipped: Own, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks(shipped.name, data="digits")["accuracy"]
    assert found.ok is True
    top1 = f"{shipped.top1:.2f} %"
    expected = f"top-1 {top1} on 360 images, recorded {top1} on 360 (a CPU, 1 thread, commit abc1234)"
    assert found.text == expected
    for changed, ok in ((replace(shipped, top1=shipped.top1 - 100 / 360), False), (replace(shipped, images=100), None)):
        monkeypatch.setattr(manifest, "load", lambda changed=changed: (changed,))
        assert checks(shipped.name, data="digits")["accuracy"].ok is ok


def test_accuracy_without_an_entry(run: Path, checks: Any) -> None:
    for file in ("model.safetensors", "checkpoint.pth.tar"):
        found = checks(run / file, data="digits")["accuracy"]
        assert found.ok is None
        assert found.text.endswith("on 360 images; no entry is known to compare it with")


def test_accuracy_of_float_weights_needs_the_architecture(checks: Any, tmp_path: Path) -> None:
    torch.save(create_model("digits").module.state_dict(), tmp_path / "float.pth")
    with pytest.raises(UserError, match=r"float\.pth does not say which network it is; give --arch"):
        checks(tmp_path / "float.pth", data="digits")
    assert "on 360 images" in checks(tmp_path / "float.pth", arch="digits", data="digits")["accuracy"].text


def test_nothing_is_written_beside_the_file(run: Path, checks: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    checks(run / "checkpoint.pth.tar", data="digits")
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_published_accuracy_is_compared_on_its_own_images_only(
    downloaded: Any, checks: Any, entry: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded()
    found = checks(entry.name, data="digits")["accuracy"]
    assert found.ok is None
    assert "published (not measured here) 70.00 % on ImageNet" in found.text
    assert found.text.endswith("these are not its 50,000 validation images")
    for top1, ok in ((69.6, True), (70.4, True), (69.4, False), (70.6, False)):
        monkeypatch.setattr(module, "measure", lambda *args, top1=top1: (top1, 50_000))
        assert checks(entry.name, data="digits")["accuracy"].ok is ok


def test_float_entries_may_differ_by_a_few_images(shipped: Own, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(shipped, scheme="float", images=10_000, top1=90.0)
    monkeypatch.setattr(manifest, "load", lambda: (row,))
    for top1, ok in ((90.05, True), (89.95, True), (90.06, False)):
        monkeypatch.setattr(module, "measure", lambda *args, top1=top1: (top1, 10_000))
        assert checks(row.name, data="digits")["accuracy"].ok is ok
    monkeypatch.setattr(manifest, "load", lambda: (replace(row, scheme="uniform4"),))
    monkeypatch.setattr(module, "measure", lambda *args: (90.01, 10_000))
    assert checks(row.name, data="digits")["accuracy"].ok is False


def test_the_originals_files_are_evaluated_as_their_own_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its arithmetic, under the architecture and scheme that were asked for, and nothing written beside it."""
    seen = []

    def run(args: Any, command: str) -> None:
        seen.append(args)
        args.report.write_text('{"top1_float": null, "top1_integer": 71.5, "images": 1000}')

    monkeypatch.setattr(quant_train, "run", run)
    path = tmp_path / "checkpoint.pth.tar"
    content = HawqFile(path, {}, integers=False, arch="resnet18")
    flags = ("--resume", str(path), "--resume-quantize")
    found = kinds.Found(path, "checkpoint", "", flags, "resnet18", original=content)
    assert module.measure(found, "IMAGES", "resnet18", "bops_0.5") == (71.5, 1000)
    (args,) = seen
    assert (args.resume, args.resume_quantize, args.evaluate) == (path, True, True)
    assert (args.arch, args.quant_scheme, args.data) == ("resnet18", "bops_0.5", "IMAGES")
    assert args.save_path not in (None, tmp_path)


def test_missing_images_are_one_sentence(run: Path, checks: Any) -> None:
    with pytest.raises(UserError, match=r"nowhere"):
        checks(run / "model.safetensors", data="/nowhere")


def test_a_check_as_a_line() -> None:
    assert str(Check("hash", True, "text")) == "hash      ok       text"
    assert str(Check("scheme", False, "text")) == "scheme    DIFFERS  text"
    assert str(Check("accuracy", None, "text")) == "accuracy  -        text"
