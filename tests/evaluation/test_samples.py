"""What an evaluation reads and draws: all splits, and the pictures that a user would get."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.samples import decode, draw, read_data, to_floats, to_images
from dalle_mini_impl.sampling.rerank import caption_gain
from dalle_mini_impl.sampling.token_choice import SamplingConfig
from tests.reference import tiny


def test_all_splits_are_read_once_with_their_tokens(tmp_path: Path) -> None:
    vqvae = tiny.build_vqvae()
    folder = tiny.write_data(tmp_path / "data")
    data = read_data(str(folder), vqvae)
    assert data.kind == "pictures"
    assert (len(data.train), list(data.held_out), len(data.held_out["val"])) == (25, ["val"], 5)
    assert data.held_out["val"].rows[0]["color"] == "blue"
    with torch.no_grad():
        ids = vqvae.encode_to_token_ids(to_floats(data.train.pixels)).flatten(1)
    assert torch.equal(ids, data.train.image_token_ids)
    image = np.asarray(tiny.draw_picture(1))
    assert np.array_equal(np.asarray(to_images(data.train.pixels[1:2])[0]), image)
    assert read_data(str(folder), vqvae).fingerprint == data.fingerprint
    tiny.draw_picture(3).save(folder / "1.png")
    assert read_data(str(folder), vqvae).fingerprint != data.fingerprint


def test_training_pictures_alone_cannot_judge(tmp_path: Path) -> None:
    folder = tiny.write_data(tmp_path / "data")
    text = (folder / "metadata.jsonl").read_text().replace('"val"', '"train"')
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"data: .* has training pictures alone"):
        read_data(str(folder), tiny.build_vqvae())
    with pytest.raises(UserError, match="data: no folder or file"):
        read_data(str(tmp_path / "nothing"), tiny.build_vqvae())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_candidates_are_the_pictures_that_the_pipeline_draws(guidance_scale: float) -> None:
    pipeline = tiny.build_pipeline()
    captions = list(tiny.CAPTIONS[:5])
    settings = SamplingConfig(guidance_scale=guidance_scale)
    drawn = draw(pipeline, captions, settings=settings, num_candidates=3, seed=7)
    assert drawn.image_token_ids.shape[:2] == (5, 3)
    pixels = decode(pipeline.vqvae, drawn.first)
    for index, caption in enumerate(captions):
        image = pipeline(caption, seed=7 + index, guidance_scale=guidance_scale).images[0]
        assert np.array_equal(np.asarray(to_images(pixels[index : index + 1])[0]), image)
    text = pipeline.captions.encode(captions)
    gains = torch.stack(
        [caption_gain(pipeline.dalle, text, drawn.image_token_ids[:, k]) for k in range(3)], dim=1
    )
    # Guided drawing sums the same terms one step at a time.
    torch.testing.assert_close(drawn.gains, gains, rtol=1e-3, atol=1e-3)
    for index, best in enumerate(gains.argmax(dim=1).tolist()):
        assert torch.equal(drawn.best[index], drawn.image_token_ids[index, best])
    assert not torch.equal(drawn.best, drawn.first)
    alone = draw(pipeline, captions, settings=settings, seed=7)
    assert torch.equal(alone.first, drawn.first)
    assert torch.equal(alone.best, alone.first)
