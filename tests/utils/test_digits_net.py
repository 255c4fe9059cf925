"""The network for the digits: shapes, size, and that it learns."""

import torch
import torch.nn.functional as F

from utils.data_utils import make_loader, normalize, open_dataset
from utils.digits_net import DIGITS_PREPROCESS, DigitsNet
from utils.metrics import topk_correct


def test_shapes_and_parameters() -> None:
    model = DigitsNet(num_classes=7)
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 7)
    convolutions = 32 * 9 + 2 * 32 * 32 * 9 + 48 * 32 * 9
    batch_norms = 2 * (3 * 32 + 48)
    assert sum(p.numel() for p in DigitsNet().parameters()) == convolutions + batch_norms + 48 * 10 + 10


def test_five_epochs_teach_it_most_digits() -> None:
    torch.manual_seed(0)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = make_loader(open_dataset("digits", "train", DIGITS_PREPROCESS, augment=True), 64, train=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * len(loader))
    for epoch in range(5):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(normalize(images, DIGITS_PREPROCESS)), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    images, labels = next(iter(make_loader(open_dataset("digits", "val", DIGITS_PREPROCESS), 360, train=False)))
    with torch.no_grad():
        (correct,) = topk_correct(model(normalize(images, DIGITS_PREPROCESS)), labels, (1,))
    assert correct > 0.9 * 360
