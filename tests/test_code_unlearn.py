"""CodeUnlearn against loops in plain numpy; what removing codes changes, and what nothing may change."""

import copy
import math
import re
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from test_fast_paths import LLAMA
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import icu_nb.methods.code_unlearn as code_unlearn_module
from icu_nb.data.people import people_controls
from icu_nb.errors import InputError
from icu_nb.language_model import generate_continuations
from icu_nb.methods.code_unlearn import (
    Codebook,
    _CodebookConfig,
    _compare_counts,
    _loss_terms,
    code_unlearn,
    train_codebook,
)
from icu_nb.methods.registry import get_method
from icu_nb.models.loading import load_model
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.text import tokenize

SIZES = {"n_codes": 64, "n_active": 2, "epochs": 2, "max_length": 48, "learning_rate": 3e-3}


def trained(tiny, model=None, **changes):
    model = tiny.copy() if model is None else model
    texts = tiny.forget + tiny.retain
    return model, train_codebook(model, tiny.tokenizer, texts, **{**SIZES, "cache": False, **changes})


def unlearn_codes(tiny, model, forget=None, **changes):
    forget = tiny.forget[:4] if forget is None else forget
    settings = {"control": people_controls(forget), "max_length": 48, **changes}
    return code_unlearn(model, tiny.tokenizer, forget, tiny.retain, **settings)


def logits(model, tiny, texts=None):
    with torch.no_grad():
        return [
            model(row[None]).logits for row in tokenize(texts or tiny.forget[:6], tiny.tokenizer, 48).rows
        ]


