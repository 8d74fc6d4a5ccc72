"""OrthoGrad over several processes: the same steps as one process takes on all samples."""

import pytest
import spread_backward_checks
import spread_checks
import spread_list_checks
import spread_metric_checks
import spread_shard_checks
import spread_union_checks
import spread_union_metric_checks
import together


@pytest.mark.slow
@pytest.mark.same_without_extension
@pytest.mark.parametrize(
    "modules",
    [
        (spread_union_checks, spread_union_metric_checks),
        (spread_checks, spread_shard_checks, spread_list_checks),
        (spread_metric_checks, spread_backward_checks),
    ],
    ids=["lists", "batches", "metric"],
)
def test_every_check_with_two_and_four_processes(tmp_path, modules):
    together.run(tmp_path, *modules)
