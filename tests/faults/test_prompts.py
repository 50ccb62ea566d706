"""Prompts and messages: no text of a user becomes a path, a control code or a leaked secret.

Faults 24, and 22 as far as generation goes, of the table in `README.md` beside this file.
"""

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_mini_impl.cli.generate import generate_to_folder
from dalle_mini_impl.cli.main import printable
from dalle_mini_impl.errors import UserError, without_secrets
from dalle_mini_impl.sampling.request import MAX_PROMPT_LENGTH
from tests.reference.commands import run_python
from tests.reference.runs import facts_of

HOSTILE = {
    "parent folders": "../../x",
    "parent folders of Windows": "..\\..\\x",
    "an absolute path": "/etc/passwd",
    "a drive": "C:\\Windows\\x",
    "a home": "~/.ssh/id_rsa",
    "a device of Windows": "con",
    "a hidden file": ".htaccess",
    "an option": "--out=/tmp",
    "a glob": "*?[a-z]",
    "an address": "file:///etc/passwd",
    "a percent code": "%2e%2e%2f%00",
    "a shell": "`touch x`; $(touch x) | touch x & x",
    "a format": "{0.__class__} %s %n ${x}",
    "HTML": "<img src=x onerror=window.__xss=1>",
    "a script": "</pre><script>window.__xss=1</script>",
    "markdown": "[x](javascript:window.__xss=1) ![y](http://example.com/y.png)",
    "SQL": "'; DROP TABLE images; --",
    "two lines": "one\r\ntwo",
    "settings of another image": "cat\nseed: 7, guidance_scale: 9\nSteps: 3",
    "JSON": '", "seed": 9, "x": "',
    "NUL": "a\x00b",
    "control codes": "".join(map(chr, range(1, 32))) + "\x7f\x85\x9b",
    "colors of a terminal": "\x1b[31m\x1b]0;title\x07red",
    "from right to left": "\u202egnp.exe\u2066abc",
    "nothing to be seen": "\u200b\u200d\ufeff",
    "marks alone": "\u0301\u0302" * 40,
    "emoji joined": "👩🏽\u200d🚒 👨\u200d👩\u200d👧\u200d👦 🇰🇷",
    "Korean": "빨간 하트",
    "Korean in parts": unicodedata.normalize("NFD", "빨간 하트"),
    "beyond the first plane": "𠀀𝔸🙂",
    "not a character": "\ufffe\uffff\U0010ffff",
    "a private letter": "\ue000\U000f0000",
    "the padding token": "<pad> <pad> </s> [PAD]",
    "one letter": "x",
    "300 bytes": "x" * 300,
    "900 bytes of Hangul": "가" * 300,
    "10,000 tokens": "q9 " * 5000,
    "as long as may be": "x" * MAX_PROMPT_LENGTH,
}
REFUSED = {
    "nothing": "",
    "spaces": "   ",
    "a new line": "\n",
    "spaces of all kinds": "\t\u3000\xa0\u2003\r\n",
    "half a pair": "\ud800",
    "the other half": "red \udc00 heart",
    "a pair of halves": "\ud83d\ude00",
    "a byte that is no UTF-8": os.fsdecode(b"caf\xe9"),
    "too long": "x" * (MAX_PROMPT_LENGTH + 1),
    "far too long": "가" * 5_000_000,
}


