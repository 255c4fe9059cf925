"""The words of a search."""

import argparse
import shlex

import pytest

from utils.errors import UserError
from utils.flag_checks import check, fill_in
from utils.quantization_utils.sensitivity import METRICS
from utils.search_flags import TRACE, parse_budgets, parse_fixes, parse_widths
from utils.train_flags import build_parser

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "kind", "limit", "fraction"),
    [
        ("size=0.25", "size", 0.25, True),
        ("size=1", "size", 1, True),
        ("bops=0", "bops", 0, True),
        ("size=3.5MB", "size", 3.5e6 / MIB, False),
        ("size=0.5MiB", "size", 0.5, False),
        ("size=512KiB", "size", 0.5, False),
        ("size=400KB", "size", 4e5 / MIB, False),
        ("size=1e-1 GB", "size", 1e8 / MIB, False),
        ("bops=40G", "bops", 40, False),
        ("bops=1.5T", "bops", 1500, False),
        ("bops=900M", "bops", 0.9, False),
        ("latency=5ms", "latency", 5, False),
        ("latency=.75ms", "latency", 0.75, False),
        ("latency=800us", "latency", 0.8, False),
        ("latency=2s", "latency", 2000, False),
        ("bits=5", "mean_bits", 5, False),
        ("bits=0.5", "mean_bits", 0.5, True),
    ],
)
def test_budgets(text: str, kind: str, limit: float, fraction: bool) -> None:
    (budget,) = parse_budgets(text)
    assert (budget.kind, budget.fraction) == (kind, fraction)
    assert budget.limit == pytest.approx(limit, rel=1e-15)


def test_several_budgets_in_their_order() -> None:
    assert [b.kind for b in parse_budgets("latency=0.5, bits=4.5,size=1MB")] == ["latency", "mean_bits", "size"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "--search has '', expected NAME=VALUE with NAME one of size, bops, latency, bits"),
        ("speed=1", "--search has 'speed=1', expected NAME=VALUE"),
        ("size", "--search has 'size', expected NAME=VALUE"),
        ("size=0.5,size=1MB", "names one budget twice"),
        ("size=big", "size has the value 'big', expected 0 to 1 or a number with MB, KB, GB, MiB, KiB, GiB"),
        ("size=-1MB", "size has the value '-1MB'"),
        ("size=nan", "size has the value 'nan'"),
        ("size=5ms", "size has the value '5ms'"),
        ("bops=40", "bops is 40, which is no fraction and has no unit; expected 0 to 1 or a number with M, G, T"),
        ("bits=5bits", "bits has the value '5bits', expected 0 to 1 or mean bits from 2 to 8"),
        ("size=0MB", "the budget size is 0, expected a positive number"),
    ],
)
def test_budgets_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_budgets(text)


@pytest.mark.parametrize("text", ["", "4,4", "1,8", "4,9", "4;8", "4,eight", "16"])
def test_widths_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="expected different whole numbers from 2 to 8"):
        parse_widths(text)


def test_widths_and_fixes() -> None:
    assert parse_widths("8, 2,4") == (2, 4, 8)
    assert [(rule.pattern, rule.bits) for rule in parse_fixes(["a=b=4", r"conv\d=8"])] == [("a=b", 4), (r"conv\d", 8)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stage4", "expected REGEX=BITS, such as 'stage4=8'"),
        ("=4", "expected REGEX=BITS"),
        ("a=b", "expected REGEX=BITS"),
        ("a=9", "asks for 9 bits"),
        ("(=4", "is no regular expression"),
    ],
)
def test_fixes_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_fixes([text])


def parse(text: str) -> argparse.Namespace:
    args = build_parser().parse_args(shlex.split(text))
    check(args)
    return args


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--pareto 5", "--pareto belongs to a search; give --search with its budgets, or leave it out"),
        ("--save-scheme s.yaml", "--save-scheme belongs to a search"),
        ("--search-fix a=4", "--search-fix belongs to a search"),
        ("--search-bits 2,4", "--search-bits belongs to a search"),
        ("--search-metric kl", "--search-metric belongs to a search"),
        ("--search-images 9", "--search-images belongs to a search"),
        ("--search bops=0.5 --resume c", "--search chooses bits from float weights and stops; leave out --resume"),
        ("--search bops=0.5 -e", "leave out --evaluate"),
        ("--search bops=0.5 --epochs 0", "leave out --epochs"),
        ("--search bops=0.5 --quant-scheme uniform8", "leave out --quant-scheme"),
        ("--search bops=0.5 --summary", "leave out --summary"),
        ("--search bops=0.5 --report r.json", "leave out --report"),
        ("--search bops=40", "no fraction and has no unit"),
        ("--search bops=0.5 --search-bits 9", "--search-bits is '9'"),
        ("--search bops=0.5 --search-fix a", "--search-fix is 'a'"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(flags)


def test_defaults() -> None:
    args = parse("-a resnet18 --search bops=0.5 --sensitivity s.json --search-fix a=4 --search-fix b=8")
    fill_in(args, None, None)
    assert (str(args.save_path), args.data, args.search_fix) == ("runs/resnet18_search", None, ["a=4", "b=8"])
    assert args.search_metric == TRACE == METRICS[0]
    with pytest.raises(UserError, match="--data is missing"):
        fill_in(parse("-a resnet18 --search bops=0.5"), None, None)
