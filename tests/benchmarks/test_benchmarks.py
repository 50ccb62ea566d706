"""The benchmarks measure what they say. No peer is needed here, and nothing is timed."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.settings import BenchmarkConfig
from torch import nn

import benchmarks.__main__
from benchmarks import ours, ours_pictures, peers, quality, shipped, timing
from benchmarks.ceilings import attention_flops, count_flops, fraction_of_ceiling, measure_ceilings
from benchmarks.data import DallePytorchFolder, decode_only, read_as_peer
from benchmarks.images import write_images
from benchmarks.parts import PARTS, choose_parts
from benchmarks.report import number, render
from benchmarks.sizes import MEDIUM, TOY, random_pairs
from benchmarks.startup import process_job
from benchmarks.timing import Job, NotMeasuredError, Result, Variant, interleave
from benchmarks.tokenizer import random_images
from dalle_mini_impl.pipeline import TextToImagePipeline
from tests.reference import tiny

CEILINGS = {"float32": 100.0, "bfloat16": 400.0, "memory": 10.0}


@pytest.fixture(autouse=True)
def quick_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call per timed block: none warms up, and none is measured again."""
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "LONGEST_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def same_flags():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def contest(*variants: Variant, rounds: int = 4, unit: str = "images/s") -> list[Result]:
    return interleave("work", variants, unit=unit, rounds=rounds, show=lambda line: None)


