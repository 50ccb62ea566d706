"""From a prompt to images: what ``from_pretrained`` returns and a user calls.

>>> pipeline = TextToImagePipeline.from_pretrained("out/emoji64/dalle/model")
>>> pipeline("a red heart", num_images=4, seed=0).images[0].save("heart.png")
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dalle_mini_impl.data.images import image_to_pixels, pixels_to_images, resize_and_crop, to_rgb
from dalle_mini_impl.data.inpainting_mask import build_inpainting_mask, paste_back
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.model_folder import (
    FORMAT_VERSION,
    HASHED_FILES,
    INDEX_NAME,
    MODEL_CARD,
    OTHER_FILES,
    _load_dalle,
    _read_index,
    _write_json,
    file_hashes,
)
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.native.build import UnavailableError
from dalle_mini_impl.native.decoder import NativeDecoder, NativeWeights
from dalle_mini_impl.sampling.generate import GeneratedTokens, generate_image_token_ids
from dalle_mini_impl.sampling.inpaint import (
    inpaint_image_token_ids,
    inpainting_order,
    is_raster_order,
)
from dalle_mini_impl.sampling.likelihood import log_likelihood_ratio
from dalle_mini_impl.sampling.rerank import ImageRanker, best_of
from dalle_mini_impl.sampling.sampler import SamplingConfig
from vqvae.image_tokenizer import ImageTokenizer
from vqvae.pretrained.load import load_tokenizer
from vqvae.serialization import (
    build_config,
    own_file,
    save_weights,
)

Rank = ImageRanker | Literal["likelihood", "none"]
MAX_SEED = 2**63 - 1
logger = logging.getLogger(__name__)
MAX_PROMPT_LENGTH = 100_000  # characters; they are kept in every image's file


@dataclass(frozen=True)
class PipelineOutput:
    """Images of one call, prompt by prompt."""

    images: list[Image.Image]
    prompts: list[str]
    """The prompt of each image."""
    seeds: list[int]
    """The seed of each image: with its prompt, the settings and no other candidates it makes the
    image again."""
    scores: list[float]
    """log p(image | prompt) - log p(image) of each image in nats; 0 where it was not needed. The
    scores of the call's ranker, if it had one."""


