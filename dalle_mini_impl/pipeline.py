"""From a prompt to images.

>>> pipeline = TextToImagePipeline.from_pretrained("out/emoji64/dalle/model")
>>> pipeline("a red heart", num_images=4, seed=0).images[0].save("heart.png")
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle_mini_impl import model_folder
from dalle_mini_impl.data.images import image_to_pixels, pixels_to_images, resize_and_crop, to_rgb
from dalle_mini_impl.data.inpainting_mask import InpaintingMask, build_inpainting_mask, paste_back
from dalle_mini_impl.data.text_tokenizer import TextTokenizer
from dalle_mini_impl.errors import UserError
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
from dalle_mini_impl.sampling.request import (
    GenerationRequest,
    Inpainting,
    PipelineOutput,
    Rank,
    check_counts,
    check_prompts,
)
from dalle_mini_impl.sampling.rerank import best_of
from dalle_mini_impl.sampling.sampler import SamplingConfig
from vqvae.image_tokenizer import ImageTokenizer

logger = logging.getLogger(__name__)


class TextToImagePipeline:
    """Caption tokenizer, decoder and image tokenizer in one.

        prompt -> text_token_ids -> image_token_ids -> pixels
          text_tokenizer        dalle             vqvae

    ``sampling_config`` is the default for each call. ``generates_any_order`` says that the
    decoder was trained in random order to the end, so that any part of an image can be inpainted.

    Raises:
        ValueError: If the parts do not fit each other.
    """

    def __init__(
        self,
        *,
        dalle: TextToImageModel,
        vqvae: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        sampling_config: SamplingConfig | None = None,
        generates_any_order: bool = False,
    ) -> None:
        # Token ids mean nothing to another tokenizer, even one of the same sizes: the model folder
        # compares fingerprints as well.
        expected = (dalle.config.codebook_levels, dalle.config.image_grid_size)
        got = (vqvae.codebook_levels, vqvae.image_grid_size)
        if got != expected:
            raise ValueError(f"vqvae: got codebook and grid {got}, the decoder expects {expected}")
        for name in ("text_length", "vocab_size"):
            size, required = getattr(text_tokenizer, name), getattr(dalle.config, name)
            if size != required:
                raise ValueError(
                    f"text_tokenizer: {name} is {size}, the decoder expects {required}"
                )
        if generates_any_order and dalle.config.decoder.raster_order_only:
            raise ValueError(
                "generates_any_order: got true, but the decoder generates in raster order only"
            )
        self.dalle, self.vqvae, self.text_tokenizer = dalle, vqvae, text_tokenizer
        self.native: NativeDecoder | None = None
        self.sampling_config = sampling_config or SamplingConfig()
        self.generates_any_order = generates_any_order

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextToImagePipeline":
        """Load what ``save_pretrained`` wrote, strictly; in evaluation mode, on the CPU.

        Raises:
            UserError: If the folder is no model folder, or its parts are damaged or do not fit.
        """
        return model_folder.load_parts(Path(folder), build=cls)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a model folder; weights stored as bfloat16 halve it and are read as float32."""
        model_folder.save_parts(
            Path(folder),
            dalle=self.dalle,
            vqvae=self.vqvae,
            text_tokenizer=self.text_tokenizer,
            sampling_config=self.sampling_config,
            generates_any_order=self.generates_any_order,
            dtype=dtype,
        )

    @property
    def device(self) -> torch.device:
        """Where both models are."""
        return next(self.dalle.parameters()).device

    def to(self, device: torch.device | str) -> "TextToImagePipeline":
        """Move both models; the compiled pass is lost on leaving the CPU."""
        self.dalle.to(device)
        self.vqvae.to(device)
        if torch.device(device).type != "cpu":
            self.native = None
        return self

    def use_native(self, weights: NativeWeights) -> bool:
        """Generate with a compiled forward pass of the decoder from now on, where one is possible.

        The first call on a machine compiles it with the system's C++ compiler, in some ten seconds.
        Without one, a warning says why, and torch is used as before. The decoder's weights are
        copied: call this again after they change.

        Args:
            weights: ``float32`` gives the images of plain torch up to rounding; ``int8`` rounds
                weights to 8 bits and is faster.

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
        """The part of an image's metadata that names the compiled pass; empty without one."""
        return {"native": self.native.weights} if self.native else {}

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

        Image k of every prompt has seed ``seed + k``: the same image, whatever else is generated in
        the call. With candidates, it is the best of the ``num_candidates`` seeds from
        ``seed + k * num_candidates`` on.

        Args:
            prompt: One prompt, or several.
            num_images: Images per prompt.
            seed: Of the first image of each prompt.
            num_candidates: Images generated for each one that is kept.
            rank: ``likelihood`` keeps the candidate of the largest log-likelihood ratio, ``none``
                the first, without generating the others; an object, such as a
                ``clip_ranker.ClipRanker``, the one that it scores highest.
            **overrides: Fields of ``SamplingConfig`` for this call, such as ``guidance_scale``.

        Returns:
            ``num_images`` images per prompt, in order.

        Raises:
            UserError: If a prompt is empty, or a number is out of range.
        """
        counts: dict[str, Any] = {
            "num_images": num_images,
            "num_candidates": num_candidates,
            "seed": seed,
        }
        return self.generate(self.check(prompt, rank=rank, **counts, **overrides))

    def inpaint(
        self,
        prompt: str | Sequence[str],
        image: Image.Image,
        *,
        mask: Image.Image | None = None,
        keep_rows: int | None = None,
        keep_fraction: float | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """Inpaint a part of an image; give exactly one of mask, keep_rows and keep_fraction.

        The image is scaled and cropped to the model's size. With ``mask`` or
        ``keep_rows``, the kept pixels are the image's own; with ``keep_fraction``, the whole image
        is decoded from kept and new tokens.

        Args:
            prompt: Describes the whole image, not only the inpainted part.
            image: The image.
            mask: As large as the image, white where it is inpainted. Every token whose patch has
                some white is sampled anew.
            keep_rows: Rows of tokens at the top that stay.
            keep_fraction: Fraction of the tokens that stay, in (0, 1); each seed keeps others.
            **options: As in a plain call.

        Returns:
            ``num_images`` images per prompt, in order. Scores count only the inpainted tokens.

        Raises:
            UserError: If a value is out of range, or the decoder cannot inpaint this part.
        """
        part = Inpainting(image, mask, keep_rows, keep_fraction)
        return self.generate(self.check(prompt, inpainting=part, **options))

    def check(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int = 1,
        num_candidates: int = 1,
        seed: int = 0,
        rank: Rank = "likelihood",
        inpainting: Inpainting | None = None,
        **overrides: Any,
    ) -> GenerationRequest:
        """Check the input of a call before anything is generated.

        Raises:
            UserError: If a prompt is empty, too long or no valid Unicode, a number out of range, or
                the decoder cannot inpaint the part that is asked for.
        """
        is_one = isinstance(prompt, str) or not isinstance(prompt, Iterable)
        prompts: list[Any] = [prompt] if is_one else list(prompt)
        check_prompts(prompts)
        check_counts(num_images=num_images, num_candidates=num_candidates, seed=seed)
        if inpainting is not None:
            self._build_mask(inpainting, torch.tensor([seed]))
        return GenerationRequest(
            prompts=prompts,
            num_images=num_images,
            num_candidates=num_candidates,
            seed=seed,
            sampling_config=self.sampling_config.override(overrides),
            rank=rank,
            inpainting=inpainting,
        )

    @torch.inference_mode()
    def generate(self, request: GenerationRequest) -> PipelineOutput:
        """Generate the images of a request that ``check`` made."""
        prompts, candidates = request.prompts, request.candidates_per_image
        per_prompt = request.num_images * candidates
        seeds = request.seeds().repeat(len(prompts))  # (prompts * per_prompt,)
        text_token_ids = self.text_tokenizer.encode(prompts).to(self.device)
        # Candidates of a prompt stand together: (prompts * per_prompt, text_length)
        text_token_ids = text_token_ids.repeat_interleave(per_prompt, dim=0)
        inpainting = request.inpainting
        mask = None if inpainting is None else self._build_mask(inpainting, seeds)
        was_training = self.dalle.training
        self.dalle.eval()
        try:
            # 1. sample the tokens of every candidate
            if inpainting is None or mask is None:
                generated = generate_image_token_ids(
                    self.native or self.dalle,
                    text_token_ids,
                    seeds=seeds,
                    sampling_config=request.sampling_config,
                )
            else:
                image_token_ids = self.encode([inpainting.image])
                generated = inpaint_image_token_ids(
                    self.native or self.dalle,
                    text_token_ids,
                    image_token_ids.expand(len(seeds), -1),
                    mask.is_masked.to(self.device),
                    seeds=seeds,
                    sampling_config=request.sampling_config,
                )
            # 2. keep the best candidates; only an image ranker needs all of them decoded
            if isinstance(request.rank, str):
                scores = self._log_likelihood_ratios(generated, text_token_ids, request)
                kept = best_of(scores, num_candidates=candidates)
                images = self.decode(generated.image_token_ids[kept])
            else:
                every = self.decode(generated.image_token_ids)
                scores = request.rank.score(
                    every, [text for text in prompts for _ in range(per_prompt)]
                )
                kept = best_of(scores, num_candidates=candidates)
                images = [every[index] for index in kept.tolist()]
        finally:
            self.dalle.train(was_training)
        # 3. outside of the mask, put the source image's own pixels back
        if inpainting is not None and mask is not None and mask.shown is not None:
            source = to_rgb(inpainting.image)
            images = [paste_back(image, source, mask.shown) for image in images]
        return PipelineOutput(
            images=images,
            prompts=[text for text in prompts for _ in range(request.num_images)],
            seeds=seeds[kept.cpu()].tolist(),
            scores=scores[kept].tolist(),
        )

    def _log_likelihood_ratios(
        self, generated: GeneratedTokens, text_token_ids: torch.Tensor, request: GenerationRequest
    ) -> torch.Tensor:
        # Guided sampling accumulates the ratios; without guidance there are no null logits.
        is_guided = request.sampling_config.guidance_scale != 1.0
        if is_guided or request.candidates_per_image == 1:
            return generated.log_likelihood_ratio
        return log_likelihood_ratio(self.dalle, text_token_ids, generated.image_token_ids)

    def _build_mask(self, inpainting: Inpainting, seeds: torch.Tensor) -> InpaintingMask:
        mask = build_inpainting_mask(
            mask=inpainting.mask,
            keep_rows=inpainting.keep_rows,
            keep_fraction=inpainting.keep_fraction,
            source_size=to_rgb(inpainting.image).size,
            pixel_size=self.vqvae.config.pixel_size,
            grid=self.vqvae.image_grid_size,
            seeds=seeds.tolist(),
        )
        # A raster-order decoder was never conditioned on tokens to the right or below.
        if not self.generates_any_order and not is_raster_order(inpainting_order(mask.is_masked)):
            field = "mask" if inpainting.keep_fraction is None else "keep_fraction"
            raise UserError(
                f"{field}: something stays after the first inpainted token, and this model "
                "generates from the top left to the bottom right only; expected keep_rows, or a "
                "model trained with --task.random_order_probability above 0 and "
                "--task.augmentation_ends_at 1.0"
            )
        return mask

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Scale and crop images to the model's size and tokenize them.

        Returns:
            image_token_ids: (batch, image_length), raster order, on the models' device.
        """
        rows = []
        # One by one: rounding must not depend on the other images of the batch.
        for image in images:
            pixels = image_to_pixels(resize_and_crop(to_rgb(image), self.vqvae.config.pixel_size))
            token_ids = self.vqvae.encode_to_token_ids(pixels.unsqueeze(0).to(self.device))
            rows.append(token_ids.flatten(1))  # (1, image_length)
        return torch.cat(rows)

    def decode(self, image_token_ids: torch.Tensor) -> list[Image.Image]:
        """Turn image_token_ids (batch, image_length), raster order, into images."""
        images = []
        for row in image_token_ids:  # one by one, as in encode
            grid = row.reshape(1, *self.vqvae.image_grid_size)
            images += pixels_to_images(self.vqvae.decode_from_token_ids(grid))
        return images
