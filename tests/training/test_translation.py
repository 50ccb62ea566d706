"""The translator's loss and measures, and a translator that learns a small language."""

import json
import math
from pathlib import Path

import pytest
import torch

from dalle_mini_impl.builtin_datasets.translation_pairs import TextPair, TextPairs
from dalle_mini_impl.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.seq2seq import EncoderDecoder, EncoderDecoderConfig
from dalle_mini_impl.training.translation import TranslationTask, TranslationTaskConfig, target_nats
from dalle_mini_impl.translator import Translator, score_translations
from tests.reference import tiny

PAIRS = TextPairs(
    train=[TextPair("a red box", "box red", "1"), TextPair("a blue disc above", "disc blue", "2")],
    held_out=[TextPair("A Red  disc", "Disc  RED", "3")],
)


def build_task(**changes: float) -> TranslationTask:
    texts = [text for pair in PAIRS.train for text in (pair.source, pair.target)]
    text_tokenizer = TextTokenizer(train_text_tokenizer(texts, vocab_size=300), 20)
    torch.manual_seed(0)
    config = EncoderDecoderConfig(hidden_size=16, num_heads=2, intermediate_size=24)
    model = EncoderDecoder(config, vocab_size=text_tokenizer.vocab_size).eval()
    translator = Translator(model, text_tokenizer)
    return TranslationTask(PAIRS, translator, TranslationTaskConfig(**changes))


def test_loss_counts_tokens_and_end_but_no_pads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, generator=generator)
    target = torch.tensor([[3, 4, 0], [1, 2, 3]])
    log_probs = logits.log_softmax(dim=-1)
    first = -(log_probs[0, 0, 3] + log_probs[0, 1, 4] + log_probs[0, 2, 6]) / 3
    target_ids = [1, 2, 3, 6]
    second = -sum(log_probs[1, place, token] for place, token in enumerate(target_ids)) / 4
    got = target_nats(logits, target, end_token_id=6)
    torch.testing.assert_close(got, (first + second) / 2)
    # Szegedy et al. 2016: the smoothed fraction goes to all tokens evenly, the target included.
    uniform = [-log_probs[0, :3].mean(dim=-1).mean(), -log_probs[1].mean(dim=-1).mean()]
    smoothed = target_nats(logits, target, end_token_id=6, label_smoothing=0.1)
    expected = 0.9 * (first + second) / 2 + 0.1 * (uniform[0] + uniform[1]) / 2
    torch.testing.assert_close(smoothed, expected)


def test_evaluation_compares_normalized_texts() -> None:
    task = build_task()
    assert task.references == ["disc red"]
    figures = task.evaluate()
    assert figures["validation/greedy_exact"] == 0.0
    source, target = task.held_out
    logits = task.translator.model(source, target)
    nats = target_nats(logits, target, end_token_id=task.translator.model.end_token_id)
    assert figures["validation/nats"] == pytest.approx(float(nats.detach()), abs=1e-5)


def test_batches_have_no_column_of_pads_alone() -> None:
    task = build_task()
    batch = task.make_batch(torch.tensor([0]), torch.zeros(1, 2))
    both = task.make_batch(torch.tensor([0, 1]), torch.zeros(2, 2))
    for name, tokens in batch.items():
        assert (tokens != 0).all()
        assert torch.equal(both[name][:1, : tokens.shape[1]], tokens)
        assert not both[name][:1, tokens.shape[1] :].any()


def test_bpe_dropout_varies_training_texts_only() -> None:
    task = build_task(bpe_dropout_probability=0.5)
    plain = build_task()
    decode = task.translator.text_tokenizer.decode
    one = torch.tensor([0])
    usual = task.make_batch(one, torch.zeros(1, 2))
    seen = set()
    for uniform in torch.arange(8) / 8:
        batch = task.make_batch(one, torch.stack([uniform, torch.zeros(())])[None])
        assert decode(batch["source_token_ids"].long()) == ["a red box"]
        assert torch.equal(batch["target_token_ids"], usual["target_token_ids"])
        seen.add(tuple(batch["source_token_ids"][0].tolist()))
    assert len(seen) > 1
    for name, tokens in plain.make_batch(one, torch.full((1, 2), 0.99)).items():
        assert torch.equal(tokens, usual[name])
    assert all(map(torch.equal, task.held_out, plain.held_out))
    message = r"task.bpe_dropout_probability: got 1.0, expected 0 to below"
    with pytest.raises(ValueError, match=message):
        TranslationTaskConfig(bpe_dropout_probability=1.0)


def test_scores_separate_truth_from_unrelated_texts() -> None:
    references = ["빨간색 하트", "피자", "고양이 얼굴"]
    perfect = {"chrf": 100.0, "bleu": 100.0, "exact": 1.0}
    assert score_translations(references, references) == pytest.approx(perfect)
    assert score_translations(["red heart", "pizza", "cat face"], references)["chrf"] == 0.0
    one_of_three = score_translations(["빨간색 별", "피자", "개"], references)
    assert one_of_three["exact"] == pytest.approx(1 / 3)


def test_a_folder_gives_the_same_translations(tmp_path: Path) -> None:
    translator = build_task().translator
    translator.save_pretrained(tmp_path / "model")
    texts = ["a red box", "a blue disc", "고양이"]
    loaded = Translator.from_pretrained(tmp_path / "model")
    assert loaded(texts) == translator(texts)
    assert loaded.beam == translator.beam
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["model"]["num_decoder_layers"] = 2
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"model: .* is no translator that loads: .*tensor"):
        Translator.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is no translator that loads"):
        Translator.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="model: nowhere: no such folder"):
        Translator.from_pretrained("nowhere")
    for texts in ("a red box", ["a red box", " "]):
        with pytest.raises(UserError, match=r"texts: got .*, expected"):
            translator(texts)


def test_it_learns_to_write_backwards(tmp_path: Path) -> None:
    table = tiny.write_text_pairs(tmp_path / "pairs.tsv")
    options = {"max_steps": 120, "every": 60, "global_batch_size": 24}
    options |= {"learning_rate": 1e-2, "warmup_steps": 10}
    config = tiny.translation_run(table, tmp_path / "run", **options)
    folder, lines = tiny.train(config)
    rows = [row for row in tiny.read_metrics(tmp_path / "run") if "validation/train_nats" in row]
    # 0.10 to 0.40 from four starts; after half the steps it was 0.46 to 0.79.
    assert rows[-1]["validation/train_nats"] < 0.5 < math.log(300) / 4
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["all"].keys() == {"model", "nearest source", "copy"}
    assert any("nearest source" in line for line in lines)
    shown = (tmp_path / "run" / "translations.tsv").read_text().splitlines()
    assert len(shown) > 1
    assert {line.count("\t") for line in shown} == {3}
    predictions = Translator.from_pretrained(folder)([line.split("\t")[0] for line in shown[1:]])
    assert predictions == [line.split("\t")[2] for line in shown[1:]]
