"""The decoder's loss: what is dropped, shuffled and replaced, and what is counted."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_mini_impl.data.text_tokenizer import PAD_TOKEN_ID
from dalle_mini_impl.data.token_dataset import TokenDataset
from dalle_mini_impl.models.dalle_shared import DalleLogits
from dalle_mini_impl.models.text_to_image import TextToImageModel
from dalle_mini_impl.pipeline import TextToImagePipeline
from dalle_mini_impl.training.dalle import DalleTask, DalleTaskConfig, SampleUniforms, text_loss
from tests.reference import tiny

LENGTH, TEXT_LENGTH, BATCH = 4, 8, 200
RASTER_ORDER = torch.arange(LENGTH).expand(BATCH, -1)


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return tiny.build_pipeline()


def make_tokens(samples: int, *, seed: int = 0) -> TokenDataset:
    """Every sample has its own tokens: cell c of view v of sample s tells all three."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 250, (2 * samples, TEXT_LENGTH), generator=generator)
    text[:, 5:] = PAD_TOKEN_ID
    image = torch.randint(0, 36, (samples, 3, LENGTH), generator=generator)
    return TokenDataset(image.int(), text.int(), torch.arange(0, 2 * samples + 1, 2))


def build_task(pipeline: TextToImagePipeline, *, samples: int = 50, **changes: float) -> DalleTask:
    return DalleTask(
        make_tokens(samples),
        make_tokens(7, seed=1),
        DalleTaskConfig(**({"caption_dropout_probability": 0.0} | changes)),
        sample_weights=None,
        pipeline=pipeline,
        fixed_prompts=("a red disc", "a blue box"),
    )


def test_mixed_images_are_not_measured(pipeline: TextToImagePipeline) -> None:
    mixed = make_tokens(50)
    own = TokenDataset(
        mixed.image_token_ids[:20], mixed.text_token_ids[:40], mixed.caption_offsets[:21]
    )
    config = DalleTaskConfig()
    shared = {"sample_weights": None, "pipeline": pipeline, "fixed_prompts": ("a red disc",)}
    alone = DalleTask(own, make_tokens(7, seed=1), config, **shared)
    beside = DalleTask(mixed, make_tokens(7, seed=1), config, **shared, num_own=20)
    whole = DalleTask(mixed, make_tokens(7, seed=1), config, **shared)
    for name in ("baseline/image_unigram_nats", "validation/train_image_nats"):
        found = [task.evaluate()[name] for task in (alone, beside, whole)]
        assert found[1] == pytest.approx(found[0])
        assert found[2] != pytest.approx(found[0])


class Spy(nn.Module):
    """Remembers what it is given; predicts the uniform distribution."""

    def __init__(self, dalle: TextToImageModel) -> None:
        super().__init__()
        self.sizes = dalle.config.vocab_size, dalle.config.codebook_size
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, text: Tensor, image: Tensor, *, image_order: Tensor) -> DalleLogits:
        self.calls.append((text, image, image_order))
        vocab, codebook = self.sizes
        shape = len(text), TEXT_LENGTH, vocab
        return DalleLogits(torch.zeros(shape), torch.zeros(len(text), LENGTH, codebook))


def run(task: DalleTask, *, progress: float = 0.0) -> tuple[dict[str, Tensor], Any, Any]:
    """Sends one batch through the loss; returns the batch, what the model saw, and the results."""
    generator = torch.Generator().manual_seed(5)
    sample_ids = torch.randint(0, task.num_samples, (BATCH,), generator=generator)
    batch = task.make_batch(sample_ids, torch.rand(BATCH, task.num_uniforms, generator=generator))
    spy = Spy(task.pipeline.dalle)
    results = task.loss(spy, batch, progress=progress, generator=generator)
    return batch | {"ids": sample_ids}, spy.calls[0], results


def test_every_column_has_one_name() -> None:
    matrix = torch.arange(2.0 * SampleUniforms.count(LENGTH)).view(2, -1)
    uniforms = SampleUniforms.from_matrix(matrix)
    assert [value.shape[1:].numel() for value in uniforms] == [1] * 6 + [LENGTH] * 3
    columns = [value if value.ndim == 2 else value[:, None] for value in uniforms]
    assert torch.equal(torch.cat(columns, dim=1), matrix)


def test_uniform_predictions_score_uniform_baselines(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline, text_loss_weight=0.25)
    _, _, (loss, metrics) = run(task)
    vocab_size = pipeline.text_tokenizer.vocab_size
    assert float(metrics["image_nats"]) == pytest.approx(math.log(36), abs=1e-5)
    assert float(metrics["text_nats"]) == pytest.approx(math.log(vocab_size), abs=1e-5)
    assert task.baselines["baseline/image_uniform_nats"] == pytest.approx(math.log(36))
    assert task.baselines["baseline/text_uniform_nats"] == pytest.approx(math.log(vocab_size))
    torch.testing.assert_close(loss, metrics["image_nats"] + 0.25 * metrics["text_nats"])


