"""The decoder's pass as ``decoder.cpp`` computes it, behind the methods that generation calls.

float32 gives torch's numbers but for the last digits. int8 rounds each weight to 8 bits, with one
scale per output, and each row of inputs, with one scale per row and product (LLM.int8 of Dettmers
et al. 2022, arXiv:2208.07339, section 2, without its outliers, of which QK-norm leaves few). In
both, a row's numbers are the same bit for bit whatever is computed beside it.
"""

import contextlib
import copy
import ctypes
import dataclasses
import mmap
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_mini_impl.models.dalle import Dalle
from dalle_mini_impl.models.dalle_shared import FactorizedEmbedding, steps_and_cells
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.build import UnavailableError, load_library
from dalle_mini_impl.transformer.blocks import TransformerBlock
from dalle_mini_impl.transformer.feed_forward import GatedFeedForward
from dalle_mini_impl.transformer.key_value_cache import KeyValueCache

NativeWeights = Literal["float32", "int8"]
LANES, PANEL = 16, 64  # of decoder.cpp
KNOWN_FIELDS = ("hidden_size", "num_layers", "num_heads", "dropout_probability", "positions")


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "starts")),
        *((name, ctypes.c_int64) for name in ("inputs", "panels")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((f"{name}_norm", ctypes.c_void_p) for name in ("attention", "query", "key", "feed")),
        *((name, _Matrix) for name in ("qkv", "attention_output", "gate_value", "feed_output")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "layers", "intermediate")),
        ("blocks", ctypes.POINTER(_Layer)),
        ("output_norm", ctypes.c_void_p),
        ("head", _Matrix),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("images", "length")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "images", "positions", "cells")),
        ("num_logits", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logit_rows", "logits")),
    )


