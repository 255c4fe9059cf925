"""The search for tilings: what is tried, what is remembered and under which key."""

import ast
import json
from pathlib import Path

import pytest

from tests.tvm_benchmark.dense_graphs import Shape, conv, single
from tests.tvm_benchmark.kernels import finished, image, requantized
from tvm_benchmark import tune
from tvm_benchmark.convolution import default_tiling, emit_with
from tvm_benchmark.dense import Tiling
from tvm_benchmark.isa import TARGETS, Target, choose
from tvm_benchmark.plan import Plan, Step, make_plan
from tvm_benchmark.tune import MAX_CANDIDATES, Tuner, cache_folder, candidates, layer_key, measure
from utils.errors import UserError

pytestmark = pytest.mark.tvm

ROOT = Path(__file__).resolve().parents[2]
FRAMED = Shape(8, 20, kernel=(3, 3), padding=(1, 1, 1, 1))


def layer(shape: Shape = FRAMED, size: tuple[int, int] = (5, 4), batch: int = 1) -> tuple[Plan, Step]:
    plan = make_plan(single(shape, size), batch)
    return plan, next(step for step in plan.steps if step.kind == "conv")


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize(
    "shape", [Shape(8, 40), FRAMED, Shape(4, 16, groups=2, stride=(2, 2))], ids=["1x1", "3x3", "g"]
)
def test_candidates_are_few_and_the_default_is_among_them(shape: Shape, target: Target) -> None:
    plan, step = layer(shape, (9, 8))
    found = candidates(plan, step, target)
    assert found[0] == default_tiling(plan, step, target)
    assert 2 < len(found) <= MAX_CANDIDATES
    assert len(set(found)) == len(found)
    for tiling in found:
        assert emit_with(plan, step, target, tiling).lines


def test_wide_inputs_have_one_tiling() -> None:
    x = image((4, 5, 5), bits=16)
    one = conv("one", x, Shape(4, 4))
    plan = make_plan(finished([x, one, requantized(one)]), 1)
    step = plan.steps[1]
    assert candidates(plan, step, TARGETS["amx"]) == [default_tiling(plan, step, TARGETS["amx"])]


def test_the_fastest_is_remembered_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, step = layer()
    target = TARGETS["portable"]
    options = candidates(plan, step, target)
    monkeypatch.setattr(tune, "measure", lambda sources, *_: [abs(i - 3) + 1e-6 for i in range(len(sources))])
    tuner = Tuner(tmp_path / "new")
    assert tuner.tiling(plan, step, target) == options[3]
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == f"{layer_key(plan, step, target)}.json"
    record = json.loads(path.read_text())
    assert (record["tried"], record["microseconds"]) == (len(options), 1.0)
    monkeypatch.setattr(tune, "measure", None)
    again = Tuner(tmp_path / "new")
    assert again.tiling(plan, step, target) == options[3]
    assert (tuner.searched, again.searched) == (1, 0)


def test_without_a_search_layers_get_their_default(tmp_path: Path) -> None:
    plan, step = layer()
    tuner = Tuner(tmp_path, search=False)
    assert tuner.tiling(plan, step, TARGETS["avx2"]) == default_tiling(plan, step, TARGETS["avx2"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"tiling": {"pixels": 4}}', '{"tiling": {"speed": 4}}'])
def test_a_spoiled_file_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    plan, step = layer()
    path = tmp_path / f"{layer_key(plan, step, TARGETS['avx2'])}.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^cannot read the tiling .*\.json .*; remove the file$"):
        Tuner(tmp_path).tiling(plan, step, TARGETS["avx2"])


def test_the_key_changes_with_what_decides_the_best_tiling() -> None:
    avx2 = TARGETS["avx2"]
    described = [
        layer_key(*layer(), TARGETS["portable"]),
        layer_key(*layer(), avx2),
        layer_key(*layer(size=(5, 6)), avx2),
        layer_key(*layer(batch=2), avx2),
        layer_key(*layer(Shape(8, 24, kernel=(3, 3), padding=(1, 1, 1, 1))), avx2),
        layer_key(*layer(Shape(8, 20, kernel=(3, 3), padding=(1, 1, 1, 1), bits=4)), avx2),
        layer_key(*layer(Shape(8, 20, kernel=(3, 3), padding=(2, 1, 1, 1))), avx2),
        layer_key(*layer(Shape(4, 16, groups=2, kernel=(3, 3), padding=(1, 1, 1, 1))), avx2),
    ]
    assert len(set(described)) == len(described)
    assert described[1] == layer_key(*layer(), avx2)


def test_the_key_changes_with_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = layer_key(*layer(), TARGETS["avx2"])
    monkeypatch.setattr(tune, "cpu_name", lambda: "another")
    assert layer_key(*layer(), TARGETS["avx2"]) != before


def imported(module: str) -> set[str]:
    """Modules of tvm_benchmark that a module needs, itself included."""
    found, left = set[str](), [module]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            tree = ast.parse((ROOT / "tvm_benchmark" / f"{name}.py").read_text())
            froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
            left += [m.split(".")[1] for m in froms if m.startswith("tvm_benchmark.")]
    return found


def test_the_key_changes_with_every_generator() -> None:
    assert imported("tiles") | imported("registers") <= set(tune.GENERATORS)


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HAWQ_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "tilings"
    monkeypatch.delenv("HAWQ_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "hawq" / "tilings"


def test_candidates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    plan, step = layer()
    tilings = [Tiling(pixels, 1) for pixels in (1, 4)]
    times = measure([emit_with(plan, step, choose(), tiling) for tiling in tilings], plan, choose())
    assert len(times) == 2
    assert all(0 < seconds < 1 for seconds in times)
