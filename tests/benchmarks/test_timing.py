"""The harness of the benchmarks measures what it says."""

import itertools
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from benchmarks import timing
from benchmarks.__main__ import main
from benchmarks.parts import PARTS, choose_parts
from benchmarks.report import number, render
from benchmarks.timing import Job, NotMeasuredError, Result, Variant, interleave

CEILINGS = {"float32": 100.0, "bfloat16": 400.0, "memory": 10.0}


@pytest.fixture(autouse=True)
def quick_blocks(monkeypatch: pytest.MonkeyPatch):
    """One call per timed block: none warms up, and none is measured again."""
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "LONGEST_SECONDS", 0.0)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def measure(*variants: Variant, rounds: int = 4) -> list[Result]:
    return interleave("work", variants, "images/s", rounds)


def test_rounds_interleave_with_their_own_matrix_products() -> None:
    calls: list[tuple[str, str]] = []

    def note(name: str) -> None:
        calls.append((name, torch.get_float32_matmul_precision()))

    products = {"a": "highest", "b": "high", "c": "highest"}
    rows = [
        Variant(name, lambda name=name: Job(run=lambda: note(name)), matmul=matmul)
        for name, matmul in products.items()
    ]
    results = measure(*rows, rounds=6)
    rounds = [calls[start : start + 3] for start in range(0, 18, 3)]
    assert all(sorted(one) == list(products.items()) for one in rounds)
    assert {one[0][0] for one in rounds} == {"a", "b", "c"}, "everyone goes first"
    assert [len(result.costs) for result in results] == [6, 6, 6]


def test_costs_are_per_item() -> None:
    one, four = measure(
        Variant("one", lambda: Job(run=lambda: time.sleep(0.05))),
        Variant("four", lambda: Job(run=lambda: time.sleep(0.05), items=4, flops=8)),
    )
    assert four.flops == 2.0
    # A sleep never ends early: 0.05 s for one item, and for four far less than half of it each.
    assert min(one.costs) >= 0.05
    assert 0.0125 <= min(four.costs) < 0.025
    assert all(load is None or load >= 0 for load in one.others)


def test_failed_variants_are_reported_and_others_run() -> None:
    def raises(error: Exception):
        raise error

    results = measure(
        Variant("broken", lambda: raises(RuntimeError("no such\noperator"))),
        Variant("missing", lambda: raises(NotMeasuredError("not installed"))),
        Variant("late", lambda: Job(run=lambda: raises(ValueError("too late")))),
        Variant("fine", lambda: Job(run=lambda: sum(range(1000))), rounds=1),
    )
    broken, missing, late, fine = results
    assert broken.failure == "failed: RuntimeError: no such operator"
    assert missing.failure == "not measured: not installed"
    assert late.failure == "failed: ValueError: too late"
    assert [len(result.costs) for result in results] == [0, 0, 0, 1]
    assert f"| broken | {broken.failure} |" in render(results, CEILINGS, {})
    assert not fine.failure


def test_blocks_warm_up_and_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST_SECONDS", 10.0)
    busy = itertools.chain([0, 0, 9e9], itertools.repeat(9e9))  # others took the first block only
    monkeypatch.setattr(timing, "_busy_seconds", lambda: next(busy))
    calls: list[int] = []
    [again] = measure(Variant("a", lambda: Job(run=lambda: calls.append(0))), rounds=1)
    assert len(calls) == 4, "in each of two blocks one call to warm up and one that counts"
    assert len(again.costs) == 1
    assert again.others == [0.0]


@pytest.mark.parametrize("losses", [[2.0, 2.0], [2.0, float("nan")], [float("inf"), 1.0]])
def test_training_that_does_not_train_is_refused(losses: list[float]) -> None:
    timing.require_falling([3.0, 3.5, 2.9])
    with pytest.raises(ValueError, match="the loss does not fall"):
        timing.require_falling(losses)


