"""Sample order and randomness as pure functions of seed, epoch, step and rank."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_mini_impl.data.sample_order import SampleOrder, epoch_order, step_generator

sizes = st.integers(1, 40)


@given(num_samples=sizes, seed=st.integers(-5, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(num_samples))


def test_order_depends_on_seed_and_epoch_only() -> None:
    torch.manual_seed(0)
    first = epoch_order(100, seed=1, epoch=0)
    state = torch.get_rng_state()
    torch.rand(7)
    assert torch.equal(first, epoch_order(100, seed=1, epoch=0))
    torch.set_rng_state(state)
    epoch_order(100, seed=1, epoch=0, weights=torch.ones(100))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert not torch.equal(first, epoch_order(100, seed=1, epoch=1))
    assert not torch.equal(first, epoch_order(100, seed=2, epoch=0))
    # (seed 1, epoch 11) and (seed 11, epoch 1) must not fall together.
    assert not torch.equal(epoch_order(100, seed=1, epoch=11), epoch_order(100, seed=11, epoch=1))


def test_order_is_the_same_on_every_machine_and_release() -> None:
    # A stored order: a change here makes old checkpoints resume with another sample order.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [1, 7, 6, 4, 2, 0, 5, 3]
    weighted = epoch_order(6, seed=0, epoch=1, weights=torch.arange(6.0))
    assert weighted.tolist() == [5, 3, 5, 1, 4, 3]
    uniforms = torch.randint(0, 10**9, (2,), generator=step_generator(1, 2, 3))
    assert uniforms.tolist() == [1611848, 974330328]


@given(
    weights=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30), seed=st.integers(0, 99)
)
def test_weighted_epochs_hold_the_expected_counts(weights: list[float], seed: int) -> None:
    if sum(weights) < 1e-3:
        weights[0] = 1.0
    n = len(weights)
    order = epoch_order(n, seed=seed, epoch=0, weights=torch.tensor(weights))
    assert len(order) == n
    counts = torch.bincount(order, minlength=n).double()
    expected = torch.tensor(weights).double()
    expected = expected / expected.sum() * n
    assert ((counts - expected).abs() < 1 + 1e-9).all()
    assert (counts[expected == 0] == 0).all()


def test_weighted_counts_average_out_and_are_shuffled() -> None:
    weights = torch.tensor([0.2, 1.0, 2.6, 0.0, 0.7, 1.5])
    orders = torch.stack(
        [epoch_order(6, seed=3, epoch=epoch, weights=weights) for epoch in range(2000)]
    )
    mean_counts = torch.bincount(orders.flatten(), minlength=6) / 2000
    assert torch.allclose(mean_counts, weights, atol=0.05)
    # Shuffled: whatever is generated, it is as likely in the first place as in the last.
    assert abs((orders[:, 0] == 2).float().mean() - (orders[:, 5] == 2).float().mean()) < 0.07


@given(num_samples=sizes, global_batch_size=sizes, seed=st.integers(0, 9))
def test_no_sample_is_lost_or_repeated_within_an_epoch(
    num_samples: int, global_batch_size: int, seed: int
) -> None:
    order = SampleOrder(num_samples, global_batch_size=global_batch_size, seed=seed)
    num_steps = -(-3 * num_samples // global_batch_size)
    stream = torch.cat([order.indices(step) for step in range(num_steps)])
    assert len(stream) == num_steps * global_batch_size
    for epoch in range(3):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert torch.equal(part, epoch_order(num_samples, seed=seed, epoch=epoch))


@settings(max_examples=30)
@given(
    num_samples=sizes,
    global_batch_size=sizes,
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=20),
)
def test_any_step_can_be_asked_for_at_any_time(
    num_samples: int, global_batch_size: int, steps: list[int]
) -> None:
    weights = torch.arange(1.0, num_samples + 1)
    order = SampleOrder(num_samples, global_batch_size=global_batch_size, seed=0, weights=weights)
    fresh = copy.deepcopy(order)
    for step in steps:
        indices = order.indices(step)
        assert indices.shape == (global_batch_size,)
        assert torch.equal(indices, copy.deepcopy(fresh).indices(step))


def test_step_generators_are_functions_of_their_arguments() -> None:
    def uniform(*arguments: int) -> float:
        return torch.rand(1, generator=step_generator(*arguments)).item()

    arguments = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (1, 2, 3), (12, 3, 0)]
    uniforms = [uniform(*each) for each in arguments]
    assert len(set(uniforms)) == len(uniforms)
    assert uniforms == [uniform(*each) for each in arguments]
    assert uniform(0, 0, 0) == uniform(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), "shape"),
        (torch.tensor([1.0, -1.0]), "negative"),
        (torch.tensor([1.0, torch.nan]), "non-finite"),
        (torch.zeros(2), "only zero"),
    ],
)
def test_bad_weights_are_refused(weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_order(2, seed=0, epoch=0, weights=weights)
    with pytest.raises(ValueError, match=message):
        SampleOrder(2, global_batch_size=1, seed=0, weights=weights)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        SampleOrder(0, global_batch_size=1, seed=0)
    with pytest.raises(ValueError, match="global_batch_size is 0"):
        SampleOrder(1, global_batch_size=0, seed=0)
    with pytest.raises(ValueError, match="step is -1"):
        SampleOrder(1, global_batch_size=1, seed=0).indices(-1)
    with pytest.raises(ValueError, match="epoch is -1"):
        epoch_order(1, seed=0, epoch=-1)
