"""What a run prints: lines on the console that do not cut through progress bars, and the same in a file."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

log = logging.getLogger("quant_train")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        reason = sys.exc_info()[1]
        raise UserError(f"cannot write the log {self.baseFilename}: {reason}; free space or choose another place")


@contextlib.contextmanager
def logging_to_console() -> Iterator[None]:
    """Show what is logged on stdout, and close whatever :func:`log_to` opened in the end."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Console())
    try:
        yield
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()


def log_to(path: Path) -> None:
    """Append what is logged to a file too; missing folders are made.  Raises UserError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.addHandler(_File(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
