"""The images of an evaluation: read with their tokens, and generated as a user would get them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.evaluation.samples import (
    CandidateTokens,
    decode,
    derangement,
    generate_candidates,
    read_data,
    to_images,
)
from dalle_mini_impl.pipeline import Rank, TextToImagePipeline
from dalle_mini_impl.sampling.likelihood import log_likelihood_ratio
from dalle_mini_impl.sampling.sampler import SamplingConfig
from tests.reference import tiny

CAPTIONS = list(tiny.CAPTIONS[:5])


def test_all_splits_are_read_with_their_tokens(tmp_path: Path) -> None:
    vqvae = tiny.build_vqvae()
    folder = tiny.write_data(tmp_path / "data")
    data = read_data(str(folder), vqvae)
    assert data.kind == "images"
    assert (len(data.train), list(data.held_out), len(data.held_out["val"])) == (25, ["val"], 5)
    assert data.held_out["val"].rows[0]["color"] == "blue"
    with torch.no_grad():
        ids = vqvae.encode_to_token_ids(bytes_to_pixels(data.train.pixels)).flatten(1)
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
    with pytest.raises(UserError, match=r"data: .* has only training images"):
        read_data(str(folder), tiny.build_vqvae())
    with pytest.raises(UserError, match="data: no folder or file"):
        read_data(str(tmp_path / "nothing"), tiny.build_vqvae())


@pytest.mark.parametrize("count", [2, 3, 50])
def test_derangement_moves_every_index(count: int) -> None:
    order = derangement(count, seed=1)
    assert sorted(order.tolist()) == list(range(count))
    assert not (order == torch.arange(count)).any()
    assert count < 50 or order.tolist() != derangement(count, seed=2).tolist()


def generate(
    pipeline: TextToImagePipeline,
    captions: list[str],
    num_candidates: int,
    *,
    guidance_scale: float = 1.0,
    rank: Rank = "likelihood",
) -> CandidateTokens:
    config = SamplingConfig(guidance_scale=guidance_scale)
    return generate_candidates(
        pipeline,
        captions,
        sampling_config=config,
        num_candidates=num_candidates,
        seed=7,
        rank=rank,
    )


def assert_same_image(pipeline: TextToImagePipeline, ids: torch.Tensor, image: object) -> None:
    [own] = to_images(decode(pipeline.vqvae, ids[None]))
    # One level of 255: the pipeline decodes images one by one, and another batch rounds otherwise.
    assert np.abs(np.asarray(own, dtype=int) - np.asarray(image, dtype=int)).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_candidates_equal_pipeline_images(guidance_scale: float) -> None:
    pipeline = tiny.build_pipeline()
    generated = generate(pipeline, CAPTIONS, 3, guidance_scale=guidance_scale)
    assert generated.image_token_ids.shape[:2] == (5, 3)
    for index, caption in enumerate(CAPTIONS):
        image = pipeline(caption, seed=7 + index, guidance_scale=guidance_scale).images[0]
        assert_same_image(pipeline, generated.first[index], image)
    text = pipeline.text_tokenizer.encode(CAPTIONS)
    ratios = [
        log_likelihood_ratio(pipeline.dalle, text, generated.image_token_ids[:, k])
        for k in range(3)
    ]
    expected = torch.stack(ratios, dim=1)
    # Guided generation sums the same terms one step at a time.
    torch.testing.assert_close(generated.scores, expected, rtol=1e-3, atol=1e-3)
    for index, best in enumerate(expected.argmax(dim=1).tolist()):
        assert torch.equal(generated.best[index], generated.image_token_ids[index, best])
    assert not torch.equal(generated.best, generated.first)
    alone = generate(pipeline, CAPTIONS, 1, guidance_scale=guidance_scale)
    assert torch.equal(alone.first, generated.first)
    assert torch.equal(alone.best, alone.first)


def test_best_candidate_is_that_of_the_ranker() -> None:
    pipeline, clip = tiny.build_pipeline(), tiny.build_ranker()
    picks = []
    for caption in CAPTIONS:
        for rank in ("likelihood", clip):
            generated = generate(pipeline, [caption], 4, rank=rank)
            output = pipeline(caption, num_candidates=4, seed=7, rank=rank, guidance_scale=1.0)
            assert_same_image(pipeline, generated.best[0], output.images[0])
            assert float(generated.scores.max()) == pytest.approx(output.scores[0], abs=1e-3)
            picks.append(int(generated.scores.argmax()))
    assert picks[::2] != picks[1::2], "the rankers differ"
    first = generate(pipeline, CAPTIONS, 4, rank="none")
    assert first.scores.shape == (5, 1)
    assert torch.equal(first.best, generate(pipeline, CAPTIONS, 1).first)
