"""CandidateTokens for an evaluation are the images that a user would get."""

import numpy as np
import pytest
import torch

from dalle_mini_impl.evaluation.samples import decode, generate_candidates, to_images
from dalle_mini_impl.sampling.likelihood import log_likelihood_ratio
from dalle_mini_impl.sampling.sampler import SamplingConfig
from tests.reference import tiny


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_candidates_equal_pipeline_images(guidance_scale: float) -> None:
    pipeline = tiny.build_pipeline()
    captions = list(tiny.CAPTIONS[:5])
    sampling_config = SamplingConfig(guidance_scale=guidance_scale)
    generated = generate_candidates(
        pipeline, captions, sampling_config=sampling_config, num_candidates=3, seed=7
    )
    assert generated.image_token_ids.shape[:2] == (5, 3)
    pixels = decode(pipeline.vqvae, generated.first)
    for index, caption in enumerate(captions):
        image = pipeline(caption, seed=7 + index, guidance_scale=guidance_scale).images[0]
        assert np.array_equal(np.asarray(to_images(pixels[index : index + 1])[0]), image)
    text = pipeline.text_tokenizer.encode(captions)
    log_likelihood_ratios = torch.stack(
        [
            log_likelihood_ratio(pipeline.dalle, text, generated.image_token_ids[:, k])
            for k in range(3)
        ],
        dim=1,
    )
    # Guided generation sums the same terms one step at a time.
    torch.testing.assert_close(
        generated.log_likelihood_ratios, log_likelihood_ratios, rtol=1e-3, atol=1e-3
    )
    for index, best in enumerate(log_likelihood_ratios.argmax(dim=1).tolist()):
        assert torch.equal(generated.best[index], generated.image_token_ids[index, best])
    assert not torch.equal(generated.best, generated.first)
    alone = generate_candidates(pipeline, captions, sampling_config=sampling_config, seed=7)
    assert torch.equal(alone.first, generated.first)
    assert torch.equal(alone.best, alone.first)
