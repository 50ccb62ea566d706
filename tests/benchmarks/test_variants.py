"""Each of our variants does its work. No peer is needed here, and nothing is timed."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import data, end_to_end, ours, sampling, tokenizer
from benchmarks.sizes import EMOJI_64, TOY, random_pairs
from benchmarks.timing import Result
from benchmarks.tokenizer import FirstStep, Learner, random_images
from dalle_mini_impl.models.dalle_config import DecoderConfig
from dalle_mini_impl.pipeline import TextToImagePipeline
from tests.reference import tiny


def test_sizes_are_those_of_the_comparison() -> None:
    text, image = random_pairs(TOY)
    assert text.min() >= 1, "a pad among the captions would spare our side work"
    assert text.shape == (TOY.batch, TOY.text_length)
    assert image.shape == (TOY.batch, TOY.image_length)
    config = TextToImagePipeline.from_pretrained(sampling.MODEL).dalle.config
    size = EMOJI_64
    assert ours.build_decoder(size).config.sequence_length == config.sequence_length == size.length
    assert (size.vocab, size.codebook) == (config.vocab_size, config.codebook_size)
    decoder = config.decoder
    widths = (decoder.hidden_size, decoder.num_layers, decoder.num_heads)
    assert (size.width, size.layers, size.heads) == widths


def test_our_decoder_trains() -> None:
    job = ours.decoder_training(TOY, "float32")
    assert job.items == TOY.tokens
    # At least six operations per weight of the blocks and token that goes through them.
    blocks = ours.build_decoder(TOY).blocks.parameters()
    assert job.flops > 6 * sum(w.numel() for w in blocks if w.ndim == 2) * TOY.tokens
    job.run()


def test_our_decoder_generates() -> None:
    prepare = ours.decoder_sampler(TOY, "float32")
    plain, guided = (prepare(batch=2, guided=guided) for guided in (False, True))
    assert guided.flops == 2 * plain.flops
    for job in (plain, guided):
        assert job.run().image_token_ids.shape == (2, TOY.image_length)  # type: ignore[attr-defined]


def test_cache_dependent_sampling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours.build_decoder(TOY, random_heads=True).eval()
    ours.require_cache_is_exact(model, TOY, tolerated_nats=1e-3)
    right = type(model).decode_window

    def forgetful(self, image_token_ids, cache, **steps):
        return right(self, image_token_ids * 0, cache, **steps)

    monkeypatch.setattr(type(model), "decode_window", forgetful)
    with pytest.raises(ValueError, match="cached and uncached generation differ"):
        ours.require_cache_is_exact(model, TOY, tolerated_nats=1e-3)


def test_jacobi_needs_fewer_passes_for_the_same_images() -> None:
    pipeline = tiny.build_pipeline()
    many = sampling.trained_job(pipeline, guided=True)
    single = sampling.trained_job(pipeline, guided=True, window=1)
    assert many.items == single.items == len(sampling.PROMPTS)
    generated = [tokens for tokens, _ in many.run()]  # type: ignore[attr-defined]
    expected = [tokens for tokens, _ in single.run()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, generated, expected))
    assert single.note == f"{pipeline.dalle.config.image_length:.1f} passes an image"
    assert float(many.note.split()[0]) < float(single.note.split()[0])


@pytest.mark.parametrize("work", tokenizer.WORKS)
def test_our_tokenizer_works(work: tokenizer.Work) -> None:
    job = tokenizer.own_job(work, random_images(2, 32), "float32")
    assert job.flops > 0
    job.run()


def test_gumbel_quantizer_trains_between_given_networks() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Conv2d(3, 16, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)
    parts = (encoder, decoder, torch.randn(16, 8), random_images(256, 16), "float32")
    assert tokenizer.gumbel_training(*parts).items == 256  # type: ignore[arg-type]
    for wrong in (FirstStep(99.0, 1.0), FirstStep(1.0, 99.0)):
        with pytest.raises(ValueError, match=f"the peer's {re.escape(str(wrong))}"):
            tokenizer.gumbel_training(*parts, peer_first_step=wrong)  # type: ignore[arg-type]
    assert FirstStep(1.0, 2.0).is_like(FirstStep(1.04, 2.3))


def test_lookup_finds_the_nearest_codes() -> None:
    vectors, codebook = torch.randn(50, 8), nn.functional.normalize(torch.randn(20, 8), dim=1)
    found = tokenizer.lookup_job(tokenizer.own_lookup, vectors, codebook).run()
    assert torch.equal(found, (vectors @ codebook.T).argmax(dim=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of the codes are the nearest"):
        tokenizer.lookup_job(lambda *_: lambda: torch.zeros(50).long(), vectors, codebook)


def test_quality_is_the_mean_psnr_of_images() -> None:
    images = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    far = torch.tensor([0.2, 0.02, 0.002]).view(3, 1, 1, 1)
    found = tokenizer.mean_psnr(lambda pixels: pixels + far, images)
    assert found == pytest.approx((20 + 40 + 60) / 3, abs=1e-3)  # 0.2 of [-1, 1] is 0.1 of [0, 1]


def test_learners_take_turns_until_the_goal_or_six_times_our_time() -> None:
    turns: list[str] = []

    def learn_at_last(pixels: torch.Tensor) -> torch.Tensor:
        turns.append("measured")
        return pixels if turns.count("measured") > 2 else torch.zeros_like(pixels)

    rows = [Result(work="w", variant=str(own), is_ours=own, unit="s") for own in (True, False)]
    own = Learner(lambda: turns.append("ours"), learn_at_last, rows[0])
    peer = Learner(lambda: turns.append("peer"), torch.zeros_like, rows[1])
    turns.clear()
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    tokenizer.take_turns([own, peer], images, goal=22.0, seconds=0.0001)
    assert len(own.result.costs) == 1
    assert not peer.result.costs
    assert peer.result.failure.startswith("more than")
    assert turns.index("peer") < len(turns) - 1 - turns[::-1].index("ours")  # in turns


def test_our_tokenizer_learns_to_a_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "QUALITY_STEPS", 40)
    train = data.to_bytes(random_images(32, 16))
    step, reconstruct = tokenizer.own_learning(train)
    before = tokenizer.mean_psnr(reconstruct, train)
    for _ in range(40):
        step()
    assert tokenizer.mean_psnr(reconstruct, train) > before + 2


def test_all_readers_read_every_image(tmp_path: Path) -> None:
    data.write_images(tmp_path, 5, side=32)
    assert data.read_as_ours(tmp_path, 16) == data.read_as_peer(tmp_path, 0) == 5
    assert data.decode_only(tmp_path) == 5
    pixels = data.DallePytorchFolder(tmp_path, side=16)[0]
    assert pixels.shape == (3, 16, 16)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert (tmp_path / "3.txt").read_text() != (tmp_path / "4.txt").read_text()


def test_whole_training_reads_tokenizes_and_trains(tmp_path: Path) -> None:
    data.write_images(tmp_path / "images", 6, side=32)
    run = end_to_end.TOY_RUN
    job = end_to_end.own_training(tmp_path / "images", run, epochs=2)
    assert job.items == 2 * run.batch
    job.run()
    matched = end_to_end.matched_run(end_to_end.TOY_VAE, end_to_end.TOY_DALLE, batch=4)
    assert (matched.vqvae.image_grid_size, matched.vqvae.codebook_size) == ((4, 4), 64)


def test_written_model_generates(tmp_path: Path) -> None:
    end_to_end.write_model(tmp_path, DecoderConfig(hidden_size=32, num_layers=1, num_heads=2))
    generated = TextToImagePipeline.from_pretrained(tmp_path)("red heart")
    assert generated.images[0].size == (64, 64)


def test_a_program_that_numbers_its_files_can_be_timed_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import os, sys; open(f'{sys.argv[1]}/{len(os.listdir(sys.argv[1]))}', 'w').close()"
    command = [sys.executable, "-c", code, str(out)]
    end_to_end.process_job(command, output=out / "0").run()
    with pytest.raises(ValueError, match="exit code 0"):
        end_to_end.process_job(command, output=out / "1")
