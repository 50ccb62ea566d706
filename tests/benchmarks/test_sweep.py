"""The bake-off's table says what its rows say."""

import pytest

from benchmarks.bake_off import CONTENDERS, bits_above_line, table


def row(name: str, psnr_db: float, bits: float) -> dict[str, object]:
    fractions = dict.fromkeys(("cells", "tone", "gender", "codebook_usage"), 0.25)
    numbers = {"codebook_perplexity": 99.0, "feature_distance": 0.5, "seconds": 60.0}
    return (
        {"tokenizer": name, "expected": "x", "psnr_db": psnr_db, "bits": bits} | fractions | numbers
    )


def test_bits_are_held_against_fsq_at_the_same_psnr() -> None:
    few, many = row("FSQ, 240 codes", 20.0, 100.0), row("FSQ, 1,000 codes", 22.0, 140.0)
    other = row("VQ, 1,024 codes", 21.0, 110.0)
    results = [other, many, few]
    assert bits_above_line(other, results) == pytest.approx(-10.0)
    assert bits_above_line(few, results) == pytest.approx(0.0)
    assert bits_above_line(many, results) == pytest.approx(0.0)
    assert bits_above_line(other, [other, many]) is None
    same = row("FSQ, 240 codes", 22.05, 100.0)
    assert bits_above_line(other, [other, many, same]) is None
    lines = table(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "FSQ, 1,000 codes", "VQ, 1,024 codes", "FSQ, 240 codes",
    ]  # fmt: skip
    assert "| 21.00 | 110 | -10 | 25 % | 99 | 0.500 | 25 % | 25 % | 25 % | 60 |" in lines[3]


def test_every_contender_is_a_run_that_can_be_built() -> None:
    from dalle_mini_impl.config import load_config
    from dalle_mini_impl.training.vqvae import VQVAERunConfig

    seen = set()
    for contender in CONTENDERS:
        options = [f"--{name}={value}" for name, value in contender.options.items()]
        arguments = ["--config", "configs/demo/vqvae.yaml", *options]
        seen.add(str(load_config(VQVAERunConfig, arguments, description="")[0]))
    assert len(seen) == len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
