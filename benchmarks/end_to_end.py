"""Programs as users run them: from the start of a process, and from a folder of images.

Training runs each program by its own defaults, tokenization included.
"""

import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import ours, peers, timing
from benchmarks.data import DallePytorchFolder, read_json_lines, write_images
from benchmarks.parts import BenchmarkConfig
from benchmarks.sizes import DEMO
from benchmarks.timing import Job, Precision, Result, Variant, interleave
from dalle_mini_impl.data.images import image_to_pixels
from dalle_mini_impl.data.loading import decode_to_fit, load_all_pixels
from dalle_mini_impl.data.pairs import open_pairs
from dalle_mini_impl.data.token_dataset import Variation, build_token_dataset
from dalle_mini_impl.hardware import has_fast_bf16
from dalle_mini_impl.models.dalle_config import DecoderConfig
from dalle_mini_impl.training.config import DataConfig, TextConfig, TrainingConfig
from dalle_mini_impl.training.dalle import DalleRunConfig, train_dalle
from dalle_mini_impl.training.tracking import TrackingConfig
from vqvae import VQVAE, VQVAEConfig

REPOSITORY = Path(__file__).resolve().parents[1]
GENERATE = str(REPOSITORY / "scripts" / "generate.py")
PYTHON = [sys.executable, "-W", "ignore", "-c"]
PROMPT = "red heart"
# What DALLE-pytorch's generate.py does between its imports and the file, without its text
# tokenizer, whose import needs a package that no longer builds.
PEER_GENERATES = """
import numpy, sys, torch
from PIL import Image
from dalle_pytorch import DALLE, DiscreteVAE
saved = torch.load(sys.argv[1])
dalle = DALLE(vae=DiscreteVAE(**saved["vae_params"]), **saved["hparams"])
dalle.load_state_dict(saved["weights"])
image = dalle.generate_images(torch.ones(1, 16, dtype=torch.long), filter_thres=0.9)[0]
pixels = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
Image.fromarray(numpy.ascontiguousarray(pixels)).save(sys.argv[2])
"""

EPOCHS = 20  # DALLE-pytorch's default
NUM_IMAGES = 128
# Defaults of train_vae.py and train_dalle.py at commit 58c1e1a of lucidrains/DALLE-pytorch.
VAE = {"image_size": 128, "num_layers": 3, "num_tokens": 8192}
VAE |= {"codebook_dim": 512, "hidden_dim": 256, "num_resnet_blocks": 2}
DALLE = {"dim": 512, "depth": 2, "heads": 8, "dim_head": 64, "text_seq_len": 256}
DALLE |= {"num_text_tokens": 49408, "shift_tokens": False, "rotary_emb": False}
TOY_VAE = VAE | {"image_size": 32, "num_tokens": 64, "codebook_dim": 16, "hidden_dim": 16}
TOY_DALLE = DALLE | {"dim": 32, "heads": 2, "dim_head": 16}
TOY_DALLE |= {"text_seq_len": 16, "num_text_tokens": 300}
BATCH, LEARNING_RATE, CLIP_NORM = 4, 3e-4, 0.5
STEPS_PER_CALL = 5


def compare_startup(config: BenchmarkConfig) -> list[Result]:
    """Compare seconds from the start of a process to the help text and to the first image."""
    help_command = [sys.executable, GENERATE, "--help"]
    imports = f"{peers.DALLE}: its imports, before it reads a command line"
    import_llama = [*PYTHON, "from transformers import LlamaForCausalLM"]
    import_torch = Variant("import torch", partial(process_job, [*PYTHON, "import torch"]))
    to_help = [
        ours.variant("ours, generate.py --help", partial(process_job, help_command)),
        Variant(imports, lambda: process_job([*PYTHON, stub_code()])),
        Variant(f"{peers.LLAMA}: import of the model", partial(process_job, import_llama)),
        import_torch,
        Variant("python alone", partial(process_job, [*PYTHON, "pass"])),
    ]
    results = interleave("start-up", to_help, "s", config.rounds)
    with tempfile.TemporaryDirectory() as name:
        peer_name = f"{peers.DALLE}, what its generate.py does, without text tokenizer"
        to_image = [
            ours.variant("ours, generate.py", partial(own_image, Path(name))),
            Variant(peer_name, partial(peer_image, Path(name))),
            import_torch,
        ]
        work = "first image from process start, a model of the demo's size"
        results += interleave(work, to_image, "s", config.rounds)
    return results


def process_job(command: Sequence[str], *, output: Path | None = None) -> Job:
    """Run a process to its end; the folder of a file that it must write is emptied before."""

    def run() -> None:
        if output is not None:
            shutil.rmtree(output.parent, ignore_errors=True)  # a program may number its files on
            output.parent.mkdir(parents=True)
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode or (output is not None and not output.is_file()):
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ValueError(lines[-1])

    run()  # also brings the files into the page cache
    return Job(run=run)


