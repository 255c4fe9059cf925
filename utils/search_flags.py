"""The flags of ``quant_train.py --search``: what they are, and how their words are read and checked."""

import argparse
import re
from collections.abc import Sequence

from bit_config import MAX_BITS, MIN_BITS, Rule
from utils.errors import UserError
from utils.flag_kinds import COUNT, FILE, NAME, SWITCH, Kind, Row
from utils.quantization_utils.bit_width_problem import Budget
from utils.quantization_utils.cost_model import MIB

# Word of the command line -> kind of budget, and its units with their factors to the kind's own unit.
WORDS = {"size": "size", "bops": "bops", "latency": "latency", "bits": "mean_bits"}
UNITS = {
    "size": {"MB": 1e6 / MIB, "KB": 1e3 / MIB, "GB": 1e9 / MIB, "MiB": 1.0, "KiB": 2**-10, "GiB": 2.0**10},
    "bops": {"M": 1e-3, "G": 1.0, "T": 1e3},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "bits": {"": 1.0},
}
TRACE, DEFAULT_BITS, DEFAULT_IMAGES = "trace", "4,8", 256

SEARCH_FLAGS: tuple[Row, ...] = (
    (
        "--search",
        Kind(str, "BUDGETS"),
        None,
        "choose the bits of every layer under budgets, such as bops=0.5,size=3.5MB, then stop; size, bops (bit "
        "operations), latency and bits (mean bits of the weights) count together; 0 to 1 is a part of the way from "
        "the least these bits can cost to all layers at the highest, otherwise give a unit: MiB, MB, KiB, KB; G, M, "
        "T; ms, us",
    ),
    ("--search-bits", Kind(str, "BITS"), DEFAULT_BITS, "candidates, any of 2 to 8 with commas between them"),
    (
        "--search-metric",
        NAME,
        TRACE,
        "damage of a layer: trace (of the Hessian, times the error of the weights), trace+activations (also of what "
        "the layer reads), fisher, loss, kl or sqnr",
    ),
    ("--search-images", COUNT, DEFAULT_IMAGES, "images on which the damage is measured"),
    (
        "--search-fix",
        Kind(options=(("action", "append"), ("metavar", "REGEX=BITS"))),
        None,
        "layers that are not searched, may be repeated, the first that matches counts; first and last layer have 8 "
        "bits unless it says otherwise",
    ),
    (
        "--sensitivity",
        FILE,
        None,
        "damage measured before (sensitivity.json), or the original's tables as JSON, instead of measuring it",
    ),
    ("--pareto", COUNT, None, "also the fronts of damage against each budget, with N points, as table and picture"),
    ("--allow-useless-bits", SWITCH, False, "keep widths that are no cheaper than the next larger in any budget"),
    ("--save-scheme", FILE, None, "YAML file of the chosen bits, for --quant-scheme (default: in --save-path)"),
)
COMPANIONS = ("search_fix", "sensitivity", "pareto", "allow_useless_bits", "save_scheme")
DEFAULTS = {"search_bits": DEFAULT_BITS, "search_metric": TRACE, "search_images": DEFAULT_IMAGES}
# What a search would ignore.
EXCLUDED = (
    "resume",
    "zoo",
    "explain",
    "evaluate",
    "summary",
    "quant_scheme",
    "ptq",
    "report",
    "epochs",
    "float_epochs",
)
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)")


def check_search(args: argparse.Namespace) -> None:
    """Raise UserError for words that cannot be read, flags that a search ignores, and its flags without it."""
    if args.search is None:
        alone = [name for name in COMPANIONS if vars(args)[name]]
        alone += [name for name, default in DEFAULTS.items() if vars(args)[name] != default]
        if alone:
            raise UserError(f"{_flag(alone[0])} belongs to a search; give --search with its budgets, or leave it out")
        return
    ignored = [name for name in EXCLUDED if vars(args)[name] is not None and vars(args)[name] is not False]
    if ignored:
        raise UserError(f"--search chooses bits from float weights and stops; leave out {_flag(ignored[0])}")
    parse_budgets(args.search)
    parse_widths(args.search_bits)
    parse_fixes(args.search_fix or ())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Budgets such as ``bops=0.5,size=3.5MB``: a plain 0..1 is a fraction, anything else has a unit.

    Raises UserError for other words and numbers.

    >>> parse_budgets("bops=0.5,bits=5")
    (Budget(kind='bops', limit=0.5, fraction=True), Budget(kind='mean_bits', limit=5.0, fraction=False))
    """
    budgets = tuple(_budget(part) for part in text.split(","))
    kinds = [budget.kind for budget in budgets]
    if len(set(kinds)) != len(kinds):
        raise UserError(f"--search {text} names one budget twice; name each once")
    return budgets


def _budget(text: str) -> Budget:
    word, equals, value = (part.strip() for part in text.partition("="))
    if not equals or word not in WORDS:
        raise UserError(f"--search has {text.strip()!r}, expected NAME=VALUE with NAME one of {', '.join(WORDS)}")
    match = _NUMBER.fullmatch(value)
    if match is None or match[2] not in ("", *UNITS[word]):
        raise UserError(f"--search {word} has the value {value!r}, expected {_expected(word)}")
    number, unit = float(match[1]), match[2]
    if not unit and number <= 1:
        return Budget(WORDS[word], number, fraction=True)
    if unit not in UNITS[word]:
        raise UserError(f"--search {word} is {value}, which is no fraction and has no unit; expected {_expected(word)}")
    return Budget(WORDS[word], number * UNITS[word][unit])


def _expected(word: str) -> str:
    if word == "bits":
        return f"0 to 1 or mean bits from {MIN_BITS} to {MAX_BITS}"
    return f"0 to 1 or a number with {', '.join(UNITS[word])}"


def parse_widths(text: str) -> tuple[int, ...]:
    """Candidate bits such as ``2,4,8``, ascending.  Raises UserError unless they are different, each from 2 to 8.

    >>> parse_widths("8,4")
    (4, 8)
    """
    parts = [part.strip() for part in text.split(",")]
    widths = sorted({int(part) for part in parts if re.fullmatch(r"[0-9]", part)})
    if len(widths) != len(parts) or not all(MIN_BITS <= bits <= MAX_BITS for bits in widths):
        raise UserError(
            f"--search-bits is {text!r}, expected different whole numbers from {MIN_BITS} to {MAX_BITS} "
            "with commas between them"
        )
    return tuple(widths)


def parse_fixes(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules of ``--search-fix 'regex=bits'``.  Raises UserError for other forms, bits and regular expressions.

    >>> parse_fixes(["stage4=4"])
    (Rule(pattern='stage4', bits=4),)
    """
    rules = []
    for text in texts:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not re.fullmatch(r"[0-9]+", bits.strip()):
            raise UserError(f"--search-fix is {text!r}, expected REGEX=BITS, such as 'stage4=8'")
        rules.append(Rule(pattern, int(bits)))
    return tuple(rules)
