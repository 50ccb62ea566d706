"""The copying report on hand-made tokens."""

import pytest
import torch

from dalle_mini_impl.evaluation.copying import nearest_agreement, report_copying

TRAIN = torch.tensor([[0] * 10, [1] * 10, [0, 1] * 5])


def test_agreement_is_with_the_nearest_picture_cell_by_cell() -> None:
    rows = torch.tensor([[0] * 10, [1] * 9 + [7], [1, 0] * 5, [7] * 10])
    assert nearest_agreement(rows, TRAIN).tolist() == pytest.approx([1.0, 0.9, 0.5, 0.0])


def test_copies_are_counted_from_nine_tenths_on() -> None:
    drawn = torch.tensor([[0] * 10, [1] * 9 + [7], [1] * 8 + [7] * 2, [7] * 10])
    held_out = torch.tensor([[0] * 5 + [7] * 5, [7] * 10])
    report = report_copying(drawn, held_out, TRAIN)
    assert report.drawn_agreement == pytest.approx((1 + 0.9 + 0.8 + 0) / 4)
    assert report.held_out_agreement == pytest.approx(0.25)
    assert (report.drawn_copies, report.held_out_copies) == (0.5, 0.0)
