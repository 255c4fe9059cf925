"""What the README and the documents tell users to type works, and what they point to exists."""

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

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_exist(page: Path) -> None:
    shell = [line for block in blocks("sh", page) for line in block.splitlines()]
    lines = [line for line in shell if line.startswith("python quant_train.py")]
    assert len(lines) >= 5 or page != README
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    files = [link for link in links if "://" not in link]
    assert files or page != README
    assert [link for link in files if not (page.parent / link).is_file()] == []


def test_demo_picture_is_small() -> None:
    assert (ROOT / "docs" / "demo.png").stat().st_size < 100_000
