"""The pipeline: the same image for the same prompt and seed, and nothing loads by half."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.sampling.request import MAX_SEED
from dalle_mini_impl.sampling.sampler import SamplingConfig
from tests.faults import hostile
from tests.reference import tiny


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return tiny.build_pipeline()


def bytes_of(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("decoder", [{}, tiny.WITH_ENCODER], ids=["decoder_only", "encoder"])
def test_saved_folder_generates_the_same_images(decoder: dict[str, Any], tmp_path: Path) -> None:
    pipeline = tiny.build_pipeline(**decoder)
    pipeline.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.dalle.config == pipeline.dalle.config
    assert type(loaded.dalle) is type(pipeline.dalle)
    assert loaded.sampling_config == pipeline.sampling_config
    assert not loaded.dalle.training
    for name, value in pipeline.dalle.state_dict().items():
        assert torch.equal(value, loaded.dalle.state_dict()[name]), name
    prompts, options = ["a red disc", "파란 상자"], {"num_images": 2, "num_candidates": 2}
    generated, again = (each(prompts, **options) for each in (pipeline, loaded))
    assert bytes_of(generated.images) == bytes_of(again.images)
    assert generated.scores == again.scores
    assert len(set(bytes_of(generated.images))) == 4
    part = loaded.inpaint("a red disc", generated.images[0], keep_rows=1, seed=3)
    whole = generated.images[0].crop((0, 0, 16, 4))
    assert part.images[0].crop((0, 0, 16, 4)).tobytes() == whole.tobytes()


def test_image_does_not_depend_on_its_batch(pipeline: TextToImagePipeline) -> None:
    prompts = [*tiny.CAPTIONS, "파란 상자"]
    together = pipeline(prompts, num_images=2, seed=7)
    assert together.prompts == [text for text in prompts for _ in range(2)]
    assert together.seeds == [7, 8] * len(prompts)
    for index in (0, 5, 25):
        alone = pipeline(together.prompts[index], seed=together.seeds[index])
        assert bytes_of(alone.images) == [together.images[index].tobytes()]


def test_best_candidates_are_kept(pipeline: TextToImagePipeline) -> None:
    every = pipeline("a blue box", num_images=6, seed=5)
    assert len(set(every.scores)) == 6
    best = [max(group, key=every.scores.__getitem__) for group in (range(3), range(3, 6))]
    kept = pipeline("a blue box", num_images=2, num_candidates=3, seed=5)
    assert kept.seeds == [5 + index for index in best]
    assert bytes_of(kept.images) == [every.images[index].tobytes() for index in best]
    assert kept.scores == pytest.approx([every.scores[index] for index in best], abs=1e-3)

    unguided = pipeline("a blue box", num_images=1, num_candidates=4, guidance_scale=1.0)
    assert unguided.scores[0] != 0.0  # computed apart, as no null logits were at hand


def test_overrides_last_one_call(pipeline: TextToImagePipeline) -> None:
    greedy = pipeline(["a red disc"] * 2, seed=0, top_k=1).images
    other_seed = pipeline("a red disc", seed=99, top_k=1).images
    assert bytes_of(other_seed) == bytes_of(greedy)[:1]
    assert pipeline.sampling_config == SamplingConfig(guidance_scale=2.0)


def test_training_mode_is_restored(pipeline: TextToImagePipeline) -> None:
    pipeline.dalle.train()
    before = pipeline("a red disc").images
    assert pipeline.dalle.training
    pipeline.dalle.eval()
    assert bytes_of(pipeline("a red disc").images) == bytes_of(before)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("   ", {}, "prompt: got '   ', expected some text"),
        (["a disc", ""], {}, "prompt: got '', expected some text"),
        (None, {}, "prompt: got 'None', expected some text"),
        ([None], {}, "prompt: got 'None', expected some text"),
        (7, {}, "prompt: got '7', expected some text"),
        ([], {}, "prompt: got none, expected some text"),
        ("a disc", {"num_images": 0}, "num_images: got 0, expected at least 1"),
        ("a disc", {"num_images": 1.5}, "num_images: got 1.5, expected a whole number"),
        ("a disc", {"num_images": True}, "num_images: got True, expected a whole number"),
        ("a disc", {"seed": True}, "seed: got True, expected 0 to"),
        ("a disc", {"num_candidates": 0}, "num_candidates: got 0, expected at least 1"),
        ("a disc", {"seed": -1}, "seed: got -1, expected 0 to"),
        ("a disc", {"seed": MAX_SEED}, "seed: got"),
        ("a disc", {"seed": "x"}, "seed: got 'x', expected 0 to"),
        ("a disc", {"seed": None}, "seed: got None, expected 0 to"),
        ("a disc", {"top_p": 2.0}, "top_p: got 2.0, expected above 0 and up to 1"),
        ("a disc", {"top_k": 2.5}, "top_k: got 2.5, expected a whole number"),
        ("a disc", {"temperature": 0.0}, "temperature: got 0.0"),
        ("a disc", {"temperature": None}, "temperature: got None, expected a number"),
        ("a disc", {"guidance_schedule": None}, "guidance_schedule: got None, expected one of"),
        ("a disc", {"guidance": 2.0}, "guidance: unknown setting, expected one of guidance_scale"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_invalid_requests(
    pipeline: TextToImagePipeline, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(prompt, **options)


def test_half_precision_folder_loads(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = {name: value.bfloat16() for name, value in hostile.tensors(folder).items()}
    hostile.write_tensors(folder, weights)
    loaded = TextToImagePipeline.from_pretrained(folder).dalle.state_dict()
    for name, value in weights.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.float())


def test_unfitting_parts(pipeline: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="vqvae: got codebook and grid"):
        TextToImagePipeline(
            dalle=pipeline.dalle,
            vqvae=tiny.build_vqvae(fsq_levels=(4, 3)),
            text_tokenizer=pipeline.text_tokenizer,
        )
    with pytest.raises(ValueError, match="text_tokenizer: text_length is 9, the decoder expects 8"):
        TextToImagePipeline(
            dalle=pipeline.dalle,
            vqvae=pipeline.vqvae,
            text_tokenizer=tiny.build_text_tokenizer(text_length=9),
        )


@pytest.fixture(scope="module")
def any_order() -> TextToImagePipeline:
    pipeline = tiny.build_pipeline()
    pipeline.generates_any_order = True
    return pipeline


IMAGE = tiny.render_image(3)
HOLE = Image.new("L", IMAGE.size, 0)  # a part of the second of four tokens
HOLE.paste(255, (9, 1, 15, 6))


def test_inpainting_keeps_tokens_and_pixels(any_order: TextToImagePipeline) -> None:
    generated = any_order.inpaint("a blue box", IMAGE, mask=HOLE, num_images=6, seed=3)
    assert generated.seeds == [3, 4, 5, 6, 7, 8]
    for image in generated.images:
        outside = Image.composite(IMAGE, image, HOLE)  # the hole filled with the original
        assert outside.tobytes() == IMAGE.tobytes()
    assert len({image.crop((9, 1, 15, 6)).tobytes() for image in generated.images}) > 1

    rows = any_order.inpaint("a blue box", IMAGE, keep_rows=1, seed=1).images[0]
    assert rows.crop((0, 0, 16, 8)).tobytes() == IMAGE.crop((0, 0, 16, 8)).tobytes()
    assert rows.tobytes() != IMAGE.tobytes()

    fractions = any_order.inpaint("a blue box", IMAGE, keep_fraction=0.75, num_images=8, seed=1)
    assert len({image.tobytes() for image in fractions.images}) > 4


def test_inpainting_does_not_depend_on_its_batch(any_order: TextToImagePipeline) -> None:
    prompts = ["a red disc", "a blue box"]
    for part in ({"mask": HOLE}, {"keep_rows": 1}, {"keep_fraction": 0.5}):
        together = any_order.inpaint(prompts, IMAGE, num_images=3, seed=7, **part)
        assert together.prompts == [text for text in prompts for _ in range(3)]
        for index in (0, 4):
            alone = any_order.inpaint(
                together.prompts[index], IMAGE, seed=together.seeds[index], **part
            )
            assert bytes_of(alone.images) == [together.images[index].tobytes()]
        assert len({image.tobytes() for image in together.images}) > 3


def test_best_inpainting_candidates_are_kept(any_order: TextToImagePipeline) -> None:
    every = any_order.inpaint("a blue box", IMAGE, keep_rows=1, num_images=4, seed=5)
    best = max(range(4), key=every.scores.__getitem__)
    kept = any_order.inpaint("a blue box", IMAGE, keep_rows=1, num_candidates=4, seed=5)
    assert kept.seeds == [5 + best]
    assert bytes_of(kept.images) == [every.images[best].tobytes()]


def test_raster_order_inpaints_the_end_only(pipeline: TextToImagePipeline) -> None:
    assert not pipeline.generates_any_order
    assert pipeline.inpaint("a red disc", IMAGE, keep_rows=1).images
    below = Image.new("L", IMAGE.size, 0)
    below.paste(255, (8, 0, 16, 8))  # the rest of the first row, and all below
    below.paste(255, (0, 8, 16, 16))
    assert pipeline.inpaint("a red disc", IMAGE, mask=below).images
    for part in ({"mask": HOLE}, {"keep_fraction": 0.75}):
        [field] = part
        with pytest.raises(
            UserError, match=rf"^{field}: .*--task\.random_order_probability above 0"
        ):
            pipeline.inpaint("a red disc", IMAGE, num_images=4, **part)  # type: ignore[arg-type]


def test_folder_records_generates_any_order(
    any_order: TextToImagePipeline, model_dir: Path, tmp_path: Path
) -> None:
    any_order.save_pretrained(tmp_path / "any")
    assert TextToImagePipeline.from_pretrained(tmp_path / "any").generates_any_order
    assert not TextToImagePipeline.from_pretrained(model_dir).generates_any_order
