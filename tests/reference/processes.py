"""Scripts as real processes, watched line by line, so that a test can strike at a chosen step."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parents[2]
FAULTY_SCRIPT = Path(__file__).with_name("faulty_script.py")


def on_a_busy_machine(seconds: float) -> float:
    """What so many seconds of an idle machine may take on this one, now; IDLE=1 calls it idle."""
    if os.environ.get("IDLE"):
        return seconds
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Script:
    """A script under way; its output is collected as it comes."""

    def __init__(
        self, *command: str | Path, processes: int = 1, own_group: bool = False, **env: str
    ) -> None:
        """Starts `python SCRIPT ARGUMENTS`, or the same on several processes by torchrun."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(processes)]
        own_env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*launcher, *map(str, command)],
            env={**os.environ, **own_env, **env},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_group,
            # A shell without jobs lets its background processes ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = []
        for pipe, into in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            assert pipe is not None
            reader = threading.Thread(target=into.extend, args=(pipe,), daemon=True)
            reader.start()
            self._readers.append(reader)

    def wait_for(self, pattern: str, *, seconds: float = 300) -> "re.Match[str]":
        """Waits until a line of the output holds a pattern."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.out):
                if match := re.search(pattern, line):
                    return match
            if not any(reader.is_alive() for reader in self._readers):
                break
            time.sleep(0.005)
        raise AssertionError(f"no line with {pattern!r} in:\n{self.all_output()}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, *, seconds: float = 300) -> tuple[int, float]:
        """Waits for the end; returns the exit code and the seconds that it took."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still there after {seconds} s:\n{self.all_output()}") from None
        for reader in self._readers:
            reader.join(timeout=10)
        seconds = time.monotonic() - started
        logger.info("ended with code %d after %.1f s", code, seconds)
        return code, seconds

    def all_output(self) -> str:
        return "".join([*self.out, *self.err])

    def children(self) -> list[int]:
        """Process ids of the children, oldest first."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())


def run_script(*command: str | Path, processes: int = 1, **env: str) -> Script:
    """Runs a script to its end, which has to be a good one."""
    script = Script(*command, processes=processes, **env)
    code, _ = script.finish(seconds=300)
    assert code == 0, script.all_output()
    return script


def output_of(*command: str | Path) -> str:
    """Runs a script as a user would, on the processors that a test may use; returns its output."""
    command = (sys.executable, *map(str, command))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
