"""Drawings for an evaluation are the pictures that a user would get."""

import numpy as np
import pytest
import torch

from dalle_mini_impl.evaluation.drawings import draw
from dalle_mini_impl.evaluation.samples import decode, to_images
from dalle_mini_impl.sampling.rerank import caption_gain
from dalle_mini_impl.sampling.token_choice import SamplingConfig
from tests.reference import tiny


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
        alone = decode(pipeline.vqvae, drawn.first[index : index + 1])
        assert np.array_equal(np.asarray(to_images(alone)[0]), image)
        # Five at a time are summed in another order, which may round a byte to its neighbour.
        assert (pixels[index].int() - alone[0].int()).abs().max() <= 1
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
