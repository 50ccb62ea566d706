"""Every preset loads, builds its model and survives being saved."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dalle_mini_impl.config import load_config, read_config
from dalle_mini_impl.data.text_tokenizer import MIN_VOCAB_SIZE
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.models.clip import Clip, ClipConfig
from dalle_mini_impl.models.dalle_config import DalleConfig
from dalle_mini_impl.models.seq2seq import EncoderDecoder
from dalle_mini_impl.models.text_to_image import build_text_to_image
from dalle_mini_impl.models.vit import VisionTransformer
from dalle_mini_impl.training.clip import ClipRunConfig
from dalle_mini_impl.training.dalle import DalleRunConfig
from dalle_mini_impl.training.run import save_config
from dalle_mini_impl.training.translation import TranslationRunConfig
from dalle_mini_impl.training.vit import ViTRunConfig
from dalle_mini_impl.training.vqvae import VQVAERunConfig
from vqvae import VQVAE

REPOSITORY = Path(__file__).parents[1]
PRESETS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def class_of(path: Path) -> type[Any]:
    of_folder = {"translation": TranslationRunConfig, "vit": ViTRunConfig, "clip": ClipRunConfig}
    if path.parent.name in of_folder:
        return of_folder[path.parent.name]
    is_decoder = "vqvae_dir" in yaml.safe_load(path.read_text(encoding="utf-8"))
    assert ("dalle" if is_decoder else "vqvae") in path.stem
    return DalleRunConfig if is_decoder else VQVAERunConfig


def tokenizers() -> dict[str, VQVAERunConfig]:
    """Tokenizer presets by the model folder that they write."""
    configs = [read_config(VQVAERunConfig, path) for path in PRESETS if path.stem.endswith("vqvae")]
    return {f"{config.output_dir}/model": config for config in configs}


def test_there_are_presets() -> None:
    assert {"demo", "emoji64"} <= {path.parent.name for path in PRESETS}


@pytest.mark.parametrize("size", [128, 256])
def test_presets_for_photographs_have_256_tokens(size: int) -> None:
    folder = REPOSITORY / "configs" / f"images{size}"
    assert {path.name for path in folder.iterdir()} == {"vqvae.yaml", "dalle.yaml"}
    tokenizer = read_config(VQVAERunConfig, folder / "vqvae.yaml").vqvae
    assert (tokenizer.image_size, tokenizer.image_grid_size) == (size, (16, 16))
    config = read_config(DalleRunConfig, folder / "dalle.yaml")
    assert tokenizers()[config.vqvae_dir].vqvae == tokenizer


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_preset_loads_builds_and_can_be_saved(path: Path, tmp_path: Path) -> None:
    config_class = class_of(path)
    config = read_config(config_class, path)
    save_config(config, tmp_path / "config.yaml")
    assert read_config(config_class, tmp_path / "config.yaml") == config
    if hasattr(config, "text"):
        assert config.text.vocab_size >= MIN_VOCAB_SIZE
    with torch.device("meta"):
        if isinstance(config, VQVAERunConfig):
            model: torch.nn.Module = VQVAE(config.vqvae)
        elif isinstance(config, TranslationRunConfig):
            model = EncoderDecoder(config.model, vocab_size=config.text.vocab_size)
        elif isinstance(config, ViTRunConfig):
            size = 8 if config.data.source == "digits" else config.data.image_size
            model = VisionTransformer(config.model, image_size=size, num_channels=3, num_classes=9)
        elif isinstance(config, ClipRunConfig):
            sizes = {"vocab_size": config.text.vocab_size, "text_length": config.text.text_length}
            model = Clip(ClipConfig(towers=config.model, image_size=config.image_size, **sizes))
        else:
            assert config.vqvae_dir in tokenizers(), "no preset makes this tokenizer"
            tokenizer = tokenizers()[config.vqvae_dir].vqvae
            assert config.data == tokenizers()[config.vqvae_dir].data
            model = decoder_of(config, tokenizer)
    assert num_parameters(model) > 10_000


def decoder_of(config: DalleRunConfig, tokenizer: Any) -> torch.nn.Module:
    return build_text_to_image(
        DalleConfig(
            decoder=config.decoder,
            vocab_size=config.text.vocab_size,
            text_length=config.text.text_length,
            codebook_levels=tokenizer.codebook_levels,
            image_grid_size=tokenizer.image_grid_size,
        )
    )


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_demo_presets_differ_in_architecture_only() -> None:
    demo = REPOSITORY / "configs" / "demo"
    one = read_config(DalleRunConfig, demo / "dalle.yaml")
    other = read_config(DalleRunConfig, demo / "dalle_encoder_decoder.yaml")
    tokenizer = tokenizers()[one.vqvae_dir].vqvae
    with torch.device("meta"):
        sizes = [num_parameters(decoder_of(each, tokenizer)) for each in (one, other)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)
    decoder, output_dir = one.decoder, one.output_dir
    assert dataclasses.replace(other, decoder=decoder, output_dir=output_dir) == one


def test_overrides_win_over_the_preset() -> None:
    path = REPOSITORY / "configs" / "demo" / "dalle.yaml"
    arguments = ["--config", str(path), "--training.max_minutes", "60", "--resume", "latest"]
    arguments += ["--data.balance_by", "null", "--fixed_prompts", '["a cat", "고양이"]']
    config, resume = load_config(DalleRunConfig, arguments, description="")
    preset = read_config(DalleRunConfig, path)
    assert resume == "latest"
    assert config.training.max_minutes == 60
    assert config.data.balance_by is None
    assert config.fixed_prompts == ("a cat", "고양이")
    assert config.decoder == preset.decoder
    assert config.training.learning_rate == preset.training.learning_rate


@pytest.mark.parametrize(("size", "expected"), [("32", 32), ("[32, 48]", (32, 48))])
def test_the_size_of_images_is_a_side_or_two(size: str, expected: object, tmp_path: Path) -> None:
    base = ["--data.source", "x", "--output_dir", "y"]
    config, _ = load_config(VQVAERunConfig, [*base, "--vqvae.image_size", size], description="")
    assert config.vqvae.image_size == expected
    save_config(config, tmp_path / "saved.yaml")
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved["vqvae"]["image_size"] == yaml.safe_load(size)
    assert read_config(VQVAERunConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("vqvae.image_size", "63", "vqvae.image_size: got 63, expected a multiple of 8"),
        ("vqvae.image_size", "[32, 44]", "vqvae.image_size: got (32, 44), expected a multiple of"),
        ("vqvae.image_size", "[32, 0]", "vqvae.image_size: got (32, 0), expected a multiple of 8"),
        ("vqvae.image_size", "[8, 8, 8]", "vqvae.image_size: got [8, 8, 8], expected int or [int"),
        ("vqvae.image_size", "true", "vqvae.image_size: got "),  # true, or True of a file
        ("vqvae.image_size", "[true, 8]", "vqvae.image_size: got [True, 8], expected int or [int"),
        ("vqvae.channels", "[]", "vqvae.channels: got (), expected one positive size per stage"),
        ("vqvae.fsq_levels", "[1]", "vqvae.fsq_levels: got (1,), expected levels of 2 or more"),
        ("training.max_minutes", "abc", "training.max_minutes: got abc, expected float or null;"),
        ("training.betas", "[a, b]", "training.betas: got a, expected float;"),
        ("vqvae.quantizer", "lfq", "vqvae.quantizer: got lfq, expected one of ['fsq', 'vq', 'gumb"),
        ("training.seed", "-1", "training.seed: got -1, expected 0 to"),
    ],
)
def test_a_bad_value_is_named_by_its_dotted_path(
    tmp_path: Path, option: str, value: str, message: str
) -> None:
    path = tmp_path / "preset.yaml"
    base = ["--data.source", "x", "--output_dir", "y"]
    section, name = option.split(".")
    path.write_text(f"{section}:\n  {name}: {value}\n")
    demo = str(REPOSITORY / "configs" / "demo" / "vqvae.yaml")  # holds another value
    for arguments, prefix in (
        ([*base, f"--{option}", value], ""),
        ([*base, "--config", str(path)], f"{path}: "),
        (["--config", demo, f"--{option}", value], ""),
    ):
        with pytest.raises(UserError) as caught:
            load_config(VQVAERunConfig, arguments, description="")
        assert str(caught.value).startswith(prefix + message)


def test_a_preset_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("vqvae: [\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/bad.yaml: Problems parsing"):
        read_config(VQVAERunConfig, tmp_path / "bad.yaml")


def test_the_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(VQVAERunConfig, ["--help"], description="")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate. (type: float, default: 0.001)" in shown
    assert "Residual blocks per encoder stage." in shown


@pytest.mark.parametrize(
    ("section", "key"), [("", "color"), ("training", "learning_rat"), ("task", "wavelet_weight")]
)
def test_an_unknown_key_is_named(tmp_path: Path, section: str, key: str) -> None:
    preset = yaml.safe_load((REPOSITORY / "configs/demo/dalle.yaml").read_text(encoding="utf-8"))
    (preset.setdefault(section, {}) if section else preset)[key] = 1
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(preset))
    with pytest.raises(UserError, match=key) as caught:
        read_config(DalleRunConfig, tmp_path / "odd.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "option"),
    [
        ("clip", "model.image.hidden_size"),
        ("clip", "model.text.hidden_size"),
        ("vit", "model.hidden_size"),
    ],
)
def test_a_value_of_a_tower_is_named_by_its_whole_path(preset: str, option: str) -> None:
    path = REPOSITORY / "configs" / preset / "emoji.yaml"
    with pytest.raises(UserError) as caught:
        load_config(class_of(path), ["--config", str(path), f"--{option}", "0"], description="")
    assert str(caught.value).startswith(f"{option}: got 0, expected at least 1")
