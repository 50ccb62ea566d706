"""Optimizers against their papers' formulas, their state in checkpoints, and averaged weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.training.checkpoint import load_checkpoint, save_checkpoint
from dalle_mini_impl.training.ema import MovingAverage
from dalle_mini_impl.training.muon import Muon
from dalle_mini_impl.training.optimizer import (
    build_optimizers,
    flatten_optimizer_state,
    restore_optimizer_state,
)

OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def names_of(model: nn.Module, parameters: list[Tensor]) -> set[str]:
    expected = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in expected}


def test_only_matrices_decay(build_dalle: Callable[..., Dalle]) -> None:
    model = build_dalle()
    (adamw,) = build_optimizers(model, kind="adamw", **OPTIONS)
    decaying, others = adamw.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {group["initial_lr"] for group in adamw.param_groups} == {0.01}
    all_weights = dict(model.named_parameters())
    matrices = {n for n, w in all_weights.items() if n.startswith("blocks.") and w.ndim == 2}
    assert matrices
    assert names_of(model, decaying["params"]) == matrices | {"text_head.weight"}
    everything = decaying["params"] + others["params"]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))


def test_muon_trains_hidden_matrices_only(build_dalle: Callable[..., Dalle]) -> None:
    model = build_dalle()
    adamw, muon = build_optimizers(model, kind="muon", **OPTIONS)
    hidden = [parameter for group in muon.param_groups for parameter in group["params"]]
    assert hidden
    assert all(name.startswith("blocks.") for name in names_of(model, hidden))
    assert all(parameter.ndim == 2 for parameter in hidden)
    rest = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert names_of(model, hidden) | names_of(model, rest) == set(dict(model.named_parameters()))
    assert not names_of(model, hidden) & names_of(model, rest)
    assert {group["initial_lr"] for group in muon.param_groups} == {0.01}


def test_muon_trains_convolutions_between_features() -> None:
    """Not those that read colors or write codes: too few channels for a direction of their own."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 4), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 4, 1), nn.Conv2d(32, 48, 1)
    )
    _, muon = build_optimizers(model, kind="muon", **OPTIONS)
    (group,) = muon.param_groups
    assert names_of(model, group["params"]) == {"1.weight", "3.weight"}


def test_muon_takes_a_kernel_as_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, 6, 3, 3, generator=generator)
    kernel = nn.Parameter(start.clone(memory_format=torch.channels_last))
    matrix = nn.Parameter(start.flatten(1).clone())
    optimizers = [Muon([weight], lr=0.02, weight_decay=0.1) for weight in (kernel, matrix)]
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=generator)
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())
    assert float((matrix - start.flatten(1)).detach().norm()) > 0.1