def test_unigram_baselines_are_entropies(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline)

    def entropy(tokens: list[int]) -> float:
        counts = Counter(tokens)
        return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())

    image = task.train.image_token_ids[:, 0].flatten().tolist()
    text = [token for token in task.train.text_token_ids.flatten().tolist() if token]
    assert task.baselines["baseline/image_unigram_nats"] == pytest.approx(entropy(image))
    assert task.baselines["baseline/text_unigram_nats"] == pytest.approx(entropy(text))


def test_no_augmentation_leaves_images_unchanged(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline)
    batch, (text, image, order), _ = run(task)
    assert torch.equal(image, task.train.image_token_ids[batch["ids"], 0].long())
    assert torch.equal(order, RASTER_ORDER)
    own = task.train.text_token_ids.reshape(50, 2, TEXT_LENGTH)[batch["ids"]]
    is_first, is_second = (text == own[:, 0]).all(1), (text == own[:, 1]).all(1)
    assert (is_first | is_second).all()
    assert float(is_first.float().mean()) == pytest.approx(0.5, abs=0.1)


def test_unknown_words_are_fragments_and_not_counted(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline, unknown_word_probability=0.5)
    task.fragment_ids = torch.arange(300, 400)  # no token of the captions
    batch, (text, _, _), (_, metrics) = run(task)
    own, fragment = batch["text_token_ids"], text >= 300
    assert torch.equal(text[~fragment], own[~fragment])
    is_spoiled = fragment.any(dim=1)
    assert 0.4 < is_spoiled.float().mean() < 0.6
    # From one token of the five to all, and up to ten more than these.
    replaced = fragment[is_spoiled, :5].sum(dim=1)
    assert set(replaced.tolist()) == {0, 1, 2, 3, 4, 5}
    added = fragment[is_spoiled, 5:].sum(dim=1)
    assert set(added.tolist()) == {0, 1, 2, 3}
    # Pads end a caption as ever.
    assert not ((text[:, :-1] == PAD_TOKEN_ID) & (text[:, 1:] != PAD_TOKEN_ID)).any()
    assert len(text[fragment].unique()) > 90
    # Uniform predictions: what is counted scores this wherever it is, and the rest nothing.
    counted = float((~is_spoiled).float().mean()) / 0.5
    expected = counted * math.log(pipeline.text_tokenizer.vocab_size)
    # Some captions are spoiled without a token replaced.
    assert 0.9 * expected < float(metrics["text_nats"]) < expected + 1e-4


def test_dropped_captions_are_hidden_and_not_counted(pipeline: TextToImagePipeline) -> None:
    batch, (text, _, _), (_, metrics) = run(build_task(pipeline, caption_dropout_probability=0.25))
    hidden = (text == PAD_TOKEN_ID).all(dim=1)
    assert 0.15 < hidden.float().mean() < 0.35
    assert torch.equal(text[~hidden], batch["text_token_ids"][~hidden])
    fraction = float((~hidden).float().mean())
    expected = fraction / 0.75 * math.log(pipeline.text_tokenizer.vocab_size)
    assert float(metrics["text_nats"]) == pytest.approx(expected, rel=1e-5)


def test_random_order_permutes_inputs_and_targets(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline, random_order_probability=0.5)
    batch, (_, image, order), _ = run(task)
    assert torch.equal(order.sort(dim=1).values, RASTER_ORDER)
    shuffled = (order != torch.arange(LENGTH)).any(dim=1)
    assert 0.35 < shuffled.float().mean() < 0.6  # one in 24 permutations changes nothing
    assert len({tuple(row) for row in order.tolist()}) == math.factorial(LENGTH)
    raster = torch.empty_like(image).scatter(1, order, image)
    assert torch.equal(raster, batch["image_token_ids"])

    class Knows(nn.Module):
        """Puts all its mass on the token of the requested cell."""

        def forward(self, text: Tensor, image: Tensor, *, image_order: Tensor) -> DalleLogits:
            targets = batch["image_token_ids"].gather(1, image_order)
            sure = nn.functional.one_hot(targets, 36) * 100.0
            return DalleLogits(torch.zeros(BATCH, TEXT_LENGTH, 300), sure)

    del batch["ids"]
    for noise in (0.0, 1.0):  # noise is for the inputs alone
        task = build_task(pipeline, random_order_probability=0.5, token_noise_probability=noise)
        _, metrics = task.loss(Knows(), batch, progress=0.0, generator=torch.Generator())
        assert float(metrics["image_nats"]) < 1e-6


