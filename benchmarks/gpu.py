"""Training, sampling and tokenizing on one GPU, beside the GPU's own limits.

    python -m benchmarks.gpu --out out/bench_gpu [--parts train sample tokenize]

Prints a table for docs/benchmarks.md. Everything runs in bf16 where training would. A part that
fails (out of memory, say) is a row that says so.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import compile_regions

from benchmarks import ours
from benchmarks.sizes import Size, random_pairs
from benchmarks.timing import attention_flops, call_seconds, matmul_rate, update
from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.sampling.generate import generate_sequentially
from dalle_mini_impl.sampling.sampler import SamplingConfig
from dalle_mini_impl.training.cross_entropy import token_nats
from dalle_mini_impl.training.optimizer import build_optimizers
from vqvae import VQVAE, VQVAEConfig
from vqvae.losses.reconstruction import reconstruction_loss

DEVICE = "cuda"
DECODERS = (
    Size("M, width 512, 12 layers", 512, 12, 8, 64, 16, 8192, 8192, batch=256),
    Size("base, width 640, 12 layers", 640, 12, 10, 64, 16, 8192, 8192, batch=256),
    Size("large, width 1024, 24 layers", 1024, 24, 16, 64, 16, 8192, 8192, batch=96),
    Size("1.2B, width 2048, 24 layers", 2048, 24, 32, 64, 16, 8192, 8192, batch=32),
)
TOKENIZERS = {  # name: (config, batch size)
    "64 px, 8 x 8 tokens": (VQVAEConfig(channels=(96, 256)), 256),
    "256 px, 16 x 16 tokens": (VQVAEConfig(image_size=256, channels=(96, 192, 256)), 32),
}
MATMUL_SIDE, COPY_BYTES = 8192, 2**32
Row = dict[str, str | float]


def seconds_of(run: Callable[[], object], *, warm_up: int = 3, repeats: int = 10) -> float:
    """Return the median seconds of a call."""
    return median(call_seconds(run, warm_up=warm_up, repeats=repeats))


def measure_limits() -> tuple[float, float]:
    """Measure the bf16 product rate in FLOP/s and the copy bandwidth in bytes/s."""
    rate = matmul_rate(MATMUL_SIDE, torch.bfloat16, device=DEVICE, summarize=median)
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    # A copy reads and writes each byte.
    return rate, 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def training_flops(model: Dalle, batch_size: int) -> float:
    """Count one step: 6 per weight and position that it multiplies, and full-square attention."""
    sizes = model.config
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    width, layers = sizes.decoder.hidden_size, sizes.decoder.num_layers
    # Each head scores only the positions of its own modality.
    scores = sizes.text_length * sizes.vocab_size + sizes.image_length * sizes.codebook_size
    attention = attention_flops(layers, width, sizes.sequence_length, batch_size)
    # Per weight and position: a product and a sum, forward once and backward twice.
    return attention + 6 * batch_size * (hidden * sizes.sequence_length + width * scores)


def train(peak: float) -> Iterator[Row]:
    """Time whole training steps: loss, backward pass, clipping, AdamW."""
    for size in DECODERS:
        for compiled in (False, True):
            row: Row = {"work": "train", "model": size.name, "compiled": str(compiled)}
            try:
                yield row | _train(size, peak, compiled=compiled)
            except torch.OutOfMemoryError:
                yield row | {"result": f"out of memory at batch {size.batch}"}
            # The next size needs the memory, and its own compiled code.
            torch.compiler.reset()
            torch.cuda.empty_cache()


def _train(size: Size, peak: float, *, compiled: bool) -> Row:
    torch.manual_seed(0)
    model = ours.build_decoder(size, random_heads=True).to(DEVICE).train()
    flops = training_flops(model, size.batch)
    [optimizer] = build_optimizers(
        model, kind="adamw", learning_rate=1e-4, weight_decay=0.05, betas=(0.9, 0.95)
    )
    forward = compile_regions(model, dynamic=False) if compiled else model
    text, image = (tokens.to(DEVICE) for tokens in random_pairs(size))

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = forward(text, image)
            image_nats = token_nats(logits.image.flatten(0, 1), image.flatten())
            text_nats = token_nats(logits.text.flatten(0, 1), text.flatten())
            loss = image_nats.mean() + 0.1 * text_nats.mean()
        update(loss, optimizer, max_norm=1.0)

    torch.cuda.reset_peak_memory_stats()
    # The first step compiles, so it is timed apart.
    [first] = call_seconds(step, warm_up=0, repeats=1)
    seconds = seconds_of(step)
    return {
        "millions": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "batch": size.batch,
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(size.tokens / seconds),
        "tflops": round(flops / seconds / 1e12, 1),
        "fraction_of_measured_peak": round(flops / seconds / peak, 3),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "first_step_seconds": round(first, 1),
    }


def sample(bandwidth: float) -> Iterator[Row]:
    """Time whole images of 256 tokens in bf16, beside the time to read weights and cache."""
    for size in DECODERS[:3]:
        cases = [(rows, 1.0) for rows in (1, 16, 64, 256)] + [(1, 3.0)]
        if size is DECODERS[0]:
            cases += [(16, 3.0), (256, 3.0)]
        torch.manual_seed(0)
        model = ours.build_decoder(size, random_heads=True).to(DEVICE).to(torch.bfloat16).eval()
        for rows, scale in cases:
            yield _sample(model, size, rows, scale, bandwidth) | {"compiled": "False"}
        # The loop around it is a CUDA graph already; this compiles the step inside.
        model.decode_window = torch.compile(model.decode_window, dynamic=False)  # type: ignore[method-assign]
        for rows in (1, 64):
            yield _sample(model, size, rows, 1.0, bandwidth) | {"compiled": "True"}
        torch.compiler.reset()


def _sample(model: Dalle, size: Size, rows: int, scale: float, bandwidth: float) -> Row:
    text = random_pairs(size, batch=rows)[0].to(DEVICE)
    seeds, sampling_config = torch.arange(rows), SamplingConfig(guidance_scale=scale)
    options: dict[str, Any] = {"seeds": seeds, "sampling_config": sampling_config}
    generate = partial(generate_sequentially, model, text, **options)
    seconds = seconds_of(generate, warm_up=1, repeats=3)
    # The floor: every token reads all weights, and the keys and values of the positions before it.
    weights = sum(p.nbytes for p in model.blocks.parameters()) + model.image_head.rows.nbytes
    guided_rows = rows * (2 if scale != 1 else 1)
    mean_length = size.text_length + 1 + size.image_length / 2
    # Keys and values, two bytes a number.
    cache = 2 * 2 * size.layers * size.width * mean_length * guided_rows
    floor = size.image_length * (weights + cache) / bandwidth
    return {
        "work": "sample",
        "model": size.name,
        "rows": rows,
        "guidance": scale,
        "seconds": round(seconds, 4),
        "ms_per_token": round(1e3 * seconds / size.image_length, 3),
        "tokens_per_second": round(rows * size.image_length / seconds),
        "images_per_second": round(rows / seconds, 1),
        "times_bandwidth_floor": round(seconds / floor, 2),
    }


def tokenize() -> Iterator[Row]:
    """Time the image tokenizer of configs/emoji64, and one for 256 pixels."""
    for name, (config, batch_size) in TOKENIZERS.items():
        for work, run in _tokenizer_works(config, batch_size).items():
            yield {
                "work": f"tokenizer, {work}",
                "model": name,
                "batch": batch_size,
                "images_per_second": round(batch_size / seconds_of(run)),
            }


def _tokenizer_works(config: VQVAEConfig, batch_size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    vqvae = VQVAE(config).to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels = torch.rand(batch_size, 3, *config.pixel_size, device=DEVICE)
    pixels = (2 * pixels - 1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            output = vqvae(pixels)
            loss = reconstruction_loss(output.reconstruction, pixels, wavelet_weight=0.5)
        update(loss, optimizer)

    token_ids = vqvae.encode_to_token_ids(pixels)
    return {
        "encode": partial(vqvae.encode_to_token_ids, pixels),
        "decode": partial(vqvae.decode_from_token_ids, token_ids),
        "train": step,
    }


def main(arguments: list[str]) -> None:
    """Run the parts and write ``gpu.json`` after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench_gpu"))
    parts = ("train", "sample", "tokenize")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    peak, bandwidth = measure_limits()
    limits: Row = {
        "work": "limits",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bf16_tflops": round(peak / 1e12),
        "copy_gb_per_second": round(bandwidth / 1e9),
    }
    print(limits, flush=True)
    rows = [limits]
    runs = {"train": partial(train, peak), "sample": partial(sample, bandwidth)}
    for part in options.parts:
        for row in runs.get(part, tokenize)():
            rows.append(row)
            print(row, flush=True)
            (options.out / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
