"""Quantize a network of your own in a plain PyTorch training loop: python examples/own_model.py [FILE]"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import api
from utils.data_utils import open_dataset

PREPROCESS = api.Preprocess(mean=(0.3,), std=(0.4,), resize=None, input_size=8, channels=1)
EPOCHS = 10


def data(split: str) -> tuple[Tensor, Tensor]:
    """Your images, uint8 [N, C, H, W], and labels, int64 [N]; here the digits of scikit-learn."""
    digits = open_dataset("digits", split, PREPROCESS)
    return digits.batch(np.arange(len(digits)))


def train(model: nn.Module, groups: list[dict], images: Tensor, labels: Tensor, lr: float) -> None:
    """Any loop does."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(api.normalize(images[batch], PREPROCESS)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(out: str = "own_model.safetensors") -> None:
    """Train a float network, quantize it to 4 bits, train on, convert, save, load, predict."""
    torch.manual_seed(0)
    (images, labels), (test_images, test_labels) = data("train"), data("val")
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)
    )
    train(net, [{"params": net.parameters()}], images, labels, lr=0.05)

    model = api.quantize(net, torch.zeros(1, 1, 8, 8), "uniform4", PREPROCESS)
    api.calibrate(model, api.normalize(images[:256], PREPROCESS).split(64))
    api.configure(model, act_range="lsq")  # learn the scales of weights and activations too
    train(model, api.parameter_groups(model, weight_decay=1e-4), images, labels, lr=0.01)

    api.save(api.convert(model, PREPROCESS, classes=[str(digit) for digit in range(10)]), out)
    graph = api.load(out)
    top1 = api.evaluate(graph, [(test_images, test_labels)]).top1
    print(f"integer network in {out}: top-1 {top1:.1f} %")
    print("first images:", api.predict(graph, test_images[:10]).argmax(1).tolist(), test_labels[:10].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:2])
