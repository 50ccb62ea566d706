"""Results as Markdown tables."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.timing import Result, fraction_of_ceiling

GIGA = 1e9
LESS_IS_BETTER = ("s", "ms", "GiB")  # units whose figure is the cost itself


def render(results: Sequence[Result], ceilings: dict[str, float], facts: dict[str, Any]) -> str:
    """Format all tables of a run as Markdown, below the facts and the ceilings."""
    lines = ["# Benchmarks", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        f"- ceilings: float32 {ceilings['float32'] / GIGA:,.0f} GFLOP/s, "
        f"bf16 {ceilings['bfloat16'] / GIGA:,.0f} GFLOP/s, "
        f"memory {ceilings['memory'] / GIGA:,.1f} GB/s"
    ]
    for work in dict.fromkeys(result.work for result in results):
        lines += ["", f"## {work}", ""]
        lines += table([result for result in results if result.work == work], ceilings)
    return "\n".join(lines) + "\n"


def table(results: Sequence[Result], ceilings: dict[str, float]) -> list[str]:
    """Format the table of one work, whose rows have one unit, as lines of Markdown."""
    own = [result for result in results if result.is_ours and result.costs]
    head = ["", results[0].unit, "least to most"]
    head += [f"{one.variant} is ... times as good" for one in own]
    head += ["fraction of the ceiling", "cores used by others", "notes"]
    lines = [_row(head), _row(["---", *("--:" for _ in head[1:-1]), "---"])]
    for result in results:
        if not result.costs:
            lines.append(_row([result.variant, result.failure, *("" for _ in head[2:])]))
            continue
        figures = sorted(_figure(result, cost) for cost in result.costs)
        fraction = fraction_of_ceiling(result, ceilings)
        others = [load for load in result.others if load is not None]
        notes = [result.note, result.failure]
        if result.build_seconds > 20:
            notes.append(f"{result.build_seconds:.0f} s to build, compile and verify")
        cost = median(result.costs)
        cells = [
            f"**{result.variant}**" if result.is_ours else result.variant,
            number(_figure(result, cost)),
            f"{number(figures[0])} to {number(figures[-1])}",
            # Ratios are of costs, in every unit: above 1 is good for ours.
            *(number(cost / median(one.costs)) for one in own),
            "" if fraction is None else f"{100 * fraction:.0f} %",
            f"{max(others):.2f}" if others else "not known",
            "; ".join(note for note in notes if note),
        ]
        lines.append(_row(cells))
    return lines


def number(value: float) -> str:
    """Format three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    digits = 2 - len(str(int(value))) + 1
    return f"{value:.{digits}f}" if value >= 1 else f"{value:.3g}"


def _figure(result: Result, cost: float) -> float:
    if result.unit == "ms":
        return 1000 * cost
    return cost if result.unit in LESS_IS_BETTER else 1 / cost


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
