"""Rankers: scores that do not depend on the batch, strict folders, and a CLIP of transformers."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_mini_impl.cli.generate import Ranking, generate_to_folder
from dalle_mini_impl.clip_ranker import ClipRanker, TransformersClipRanker, load_clip_ranker
from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from tests.faults.hostile import change_json
from tests.reference import tiny

IMAGES = [tiny.render_image(number) for number in range(12)]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture(scope="module")
def ranker() -> ClipRanker:
    return tiny.build_ranker(seed=8)  # whose favorite is not that of the likelihood


@pytest.fixture(scope="module")
def clip_dir(ranker: ClipRanker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    ranker.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(clip_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clip_dir, tmp_path / "clip")


def test_score_is_a_cosine_of_its_pair_alone(ranker: ClipRanker) -> None:
    pil_images = [*IMAGES, *IMAGES, *IMAGES]  # more than one batch
    prompts = [tiny.CAPTIONS[number % 5] for number in range(len(pil_images))]
    together = ranker.score(pil_images, prompts)
    assert together.std() > 0.05
    for index in (0, 11, 30, 35):
        alone = ranker.score(pil_images[index : index + 1], prompts[index : index + 1])
        # One shape for all, but a library may round the rows of one product in several ways.
        assert float(alone[0]) == pytest.approx(float(together[index]), abs=1e-5)
        images = ranker.embed_images([pil_images[index]])
        texts = ranker.embed_texts([prompts[index]])
        assert float(together[index]) == pytest.approx(float((images * texts).sum()), abs=1e-5)


def test_loaded_folder_scores_the_same(ranker: ClipRanker, clip_dir: Path) -> None:
    loaded = load_clip_ranker(clip_dir)
    assert isinstance(loaded, ClipRanker)
    assert not loaded.model.training
    scores = [each.score(IMAGES, list(tiny.CAPTIONS)) for each in (ranker, loaded)]
    assert torch.equal(*scores)


def changed(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / CONFIG, **values)


def sizes(tower: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        towers = json.loads((folder / CONFIG).read_text())["towers"]
        change_json(folder / CONFIG, towers=towers | {tower: towers[tower] | values})

    return damage


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-10])


def linked(folder: Path) -> None:
    outside = folder.parent / "elsewhere"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def other_tokenizer(folder: Path) -> None:
    TextTokenizer(train_text_tokenizer(["ab"], vocab_size=257), 8).save_pretrained(
        folder / "text_tokenizer"
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            weights(lambda tensors: tensors.pop("text_tower.head.weight")),
            "tensor text_tower.head.weight: got none",
        ),
        (
            weights(lambda tensors: tensors["text_tower.positions"][0].fill_(torch.nan)),
            "tensor text_tower.positions: holds numbers that are not finite",
        ),
        (truncated, "model.safetensors: not loaded"),
        (linked, "a link that leads out of the folder"),
        (changed(tint=1), "ClipConfig: unknown or missing fields: tint"),
        (changed(vocab_size=True), "vocab_size: got True, expected a whole number"),
        (changed(vocab_size=10**12), "vocab_size: got 1000000000000"),
        (changed(image_size=10**7), "the config asks for"),
        (changed(image_size=0), "image_size: got 0, expected at least 1"),
        (sizes("text", num_layers=10**7), "towers.text.num_layers: got 10000000"),
        (sizes("image", hidden_size=10**9, num_heads=1), "towers.image.hidden_size"),
        (sizes("image", patch_size=5), "patch_size: got 5"),
        (other_tokenizer, "vocab_size: got 257 in the tokenizer"),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / CONFIG).unlink(), "config.json: No such file"),
        (lambda folder: shutil.rmtree(folder / "text_tokenizer"), "No such file"),
    ],
)
def test_damaged_folder(folder: Path, damage: Callable[[Path], Any], reason: str) -> None:
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_clip_ranker(folder)
    message = str(caught.value)
    assert message.startswith(f"clip: {folder} does not load: ")
    assert reason in message
    assert "\n" not in message


class Darkest:
    """A ranker that prefers dark images, whatever the prompt."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        self.seen += prompts
        means = [-sum(image.convert("L").tobytes()) for image in images]
        return torch.tensor(means, dtype=torch.float32)