def test_token_noise_changes_inputs_only(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline, token_noise_probability=0.5)
    batch, (_, image, _), _ = run(task)
    changed = image != batch["image_token_ids"]
    # Each sample has its own fraction below a half; another image may have the same token.
    assert float(changed.float().mean()) == pytest.approx(0.25 * 35 / 36, abs=0.06)
    counts = Counter(changed.sum(dim=1).tolist())
    assert counts[0] > BATCH * 0.75**LENGTH  # more than if all samples had the same fraction
    for cell in range(LENGTH):  # a replacement is another image's token of the same cell
        known = set(task.train.image_token_ids[:, 0, cell].tolist())
        assert set(image[changed[:, cell], cell].tolist()) <= known


def test_augmentation_ends_in_time(pipeline: TextToImagePipeline) -> None:
    task = build_task(
        pipeline,
        shifted_view_probability=1.0,
        token_noise_probability=0.5,
        random_order_probability=1.0,
        augmentation_ends_at=0.6,
    )
    batch, _, _ = run(task, progress=0.59)
    views = task.train.image_token_ids[batch["ids"]].long()  # (batch, views, cells)
    counts = (views == batch["view_token_ids"][:, None]).all(dim=2).float().mean(dim=0)
    assert (counts > 0.2).all()  # every view is used
    batch, (_, image, order), _ = run(task, progress=0.6)
    assert torch.equal(image, task.train.image_token_ids[batch["ids"], 0].long())
    assert torch.equal(order, RASTER_ORDER)


def test_a_sample_does_not_depend_on_its_batch(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline, shifted_view_probability=0.5)
    uniforms = torch.rand(6, task.num_uniforms)
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    whole = task.make_batch(ids, uniforms)
    part = task.make_batch(ids[2:4], uniforms[2:4])
    for name, value in part.items():
        assert torch.equal(value, whole[name][2:4]), name


def test_text_loss_is_a_mean_of_means() -> None:
    """Over captions, of means over tokens; hidden captions count as zero."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=generator)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0], [6, 6, 0, 0]])
    first = nn.functional.cross_entropy(logits[0], tokens[0])
    second = nn.functional.cross_entropy(logits[1, :1], tokens[1, :1])
    got = text_loss(logits, tokens, is_counted=torch.tensor([True, True, False]))
    torch.testing.assert_close(got, (first + second) / 3)


def test_evaluation_agrees_with_a_plain_computation(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline)
    figures = task.evaluate()

    def plain(data: TokenDataset, *, null: bool) -> float:
        total = 0.0
        for sample in range(len(data)):
            text = data.text_token_ids[2 * sample].long()[None]
            image = data.image_token_ids[sample, :1].long()
            logits = pipeline.dalle(torch.zeros_like(text) if null else text, image).image[0]
            probabilities = logits.detach().softmax(-1)
            for cell in range(LENGTH):
                total -= math.log(float(probabilities[cell, image[0, cell]]))
        return total / len(data) / LENGTH

    given, null = plain(task.held_out, null=False), plain(task.held_out, null=True)
    train = plain(task.train, null=False)
    expected = {
        "image_nats": given,
        "image_nats_null_caption": null,
        "log_likelihood_ratio_nats": null - given,
        "train_image_nats": train,
        "memorization_gap_nats": given - train,
    }
    for name, value in expected.items():
        assert figures[f"validation/{name}"] == pytest.approx(value, abs=1e-4), name
    assert abs(null - given) > 1e-3  # this model does read its caption
    assert figures.keys() > task.baselines.keys()


def test_encoder_decoder_reports_image_loss_only() -> None:
    pipeline = tiny.build_pipeline(**tiny.WITH_ENCODER)
    task = build_task(pipeline, text_loss_weight=0.25, caption_dropout_probability=0.3)
    uniforms = torch.rand(BATCH, task.num_uniforms, generator=torch.Generator().manual_seed(1))
    batch = task.make_batch(torch.arange(BATCH) % 50, uniforms)
    loss, metrics = task.loss(pipeline.dalle, batch, progress=0.0, generator=torch.Generator())
    hidden = SampleUniforms.from_matrix(uniforms).drop_caption < 0.3
    text = batch["text_token_ids"].masked_fill(hidden[:, None], PAD_TOKEN_ID)
    image = batch["image_token_ids"]
    logs = pipeline.dalle(text, image).image.log_softmax(-1)
    torch.testing.assert_close(loss, -logs.gather(2, image.unsqueeze(2)).mean())
    assert metrics.keys() == {"image_nats"}
    figures = task.evaluate()
    expected = build_task(tiny.build_pipeline()).evaluate().keys()
    assert figures.keys() == {name for name in expected if "text" not in name}
    assert figures["validation/log_likelihood_ratio_nats"] != 0


def test_the_sample_grid_is_always_the_same(pipeline: TextToImagePipeline) -> None:
    task = build_task(pipeline)
    (first,), (second,) = (task.make_image_grids() for _ in range(2))
    assert first.captions == ["a red disc", "a blue box"]
    as_bytes = [image.tobytes() for image in first.images]
    assert as_bytes == [image.tobytes() for image in second.images]
    assert as_bytes[0] != as_bytes[1]
