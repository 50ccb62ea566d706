"""Random damage to metadata and tars, with the checks of ``fuzz_readers.py``: quick, repeatable."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.fuzz_readers import CHECKS, prepare, repaired, seeds

changes = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), max_size=5)


@pytest.mark.parametrize("kind", CHECKS)
def test_good_inputs_pass_the_checks(kind: str, tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    for seed in seeds(kind):
        CHECKS[kind](seed, folder)


@pytest.mark.parametrize("kind", CHECKS)
@settings(max_examples=120)
@given(number=st.integers(0, 99), changes=changes, cut=st.floats(0, 1))
def test_no_damage_has_another_outcome(
    kind: str, number: int, changes: list[tuple[float, bytes]], cut: float
) -> None:
    data = bytearray(seeds(kind)[number % len(seeds(kind))])
    for place, value in changes:
        position = int(place * len(data))
        data[position : position + len(value)] = value
    with tempfile.TemporaryDirectory() as folder:
        CHECKS[kind](bytes(data[: max(1, int(cut * 2 * len(data)))]), prepare(Path(folder)))


@settings(max_examples=120)
@given(data=st.binary(max_size=2000))
def test_no_bytes_have_another_outcome(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for check in CHECKS.values():
            check(data, Path(folder))


def test_repaired_headers_are_read(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    good, damaged = seeds("tar")[0], bytearray(seeds("tar")[0])
    damaged[1 + 148] ^= 1
    assert repaired(bytes(damaged[1:])) == good[1:]
    CHECKS["tar"](bytes(damaged), folder)
