"""Run the benchmarks: python -m benchmarks --parts all --out out/bench."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.parts import PARTS, BenchmarkConfig, choose_parts
from benchmarks.report import render
from benchmarks.timing import Result, measure_ceilings
from dalle_mini_impl.hardware import has_fast_bf16

BF16 = {"yes": True, "no": False, "auto": None}


def main() -> None:
    """Run the parts one after another; write the results after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--parts", default="all", help=f"all, or some of {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="output folder")
    parser.add_argument("--rounds", type=int, default=3, help="timed blocks per variant")
    parser.add_argument("--quick", action="store_true", help="toy sizes: only shows that it runs")
    parser.add_argument("--bf16", choices=BF16, default="auto", help="auto: if the hardware has it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        parts = choose_parts(options.parts.split(","))
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, expected at least 1")
    rounds, bf16 = 1 if options.quick else options.rounds, BF16[options.bf16]
    bf16 = has_fast_bf16() if bf16 is None else bf16
    config = BenchmarkConfig(rounds=rounds, quick=options.quick, bf16=bf16)
    if options.worker:
        measure_part(parts[0], config, options.worker)
        return
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make {options.out}: {error.strerror}")
    run_parts(parts, config, options.out)


def run_parts(parts: list[str], config: BenchmarkConfig, out: Path) -> None:
    """Run each part in its own process and write ``results.json`` and ``table.md`` after it."""
    facts = describe_machine(config)
    for name, value in facts.items():
        print(f"{name}: {value}")
    results: list[Result] = []
    ceilings = {"float32": 1.0, "bfloat16": 1.0, "memory": 1.0}
    for part in parts:
        started = time.perf_counter()
        print(f"{part} ...", flush=True)
        measured = run_part(part, config, out / f"{part}.json")
        results += [Result(**row) for row in measured["results"]]
        # The best rate of all parts: only disturbance makes one smaller.
        for name, rate in measured["ceilings"].items():
            ceilings[name] = max(rate, ceilings[name])
        facts[f"minutes of {part}"] = f"{(time.perf_counter() - started) / 60:.1f}"
        # Written after each part: an interrupted run of an hour keeps what it has.
        rows = [vars(result) for result in results]
        content = json.dumps({"facts": facts, "ceilings": ceilings, "results": rows}, indent=1)
        (out / "results.json").write_text(content + "\n", encoding="utf-8")
        (out / "table.md").write_text(render(results, ceilings, facts), encoding="utf-8")
    print(f"tables: {out / 'table.md'}")


def run_part(part: str, config: BenchmarkConfig, file: Path) -> dict[str, Any]:
    """Run one part in its own process; a part that crashes is one failed row."""
    command = [sys.executable, "-m", "benchmarks", "--parts", part, "--worker", str(file)]
    command += ["--rounds", str(config.rounds), "--bf16", "yes" if config.bf16 else "no"]
    command += ["--quick"] if config.quick else []
    # In its own process: compiled code, memory thresholds and a crash end with it.
    file.unlink(missing_ok=True)
    code = subprocess.run(command, check=False).returncode
    if code == 0 and file.is_file():
        measured = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return measured
    row = {"work": part, "variant": "the whole part", "is_ours": False, "unit": "s"}
    return {"results": [row | {"failure": f"failed: exit code {code}"}], "ceilings": {}}


def measure_part(part: str, config: BenchmarkConfig, file: Path) -> None:
    """Measure ceilings and a part in this process and write both to a file."""
    warnings.filterwarnings("ignore")  # peers' deprecations, which would bury the figures
    ceilings = measure_ceilings(side=512 if config.quick else 1536)
    results = [dataclasses.asdict(result) for result in PARTS[part](config)]
    file.write_text(json.dumps({"ceilings": ceilings, "results": results}), encoding="utf-8")


def describe_machine(config: BenchmarkConfig) -> dict[str, Any]:
    """Collect the facts that stand above the tables: machine, versions, stubs, date."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **peers.versions(),
    }
    if facts["dalle-pytorch"] != "not installed":
        facts["stubbed imports of dalle-pytorch"] = ", ".join(peers.missing_modules()) or "none"
    if not config.bf16:
        facts["bf16"] = "not measured: this processor has no bf16 instructions (--bf16 yes does it)"
    if config.quick:
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
