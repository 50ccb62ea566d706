"""The loss on reference images: token by token, and lower with the image's own caption."""

import math
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.evaluation.likelihood import CAPTIONS, measure_likelihood
from dalle_mini_impl.evaluation.samples import derangement, read_data
from dalle_mini_impl.models.dalle_config import PAD_TOKEN_ID
from tests.reference import tiny


def test_loss_equals_that_of_single_images(tmp_path: Path) -> None:
    """Nats per token and bits per image of every caption, against plain passes one by one."""
    pipeline = tiny.build_pipeline()
    data = read_data(str(tiny.write_data(tmp_path / "data")), pipeline.vqvae)
    splits = {"train": data.train, **data.held_out}
    section = measure_likelihood(pipeline, splits, max_samples=20, seed=0)
    chosen = data.train.subsample(20)
    text = pipeline.text_tokenizer.encode(chosen.captions)
    given = (text, torch.full_like(text, PAD_TOKEN_ID), text[derangement(20, seed=0)])
    means = []
    for what, captions in zip(CAPTIONS, given, strict=True):
        nats = []
        for row, image in zip(captions, chosen.image_token_ids, strict=True):
            with torch.no_grad():
                logits = pipeline.dalle(row[None], image[None]).image[0]
            nats.append(
                [-float(cell.log_softmax(-1)[i]) for cell, i in zip(logits, image, strict=True)]
            )
        found = section.figures["splits"]["train"][what]
        means.append(found["nats_per_token"].value)
        assert means[-1] == pytest.approx(sum(map(sum, nats)) / 20 / len(nats[0]), rel=1e-4)
        bits = sum(map(sum, nats)) / 20 / math.log(2)
        assert found["bits_per_image"].value == pytest.approx(bits, rel=1e-4)
    assert len(set(means)) == 3
    assert section.figures["by_cell"]["split"] == "val"
    cells = torch.tensor(section.figures["by_cell"]["its caption"])
    by_row = [float(row[1]) for row in section.tables[1].rows]
    assert by_row == pytest.approx(cells.mean(dim=1).tolist(), abs=6e-4)  # three digits
    mean = section.figures["splits"]["val"]["its caption"]["nats_per_token"].value
    assert float(cells.mean()) == pytest.approx(mean, rel=1e-5)
