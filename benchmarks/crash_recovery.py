"""Kill trainings and flip bits of their checkpoints: python -m benchmarks.crash_recovery.

Both kinds of training are killed with SIGKILL again and again, half of the times between or in the
steps and half inside a save, and go on by themselves each time. In the end their weights must be
those of a run that nobody killed. The same is done to Accelerate's `save_state` and `load_state`,
in the loop that its documentation shows. A kill counts only if it hit while training.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.kill_runs import (
    INTERVAL,
    STEPS,
    newest_stock,
    prepare,
    run_ours,
    run_stock,
)

RUNS: dict[str, Callable[..., None]] = {"ours": run_ours, "Accelerate": run_stock}
LAST_EVENT = 60  # file operations of two saves are about so many
FLIPS = 100


@dataclass
class Outcome:
    """What a campaign against one training found."""

    who: str
    kind: str
    kills: int = 0
    kills_inside_a_save: int = 0
    failed_to_go_on: int = 0
    """Times that a run did not start again before somebody had deleted its newest checkpoint."""
    largest_loss: int = 0
    """Steps between the last one seen before a kill and the one that the run went on from."""
    finished: int = 0
    equal: int = 0
    """Finished runs that ended with the weights of the run that nobody killed."""
    flips: int = 0
    flips_noticed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def _child(
    who: str, kind: str, folder: Path, out: Path, fatal_event: int, pipe: Connection
) -> None:
    """Train in a process that is there to be killed."""
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)

    def report(what: str, step: int) -> None:
        pipe.send((what, step))

    RUNS[who](kind, folder, out, report, fatal_event=fatal_event)


def attempt(
    who: str, kind: str, folder: Path, out: Path, *, fatal_event: int = 0, steps: int = 0
) -> tuple[int | None, int, int]:
    """Let a run go on in a process of its own until it ends or is killed.

    Args:
        who: A key of `RUNS`.
        kind: ``tokenizer`` or ``decoder``.
        folder: That `prepare` filled.
        out: Folder of the run.
        fatal_event: The file operation of a save at which the process kills itself; 0 for none.
        steps: Kill it after so many steps; 0 for never.

    Returns:
        Exit code, negative for a signal; the step that it went on from; the last step it reported.
    """
    context = multiprocessing.get_context("forkserver")
    # Loaded once and inherited: each start costs a tenth of a second, and not three.
    preload = ["benchmarks.kill_runs", "datasets", "torch._dynamo", "transformers"]
    context.set_forkserver_preload(preload)
    listener, speaker = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(who, kind, folder, out, fatal_event, speaker), daemon=True
    )
    process.start()
    speaker.close()
    resumed = last = seen = 0
    while True:
        try:
            what, step = listener.recv()
        except EOFError:
            break
        last = step
        if what == "resumed":
            resumed = step
            continue
        seen += 1
        if seen == steps:
            time.sleep(random.uniform(0, 0.03))  # in the middle of a step
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode, resumed, last


def kill_again_and_again(
    who: str, kind: str, folder: Path, *, kills: int, seed: int = 0
) -> Outcome:
    """Run the campaign against one training.

    Args:
        who: A key of `RUNS`.
        kind: ``tokenizer`` or ``decoder``.
        folder: That `prepare` filled.
        kills: How many have to hit.
        seed: Of the moments.

    Returns:
        What was found.
    """
    outcome, started = Outcome(who, kind), time.perf_counter()
    random.seed(seed)
    base = folder / who / kind
    straight = base / "straight"
    exit_code, _, last = attempt(who, kind, folder, straight)
    assert (exit_code, last) == (0, STEPS), f"{who}, {kind}: exit code {exit_code} at step {last}"
    expected = fingerprint(who, straight)
    while outcome.kills < kills or outcome.finished == 0:
        out, reached, is_over = base / f"killed-{outcome.finished}", 0, False
        while not is_over:
            plan: dict[str, int] = {}
            if outcome.kills < kills:
                inside = outcome.kills % 2 == 1
                number = random.randint(1, LAST_EVENT if inside else 2 * INTERVAL)
                plan = {"fatal_event" if inside else "steps": number}
            exit_code, resumed, last = attempt(who, kind, folder, out, **plan)
            if exit_code not in {0, -signal.SIGKILL}:
                outcome.failed_to_go_on += 1
                _delete_newest(who, out)
                continue
            outcome.largest_loss = max(outcome.largest_loss, reached - resumed)
            reached, is_over = last, exit_code == 0
            if exit_code:
                outcome.kills += 1
                outcome.kills_inside_a_save += "fatal_event" in plan
        outcome.finished += 1
        outcome.equal += fingerprint(who, out) == expected
        shutil.rmtree(out)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _delete_newest(who: str, out: Path) -> None:
    """Do what a person would who finds that a run does not start."""
    newest = newest_stock(out)
    assert who != "ours", "a run of ours did not start again"
    assert newest is not None, f"{who} did not start, and there is no checkpoint to blame"
    shutil.rmtree(newest)


def fingerprint(who: str, out: Path) -> str:
    """Hash what a finished run has left: every weight, average and moment, and every loss.

    Args:
        who: A key of `RUNS`.
        out: Folder of the run.

    Returns:
        A hash.
    """
    digest = hashlib.sha256()
    if who == "ours":
        files = [*(out / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")]
        files += (out / "model").rglob("*.safetensors")
        rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [float(row["train/loss"]).hex() for row in rows if "train/loss" in row]
        assert len(losses) == STEPS
        digest.update(" ".join(losses).encode())
    else:
        import torch

        weights = torch.load(out / "final.pt", weights_only=True)
        for name in sorted(weights):
            digest.update(weights[name].contiguous().view(-1).numpy().tobytes())
        files = []
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def flip_bits(who: str, kind: str, folder: Path, outcome: Outcome, *, flips: int) -> None:
    """Flip one bit of a checkpoint at a time, and count how often loading it says so.

    Args:
        who: A key of `RUNS`.
        kind: ``tokenizer`` or ``decoder``.
        folder: Of the campaign, after `kill_again_and_again`.
        outcome: The counts go there.
        flips: How many; files take turns.
    """
    straight = folder / who / kind / "straight"
    pattern = "checkpoints/step-*" if who == "ours" else "step_*"
    newest = max(straight.glob(pattern), key=os.path.getctime)
    files = sorted(path for path in newest.iterdir() if path.is_file())
    load = _loader(who, kind, folder)
    silent: dict[str, int] = {}
    for number in range(flips):
        file = files[number % len(files)]
        original = file.read_bytes()
        content = bytearray(original)
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        file.write_bytes(content)
        try:
            load(newest)
            silent[file.name] = silent.get(file.name, 0) + 1
        except Exception:  # whatever it raises, it has noticed
            outcome.flips_noticed += 1
        file.write_bytes(original)
        outcome.flips += 1
    if silent:
        names = ", ".join(f"{name} {count}" for name, count in sorted(silent.items()))
        outcome.notes.append(f"loaded in silence: {names}")


def _loader(who: str, kind: str, folder: Path) -> Callable[[Path], Any]:
    """Return what loads a checkpoint as a resumed run would."""
    import torch
    from accelerate import Accelerator
    from transformers import get_linear_schedule_with_warmup

    from benchmarks.kill_runs import build_stock
    from dalle_mini_impl.training.checkpoint import load_checkpoint

    if who == "ours":
        return load_checkpoint
    accelerator = Accelerator(cpu=True)
    model, _ = build_stock(kind, folder, folder / "loaded")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    accelerator.prepare(model, optimizer, schedule)
    return lambda path: accelerator.load_state(str(path))


def render(outcomes: list[Outcome]) -> str:
    """Write the table.

    Args:
        outcomes: One per training.

    Returns:
        Markdown.
    """
    head = (
        "| training | kills that hit | of these inside a save | went on by itself "
        "| most steps lost (a save every "
        f"{INTERVAL}) | runs ended, of these with equal weights | flipped bits noticed | minutes |"
    )
    lines = [head, "|" + "---|" * 8]
    for found in outcomes:
        alone = found.kills - found.failed_to_go_on
        lines.append(
            f"| {found.who}, {found.kind} | {found.kills} | {found.kills_inside_a_save} "
            f"| {alone} of {found.kills} | {found.largest_loss} "
            f"| {found.finished}, {found.equal} | {found.flips_noticed} of {found.flips} "
            f"| {found.seconds / 60:.1f} |"
        )
    notes = [f"- {found.who}, {found.kind}: {note}" for found in outcomes for note in found.notes]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def main() -> None:
    """Run all campaigns and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crash_recovery", description=__doc__
    )
    parser.add_argument("--kills", type=int, default=40, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("out/kill_campaign"))
    parser.add_argument("--who", choices=(*RUNS, "all"), default="all")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    prepare(options.out)
    outcomes = []
    for who in RUNS if options.who == "all" else [options.who]:
        for kind in ("tokenizer", "decoder"):
            outcome = kill_again_and_again(who, kind, options.out, kills=options.kills)
            flip_bits(who, kind, options.out, outcome, flips=FLIPS)
            outcomes.append(outcome)
            print(render([outcome]).splitlines()[2], flush=True)
    table = render(outcomes)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    own = [outcome for outcome in outcomes if outcome.who == "ours"]
    if any(found.equal < found.finished or found.largest_loss > INTERVAL for found in own):
        raise SystemExit("the campaign found lost work")


if __name__ == "__main__":
    main()
