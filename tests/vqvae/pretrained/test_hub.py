"""Names on the Hub: what is one, what is found in the cache without a network, what is refused."""

import dataclasses
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dalle_mini_impl.errors import UserError
from dalle_mini_impl.training.estimate import tokenizer_of
from tests.reference import llamagen, tiny
from tests.reference.other_tokenizers import SIZE, source_folder
from vqvae.pretrained.hub import is_hub_name, tokenizer_folder
from vqvae.pretrained.load import load_tokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network: HF_HOME and HF_HUB_OFFLINE=1, which are read at import."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(cache: Path, name: str, files: Path) -> Path:
    """Put files into the cache as a download does: links from a snapshot to its blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(files.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FoundationVision/vq-ds16-t2i", True),
        ("a1/b_2.c", True),
        ("vq", False),
        ("a/b/c", False),
        ("./vq", False),
        ("../vq", False),
        ("/a/b", False),
        ("/a", False),
        ("~/vq", False),
        ("a/", False),
        ("a/.b", False),
        ("a b/c", False),
        ("a/b\n", False),
        ("here/vq", False),  # `here` is a folder: a run that is not trained yet
    ],
)
def test_names_are_told_from_paths(
    name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_name(name) is expected
    if not expected:
        assert tokenizer_folder(name) == Path(name)


@pytest.mark.parametrize("kind", ["janus", "ours", "openai", "llamagen"])
def test_a_name_is_loaded_from_the_cache(kind: str, cache: Path, tmp_path: Path) -> None:
    if kind == "llamagen":
        (tmp_path / "source").mkdir()
        save_file(llamagen.random_weights(), tmp_path / "source" / "model.safetensors")
    else:
        source_folder(kind, tmp_path / "source")
    snapshot = publish(cache, "someone/tokenizer", tmp_path / "source")
    assert tokenizer_folder("someone/tokenizer") == snapshot
    expected = load_tokenizer(tmp_path / "source", image_size=SIZE)
    config = tiny.dalle_run(tmp_path / "data", Path("someone/tokenizer"), tmp_path / "run")
    config = dataclasses.replace(config, vqvae_image_size=SIZE)
    found = tokenizer_of(config, None)
    assert found is not None
    assert found.fingerprint() == expected.fingerprint()


def test_a_decoder_is_trained_on_a_name(cache: Path, tmp_path: Path) -> None:
    publish(cache, "someone/tokenizer", source_folder("janus", tmp_path / "source"))
    data = tiny.write_data(tmp_path / "data")
    config = tiny.dalle_run(data, Path("someone/tokenizer"), tmp_path / "run", max_steps=1)
    folder, _ = tiny.train(config)
    stored = load_tokenizer(folder / "vqvae")
    assert stored.fingerprint() == load_tokenizer(tmp_path / "source").fingerprint()


def test_what_is_not_there_is_refused_in_one_line(cache: Path, tmp_path: Path) -> None:
    config = tiny.dalle_run(tmp_path / "data", Path("someone/tokenizer"), tmp_path / "run")
    with pytest.raises(UserError, match=r"vqvae_dir: someone/tokenizer: .*cannot be reached"):
        tokenizer_of(config, None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    publish(cache, "someone/tokenizer", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no such folder.*convert_tokenizer\.py FILE") as caught:
        tokenizer_of(config, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 404, 403, 500])
def test_a_refusal_of_the_hub_is_one_line(
    status: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a server on this machine, in place of the Hub's."""
    import huggingface_hub.constants

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    reason = "there is no such repository" if status == 404 else "no such folder; taken as"
    try:
        with pytest.raises(ValueError, match=f"^someone/tokenizer: .*{reason}") as caught:
            tokenizer_folder("someone/tokenizer")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(caught.value)


def test_links_out_of_a_repository_of_the_cache_are_refused(cache: Path, tmp_path: Path) -> None:
    source = source_folder("janus", tmp_path / "source")
    other = publish(cache, "other/private", source)
    snapshot = publish(cache, "someone/tokenizer", source)
    load_tokenizer(tokenizer_folder("someone/tokenizer"))
    weights = snapshot / "model.safetensors"
    for target in (
        source / "model.safetensors",
        other.parent.parent / "blobs" / f"{1:064x}",
        Path("../../../models--other--private/blobs") / f"{1:064x}",
    ):
        weights.unlink()
        weights.symlink_to(target)
        assert weights.is_file()
        with pytest.raises(ValueError, match="a link that leads out of the folder"):
            load_tokenizer(tokenizer_folder("someone/tokenizer"))
