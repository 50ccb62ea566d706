"""The project is as the README and CONTRIBUTING say."""

import ast
import re
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.reference.commands import REPOSITORY, run_python

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCS = [path for path in sorted(REPOSITORY.glob("docs/*.md")) if path.name != "log.md"]
TEXTS = [REPOSITORY / "README.md", REPOSITORY / "README.ko.md", *DOCS]
PACKAGES = ("dalle_mini_impl", "vqvae")
MAX_SCRIPT_LINES = 70


def tracked_files() -> list[str]:
    """Files of the repository; of the folder where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return [name for name in result.stdout.splitlines() if (REPOSITORY / name).is_file()]
    return [
        path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.rglob("*") if path.is_file()
    ]


FILES = tracked_files()
SCRIPTS = [name for name in FILES if re.fullmatch(r"scripts/\w+\.py", name)]
MODULES = [name for name in FILES if name.endswith(".py") and name.split("/")[0] in PACKAGES]


def fenced_code(text: str) -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def folders_of_the_tree(text: str) -> list[str]:
    """The folders that the tree in a text names, one a line, indented below their parent."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    trees = [each for each in blocks if re.search(r"^\W*dalle_mini_impl/\s", each, re.MULTILINE)]
    assert len(trees) == 1, "expected one tree, with a line for dalle_mini_impl/"
    folders: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in trees[0].splitlines():
        found = re.match(r"[\s│├└─]*((?:[\w./-]+/ {1,2})*[\w./-]+/)(?:\s|$)", line)
        if not found:
            continue
        indent = found.start(1)
        while parents and parents[-1][0] >= indent:
            parents.pop()
        above = [name for _, name in parents]
        names = [name.rstrip("/") for name in found[1].split()]
        folders += ["/".join([*above, name]) for name in names]
        parents.append((indent, names[-1]))
    return folders


def test_the_tree_of_the_readme_names_the_folders() -> None:
    named = folders_of_the_tree(README)
    assert [name for name in named if not (REPOSITORY / name).is_dir()] == []
    top = {name.split("/")[0] for name in FILES if "/" in name and not name.startswith(".")}
    packages = {"/".join(name.split("/")[:2]) for name in MODULES if name.count("/") > 1}
    assert (top | packages) - set(named) == set(), "folders that the tree does not name"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_make_target_in_a_text_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    spans = "\n".join([fenced_code(text), *re.findall(r"`([^`\n]+)`", text)])
    for line in re.findall(r"\bmake((?: +(?!-|\w+=)[\w-]+)+)", spans):
        assert set(line.split()) <= targets, f"make{line}"


def anchors_of(path: Path) -> set[str]:
    """The anchors that a reader of Markdown makes of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*TEXTS, REPOSITORY / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def commands_in(path: Path) -> list[list[str]]:
    """The arguments of each `python scripts/...` or `torchrun ... scripts/...` in a text."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    spans = [*fenced_code(text).splitlines(), *re.findall(r"`([^`\n]+)`", text)]
    found = [re.search(r"scripts/\w+\.py\b.*", span) for span in spans if " scripts/" in span]
    commands = (match[0] for match in found if match)
    return [shlex.split(command.split(" #")[0].split(" &&")[0]) for command in commands]


COMMANDS = sorted({tuple(command) for path in TEXTS for command in commands_in(path)})


def test_the_readme_shows_commands() -> None:
    shown = {command[0] for command in COMMANDS}
    assert {
        f"scripts/{name}.py" for name in ("train", "train_vqvae", "train_dalle", "generate")
    } <= shown


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_flag_in_a_text_is_a_flag_of_its_script(command: tuple[str, ...]) -> None:
    from dalle_mini_impl.config import load_config
    from dalle_mini_impl.training.clip import ClipRunConfig
    from dalle_mini_impl.training.dalle import DalleRunConfig
    from dalle_mini_impl.training.translation import TranslationRunConfig
    from dalle_mini_impl.training.vit import ViTRunConfig
    from dalle_mini_impl.training.vqvae import VQVAERunConfig

    script, *arguments = command
    assert script in SCRIPTS
    assert arguments[:1] != ["--config"] or (REPOSITORY / arguments[1]).is_file()
    runs = {
        "scripts/train_vqvae.py": VQVAERunConfig,
        "scripts/train_dalle.py": DalleRunConfig,
        "scripts/train_translation.py": TranslationRunConfig,
        "scripts/train_vit.py": ViTRunConfig,
        "scripts/train_clip.py": ClipRunConfig,
    }
    if script in runs and "--config" in arguments:
        load_config(runs[script], arguments, description="")  # type: ignore[type-var]
        return
    module = REPOSITORY / "dalle_mini_impl" / "cli" / Path(script).name
    source = module.read_text(encoding="utf-8") + "--native"  # of cli/arguments.py
    source += " --data --tokenizer --dalle" if script == "scripts/train.py" else ""
    if script in runs:
        source += "--config --resume"
        fields = {f"--{name}" for run in runs.values() for name in run.__dataclass_fields__}
        source += " ".join(fields)
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.split("=")[0].split(".")[0]
            assert flag in source, f"{script} has no {flag}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short(name: str) -> None:
    assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) <= MAX_SCRIPT_LINES


@pytest.mark.parametrize("name", MODULES)
def test_the_library_never_prints(name: str) -> None:
    tree = ast.parse((REPOSITORY / name).read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}


def test_modules_that_check_shapes_evaluate_their_annotations() -> None:
    for name in MODULES:
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert "jaxtyping" not in text or "from __future__ import annotations" not in text, name


def test_generation_imports_no_training_libraries() -> None:
    # torch.compiler.disable as a decorator, for one, imports the compiler: two seconds.
    heavy = "{'torch._dynamo', 'transformers', 'datasets', 'accelerate', 'wandb'}"
    modules = "dalle_mini_impl.cli.image_files, dalle_mini_impl.cli.pipelines"
    code = f"import sys, {modules}; print(sorted({heavy} & sys.modules.keys()))"
    result = run_python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_the_import_contracts_hold() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    # In a process of its own: it switches the loggers of this one off.
    result = run_python("-c", code, "--no-cache")
    assert result.returncode == 0, result.stdout
    assert re.search(r"[1-9]\d* kept, 0 broken", result.stdout)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.14"])
def test_each_pin_is_one_that_its_python_takes(python: str) -> None:
    lines = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    chosen = {
        pin.name: pin
        for pin in pins
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    }
    assert set(chosen) == {pin.name for pin in pins}
    for name, pin in chosen.items():
        try:
            installed = metadata(name)
        except PackageNotFoundError:
            continue
        if pin.specifier.contains(installed["Version"], prereleases=True):
            assert SpecifierSet(installed["Requires-Python"] or "").contains(f"{python}.99"), name
