"""Run the benchmarks: python -m benchmarks --parts all --out out/bench."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.parts import PARTS, choose_parts
from benchmarks.report import render
from benchmarks.timing import Result
from dalle_mini_impl.hardware import has_fast_bf16

BF16 = {"yes": True, "no": False, "auto": None}


def main() -> None:
    """Run the parts one after another and write what is known after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--parts", default="all", help=f"all, or some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="output folder")
    parser.add_argument("--rounds", type=int, default=3, help="timed blocks per contestant")
    parser.add_argument("--quick", action="store_true", help="toy sizes: only shows that it runs")
    parser.add_argument(
        "--bf16", choices=BF16, default="auto", help="auto: where the hardware multiplies it"
    )
    options = parser.parse_args()
    try:
        parts = choose_parts(options.parts.split(","))
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, expected at least 1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make {options.out}: {error.strerror}")
    wants_bf16 = BF16[options.bf16]
    bf16 = has_fast_bf16() if wants_bf16 is None else wants_bf16
    facts = describe_machine(bf16=bf16, quick=options.quick)
    for name, value in facts.items():
        print(f"{name}: {value}")
    flags = ["--rounds", "1" if options.quick else str(options.rounds)]
    flags += ["--quick"] if options.quick else []
    flags += ["--bf16"] if bf16 else []

    results: list[Result] = []
    ceilings: dict[str, float] = {}
    for part in parts:
        started = time.perf_counter()
        print(f"{part} ...", flush=True)
        values = run_part(part, options.out / f"{part}.json", flags)
        results += [Result(**row) for row in values["results"]]
        for name, rate in values["ceilings"].items():
            ceilings[name] = max(rate, ceilings.get(name, 0.0))
        facts[f"minutes of {part}"] = f"{(time.perf_counter() - started) / 60:.1f}"
        write(options.out, results, ceilings, facts)
    print(f"tables: {options.out / 'table.md'}")


def run_part(part: str, file: Path, flags: list[str]) -> dict[str, Any]:
    """Run one part in its own process.

    Args:
        part: Its name.
        file: Where it leaves its results; removed when read.
        flags: Of the run.

    Returns:
        Its results and ceilings; one failed row if it crashed.
    """
    command = [sys.executable, "-m", "benchmarks.worker", part, str(file), *flags]
    file.unlink(missing_ok=True)
    code = subprocess.run(command, check=False).returncode
    if code == 0 and file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return values
    row = {"work": part, "variant": "the whole part", "is_ours": False, "unit": "s"}
    return {"results": [row | {"failure": f"failed: exit code {code}"}], "ceilings": {}}


def write(
    out: Path, results: list[Result], ceilings: dict[str, float], facts: dict[str, Any]
) -> None:
    """Write ``results.json`` and ``table.md``."""
    rows = [vars(result) for result in results]
    values = {"facts": facts, "ceilings": ceilings, "results": rows}
    (out / "results.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    known = {"float32": 1.0, "bfloat16": 1.0, "memory": 1.0} | ceilings
    (out / "table.md").write_text(render(results, known, facts), encoding="utf-8")


def describe_machine(*, bf16: bool, quick: bool) -> dict[str, Any]:
    """Say what a reader must know beside the figures: machine, versions, stubs, date."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    facts |= {name: version for name, version in peers.versions().items()}
    if peers.versions()["dalle-pytorch"] != "not installed":
        facts["stubbed imports of dalle-pytorch"] = ", ".join(peers.missing_modules()) or "none"
    if not bf16:
        facts["bf16"] = "not measured: this processor has no bf16 instructions (--bf16 yes does it)"
    if quick:
        facts["quick"] = "toy sizes; these figures mean nothing"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