def all_equal(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def pair(tiny):
    "A model with a trained codebook behind its last layer; take copies."
    return trained(tiny, layer=1, part="layer")


@pytest.fixture
def model(pair):
    return copy.deepcopy(pair[0])


@pytest.fixture
def codebook(model):
    return code_unlearn_module._find_codebook(model, None)


# ---- the bottleneck, worked out by hand ----

WIDTH, N_FEATURES, N_CODES, N_ACTIVE = 3, 6, 5, 2


def weights():
    "Numbers without a pattern, the same for both sides."
    matrix = {
        "encoder.weight": np.array([[math.sin(1 + 3 * i + j) for j in range(WIDTH)] for i in range(6)]),
        "encoder.bias": np.array([math.cos(i) / 5 for i in range(N_FEATURES)]),
        "decoder.weight": np.array([[math.cos(2 + 6 * i + j) for j in range(6)] for i in range(WIDTH)]),
        "decoder.bias": np.array([math.sin(i + 0.5) / 3 for i in range(WIDTH)]),
        "codes": np.array([[math.sin(0.7 + 1.3 * i * j + i) for j in range(6)] for i in range(N_CODES)]),
    }
    states = np.array([[math.sin(2.1 * t + j) for j in range(WIDTH)] for t in range(4)])
    pulls = np.array([[math.cos(1.7 * t - j) for j in range(WIDTH)] for t in range(4)])  # dL/d out
    return matrix, states, pulls


def by_hand(removed=()):
    "Output and gradients, token by token, with loops over codes, features and units."
    w, states, pulls = weights()
    codes = w["codes"]
    outputs, chosen = [], []
    to_states, to_codes = np.zeros_like(states), np.zeros_like(codes)
    for t, a in enumerate(states):
        h = [
            max(0.0, sum(w["encoder.weight"][i, j] * a[j] for j in range(WIDTH)) + w["encoder.bias"][i])
            for i in range(N_FEATURES)
        ]
        norm = math.sqrt(sum(x * x for x in h))
        cosines = []
        for k in range(N_CODES):
            length = math.sqrt(sum(x * x for x in codes[k]))
            cosine = sum(h[i] * codes[k, i] for i in range(N_FEATURES)) / (norm * length)
            cosines.append(-math.inf if k in removed else cosine)
        nearest = sorted(range(N_CODES), key=lambda k: -cosines[k])[:N_ACTIVE]
        total = [sum(codes[k, i] for k in nearest) for i in range(N_FEATURES)]
        outputs.append(
            [
                sum(w["decoder.weight"][j, i] * total[i] for i in range(N_FEATURES)) + w["decoder.bias"][j]
                for j in range(WIDTH)
            ]
        )
        chosen.append(nearest)
        # straight through: what reaches the sum of codes reaches h as it is
        back = [sum(w["decoder.weight"][j, i] * pulls[t, j] for j in range(WIDTH)) for i in range(N_FEATURES)]
        for i in range(N_FEATURES):
            for k in nearest:
                to_codes[k, i] += back[i]
            for j in range(WIDTH):
                to_states[t, j] += w["encoder.weight"][i, j] * back[i] * (h[i] > 0)
    return np.array(outputs), chosen, to_states, to_codes


def library_codebook():
    codebook = Codebook(_CodebookConfig(WIDTH, N_FEATURES, N_CODES, N_ACTIVE)).double()
    tensors = {name: torch.tensor(array) for name, array in weights()[0].items()}
    codebook.load_state_dict({**tensors, "removed": codebook.removed})
    return codebook


def through(codebook):
    _, states, pulls = weights()
    states = torch.tensor(states, requires_grad=True)
    output = codebook(states)
    (output * torch.tensor(pulls)).sum().backward()
    return output, states.grad, codebook.codes.grad


@pytest.mark.parametrize("removed", [(), (1,), (0, 4)])
def test_forward_and_straight_through_gradient(removed):
    codebook = library_codebook()
    codebook.remove(list(removed))
    outputs, _, to_states, to_codes = by_hand(removed)
    for ours, theirs in zip(through(codebook), (outputs, to_states, to_codes), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-9)


# `by_hand()` once, in numpy's float64: what must not move with a change of both sides
STORED = {
    "chosen": [[0, 2], [0, 1], [0, 3], [0, 2]],
    "output": [1.2518491322244896, 2.07717429457976, 2.4578221395637914],
    "to_states": [-0.6045743592394133, 0.06850804802608712, 0.6786044718774538],
    "code": 0,
    "to_code": [
        -0.15611452759116812,
        -0.05277195742660412,
        0.09908890702562911,
        0.15984788733040634,
        0.07364345719990917,
        -0.08026842785598154,
    ],
}


def test_stored_numbers():
    codebook = library_codebook()
    output, to_states, to_codes = through(codebook)
    features = codebook.features(torch.tensor(weights()[1]))
    assert codebook.nearest(features, N_ACTIVE).tolist() == STORED["chosen"]
    np.testing.assert_allclose(output.detach()[1], STORED["output"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(to_states[2], STORED["to_states"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(to_codes[STORED["code"]], STORED["to_code"], rtol=0, atol=1e-9)


def test_an_untrained_autoencoder_gives_the_states_back():
    codebook = Codebook(_CodebookConfig(4, 12, 3, 1)).double()
    states = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(codebook.decoder(codebook.features(states)), states, atol=1e-12)


def test_loss_terms(tiny, model, codebook):
    """Padding counts in none of them."""
    model.double()
    batch = tokenize([tiny.forget[0], tiny.forget[1][:40]], tiny.tokenizer, 48)
    terms = _loss_terms(model, codebook, batch, sparsity=0.01)
    caught = []
    hook = codebook.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
    losses, errors, sums = [], [], []
    with torch.no_grad():
        for row in batch.rows:
            scores = model(row[None]).logits[0].numpy()
            for position in range(len(row) - 1):
                shifted = scores[position] - scores[position].max()
                losses.append(math.log(np.exp(shifted).sum()) - shifted[row[position + 1]])
            states, output = (tensor[0].numpy() for tensor in caught.pop())
            errors += list(((states - output) ** 2).mean(1))
            w, b = codebook.encoder.weight.numpy(), codebook.encoder.bias.numpy()
            sums += [np.maximum(w @ state + b, 0).sum() for state in states]
    hook.remove()
    assert terms["ce"].item() == pytest.approx(np.mean(losses), abs=1e-9)
    assert terms["mse"].item() == pytest.approx(np.mean(errors), abs=1e-9)
    assert terms["l1"].item() == pytest.approx(0.01 * np.mean(sums), abs=1e-9)


# ---- which codes ----


def test_retrieval_statistics():
    """Pearson's test from its sum, its p-value from the error function: chi-squared with one degree."""
    topic, control, n_topic, n_control = [5, 0, 1, 30, 7], [2, 9, 0, 31, 0], 40, 400
    ratios, p_values = _compare_counts(np.array(topic), n_topic, np.array(control), n_control)
    for k, (a, c) in enumerate(zip(topic, control, strict=True)):
        b, d = n_topic - a, n_control - c
        n = n_topic + n_control
        statistic = 0.0
        for observed, row, column in (
            (a, n_topic, a + c),
            (b, n_topic, b + d),
            (c, n_control, a + c),
            (d, n_control, b + d),
        ):
            statistic += (observed - row * column / n) ** 2 / (row * column / n)
        ratio = math.log2((a / n_topic + 1e-6) / (c / n_control + 1e-6))
        assert ratios[k] == pytest.approx(ratio, abs=1e-9)
        assert p_values[k] == pytest.approx(math.erfc(math.sqrt(statistic / 2)), abs=1e-9)
        assert p_values[k] == pytest.approx(chi2_contingency([[a, b], [c, d]], False).pvalue, abs=1e-9)


def test_codes_that_none_or_all_have_tell_nothing():
    ratios, p_values = _compare_counts(np.array([0, 10]), 10, np.array([0, 20]), 20)
    assert ratios.tolist() == [0, 0] and p_values.tolist() == [1, 1]


def test_one_token_counts_with_enough_control_texts():
    one, none = np.array([1]), np.array([0])
    assert _compare_counts(one, 100, none, 300)[1] > 0.05 > _compare_counts(one, 100, none, 400)[1]


def test_codes_found_are_those_of_the_statistics(tiny, model, codebook):
    control = people_controls(tiny.forget[:4])
    counts = []
    for texts in (tiny.forget[:4], control):
        own = np.zeros(64, dtype=int)
        tokens = 0
        for row in tokenize(texts, tiny.tokenizer, 48).rows:
            seen = []
            hook = codebook.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                model(row[None])
            hook.remove()
            for token in codebook.nearest(codebook.features(seen[0][0]), 3):
                own[token.numpy()] += 1
            tokens += len(row)
        counts += [own, tokens]
    ratios, p_values = _compare_counts(*counts)
    facts = unlearn_codes(tiny, model, n_retrieved=3, significance=0.2)
    expected = (ratios > 0) & (p_values < 0.2)
    assert codebook.removed.tolist() == expected.tolist() and expected.any()
    assert facts["codes_removed"] == facts["codes_removed_in_all"] == expected.sum()
    assert facts["codes"] == 64 and facts["bytes"] > 0 and facts["seconds"] > 0


# ---- what changes, and what does not ----


def test_own_weights_stay_bit_for_bit(tiny):
    tiny.model.zero_grad()  # what another test may have left
    before = tiny.weights(tiny.model)
    model, codebook = trained(tiny, layer=1, part="layer")
    unlearn_codes(tiny, model)
    own = {name: x for name, x in model.state_dict().items() if ".codebook." not in name}
    assert own.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in own.items())
    assert all(p.grad is None for p in tiny.model.parameters())
    assert not all_equal(logits(model, tiny), logits(tiny.model, tiny))
    codebook.detach(model)
    assert tiny.same(model, before) and all_equal(logits(model, tiny), logits(tiny.model, tiny))


def test_training_lowers_the_loss(pair):
    history = pair[1].history
    assert history.epoch.tolist() == [1, 2] and (history.ce.diff().dropna() < 0).all()
    assert {"ce", "mse", "l1"} < {*history.columns}
    assert not any(p.requires_grad for p in pair[1].parameters())


def test_removal_changes_only_texts_that_use_the_codes(tiny, model, codebook):
    texts = tiny.forget + tiny.retain
    used = []
    for row in tokenize(texts, tiny.tokenizer, 48).rows:
        seen = []
        hook = codebook.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model(row[None])
        hook.remove()
        used.append({*codebook.nearest(codebook.features(seen[0]), 2).flatten().tolist()})
    frequency = [sum(code in own for own in used) for code in range(64)]
    code = min((k for k in range(64) if frequency[k]), key=lambda k: frequency[k])
    assert frequency[code] < len(texts)
    before = logits(model, tiny, texts)
    codebook.remove([code])
    after = logits(model, tiny, texts)
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [code in own for own in used]


def test_a_second_request_trains_nothing(tiny, model, codebook, monkeypatch):
    monkeypatch.delattr(code_unlearn_module, "_train_epochs")
    before = tiny.weights(model)
    first = unlearn_codes(tiny, model, significance=0.5)
    after_first = codebook.removed.clone()
    second = unlearn_codes(tiny, model, tiny.forget[4:], significance=0.5)
    assert second["codes_removed_in_all"] == first["codes_removed"] + second["codes_removed"]
    assert second["codes_removed"] > 0 and (codebook.removed >= after_first).all()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert [name.split(".")[-1] for name in changed] == ["removed"]


def test_a_copy_has_a_codebook_of_its_own(tiny, model, codebook):
    other = copy.deepcopy(model)
    before = logits(model, tiny)
    unlearn_codes(tiny, other, significance=0.5)
    assert not codebook.removed.any() and all_equal(logits(model, tiny), before)
    assert not all_equal(logits(other, tiny), before)


def test_continuations_with_and_without_a_cache_agree(tiny, model):
    prompts = [row[:20].tolist() for row in tiny.sequences.rows[:3]]
    cached = generate_continuations(model, prompts, [10] * 3, num_beams=1)
    for prompt, written in zip(prompts, cached, strict=True):
        tokens = torch.tensor([prompt])
        for _ in range(10):
            with torch.no_grad():
                following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
        assert tokens[0, 20:].tolist() == written


@pytest.mark.parametrize("part", ["attention", "layer"])
@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "llama"])
def test_architectures(tiny, family, part):
    vocabulary = len(tiny.tokenizer)
    torch.manual_seed(0)
    if family == "gpt_neo":
        model = tiny_gpt_neo(vocabulary, max_length=64, n_layers=2, hidden_size=16, n_heads=2)
    elif family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(**{**LLAMA, "vocab_size": vocabulary, "max_position_embeddings": 64})
        )
    model.eval()
    plain = logits(model, tiny)
    _, codebook = trained(tiny, model, part=part, epochs=1)
    assert codebook.config.layer == 1  # the middle of two
    held = logits(model, tiny)
    assert not all_equal(held, plain)
    unlearn_codes(tiny, model)
    codebook.remove(list(range(32)))
    assert not all_equal(logits(model, tiny), held)
    codebook.detach(model)
    assert all_equal(logits(model, tiny), plain)


def test_16_bit_models_keep_a_32_bit_codebook(tiny):
    model, codebook = trained(tiny, tiny.copy().bfloat16(), epochs=1)
    assert codebook.codes.dtype == torch.float32
    assert all(x.dtype == torch.bfloat16 for x in logits(model, tiny))


# ---- stored ----


def test_trained_once(tiny, cache, monkeypatch):
    first = trained(tiny, cache=True)[1]
    monkeypatch.delattr(code_unlearn_module, "get_cosine_schedule_with_warmup")  # training needs it
    again = trained(tiny, cache=True)[1]
    assert all_equal(first.state_dict().values(), again.state_dict().values())
    assert first.history.equals(again.history)
    with pytest.raises(NameError):
        trained(tiny, cache=True, seed=1)


def test_saved_and_loaded(tiny, model, codebook, tmp_path):
    unlearn_codes(tiny, model, significance=0.5)
    codebook.save(tmp_path / "codes")
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {"codebook.json", "codebook.safetensors"}
    fresh = tiny.copy()
    loaded = Codebook.load(tmp_path / "codes", fresh)
    assert loaded.config == codebook.config and torch.equal(loaded.removed, codebook.removed)
    assert all_equal(logits(fresh, tiny), logits(model, tiny))
    codebook.save(tmp_path / "codes")  # once more, onto itself
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_a_saved_model_comes_back_without_its_codebook(tiny, model, codebook, tmp_path):
    """The notebook says so: transformers leaves the codebook's weights in the file alone."""
    codebook.remove([0])
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    assert all_equal(logits(loaded.cpu(), tiny), logits(tiny.model, tiny))
    codebook.save(tmp_path / "codes")
    Codebook.load(tmp_path / "codes", loaded)
    assert all_equal(logits(loaded, tiny), logits(model, tiny))


def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_another_model_is_refused(tiny, codebook, tmp_path):
    codebook.save(tmp_path / "codes")
    other = tiny.copy()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    before = tiny.weights(other)
    refused(lambda: Codebook.load(tmp_path / "codes", other), "`model`", "other weights", "train_codebook")
    refused(
        lambda: code_unlearn(other, tiny.tokenizer, tiny.forget, [], control=["a b"], codebook=codebook),
        "`model`",
        "trained for another",
    )
    assert tiny.same(other, before)
    smaller = tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=16, n_heads=2)
    refused(lambda: Codebook.load(tmp_path / "codes", smaller), "`model`", "trained for another")


