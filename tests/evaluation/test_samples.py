"""What an evaluation reads: all splits, with their tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.samples import read_data, to_floats, to_images
from tests.reference import tiny


def test_all_splits_are_read_once_with_their_tokens(tmp_path: Path) -> None:
    vqvae = tiny.build_vqvae()
    folder = tiny.write_data(tmp_path / "data")
    data = read_data(str(folder), vqvae)
    assert data.kind == "images"
    assert (len(data.train), list(data.held_out), len(data.held_out["val"])) == (25, ["val"], 5)
    assert data.held_out["val"].rows[0]["color"] == "blue"
    with torch.no_grad():
        ids = vqvae.encode_to_token_ids(to_floats(data.train.pixels)).flatten(1)
    assert torch.equal(ids, data.train.image_token_ids)
    image = np.asarray(tiny.render_image(1))
    assert np.array_equal(np.asarray(to_images(data.train.pixels[1:2])[0]), image)
    assert read_data(str(folder), vqvae).fingerprint == data.fingerprint
    tiny.render_image(3).save(folder / "1.png")
    assert read_data(str(folder), vqvae).fingerprint != data.fingerprint


def test_evaluation_needs_held_out_images(tmp_path: Path) -> None:
    folder = tiny.write_data(tmp_path / "data")
    text = (folder / "metadata.jsonl").read_text().replace('"val"', '"train"')
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"data: .* has training images alone"):
        read_data(str(folder), tiny.build_vqvae())
    with pytest.raises(UserError, match="data: no folder or file"):
        read_data(str(tmp_path / "nothing"), tiny.build_vqvae())
