"""The shipped model can be trained again: the commands of its presets, on a few images."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.reference.processes import output_of

REPOSITORY = Path(__file__).parents[1]
PRESETS = REPOSITORY / "configs" / "emoji64_styles"
FEW_STEPS = (
    "--training.max_steps=3 --training.global_batch_size=8 --training.compile=false "
    "--tracking.mode=disabled"
).split()
ROLES = ("cook", "singer")


def commands_of(name: str) -> list[list[str]]:
    """The commands in the first lines of a preset."""
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line[2:]) for line in lines if line.startswith("# python scripts/")]


def keep_few_images(data: Path) -> int:
    """Keep two whole roles, held-out cells among them, and every fortieth other image."""
    path = data / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [
        row
        for at, row in enumerate(rows)
        if row["role"] in ROLES or (row["split"] == "train" and at % 40 == 0)
    ]
    path.write_text("\n".join(json.dumps(row) for row in kept) + "\n", encoding="utf-8")
    return len(kept)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half of work, on a machine that may be busy
def test_preset_and_card_commands_train_and_evaluate(tmp_path: Path) -> None:
    prepare, train_vqvae = commands_of("vqvae")
    (train_dalle,) = commands_of("dalle")
    data, vqvae, dalle = (tmp_path / name for name in ("data", "vqvae", "dalle"))
    # The other styles come from npm packages, which tests do not fetch.
    output_of(*prepare[1 : prepare.index("--out")], "--out", data)
    count = keep_few_images(data)
    output_of(*train_vqvae[1:], "--data.source", data, "--output_dir", vqvae, *FEW_STEPS)
    output_of(
        *train_dalle[1:],
        *("--data.source", data, "--vqvae_dir", vqvae / "model", "--output_dir", dalle),
        *("--fixed_prompts", '["red heart"]', *FEW_STEPS),
    )
    card = (REPOSITORY / "checkpoints/emoji-64/README.md").read_text(encoding="utf-8")
    match = re.search(r"python scripts/evaluate\.py .*", card.replace("\\\n", " "))
    assert match is not None
    evaluate = shlex.split(match[0])
    for option, value in (("--model", dalle / "model"), ("--data", data), ("--out", tmp_path)):
        evaluate[evaluate.index(option) + 1] = str(value)
    output_of(*evaluate[1:], "--max-samples", "2", "--num-candidates", "2")
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    sizes = found["protocol"]["data"]
    assert sizes["train"] + sizes["test_compose"] == count
    assert found["decoder"]["splits"]["test_compose"]["its caption"]["nats_per_token"]["value"] > 1
    assert set(found["composition"]) >= {"one image", "best of 2"}
    assert (tmp_path / "held_out_cells.png").is_file()
