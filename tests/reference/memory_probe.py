"""Opens sources one after the other and says what came of each, and the peak of memory till then.

python tests/reference/memory_probe.py GOOD FOLDER...: a JSON object per folder but the first. In a
process of its own, because the peak never falls.
"""

import json
import re
import sys
from pathlib import Path

from dalle_mini_impl.data.loading import load_all_pixels
from dalle_mini_impl.data.pairs import open_pairs


def peak() -> int:
    """Return the largest resident size of this program so far, in KiB."""
    # Not getrusage: Linux starts its count with the memory of the program that started this one.
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib)


def attempt(source: str) -> str:
    try:
        pairs = open_pairs(source)
        pixels, _, bad = load_all_pixels(pairs, pixel_size=(16, 16), max_bad_fraction=1.0)
    except ValueError as error:
        return f"error: {str(error)[:2000]}"
    reasons = "; ".join(record.reason for record in (*pairs.skipped, *bad))
    return f"{len(pixels)} read; {reasons}"


if __name__ == "__main__":
    attempt(sys.argv[1])  # a harmless one: the libraries load at the first use
    for source in sys.argv[2:]:
        before = peak()
        outcome = attempt(source)
        row = {"source": source, "outcome": outcome, "grown_kib": peak() - before}
        print(json.dumps(row | {"peak_kib": peak()}), flush=True)
