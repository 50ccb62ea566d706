"""One part of a run in a process of its own: a crash, or a flag of torch, stays inside.

python -m benchmarks.worker PART FILE [--rounds N] [--quick] [--bf16]
"""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

from benchmarks.ceilings import measure_ceilings
from benchmarks.config import BenchmarkConfig
from benchmarks.parts import PARTS


def main() -> None:
    """Measure the ceilings, run the part, write both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    config = BenchmarkConfig(rounds=options.rounds, quick=options.quick, bf16=options.bf16)
    warnings.filterwarnings("ignore")  # peers' deprecations, which would bury the figures
    before = measure_ceilings(side=512 if options.quick else 1536)
    results = PARTS[options.part](config)
    values = {"ceilings": before, "results": [dataclasses.asdict(one) for one in results]}
    options.file.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
