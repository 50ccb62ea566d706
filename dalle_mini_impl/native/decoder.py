"""The compiled pass of ``decoder.cpp``, with the methods of ``Dalle`` that generation calls.

float32 gives torch's numbers except for the last digits. int8 rounds each weight to 8 bits, with
one scale per output, and each row of inputs, with one scale per row and product (LLM.int8 of
Dettmers et al. 2022, arXiv:2208.07339, section 2, without its outliers, of which QK-norm leaves
few). In both, a row's numbers do not depend on the rest of its batch, bit for bit.
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
CACHE_LINE = 64  # bytes
KNOWN_FIELDS = ("hidden_size", "num_layers", "num_heads", "dropout_probability", "positions")


# The structures of decoder.cpp, field by field.
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("weights", _POINTER),
        ("scales", _POINTER),
        ("starts", _POINTER),
        ("inputs", _INTEGER),
        ("panels", _INTEGER),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _POINTER),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
        ("feed_forward_norm", _POINTER),
        ("query_key_value", _Matrix),
        ("attention_output", _Matrix),
        ("gate_value", _Matrix),
        ("feed_forward_output", _Matrix),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("hidden", _INTEGER),
        ("num_heads", _INTEGER),
        ("num_layers", _INTEGER),
        ("intermediate", _INTEGER),
        ("layers", ctypes.POINTER(_Layer)),
        ("output_norm", _POINTER),
        ("head", _Matrix),
        ("cosines", _POINTER),
        ("sines", _POINTER),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("images", _INTEGER),
        ("length", _INTEGER),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("count", _INTEGER),
        ("hidden", _POINTER),
        ("images", _POINTER),
        ("positions", _POINTER),
        ("cells", _POINTER),
        ("num_logits", _INTEGER),
        ("logit_rows", _POINTER),
        ("logits", _POINTER),
    )


class NativeDecoder:
    """A decoder's weights, packed once, and the compiled pass over them.

    Later changes of the model, which is on the CPU, do not reach it. Raises UnavailableError if
    this machine or this model has no compiled pass.
    """

    def __init__(self, model: TextToImageModel, weights: NativeWeights) -> None:
        # Checked first: a model that is not supported needs no compilation.
        model = _supported(model)
        self._library = load_library()
        self.config, self.weights = model.config, weights
        self._memory, self._used = _reserve(model), 0
        with torch.inference_mode():
            self._embedder = _with_plain_table(model)
            blocks = [block for block in model.blocks if isinstance(block, TransformerBlock)]
            self._layers = (_Layer * len(blocks))(*map(self._layer, blocks))
            cosines, sines = _rotation_tables(model)
            decoder = model.config.decoder
            self._decoder = _Decoder(
                decoder.hidden_size,
                decoder.num_heads,
                decoder.num_layers,
                decoder.intermediate_size,
                self._layers,
                self._keep(model.output_norm.weight),
                self._matrix([model.image_head.table()]),
                self._keep(cosines),
                self._keep(sines),
            )

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """Reserve a cache for this decoder only: its inner order is decoder.cpp's own."""
        decoder = self.config.decoder
        return KeyValueCache(
            num_layers=decoder.num_layers,
            batch_size=batch_size,
            num_heads=decoder.num_heads,
            # Keys lie in panels of 64 positions, which products read whole.
            max_length=_whole_panels(self.config.sequence_length),
            head_dim=decoder.head_dim,
            dtype=torch.float32 if self.weights == "float32" else torch.bfloat16,
        )

    @torch.inference_mode()
    def prefill(
        self,
        text_token_ids: Int[Tensor, "batch text_length"],
        cache: KeyValueCache,
        *,
        image_order: Int[Tensor, "batch image_length"] | None = None,
    ) -> Float[Tensor, "batch codebook_size"]:
        """Read the captions as ``Dalle.prefill`` does, each different one once."""
        first_cell = torch.zeros_like(text_token_ids[:, :1])
        if image_order is not None:
            first_cell = image_order[:, :1]
        # Guidance repeats the null caption for every image, and candidates repeat a prompt: read
        # each different row once, and copy its part of the cache to the others.
        inputs = torch.cat([text_token_ids, first_cell], dim=1)  # all that a prefill depends on
        different, group = torch.unique(inputs, dim=0, return_inverse=True)
        length = self.config.text_length + 1
        positions = torch.arange(length)
        cells = torch.full_like(positions, self.config.image_length)  # the angle of text: zero
        logits, sources = [], []
        for index, row in enumerate(different):
            source = int((group == index).nonzero()[0])
            hidden_states = self._embedder.embed_text(row[None, :-1], row[-1:])
            # Written where the first row with these inputs is; its copies follow below.
            images = torch.full_like(positions, source)
            logits.append(
                self._decode(hidden_states[0], cache, images, positions, cells, positions[-1:])
            )
            sources.append(source)
        source_of_row = torch.tensor(sources)[group] if sources else group
        rows = torch.arange(len(group))
        copies = rows[source_of_row != rows]
        # Positions are interleaved in a panel, so that whole panels are copied. What lies behind
        # the caption is overwritten before it is read.
        end = _whole_panels(length)
        for part in (cache.keys, cache.values):
            part[:, copies, :, :end] = part[:, source_of_row[copies], :, :end]
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
        """Predict the token after each token of a window, as ``Dalle.decode_window`` does."""
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
        """Compute the noise of ``sampling.logits.gumbel_noise``, the very same numbers."""
        uniform = torch.empty(len(seeds), vocab_size)
        seeds, steps = seeds.contiguous(), steps.contiguous()
        self._library.uniforms(
            _POINTER(seeds.data_ptr()),
            _POINTER(steps.data_ptr()),
            _INTEGER(len(seeds)),
            _INTEGER(vocab_size),
            _POINTER(uniform.data_ptr()),
            torch.get_num_threads(),
        )
        # In place, as gumbel_noise computes it: the same operations give the same bits.
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
        # Named, so that the numbers outlive their addresses.
        images, positions, cells = images.int(), positions.int(), cells.int()
        logit_rows = logit_rows.int()
        rows = _Rows(
            len(hidden_states),
            hidden_states.data_ptr(),
            images.data_ptr(),
            positions.data_ptr(),
            cells.data_ptr(),
            len(logit_rows),
            logit_rows.data_ptr(),
            logits.data_ptr(),
        )
        memory = _Cache(
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.keys.shape[3]
        )
        decoder, num_threads = ctypes.byref(self._decoder), torch.get_num_threads()
        self._library.decode(decoder, ctypes.byref(memory), ctypes.byref(rows), num_threads)
        return logits[:, : self.config.codebook_size]

    def _layer(self, block: TransformerBlock) -> _Layer:
        def matrix(*names: str) -> _Matrix:
            return self._matrix([block.get_parameter(f"{name}.weight") for name in names])

        def norm(name: str) -> int:
            return self._keep(block.get_parameter(f"{name}.weight"))

        return _Layer(
            norm("attention_norm"),
            norm("attention.query_norm"),
            norm("attention.key_norm"),
            norm("feed_forward_norm"),
            matrix("attention.query", "attention.key", "attention.value"),
            matrix("attention.output"),
            matrix("feed_forward.gate", "feed_forward.value"),
            matrix("feed_forward.output"),
        )

    def _keep(self, tensor: Tensor) -> int:
        """Copy a tensor into the reserved memory and return its address there."""
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        kept = self._memory[self._used : self._used + len(flat)]
        kept.copy_(flat)
        self._used += -(-len(flat) // CACHE_LINE) * CACHE_LINE  # so that no vector crosses one
        return kept.data_ptr()

    def _matrix(self, parts: Iterable[Tensor]) -> _Matrix:
        """Pack the weights of products that share their inputs, in the order of decoder.cpp."""
        weights = torch.cat([part.detach() for part in parts])
        num_panels = _whole_panels(len(weights)) // PANEL
        weights = nn.functional.pad(weights, (0, 0, 0, num_panels * PANEL - len(weights)))
        num_inputs = weights.shape[1]
        if self.weights == "float32":
            packed = weights.view(num_panels, PANEL, num_inputs).transpose(1, 2)
            return _Matrix(self._keep(packed), None, None, num_inputs, num_panels)
        # Inputs are stored plus 128, since the processor multiplies unsigned by signed bytes; each
        # output starts at -128 times the sum of its weights, which takes that back.
        scales = weights.abs().amax(dim=1).clamp_min(1e-30) / 127
        rounded = (weights / scales.unsqueeze(1)).round()
        packed = rounded.to(torch.int8).view(num_panels, PANEL, num_inputs // 4, 4).transpose(1, 2)
        starts = (-128 * rounded.sum(dim=1)).int()
        addresses = (self._keep(packed), self._keep(scales), self._keep(starts))
        return _Matrix(*addresses, num_inputs, num_panels)


def _whole_panels(count: int) -> int:
    return -(-count // PANEL) * PANEL


def _rotation_tables(model: Dalle) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every grid cell; a last row of angle zero is for text."""
    cells = torch.arange(model.config.image_length).unsqueeze(0)
    shape = (cells.numel() + 1, model.config.decoder.head_dim // 2)
    cosines, sines = torch.ones(shape), torch.zeros(shape)
    rotation = model.rotation(cells, num_text_positions=0)
    if rotation is not None:
        cosines[:-1] = rotation.cosine.flatten(0, 2)
        sines[:-1] = rotation.sine.flatten(0, 2)
    return cosines, sines


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
    """Return the model if decoder.cpp has all of its parts; else raise UnavailableError."""
    if not isinstance(model, Dalle):
        raise UnavailableError(f"not made for a {type(model).__name__}")
    decoder = model.config.decoder
    # A new option of the decoder is refused until it is listed here.
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
    """Share the model's embeddings, with the factorized rows of image tokens summed once."""
    embedder = copy.copy(model)
    # A table of modules of its own: the new embedding must not reach the caller's model.
    embedder._modules = dict(model._modules)
    table = FactorizedEmbedding((model.config.codebook_size,), model.config.decoder.hidden_size)
    table.rows = nn.Parameter(model.image_embedding.table().detach(), requires_grad=False)
    embedder.image_embedding = table
    return embedder