class NativeDecoder:
    """A decoder's weights, packed once, and the compiled pass over them."""

    def __init__(self, model: TextToImageModel, weights: NativeWeights) -> None:
        """Compile the pass if need be and pack the weights; later changes of the model are missed.

        Args:
            model: On the CPU.
            weights: What they are packed as.

        Raises:
            UnavailableError: If this machine or this model goes without.
        """
        model = _supported(model)
        self._library = load_library()
        self.config, self.weights = model.config, weights
        self._memory, self._used = _reserve(model), 0
        with torch.inference_mode():
            self._embedder = _with_plain_table(model)
            blocks = [block for block in model.blocks if isinstance(block, TransformerBlock)]
            self._layers = (_Layer * len(blocks))(*map(self._layer, blocks))
            cells = torch.arange(model.config.image_length).unsqueeze(0)
            rotation = model.rotation(cells, num_text_positions=0)
            half = model.config.decoder.head_dim // 2
            cosines, sines = (
                torch.ones(cells.numel() + 1, half),
                torch.zeros(cells.numel() + 1, half),
            )
            if rotation is not None:  # the last row stays without angle, for captions
                cosines[:-1], sines[:-1] = (
                    rotation.cosine.flatten(0, 2),
                    rotation.sine.flatten(0, 2),
                )
            decoder = model.config.decoder
            self._decoder = _Decoder(
                decoder.hidden_size, decoder.num_heads, decoder.num_layers,
                decoder.intermediate_size, self._layers, self._keep(model.output_norm.weight),
                self._matrix([model.image_head.table()]), self._keep(cosines), self._keep(sines),
            )  # fmt: skip

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Reserve a cache, whose inner order is decoder.cpp's own.

        Args:
            batch_size: Rows.

        Returns:
            The cache, for this decoder's methods only.
        """
        decoder = self.config.decoder
        return KeyValueCache(
            num_layers=decoder.num_layers,
            batch_size=batch_size,
            num_heads=decoder.num_heads,
            max_length=-(-(self.config.sequence_length) // PANEL) * PANEL,
            head_dim=decoder.head_dim,
            dtype=torch.float32 if self.weights == "float32" else torch.bfloat16,
        )

    @torch.inference_mode()
    def prefill(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        cache: KeyValueCache,
        *,
        first_cell: int | Int[Tensor, " batch"] = 0,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Read the captions into an empty cache, each different one once.

        Args:
            text_token_ids: Captions, padded.
            cache: Empty; holds the captions afterwards.
            first_cell: Grid cell that is generated first, of all rows or of each.

        Returns:
            Logits of the first image token.
        """
        first = torch.as_tensor(first_cell).expand(len(text_token_ids))
        told = torch.cat([text_token_ids, first.unsqueeze(1)], dim=1)
        different, group = torch.unique(told, dim=0, return_inverse=True)
        length = self.config.text_length + 1
        positions = torch.arange(length)
        cells = torch.full_like(positions, self.config.image_length)
        logits, sources = [], []
        for index, row in enumerate(different):
            source = int((group == index).nonzero()[0])
            hidden_states = self._embedder.embed_text(row[None, :-1], row[-1:])
            images = torch.full_like(positions, source)
            logits.append(
                self._decode(hidden_states[0], cache, images, positions, cells, positions[-1:])
            )
            sources.append(source)
        copied = torch.tensor(sources)[group] if sources else group
        shared = torch.arange(len(group))[copied != torch.arange(len(group))]
        end = -(-length // PANEL) * PANEL  # keys lie in whole panels
        for part in (cache.keys, cache.values):
            part[:, shared, :, :end] = part[:, copied[shared], :, :end]
        return torch.cat(logits)[group]

    @torch.inference_mode()
    def decode_window(
        self,
        image_token_ids: Int[Tensor, "batch window"],
        cache: KeyValueCache,
        *,
        first_steps: Int[Tensor, " batch"],
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch window codebook_size"]:
        """Predict what follows each of several tokens, as ``Dalle.decode_window`` does.

        Args:
            image_token_ids: Tokens of consecutive steps.
            cache: Holds the caption and every earlier image token of each row.
            first_steps: Step of each row's first token.
            image_order: Grid cell of each step; raster order when None.

        Returns:
            Logits of the token of the next step after each one.
        """
        batch, window = image_token_ids.shape
        steps, cells, next_cells = steps_and_cells(first_steps, image_token_ids, image_order)
        hidden_states = self._embedder.embed_image(image_token_ids, cells, next_cells)
        rows = torch.arange(batch * window)
        logits = self._decode(
            hidden_states.flatten(0, 1),
            cache,
            rows // window,
            (steps + (self.config.text_length + 1)).flatten(),
            cells.flatten(),
            rows,
        )
        return logits.unflatten(0, (batch, window))

    def gumbel_noise(
        self, seeds: Int[Tensor, " batch"], *, steps: Int[Tensor, "batch 1"], vocab_size: int
    ) -> Float[Tensor, "batch vocab"]:
        """Generate the noise of ``sampling.logits.gumbel_noise``, the very same numbers.

        Args:
            seeds: One per row.
            steps: Index of each row's token.
            vocab_size: Number of different tokens.

        Returns:
            Standard Gumbel noise.
        """
        uniform = torch.empty(len(seeds), vocab_size)
        seeds, steps = seeds.contiguous(), steps.contiguous()
        self._library.uniforms(
            *(ctypes.c_void_p(each.data_ptr()) for each in (seeds, steps)),
            *(ctypes.c_int64(each) for each in uniform.shape),
            ctypes.c_void_p(uniform.data_ptr()),
            torch.get_num_threads(),
        )
        return uniform.log_().neg_().log_().neg_()

    def _decode(
        self,
        hidden_states: Float[Tensor, "rows hidden"],
        cache: KeyValueCache,
        images: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
        cells: Int[Tensor, " rows"],
        logit_rows: Int[Tensor, " logit_rows"],
    ) -> Float[Tensor, "logit_rows codebook_size"]:
        logits = torch.empty(len(logit_rows), self._decoder.head.panels * PANEL)
        hidden_states = hidden_states.contiguous()
        numbers = [each.int() for each in (images, positions, cells, logit_rows)]
        rows = _Rows(
            len(hidden_states), hidden_states.data_ptr(),
            *(each.data_ptr() for each in numbers[:3]), len(logit_rows), numbers[3].data_ptr(),
            logits.data_ptr(),
        )  # fmt: skip
        memory = _Cache(
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.keys.shape[3]
        )
        self._library.decode(
            ctypes.byref(self._decoder), ctypes.byref(memory), ctypes.byref(rows),
            torch.get_num_threads(),
        )  # fmt: skip
        return logits[:, : self.config.codebook_size]

    def _layer(self, block: TransformerBlock) -> _Layer:
        def matrix(*names: str) -> _Matrix:
            return self._matrix([block.get_parameter(f"{name}.weight") for name in names])

        norms = ("attention_norm", "attention.query_norm", "attention.key_norm",
                 "feed_forward_norm")  # fmt: skip
        return _Layer(
            *(self._keep(block.get_parameter(f"{name}.weight")) for name in norms),
            matrix("attention.query", "attention.key", "attention.value"),
            matrix("attention.output"),
            matrix("feed_forward.gate", "feed_forward.value"),
            matrix("feed_forward.output"),
        )

    def _keep(self, tensor: Tensor) -> int:
        """Copy a tensor to where the structures point and return its address."""
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        kept = self._memory[self._used : self._used + len(flat)]
        kept.copy_(flat)
        self._used += -(-len(flat) // 64) * 64  # a vector never lies across two cache lines
        return kept.data_ptr()

    def _matrix(self, parts: Iterable[Tensor]) -> _Matrix:
        """Pack the weights of products that share their inputs, as decoder.cpp wants them."""
        weights = torch.cat([part.detach() for part in parts])
        num_panels = -(-len(weights) // PANEL)
        weights = nn.functional.pad(weights, (0, 0, 0, num_panels * PANEL - len(weights)))
        num_inputs = weights.shape[1]
        if self.weights == "float32":
            packed = weights.view(num_panels, PANEL, num_inputs).transpose(1, 2)
            return _Matrix(self._keep(packed), None, None, num_inputs, num_panels)
        scales = weights.abs().amax(dim=1).clamp_min(1e-30) / 127
        rounded = (weights / scales.unsqueeze(1)).round()
        packed = rounded.to(torch.int8).view(num_panels, PANEL, num_inputs // 4, 4).transpose(1, 2)
        starts = (-128 * rounded.sum(dim=1)).int()
        addresses = (self._keep(packed), self._keep(scales), self._keep(starts))
        return _Matrix(*addresses, num_inputs, num_panels)


def _reserve(model: Dalle) -> Tensor:
    # More than the weights need: memory is taken as it is used. In one piece, because large pages,
    # which Linux gives on request, made reading it a quarter faster.
    config = model.config
    largest = config.codebook_size + PANEL + 5 * config.image_length
    numbers = sum(part.numel() for part in model.blocks.parameters())
    numbers += largest * config.decoder.hidden_size + 4 * PANEL * len(model.blocks) * (
        config.decoder.hidden_size + config.decoder.intermediate_size
    )
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(4 * numbers, dtype=torch.uint8)
    pages = mmap.mmap(-1, 4 * numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _supported(model: TextToImageModel) -> Dalle:
    """Return the model if decoder.cpp knows all that it is made of, and refuse it if not."""
    if not isinstance(model, Dalle):
        raise UnavailableError(f"not made for a {type(model).__name__}")
    decoder = model.config.decoder
    for field in dataclasses.fields(decoder):
        if field.name not in KNOWN_FIELDS and getattr(decoder, field.name) != field.default:
            value = getattr(decoder, field.name)
            raise UnavailableError(f"not made for a decoder with {field.name} {value!r}")
    if decoder.head_dim % LANES:
        raise UnavailableError(f"heads of {decoder.head_dim}, expected a multiple of {LANES}")
    weight = model.text_head.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise UnavailableError(f"weights are {weight.dtype} on {weight.device}")
    for block in model.blocks:
        if not (
            isinstance(block, TransformerBlock)
            and block.is_pre_norm
            and not block.has_cross_attention
            and isinstance(block.feed_forward, GatedFeedForward)
            and isinstance(block.attention.query_norm, nn.LayerNorm)
            and not any(name.endswith("bias") for name, _ in block.named_parameters())
        ):
            raise UnavailableError("not made for blocks with these options")
    return model


def _with_plain_table(model: Dalle) -> Dalle:
    """Share the model's embeddings, but with the rows of image tokens added up once for all."""
    embedder = copy.copy(model)
    embedder._modules = dict(model._modules)
    table = FactorizedEmbedding((model.config.codebook_size,), model.config.decoder.hidden_size)
    table.rows = nn.Parameter(model.image_embedding.table().detach(), requires_grad=False)
    embedder.image_embedding = table
    return embedder
