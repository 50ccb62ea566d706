"""Whole runs: resumed bit for bit, refused where they would destroy something."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dalle_mini_impl.config import read_config
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.dalle import DalleRunConfig
from dalle_mini_impl.training.run import claim_output_dir, only_main_process_informs, save_config
from tests.reference import tiny
from tests.reference.log_lines import log_lines
from tests.reference.processes import Script
from tests.reference.runs import EVERYTHING_RANDOM, checkpoint_dir, read_files, run_results


def assert_resumes_exactly(config: Any) -> None:
    """Run six steps; then, from the checkpoint of step 3 and with new objects, the last three."""
    out = Path(config.output_dir)
    tiny.train(config)
    straight = run_results(out, 6)
    assert len(straight["checkpoint"]) >= 3  # model, average, optimizer
    assert len(straight["rows"]) >= 8
    shutil.rmtree(checkpoint_dir(out, 6))
    shutil.rmtree(out / "model")
    _, lines = tiny.train(config, resume="latest")
    assert any(line.startswith("resuming at step 3") for line in lines)
    resumed = run_results(out, 6)
    assert resumed["rows"] == straight["rows"]
    assert resumed == straight


DECODER_RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "recomputed": {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "encoder_decoder": {"activation_checkpointing": True, "decoder": tiny.WITH_ENCODER},
}


@pytest.mark.parametrize("name", DECODER_RUNS)
def test_a_decoder_run_resumes_bit_for_bit(
    data: Path, vqvae_dir: Path, tmp_path: Path, name: str
) -> None:
    options = DECODER_RUNS[name] | {"task": EVERYTHING_RANDOM, "ema_decay": 0.9}
    config = tiny.dalle_run(data, vqvae_dir, tmp_path / "run", **options)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, balance_by="color"))
    assert_resumes_exactly(config)


@pytest.mark.parametrize("quantizer", ["fsq", "vq", "gumbel"])
def test_a_tokenizer_run_resumes_bit_for_bit(data: Path, tmp_path: Path, quantizer: str) -> None:
    options = {"vqvae": {"quantizer": quantizer}, "ema_decay": 0.9, "schedule": "cosine"}
    config = tiny.vqvae_run(data, tmp_path / "run", **options)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, max_shift=2))
    assert_resumes_exactly(config)


def test_runs_on_images_that_are_not_square_resume_bit_for_bit(data: Path, tmp_path: Path) -> None:
    wide = {"image_size": (16, 24)}
    tokenizer = tiny.vqvae_run(data, tmp_path / "vqvae", vqvae=wide, ema_decay=0.9)
    assert_resumes_exactly(tokenizer)
    folder = tmp_path / "vqvae" / "model"
    options: dict[str, Any] = {"task": EVERYTHING_RANDOM, "ema_decay": 0.9}
    decoder = tiny.dalle_run(data, folder, tmp_path / "dalle", **options)
    assert_resumes_exactly(decoder)


def test_a_translation_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    table = tiny.write_text_pairs(tmp_path / "pairs.tsv")
    config = tiny.translation_run(table, tmp_path / "run", schedule="inverse_sqrt", ema_decay=0.9)
    assert_resumes_exactly(config)


@pytest.mark.parametrize("implementation", ["ours", "transformers"])
def test_a_vit_run_resumes_bit_for_bit(data: Path, tmp_path: Path, implementation: str) -> None:
    config = tiny.vit_run(data, tmp_path / "run", implementation=implementation, ema_decay=0.9)
    assert_resumes_exactly(config)


@pytest.mark.parametrize("model", ["vqvae", "dalle"])
def test_accumulated_micro_batches_are_one_batch(
    data: Path, vqvae_dir: Path, tmp_path: Path, model: str
) -> None:
    found = []
    for parts in (1, 2):
        out = tmp_path / str(parts)
        options: dict[str, Any] = {"gradient_accumulation_steps": parts, "max_steps": 4}
        if model == "vqvae":
            config: Any = tiny.vqvae_run(data, out, **options)
        else:
            task = {**EVERYTHING_RANDOM, "token_noise_probability": 0.1}
            options |= {"task": task, "dropout_probability": 0.0}
            config = tiny.dalle_run(data, vqvae_dir, out, **options)
        tiny.train(config)
        rows = [row for row in tiny.read_metrics(out) if "train/loss" in row]
        # The norm too, as clipping and AdamW hide a gradient of the wrong size.
        found.append([row[key] for row in rows for key in ("train/loss", "train/gradient_norm")])
    whole, halves = found
    assert len(set(whole)) == len(halves) == 8
    assert halves[::2] == pytest.approx(whole[::2], abs=1e-6, rel=0)
    assert halves[1::2] == pytest.approx(whole[1::2], rel=1e-4)


HOLD = """
import sys, time
from pathlib import Path
from dalle_mini_impl.output_dirs import locked_folder