def own_image(folder: Path) -> Job:
    """Generate one image with ``generate.py`` and random weights."""
    write_model(folder / "model")
    out = folder / "images"
    command = [sys.executable, GENERATE, "--model", str(folder / "model"), "--prompt", PROMPT]
    command += ["--num-images", "1", "--out", str(out)]
    return process_job(command, output=out / "grid-0000.png")


def write_model(folder: Path, decoder: DecoderConfig | None = None) -> None:
    """Write a model folder with random weights, of the demo's size or with another decoder."""
    torch.manual_seed(0)
    text = TextConfig(vocab_size=DEMO.vocab, text_length=DEMO.text_length)
    dalle, pipeline = ours.build_model(
        VQVAE(VQVAEConfig()), decoder or ours.decoder_config(DEMO), text
    )
    ours.randomize_heads(dalle)
    guided = {"guidance_scale": ours.GUIDANCE_SCALE}
    pipeline.sampling_config = pipeline.sampling_config.override(guided)
    pipeline.save_pretrained(folder)


def peer_image(folder: Path) -> Job:
    """Generate one image with DALLE-pytorch and random weights."""
    dalle_pytorch = peers.import_dalle_pytorch()
    vae = {"image_size": 64, "num_layers": 3, "num_tokens": DEMO.codebook}
    arguments = peers.dalle_arguments(DEMO)
    model = dalle_pytorch.DALLE(vae=dalle_pytorch.DiscreteVAE(**vae), **arguments)
    saved = {"vae_params": vae, "hparams": arguments, "weights": model.state_dict()}
    torch.save(saved, folder / "peer.pt")
    image = folder / "peer" / "peer.png"
    command = [*PYTHON, stub_code() + PEER_GENERATES, str(folder / "peer.pt"), str(image)]
    return process_job(command, output=image)


