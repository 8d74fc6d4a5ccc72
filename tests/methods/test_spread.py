"""OrthoGrad over several processes: the same steps as one process takes on all samples."""

import pytest
import spread_backward_checks
import spread_checks
import spread_metric_checks
import spread_union_checks
import together


@pytest.mark.slow
@pytest.mark.same_without_extension
@pytest.mark.parametrize(
    ("checks", "count"),
    [(spread_union_checks, 4), (spread_checks, 4), (spread_metric_checks, 4), (spread_backward_checks, 2)],
    ids=["lists", "batches", "metric", "backward"],
)
def test_every_check_with_two_and_four_processes(tmp_path, checks, count):
    together.run(checks.run, tmp_path, count)
