"""What the README tells users to type works."""

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

import bit_config
from tvm_benchmark.benchmark import build_parser as benchmark_parser
from tvm_benchmark.compile import build_parser as compile_parser
from utils.integer_graph.__main__ import main as integer_graph
from utils.train_flags import build_parser

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_commands_have_flags_that_exist() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("python quant_train.py")]
    assert len(lines) >= 5
    for line in lines:
        build_parser().parse_args(shlex.split(line, comments=True)[2:])


@pytest.mark.parametrize(
    ("program", "parser"), [("compile", compile_parser), ("benchmark", benchmark_parser)], ids=["compile", "benchmark"]
)
def test_commands_about_compiled_models(program: str, parser: Callable[[], ArgumentParser]) -> None:
    start = f"python -m tvm_benchmark.{program} "
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(start)]
    assert lines
    for line in lines:
        parser().parse_args(shlex.split(line.removeprefix(start), comments=True))


def test_scheme_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "s.yaml").write_text(block)
    scheme = bit_config.read_scheme(tmp_path / "s.yaml")
    assert scheme.residual_bits == 8
    assert [rule.pair for rule in scheme.rules] == [(4, 4), (4, 8), (8, 8)]


def test_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert "Accuracy(top1=" in capsys.readouterr().out
    assert integer_graph(["info", str(tmp_path / "model.safetensors")]) == 0
