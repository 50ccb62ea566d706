"""Training, generation and tokenizing on one GPU, beside the GPU's own limits.

    python -m benchmarks.gpu --out out/bench_gpu [--parts train sample tokenize]

Prints a table for docs/benchmarks.md. Everything runs in bf16 where training would. A part that
fails (out of memory, say) is a row that says so.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate.utils import compile_regions
from torch import nn

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_config import DalleConfig, DecoderConfig
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.cross_entropy import token_nats
from dalle_mini_impl.training.optimizer import build_optimizers
from vqvae import VQVAE, VQVAEConfig
from vqvae.losses.reconstruction import reconstruction_loss

TEXT_LENGTH, GRID, VOCAB_SIZE, CODEBOOK_SIZE = 64, (16, 16), 8192, 8192
DECODERS = {  # name: (hidden_size, num_layers, num_heads, samples per training step)
    "M, width 512, 12 layers": (512, 12, 8, 256),
    "base, width 640, 12 layers": (640, 12, 10, 256),
    "large, width 1024, 24 layers": (1024, 24, 16, 96),
    "1.2B, width 2048, 24 layers": (2048, 24, 32, 32),
}
Row = dict[str, str | float]


def build_decoder(name: str) -> Dalle:
    """Build a decoder with weights that generate varied tokens."""
    hidden_size, num_layers, num_heads, _ = DECODERS[name]
    decoder = DecoderConfig(
        hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, dropout_probability=0.0
    )
    torch.manual_seed(0)
    model = Dalle(
        DalleConfig(
            decoder=decoder,
            vocab_size=VOCAB_SIZE,
            text_length=TEXT_LENGTH,
            codebook_levels=(CODEBOOK_SIZE,),
            image_grid_size=GRID,
        )
    )
    for parameter in (model.text_head.weight, model.image_head.rows):
        nn.init.normal_(parameter, std=0.02)
    return model.cuda()


def timed(work: Callable[[], object], *, warm_up: int = 3, repeats: int = 10) -> float:
    """Return the median seconds of ``work``, the device waited for."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def ceilings() -> tuple[float, float]:
    """Measure the bf16 product rate in FLOP/s and the copy bandwidth in bytes/s."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / timed(lambda: left @ right)
    source = torch.randn(2**30, device="cuda")  # 4 GiB
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source))
    return flops, bandwidth


def training_flops(model: Dalle, batch_size: int) -> float:
    """Count one step: 6 per weight and position that it multiplies, and full-square attention."""
    sizes = model.config
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    width, layers = sizes.decoder.hidden_size, sizes.decoder.num_layers
    heads = width * (
        sizes.text_length * sizes.vocab_size + sizes.image_length * sizes.codebook_size
    )
    attention = 12 * layers * width * sizes.sequence_length**2
    return batch_size * (6 * hidden * sizes.sequence_length + 6 * heads + attention)


def train(peak: float) -> Iterator[Row]:
    """Time whole training steps: loss, backward pass, clipping, AdamW."""
    for name, (*_, batch_size) in DECODERS.items():
        for compiled in (False, True):
            row: Row = {"work": "train", "model": name, "compiled": str(compiled)}
            try:
                yield row | _train(name, batch_size, peak, compiled=compiled)
            except torch.OutOfMemoryError:
                yield row | {"result": f"out of memory at batch {batch_size}"}
            torch.compiler.reset()
            torch.cuda.empty_cache()


def _train(name: str, batch_size: int, peak: float, *, compiled: bool) -> Row:
    model = build_decoder(name).train()
    flops = training_flops(model, batch_size)
    optimizers = build_optimizers(
        model, kind="adamw", learning_rate=1e-4, weight_decay=0.05, betas=(0.9, 0.95)
    )
    forward = compile_regions(model, dynamic=False) if compiled else model
    text = torch.randint(1, VOCAB_SIZE, (batch_size, TEXT_LENGTH), device="cuda")
    image = torch.randint(CODEBOOK_SIZE, (batch_size, GRID[0] * GRID[1]), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(text, image)
            image_nats = token_nats(logits.image.flatten(0, 1), image.flatten())
            text_nats = token_nats(logits.text.flatten(0, 1), text.flatten())
            loss = image_nats.mean() + 0.1 * text_nats.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    seconds = timed(step)
    return {
        "millions": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "batch": batch_size,
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(batch_size * model.config.sequence_length / seconds),
        "tflops": round(flops / seconds / 1e12, 1),
        "fraction_of_measured_peak": round(flops / seconds / peak, 3),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first_step_seconds": round(first, 1),
    }


def sample(bandwidth: float) -> Iterator[Row]:
    """Time whole images of 256 tokens in bf16, beside the time to read weights and cache."""
    cases = [(name, rows, 1.0) for name in list(DECODERS)[:3] for rows in (1, 16, 64, 256)]
    cases += [(name, 1, 3.0) for name in list(DECODERS)[:3]]
    cases += [(next(iter(DECODERS)), rows, 3.0) for rows in (16, 256)]
    for name in list(DECODERS)[:3]:
        model = build_decoder(name).to(torch.bfloat16).eval()
        for _, rows, scale in (case for case in cases if case[0] == name):
            yield _sample(model, name, rows, scale, bandwidth) | {"compiled": "False"}
        model.decode_window = torch.compile(model.decode_window, dynamic=False)  # type: ignore[method-assign]
        for rows in (1, 64):
            yield _sample(model, name, rows, 1.0, bandwidth) | {"compiled": "True"}
        torch.compiler.reset()


def _sample(model: Dalle, name: str, rows: int, scale: float, bandwidth: float) -> Row:
    text = torch.randint(1, VOCAB_SIZE, (rows, TEXT_LENGTH), device="cuda")
    seeds, sampling_config = torch.arange(rows), SamplingConfig(guidance_scale=scale)
    seconds = timed(
        lambda: generate_sequentially(model, text, seeds=seeds, sampling_config=sampling_config),
        warm_up=1,
        repeats=3,
    )
    num_tokens = model.config.image_length
    weights = sum(p.nbytes for p in model.blocks.parameters()) + model.image_head.rows.nbytes
    sizes = model.config.decoder
    guided_rows = rows * (2 if scale != 1 else 1)
    mean_length = TEXT_LENGTH + 1 + num_tokens / 2
    cache = 2 * 2 * sizes.num_layers * sizes.hidden_size * mean_length * guided_rows
    floor = num_tokens * (weights + cache) / bandwidth
    return {
        "work": "sample",
        "model": name,
        "rows": rows,
        "guidance": scale,
        "seconds": round(seconds, 4),
        "ms_per_token": round(1e3 * seconds / num_tokens, 3),
        "tokens_per_second": round(rows * num_tokens / seconds),
        "images_per_second": round(rows / seconds, 1),
        "times_bandwidth_floor": round(seconds / floor, 2),
    }


def tokenize() -> Iterator[Row]:
    """Time the image tokenizer of configs/emoji64, and one for 256 pixels."""
    configs = {
        "64 px, 8 x 8 tokens": (VQVAEConfig(channels=(96, 256)), 256),
        "256 px, 16 x 16 tokens": (
            VQVAEConfig(image_size=256, channels=(96, 192, 256)),
            32,
        ),
    }
    for name, (config, batch_size) in configs.items():
        torch.manual_seed(0)
        vqvae = VQVAE(config).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pixels = torch.rand(batch_size, 3, config.image_size, config.image_size, device="cuda")
        pixels = (2 * pixels - 1).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(vqvae.parameters(), lr=1e-4, fused=True)

        def step(vqvae: VQVAE = vqvae, pixels: torch.Tensor = pixels) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                output = vqvae(pixels)
                loss = reconstruction_loss(output.reconstruction, pixels, wavelet_weight=0.5)
            loss.backward()
            optimizer.step()  # noqa: B023 - called before the next model is built
            optimizer.zero_grad(set_to_none=True)  # noqa: B023

        token_ids = vqvae.encode_to_token_ids(pixels)
        works: dict[str, Callable[[], object]] = {
            "encode": partial(vqvae.encode_to_token_ids, pixels),
            "decode": partial(vqvae.decode_from_token_ids, token_ids),
            "train": step,
        }
        for work, run in works.items():
            seconds = timed(run)
            yield {
                "work": f"tokenizer, {work}",
                "model": name,
                "batch": batch_size,
                "images_per_second": round(batch_size / seconds),
            }


def main(arguments: list[str]) -> None:
    """Run the parts and write ``gpu.json`` after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench_gpu"))
    parser.add_argument("--parts", nargs="+", default=["train", "sample", "tokenize"])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    peak, bandwidth = ceilings()
    rows: list[Row] = [
        {
            "work": "limits",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "bf16_tflops": round(peak / 1e12),
            "copy_gb_per_second": round(bandwidth / 1e9),
        }
    ]
    print(rows[0], flush=True)
    parts = {"train": lambda: train(peak), "sample": lambda: sample(bandwidth)}
    for part in options.parts:
        for row in parts.get(part, tokenize)():
            rows.append(row)
            print(row, flush=True)
            (options.out / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