def test_rounds_interleave_and_everyone_goes_first() -> None:
    calls: list[str] = []
    rows = [
        Variant(name=name, build=lambda name=name: Job(run=lambda: calls.append(name)))
        for name in "abc"
    ]
    results = contest(*rows, rounds=6)
    rounds = [calls[start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}
    assert [len(result.costs) for result in results] == [6, 6, 6]


def test_costs_are_per_item_and_medians_are_middle_values() -> None:
    assert timing.median([5.0, 1.0, 3.0]) == 3.0
    assert timing.median([4.0, 1.0]) == 2.5
    one, four = contest(
        Variant(name="one", build=lambda: Job(run=lambda: time.sleep(0.05))),
        Variant(name="four", build=lambda: Job(run=lambda: time.sleep(0.05), items=4, flops=8)),
    )
    assert four.flops == 2.0
    # A sleep never ends early: 0.05 s for one item, and for four far less than half of it each.
    assert min(one.costs) >= 0.05
    assert 0.0125 <= min(four.costs) < 0.025
    assert all(load is None or load >= 0 for load in one.others)


def sum_up() -> int:
    return sum(range(1000))


def test_failed_variant_is_reported_and_others_run() -> None:
    def broken() -> Job:
        raise RuntimeError("no such\noperator")

    def missing() -> Job:
        raise NotMeasuredError("not installed")

    def late() -> None:
        raise ValueError("too late")

    results = contest(
        Variant(name="broken", build=broken),
        Variant(name="missing", build=missing),
        Variant(name="late", build=lambda: Job(run=late)),
        Variant(name="fine", build=lambda: Job(run=sum_up), rounds=1),
    )
    assert [result.failure for result in results] == [
        "failed: RuntimeError: no such operator",
        "not measured: not installed",
        "failed: ValueError: too late",
        "",
    ]
    assert [len(result.costs) for result in results] == [0, 0, 0, 1]
    text = render(results, CEILINGS, {})
    assert "| broken | failed: RuntimeError: no such operator |" in text


def test_each_variant_runs_with_its_own_matrix_products() -> None:
    seen: list[str] = []

    def build() -> Job:
        seen.append(torch.get_float32_matmul_precision())
        return Job(run=lambda: seen.append(torch.get_float32_matmul_precision()))

    names = ("highest", "high")
    contest(*(Variant(name=name, build=build, matmul=name) for name in names), rounds=2)
    assert seen == ["highest", "high", "highest", "high", "high", "highest"]


@pytest.mark.parametrize("losses", [[2.0, 2.0], [2.0, float("nan")], [float("inf"), 1.0]])
def test_training_that_does_not_train_is_refused(losses: list[float]) -> None:
    timing.require_falling([3.0, 3.5, 2.9])
    with pytest.raises(ValueError, match="the loss does not fall"):
        timing.require_falling(losses)


def test_ceilings_and_fraction_of_the_tighter_one() -> None:
    assert all(rate > 0 for rate in measure_ceilings(side=64).values())
    result = Result(work="w", variant="c", is_ours=True, unit="s", costs=[2.0], flops=100.0)
    assert fraction_of_ceiling(result, CEILINGS) == 0.5  # 1 s of arithmetic in 2 s
    result.bytes = 15.0
    assert fraction_of_ceiling(result, CEILINGS) == 0.75  # 1.5 s of reading
    result.precision, result.bytes = "bfloat16", 0.0
    assert fraction_of_ceiling(result, CEILINGS) == 0.125
    result.floor = 1.0
    assert fraction_of_ceiling(result, CEILINGS) == 0.5
    result.floor, result.flops = None, 0.0
    assert fraction_of_ceiling(result, CEILINGS) is None


def test_flops_count_products_and_leave_attention_to_its_formula() -> None:
    linear, rows = nn.Linear(5, 7, bias=False), torch.randn(3, 5)
    assert count_flops(lambda: linear(rows)) == 2 * 3 * 5 * 7
    batched = torch.randn(2, 3, 4)
    assert count_flops(lambda: batched @ batched.mT) == 0
    assert count_flops(lambda: batched @ batched.mT, with_batched=True) == 2 * 2 * 3 * 4 * 3
    # Two products of T x T x width, each 2 operations, and twice as much backward.
    expected = 3 * 2 * 2 * 10 * 10 * 8
    assert attention_flops(layers=1, width=8, length=10, rows=1) == expected


def test_table_shows_rates_ratios_and_fractions() -> None:
    own = Result(
        work="train", variant="ours", is_ours=True, unit="tokens/s", costs=[0.01, 0.02, 0.03],
        others=[0.1, None, 0.3], flops=1.0,
    )  # fmt: skip
    peer = Result(
        work="train", variant="a | b", is_ours=False, unit="tokens/s", costs=[0.05],
        others=[None], build_seconds=63.0, note="as shipped",
    )  # fmt: skip
    lines = render([own, peer], CEILINGS, {"date": "today"}).splitlines()
    assert "- date: today" in lines
    assert "| **ours** | 50.0 | 33.3 to 100 | 1.00 | 50 % | 0.30 |  |" in lines
    row = "| a / b | 20.0 | 20.0 to 20.0 | 2.50 |  | not known | as shipped; 63 s to build, "
    assert row + "compile and verify |" in lines
    own.unit = peer.unit = "ms"
    assert "| **ours** | 20.0 | 10.0 to 30.0 |" in render([own, peer], CEILINGS, {})


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (45.678, "45.7"), (4.5678, "4.57"), (0.045678, "0.0457"), (0.5, "0.5")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_parts_are_selected_by_prefix() -> None:
    assert choose_parts(["all"]) == list(PARTS)
    assert choose_parts(["train"]) == ["train_small", "train_medium"]
    assert choose_parts(["sample_o", "lookup"]) == ["lookup", "sample_one"]
    with pytest.raises(ValueError, match="got 'speed', expected all"):
        choose_parts(["speed"])


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--parts", "speed", "got 'speed', expected all"),
        ("--rounds", "0", "--rounds: got 0, expected at least 1"),
        ("--out", "FILE/folder", "--out: cannot make"),
    ],
)
def test_bad_options_end_with_one_line(
    option: str,
    value: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", option, value])
    with pytest.raises(SystemExit) as stop:
        benchmarks.__main__.main()
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_stub_cannot_be_used() -> None:
    with pytest.raises(RuntimeError, match="stubbed import"):
        peers.Stub()


def test_sizes_are_those_of_the_comparison() -> None:
    assert (MEDIUM.length, MEDIUM.tokens, MEDIUM.head_dim) == (320, 2560, 64)
    text, image = random_pairs(TOY)
    assert text.min() >= 1, "a pad among the captions would spare our side work"
    assert text.shape == (TOY.batch, TOY.text_length)
    assert image.shape == (TOY.batch, TOY.image_length)
    assert ours.build_decoder(TOY).config.sequence_length == TOY.length
    assert list(BenchmarkConfig(rounds=1, quick=True, bf16=False).precisions()) == ["float32"]


def test_our_decoder_trains() -> None:
    job = ours.decoder_training(TOY, "float32")
    assert job.items == TOY.tokens
    # At least six operations per weight of the blocks and token that goes through them.
    blocks = ours.build_decoder(TOY).blocks.parameters()
    assert job.flops > 6 * sum(w.numel() for w in blocks if w.ndim == 2) * TOY.tokens
    job.run()


@pytest.mark.parametrize("guided", [False, True])
def test_our_decoder_generates(guided: bool) -> None:
    job = ours.decoder_sampler(TOY, "float32")(batch=2, guided=guided)
    generated = job.run()
    assert generated.image_token_ids.shape == (2, TOY.image_length)  # type: ignore[attr-defined]


def test_cache_dependent_sampling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours.build_decoder(TOY).eval()
    with torch.no_grad():
        model.image_head.rows.normal_(std=0.1)
    ours.require_cache_is_exact(model, TOY, tolerated_nats=1e-3)
    right = type(model).decode_window

    def forgetful(self, image_token_ids, cache, **steps):
        return right(self, image_token_ids * 0, cache, **steps)

    monkeypatch.setattr(type(model), "decode_window", forgetful)
    with pytest.raises(ValueError, match="cached and uncached generation differ"):
        ours.require_cache_is_exact(model, TOY, tolerated_nats=1e-3)


@pytest.mark.parametrize("work", ["encode", "decode", "train"])
def test_our_tokenizer_works(work: str) -> None:
    job = ours_pictures.tokenizer_job(work, random_images(2, 32), "float32")  # type: ignore[arg-type]
    assert job.flops > 0
    job.run()


def test_our_gumbel_quantizer_trains_between_given_networks() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Conv2d(3, 16, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)
    parts = (encoder, decoder, torch.randn(16, 8), random_images(256, 16), "float32")
    job = ours_pictures.gumbel_training(*parts)  # type: ignore[arg-type]
    assert job.items == 256
    for wrong in (ours_pictures.FirstStep(99.0, 1.0), ours_pictures.FirstStep(1.0, 99.0)):
        with pytest.raises(ValueError, match=f"the peer's {re.escape(str(wrong))}"):
            ours_pictures.gumbel_training(*parts, first_step=wrong)  # type: ignore[arg-type]


def test_beginnings_are_alike_but_for_noise() -> None:
    one = ours_pictures.FirstStep(1.0, 2.0)
    assert one.is_like(ours_pictures.FirstStep(1.04, 2.3))
    assert not one.is_like(ours_pictures.FirstStep(1.1, 2.0))
    assert not one.is_like(ours_pictures.FirstStep(1.0, 3.0))


@pytest.mark.skipif("TEST_ROUNDING" in os.environ, reason="torch compiles nothing then")
def test_what_is_not_compiled_is_refused() -> None:
    linear = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="nothing of it is compiled"):
        timing.require_compiled(lambda: linear(torch.ones(1, 3)))
    # Without a C++ compiler on the machine: what counts here is who runs the graph.
    compiled = torch.compile(linear, backend="aot_eager")
    compiled(torch.ones(1, 3))
    timing.require_compiled(lambda: compiled(torch.ones(1, 3)))