def test_damaged_folders(tiny, codebook, tmp_path):
    folder = tmp_path / "codes"
    refused(lambda: Codebook.load(folder, tiny.copy()), "`folder`", "codebook.safetensors")
    codebook.save(folder)
    whole = shutil.copytree(folder, tmp_path / "whole")
    (folder / "codebook.json").write_text("{")
    refused(lambda: Codebook.load(folder, tiny.copy()), "`folder`", "damaged")
    shutil.copy(whole / "codebook.json", folder)
    weights = (folder / "codebook.safetensors").read_bytes()
    (folder / "codebook.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(lambda: Codebook.load(folder, tiny.copy()), "`folder`", "damaged")


# ---- errors ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer": 2}, ["`layer`", "2 is none", "Layers: 0, 1"]),
        ({"layer": -1}, ["`layer`", "Layers: 0, 1"]),
        ({"part": "head"}, ["`part`", "attention, mlp, layer"]),
        ({"n_codes": 10**6}, ["`n_codes`", "fewer codes"]),
        ({"n_codes": 4, "n_active": 5}, ["`n_active`"]),
        ({"n_active": 0}, ["`n_active`"]),
        ({"n_features": 62}, ["`n_features`", "from 64"]),
        ({"n_features": 65}, ["`n_features`", "even"]),
        ({"epochs": 0}, ["`epochs`"]),
    ],
)
def test_settings_that_cannot_be(tiny, settings, words):
    model = tiny.copy()
    refused(lambda: trained(tiny, model, **settings), *words)
    assert tiny.same(model, tiny.weights(tiny.model))


