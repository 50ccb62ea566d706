"""From nothing to images: data, image tokenizer, decoder, and prompts it never saw combined."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dalle_mini_impl.cli.main import OneLineParser, run_script


def main(arguments: Sequence[str]) -> None:
    """Run all steps; steps whose result is there already are passed over."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="everything goes here")
    parser.add_argument("--configs", type=Path, default=Path("configs/demo"), help="two presets")
    options = parser.parse_args(arguments)
    out, started = options.out, time.monotonic()

    def announce(text: str) -> None:
        print(f"[{(time.monotonic() - started) / 60:4.1f} min] {text}")

    from dalle_mini_impl.builtin_datasets.emoji.prepare import prepare_emoji
    from dalle_mini_impl.cli.demo import generate_demo
    from dalle_mini_impl.config import load_config
    from dalle_mini_impl.hardware import use_fast_float32
    from dalle_mini_impl.training.dalle import DalleRunConfig, train_dalle
    from dalle_mini_impl.training.vqvae import VQVAERunConfig, train_vqvae

    data, vqvae, dalle = out / "data", out / "vqvae", out / "dalle"
    if not (data / "metadata.jsonl").is_file():
        announce("generating the Twemoji data set")
        prepare_emoji(data, size=64)

    def shared(run: Path) -> list[str]:
        started_before = any((run / "checkpoints").glob("step-*"))
        resume = ["--resume", "latest"] if started_before else []
        return ["--data.source", str(data), "--output_dir", str(run), *resume]

    if not (vqvae / "model" / "config.json").is_file():
        announce("training the image tokenizer")
        preset = ["--config", str(options.configs / "vqvae.yaml")]
        config, resume = load_config(VQVAERunConfig, [*preset, *shared(vqvae)], description="")
        train_vqvae(config, resume=resume)
    if not (dalle / "model" / "model_index.json").is_file():
        announce("training the decoder")
        preset = ["--config", str(options.configs / "dalle.yaml")]
        preset += ["--vqvae_dir", str(vqvae / "model"), *shared(dalle)]
        run_config, resume = load_config(DalleRunConfig, preset, description="")
        train_dalle(run_config, resume=resume)
    announce("generating images")
    use_fast_float32()  # as training did: a later run of this script alone generates the same images
    for line in generate_demo(dalle / "model", data, out):
        announce(line)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
