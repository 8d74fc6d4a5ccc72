"""What `projgrad bench` refuses in one line, without a process."""

import pytest
from in_process import FEW, MODELS, InProcess

pytestmark = pytest.mark.same_without_extension


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["no_such_module:make"], "no module no_such_module"),
        (["no_such_file.py:make"], "there is no file no_such_file.py"),
        ([f"{MODELS}nothing"], "has no function 'nothing'"),
        ([f"{MODELS}raises"], "raised ValueError: no data (bench_models.py:"),
        ([f"{MODELS}vector"], "forget of"),
        ([f"{MODELS}scalar"], 'reduction="none"'),
        ([f"{MODELS}one"], "the loss of one sample"),
        ([f"{MODELS}two_values"], "got 2 values"),
        ([f"{MODELS}lists"], "lists of closures"),
        ([f"{MODELS}meta"], "is on meta, but --device is cpu"),
        ([f"{MODELS}split"], "is on cpu and meta"),
        ([f"{MODELS}constant"], "has no gradient"),
        ([f"{MODELS}foreign"], "the optimizer holds no parameter"),
        ([f"{MODELS}no_part"], "is not what retain()[3:] is"),
        ([f"{MODELS}own", "--n", "4"], "has no parameter n"),
        ([f"{MODELS}own", "--dtype", "float64"], "is in float32, but --dtype is float64"),
        ([f"{MODELS}nan"], "returns NaN or infinite losses: 1 of 4"),
        ([f"{MODELS}batch_norm"], "batch norm in training mode makes a loss depend on the other samples"),
        ([f"{MODELS}frozen"], "no parameter of the model of"),
        ([f"{MODELS}needs"], "needs cannot be called: missing a required argument: 'k'"),
        ([f"{MODELS}leaves"], "leaves ended its process: sys.exit(0)"),
        (["mlp", "--n", "1"], "at least 2"),
        (["perceptron"], "nothing named perceptron"),
        (["mlp", "--contenders", "me"], "no contender named me"),
        (["mlp", "--op", "gram"], "of ops alone"),
        (["mlp", "--compare", "nowhere.csv"], "there is no such file"),
        (["mlp", "--compare", __file__], "is no steps.csv or ops.csv"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, told, bench):
    status, _, errors = bench(*arguments, *FEW)
    assert status == 2 and told in errors and len(errors.splitlines()) == 1 and len(errors) < 400


def test_out_that_is_a_file_is_named(bench):
    bench.out.write_text("")
    status, _, errors = bench("mlp")
    assert status == 2 and "out is not a folder" in errors and InProcess.started == 0


def test_threads_beyond_the_machine_are_refused(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench("mlp", "--threads", "100000")
    assert "must be at most" in capsys.readouterr().err and InProcess.started == 0