def test_a_model_without_such_parts(tiny):
    refused(lambda: trained(tiny, torch.nn.Linear(2, 2)), "`part`", "Linear", "none")


def test_an_interrupted_training_leaves_the_model_as_it_was(tiny, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(code_unlearn_module, "_loss_terms", stop)
    model = tiny.copy()
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, model)
    assert tiny.same(model, tiny.weights(tiny.model))
    assert all_equal(logits(model, tiny), logits(tiny.model, tiny))


def test_requests_that_cannot_be(tiny, model, codebook):
    before = codebook.removed.clone()
    refused(lambda: unlearn_codes(tiny, model, control=None), "`control`", "people_controls", "replaced")
    refused(lambda: unlearn_codes(tiny, model, control=tiny.forget), "`control`", "unchanged")
    refused(lambda: unlearn_codes(tiny, tiny.copy()), "`codebook`", "train_codebook", "Codebook.load")
    refused(lambda: unlearn_codes(tiny, model, n_retrieved=65), "`n_retrieved`", "64")
    refused(lambda: unlearn_codes(tiny, model, significance=2), "`significance`")
    refused(lambda: unlearn_codes(tiny, model, forget=[]), "`forget`")
    refused(lambda: codebook.remove(list(range(63))), "`codes`", "1 of 64")
    refused(lambda: trained(tiny, model, layer=1, part="layer"), "`model`", "detach")
    assert torch.equal(codebook.removed, before)


def test_another_codebook_in_the_same_place(tiny, model, codebook):
    refused(lambda: copy.deepcopy(codebook).attach(model), "`model`", "detach")
    codebook.attach(model)  # where it stands already: nothing happens
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1


# ---- the registry ----


def test_registry():
    method = get_method("code_unlearn")
    assert method.edit is code_unlearn and "2410.10866" in method.source
    assert re.fullmatch("#[0-9A-F]{6}", method.color)
