"""Recipes, ``python -m zoo train``, the entries in the repository, and ``quant_train.py --zoo``."""

import argparse
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bit_config
import quant_train
from tests.helpers import refusal, write_cifar
from utils.checkpoint import load_checkpoint
from utils.data_utils import make_loader, open_dataset
from utils.digits_net import DIGITS_PREPROCESS
from utils.errors import EXIT_INTERRUPTED, UserError
from utils.evaluation import evaluate
from utils.experiment import Cost, Experiment
from utils.flag_checks import check
from utils.integer_graph.serialize import load as load_graph
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.run_state import Run
from utils.train_flags import build_parser
from zoo import flag, manifest, recipes, runs, store, train
from zoo.manifest import Own, Published
from zoo.recipes import FULL, SHORT, Recipe
from zoo.record import without_folders
from zoo.runs import Runs

ROOT = Path(__file__).resolve().parents[2]
MAX_GRAPH_BYTES = 400_000
ENTRIES = (
    *("digits_float", "digits_w8a8", "digits_mixed", "digits_w4a4", "digits_w2a2"),
    *("resnet20_cifar10_float", "resnet20_cifar10_w8a8", "resnet20_cifar10_mixed"),
    *("resnet20_cifar10_w4a4", "resnet20_cifar10_w2a4", "resnet20_cifar10_w2a2"),
)
TINY = """
profiles: {short: for a test, full: not run}
datasets: {digits: {layout: digits, form: none, train: 1437, val: 360, text: the digits}}
recipes:
  tiny_float: {arch: digits, datasets: [digits], scheme: float, short: --epochs 2 --float-epochs 0 --threads 1 --seed 3}
  tiny_control: {entry: false, from: tiny_float, scheme: float, short: --epochs 1 --float-epochs 0 --threads 1 --seed 3}
  tiny_w4a4: {control: tiny_control, scheme: uniform4}
"""


def own() -> list[Own]:
    """What the repository ships."""
    return [entry for entry in manifest.load() if isinstance(entry, Own)]


# ---- the recipes ----------------------------------------------------------------------------------------------------


def test_recipes_cover_the_entries_of_the_zoo() -> None:
    assert sorted(r.name for r in recipes.load().values() if r.is_entry) == sorted(ENTRIES)


