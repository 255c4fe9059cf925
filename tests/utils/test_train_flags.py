"""The command line as data."""

import argparse
import shlex
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.flag_checks import check, fill_in
from utils.train_flags import FLAGS, build_parser, resume_command

# Every flag of the original's quant_train.py, with a value of the kind its users give.
ORIGINAL = [
    *("--data IMAGES", "-a resnet18", "--arch resnet18", "--teacher-arch resnet101", "-j 4", "--workers 4"),
    *("--epochs 90", "--start-epoch 0", "-b 128", "--batch-size 128", "--lr 0.1", "--learning-rate 0.1"),
    *("--momentum 0.9", "--wd 1e-4", "--weight-decay 1e-4", "-p 10", "--print-freq 10", "--resume FILE", "-e"),
    *("--evaluate", "--pretrained", "--world-size -1", "--rank -1", "--dist-url tcp://224.66.41.62:23456"),
    *("--dist-backend nccl", "--seed 3", "--gpu 0", "--multiprocessing-distributed", "--act-range-momentum 0.99"),
    *("--quant-mode symmetric", "--save-path checkpoints/", "--data-percentage 0.1", "--fix-BN"),
    *("--fix-BN-threshold 100", "--checkpoint-iter -1", "--evaluate-times -1", "--quant-scheme uniform4"),
    *("--resume-quantize --resume FILE", "--act-percentile 99.9", "--weight-percentile 0", "--channel-wise"),
    *("--bias-bit 32", "--distill-method KD_naive", "--distill-alpha 0.95", "--temperature 6"),
    "--fixed-point-quantization",
]
CHANGED = ["--batch-size", "--lr", "--resume", "--channel-wise", "--distill-alpha", "--save-path", "--seed"]
CHANGED += ["--weight-percentile", "--quant-mode", "--bias-bit", "--checkpoint-iter", "--evaluate-times"]


def parse(text: str) -> argparse.Namespace:
    args = build_parser().parse_args(shlex.split(text))
    check(args)
    return args


@pytest.mark.parametrize("flag", ORIGINAL)
def test_flags_of_the_original(flag: str) -> None:
    parse(flag)


def test_all_at_once() -> None:
    flags = " ".join(flag for flag in ORIGINAL if flag not in ("--pretrained", "--evaluate"))
    args = parse(flags)
    assert (args.arch, args.act_range_momentum, args.fix_bn_threshold, args.lr) == ("resnet18", 0.99, 100, 0.1)


@pytest.mark.parametrize("name", CHANGED)
def test_help_says_what_changed(name: str) -> None:
    texts = {word: text for rows in FLAGS.values() for names, _, _, text in rows for word in names.split()}
    assert "original" in texts[name]


def test_help_fits_and_shows_defaults() -> None:
    text = build_parser().format_help()
    assert "%(" not in text
    for rows in FLAGS.values():
        for names, _, _, _ in rows:
            assert all(name in text for name in names.split())
    assert "(default: 0.01)" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--world-size 2", "ask for 2 training processes"),
        ("--rank 1", "ask for 2 training processes"),
        ("--gpu 0 --device cpu", "name two devices"),
        ("--lr nan", "nan is not a positive number"),
        ("--lr fast", "invalid number value: 'fast'"),
        ("--batch-size 0", "0 is not a positive number"),
        ("--batch-size 1.5", "invalid whole number value: '1.5'"),
        ("--epochs -1", "-1 is not a non-negative number"),
        ("--act-percentile 30", "30 is not a percentile"),
        ("--quant-mode asymmetric", "invalid choice: 'asymmetric'"),
        ("--bias-bit 0", "invalid choice: 0"),
        ("--distill-method KD_naive --temperature 0", "temperature of the distillation is 0.0"),
        ("--dat x", "unrecognized arguments: --dat x"),
        ("--resume r --pretrained", "--resume brings its own weights"),
    ],
)
def test_mistakes(flags: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(flags)


def test_more_gpus_than_one_are_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="ask for 2 training processes"):
        parse("--multiprocessing-distributed")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", ("digits", "digits", "uniform8", 5, 15, "runs/digits_uniform8")),
        ("-e", ("digits", "digits", "uniform8", 5, 0, "runs/digits_uniform8")),
        ("--weights w", ("digits", "digits", "uniform8", 5, 0, "runs/digits_uniform8")),
        ("--data X", ("resnet18", "X", "uniform8", 90, 0, "runs/resnet18_uniform8")),
        (
            "--data X -a torchvision/vgg11",
            ("torchvision/vgg11", "X", "uniform8", 90, 0, "runs/torchvision_vgg11_uniform8"),
        ),
        ("--data X --quant-scheme a/b.yaml", ("resnet18", "X", "a/b.yaml", 90, 0, "runs/resnet18_b")),
        ("--summary -a resnet50", ("resnet50", None, "uniform8", 90, 0, "runs/resnet50_uniform8")),
    ],
)
def test_defaults_that_depend_on_others(flags: str, expected: tuple[object, ...]) -> None:
    args = parse(flags)
    fill_in(args, None, None)
    found = (args.arch, args.data, args.quant_scheme, args.epochs, args.float_epochs, str(args.save_path))
    assert found == expected


def test_defaults_of_a_resumed_run() -> None:
    args = parse("--resume runs/x/checkpoint.pth.tar --data X")
    fill_in(args, "resnet50", "bops_0.5")
    assert (args.arch, args.quant_scheme, args.save_path) == ("resnet50", "bops_0.5", Path("runs/x"))


def test_missing_images_are_one_sentence() -> None:
    args = parse("-a resnet18")
    with pytest.raises(UserError, match="--data is missing: give the folder with the images for resnet18"):
        fill_in(args, None, None)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--mean 0.5 0.4 0.3 --std 0.2 --lr 0.25 --fix-BN --act-percentile 99.5",
        "--no-channel-wise --save-path 'a b' --gpu 0 --seed 7 --crop 128 --resize 0 -j 0",
    ],
)
def test_resume_command_parses_to_the_same_run(flags: str) -> None:
    args = parse(f"{flags} --data 'my images' --weights w.pth")
    fill_in(args, None, None)
    words = shlex.split(resume_command(args, Path("quant_train.py"), Path("my run/checkpoint.pth.tar")))
    assert words[:4] == ["python", "quant_train.py", "--resume", "my run/checkpoint.pth.tar"]
    again = parse(shlex.join(words[2:]))
    fill_in(again, args.arch, args.quant_scheme)
    different = {key for key in vars(args) if vars(args)[key] != vars(again)[key]}
    assert different <= {"resume", "weights", "gpu"}
