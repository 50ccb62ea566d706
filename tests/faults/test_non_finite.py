"""Fault test 15: a number that is not finite on one process of two reaches the weights of none."""

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_mini_impl.data.sample_order import SampleOrder
from tests.reference import line_runs
from tests.reference.line_task import LineTask, build_trainer
from tests.reference.processes import Script, run_script
from tests.reference.runs import newest


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "not_finite.jsonl").read_text()
    assert "NaN" not in text
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "infinite", "gradient"])
def test_one_process_of_two_and_no_process_updates(tmp_path: Path, kind: str) -> None:
    run_script(line_runs.__file__, tmp_path, "0", "12", f"{kind}:5-7", processes=2)
    ranks = [json.loads((tmp_path / f"seen-0-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    for rank in ranks:
        weights = rank["weights"]
        assert weights[5] == weights[6] == weights[7], "steps 5 and 6 were skipped"
        assert len(set(map(tuple, weights))) == len(weights) - 2, "all others were made"
    assert ranks[0]["weights"] == ranks[1]["weights"]
    order = SampleOrder(LineTask.num_samples, global_batch_size=8, seed=0)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [5, 6]
    for row in rows:
        assert row["sample_ids"] == order.indices(row["step"]).tolist()
        first, second = map(float, row["loss_of_each_process"])
        assert abs(first) < 1e6
        assert (abs(second) < 1e6) == (kind == "gradient")


@pytest.mark.slow
def test_ten_in_a_row_end_both_processes(tmp_path: Path) -> None:
    script = Script(line_runs.__file__, tmp_path, "0", "40", "loss:6-40", processes=2)
    code, _ = script.finish(seconds=300)
    assert code != 0
    output = script.all_output()
    assert "not finite 10 steps in a row up to step 15" in output
    assert str(tmp_path / "not_finite.jsonl") in output
    assert len(rows_of(tmp_path)) == 10
    found = newest(tmp_path)
    assert found.step == 6
    values = [value for group in found.tensors.values() for value in group.values()]
    assert all(value.isfinite().all() for value in values)


def test_an_unwritable_list_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "not_finite.jsonl").mkdir()
    build_trainer(LineTask(spoiled={3: "loss"}), tmp_path).train()
    assert "cannot write" in caplog.text
