"""The pipeline: the same picture for the same prompt and seed, and nothing loads by half."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import HASHED_FILES, MAX_SEED, TextToImagePipeline, file_hashes
from dalle_mini_impl.sampling.token_choice import SamplingConfig
from tests.reference import tiny


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return tiny.build_pipeline()


@pytest.fixture(scope="module")
def model_dir(pipeline: TextToImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def own_copy(model_dir: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(model_dir, tmp_path / "model")


def bytes_of(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("decoder", [{}, tiny.WITH_ENCODER], ids=["decoder_only", "encoder"])
def test_a_folder_of_each_architecture_draws_the_same_pictures(
    decoder: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = tiny.build_pipeline(**decoder)
    pipeline.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.dalle.config == pipeline.dalle.config
    assert type(loaded.dalle) is type(pipeline.dalle)
    prompts, options = ["a red disc", "파란 상자"], {"num_images": 2, "num_candidates": 2}
    drawn, again = (each(prompts, **options) for each in (pipeline, loaded))
    assert bytes_of(drawn.images) == bytes_of(again.images)
    assert drawn.scores == again.scores
    assert len(set(bytes_of(drawn.images))) == 4
    part = loaded.complete("a red disc", drawn.images[0], keep_rows=1, seed=3)
    whole = drawn.images[0].crop((0, 0, 16, 4))
    assert part.images[0].crop((0, 0, 16, 4)).tobytes() == whole.tobytes()


def test_a_folder_older_than_the_architectures_is_decoder_only(
    pipeline: TextToImagePipeline, own_copy: Path
) -> None:
    config = own_copy / "dalle" / "config.json"
    for name in ("architecture", "num_encoder_layers"):
        drop_json(config, "decoder", name)
    loaded = TextToImagePipeline.from_pretrained(own_copy)
    assert loaded.dalle.config == pipeline.dalle.config
    drop_json(config, "decoder", "positions")  # which is as old as the format
    with pytest.raises(UserError, match="unknown or missing fields: positions"):
        TextToImagePipeline.from_pretrained(own_copy)


def test_a_loaded_folder_draws_the_same_pictures(
    pipeline: TextToImagePipeline, model_dir: Path
) -> None:
    loaded = TextToImagePipeline.from_pretrained(model_dir)
    assert loaded.settings == pipeline.settings
    assert not loaded.dalle.training
    drawn, again = (each("a red disc", num_images=3, seed=4) for each in (pipeline, loaded))
    assert bytes_of(drawn.images) == bytes_of(again.images)
    assert drawn.seeds == again.seeds == [4, 5, 6]
    assert drawn.prompts == ["a red disc"] * 3
    assert len(set(bytes_of(drawn.images))) == 3
    for name, value in pipeline.dalle.state_dict().items():
        assert torch.equal(value, loaded.dalle.state_dict()[name]), name


def test_a_picture_does_not_depend_on_its_neighbours(pipeline: TextToImagePipeline) -> None:
    prompts = [*tiny.CAPTIONS, "파란 상자"]
    together = pipeline(prompts, num_images=2, seed=7)
    assert together.prompts == [text for text in prompts for _ in range(2)]
    assert together.seeds == [7, 8] * len(prompts)
    for index in (0, 5, 25):
        alone = pipeline(together.prompts[index], seed=together.seeds[index])
        assert bytes_of(alone.images) == [together.images[index].tobytes()]


def test_the_best_candidates_are_kept(pipeline: TextToImagePipeline) -> None:
    every = pipeline("a blue box", num_images=6, seed=5)
    assert len(set(every.scores)) == 6
    best = [max(group, key=every.scores.__getitem__) for group in (range(3), range(3, 6))]
    kept = pipeline("a blue box", num_images=2, num_candidates=3, seed=5)
    assert kept.seeds == [5 + index for index in best]
    assert bytes_of(kept.images) == [every.images[index].tobytes() for index in best]
    assert kept.scores == pytest.approx([every.scores[index] for index in best], abs=1e-3)

    unguided = pipeline("a blue box", num_images=1, num_candidates=4, guidance_scale=1.0)
    assert unguided.scores[0] != 0.0  # computed apart, as no null logits were at hand


def test_settings_of_a_call_override_the_models(pipeline: TextToImagePipeline) -> None:
    greedy = pipeline(["a red disc"] * 2, seed=0, top_k=1).images
    other_seed = pipeline("a red disc", seed=99, top_k=1).images
    assert bytes_of(other_seed) == bytes_of(greedy)[:1]
    assert pipeline.settings == SamplingConfig(guidance_scale=2.0)


def test_drawing_leaves_a_model_in_training_as_it_was(pipeline: TextToImagePipeline) -> None:
    pipeline.dalle.train()
    before = pipeline("a red disc").images
    assert pipeline.dalle.training
    pipeline.dalle.eval()
    assert bytes_of(pipeline("a red disc").images) == bytes_of(before)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("   ", {}, "prompt: got '   ', wanted some text"),
        (["a disc", ""], {}, "prompt: got '', wanted some text"),
        ("a disc", {"num_images": 0}, "num_images: got 0, wanted at least 1"),
        ("a disc", {"num_candidates": 0}, "num_candidates: got 0, wanted at least 1"),
        ("a disc", {"seed": -1}, "seed: got -1, wanted 0 to"),
        ("a disc", {"seed": MAX_SEED}, "seed: got"),
        ("a disc", {"top_p": 2.0}, "top_p: got 2.0, wanted above 0 and up to 1"),
        ("a disc", {"temperature": 0.0}, "temperature: got 0.0"),
        ("a disc", {"guidance": 2.0}, "guidance: unknown setting, wanted one of guidance_scale"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    pipeline: TextToImagePipeline, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(prompt, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (None, {}, "prompt: got 'None', wanted some text"),
        ([None], {}, "prompt: got 'None', wanted some text"),
        (7, {}, "prompt: got '7', wanted some text"),
        ([], {}, "prompt: got none, wanted some text"),
        ("a disc", {"seed": "x"}, "seed: got 'x', wanted 0 to"),
        ("a disc", {"seed": None}, "seed: got None, wanted 0 to"),
        ("a disc", {"num_images": 1.5}, "num_images: got 1.5, wanted at least 1"),
        ("a disc", {"temperature": None}, "temperature: got None, wanted a number"),
        ("a disc", {"top_k": 2.5}, "top_k: got 2.5, wanted a whole number"),
        ("a disc", {"guidance_schedule": None}, "guidance_schedule: got None, wanted one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_has_another_type_is_refused(
    pipeline: TextToImagePipeline, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(prompt, **options)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_json(path: Path, section: str, key: str) -> None:
    values = json.loads(path.read_text())
    del values[section][key]
    path.write_text(json.dumps(values))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def change_size(folder: Path, **changes: int) -> None:
    path = folder / "dalle" / "config.json"
    change_json(path, decoder=json.loads(path.read_text())["decoder"] | changes)


def rewrite(path: Path, content: bytes) -> None:
    """Change one of the hashed files and its hash too."""
    path.write_bytes(content)
    change_json(path.parents[1] / "model_index.json", sha256=file_hashes(path.parents[1]))


def spoil_weights(folder: Path) -> None:
    path = folder / "dalle" / "model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(path).items()}, path)


def test_weights_kept_in_half_precision_load(own_copy: Path) -> None:
    path = own_copy / "dalle" / "model.safetensors"
    weights = {name: value.bfloat16() for name, value in load_file(path).items()}
    rewrite(path, save(weights))
    loaded = TextToImagePipeline.from_pretrained(own_copy).dalle.state_dict()
    for name, value in weights.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.float())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "model_index.json").unlink(), "is no model folder"),
        (lambda f: (f / "model_index.json").write_text("{"), "does not load"),
        (lambda f: (f / "model_index.json").write_text("[]"), "wanted an object"),
        (
            lambda f: change_json(f / "model_index.json", format_version=1),
            "got 1, wanted 2, .*sha256",
        ),
        (lambda f: drop_json(f / "model_index.json", "sha256", HASHED_FILES[0]), "sha256: got {"),
        (lambda f: change_json(f / "model_index.json", sha256=None), "sha256: got None"),
        (lambda f: flip_a_byte(f / HASHED_FILES[0]), "dalle/model.safetensors: not what was wri"),
        (lambda f: flip_a_byte(f / HASHED_FILES[1]), "text_tokenizer/tokenizer.json: not what"),
        (spoil_weights, "dalle/model.safetensors: not what was written"),
        (lambda f: change_json(f / "model_index.json", sampling={"top_q": 1}), "top_q"),
        (lambda f: drop_json(f / "model_index.json", "sampling", "top_k"), "missing fields: top_k"),
        (lambda f: change_json(f / "model_index.json", sampling=None), "SamplingConfig: got None"),
        (
            lambda f: change_json(
                f / "model_index.json",
                sampling={**dataclasses.asdict(SamplingConfig()), "temperature": "hot"},
            ),
            "temperature: got 'hot', wanted a number",
        ),
        (lambda f: change_size(f, num_layers=10**7), "decoder.num_layers: got 10000000, the file"),
        (lambda f: change_size(f, hidden_size=10**8), "decoder.hidden_size: got 100000000, the fi"),
        (
            lambda f: change_json(f / "dalle/config.json", vocab_size=10**12),
            "vocab_size: got 10000",
        ),
        (
            lambda f: change_json(f / "dalle/config.json", image_grid_size=[10**9, 10**9]),
            "image_grid_size: got 1000000000",
        ),
        (
            lambda f: change_json(f / "dalle/config.json", decoder=None),
            "DecoderConfig: got None, wanted an object",
        ),
        (lambda f: drop_json(f / "dalle/config.json", "decoder", "positions"), "fields: positions"),
        (lambda f: (f / "dalle/config.json").unlink(), "does not load.*No such file"),
        (lambda f: change_json(f / "dalle/config.json", colour=1), "colour"),
        (lambda f: change_json(f / "dalle/config.json", text_length=9), "does not load"),
        (lambda f: change_json(f / "dalle/config.json", codebook_levels=None), "does not load"),
        (
            lambda f: rewrite(f / HASHED_FILES[0], b"\x10"),
            "dalle/model.safetensors: not loaded: Error",
        ),
        (lambda f: (f / "vqvae/model.safetensors").unlink(), "No such file"),
        (lambda f: flip_a_byte(f / "vqvae/model.safetensors"), "vqvae: not the image tokenizer"),
        (lambda f: (f / "text_tokenizer/tokenizer.json").unlink(), "tokenizer.json: No such file"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(
    own_copy: Path, damage: Callable[[Path], Any], reason: str
) -> None:
    damage(own_copy)
    with pytest.raises(UserError, match=f"^model: .*{reason}") as caught:
        TextToImagePipeline.from_pretrained(own_copy)
    assert str(own_copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused(pipeline: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="vqvae: codebook and grid are"):
        TextToImagePipeline(
            dalle=pipeline.dalle,
            vqvae=tiny.build_vqvae(fsq_levels=(4, 3)),
            captions=pipeline.captions,
        )
    with pytest.raises(ValueError, match="captions: text_length is 9, the decoder wants 8"):
        TextToImagePipeline(
            dalle=pipeline.dalle,
            vqvae=pipeline.vqvae,
            captions=tiny.build_captions(text_length=9),
        )


@pytest.fixture(scope="module")
def any_order() -> TextToImagePipeline:
    pipeline = tiny.build_pipeline()
    pipeline.draws_any_order = True
    return pipeline


PICTURE = tiny.draw_picture(3)
HOLE = Image.new("L", PICTURE.size, 0)  # a part of the second of four tokens
HOLE.paste(255, (9, 1, 15, 6))


def test_a_completion_keeps_tokens_and_pixels(any_order: TextToImagePipeline) -> None:
    drawn = any_order.complete("a blue box", PICTURE, mask=HOLE, num_images=6, seed=3)
    assert drawn.seeds == [3, 4, 5, 6, 7, 8]
    for image in drawn.images:
        for place in ((x, y) for x in range(16) for y in range(16)):
            if HOLE.getpixel(place) == 0:
                assert image.getpixel(place) == PICTURE.getpixel(place)
    assert len({image.crop((9, 1, 15, 6)).tobytes() for image in drawn.images}) > 1

    rows = any_order.complete("a blue box", PICTURE, keep_rows=1, seed=1).images[0]
    assert rows.crop((0, 0, 16, 8)).tobytes() == PICTURE.crop((0, 0, 16, 8)).tobytes()
    assert rows.tobytes() != PICTURE.tobytes()

    shares = any_order.complete("a blue box", PICTURE, keep_share=0.75, num_images=8, seed=1)
    assert len({image.tobytes() for image in shares.images}) > 4


def test_a_completion_does_not_depend_on_its_neighbours(any_order: TextToImagePipeline) -> None:
    prompts = ["a red disc", "a blue box"]
    for part in ({"mask": HOLE}, {"keep_rows": 1}, {"keep_share": 0.5}):
        together = any_order.complete(prompts, PICTURE, num_images=3, seed=7, **part)
        assert together.prompts == [text for text in prompts for _ in range(3)]
        for index in (0, 4):
            alone = any_order.complete(
                together.prompts[index], PICTURE, seed=together.seeds[index], **part
            )
            assert bytes_of(alone.images) == [together.images[index].tobytes()]
        assert len({image.tobytes() for image in together.images}) > 3


def test_the_best_completions_are_kept(any_order: TextToImagePipeline) -> None:
    every = any_order.complete("a blue box", PICTURE, keep_rows=1, num_images=4, seed=5)
    best = max(range(4), key=every.scores.__getitem__)
    kept = any_order.complete("a blue box", PICTURE, keep_rows=1, num_candidates=4, seed=5)
    assert kept.seeds == [5 + best]
    assert bytes_of(kept.images) == [every.images[best].tobytes()]


def test_a_model_of_raster_order_goes_on_below_and_nothing_else(
    pipeline: TextToImagePipeline,
) -> None:
    assert not pipeline.draws_any_order
    assert pipeline.complete("a red disc", PICTURE, keep_rows=1).images
    below = Image.new("L", PICTURE.size, 0)
    below.paste(255, (8, 0, 16, 8))  # the rest of the first row, and all below
    below.paste(255, (0, 8, 16, 16))
    assert pipeline.complete("a red disc", PICTURE, mask=below).images
    for part in ({"mask": HOLE}, {"keep_share": 0.75}):
        [field] = part
        with pytest.raises(
            UserError, match=rf"^{field}: .*--task\.random_order_probability above 0"
        ):
            pipeline.complete("a red disc", PICTURE, num_images=4, **part)  # type: ignore[arg-type]


def test_a_folder_says_whether_its_model_draws_in_any_order(
    any_order: TextToImagePipeline, own_copy: Path, tmp_path: Path
) -> None:
    any_order.save_pretrained(tmp_path / "any")
    assert TextToImagePipeline.from_pretrained(tmp_path / "any").draws_any_order
    assert not TextToImagePipeline.from_pretrained(own_copy).draws_any_order
    index = json.loads((own_copy / "model_index.json").read_text())
    del index["draws_any_order"]  # as in older folders
    (own_copy / "model_index.json").write_text(json.dumps(index))
    assert not TextToImagePipeline.from_pretrained(own_copy).draws_any_order
    change_json(own_copy / "model_index.json", draws_any_order=1)
    with pytest.raises(UserError, match="draws_any_order: got 1, wanted true or false"):
        TextToImagePipeline.from_pretrained(own_copy)
