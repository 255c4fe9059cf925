"""The command line: exit codes, one-sentence refusals, output."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.integer_graph.__main__ import main
from utils.integer_graph.interpreter import run
from utils.integer_graph.ir import Graph
from utils.integer_graph.predict import predict, softmax
from utils.integer_graph.serialize import load, save
from utils.preprocess import Preprocess

NAMES = ["ant", "bee", "cat"]


def small_graph(builder, seed=0, **meta):
    b = builder(seed)
    graph = b.classifier(b.requantize(b.conv(b.image((3, 8, 8)))), 3)
    preprocess = Preprocess(resize=None, input_size=8).as_dict()
    return Graph(graph.nodes, {"preprocess": preprocess, "classes": NAMES, **meta})


@pytest.fixture
def graph_file(builder, tmp_path):
    save(small_graph(builder), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def refused(capsys, *argv):
    """The one sentence a command prints when it refuses."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_info(graph_file, capsys):
    assert main(["info", str(graph_file)]) == 0
    out = capsys.readouterr().out
    assert "packed weights" in out
    assert "conv2d1" in out


def test_diff(graph_file, tmp_path, builder, capsys):
    save(small_graph(builder, 1), tmp_path / "other")
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.uint8))
    np.save(tmp_path / "bad.npy", np.zeros((1, 3, 8, 9), np.uint8))
    assert main(["diff", str(graph_file), str(graph_file), "--images", "3"]) == 0
    assert "values of 3 images: equal" in capsys.readouterr().out
    assert main(["diff", str(graph_file), str(tmp_path / "other"), "--input", str(tmp_path / "x.npy")]) == 1
    out = capsys.readouterr().out
    assert "structure: node 0 (image0): " in out
    assert "values of 1 images: image0: its value differs" in out
    assert "got images uint8" in refused(capsys, "diff", graph_file, graph_file, "--input", tmp_path / "bad.npy")
    assert "none is missing" in refused(capsys, "diff", graph_file, tmp_path / "none")


def test_predict_ranks_the_softmax_of_the_logits(graph_file, picture, capsys):
    graph = load(graph_file)
    pixels = np.asarray(Image.open(picture)).transpose(2, 0, 1)
    shares = softmax(run(graph, pixels[None])[0])
    order = np.argsort(-shares, kind="stable")
    assert predict(graph, [picture], 2) == [[(NAMES[i], shares[i]) for i in order[:2]]]
    assert sum(shares) == pytest.approx(1, abs=len(shares) * np.finfo(float).eps)
    assert main(["predict", str(graph_file), str(picture), str(picture), "--top", "1"]) == 0
    line = f"{picture}\n  {shares[order[0]]:7.2%}  {NAMES[order[0]]}\n"
    assert capsys.readouterr().out == line * 2


def test_predict_turns_images_where_the_graph_says_so(builder, picture, tmp_path):
    turned = Preprocess(resize=None, input_size=8, rotate180=True).as_dict()
    straight, rotated = small_graph(builder), small_graph(builder, preprocess=turned)
    Image.open(picture).rotate(180).save(tmp_path / "turned.png")
    assert predict(rotated, [tmp_path / "turned.png"]) == predict(straight, [picture])


def test_predict_refuses(graph_file, picture, tmp_path, builder, capsys):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (9, 8)).save(tmp_path / "big.png")
    Image.open(picture).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:60])
    save(small_graph(builder, classes=["one"]), tmp_path / "names")
    bare = small_graph(builder)
    save(Graph(bare.nodes, {}), tmp_path / "bare")
    wrong = Preprocess(resize=None, input_size=9).as_dict()
    save(small_graph(builder, preprocess=wrong), tmp_path / "wrong")
    assert "is missing" in refused(capsys, "predict", graph_file, tmp_path / "none.png")
    assert "not a file" in refused(capsys, "predict", graph_file, tmp_path)
    assert "cannot decode" in refused(capsys, "predict", graph_file, tmp_path / "text.png")
    assert "cannot decode" in refused(capsys, "predict", graph_file, tmp_path / "half.png")
    assert "the image is 9x8 pixels" in refused(capsys, "predict", graph_file, tmp_path / "big.png")
    assert "1 classes but has 3" in refused(capsys, "predict", tmp_path / "names", picture)
    assert "does not say how image files" in refused(capsys, "predict", tmp_path / "bare", picture)
    assert "preprocessing gives images [3, 9, 9]" in refused(capsys, "predict", tmp_path / "wrong", picture)


def test_classes_without_names_are_numbered(builder, picture):
    assert {name for name, _ in predict(small_graph(builder, classes=3), [picture])[0]} == {
        "class 0",
        "class 1",
        "class 2",
    }


@pytest.mark.parametrize("argv", [[], ["info"], ["diff", "a", "b", "--images", "0"], ["predict", "a"], ["paint"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_help_teaches():
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "utils.integer_graph", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for word in ("info", "diff", "predict", "examples:", "exit status"):
        assert word in done.stdout
