"""The sweep's tables say what their rows say, and its recipes can be built."""

from pathlib import Path

import pytest

from benchmarks.sweep import COLUMNS, as_options, bits_above_line, lock, read_recipes, table


def row(name: str, psnr_db: float, bits: float) -> dict[str, object]:
    fractions = dict.fromkeys(("cells", "tone", "gender", "codebook_usage"), 0.25)
    numbers = {"codebook_perplexity": 99.0, "feature_distance": 0.5, "tokenizer_seconds": 60.0}
    named = {"recipe": name, "expected": "x", "psnr_db": psnr_db, "bits": bits}
    return named | fractions | numbers


def test_bits_are_compared_with_fsq_at_the_same_psnr() -> None:
    few, many = row("FSQ, 240 codes", 20.0, 100.0), row("FSQ, 1,000 codes", 22.0, 140.0)
    other = row("VQ, 1,024 codes", 21.0, 110.0)
    results = [other, many, few]
    assert [bits_above_line(one, results) for one in results] == pytest.approx([-10.0, 0.0, 0.0])
    assert bits_above_line(other, [other, many]) is None
    assert bits_above_line(other, [other, many, row("FSQ, 240 codes", 22.05, 100.0)]) is None
    _, _, first, second, third = table("tokenizers", results).splitlines()
    assert first.startswith("| FSQ, 1,000 codes |")
    assert third.startswith("| FSQ, 240 codes |")
    assert second.endswith("| 21.00 | 110 | -10 | 25 % | 99 | 0.500 | 25 % | 25 % | 25 % | 60 |")


@pytest.mark.parametrize("sweep", COLUMNS)
def test_every_recipe_is_another_run_that_can_be_built(sweep: str) -> None:
    from dalle_mini_impl.config import load_config
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.vqvae import VQVAERunConfig

    def build(config: type, preset: str, overrides: dict[str, object]) -> object:
        arguments = ["--config", f"configs/demo/{preset}.yaml", *as_options(overrides)]
        return load_config(config, arguments, description="")[0]

    recipes = read_recipes()[sweep]
    built = {
        (
            str(build(VQVAERunConfig, "vqvae", recipe.tokenizer)),
            str(build(DalleRunConfig, "dalle", {"vqvae_dir": "x", **recipe.decoder})),
            str(recipe.sampling),
        )
        for recipe in recipes
    }
    assert len(built) == len({recipe.name for recipe in recipes}) == len(recipes)


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    with lock(tmp_path / "a", wait=True) as first, lock(tmp_path / "a", wait=False) as second:
        assert (first, second) == (True, False)
