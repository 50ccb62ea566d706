"""The other rounding that tests can be run with: small, repeatable, and another one per shape."""

import torch
from torch.nn import functional as F

from tests.reference.other_rounding import OtherRounding


def test_the_other_rounding_moves_last_digits_by_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(8, 8, generator=generator) for _ in range(2))
    weight.requires_grad_()
    plain = F.linear(rows, weight)
    (plain_gradient,) = torch.autograd.grad(plain.square().sum(), weight)
    with OtherRounding(1):
        moved, again = F.linear(rows, weight), F.linear(rows, weight)
        alone = torch.cat([F.linear(row[None], weight) for row in rows])
        (gradient,) = torch.autograd.grad(moved.square().sum(), weight)
    with OtherRounding(2):
        other = F.linear(rows, weight)
    assert torch.equal(moved, again)
    for one in (plain, alone, other):
        assert not torch.equal(moved, one)
        torch.testing.assert_close(moved, one, rtol=1e-5, atol=1e-6)  # a few last digits
    assert not torch.equal(gradient, plain_gradient)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-4)
    assert torch.equal(F.linear(rows, weight), plain)
