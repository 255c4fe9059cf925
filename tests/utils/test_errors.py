"""How command lines end."""

import subprocess
import sys

import pytest

from utils.errors import EXIT_PIPE, Interrupted, UserError, command_line

WRITER = """
import sys
from utils.errors import command_line

@command_line()
def main():
    for number in range(100_000):
        print(number)
    return 0

code = main()
print(code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (UserError("got 3, give 4"), 2, "error: got 3, give 4\n"),
        (Interrupted("the same command goes on"), 130, "\nthe same command goes on\n"),
        (KeyboardInterrupt(), 130, "\nstopped half way\n"),
    ],
)
def test_sentence_and_code(raised: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    @command_line("stopped half way")
    def main() -> int:
        raise raised

    assert main() == code
    assert capsys.readouterr() == ("", text)


def test_result_and_name_are_those_of_main() -> None:
    @command_line()
    def main(number: int) -> int:
        """What it does."""
        return number

    assert main(1) == 1
    assert main.__doc__ == "What it does."


def test_other_exceptions_pass() -> None:
    @command_line()
    def main() -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        main()


def test_a_reader_that_has_gone() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "0\n"
        run.stdout.close()
        assert run.stderr.read() == f"{EXIT_PIPE}\n"
    assert run.returncode == 0