@pytest.mark.parametrize("profile", [SHORT, FULL])
@pytest.mark.parametrize("name", recipes.load())
def test_flags_are_those_of_quant_train(name: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where runs start; paths of schemes are relative to it
    recipe = recipes.find(name)
    args = build_parser().parse_args(recipe.flags(profile))
    check(args)
    assert args.arch == recipe.arch
    assert args.epochs > 0
    assert "--seed" in recipe.flags(profile)
    if recipe.scheme != "float":
        assert bit_config.load_scheme(recipe.scheme, recipe.arch).name != "float"


@pytest.mark.parametrize("name", [r.name for r in recipes.load().values() if r.control])
def test_a_quantized_entry_and_its_control_differ_in_the_scheme_alone(name: str) -> None:
    recipe = recipes.find(name)
    control = recipes.find(str(recipe.control))
    assert (control.scheme, control.start, control.is_entry) == ("float", recipe.start, False)
    assert recipes.find(str(recipe.start)).scheme == "float"
    for profile in (SHORT, FULL):
        ours, theirs = recipe.flags(profile), control.flags(profile)
        assert [a for a, b in zip(ours, theirs, strict=True) if a != b] == [recipe.scheme]


def test_mixed_costs_lie_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for arch in ("digits", "resnet20_cifar10"):
        costs: dict[str, Cost] = {}
        for kind in ("w8a8", "mixed", "w4a4"):
            info = create_model(arch)
            scheme = recipes.find(f"{arch}_{kind}").scheme
            costs[kind] = Experiment(info, info.preprocess, scheme, torch.device("cpu")).cost()
        assert costs["w8a8"].size_mib > costs["mixed"].size_mib > costs["w4a4"].size_mib
        assert costs["w8a8"].bops_g > costs["mixed"].bops_g > costs["w4a4"].bops_g


def test_unknown_recipe_names_the_closest() -> None:
    with pytest.raises(UserError, match="no recipe 'digits_w4'; did you mean digits_w4a4"):
        recipes.find("digits_w4")


def test_images_are_told_by_their_layout(tmp_path: Path) -> None:
    recipe = recipes.find("resnet20_cifar10_float")
    with pytest.raises(UserError, match="does not hold the images of resnet20_cifar10_float; expected a folder with"):
        recipe.dataset(str(tmp_path))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert recipe.dataset(str(tmp_path)).name == "cifar10"
    for split in ("train", "val"):
        (tmp_path / "tree" / split).mkdir(parents=True)
    assert recipe.dataset(str(tmp_path / "tree")).name == "cifar10-jpeg"
    assert recipes.find("digits_float").dataset("digits").name == "digits"


# ---- training and recording -----------------------------------------------------------------------------------------


def empty_zoo(folder: Path, patch: pytest.MonkeyPatch, text: str = TINY) -> None:
    """A zoo in ``folder`` without own entries, and the recipes in ``text``."""
    folder.mkdir()
    published = json.loads(manifest.MANIFEST.read_text())
    (folder / "manifest.json").write_text(json.dumps(published | {"own": []}))
    (folder / "recipes.yaml").write_text(text)
    patch.setattr(manifest, "MANIFEST", folder / "manifest.json")
    patch.setattr(manifest, "ENTRIES", folder / "entries")
    patch.setattr(recipes, "FILE", folder / "recipes.yaml")


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs of the tiny recipes, finished; made by real processes, as a user does."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        empty_zoo(folder / "zoo", patch)
        assert train.run(arguments("tiny_w4a4", "--record", "--save-path", str(folder / "runs"))) == 0
    return folder


@pytest.fixture
def tiny(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Copies of the finished runs, beside an empty zoo; ``quant_train.py`` runs in this process."""
    empty_zoo(tmp_path / "zoo", monkeypatch)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.setattr(runs, "quant_train", quant_train.main)
    monkeypatch.setattr(train, "quant_train", quant_train.main)
    monkeypatch.setattr("zoo.record.quant_train", quant_train.main)
    return Runs(tmp_path / "runs", SHORT, None)


def command(tiny: Runs, *words: str) -> argparse.Namespace:
    return arguments(*words, "--save-path", str(tiny.folder))


def test_one_command_trains_and_records(trained: Path) -> None:
    rows = manifest.read(trained / "zoo" / "manifest.json").own
    assert [entry.name for entry in rows] == ["tiny_w4a4"]
    (entry,) = rows
    path = trained / "zoo" / "entries" / entry.file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
    assert (entry.bytes, entry.scheme, entry.seed, entry.images) == (path.stat().st_size, "uniform4", 3, 360)
    assert entry.command == "python -m zoo train tiny_w4a4 --profile short --record"
    loader = make_loader(open_dataset("digits", "val", DIGITS_PREPROCESS), 360, train=False)
    assert entry.top1 == evaluate(TorchEngine(load_graph(path), torch.device("cpu")), loader, "test").top1
    control = json.loads((trained / "runs" / "short" / "tiny_control" / "report.json").read_text())
    assert entry.control_top1 == control["top1_float"]
    about = json.loads(path.with_name("recipe.json").read_text())
    assert (about["top1"], about["control"]["top1"], about["starts from"]) == (
        entry.top1,
        entry.control_top1,
        "tiny_float",
    )
    texts = [(trained / "zoo" / "entries" / name).read_text() for name in (entry.log, "tiny_control.txt")]
    assert all("epoch 1: train loss" in text and str(trained) not in text for text in texts)


def test_finished_runs_are_not_repeated(tiny: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny.folder / "short" / "tiny_w4a4" / "log.log").read_bytes()
    assert train.run(command(tiny, "--all")) == 0
    assert (tiny.folder / "short" / "tiny_w4a4" / "log.log").read_bytes() == before
    printed = capsys.readouterr().out
    assert printed.count("trained already") == 3
    assert "tiny_w4a4" in printed.splitlines()[-2]


def test_interrupted_run_goes_on_to_the_same_weights(tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.of(recipes.find("tiny_float"))
    whole = load_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]
    shutil.rmtree(folder)
    save = Run.save

    def save_and_interrupt(job: Run) -> None:
        save(job)
        if job.trainer is not None and job.trainer.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "save", save_and_interrupt)
    assert train.run(command(tiny, "tiny_float")) == EXIT_INTERRUPTED
    assert load_checkpoint(folder / "checkpoint.pth.tar")["trainer"]["epoch"] == 1
    assert tiny.report(recipes.find("tiny_float")) is None
    monkeypatch.setattr(Run, "save", save)
    assert train.run(command(tiny, "tiny_float")) == 0
    again = load_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert "resumed after 1 epochs" in (folder / "log.log").read_text()


def test_training_starts_from_the_shipped_float_entry(tiny: Runs) -> None:
    assert train.run(command(tiny, "tiny_float", "--record")) == 0
    for name in ("tiny_float", "tiny_w4a4"):
        shutil.rmtree(tiny.folder / "short" / name)
    plan = train.planned(tiny, [recipes.find("tiny_w4a4")], controls=False)
    assert [recipe.name for recipe in plan] == ["tiny_w4a4"]
    words = tiny.arguments(plan[0])
    assert words[words.index("--weights") + 1] == str(manifest.ENTRIES / "tiny_float" / "weights.pth")
    full = Runs(tiny.folder, FULL, None)
    assert [r.name for r in train.planned(full, plan, controls=True)] == ["tiny_float", "tiny_w4a4", "tiny_control"]


def test_float_entry_gives_the_same_network(tiny: Runs) -> None:
    assert train.run(command(tiny, "tiny_float", "--record")) == 0
    (entry,) = own()
    state = load_checkpoint(tiny.of(recipes.find("tiny_float")) / "checkpoint.pth.tar")["state_dict"]
    shipped = torch.load(entry.path, weights_only=True)
    assert list(shipped) == list(state)
    assert all(torch.equal(shipped[key], value) for key, value in state.items())
    assert entry.control_top1 is None


def test_nothing_is_recorded_when_the_copy_differs(tiny: Runs) -> None:
    report = tiny.of(recipes.find("tiny_w4a4")) / "report.json"
    report.write_text(report.read_text().replace('"top1_integer": ', '"top1_integer": 1'))
    with pytest.raises(UserError, match="tiny_w4a4: the copy has top-1"):
        train.run(command(tiny, "tiny_w4a4", "--record"))
    assert own() == []
    assert not manifest.ENTRIES.exists()


@pytest.mark.parametrize("changed", ["tiny_float", "tiny_control"])
def test_runs_of_another_recipe_are_refused(tiny: Runs, changed: str) -> None:
    """A recipe that changed after training: neither repeated silently, nor gone on with, nor recorded as the recipe."""
    lines = [line.replace("--seed 3", "--seed 4") if changed in line else line for line in TINY.splitlines()]
    recipes.FILE.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"was made with seed 3, the recipe \w+ has 4; delete that folder"):
        train.run(command(tiny, "tiny_float" if changed == "tiny_float" else "tiny_w4a4", "--record"))
    assert own() == []
    (tiny.of(recipes.find(changed)) / "report.json").unlink()  # as one that was interrupted
    with pytest.raises(UserError, match="was made with seed 3"):
        train.run(command(tiny, changed))


def test_nothing_is_recorded_from_a_part_of_the_images(tiny: Runs) -> None:
    recipes.FILE.write_text(TINY.replace("val: 360", "val: 361"))
    with pytest.raises(UserError, match="evaluated on 360 images, expected all 361"):
        train.run(command(tiny, "tiny_w4a4", "--record"))
    assert own() == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give names of entries or --all"),
        (("tiny_w4a4", "--all"), "give names of entries or --all"),
        (("tiny_w4a5",), "no recipe 'tiny_w4a5'"),
        (("tiny_control", "--record"), "tiny_control is a control"),
    ],
)
def test_mistakes(tiny: Runs, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train.run(command(tiny, *words))


def test_missing_images_are_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data is missing: resnet20_cifar10_float is trained on CIFAR-10; give a"):
        train.run(arguments("digits_float", "resnet20_cifar10_float", "--save-path", str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_failure_of_a_run_ends_the_command(tiny: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(tiny.of(recipes.find("tiny_w4a4")))
    monkeypatch.setattr(train, "quant_train", lambda arguments: 2)
    assert train.run(command(tiny, "tiny_w4a4", "--record")) == 2
    assert own() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 77)])
def test_signals_wait_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """The child signals its parent, then ends by itself as after Ctrl-C, or when SIGTERM arrives."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        f"time.sleep({0.5 if number == signal.SIGINT else 60})\n"
        "sys.exit(130)\n"
    )
    monkeypatch.setattr(runs, "SCRIPT", script)
    assert runs.quant_train([]) == code


def test_without_folders() -> None:
    assert (
        without_folders("saved in /a/b.c/run_1, 12 images/s; '/x/y/log.log'")
        == "saved in run_1, 12 images/s; 'log.log'"
    )


# ---- the entries in the repository ----------------------------------------------------------------------------------


def shipped(arch: str) -> list[Any]:
    return [pytest.param(entry, id=entry.name) for entry in own() if entry.arch == arch]


@pytest.mark.parametrize("entry", [*shipped("digits"), *shipped("resnet20_cifar10")])
def test_shipped_files_are_the_recorded_ones(entry: Own) -> None:
    content = entry.path.read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.bytes)
    recipe = recipes.find(entry.name)
    about = json.loads(entry.path.with_name("recipe.json").read_text())
    assert about["flags"] == " ".join(recipe.flags(SHORT)), "the recipe changed after training"
    assert entry.recipe == f"{entry.name}, profile short"
    log = (manifest.ENTRIES / entry.log).read_text()
    args = build_parser().parse_args(recipe.flags(SHORT))
    assert log.count("train loss") == about["trained"]["epochs"] == args.epochs
    assert f"top-1 {entry.top1:.2f}" in [line for line in log.splitlines() if line.startswith("epoch ")][-1]
    assert "-dirty" not in entry.commit
    if entry.scheme == "float":
        assert entry.control_top1 is None
        return
    assert entry.bytes < MAX_GRAPH_BYTES
    assert load_graph(entry.path).meta["arch"] == entry.arch
    assert entry.control_top1 == about["control"]["top1"]
    control_log = (manifest.ENTRIES / f"{recipe.control}.txt").read_text()
    assert control_log.count("train loss") == args.epochs
    assert f"epoch {args.epochs}: top-1 {entry.control_top1:.2f}" in control_log


