"""Links among images: into the store of the same repository, never to a stranger's files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle_mini_impl.data.pairs import Pairs, open_pairs
from dalle_mini_impl.errors import UserError
from tests.faults.hostile import nothing_comes_of_it, png_bytes

OUT = "is a link that leads out of the folder"


def link(path: Path, target: Path) -> None:
    """A relative link, as all these tools make them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def stored(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(source: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    pairs: Pairs = open_pairs(str(source))
    assert all(pairs.read_image(index) == png_bytes() for index in range(len(pairs)))
    found = {pair.path: pair.captions for pair in pairs}
    return found, {record.path: record.reason for record in pairs.skipped}


def hub(base: Path) -> tuple[Path, Path]:
    repository = base / "hub" / "datasets--user--cups"
    return repository / "snapshots" / "0123abc", repository / "blobs"


def annex(base: Path) -> tuple[Path, Path]:
    return base / "project" / "data" / "images", base / "project" / ".git" / "annex" / "objects"


def dvc(base: Path) -> tuple[Path, Path]:
    return base / "project" / "data", base / "project" / ".dvc" / "cache" / "files" / "md5"


STORES = {"hub": hub, "annex": annex, "dvc": dvc}
Layout = Callable[[Path], tuple[Path, Path]]


@pytest.mark.parametrize("layout", STORES.values(), ids=STORES)
def test_links_into_the_own_store_are_read(layout: Layout, tmp_path: Path) -> None:
    source, store = layout(tmp_path)
    link(source / "sub/a.png", stored(store / "ab/cdef", png_bytes()))
    link(source / "sub/a.txt", stored(store / "12/3456", b"a cup"))
    assert read(source) == ({"sub/a.png": ("a cup",)}, {})
    link(source / "metadata.jsonl", stored(store / "78", b'{"file_name":"sub/a.png","text":"x"}'))
    assert read(source) == ({"sub/a.png": ("x",)}, {})


@pytest.mark.parametrize("layout", STORES.values(), ids=STORES)
def test_other_files_are_out_of_reach_all_the_same(layout: Layout, tmp_path: Path) -> None:
    source, store = layout(tmp_path)
    (source / "sub").mkdir(parents=True)
    stored(store / "ab/cdef", png_bytes())
    in_store = [".git", ".dvc", "datasets--user--cups"]
    repository = next(up for up in (store, *store.parents) if up.name in in_store)
    stored(repository / "config", b"secret")
    link(store / "link", tmp_path / "home/.ssh/id")
    stored(tmp_path / "other.png", png_bytes())
    stored(tmp_path / "home/.ssh/id", b"secret")
    link(source / "good.png", store / "ab/cdef")
    (source / "good.txt").write_text("good")
    targets = {
        "passwd": Path("/etc/passwd"),
        "key": tmp_path / "home/.ssh/id",
        "beside": repository / "config",
        "through": store / "link",
        "other": tmp_path / "other.png",
    }
    for name, target in targets.items():
        link(source / f"{name}.png", target)
        (source / f"{name}.txt").write_text("x")
        stored(source / f"{name}2.png", png_bytes())
        link(source / f"{name}2.txt", target)
    with nothing_comes_of_it(tmp_path):
        found, reasons = read(source)
    assert found == {"good.png": ("good",)}
    names = [f"{name}{ending}" for name in targets for ending in (".png", "2.png")]
    assert sorted(reasons) == sorted(names)
    assert all(OUT in reason for reason in reasons.values())


@pytest.mark.parametrize("layout", STORES.values(), ids=STORES)
def test_a_store_that_is_itself_a_link_is_none(layout: Layout, tmp_path: Path) -> None:
    """As a stranger's folder may bring it: ``.git/annex/objects`` -> the user's keys."""
    source, store = layout(tmp_path)
    secret = stored(tmp_path / "home/.ssh/id", png_bytes())
    link(store, secret.parent)
    link(source / "a.png", secret)
    link(source / "b.png", store / "id")
    for name in "abc":
        stored(source / f"{name}.txt", b"x")
    stored(source / "c.png", png_bytes())
    found, reasons = read(source)
    assert found == {"c.png": ("x",)}
    assert reasons == {"a.png": f"a.png {OUT}", "b.png": f"b.png {OUT}"}


def test_the_store_of_a_repository_further_up_is_none(tmp_path: Path) -> None:
    outer = stored(tmp_path / ".git/annex/objects/x", png_bytes())
    source = tmp_path / "project" / "data"
    (tmp_path / "project" / ".git").mkdir(parents=True)
    link(source / "a.png", outer)
    stored(source / "a.txt", b"x")
    with pytest.raises(UserError, match=f"a.png {OUT}"):
        open_pairs(str(source))


def test_a_blob_of_another_repository_is_out_of_reach(tmp_path: Path) -> None:
    source, _ = hub(tmp_path)
    link(source / "a.png", stored(tmp_path / "hub/models--user--other/blobs/x", png_bytes()))
    stored(source / "a.txt", b"x")
    with pytest.raises(UserError, match=f"a.png {OUT}"):
        open_pairs(str(source))


def test_what_was_not_fetched_is_named(tmp_path: Path) -> None:
    source, store = annex(tmp_path)
    store.mkdir(parents=True)
    link(source / "a.png", store / "x")
    stored(source / "a.txt", b"x")
    with pytest.raises(UserError, match=r"a link to a file that is not there; .*`git annex get`"):
        open_pairs(str(source))


def test_shards_in_the_store_are_read_and_others_not(tmp_path: Path) -> None:
    from tests.data.test_pairs import write_tar

    source, store = hub(tmp_path)
    store.mkdir(parents=True)
    write_tar(store / "ab", {"a.png": png_bytes(), "a.txt": b"x"})
    write_tar(tmp_path / "other.tar", {"b.png": png_bytes(), "b.txt": b"x"})
    link(source / "data/0.tar", store / "ab")
    link(source / "data/1.tar", tmp_path / "other.tar")
    found, reasons = read(source)
    assert found == {"data/0.tar!a.png": ("x",)}
    assert reasons == {"data/1.tar": f"1.tar {OUT}"}


def test_metadata_that_leads_out_is_refused(tmp_path: Path) -> None:
    secret = stored(tmp_path / "secret", b'{"file_name": "a.png", "text": "secret"}')
    stored(tmp_path / "data/a.png", png_bytes())
    for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
        link(tmp_path / "data" / name, secret)
        with pytest.raises(UserError, match=f"{name} {OUT}"):
            open_pairs(str(tmp_path / "data"))
        (tmp_path / "data" / name).unlink()


# Linked folders


def test_a_linked_folder_within_is_followed(tmp_path: Path) -> None:
    source = tmp_path / "data"
    stored(source / ".store/one/a.png", png_bytes())
    stored(source / ".store/one/a.txt", b"a cup")
    link(source / "cups", source / ".store/one")
    assert read(source) == ({"cups/a.png": ("a cup",)}, {})


def test_folders_with_two_names_are_read_once(tmp_path: Path) -> None:
    source = tmp_path / "data"
    for split in ("1", "2"):
        stored(source / f"all/{split}/a.png", png_bytes())
        stored(source / f"all/{split}/a.txt", split.encode())
    link(source / "train", source / "all/1")
    link(source / "val", source / "all/2")
    link(source / "loop", source)
    found, reasons = read(source)
    assert found == {"train/a.png": ("1",), "val/a.png": ("2",)}
    assert reasons == {}
    notes = {note.path: note.reason for note in open_pairs(str(source)).notes}
    told = "linked folders that are read already under another name"
    assert notes == dict.fromkeys(["all/1", "all/2", "loop"], told)


def test_a_linked_folder_that_leads_out_is_one_line(tmp_path: Path) -> None:
    source = tmp_path / "data"
    stored(tmp_path / "home/b.png", png_bytes())
    stored(tmp_path / "home/b.txt", b"secret")
    stored(source / "a.png", png_bytes())
    stored(source / "a.txt", b"x")
    (source / "sub").mkdir()
    link(source / "sub/linked", tmp_path / "home")
    with nothing_comes_of_it(tmp_path):
        assert read(source) == ({"a.png": ("x",)}, {"sub/linked": f"linked {OUT}"})