def test_adamw_follows_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2)
    weights = [model.weight.detach().double(), model.bias.detach().double()]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    (optimizer,) = build_optimizers(model, kind="adamw", **OPTIONS)
    for step in range(1, 5):
        for index, parameter in enumerate((model.weight, model.bias)):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            first, second = moments[index]
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            moments[index] = (first, second)
            decay = 0.1 if index == 0 else 0.0
            unbiased = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            weights[index] = weights[index] * (1 - 0.01 * decay) - 0.01 * unbiased
        optimizer.step()
    torch.testing.assert_close(model.weight.double(), weights[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.bias.double(), weights[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_muon_updates_like_torchs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    results = []
    for build in (
        lambda w: Muon([w], lr=0.02, weight_decay=0.1),
        lambda w: torch.optim.Muon([w], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ):
        weight = nn.Parameter(start.clone())
        optimizer = build(weight)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        results.append(weight.detach() - start)
    ours, theirs = results
    # torch's iterates in bf16, with 8 bits of precision.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_restored_moments_have_the_layout_of_weights() -> None:
    """Fused AdamW on a CPU would pair the wrong elements without a word."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, 3, 3, generator=generator) for _ in range(4)]
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = model.weight.detach().clone()

    def steps(optimizer: torch.optim.Optimizer, some: list[Tensor]) -> None:
        for gradient in some:
            model.weight.grad = gradient.to(memory_format=torch.channels_last)
            optimizer.step()

    (straight,) = build_optimizers(model, kind="adamw", **OPTIONS)
    steps(straight, gradients)
    expected = model.weight.detach().clone()

    model.weight.data.copy_(start)
    (first,) = build_optimizers(model, kind="adamw", **OPTIONS)
    steps(first, gradients[:2])
    tensors, rest = flatten_optimizer_state(first)
    as_in_a_file = {name: value.contiguous() for name, value in tensors.items()}
    (second,) = build_optimizers(model, kind="adamw", **OPTIONS)
    restore_optimizer_state(second, as_in_a_file, rest)
    assert second.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    steps(second, gradients[2:])
    assert torch.equal(model.weight, expected)


def adamw(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups: list[Any] = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:]}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "adamw foreach": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "adamw amsgrad": lambda weights: torch.optim.AdamW(weights, lr=0.01, amsgrad=True),
    "adamw tensor lr": lambda weights: torch.optim.AdamW(weights, lr=torch.tensor(0.01)),
    "adamw named": lambda weights: torch.optim.AdamW(zip("ab", weights, strict=True)),
    "muon": lambda weights: torch.optim.Muon(weights, lr=0.01, adjust_lr_fn="match_rms_adamw"),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
}


def make_weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(2)]


def train(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(6, 4, generator=generator)
        for group in optimizer.param_groups:  # a function of the step, as in the trainer
            if not isinstance(group["lr"], Tensor):
                group["lr"] = 0.01 * 0.9**step
        optimizer.step()


def assert_same_tree(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert got.dtype == expected.dtype
        assert got.device == expected.device
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same_tree(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for got_item, expected_item in zip(got, expected, strict=True):
            assert_same_tree(got_item, expected_item)
    else:
        assert got == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_and_a_resume_equal_six_steps(tmp_path: Path, name: str) -> None:
    straight = make_weights()
    optimizer = OPTIMIZERS[name](straight)
    train(straight, optimizer, range(6))

    weights = make_weights()
    first = OPTIMIZERS[name](weights)
    train(weights, first, range(3))
    tensors, meta = flatten_optimizer_state(first)
    model = {str(index): weight for index, weight in enumerate(weights)}
    groups = {"model": model, "optimizer": tensors}
    path = save_checkpoint(tmp_path, 3, tensors=groups, state={"optimizer": meta})
    loaded = load_checkpoint(path)
    resumed = [nn.Parameter(loaded.tensors["model"][str(index)].clone()) for index in range(2)]
    second = OPTIMIZERS[name](resumed)
    restore_optimizer_state(second, loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert_same_tree(second.state_dict()["state"], first.state_dict()["state"])
    before = {key: value.clone() for key, value in loaded.tensors["optimizer"].items()}
    train(resumed, second, range(3, 6))

    for got, expected in zip(resumed, straight, strict=True):
        assert torch.equal(got, expected)
    assert_same_tree(second.state_dict(), optimizer.state_dict())
    assert_same_tree(loaded.tensors["optimizer"], before)  # training did not write into it


def test_optimizer_state_keeps_its_dtype() -> None:
    def make() -> torch.optim.Optimizer:
        return torch.optim.AdamW([nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))])

    optimizer = make()
    parameter = optimizer.param_groups[0]["params"][0]
    moments = torch.full((3, 2), 1 / 3)
    optimizer.state[parameter] = {
        "step": torch.tensor(7.0),
        "exp_avg": moments,
        "exp_avg_sq": moments.double(),
        "history": [moments, (2, None)],
    }
    other = make()
    restore_optimizer_state(other, *flatten_optimizer_state(optimizer))
    assert_same_tree(other.state_dict(), optimizer.state_dict())


def test_names_of_flattened_tensors() -> None:
    weights = make_weights()
    optimizer = adamw(weights)
    train(weights, optimizer, range(1))
    tensors, meta = flatten_optimizer_state(optimizer)
    assert {"state.0.exp_avg", "state.1.step"} <= tensors.keys()
    assert json.loads(json.dumps(meta)) == meta


def test_state_of_other_parameters_is_a_user_error() -> None:
    weights = make_weights()
    optimizer = OPTIMIZERS["muon"](weights)
    train(weights, optimizer, range(1))
    tensors, meta = flatten_optimizer_state(optimizer)
    with pytest.raises(UserError, match="optimizer state: does not fit"):
        restore_optimizer_state(OPTIMIZERS["muon"](weights[:1]), tensors, meta)
    tensors.popitem()
    with pytest.raises(UserError, match="optimizer state: does not fit"):
        restore_optimizer_state(OPTIMIZERS["muon"](weights), tensors, meta)
    optimizer.state[weights[0]]["odd"] = object()
    with pytest.raises(ValueError, match=r"state\.0\.odd: got a object"):
        flatten_optimizer_state(optimizer)


def test_the_average_follows_its_formula() -> None:
    model = nn.BatchNorm1d(2)  # with buffers, which are not averaged
    average = MovingAverage(model, decay=0.9)
    expected = model.weight.detach().double()
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(torch.tensor([1.0, -2.0]))
            model.num_batches_tracked.add_(3)  # type: ignore[operator]
            model.running_mean.add_(1.0)  # type: ignore[union-attr, operator]
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        average.update(model, step=step)
    torch.testing.assert_close(average.weights["weight"].double(), expected, atol=1e-5, rtol=0)
    assert average.weights["num_batches_tracked"] == 36
    assert average.weights["running_mean"].tolist() == [12.0, 12.0]

    trained = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in average.weights.items()}
    average.swap(model)
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
    average.swap(model)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in average.weights.items())

    other = MovingAverage(nn.BatchNorm1d(2), decay=0.9)
    other.load(averaged)
    averaged["weight"].add_(1)  # a copy was taken
    assert torch.equal(other.weights["weight"], average.weights["weight"])
    with pytest.raises(KeyError):
        other.load({})