def test_pipeline_keeps_what_its_ranker_prefers() -> None:
    pipeline, darkest = tiny.build_pipeline(), Darkest()
    prompts = ["a blue box", "a red disc"]
    every = pipeline(prompts, num_images=6, seed=5)
    scores = Darkest().score(every.images, every.prompts).tolist()
    groups = [range(start, start + 3) for start in range(0, 12, 3)]
    best = [max(group, key=scores.__getitem__) for group in groups]
    log_likelihood_ratios = [max(group, key=every.scores.__getitem__) for group in groups]
    assert best != log_likelihood_ratios
    kept = pipeline(prompts, num_images=2, num_candidates=3, seed=5, rank=darkest)
    assert [each.tobytes() for each in kept.images] == [every.images[i].tobytes() for i in best]
    assert kept.seeds == [every.seeds[index] for index in best]
    assert kept.scores == [scores[index] for index in best]
    assert kept.prompts == [text for text in prompts for _ in range(2)]
    assert darkest.seen == [text for text in prompts for _ in range(6)]


def test_rank_none_keeps_the_first() -> None:
    pipeline = tiny.build_pipeline()
    every = pipeline("a blue box", num_images=6, seed=5)
    kept = pipeline("a blue box", num_images=2, num_candidates=3, seed=5, rank="none")
    assert kept.seeds == [5, 8]
    assert [each.tobytes() for each in kept.images] == [every.images[i].tobytes() for i in (0, 3)]


def generate(model: Path, out: Path, ranking: Ranking) -> dict[str, Any]:
    options: Any = {"num_images": 1, "num_candidates": 6, "seed": 0, "overrides": {}}
    generate_to_folder(str(model), prompts=["a blue box"], out=out, ranking=ranking, **options)
    [path] = out.glob("0*.png")
    with Image.open(path) as image:
        return json.loads(image.text["dalle_mini_impl"])  # type: ignore[attr-defined,no-any-return]


def test_clip_ranks_by_command(
    model_dir: Path, clip_dir: Path, ranker: ClipRanker, tmp_path: Path
) -> None:
    every = TextToImagePipeline.from_pretrained(model_dir)("a blue box", num_images=6)
    best = int(ranker.score(every.images, every.prompts).argmax())
    assert best not in (0, max(range(6), key=every.scores.__getitem__))
    found = generate(model_dir, tmp_path / "named", Ranking("clip", str(clip_dir)))
    assert found["seed"] == best
    assert found["rank"] == "clip"
    whole = shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(clip_dir, whole / "clip")
    assert generate(whole, tmp_path / "beside", Ranking("clip"))["seed"] == best
    assert generate(model_dir, tmp_path / "none", Ranking("none"))["seed"] == 0
    assert "rank" not in generate(whole, tmp_path / "plain", Ranking())


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        (Ranking("clip"), "rank: got clip, but .* has no folder clip; expected --clip"),
        (Ranking("clip", "no/such/folder/x"), "clip: no/such/folder/x: no such folder; expected"),
        (Ranking("none", "x"), "clip: got x with --rank none, expected --rank clip"),
    ],
)
def test_invalid_ranking(model_dir: Path, tmp_path: Path, ranking: Ranking, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(model_dir, tmp_path / "out", ranking)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture(scope="module")
def their_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of transformers with random weights."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("their")
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = hf.CLIPTokenizer(vocab=vocab, merges=[])
    tokenizer.model_max_length = 12
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    towers = {"text_config": small | text | ends, "vision_config": small | image}
    model = hf.CLIPModel(hf.CLIPConfig(**towers, projection_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    hf.CLIPProcessor(hf.CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def test_clip_of_transformers(their_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    loaded = load_clip_ranker(their_dir)
    assert isinstance(loaded, TransformersClipRanker)
    prompts = ["a red disc", "a very long caption that is cut at the end", *["a blue box"] * 10]
    scores = loaded.score(IMAGES, prompts)
    assert scores.shape == (12,)
    assert scores.abs().max() <= 1 + 1e-6
    assert scores.std() > 1e-3
    alone = loaded.score(IMAGES[7:8], prompts[7:8])
    assert torch.equal(alone[0], scores[7])
    assert generate(model_dir, tmp_path / "out", Ranking("clip", str(their_dir)))["rank"] == "clip"


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_damaged_clip_of_transformers(their_dir: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(their_dir, tmp_path / "their")
    for path in folder.iterdir():
        if path.name in (name, "processor_config.json"):
            path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=f"^clip: {folder} does not load: ") as caught:
        load_clip_ranker(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "nowhere", "a/b/c"])
def test_missing_folder_is_not_asked_for_on_the_network(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersClipRanker, "from_pretrained", pytest.fail)
    with pytest.raises(UserError, match=f"clip: {re.escape(name)}: no such folder; expected"):
        load_clip_ranker(name)
