"""Sums over images, and covariances that have an inverse."""

import torch

from utils.quantization_utils.channel_statistics import Seen


def test_sums_of_parts_are_sums() -> None:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    whole, parts = Seen.of(values, 0.5), Seen.of(values[:, :10], 0.5).with_more(Seen.of(values[:, 10:], 0.5))
    assert (whole.count, parts.count) == (40, 40)
    assert torch.equal(whole.largest, parts.largest)
    assert torch.equal(whole.clipped, parts.clipped)
    assert torch.equal(whole.clipped, (values >= 0.9999 * 0.5).sum(1))
    assert torch.allclose(whole.covariance(), parts.covariance())
    assert torch.allclose(whole.covariance(), torch.cov(values.double(), correction=0), atol=1e-5)


def test_covariance_of_fewer_values_than_channels() -> None:
    values = 10 + torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    factor = torch.linalg.cholesky(Seen.of(values, None).covariance())
    assert bool(torch.isfinite(factor).all())
