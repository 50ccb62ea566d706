"""Any sequence of steps, saves, kills inside saves, damage and resumes keeps to the one true path.

The path is that of a run that nothing ever happened to; its weights after each step are known.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dalle_mini_impl.training.checkpoint import newest_checkpoint
from dalle_mini_impl.training.trainer import Trainer
from tests.reference.line_task import LineTask, build_trainer

LONGEST = 200


class KilledError(BaseException):
    """Stands for SIGKILL: nobody catches it, and what was on disk stays."""


def fresh_trainer(out: Path) -> Trainer:
    return build_trainer(LineTask(max_steps=LONGEST), out, ema_decay=0.5)


def make_step(trainer: Trainer) -> None:
    trainer._step(trainer._batches(trainer.state.step))
    trainer.state.step += 1


def weights_of(trainer: Trainer) -> list[str]:
    assert trainer.average is not None
    values = [*trainer.model.parameters(), *trainer.average.weights.values()]
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            values += [state["exp_avg"], state["exp_avg_sq"]]
    return [float(value.detach()).hex() for value in values]


class LifeOfARun(RuleBasedStateMachine):
    """What may happen, in any order."""

    true_path: list[list[str]]

    @initialize()
    def begin(self) -> None:
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.folder = tempfile.TemporaryDirectory(dir=memory)
        self.out = Path(self.folder.name)
        self.straight = fresh_trainer(self.out / "straight")
        self.true_path = [weights_of(self.straight)]
        self.trainer = fresh_trainer(self.out)
        self.saved: dict[int, bool] = {}
        """Steps whose checkpoints are kept -> whether they are still as they were written."""

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(min(count, LONGEST - self.trainer.state.step)):
            make_step(self.trainer)

    @rule(count=st.integers(0, 3))
    def save(self, count: int = 0) -> None:
        self.step(count)
        assert self.trainer.save()
        self.remember(self.trainer.state.step)

    def newest_step(self) -> int:
        found = newest_checkpoint(self.out / "checkpoints")
        return found.step if found else -1

    def remember(self, step: int) -> None:
        """Two are kept, of those that are not newer. What was damaged since may be one of them."""
        self.saved[step] = True
        for old in sorted(found for found in self.saved if found <= step)[:-2]:
            del self.saved[old]

    @rule(operation=st.integers(1, 12), is_saved=st.booleans())
    def kill_inside_a_save(self, operation: int, is_saved: bool) -> None:
        """At one of its renames, flushes or new folders; then the run goes on by itself."""
        if is_saved:  # what is there of this step must stay until the new one is whole
            self.save()
        step = self.trainer.state.step
        if not self.save_unless_killed(operation):
            self.remember(step)
        elif self.newest_step() == step:
            self.saved[step] = True  # it was complete; nothing older was deleted yet
        self.resume()

    def save_unless_killed(self, operation: int) -> bool:
        """Whether a save got as far as this operation, which is its last."""
        patch, left, rmtree = pytest.MonkeyPatch(), operation, shutil.rmtree

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KilledError
                return call(*arguments, **options)

            return wrapped

        def rmtree_of_the_living(*arguments: Any, **options: Any) -> None:
            if left > 0:  # a killed process tidies nothing
                rmtree(*arguments, **options)

        for name in ("fsync", "replace", "mkdir"):
            patch.setattr(os, name, counting(getattr(os, name)))
        patch.setattr(shutil, "rmtree", rmtree_of_the_living)
        try:
            self.trainer.save()
        except KilledError:
            return True
        finally:
            patch.undo()
        return False

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 4), from_the_end=st.integers(1, 8), is_met=st.booleans())
    def damage_the_newest(self, which: int, from_the_end: int, is_met: bool) -> None:
        """Numbers stand at the end of a file of tensors; its header has checks of its own."""
        newest = self.out / "checkpoints" / f"step-{max(self.saved):08d}"
        if not newest.exists():
            return
        files = sorted(newest.iterdir())
        file = files[which % len(files)]
        content = bytearray(file.read_bytes())
        content[-min(from_the_end, len(content))] |= 128  # no ASCII, and no small number
        if bytes(content) != file.read_bytes():
            file.write_bytes(content)
            self.saved[max(self.saved)] = False
        if is_met:
            self.resume()

    @rule()
    def resume(self) -> None:
        """With new objects, as a new process would."""
        self.trainer.tracker.close()
        self.trainer = fresh_trainer(self.out)
        checkpoint = newest_checkpoint(self.out / "checkpoints")
        if checkpoint is not None:
            self.trainer.restore(checkpoint)
        whole = [step for step, is_whole in self.saved.items() if is_whole]
        assert self.trainer.state.step == max(whole, default=0)

    @invariant()
    def weights_are_those_of_the_true_path(self) -> None:
        if not hasattr(self, "trainer"):
            return
        while len(self.true_path) <= self.trainer.state.step:
            make_step(self.straight)
            self.true_path.append(weights_of(self.straight))
        assert weights_of(self.trainer) == self.true_path[self.trainer.state.step]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestLifeOfARun = LifeOfARun.TestCase
TestLifeOfARun.settings = settings(
    max_examples=12, stateful_step_count=15, phases=(Phase.generate,)
)