def stub_code() -> str:
    """Return Python source that imports DALLE-pytorch with stubs, for another process."""
    peers.require("dalle_pytorch")
    # Only what is missing here: an installed package must cost what it costs its users.
    lines = ["import sys, types"]
    for name in peers.missing_modules():
        lines.append(f"sys.modules[{name!r}] = types.ModuleType({name!r})")
        lines += [
            f"sys.modules[{name!r}].{attribute} = type({attribute!r}, (), {{}})"
            for attribute in peers.STUBS[name]
        ]
    return "\n".join([*lines, "import dalle_pytorch"])


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """The options that decide the cost of a training run; by default those of our scripts."""

    vqvae: VQVAEConfig = field(default_factory=VQVAEConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    batch: int = TrainingConfig.global_batch_size


TOY_RUN = WholeRun(
    vqvae=VQVAEConfig(image_size=32, channels=(8, 16)),
    decoder=DecoderConfig(hidden_size=32, num_layers=1, num_heads=2),
    text=TextConfig(vocab_size=300, text_length=8),
    batch=4,
)


def matched_run(vae: dict[str, Any], dalle: dict[str, Any], *, batch: int) -> WholeRun:
    """Translate DALLE-pytorch's arguments: images, tokens, vocabularies, width, depth, heads."""
    codes: dict[str, Any] = {"quantizer": "vq", "vq_codebook_size": vae["num_tokens"]}
    vqvae = VQVAEConfig(image_size=vae["image_size"], **codes)
    layers = {"num_layers": dalle["depth"], "num_heads": dalle["heads"]}
    decoder = DecoderConfig(hidden_size=dalle["dim"], **layers)
    text = TextConfig(vocab_size=dalle["num_text_tokens"], text_length=dalle["text_seq_len"])
    return WholeRun(vqvae=vqvae, decoder=decoder, text=text, batch=batch)


def compare_whole_training(config: BenchmarkConfig) -> list[Result]:
    """Compare training from a folder of images, in images per second."""
    vae, dalle = (TOY_VAE, TOY_DALLE) if config.quick else (VAE, DALLE)
    own = {
        "ours, our defaults": TOY_RUN if config.quick else WholeRun(),
        "ours, DALLE-pytorch's sizes": matched_run(vae, dalle, batch=BATCH),
    }
    precision: Precision = "bfloat16" if has_fast_bf16() else "float32"  # as training chooses
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_images(folder, 24 if config.quick else NUM_IMAGES)
        rows = []
        for words, run in own.items():
            build = partial(own_training, folder, run, epochs=EPOCHS)
            rows.append(ours.variant(words, build, precision=precision, keeps_memory=True))
        for words, matmul in (("as shipped", "highest"), ('matmul "medium"', "medium")):
            options: dict[str, Any] = {"matmul": matmul, "keeps_memory": words != "as shipped"}
            build = partial(peer_training, folder, vae, dalle)
            rows.append(Variant(f"{peers.DALLE}, its defaults, {words}", build, **options))
        results = interleave("training as users run it", rows, "images/s", config.rounds)
        try:
            wait = data_wait(folder, Path(name) / "run", steps=3 if config.quick else 20)
            results[0].note += f"; training waits for data {100 * wait:.2f} % of its time"
        # A remark beside the figures; without it they still count.
        except Exception as error:
            results[0].note += f"; data wait failed: {error}"
    return results


def own_training(folder: Path, run: WholeRun, *, epochs: int) -> Job:
    """Train from a folder: per call one batch read and tokenized, and a step for each epoch."""
    # DALLE-pytorch encodes every image anew in every step, by the discrete VAE that train_vae.py
    # makes by default. Ours reads and encodes each image once: spread over the epochs, that is one
    # batch of such work in every ``epochs`` steps.
    torch.manual_seed(0)
    vqvae = VQVAE(run.vqvae).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    dalle, pipeline = ours.build_model(vqvae, run.decoder, run.text)
    pairs = open_pairs(str(folder))
    pixels, kept, _ = load_all_pixels(pairs, pixel_size=run.vqvae.pixel_size)
    tokens = build_token_dataset(
        [pairs[index] for index in kept],
        pixels,
        vqvae=vqvae,
        text_tokenizer=pipeline.text_tokenizer,
        variation=Variation(),
        cache_dir=folder.parent / "tokens",
    )
    precision: Precision = "bfloat16" if has_fast_bf16() else "float32"
    task = ours.build_dalle_task(tokens, pipeline)
    step = ours.trainer_step(ours.build_trainer(task, batch=run.batch, precision=precision))
    timing.require_falling([step() for _ in range(5)])
    # The trainer reads tokens only; the pixels of one batch are read and encoded in each call.
    size, width, layers = run.vqvae.image_size, run.decoder.hidden_size, run.decoder.num_layers
    length = dalle.config.sequence_length
    flops = timing.count_flops(step) + timing.attention_flops(layers, width, length, run.batch)

    def read(index: int) -> Tensor:
        image = decode_to_fit(pairs.read_image(index), "", run.vqvae.pixel_size)
        return image_to_pixels(image)  # (3, height, width) in [-1, 1]

    def train() -> None:
        first = [read(index) for index in range(min(run.batch, len(pairs)))]
        vqvae.encode_to_token_ids(torch.stack(first))
        for _ in range(epochs):
            step()

    return Job(
        run=train,
        items=run.batch * epochs,
        flops=flops * epochs,
        note=f"{size} px, {width} wide, {layers} layers, batch {run.batch}, {precision}",
    )


def data_wait(folder: Path, out: Path, *, steps: int) -> float:
    """Return the fraction of time in which ``train_dalle`` by default waits for data."""
    VQVAE(VQVAEConfig()).save_pretrained(out / "vqvae")
    config = DalleRunConfig(
        data=DataConfig(source=str(folder)),
        vqvae_dir=str(out / "vqvae"),
        output_dir=str(out / "dalle"),
        training=TrainingConfig(max_steps=steps, log_every_steps=steps),
        tracking=TrackingConfig(mode="disabled"),
    )
    train_dalle(config)
    rows = read_json_lines(out / "dalle" / "metrics.jsonl")
    return next(row[key] for row in rows for key in row if key == "train/data_wait_fraction")


def peer_training(folder: Path, vae: dict[str, Any], dalle: dict[str, Any]) -> Job:
    """Train as DALLE-pytorch's train_dalle.py does on one device, without logging and samples."""
    dalle_pytorch = peers.import_dalle_pytorch()
    torch.manual_seed(0)
    model = dalle_pytorch.DALLE(vae=dalle_pytorch.DiscreteVAE(**vae), **dalle)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    training_images = DallePytorchFolder(folder, side=vae["image_size"])
    loader = DataLoader(training_images, batch_size=BATCH, shuffle=True, drop_last=True)
    # Its own BPE needs a package that no longer builds; random captions cost it nothing.
    text = torch.randint(1, dalle["num_text_tokens"], (BATCH, dalle["text_seq_len"]))

    def step(images: Tensor) -> float:
        loss = model(text.clone(), images, return_loss=True)
        return timing.update(loss, optimizer, max_norm=CLIP_NORM)

    def endless() -> Iterator[Tensor]:
        while True:
            yield from loader

    # Epochs do not end where calls do.
    batches = endless()
    first = next(batches)
    timing.require_falling([step(first) for _ in range(3)])
    flops = timing.count_flops(lambda: step(first))
    flops += timing.attention_flops(dalle["depth"], dalle["dim"], model.total_seq_len, BATCH)
    return Job(
        run=lambda: [step(images) for images in itertools.islice(batches, STEPS_PER_CALL)],
        items=BATCH * STEPS_PER_CALL,
        flops=flops * STEPS_PER_CALL,
        note=f"{vae['image_size']} px, {dalle['dim']} wide, {dalle['depth']} layers",
    )
