"""Token data sets: made once, made again when anything changes, and looked up rightly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dalle_mini_impl.data.augmentation import shift_images, zoom_images
from dalle_mini_impl.data.bpe_dropout import NUM_VARIANTS
from dalle_mini_impl.data.images import bytes_to_pixels
from dalle_mini_impl.data.pairs import Pair
from dalle_mini_impl.data.token_dataset import TokenDataset, Variation, build_token_dataset
from tests.reference import tiny
from tests.reference.log_lines import log_lines
from vqvae import VQVAE

PAIRS = [
    Pair("a.png", ("a red disc", "a round thing")),
    Pair("b.png", ("a blue box",)),
    Pair("c.png", ("a green disc", "green", "one disc")),
]


def pixels() -> Tensor:
    arrays = [np.array(tiny.render_image(number)) for number in (0, 5, 2)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def build(folder: Path, **changes: Any) -> tuple[TokenDataset, list[str]]:
    """The data set of three images with changes in its options or its variation."""
    options: dict[str, Any] = {
        "pairs": PAIRS,
        "pixels": pixels(),
        "vqvae": tiny.build_vqvae(),
        "text_tokenizer": tiny.build_text_tokenizer(),
    }
    variation: dict[str, Any] = {"num_views": 2, "max_shift": 2}
    for name, value in changes.items():
        (options if name in options else variation)[name] = value
    options["variation"] = Variation(**variation)
    with log_lines() as lines:
        dataset = build_token_dataset(cache_dir=folder, **options)
    return dataset, lines


def assert_same(first: TokenDataset, second: TokenDataset) -> None:
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(second, name)), name


def test_the_tokens_are_those_of_the_tokenizers(tmp_path: Path) -> None:
    dataset, _ = build(tmp_path)
    vqvae, text_tokenizer = tiny.build_vqvae(), tiny.build_text_tokenizer()
    ids = vqvae.encode_to_token_ids(bytes_to_pixels(pixels())).flatten(1)
    assert torch.equal(dataset.image_token_ids[:, 0].long(), ids)
    assert dataset.image_token_ids.shape == (3, 2, 4)
    texts = [text for pair in PAIRS for text in pair.captions]
    assert torch.equal(dataset.text_token_ids.long(), text_tokenizer.encode(texts))
    assert dataset.caption_offsets.tolist() == [0, 2, 3, 6]
    assert len(dataset) == 3


def test_the_second_build_reads_the_file(tmp_path: Path) -> None:
    first, lines = build(tmp_path)
    assert "encoding 3 images in 2 views" in lines[0]
    (path,) = tmp_path.iterdir()
    before = path.stat()
    second, lines = build(tmp_path)
    assert lines == [f"image and caption tokens: reading {path}"]
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert_same(first, second)


def other_weights() -> VQVAE:
    vqvae = tiny.build_vqvae()
    with torch.no_grad():
        next(vqvae.encoder.parameters()).view(-1)[0] += 0.5
    return vqvae


def other_pixels() -> Tensor:
    images = pixels()
    images[0, 0, 0, 0] ^= 1
    return images


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"vqvae": other_weights()},
        lambda: {"pixels": other_pixels()},
        lambda: {"pairs": [*PAIRS[:2], Pair("c.png", ("a green disc", "green", "a disc"))]},
        lambda: {"pairs": [PAIRS[0], Pair("b.png", ("a blue", "box")), PAIRS[2]]},
        lambda: {"text_tokenizer": tiny.build_text_tokenizer(text_length=9)},
        lambda: {"num_views": 3},
        lambda: {"max_shift": 3},
        lambda: {"max_zoom": 1.25},
        lambda: {"bpe_dropout": 0.1},
        lambda: {"bpe_dropout": 0.2},
    ],
)
def test_any_change_makes_it_again(tmp_path: Path, change: Any) -> None:
    build(tmp_path)
    _, lines = build(tmp_path, **change())
    assert "encoding" in lines[0]
    assert len(list(tmp_path.iterdir())) == 2
    _, lines = build(tmp_path)  # the first one is still there
    assert "reading" in lines[0]


def test_a_damaged_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = build(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    second, lines = build(tmp_path)
    assert "encoding" in lines[0]
    assert "cannot be read" in caplog.text
    assert_same(first, second)


def test_cut_captions_are_counted_for_each_set_alone(tmp_path: Path) -> None:
    text_tokenizer = tiny.build_text_tokenizer(text_length=16)
    long = [Pair("a.png", ("word " * 1000,)), *PAIRS[1:]]
    _, lines = build(tmp_path, pairs=long, text_tokenizer=text_tokenizer)
    assert lines[-1] == "1 of 5 captions were longer than 16 tokens and were cut"
    _, lines = build(tmp_path, text_tokenizer=text_tokenizer)
    assert "cut" not in lines[-1]


def test_captions_have_variants_and_the_first_is_the_usual_one(tmp_path: Path) -> None:
    text_tokenizer = tiny.build_text_tokenizer(text_length=30)
    plain, _ = build(tmp_path, text_tokenizer=text_tokenizer)
    dataset, _ = build(tmp_path, text_tokenizer=text_tokenizer, bpe_dropout=0.5)
    assert torch.equal(dataset.caption_offsets, plain.caption_offsets)
    assert torch.equal(dataset.image_token_ids, plain.image_token_ids)
    table = dataset.text_token_ids.unflatten(0, (6, NUM_VARIANTS))
    assert torch.equal(table[:, 0], plain.text_token_ids)
    captions = text_tokenizer.decode(plain.text_token_ids.long())
    for caption, rows in zip(captions, table, strict=True):
        assert set(text_tokenizer.decode(rows.long())) == {caption}
    ids, uniforms = torch.arange(3), torch.linspace(0, 0.999, 200)
    assert torch.equal(dataset.captions_of(ids, torch.zeros(3)), plain.text_token_ids[[0, 2, 3]])
    third = torch.full((200,), 2)
    seen, usual = (each.captions_of(third, uniforms) for each in (dataset, plain))
    assert text_tokenizer.decode(seen) == text_tokenizer.decode(usual)
    assert len(seen.unique(dim=0)) == len(dataset.text_token_ids[-3 * NUM_VARIANTS :].unique(dim=0))


def test_lookups_follow_their_uniforms() -> None:
    dataset = TokenDataset(
        image_token_ids=torch.arange(12).reshape(3, 2, 2).int(),
        text_token_ids=torch.arange(6)[:, None].int(),
        caption_offsets=torch.tensor([0, 2, 3, 6]),
    )
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 2, 2])
    # Half of the random numbers take one of the first two captions, half take any.
    uniforms = torch.tensor([0.24, 0.26, 0.49, 0.999, 0.24, 0.26, 0.5, 0.67, 0.83, 0.84])
    chosen = dataset.captions_of(ids, uniforms).flatten().tolist()
    assert chosen == [0, 1, 2, 2, 3, 4, 3, 4, 4, 5]
    images = dataset.images_of(ids[:3], torch.tensor([0.0, 0.5, 0.49]))
    assert images.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_largest_uniform_stays_in_range() -> None:
    images, captions = torch.zeros(1, 33, 1).int(), torch.arange(33)[:, None].int()
    dataset = TokenDataset(images, captions, torch.tensor([0, 33]))
    largest = torch.tensor([1 - 2**-24])
    assert dataset.captions_of(torch.tensor([0]), largest).item() == 32
    assert dataset.images_of(torch.tensor([0]), largest).item() == 0


@settings(max_examples=20)
@given(st.integers(-7, 7), st.integers(-7, 7))
def test_shifts_agree_with_a_plain_loop(down: int, right: int) -> None:
    images = pixels()[:1, :, :9, :12]
    moved = shift_images(images, torch.tensor([[down, right]]))
    for row in range(9):
        for column in range(12):
            source = (min(max(row - down, 0), 8), min(max(column - right, 0), 11))
            assert torch.equal(moved[0, :, row, column], images[0, :, source[0], source[1]])


def test_each_image_has_its_own_shift() -> None:
    images = pixels()[:2]
    together = shift_images(images, torch.tensor([[1, 2], [-3, 0]]))
    assert torch.equal(together[:1], shift_images(images[:1], torch.tensor([[1, 2]])))
    assert torch.equal(together[1:], shift_images(images[1:], torch.tensor([[-3, 0]])))


def test_window_of_an_enlarged_image() -> None:
    images = torch.arange(64).mul(3).byte().reshape(1, 1, 8, 8).expand(1, 3, 8, 8).contiguous()
    same = zoom_images(images, torch.tensor([[0.0, 0.9, 0.9]]), max_zoom=1.5)
    assert torch.equal(same, images)
    last = torch.tensor([[0.999, 0.999, 0.0]])  # 12 x 12 pixels, of which the lower left 8 x 8
    window = zoom_images(images, last, max_zoom=1.5)
    row, column = 3, 2  # in the window; pixel centers lie at (i + 0.5) * 8 / 12 - 0.5
    down, right = (row + 4.5) / 1.5 - 0.5, (column + 0.5) / 1.5 - 0.5
    expected = 3 * (8 * down + right)  # the image is linear, and so is the enlargement
    assert window[0, 0, row, column].item() == pytest.approx(expected, abs=0.51)  # rounded to bytes


def test_window_of_an_enlarged_image_that_is_not_square() -> None:
    ramp = torch.arange(8)[:, None] * 20 + torch.arange(12) * 3
    images = ramp.byte().expand(1, 3, 8, 12).contiguous()
    last = torch.tensor([[0.999, 0.0, 0.999]])  # 12 x 18 pixels, of which the upper right 8 x 12
    window = zoom_images(images, last, max_zoom=1.5)
    assert window.shape == images.shape
    row, column = 5, 4
    down, right = (row + 0.5) / 1.5 - 0.5, (column + 6.5) / 1.5 - 0.5
    assert window[0, 0, row, column].item() == pytest.approx(20 * down + 3 * right, abs=0.51)


def test_each_image_has_its_own_window(tmp_path: Path) -> None:
    images, uniforms = pixels(), torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    together = zoom_images(images, uniforms, max_zoom=1.5)
    for index in range(3):
        part = slice(index, index + 1)
        alone = zoom_images(images[part], uniforms[part], max_zoom=1.5)
        assert torch.equal(together[part], alone)
    plain, _ = build(tmp_path, num_views=4, max_shift=0)
    zoomed, _ = build(tmp_path, num_views=4, max_shift=0, max_zoom=1.5)
    assert torch.equal(zoomed.image_token_ids[:, 0], plain.image_token_ids[:, 0])
    assert (zoomed.image_token_ids[:, 1:] != plain.image_token_ids[:, 1:]).any()
