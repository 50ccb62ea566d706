"""The loss of next tokens is torch's, and so is its gradient."""

import pytest
import torch
from torch.nn import functional as F

from dalle_mini_impl.training.cross_entropy import token_nats


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_is_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(12, 9, generator=generator)).to(dtype)
    token_ids = torch.randint(9, (12,), generator=generator)
    weights = torch.rand(12, generator=generator)
    gradients = []
    nats = []
    for loss in (token_nats, lambda *given: F.cross_entropy(*given, reduction="none")):
        leaf = logits.clone().requires_grad_()
        rows = loss(leaf, token_ids) if loss is token_nats else loss(leaf.float(), token_ids)
        (rows * weights).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        nats.append(rows.detach())
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(nats[0], nats[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], atol=tolerance, rtol=tolerance)


def test_its_gradient_is_that_of_finite_differences() -> None:
    """Of a sum of rows with unequal weights, in float64's stead with a wide step."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    token_ids, weights = torch.tensor([0, 4, 2]), torch.tensor([1.0, -2.0, 0.5])
    (token_nats(logits, token_ids) * weights).sum().backward()
    assert logits.grad is not None
    step = 1e-2
    for row, column in ((0, 0), (1, 3), (1, 4), (2, 2)):
        moved = [logits.detach().clone() for _ in range(2)]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        up, down = ((token_nats(each, token_ids) * weights).sum() for each in moved)
        expected = float((up - down) / (2 * step))
        assert float(logits.grad[row, column]) == pytest.approx(expected, abs=1e-3)


def test_what_it_kept_is_used_up() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    loss = token_nats(logits, torch.tensor([0, 1, 2])).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
