"""The example does what it says, in seconds."""

from pathlib import Path

import pytest

from examples import own_model
from utils.api import load

LINES = 60  # it has to be read in one go


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_model, "EPOCHS", 3)
    own_model.main(str(tmp_path / "own.safetensors"))
    out = capsys.readouterr().out
    top1 = float(out.split("top-1 ")[1].split()[0])
    assert top1 > 80
    assert load(tmp_path / "own.safetensors").meta["classes"] == [str(i) for i in range(10)]


def test_it_is_short() -> None:
    assert len(Path(own_model.__file__).read_text().splitlines()) <= LINES
