"""Which float32 product a run takes."""

from collections.abc import Iterator

import pytest
import torch

from dalle_mini_impl import hardware


@pytest.fixture(autouse=True)
def _product_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("is_amd", [False, True])
def test_products_stay_float32(is_amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_is_made_by_amd", lambda: is_amd)
    hardware.use_fast_float32()
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    assert ((left @ right).double() - exact).abs().max() / exact.abs().max() < 1e-5


def test_medium_only_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "medium_is_float32", lambda: True)
    for is_amd, expected in ((True, "medium"), (False, "highest")):
        monkeypatch.setattr(hardware, "_is_made_by_amd", lambda is_amd=is_amd: is_amd)
        hardware.use_fast_float32()
        assert torch.get_float32_matmul_precision() == expected


def test_medium_is_float32_restores_the_precision() -> None:
    torch.set_float32_matmul_precision("highest")
    hardware.medium_is_float32()
    assert torch.get_float32_matmul_precision() == "highest"