@pytest.mark.skipif("TEST_ROUNDING" in os.environ, reason="torch compiles nothing then")
def test_eager_code_is_not_taken_for_compiled() -> None:
    linear = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="nothing of it is compiled"):
        timing.require_compiled(lambda: linear(torch.ones(1, 3)))
    compiled = torch.compile(linear, backend="aot_eager")  # needs no C++ compiler
    compiled(torch.ones(1, 3))
    timing.require_compiled(lambda: compiled(torch.ones(1, 3)))


def test_fraction_is_of_the_tighter_ceiling() -> None:
    assert all(rate > 0 for rate in timing.measure_ceilings(side=64).values())
    result = Result(work="w", variant="c", is_ours=True, unit="s", costs=[2.0], flops=100.0)
    assert timing.fraction_of_ceiling(result, CEILINGS) == 0.5  # 1 s of arithmetic in 2 s
    result.bytes = 15.0
    assert timing.fraction_of_ceiling(result, CEILINGS) == 0.75  # 1.5 s of reading
    result.precision, result.bytes = "bfloat16", 0.0
    assert timing.fraction_of_ceiling(result, CEILINGS) == 0.125
    result.floor = 1.0
    assert timing.fraction_of_ceiling(result, CEILINGS) == 0.5
    result.floor, result.flops = None, 0.0
    assert timing.fraction_of_ceiling(result, CEILINGS) is None


def test_flops_leave_attention_to_its_formula() -> None:
    linear, rows = nn.Linear(5, 7, bias=False), torch.randn(3, 5)
    assert timing.count_flops(lambda: linear(rows)) == 2 * 3 * 5 * 7
    batched = torch.randn(2, 3, 4)
    assert timing.count_flops(lambda: batched @ batched.mT) == 0
    assert timing.count_flops(lambda: batched @ batched.mT, with_batched=True) == 4 * 3 * 4 * 3
    # Two products of T x T x width, each 2 operations, and twice as much backward.
    expected = 3 * 2 * 2 * 10 * 10 * 8
    assert timing.attention_flops(layers=1, width=8, length=10, rows=1) == expected


def test_table_has_rates_ratios_and_fractions() -> None:
    shared = {"work": "train", "unit": "tokens/s"}
    own = Result(variant="ours", is_ours=True, costs=[0.01, 0.02, 0.03], flops=1.0, **shared)
    own.others = [0.1, None, 0.3]
    peer = Result(variant="a | b", is_ours=False, costs=[0.05], note="as shipped", **shared)
    peer.others, peer.build_seconds = [None], 63.0
    lines = render([own, peer], CEILINGS, {"date": "today"}).splitlines()
    assert "- date: today" in lines
    assert "| **ours** | 50.0 | 33.3 to 100 | 1.00 | 50 % | 0.30 |  |" in lines
    row = "| a / b | 20.0 | 20.0 to 20.0 | 2.50 |  | not known | as shipped; 63 s to build, "
    assert row + "compile and verify |" in lines
    own.unit = peer.unit = "ms"
    assert "| **ours** | 20.0 | 10.0 to 30.0 |" in render([own, peer], CEILINGS, {})
    values = (12345.6, 45.678, 4.5678, 0.045678, 0.5)
    assert [number(value) for value in values] == ["12,346", "45.7", "4.57", "0.0457", "0.5"]


def test_parts_are_selected_by_prefix() -> None:
    assert choose_parts(["all"]) == list(PARTS)
    assert choose_parts(["sample_o", "train"]) == ["train_small", "train_medium", "sample_one"]


@pytest.mark.parametrize("option", ["--parts=speed", "--rounds=0", f"--out={__file__}/folder"])
def test_bad_options_are_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", option])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_peak_memory_grows() -> None:
    code = (
        "import torch\nfrom benchmarks.training import peak_gib\nbefore = peak_gib()\n"
        "torch.ones(2**26).sum()  # a quarter of a GiB\nprint(before, peak_gib())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.01 < before < after - 0.2