with locked_folder(Path(sys.argv[1]), field="output_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_cannot_use_one_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    config = tiny.vqvae_run(data, out, max_steps=1)
    other = Script("-c", HOLD, out)
    other.wait_for("held")
    try:
        for resume in (None, "latest"):
            with pytest.raises(UserError, match=r"output_dir: .*run is in use by another run"):
                tiny.train(config, resume=resume)
        with monkeypatch.context() as patch:  # all processes of a run use one folder
            patch.setenv("RANK", "1")
            with claim_output_dir(config, None):
                pass
    finally:
        other.process.kill()
        other.finish()
    tiny.train(config)  # a killed process holds nothing
    tiny.train(config, resume="latest")


def test_only_the_main_process_informs(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("dalle_mini_impl.training.run")
    with log_lines() as lines:
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            with only_main_process_informs():
                logger.info("from %s", rank)
                assert logger.isEnabledFor(logging.WARNING)
            logger.info("after %s", rank)
    assert lines == ["from 0", "after 0", "after 1"]


def test_resuming_from_nothing_starts_at_step_0(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", max_steps=1)
    with caplog.at_level(logging.WARNING):
        tiny.train(config, resume="latest")
    assert "no checkpoint" in caplog.text
    assert "starting at step 0" in caplog.text
    assert next(row["step"] for row in tiny.read_metrics(tmp_path / "run")) == 1


def test_a_resumed_run_takes_its_own_rate(data: Path, vqvae_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {}
    for rate in (1e-12, 1e-2):
        shutil.rmtree(out, ignore_errors=True)
        options: dict[str, Any] = {"optimizer": "muon", "weight_decay": 0.0, "warmup_steps": 0}
        tiny.train(tiny.dalle_run(data, vqvae_dir, out, max_steps=3, **options))
        before = load_file(out / "model" / "dalle" / "model.safetensors")
        options |= {"learning_rate": rate, "max_steps": 6}
        tiny.train(tiny.dalle_run(data, vqvae_dir, out, **options), resume="latest")
        after = load_file(out / "model" / "dalle" / "model.safetensors")
        changes[rate] = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert changes[1e-12] < 1e-6
    assert changes[1e-2] > 1e-3


def test_other_tokens_are_refused(data: Path, vqvae_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny.train(tiny.dalle_run(data, vqvae_dir, out, max_steps=3))
    kept = {path: path.read_bytes() for path in (out / "config.yaml", out / "metrics.jsonl")}
    tiny.train(tiny.vqvae_run(data, tmp_path / "other", max_steps=3, seed=1))
    other = tiny.dalle_run(data, tmp_path / "other" / "model", out, max_steps=6)
    with pytest.raises(UserError, match=r"resume: .* was trained on other tokens"):
        tiny.train(other, resume="latest")
    assert {path: path.read_bytes() for path in kept} == kept  # refused without a trace


def test_a_finished_run_resumes_to_its_end_again(data: Path, tmp_path: Path) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run", max_steps=2)
    tiny.train(config)
    before = read_files(tmp_path / "run" / "model")
    tiny.train(config, resume="latest")
    assert read_files(tmp_path / "run" / "model") == before


def test_impossible_resumes_are_refused(data: Path, vqvae_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny.vqvae_run(data, out, max_steps=1)
    tiny.train(config)
    for other in (config, tiny.dalle_run(data, vqvae_dir, out)):
        with pytest.raises(UserError, match=r"output_dir: .* already holds a run; pass --resume"):
            tiny.train(other)
    assert not (out / "tokens").exists()  # refused before any work

    wider = tiny.vqvae_run(data, out, max_steps=2, vqvae={"channels": (8, 16)})
    message = r"resume: .* does not fit this config: vqvae.channels was \[8, 12\], is"
    with pytest.raises(UserError, match=message):
        tiny.train(wider, resume="latest")
    averaged = tiny.vqvae_run(data, out, max_steps=2, ema_decay=0.9)
    with pytest.raises(UserError, match=r"resume: .* does not fit this config"):
        tiny.train(averaged, resume="latest")
    with pytest.raises(UserError, match="no such folder"):
        tiny.train(config, resume=str(checkpoint_dir(out, 9)))

    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"output_dir: .*expected a folder"):
            tiny.train(tiny.vqvae_run(data, bad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/nowhere/at/all"}, "data.source: no folder or file /nowhere/at/all"),
        ({"balance_by": "size"}, "^data.balance_by: .* 'size'; expected null .*, color"),
        ({"validation_split": "later"}, "data.source: .* no split 'later', it has train, val"),
    ],
)
def test_unusable_data_are_named(data: Path, tmp_path: Path, change: Any, message: str) -> None:
    config = tiny.vqvae_run(data, tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **change))
    with pytest.raises(UserError, match=message):
        tiny.train(config)


def test_unusable_settings_are_named(data: Path, vqvae_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vqvae_dir: .*expected a folder that train_vqvae\.py"):
        tiny.train(tiny.dalle_run(data, tmp_path / "nothing", tmp_path / "run"))
    shutil.copytree(vqvae_dir, tmp_path / "vqvae" / "model")
    with pytest.raises(UserError, match=rf"vqvae_dir: .*expected {tmp_path}/vqvae/model$"):
        tiny.train(tiny.dalle_run(data, tmp_path / "vqvae", tmp_path / "run"))
    config = tiny.vqvae_run(data, tmp_path / "run", gradient_accumulation_steps=3)
    message = "training.global_batch_size: got 8, expected a multiple of 3"
    with pytest.raises(UserError, match=message):
        tiny.train(config)


def test_the_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = tiny.dalle_run(tmp_path, tmp_path, tmp_path, learning_rate=1e-5, max_minutes=0.5)
    config = dataclasses.replace(config, fixed_prompts=("빨간 하트", "yes", "1: two", "- #", '"'))
    save_config(config, tmp_path / "config.yaml")
    assert read_config(DalleRunConfig, tmp_path / "config.yaml") == config


def test_precision_is_chosen_for_each_run(data: Path, tmp_path: Path) -> None:
    for name in ("bf16", "no"):
        out = tmp_path / name
        tiny.train(tiny.vqvae_run(data, out, max_steps=1, mixed_precision=name))
        assert len(tiny.losses(out)) == 1


def test_tokens_are_encoded_once(data: Path, vqvae_dir: Path, tmp_path: Path) -> None:
    config = tiny.dalle_run(data, vqvae_dir, tmp_path / "run", max_steps=1)
    _, lines = tiny.train(config)
    assert sum("encoding" in line for line in lines) == 2  # training and held-out images
    _, lines = tiny.train(config, resume="latest")
    assert not any("encoding" in line for line in lines)
    assert sum("reading" in line for line in lines) == 2
