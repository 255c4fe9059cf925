"""What a user's mistake and a user's Ctrl-C raise, and how command lines end with them: a sentence and an exit code."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141
P = ParamSpec("P")


class UserError(ValueError):
    """Input that cannot be used: the message says what was got, what is expected and what to do, in one sentence."""


class Interrupted(Exception):
    """Work was asked to stop; what could be saved is saved.  The message says how to continue, if anything does."""


def not_finite(job: str, place: str) -> UserError:
    """What a job raises that meets NaN or infinity among activations.  place: the operator, or a layer."""
    return UserError(
        f"{job} met values that are not finite at {place}; check the weights and the images for NaN or infinity"
    )


def command_line(stopped: str = "stopped") -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorator of a ``main`` that returns its exit code.

    A UserError becomes ``error: ...`` on stderr and code 2; Ctrl-C the message of Interrupted, or ``stopped``, and code
    130; where the reader of the output has gone (``| head``), code 141 without a word, as with other programs.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return EXIT_USER_ERROR
            except (Interrupted, KeyboardInterrupt) as stop:
                print(f"\n{str(stop) or stopped}", file=sys.stderr)
                return EXIT_INTERRUPTED
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed has no reader either
                return EXIT_PIPE

        return run

    return decorate