class TextToImagePipeline:
    """Caption tokenizer, decoder and image tokenizer in one."""

    def __init__(
        self,
        *,
        dalle: TextToImageModel,
        vqvae: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        sampling_config: SamplingConfig | None = None,
        generates_any_order: bool = False,
    ) -> None:
        """Put the three parts together.

        Args:
            dalle: The decoder.
            vqvae: The image tokenizer that it was trained on.
            text_tokenizer: The caption tokenizer that it was trained on.
            sampling_config: How tokens are generated unless a call says otherwise.
            generates_any_order: Whether the decoder was trained in random order up to the end, so that
                ``inpaint`` may inpaint any part of an image.

        Raises:
            ValueError: If the parts do not fit each other.
        """
        expected = (dalle.config.codebook_levels, dalle.config.image_grid_size)
        parts = (vqvae.codebook_levels, vqvae.image_grid_size)
        if parts != expected:
            raise ValueError(f"vqvae: codebook and grid are {parts}, the decoder wants {expected}")
        for name in ("text_length", "vocab_size"):
            got, required = getattr(text_tokenizer, name), getattr(dalle.config, name)
            if got != required:
                raise ValueError(f"captions: {name} is {got}, the decoder wants {required}")
        if generates_any_order and dalle.config.decoder.raster_order_only:
            raise ValueError(
                "generates_any_order: got true, but the decoder generates raster order only"
            )
        self.dalle, self.vqvae, self.text_tokenizer = dalle, vqvae, text_tokenizer
        self.native: NativeDecoder | None = None
        self.sampling_config = sampling_config or SamplingConfig()
        self.generates_any_order = generates_any_order

    def to(self, device: torch.device | str) -> "TextToImagePipeline":
        """Move both models.

        Args:
            device: For example ``cpu`` or ``cuda``.

        Returns:
            The pipeline itself.
        """
        self.dalle.to(device)
        self.vqvae.to(device)
        if torch.device(device).type != "cpu":
            self.native = None
        return self

    def use_native(self, weights: NativeWeights) -> bool:
        """Generate with a compiled pass of the decoder from now on, where that is possible.

        The first time on a machine it is compiled, with the system's C++ compiler, which takes some
        ten seconds. Where it cannot be had, a logged line says why, and generation stays as it is. The
        decoder's weights are copied: call this again after they change.

        Args:
            weights: ``float32`` generates what plain torch generates, but for the last digit of sums;
                ``int8`` rounds weights to 8 bits and is faster.

        Returns:
            Whether it is used.
        """
        try:
            self.native = NativeDecoder(self.dalle, weights)
        except UnavailableError as error:
            self.native = None
            logger.warning("generating with plain torch: %s", error)
        return self.native is not None

    @property
    def native_metadata(self) -> dict[str, Any]:
        """What to keep beside an image: ``native`` and its weights; nothing if torch generates."""
        return {"native": self.native.weights} if self.native else {}

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        num_candidates: int = 1,
        rank: Rank = "likelihood",
        **overrides: Any,
    ) -> PipelineOutput:
        """Generate images.

        Image k of every prompt has seed ``seed + k``, so that it is the same image whatever else
        is generated in the same call. With candidates, it is the best of the ``num_candidates`` seeds
        from ``seed + k * num_candidates`` on.

        Args:
            prompt: One prompt, or several.
            num_images: Images per prompt.
            seed: Of the first image of each prompt.
            num_candidates: Images generated for each one that is kept.
            rank: Which one is kept: with ``likelihood`` that of the largest caption gain, with
                ``none`` the first, so that the others need not be generated; else the one that this
                object scores highest, such as a ``clip_ranker.ClipRanker``.
            **overrides: Fields of ``SamplingConfig`` for this call, such as ``guidance_scale``.

        Returns:
            ``num_images`` images per prompt, in order.

        Raises:
            UserError: If a prompt is empty, or a number is out of range.
        """
        prompts = _as_list(prompt)
        self.check(prompts, num_images=num_images, num_candidates=num_candidates, seed=seed)
        sampling_config = self.resolve_sampling_config(overrides)

        def generate_tokens(text_token_ids: torch.Tensor, seeds: torch.Tensor) -> GeneratedTokens:
            return generate_image_token_ids(
                self.native or self.dalle,
                text_token_ids,
                seeds=seeds,
                sampling_config=sampling_config,
            )

        seeds = torch.arange(seed, seed + num_images * num_candidates)
        if rank == "none":
            seeds = seeds[::num_candidates]
        return self._generate(
            prompts, seeds.repeat(len(prompts)), generate_tokens, num_images, sampling_config, rank
        )

    @torch.inference_mode()
    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Image.Image,
        *,
        mask: Image.Image | None = None,
        keep_rows: int | None = None,
        keep_fraction: float | None = None,
        num_images: int = 1,
        seed: int = 0,
        num_candidates: int = 1,
        **overrides: Any,
    ) -> PipelineOutput:
        """Inpaint a part of an image; give exactly one of mask, keep_rows and keep_fraction.

        Prompts, seeds and candidates are as in a plain call. The image is scaled and cropped to
        the model's square. With a mask or with rows, every pixel that is not inpainted is the
        image's own; a variation by share is sampled as a whole from the tokens that stay and the
        new ones.

        Args:
            prompt: What the whole image shall show; one prompt, or several.
            image: The image.
            mask: As large as the image, white where it is inpainted. Every token's patch that white
                touches is generated anew.
            keep_rows: Rows of tokens at the top that stay.
            keep_fraction: Fraction of the tokens that stay, in (0, 1); each seed keeps others.
            num_images: Images per prompt.
            seed: Of the first image of each prompt.
            num_candidates: Images generated for each one that is kept.
            **overrides: Fields of ``SamplingConfig`` for this call.

        Returns:
            ``num_images`` images per prompt, in order. Scores count the inpainted tokens alone.

        Raises:
            UserError: If a value is out of range, or the decoder cannot inpaint this part.
        """
        prompts = _as_list(prompt)
        self.check(prompts, num_images=num_images, num_candidates=num_candidates, seed=seed)
        sampling_config = self.resolve_sampling_config(overrides)
        size, grid = self.vqvae.config.image_size, self.vqvae.image_grid_size
        source_image, device = to_rgb(image), self.dalle.image_head.rows.device
        seeds = torch.arange(seed, seed + num_images * num_candidates).repeat(len(prompts))
        inpainting_mask = build_inpainting_mask(
            mask=mask, keep_rows=keep_rows, keep_fraction=keep_fraction, source_size=source_image.size,
            size=size, grid=grid, seeds=seeds.tolist(),
        )  # fmt: skip
        is_masked = inpainting_mask.is_masked.to(device)
        if not self.generates_any_order and not is_raster_order(inpainting_order(is_masked)):
            field = "mask" if keep_fraction is None else "keep_fraction"
            raise UserError(
                f"{field}: something stays after the first inpainted token, and this model generates "
                "from the top left to the bottom right only; expected keep_rows, or a model trained "
                "with --task.random_order_probability above 0 and --task.augmentation_ends_at 1.0"
            )
        image_token_ids = self.encode([source_image])

        def generate_tokens(text_token_ids: torch.Tensor, seeds: torch.Tensor) -> GeneratedTokens:
            return inpaint_image_token_ids(
                self.native or self.dalle, text_token_ids,
                image_token_ids.expand(len(seeds), -1), is_masked, seeds=seeds, sampling_config=sampling_config,
            )  # fmt: skip

        output = self._generate(prompts, seeds, generate_tokens, num_images, sampling_config)
        if inpainting_mask.shown is None:
            return output
        images = [paste_back(each, source_image, inpainting_mask.shown) for each in output.images]
        return dataclasses.replace(output, images=images)

    def _generate(
        self,
        prompts: list[str],
        seeds: torch.Tensor,
        generate_tokens: Callable[[torch.Tensor, torch.Tensor], GeneratedTokens],
        num_images: int,
        sampling_config: SamplingConfig,
        rank: Rank = "likelihood",
    ) -> PipelineOutput:
        """Generate captions and seeds, as many for each prompt, and keep the best candidates."""
        per_prompt = len(seeds) // len(prompts)
        text_token_ids = self.text_tokenizer.encode(prompts).to(self.dalle.image_head.rows.device)
        text_token_ids = text_token_ids.repeat_interleave(per_prompt, dim=0)
        was_training = self.dalle.training
        self.dalle.eval()
        generated = generate_tokens(text_token_ids, seeds)
        if isinstance(rank, str):
            images = None
            scores = self._log_likelihood_ratios(
                generated, text_token_ids, per_prompt // num_images, sampling_config
            )
        else:
            images = self.decode(generated.image_token_ids)
            scores = rank.score(images, [text for text in prompts for _ in range(per_prompt)])
        self.dalle.train(was_training)
        kept = best_of(scores, num_candidates=per_prompt // num_images)
        return PipelineOutput(
            images=[images[index] for index in kept.tolist()]
            if images
            else self.decode(generated.image_token_ids[kept]),
            prompts=[text for text in prompts for _ in range(num_images)],
            seeds=seeds[kept.cpu()].tolist(),
            scores=scores[kept].tolist(),
        )

    def _log_likelihood_ratios(
        self,
        generated: GeneratedTokens,
        text_token_ids: torch.Tensor,
        num_candidates: int,
        sampling_config: SamplingConfig,
    ) -> torch.Tensor:
        """Return the caption gains, which generation without guidance has not summed up."""
        if num_candidates > 1 and sampling_config.guidance_scale == 1.0:
            return log_likelihood_ratio(self.dalle, text_token_ids, generated.image_token_ids)
        return generated.log_likelihood_ratio

    def check(
        self, prompts: Sequence[str], *, num_images: int, num_candidates: int, seed: int
    ) -> None:
        """Refuse what cannot be generated, before anything is.

        Args:
            prompts: One or more texts.
            num_images: Images per prompt.
            num_candidates: Images generated for each one that is kept.
            seed: Of the first image of each prompt.

        Raises:
            UserError: If a prompt is empty, too long or no valid Unicode, or a number is out of
                range.
        """
        if not prompts:
            raise UserError("prompt: got none, expected some text")
        for text in prompts:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"prompt: got {str(text)[:20]!r}, expected some text")
            if len(text) > MAX_PROMPT_LENGTH:
                raise UserError(
                    f"prompt: got {len(text)} characters, expected at most {MAX_PROMPT_LENGTH}"
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"prompt: got {text[:20]!a}, expected valid Unicode text") from None
        for name, count in (("num_images", num_images), ("num_candidates", num_candidates)):
            if not isinstance(count, Integral) or count < 1:
                raise UserError(f"{name}: got {count!r}, expected at least 1")
        per_prompt = num_images * num_candidates
        if not isinstance(seed, Integral) or not 0 <= seed <= MAX_SEED - per_prompt:
            raise UserError(f"seed: got {seed!r}, expected 0 to 2 ** 63 - {1 + per_prompt}")

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Turn images into rows of image tokens.

        Args:
            images: Of any size; scaled and cropped to the model's square.

        Returns:
            (batch, image_length), raster order, on the models' device.
        """
        size, device = self.vqvae.config.image_size, self.dalle.image_head.rows.device
        rows = []
        for image in images:  # one by one: an image's tokens must not depend on its neighbors
            pixels = image_to_pixels(resize_and_crop(to_rgb(image), size)).unsqueeze(0)
            rows.append(self.vqvae.encode_to_token_ids(pixels.to(device)).flatten(1))
        return torch.cat(rows)

    def decode(self, image_token_ids: torch.Tensor) -> list[Image.Image]:
        """Turn rows of image tokens into images.

        Args:
            image_token_ids: (batch, image_length), raster order.

        Returns:
            One image per row.
        """
        images = []
        for row in image_token_ids:  # one by one: an image must not depend on its neighbors
            grid = row.reshape(1, *self.vqvae.image_grid_size)
            images += pixels_to_images(self.vqvae.decode_from_token_ids(grid))
        return images

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder that describes itself.

        Args:
            folder: Made if missing.
            dtype: Of the stored weights: bfloat16 halves the folder. They are read back as float32.
        """
        folder = Path(folder)
        self.vqvae.save_pretrained(folder / "vqvae", dtype=dtype)
        self.text_tokenizer.save_pretrained(folder / "text_tokenizer")
        (folder / "dalle").mkdir(parents=True, exist_ok=True)
        save_weights(self.dalle, folder / "dalle" / "model.safetensors", dtype=dtype)
        _write_json(folder / "dalle" / "config.json", dataclasses.asdict(self.dalle.config))
        index = {
            "format_version": FORMAT_VERSION,
            "pipeline": type(self).__name__,
            "sampling": dataclasses.asdict(self.sampling_config),
            "generates_any_order": self.generates_any_order,
            "vqvae_fingerprint": load_tokenizer(folder / "vqvae").fingerprint(),
            "sha256": file_hashes(folder),
        }
        (folder / "README.md").write_text(self._model_card(), encoding="utf-8")
        _write_json(folder / INDEX_NAME, index)  # last: a folder without it is not finished

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextToImagePipeline":
        """Load what ``save_pretrained`` wrote, strictly.

        Args:
            folder: A model folder.

        Returns:
            The pipeline in evaluation mode, on the CPU.

        Raises:
            UserError: If the folder is no model folder, or its parts are damaged or do not fit.
        """
        folder = Path(folder)
        if not (folder / INDEX_NAME).is_file():
            raise UserError(
                f"model: {folder} is no model folder (no {INDEX_NAME} in it); "
                "expected the folder that train_dalle.py wrote, for example out/demo/dalle/model"
            )
        try:
            index = _read_index(folder)
            for name in (*HASHED_FILES, *OTHER_FILES):
                own_file(folder, name)
            vqvae = load_tokenizer(folder / "vqvae")
            if vqvae.fingerprint() != index["vqvae_fingerprint"]:
                raise UserError("vqvae: not the image tokenizer that the decoder was trained on")
            sampling_config = build_config(SamplingConfig, index["sampling"])
            return cls(
                dalle=_load_dalle(folder, index["sha256"]),
                vqvae=vqvae,
                text_tokenizer=TextTokenizer.from_pretrained(folder / "text_tokenizer"),
                sampling_config=sampling_config,
                generates_any_order=index.get("generates_any_order", False),
            )
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"model: {folder} does not load: {reason}") from error

    def _model_card(self) -> str:
        """Say what the folder holds and how to use it."""
        size, grid = self.vqvae.config.image_size, self.vqvae.image_grid_size
        millions = sum(weight.numel() for weight in self.dalle.parameters()) / 1e6
        return MODEL_CARD.format(
            size=size, rows=grid[0], columns=grid[1], codes=self.vqvae.codebook_size,
            millions=millions, vocab=self.text_tokenizer.vocab_size, length=self.text_tokenizer.text_length,
        )  # fmt: skip

    def resolve_sampling_config(self, overrides: Mapping[str, Any]) -> SamplingConfig:
        """Apply the overrides of a call; see ``SamplingConfig.override``."""
        return self.sampling_config.override(overrides)


def _as_list(prompt: str | Sequence[str]) -> list[Any]:
    is_one = isinstance(prompt, str) or not isinstance(prompt, Iterable)
    return [prompt] if is_one else list(prompt)
