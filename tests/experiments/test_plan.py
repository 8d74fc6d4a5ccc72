"""Plans: what is counted without weights, against what the same tensors take with them."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from projgrad.experiments import cli
from projgrad.experiments.plan.memory import BLOCK, imagined
from projgrad.experiments.plan.plan import WAYS, largest, make_plan, sentence
from projgrad.experiments.plan.steps import Job, costs
from projgrad.experiments.plan.subjects import Subject, Unknown, subject_of

pytestmark = pytest.mark.same_without_extension
WIDTH, DEPTH = 1024, 4
TINY = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 128, "n_positions": 64}


def net():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)))


def net_losses(model, n):
    x = torch.zeros(n, WIDTH)
    return lambda: F.mse_loss(model(x), x, reduction="none").mean(1)


def pair():
    model = net()
    return model, lambda n: net_losses(model, n)


def mean_loss():
    model = net()
    return model, lambda n: lambda: net_losses(model, n)().mean()


def with_batch_norm():
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8))
    return model, lambda n: lambda: model(torch.zeros(n, WIDTH)).sum(1)


NET = Subject("a net", net, net_losses)
WEIGHTS = DEPTH * WIDTH**2 * 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **TINY}))
    return path


def test_the_ledger_counts_what_lives():
    with imagined("cpu") as ledger:
        a = torch.zeros(1000)
        view, b = a[:10], torch.zeros(3)
        assert ledger.live == 4096 + BLOCK
        del a
        assert ledger.live == 4096 + BLOCK  # the view holds it
        del view
        assert ledger.live == BLOCK and ledger.peak == 4096 + BLOCK
        del b


@pytest.mark.parametrize("way", ["plain", "global", "metric", "explicit_qr"])
def test_a_step_leaves_only_gradients_and_state(way):
    with imagined("cpu") as ledger:
        model, losses = pair()
        job, left = Job(model, losses, 4, "momentum", "cpu", lambda: ledger.flops), []
        for first in (True, False, False):
            job.take(way, first)
            left.append(ledger.live)
    tensors = 4 if way == "metric" else 3  # weights, gradients, momentum; and the forget gradient's own momentum
    batches = (4 + 4 + 1) * WIDTH * 4
    assert left == 3 * [tensors * WEIGHTS + batches]


def test_operations_are_counted_as_torch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    def run():
        x = torch.ones(2, 3, 8, 8, requires_grad=True)
        x = F.conv2d(x, torch.ones(4, 3, 3, 3)).flatten(2)
        return (x @ x.mT + torch.addmm(x[0], x[0], torch.ones(36, 36)).sum()).sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    with imagined("cpu") as ledger:
        run()
    assert ledger.flops == counter.get_total_flops() > 0


def test_a_plain_step_takes_weights_gradients_state_and_activations():
    for optimizer, states in (("sgd", 0), ("momentum", 1), ("adamw", 2)):
        cost = costs(NET, ["plain"], 16, optimizer=optimizer)["plain"]
        rest = cost.peak_bytes - (2 + states) * WEIGHTS
        assert 0 < rest < 1.2 * WEIGHTS  # temporaries of an optimizer, or activations
        assert (
            cost.flops == 2 * (3 * DEPTH - 1) * 2 * 16 * WIDTH**2
        )  # of two batches; the first layer's input needs none


def test_on_a_gpu_the_temporaries_of_adamw_are_as_large_as_the_model():
    cpu, cuda = (costs(NET, ["plain"], 1, optimizer="adamw", device=d)["plain"].peak_bytes for d in ("cpu", "cuda"))
    assert cpu < cuda and cuda >= 5 * WEIGHTS


def test_orthograd_takes_about_what_training_takes_and_qr_all_gradients():
    found = costs(NET, WAYS, 32)
    plain = found["plain"]
    for way in ("global", "per_tensor"):
        assert found[way].peak_bytes < 1.1 * plain.peak_bytes <= 1.2 * found[way].first_step_bytes
        assert plain.flops < found[way].flops < 1.6 * plain.flops
    assert found["explicit_qr"].peak_bytes > 32 * WEIGHTS and found["explicit_qr"].flops > plain.flops
    systems = (DEPTH - 1) * 8 * 32**2
    assert systems <= found["per_tensor"].peak_bytes - found["global"].peak_bytes <= systems + 4 * 32 * WIDTH


def test_the_metric_takes_a_copy_of_the_forget_gradient_and_its_momentum():
    found = costs(NET, ["global", "metric"], 4, optimizer="adamw")
    assert found["metric"].peak_bytes - found["global"].peak_bytes > WEIGHTS


def test_memory_grows_with_samples_and_shrinks_with_adapters(config):
    whole = subject_of(str(config), 32)
    small, large = (costs(whole, ["plain"], n, optimizer="adamw")["plain"] for n in (4, 64))
    assert large.peak_bytes > 2 * small.peak_bytes and large.flops == pytest.approx(16 * small.flops)
    adapted = costs(subject_of(str(config), 32, lora=2), ["plain", "global"], 64, optimizer="adamw")
    assert adapted["plain"].peak_bytes < large.peak_bytes
    assert adapted["global"].peak_bytes < 1.2 * adapted["plain"].peak_bytes


def test_float32_logits_take_more_than_some_rows_at_a_time(config):
    chunked, whole = (
        costs(subject_of(str(config), 32, loss=loss), ["plain"], 64, torch.bfloat16)["plain"].peak_bytes
        for loss in ("chunked", "float32")
    )
    assert whole - chunked >= 0.9 * 64 * 32 * TINY["vocab_size"] * 4


def chatty():
    print("hello")
    layer = nn.Linear(64, 64, bias=False)

    def losses(n):
        x = torch.zeros(n, 64, 64)
        return lambda: F.mse_loss(layer(x), x, reduction="none").mean((1, 2))

    return layer, losses


def test_a_plan_in_json_which_holds_nothing_that_a_function_prints(capsys):
    given = ["--n", "2", "--json", "--memory", "0.0005", "--optimizer", "sgd"]
    assert cli.main(["plan", f"{__name__}:chatty", *given]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert "hello" in captured.err
    for way in ("plain", "global", "per_tensor", "metric", "explicit_qr"):
        assert plan[way]["peak_bytes"] > 0 and plan[way]["flops"] > 0 and plan[way]["largest_n"] >= 0
    assert plan["plain"]["largest_n"] >= plan["explicit_qr"]["largest_n"] > 0


@pytest.mark.parametrize("slope", [1, 7, 1000])
def test_the_largest_number_of_samples_that_fits(slope):
    for limit in (99, 100, 1234, 10**6):
        asked = []

        def peak(k, asked=asked):
            asked.append(k)
            return 100 + slope * k + (k * k) // 1000

        best = largest(peak, 8, limit)
        assert (best == 0 or peak(best) <= limit) and peak(best + 1) > limit
        assert len(asked) < 30


def test_a_plan_in_words(config, capsys):
    assert cli.main(["plan", str(config), "--n", "4", "--tokens", "16", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(WAYS) and lines[-1].startswith("config.json, n = 4, 16 tokens, float32, adamw: ")
    assert all(len(line) <= 110 for line in lines[:-1]) and "fits a GPU with 16 GB" in lines[-1]


def test_a_function_gives_a_model_of_ones_own():
    plan = make_plan(f"{__name__}:pair", 16)
    assert plan["plain"]["peak_bytes"] == costs(NET, ["plain"], 16)["plain"].peak_bytes
    assert "more than" not in sentence(plan)
    plan["about"]["device"], plan["global"]["peak_bytes"] = "cuda", 20e9
    assert "20 GB, fits a GPU with 24 GB;" in sentence(plan)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nothing-of-this-name"], "no configuration named nothing-of-this-name"),
        (["json:nothing"], "json:nothing"),
        (["no_module_of_this_name:f"], "no_module_of_this_name"),
        (["vit"], "vit is a vit, which is no language model"),
        (["gpt2", "--tokens", "4096"], "takes 1024 tokens at most; got 4096"),
        (["gpt2", "--dtype", "int8"], "invalid choice"),
        ([":f"], ":f"),
        ([f"{__name__}:mean_loss"], "must have the shape (2,); got ()"),
        ([f"{__name__}:with_batch_norm"], "Call model.eval()"),
        (["gpt2", "--memory", "-1"], "must be positive and finite"),
        (["gpt2", "--memory", "nan"], "must be positive and finite"),
        ([f"{__name__}:net"], "must return a model and a function of n"),
    ],
)
def test_what_cannot_be_planned_says_why(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *given, "--n", "2"])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_broken_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Unknown, match="is no transformers configuration"):
        subject_of(str(tmp_path / "config.json"), 8)


def test_without_transformers_the_package_is_named(monkeypatch, config, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit):
        cli.main(["plan", str(config), "--n", "2"])
    assert "needs transformers" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_a_configuration_without_a_type_is_named(content, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Unknown, match="it has no model_type"):
        subject_of(str(tmp_path / "config.json"), 8)


def test_a_function_that_needs_arguments_is_named():
    with pytest.raises(Unknown, match="json:loads is called without arguments, but: missing a required argument: 's'"):
        subject_of("json:loads", 8)
