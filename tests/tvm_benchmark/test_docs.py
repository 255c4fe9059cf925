"""What docs/tvm.md tells users to type works."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tvm_benchmark.small_graphs import images, small_graph
from tvm_benchmark import compile as compiler
from tvm_benchmark.compile import compile_graph
from tvm_benchmark.isa import TARGETS
from utils import train_flags
from utils.integer_graph import interpreter

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "tvm.md").read_text()
PARSERS: dict[str, Callable] = {
    "python -m tvm_benchmark.compile ": compiler.build_parser,
    "python quant_train.py ": train_flags.build_parser,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", PARSERS)
def test_commands_have_flags_that_exist(command: str) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(command)]
    assert lines
    for line in lines:
        PARSERS[command]().parse_args(shlex.split(line.removeprefix(command), comments=True))


def test_every_target_has_a_row() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE) == list(TARGETS)


@pytest.mark.tvm
def test_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = small_graph()
    compile_graph(graph, "resnet18", batch=2)
    names: dict = {}
    (block,) = blocks("python")
    exec(compile(block, "docs/tvm.md", "exec"), names)
    np.testing.assert_array_equal(names["logits"], interpreter.run(graph, 0 * images(2)))
