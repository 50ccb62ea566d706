"""Other programs of the same kind, each as shipped and at its best.

DALLE-pytorch 1.6.6 can no longer be installed with its dependencies: youtokentome's source
distribution fails to build (lucidrains/DALLE-pytorch issue 457). ``make bench`` installs it without
them, and `STUBS` replaces the three that its import needs and no benchmark calls.
"""

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.sizes import Size, random_pairs
from benchmarks.timing import Job, NotMeasuredError, Precision

# Module -> names that dalle_pytorch 1.6.6 imports from it. OmegaConf and taming serve pretrained
# VQGANs; pkg_resources, which setuptools has dropped, serves its version number.
STUBS: dict[str, tuple[str, ...]] = {
    "omegaconf": ("OmegaConf",),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "pkg_resources": ("get_distribution",),
}
PACKAGES = ("dalle-pytorch", "x-transformers", "transformers", "vector-quantize-pytorch", "torch")
DALLE, X_TRANSFORMERS, LLAMA, GPT2 = "DALLE-pytorch", "x-transformers", "HF Llama", "HF GPT-2"
DECODERS = (DALLE, X_TRANSFORMERS, LLAMA, GPT2)


class Stub:
    """Replaces a class or function of a missing package; raises when it is called."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("a stubbed import was used")


def import_dalle_pytorch() -> Any:
    """Import DALLE-pytorch with stubs; a NotMeasuredError if it is not installed."""
    require("dalle_pytorch")
    for name in missing_modules():
        module = types.ModuleType(name)
        vars(module).update({attribute: Stub for attribute in STUBS[name]})
        sys.modules[name] = module
    import dalle_pytorch

    return dalle_pytorch


def require(package: str) -> None:
    """Raise a NotMeasuredError if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise NotMeasuredError(f"{name} is not installed; make bench installs it")


def missing_modules() -> list[str]:
    """List the modules that are stubbed on this machine, or would be."""
    missing: list[str] = []
    for name in STUBS:
        if name in sys.modules:
            found = sys.modules[name].__spec__ is not None  # a stub has none
        else:
            # Asking for a submodule imports its parent, which may be missing itself.
            parent = name.rpartition(".")[0]
            found = parent not in missing and importlib.util.find_spec(name) is not None
        if not found:
            missing.append(name)
    return missing


def versions() -> dict[str, str]:
    """Return the installed version of each peer."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Decoder:
    """A peer's decoder and its loss."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]  # of the model, compiled or not, on the pairs of its size
    optimizer: torch.optim.Optimizer  # fused AdamW, the same for all


def build_decoder(name: str, size: Size) -> Decoder:
    """Build one of `DECODERS`, ready to train on image tokens."""
    torch.manual_seed(0)
    text, image = random_pairs(size)
    if name == DALLE:
        model = build_dalle(size)

        def loss(net: nn.Module) -> Tensor:
            return net(text, image, return_loss=True)
    else:
        model = build_language_model(name, size)
        targets = torch.cat([text, image + size.vocab], dim=1)
        inputs = F.pad(targets[:, :-1], (1, 0))  # the same number of positions as the others

        def loss(net: nn.Module) -> Tensor:
            output = net(inputs)
            logits = output if isinstance(output, Tensor) else output.logits
            # A float32 softmax, as in ours, whatever the precision of the products.
            return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    # DALLE-pytorch holds its image VAE too, frozen.
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), fused=True)
    return Decoder(model, loss, optimizer)


def build_dalle(size: Size) -> Any:
    """Build DALLE-pytorch's decoder with its class defaults (rotary, token shift, GEGLU)."""
    dalle_pytorch = import_dalle_pytorch()
    # The smallest discrete VAE that it accepts: only tokens are compared.
    widths = {"num_layers": 3, "codebook_dim": 16, "hidden_dim": 16}
    vae = dalle_pytorch.DiscreteVAE(image_size=size.grid * 8, num_tokens=size.codebook, **widths)
    return dalle_pytorch.DALLE(vae=vae, **dalle_arguments(size))


def dalle_arguments(size: Size) -> dict[str, int]:
    """Translate a size to arguments of ``DALLE``."""
    return {
        "dim": size.width,
        "depth": size.layers,
        "heads": size.heads,
        "dim_head": size.head_dim,
        "num_text_tokens": size.vocab,
        "text_seq_len": size.text_length,
    }


def build_language_model(name: str, size: Size) -> Any:
    """Build x-transformers', Llama's or GPT-2's decoder over one vocabulary for both modalities."""
    # All without dropout and with torch's fused attention, as ours.
    require("x_transformers" if name == X_TRANSFORMERS else "transformers")
    vocab = size.vocab + size.codebook
    if name == X_TRANSFORMERS:
        import x_transformers

        layers = x_transformers.Decoder(
            dim=size.width,
            depth=size.layers,
            heads=size.heads,
            attn_dim_head=size.head_dim,
            attn_flash=True,
            rotary_pos_emb=True,
        )
        return x_transformers.TransformerWrapper(
            num_tokens=vocab, max_seq_len=size.length, attn_layers=layers
        )
    import transformers

    # No end token: every image is generated to its end.
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options: dict[str, Any] = {"attn_implementation": "sdpa", "vocab_size": vocab, **no_tokens}
    if name == LLAMA:
        config: Any = transformers.LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.length,
            **options,
        )
        return transformers.LlamaForCausalLM(config)
    options |= {"n_embd": size.width, "n_layer": size.layers, "n_head": size.heads}
    options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(n_positions=size.length, **options)
    return transformers.GPT2LMHeadModel(config)


def decoder_training(
    build: Callable[[], Decoder], size: Size, precision: Precision, *, compiled: bool
) -> Job:
    """Train a peer's decoder on random tokens, one step per call; items are tokens."""
    decoder = build()

    def step(net: Any = decoder.model) -> float:
        with timing.autocast(precision):
            loss = decoder.loss(net)
        return timing.update(loss, decoder.optimizer, max_norm=1.0)

    # Counted before torch.compile: a model compiled under the counter would stay eager.
    flops = timing.count_flops(step)
    flops += timing.attention_flops(size.layers, size.width, size.length, size.batch)
    net = torch.compile(decoder.model, dynamic=False) if compiled else decoder.model
    run = partial(step, net)
    timing.require_training(run, steps=3, compiled=compiled)
    return Job(run=run, items=size.tokens, flops=flops)


def linear_weights(model: nn.Module) -> list[Tensor]:
    """Collect the matrices that multiply every token, those of an image VAE excluded."""
    return [
        part.weight
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "vae" not in name.split(".")
    ]
