"""``quant_train.py --ptq`` end to end on the digits: what is reported and left behind, stopped runs, refusals."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import quant_train
import utils.quantization_utils.reconstruct as reconstruction
from tests.helpers import refusal, stop_after
from utils import calibration_run
from utils.calibration_run import ROUNDING_STATE, SETTINGS, SQNR_PLOT, CalibrationImages
from utils.data_utils import make_loader, normalize, open_dataset, subset
from utils.digits_net import DIGITS_PREPROCESS
from utils.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from utils.integer_graph.serialize import graph_hash, load
from utils.integer_graph.torch_engine import TorchEngine
from utils.models import create_model
from utils.quantization_utils.ptq_recipe import parse_recipe
from utils.quantization_utils.reconstruct import LayerResult, Settings, reconstruct
from utils.run_report import PTQ_KEYS, UNSEEN_KEYS
from utils.run_state import CHECKPOINT, GRAPH
from utils.train_flags import PUBLISHED, QUICK

SMALL = ("--calib-images", "32", "--agreement-images", "8", "--quant-scheme", "w4a8")
LAYERS = 5  # of the digits network
RECIPES = ("mse", "minmax+equalize+bias", "ema_quantile", "mse+adaround", "mse+descent")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, QUICK, partial(Settings, steps=30, positions=256, batch=16))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that trained the float network for a few epochs."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--float-epochs", "5", "--epochs", "0", "--agreement-images", "8", "--save-path", str(folder))
    assert quant_train.main([*flags]) == 0
    return folder


@pytest.fixture
def start(trained: Path) -> Callable[..., int]:
    """start(recipe, folder, *flags): a run from the trained weights; its exit code."""

    def run(recipe: str, folder: Path, *flags: str) -> int:
        source = ("--weights", str(trained / CHECKPOINT), "--report", str(folder / "report.json"))
        return quant_train.main([*source, *SMALL, "--ptq", recipe, "--save-path", str(folder), *flags])

    return run


def report_of(folder: Path) -> dict[str, Any]:
    """Refuses what is no JSON, such as NaN and Infinity."""

    def refuse(name: str) -> float:
        raise ValueError(name)

    found: dict[str, Any] = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return found


def hash_of(folder: Path) -> str:
    return graph_hash(load(folder / GRAPH))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe(recipe: str, start: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    assert start(recipe, tmp_path) == 0
    found, printed = report_of(tmp_path), capsys.readouterr().out
    assert (found["ptq"], found["ptq_backend"], found["epochs"]) == (recipe, "hawq", 0)
    assert abs(found["top1_integer"] - found["top1_float"]) < 5
    assert found["agreement_top1"] == 100
    assert len(found["sqnr_db"]) == LAYERS
    assert all(10 < db < 150 for db in found["sqnr_db"].values())
    assert f"post-training quantization {recipe} on 32 images in batches of 32" in printed
    assert "signal to quantization noise of 5 layers, the worst:" in printed
    assert ("equalisation: " in printed) == ("bias correction: " in printed) == ("equalize" in recipe)
    rounds = parse_recipe(recipe).rounding is not None
    assert set(PTQ_KEYS) & set(found) == set(PTQ_KEYS if rounds else PTQ_KEYS[:3])
    assert not set(UNSEEN_KEYS) & set(found)  # training images calibrated
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"report.json", "log.log", SQNR_PLOT, GRAPH, CHECKPOINT, "scheme.yaml", "arguments.json"}
    assert (tmp_path / SQNR_PLOT).read_bytes().startswith(b"\x89PNG")
    lowest = min(found["sqnr_db"], key=found["sqnr_db"].get)
    first = re.search(rf"worst:\n +(\S+) dB  {re.escape(lowest)}\n", printed)
    assert first
    assert float(first[1]) == pytest.approx(found["sqnr_db"][lowest], abs=0.06)


@pytest.mark.parametrize(
    ("recipe", "units"), [("mse+descent", LAYERS), ("mse+adaround", LAYERS), ("minmax/mse+block+bias", None)]
)
def test_learned_rounding_is_reported(recipe: str, units: int | None, start: Any, tmp_path: Path, capsys: Any) -> None:
    assert start(recipe, tmp_path) == 0
    found = report_of(tmp_path)
    results = [LayerResult(**entry) for entry in found["rounding"]]
    assert len(results) == units if units else 1 < len(results) < LAYERS
    assert all(result.loss_after <= result.loss_nearest for result in results)
    assert sum(result.loss_after < result.loss_nearest for result in results) >= 2
    assert found["rounding_seconds"] == pytest.approx(sum(result.seconds for result in results))
    better = sum(result.loss_after < result.loss_nearest for result in results)
    part = "block" if units is None else "layer"
    how = "least squares" if "descent" in recipe else "learned rounding"
    assert re.search(rf"{how}: {len(results)} {part}s in \d+ s, {better} better", capsys.readouterr().out)


def test_rounding_leaves_less_noise_than_nearest(start: Callable[..., int], tmp_path: Path) -> None:
    """The noise counts from the float network, although its weights were rounded meanwhile."""
    found = {}
    for recipe in ("minmax", "minmax+adaround"):
        assert start(recipe, tmp_path / recipe, "--quant-scheme", "w3a8") == 0
        found[recipe] = report_of(tmp_path / recipe)["sqnr_db"]
    last = list(found["minmax"])[-1]
    assert found["minmax+adaround"][last] > found["minmax"][last] + 0.5
    assert max(found["minmax+adaround"].values()) < 100


@pytest.mark.parametrize("recipe", ["minmax/mse+equalize+bias", "mse+adaround"])
def test_the_same_seed_gives_the_same_graph(recipe: str, start: Callable[..., int], tmp_path: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert start(recipe, tmp_path / name, "--seed", seed) == 0
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b") != hash_of(tmp_path / "c")
    first, second = (report_of(tmp_path / name) for name in "ab")
    assert first["sqnr_db"] == second["sqnr_db"]
    assert first["top1_integer"] == second["top1_integer"]


def test_the_checkpoint_gives_the_same_graph(start: Callable[..., int], tmp_path: Path) -> None:
    assert start("mse+equalize+adaround+bias", tmp_path) == 0
    again = ["--resume", str(tmp_path / CHECKPOINT), "-e", "--save-path", str(tmp_path / "again")]
    assert quant_train.main([*again, "--agreement-images", "8"]) == 0
    assert hash_of(tmp_path / "again") == hash_of(tmp_path)


def test_training_can_follow(start: Callable[..., int], tmp_path: Path) -> None:
    assert start("mse+bias", tmp_path, "--epochs", "1", "--data-percentage", "0.2", "--lr", "0.001") == 0
    found = report_of(tmp_path)
    assert (found["ptq"], found["epochs"]) == ("mse+bias", 1)
    assert abs(found["top1_integer"] - found["top1_float"]) < 5


def test_one_image_calibrates(start: Callable[..., int], tmp_path: Path) -> None:
    assert start("mse+equalize+adaround+bias", tmp_path, "--calib-images", "1") == 0
    assert report_of(tmp_path)["top1_integer"] > 30


# ---- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["mse+descent", "mse+adaround", "mse+block+bias"])
def test_a_stopped_rounding_goes_on(
    recipe: str, start: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(recipe, tmp_path / "whole") == 0
    units = len(report_of(tmp_path / "whole")["rounding"])
    capsys.readouterr()
    monkeypatch.setattr(calibration_run, "reconstruct", partial(reconstruct, progress=stop_after(2)))
    assert start(recipe, tmp_path / "halved") == EXIT_INTERRUPTED
    state, said = tmp_path / "halved" / ROUNDING_STATE, capsys.readouterr().err
    part = "blocks" if "block" in recipe else "layers"
    how = "least squares" if "descent" in recipe else "learned rounding"
    sentence = f"stopped during the {how}; finished {part} are in {state}, the same command goes on"
    assert said.strip().splitlines()[-1] == sentence
    assert {path.name for path in (tmp_path / "halved").iterdir()} == {"log.log", ROUNDING_STATE}

    fitted: list[str] = []
    monkeypatch.setattr(calibration_run, "reconstruct", reconstruct)
    for name in ("fit_rows", "fit_images"):
        monkeypatch.setattr(reconstruction, name, noted(fitted, name))
    assert start(recipe, tmp_path / "halved") == 0
    assert len(fitted) == units - 2
    assert not state.exists()
    assert hash_of(tmp_path / "halved") == hash_of(tmp_path / "whole")
    assert len(report_of(tmp_path / "halved")["rounding"]) == units


def noted(calls: list[str], name: str) -> Callable[..., Any]:
    """The function of that name, whose calls are counted."""
    original = vars(reconstruction)[name]

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    return run


def test_state_of_another_run_is_refused(start: Callable[..., int], tmp_path: Path, capsys: Any, monkeypatch) -> None:
    monkeypatch.setattr(calibration_run, "reconstruct", partial(reconstruct, progress=stop_after(1)))
    assert start("mse+adaround", tmp_path) == EXIT_INTERRUPTED
    capsys.readouterr()
    assert start("mse+adaround", tmp_path, "--seed", "3") == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / ROUNDING_STATE} was left by a reconstruction with seed 0, this one")
    assert error.count("\n") == 1


def test_the_published_setting_is_the_published_one(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Settings] = []

    def remember(model: Any, images: Any, settings: Settings) -> list[LayerResult]:
        used.append(settings)
        return []

    monkeypatch.setattr(calibration_run, "reconstruct", remember)
    for recipe in ("mse+adaround", "mse+block"):
        assert start(recipe, tmp_path / recipe, "--ptq-setting", PUBLISHED, "--seed", "7") == 0
    assert [(s.granularity, s.steps, s.batch, s.positions, s.lr, s.patience, s.seed) for s in used] == [
        ("layer", 10_000, 64, 0, 1e-3, 0, 7),
        ("block", 20_000, 32, 0, 1e-3, 0, 7),
    ]


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--ptq", "mse", "--resume", "{trained}"), "--ptq starts from float weights: give --weights FILE"),
        (("--ptq", "mse", "--quant-scheme", "float"), "--ptq quantizes, the scheme float does not"),
        (("--ptq", "mse", "--calibration", "kl"), "--ptq mse and --calibration kl differ; leave out --calibration"),
        (("--ptq", "gptq"), "--ptq 'gptq' does not know the part 'gptq'"),
        (("--ptq", "mse+adaround+block"), "--ptq 'mse+adaround+block' has both adaround and block"),
        (
            ("--ptq", "mse+descent", "--ptq-setting", PUBLISHED),
            "--ptq mse+descent learns nothing; leave out --ptq-setting",
        ),
        (("--ptq", "mse+descent", "--no-channel-wise"), "--ptq mse+descent needs a scale for every channel; leave out"),
        (("--ptq", "mse+affine+adaround", "--no-channel-wise"), "--ptq mse+affine+adaround needs a scale for every"),
        (("--ptq", "mse+balance", "--no-channel-wise"), "--ptq mse+balance needs a scale for every channel; leave out"),
        (("--ptq", "mse", "--ptq-setting", "slow"), "invalid choice: 'slow'"),
        (("--ptq", "mse", "--calib-images", "0"), "--calib-images"),
        (("--ptq", "mse", "--mse-power", "0"), "--mse-power"),
    ],
)
def test_refusals(flags: tuple[str, ...], sentence: str, trained: Path, tmp_path: Path, capsys: Any) -> None:
    argv = [flag.format(trained=trained / CHECKPOINT) for flag in flags]
    assert sentence in refusal(quant_train.main, [*argv, "--save-path", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_the_same_calibration_as_the_recipes_is_accepted(start: Callable[..., int], tmp_path: Path) -> None:
    assert start("minmax/kl", tmp_path, "--calibration", "kl") == 0
    assert report_of(tmp_path)["ptq"] == "minmax/kl"


# ---- images ---------------------------------------------------------------------------------------------------------


def only_val(root: Path) -> Path:
    """A folder without train/: ten classes of two 32x32 images."""
    random = np.random.default_rng(0)
    for label in range(10):
        (root / "val" / f"class{label}").mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(10 * label, 10 * label + 150, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / f"class{label}" / f"{i}.png")
    return root


def of_folder(root: Path, run: Path, calib_images: int) -> list[str]:
    flags = ["-a", "resnet20_cifar10", "--data", str(root), "--workers", "0", "--ptq", "minmax"]
    flags += ["--calib-images", str(calib_images), "--agreement-images", "2"]
    return [*flags, "--save-path", str(run), "--report", str(run / "report.json")]


def test_accuracy_on_images_that_did_not_calibrate(tmp_path: Path, capsys: Any) -> None:
    """Counted again from the graph and the float network, one image at a time."""
    root, run = only_val(tmp_path / "data"), tmp_path / "run"
    assert quant_train.main(of_folder(root, run, 12)) == 0
    found = report_of(run)
    assert found["images_unseen"] == 8
    assert "top1_simulation_unseen" not in found
    info = create_model("resnet20_cifar10", weights=run / CHECKPOINT)
    val = open_dataset(str(root), "val", info.preprocess, seed=0)
    used = set(subset(val, count=12, seed=0).members.tolist())
    (images, labels), *_ = make_loader(val, 20, train=False, workers=0)
    unseen = [i for i in range(20) if i not in used]
    assert len(unseen) == 8
    engine = TorchEngine(load(run / GRAPH))
    integer = [int(engine(images[i : i + 1]).argmax()) == int(labels[i]) for i in unseen]
    with torch.no_grad():
        module = info.module.eval()
        exact = [int(module(normalize(images[i : i + 1], info.preprocess)).argmax()) == int(labels[i]) for i in unseen]
    assert found["top1_integer_unseen"] == pytest.approx(100 * np.mean(integer))
    assert found["top1_float_unseen"] == pytest.approx(100 * np.mean(exact))
    assert f"integer {100 * np.mean(integer):.2f} % of 8 images" in capsys.readouterr().out


def test_no_such_accuracy_where_all_images_calibrated(tmp_path: Path, capsys: Any) -> None:
    root, run = only_val(tmp_path / "data"), tmp_path / "run"
    assert quant_train.main(of_folder(root, run, 20)) == 0
    assert not set(UNSEEN_KEYS) & set(report_of(run))
    assert "without those calibrated on" not in capsys.readouterr().out


def test_calibration_images_are_the_same_in_every_pass() -> None:
    data = subset(open_dataset("digits", "train", DIGITS_PREPROCESS), count=10, seed=0)
    images = CalibrationImages(make_loader(data, 4, train=False, workers=0), DIGITS_PREPROCESS, torch.device("cpu"))
    first, second = list(images), list(images)
    assert len(images) == len(first) == 3
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for count, sizes in ((1, [1]), (4, [4]), (6, [4, 2]), (99, [4, 4, 2])):
        given = list(images.first(count))
        assert [len(batch) for batch in given] == sizes
        assert torch.equal(torch.cat(given), torch.cat(first)[:count])


def cifar_images(folder: Path, count: int) -> CalibrationImages:
    """Random images in the layout of folders; a mirrored one keeps its class."""
    for label in "ab":
        (folder / "val" / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "val" / label / f"{number}.png")
    preprocess = replace(DIGITS_PREPROCESS, mean=(0.5,) * 3, std=(0.5,) * 3, channels=3)
    data = open_dataset(folder, "val", preprocess)
    return CalibrationImages(make_loader(data, 4, train=False), preprocess, torch.device("cpu"))


def test_mirror_images_stand_behind_their_image(tmp_path: Path) -> None:
    images = cifar_images(tmp_path, 3)
    plain, both = torch.cat(list(images)), torch.cat(list(images.with_mirrored()))
    assert (len(plain), len(both)) == (6, 12)
    assert torch.equal(both[::2], plain)
    assert torch.equal(both[1::2], plain.flip(-1))


@pytest.mark.parametrize(("flippable", "fit", "total"), [(True, 12, 12), (True, 11, 6), (False, 12, 6)])
def test_mirrored_where_it_may_and_memory_allows(
    flippable: bool, fit: int, total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, given, lines = cifar_images(tmp_path, 3), [], []
    images.flippable = flippable
    monkeypatch.setattr(calibration_run, "most_images", lambda model, settings: fit)
    monkeypatch.setattr(calibration_run, "reconstruct", lambda model, batches, settings: given.extend(batches) or [])
    calibration_run.learn_rounding(None, images, Settings(), lines.append)  # type: ignore[arg-type]
    assert sum(map(len, given)) == total
    assert bool(lines) == (total > 6)
