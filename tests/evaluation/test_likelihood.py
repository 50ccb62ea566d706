"""The loss on true images: position by position, and lower with the right caption."""

import math

import pytest
import torch

from dalle_mini_impl.evaluation.likelihood import (
    CAPTIONS,
    image_token_nats,
    measure_likelihood,
    shuffled,
)
from dalle_mini_impl.evaluation.samples import Samples, read_data
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from tests.reference import tiny


@pytest.mark.parametrize("count", [2, 3, 50])
def test_every_place_gets_another_one(count: int) -> None:
    order = shuffled(count, seed=1)
    assert sorted(order.tolist()) == list(range(count))
    assert not (order == torch.arange(count)).any()
    assert count < 50 or order.tolist() != shuffled(count, seed=2).tolist()


def test_nats_equal_single_image_evaluation() -> None:
    pipeline = tiny.build_pipeline()
    generator = torch.Generator().manual_seed(0)
    length, codes = pipeline.dalle.config.image_length, pipeline.dalle.config.codebook_size
    image = torch.randint(codes, (20, length), generator=generator)
    text = pipeline.text_tokenizer.encode([tiny.CAPTIONS[i % 12] for i in range(20)])
    found = image_token_nats(pipeline.dalle, text, image)
    for row in range(20):
        with torch.no_grad():
            logits = pipeline.dalle(text[row : row + 1], image[row : row + 1]).image[0]
        expected = [-float(logits[at].log_softmax(-1)[image[row, at]]) for at in range(length)]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4)  # float32


def test_the_section_says_what_each_caption_is_worth(tmp_path: object) -> None:
    data_dir = tiny.write_data(tmp_path / "data")  # type: ignore[operator]
    pipeline = tiny.build_pipeline()
    data = read_data(str(data_dir), pipeline.vqvae)
    splits = {"train": data.train, **data.held_out}
    section = measure_likelihood(pipeline, splits, max_samples=10, seed=0)
    chosen: Samples = data.train.spread(10)
    text = pipeline.text_tokenizer.encode(chosen.captions)
    given = (text, torch.full_like(text, PAD_TOKEN_ID), text[shuffled(10, seed=0)])
    means = []
    for what, captions in zip(CAPTIONS, given, strict=True):
        nats = image_token_nats(pipeline.dalle, captions, chosen.image_token_ids)
        found = section.figures["splits"]["train"][what]
        means.append(found["nats_per_token"].value)
        assert means[-1] == pytest.approx(float(nats.mean()), rel=1e-5)
        bits = float(nats.sum(dim=1).mean()) / math.log(2)
        assert found["bits_per_image"].value == pytest.approx(bits, rel=1e-5)
    assert len(set(means)) == 3
    assert section.figures["by_cell"]["split"] == "val"
    by_row = section.tables[1].rows
    cells = torch.tensor(section.figures["by_cell"]["its caption"])
    assert [float(row[1]) for row in by_row] == pytest.approx(
        cells.mean(dim=1).tolist(), abs=6e-4
    )  # printed with three digits