def generate(model_dir: Path, out: Path, *prompts: str, **options: Any) -> list[Path]:
    """Generate with `generate.py`'s function; returns the images in the order of their numbers."""
    known = {"num_images": 1, "num_candidates": 1, "seed": 0, "overrides": {}}
    before = set(out.glob("*")) if out.is_dir() else set()
    generate_to_folder(str(model_dir), prompts=prompts, out=out, **(known | options))
    return sorted(set(out.glob("[0-9]*.png")) - before)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_prompt_becomes_a_plain_name(case: str, model_dir: Path, tmp_path: Path) -> None:
    prompt = HOSTILE[case]
    (path,) = generate(model_dir, tmp_path / "here" / "out", prompt)
    written = {found.name for found in tmp_path.rglob("*") if found.is_file()}
    assert written == {path.name, "grid-0000.png"}
    assert path.parent == tmp_path / "here" / "out"
    assert len(os.fsencode(path.name)) <= 255
    assert all(letter.isalnum() or letter in "-_." for letter in path.name)
    assert path.name.isprintable()
    assert facts_of(path)["prompt"] == prompt
    with Image.open(path) as image:
        image.load()
        assert image.text["parameters"].startswith(f"{prompt}\nseed: 0, ")  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused(case: str, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prompt: got ") as caught:
        generate(model_dir, tmp_path / "out", "a good one", REFUSED[case])
    assert len(str(caught.value)) < 300
    str(caught.value).encode()  # can be shown
    assert not (tmp_path / "out").exists()


def test_the_same_call_twice_writes_the_same_bytes(model_dir: Path, tmp_path: Path) -> None:
    one, two = (generate(model_dir, tmp_path / name, "a red disc", seed=5) for name in "ab")
    assert one[0].read_bytes() == two[0].read_bytes()


def test_file_does_not_depend_on_other_prompts(model_dir: Path, tmp_path: Path) -> None:
    prompts = ["a red disc", "파란 상자", "<b>", "a green box"]
    together = generate(model_dir, tmp_path / "all", *prompts, num_images=2, seed=3)
    assert len(together) == 8
    for number, prompt in enumerate(prompts):
        alone = generate(model_dir, tmp_path / str(number), prompt, seed=4)
        assert alone[0].read_bytes() == together[2 * number + 1].read_bytes()


def test_both_forms_of_korean(model_dir: Path, tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "빨간 하트 각") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    one, two = generate(model_dir, tmp_path, *forms)
    assert Image.open(one).tobytes() == Image.open(two).tobytes()
    assert [facts_of(path)["prompt"] for path in (one, two)] == forms
    assert one.name.removeprefix("0000") == two.name.removeprefix("0001") == "-빨간-하트-각_0.png"


def test_a_later_call_never_overwrites(model_dir: Path, tmp_path: Path) -> None:
    first = generate(model_dir, tmp_path, "a red disc", "a blue box")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "9999999999-x.png").write_text("not one of ours")
    second = generate(model_dir, tmp_path, "a red disc", overrides={"guidance_scale": 1.0})
    names = [path.name for path in first + second]
    assert names == ["0000-a-red-disc_0.png", "0001-a-blue-box_0.png", "0002-a-red-disc_0.png"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert facts_of(second[0])["guidance_scale"] == 1.0
    assert {path.name for path in tmp_path.glob("grid*")} == {"grid-0000.png", "grid-0002.png"}


def test_many_images_are_those_of_single_calls(model_dir: Path, tmp_path: Path) -> None:
    """More than are generated at a time, with candidates."""
    prompt, options = "a red disc", {"num_candidates": 2}
    many = generate(model_dir, tmp_path / "many", prompt, num_images=70, seed=10, **options)
    assert len(many) == 70
    (single,) = generate(model_dir, tmp_path / "one", prompt, seed=10 + 2 * 66, **options)
    assert single.read_bytes() == (tmp_path / "many" / single.name).read_bytes()


SECRETS = {
    "a key in a path": ("WANDB_API_KEY", "0123456789abcdef", "model: 0123456789abcdef/x is no"),
    "a token": ("HF_TOKEN", "hf_abcdefghijk", "401 for hf_abcdefghijk"),
    "another token": ("MY_GITHUB_TOKEN", "ghp_abcdefghijk", "cloning with ghp_abcdefghijk failed"),
    "a password": ("DB_PASSWORD", "correct horse", "login correct horse refused"),
    "address": ("NOTHING", "x", "data.source: https://me:hunter2hunter2@example.com/a not found"),
    "odd address": ("NOTHING", "x", "s3://:p%40ss:w@rd@bucket/x and ftp:/a:b@c"),
}


@pytest.mark.parametrize("case", SECRETS)
def test_messages_hide_secrets(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, message = SECRETS[case]
    monkeypatch.setenv(name, value)
    for text in (without_secrets(message), str(UserError(message))):
        for secret in ("0123456789", "_abcdefghijk", "correct horse", "hunter2", "w@rd", "a:b"):
            assert secret not in text
        assert "***" in text
        assert without_secrets(text) == text


def test_messages_without_secrets_stay() -> None:
    for text in ("a: got 3:4@5", "https://example.com:80/a@b", "see docs://x", "me@example.com"):
        assert without_secrets(text) == text


def test_printable() -> None:
    assert printable("a\x1b[2Jb\x07\u202ec\ud800\r\nd") == "a\\x1b[2Jb\\x07\\u202ec\\ud800 d"
    assert printable("빨간 하트 🙂 é") == "빨간 하트 🙂 é"


# In a process of its own, after torch is loaded.
GENERATE = """
import resource, signal, sys
import dalle_mini_impl.cli.generate
import dalle_mini_impl.cli.image_files
from dalle_mini_impl.cli.main import run_command

exec(sys.argv[1])
run_command("generate", sys.argv[2:])
"""


def fail_to_generate(model: Path | str, *options: object, limit: str = "", **env: str) -> Any:
    """Generate under a limit, which must fail with exit code 2; returns what it printed."""
    arguments = ("--model", model, "--prompt", "a red disc", *options)
    result = run_python("-c", GENERATE, limit, *map(str, arguments), **env)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    return result


def test_process_shows_neither_secrets_nor_control_codes(tmp_path: Path) -> None:
    model = f"{tmp_path}/\x1b[2Jtopsecretkey/https://me:hunter2@host/x"
    result = fail_to_generate(model, WANDB_API_KEY="topsecretkey", LC_ALL="C.UTF-8")
    assert result.stdout == ""
    assert result.stderr.startswith("error: model: ")
    for hidden in ("\x1b", "topsecretkey", "hunter2", "Traceback"):
        assert hidden not in result.stderr


def test_out_of_memory_is_one_line_that_says_what_to_lower(model_dir: Path, tmp_path: Path) -> None:
    limit = (
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "size = pages * resource.getpagesize() + (80 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "dalle_mini_impl.cli.generate.MAX_IMAGES = 2_000_000\n"
    )
    options = ("--num-images", 1, "--num-candidates", 2_000_000, "--out", tmp_path)
    line = fail_to_generate(model_dir, *options, limit=limit).stderr
    assert line.startswith("error: memory: not enough to generate; lower --num-candidates")
    assert not list(tmp_path.glob("*.png"))


def test_full_disk_is_one_line_and_earlier_images_stay(model_dir: Path, tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk; the grid is larger than an image."""
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
    options = ("--num-images", 30, "--out", tmp_path)
    line = fail_to_generate(model_dir, *options, limit=limit).stderr
    assert line.startswith(f"error: out: writing into {tmp_path} failed: ")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 30  # and no half of a grid
    for name in names:
        with Image.open(tmp_path / name) as image:
            image.load()
