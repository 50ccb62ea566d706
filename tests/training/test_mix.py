"""Sources that are mixed into training: their fraction of the samples, what stays the run's own."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.config import load_config
from dalle_mini_impl.data.sample_order import SampleOrder
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.config import DataConfig
from dalle_mini_impl.training.dalle import DalleRunConfig
from dalle_mini_impl.training.run_dataset import RunRecords, load_splits
from tests.reference import tiny
from tests.training.test_run import assert_resumes_exactly


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Images of another kind, without splits: all but 5 % are for training."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number in range(40):
        tiny.render_image(number).rotate(90).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("something turned")
    return folder


@pytest.mark.parametrize("balance_by", [None, "color"])
def test_samples_come_from_each_source_in_its_fraction(
    data: Path, other: Path, tmp_path: Path, balance_by: str | None
) -> None:
    records = RunRecords(folder=tmp_path, writes=True, resumes=False)
    config = DataConfig(source=str(data), mix={str(other): 0.4})
    train, held_out = load_splits(config, pixel_size=tiny.PIXEL_SIZE, records=records)
    own, _ = load_splits(DataConfig(source=str(data)), pixel_size=tiny.PIXEL_SIZE, records=records)
    assert train.num_own == len(own.pairs) == 25
    assert train.pairs[:25] == own.pairs
    assert torch.equal(train.pixels[:25], own.pixels)
    assert {pair.captions for pair in train.pairs[25:]} == {("something turned",)}
    assert not any("turned" in text for pair in held_out.pairs for text in pair.captions)
    order = SampleOrder(
        len(train.pairs), global_batch_size=1000, seed=0, weights=train.weights(balance_by)
    )
    chosen = torch.cat([order.indices(step) for step in range(5)])
    assert (chosen >= 25).float().mean() == pytest.approx(0.4, abs=0.02)
    # Among themselves, the own images keep their weights.
    weights, alone = train.weights(balance_by), own.weights(balance_by)
    assert weights is not None
    alone = torch.ones(25) if alone is None else alone
    assert torch.allclose(weights[:25] / weights[:25].sum(), alone / alone.sum())


def mixed(config: DalleRunConfig, other: Path) -> DalleRunConfig:
    data = dataclasses.replace(config.data, mix={str(other): 0.5})
    return dataclasses.replace(config, data=data)


def test_a_mixed_run_resumes_bit_for_bit(
    data: Path, other: Path, vqvae_dir: Path, tmp_path: Path
) -> None:
    config = mixed(tiny.dalle_run(data, vqvae_dir, tmp_path / "run", ema_decay=0.9), other)
    assert_resumes_exactly(config)
    # The copy that a resume reads is of each source.
    assert (tmp_path / "run/images-mixed-1.jsonl").is_file()


def test_images_of_a_mixed_source_may_vanish(
    data: Path, other: Path, vqvae_dir: Path, tmp_path: Path
) -> None:
    config = mixed(tiny.dalle_run(data, vqvae_dir, tmp_path / "run", max_steps=3), other)
    tiny.train(config)
    (other / "7.png").unlink()
    longer = dataclasses.replace(config.training, max_steps=6)
    _, lines = tiny.train(dataclasses.replace(config, training=longer), resume="latest")
    assert any("missing images are replaced" in line for line in lines)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("{x: 1.0}", "data.mix"),
        ("{x: 0.5, y: 0.5}", "data.mix"),
        ("{x: -0.1}", "data.mix"),
        ("{source: 0.5}", "other sources"),
        ("{x: a lot}", "data.mix"),
    ],
)
def test_impossible_fractions_are_refused(mix: str, expected: str) -> None:
    options = ["--data.source", "source", "--vqvae_dir", "v", "--output_dir", "o"]
    with pytest.raises(UserError, match=expected):
        load_config(DalleRunConfig, [*options, "--data.mix", mix], description="")


def test_a_mixed_source_that_is_none_is_named(data: Path, tmp_path: Path) -> None:
    records = RunRecords(folder=tmp_path, writes=False, resumes=False)
    (tmp_path / "empty").mkdir()
    config = DataConfig(source=str(data), mix={str(tmp_path / "empty"): 0.5})
    with pytest.raises(UserError, match=r"^data\.mix: "):
        load_splits(config, pixel_size=tiny.PIXEL_SIZE, records=records)