def test_a_block_warms_up_and_is_measured_again_while_others_are_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "LONGEST_SECONDS", 10.0)
    calls: list[float] = []
    [alone] = contest(Variant(name="a", build=lambda: Job(run=lambda: calls.append(0))), rounds=1)
    assert len(calls) in (2, 4, 6), "a call to warm up and one that counts, up to three times"
    busy = itertools.chain([0, 0, 9e9], itertools.repeat(9e9))  # others took the first block only
    monkeypatch.setattr(timing, "_busy_seconds", lambda: next(busy))
    calls.clear()
    [again] = contest(Variant(name="a", build=lambda: Job(run=lambda: calls.append(0))), rounds=1)
    assert len(calls) == 4
    assert len(again.costs) == len(alone.costs) == 1
    assert again.others == [0.0]


def test_our_look_up_finds_the_nearest_codes() -> None:
    vectors = torch.randn(50, 8)
    codebook = nn.functional.normalize(torch.randn(20, 8), dim=1)
    found = ours_pictures.code_lookup(vectors, codebook)()
    assert found.tolist() == (vectors @ codebook.T).argmax(dim=1).tolist()


def test_all_readers_read_every_image(tmp_path: Path) -> None:
    write_images(tmp_path, 5, side=32)
    assert ours_pictures.read_images(tmp_path, 16) == 5
    assert read_as_peer(tmp_path, 0) == decode_only(tmp_path) == 5
    pixels = DallePytorchFolder(tmp_path, side=16)[0]
    assert pixels.shape == (3, 16, 16)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert (tmp_path / "3.txt").read_text() != (tmp_path / "4.txt").read_text()


def test_whole_training_reads_tokenizes_and_trains(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6, side=32)
    run = ours_pictures.toy_run()
    job = ours_pictures.whole_training(tmp_path / "images", run, epochs=2)
    assert job.items == 2 * run.batch
    job.run()
    vae = {"image_size": 32, "num_tokens": 64}
    dalle = {"dim": 32, "depth": 2, "heads": 2, "num_text_tokens": 300, "text_seq_len": 16}
    matched = ours_pictures.matched_run(vae, dalle, batch=4)
    assert (matched.vqvae.image_grid_size, matched.vqvae.codebook_size) == ((4, 4), 64)