def test_every_entry_is_shipped() -> None:
    assert sorted(entry.name for entry in own()) == sorted(ENTRIES)


def evaluated(entry: Own, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """Report of ``quant_train.py --zoo NAME -e``."""
    report = tmp_path / "report.json"
    words = ["--zoo", entry.name, "-e", "--save-path", str(tmp_path / "run"), "--report", str(report), *flags]
    assert quant_train.main(words) == 0
    return dict(json.loads(report.read_text()))


@pytest.mark.parametrize("entry", shipped("digits"))
def test_digits_accuracy_is_the_recorded_one(
    entry: Own, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = evaluated(entry, tmp_path)
    assert found["top1_float" if entry.scheme == "float" else "top1_integer"] == entry.top1
    assert found["images"] == entry.images == 360
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"zoo entry {entry.name}: recorded top-1 {entry.top1:.2f} % on 360 images")
    assert line.endswith(f"{entry.top1:.2f} % on 360 images")


@pytest.fixture(scope="module")
def cifar_val(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All 10,000 validation images of CIFAR-10 as JPEG files."""
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar(shared, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("entry", shipped("resnet20_cifar10"))
def test_cifar_accuracy_is_the_recorded_one(entry: Own, cifar_val: Path, tmp_path: Path) -> None:
    found = evaluated(entry, tmp_path, "--data", str(cifar_val))
    assert found["images"] == entry.images == 10_000
    if entry.scheme == "float":  # last bits of float sums depend on the processor
        assert abs(found["top1_float"] - entry.top1) <= 0.05
    else:
        assert found["top1_integer"] == entry.top1


# ---- quant_train.py --zoo -------------------------------------------------------------------------------------------

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The sentence a command is refused with; nothing is left behind."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        error = refusal(quant_train.main, words, capsys)
        assert list(tmp_path.iterdir()) == []
        return error

    return call


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--zoo", "digits_w4a5", "-e"), "no entry 'digits_w4a5'; did you mean digits_w4a4"),
        (("--zoo-dir", "x"), "give --zoo NAME with it"),
        (("--zoo", "digits_float", "--weights", "w.pth"), "both say where the weights are"),
        (("--zoo", "digits_float", "--pretrained"), "both say where the weights are"),
        (("--zoo", "digits_w4a4", "-e", "--resume", "c"), "both say where the weights are"),
        (("--zoo", "digits_w4a4", "-e", "-a", "resnet18"), "is a network digits, not resnet18; leave out -a"),
        (("--zoo", "digits_w4a4", "-e", "--quant-scheme", "uniform8"), "has the scheme uniform4, not uniform8"),
        (("--zoo", "digits_w4a4"), "integer graph, which can be evaluated \\(-e\\) but not trained; to train, give"),
        (("--zoo", "digits_w4a4", "--summary"), "integer graph, which can be evaluated"),
    ],
)
def test_flags_that_contradict_the_entry(refused: Refused, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        raise UserError(refused(*words))


def test_training_goes_on_from_a_float_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--quant-scheme", "uniform4", "--epochs", "0", "--report", "report.json"]
    assert quant_train.main(["--zoo", "digits_float", *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    entry = manifest.find("digits_float")
    assert report["top1_float"] == entry.top1
    assert report["scheme"] == "uniform4"
    assert load_checkpoint(tmp_path / "runs" / "digits_float" / "checkpoint.pth.tar")["arch"] == "digits"


@pytest.mark.parametrize("name", ["resnet18_bops0.5", "resnet18_baseline"])
def test_published_entries_become_the_flags_of_the_original(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download is store's own matter; here it has happened."""
    asked: list[tuple[str, Path | None]] = []

    def fetch(entry: str, zoo_dir: Path | None) -> Path:
        asked.append((entry, zoo_dir))
        return tmp_path / "checkpoint.pth.tar"

    monkeypatch.setattr(store, "fetch", fetch)
    args = build_parser().parse_args(["--zoo", name, "--zoo-dir", str(tmp_path), "-e", "--data", "images"])
    with flag.zoo_entry(args):
        check(args)
        assert args.report is not None
    entry = manifest.find(name)
    assert asked == [(name, tmp_path)]
    assert (args.arch, args.quant_scheme) == (entry.arch, entry.scheme)
    assert args.save_path == Path("runs") / name
    given = (args.weights, args.resume) if entry.scheme == "float" else (args.resume, args.weights)
    assert given == (tmp_path / "checkpoint.pth.tar", None)
    assert args.resume_quantize == (entry.scheme != "float")


def test_published_figures_are_called_that() -> None:
    entry = manifest.find("resnet18_uniform8")
    assert isinstance(entry, Published)
    line = flag.comparison(entry, {"top1_integer": 70.0, "top1_float": None, "images": 50, "scheme": "uniform8"})
    assert line == (
        "zoo entry resnet18_uniform8: published top-1 71.56 %, on ImageNet, not measured here; measured now, scheme "
        "uniform8: 70.00 % on 50 images"
    )


def test_recipes_are_plain_data() -> None:
    content = yaml.safe_load(recipes.FILE.read_text())
    assert set(content) == {"profiles", "datasets", "recipes"}
    assert all(isinstance(recipe, Recipe) for recipe in recipes.load().values())