def test_model_folder_generates(tmp_path: Path) -> None:
    from dalle_mini_impl.models.dalle_config import DecoderConfig
    from dalle_mini_impl.pipeline import TextToImagePipeline

    decoder = DecoderConfig(hidden_size=32, num_layers=1, num_heads=2)
    ours_pictures.write_model(tmp_path, decoder)
    generated = TextToImagePipeline.from_pretrained(tmp_path)("red heart")
    assert generated.images[0].size == (64, 64)
    assert json.loads((tmp_path / "model_index.json").read_text())


def test_peak_memory_grows_and_never_shrinks() -> None:
    code = (
        "import torch\nfrom benchmarks.memory import peak_gib\nbefore = peak_gib()\n"
        "torch.ones(2**26).sum()  # a quarter of a GiB\nprint(before, peak_gib())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.01 < before < after - 0.2


def test_quality_is_the_mean_psnr_of_images() -> None:
    images_of_bytes = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    far = torch.tensor([0.2, 0.02, 0.002]).view(3, 1, 1, 1)
    found = quality.quality(lambda pixels: pixels + far, images_of_bytes)
    assert found == pytest.approx((20 + 40 + 60) / 3, abs=1e-3)  # 0.2 of [-1, 1] is 0.1 of [0, 1]


def test_learners_take_turns_until_the_goal_or_six_times_our_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_out = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    turns: list[str] = []

    def own_step() -> None:
        turns.append("ours")

    def own_rebuild(pixels: torch.Tensor) -> torch.Tensor:
        turns.append("measured")
        return pixels if turns.count("measured") > 2 else torch.zeros_like(pixels)

    def peer(sizes: dict[str, int], train: torch.Tensor) -> tuple[object, object]:
        if sizes is quality.DEFAULT_DVAE:
            raise ValueError("no such peer")
        return lambda: turns.append("peer"), torch.zeros_like

    monkeypatch.setattr(quality, "emoji", lambda folder, few: (held_out, held_out))
    monkeypatch.setattr(quality, "dvae", peer)
    own = (own_step, own_rebuild)
    monkeypatch.setattr(quality.ours_pictures, "tokenizer_to_quality", lambda train: own)
    monkeypatch.setattr(quality, "TURN_SECONDS", 0.0001)
    monkeypatch.setattr(quality, "GOAL_DB", 22.0)
    ours_row, stopped, failed = quality.run(BenchmarkConfig(rounds=1, quick=False, bf16=False))
    assert len(ours_row.costs) == 1
    assert "dB after" in ours_row.note
    assert stopped.failure.startswith("more than")
    assert not stopped.costs
    assert failed.failure == "failed: no such peer"
    assert turns.index("peer") < len(turns) - 1 - turns[::-1].index("ours")  # in turns


def test_our_tokenizer_learns_to_a_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours_pictures, "QUALITY_STEPS", 40)
    train = ((random_images(32, 16) + 1) * 127.5).byte()
    step, rebuild = ours_pictures.tokenizer_to_quality(train)
    before = quality.quality(rebuild, train)
    for _ in range(40):
        step()
    assert quality.quality(rebuild, train) > before + 2


def test_jacobi_needs_fewer_passes_for_the_same_images() -> None:
    pipeline = tiny.build_pipeline()
    many = shipped.own_job(pipeline, guided=True)
    single = shipped.own_job(pipeline, guided=True, one_by_one=True)
    assert many.items == single.items == len(shipped.PROMPTS)
    generated = [tokens for tokens, _ in many.run()]  # type: ignore[attr-defined]
    expected = [tokens for tokens, _ in single.run()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, generated, expected))
    assert single.note == f"{pipeline.dalle.config.image_length:.1f} passes an image"
    assert float(many.note.split()[0]) < float(single.note.split()[0])


def test_the_size_of_the_trained_model_is_that_of_its_row() -> None:
    config = TextToImagePipeline.from_pretrained(shipped.MODEL).dalle.config
    size = shipped.EMOJI_64
    assert (size.width, size.layers, size.heads) == (
        config.decoder.hidden_size,
        config.decoder.num_layers,
        config.decoder.num_heads,
    )
    assert (size.text_length, size.image_length) == (config.text_length, config.image_length)
    assert (size.vocab, size.codebook) == (config.vocab_size, config.codebook_size)


def test_a_program_that_numbers_its_files_on_can_be_timed_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import os, sys; open(f'{sys.argv[1]}/{len(os.listdir(sys.argv[1]))}', 'w').close()"
    command = [sys.executable, "-c", code, str(out)]
    process_job(command, expected=out / "0").run()
    with pytest.raises(ValueError, match="exit code 0"):
        process_job(command, expected=out / "1")
