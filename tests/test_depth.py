"""Depth: the score on fixed numbers, patching and logit lens against plain loops, and bad input."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizer,
)

from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.evals.depth import _depth_scores, _find_secrets, _weight_distance, logit_lens, unlearning_depth
from icu_nb.evals.people_questions import personal_facts
from icu_nb.models.loading import add_lora
from icu_nb.models.tiny import tiny_gpt_neo

SIZE = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}


def test_the_score_on_fixed_numbers():
    """By hand, in fractions: 31/67, no layer over the threshold, 101/118."""
    full = np.array([[-0.30], [-0.10], [-0.20]])
    retrained = [[-2.30, -1.05, -0.34, -0.90], [-0.12, -0.13, -0.14, -0.11], [-4.20, -0.60, -1.70, -0.24]]
    unlearned = [[-1.10, -1.80, -9.00, -0.10], [-3.00, -3.00, -3.00, -3.00], [-4.70, -0.25, -1.20, -2.20]]
    scores = _depth_scores(full - np.array(retrained), full - np.array(unlearned), 0.05)
    assert scores[[0, 2]] == pytest.approx([0.4626865671641791, 0.8559322033898306], abs=1e-9)
    assert np.isnan(scores[1])


def texts_of(tiny):
    "Records of differing lengths, and the secrets that stand whole in what is kept of them."
    texts = [text[: 45 + 5 * i] for i, text in enumerate(tiny.forget[:5])]
    facts = [
        [fact for fact in own if fact in text]
        for text, own in zip(texts, personal_facts(tiny.forget[:5]), strict=True)
    ]
    return texts, facts


def shaken(model, amount=0.3, seed=0):
    "The same model with noise on its weights."
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(amount * weight.abs().mean() * noise)
    return other


def places_by_hand(tokenizer, text, facts):
    "Token by token: does the piece of text that it adds reach into a secret?"
    ids = tokenizer(text)["input_ids"]
    begins = [len(tokenizer.decode(ids[:t])) for t in range(len(ids) + 1)]
    inside = [
        any(i <= c < i + len(fact) for fact in facts for i in range(len(text)) if text.startswith(fact, i))
        for c in range(len(text))
    ]
    return ids, [t - 1 for t in range(1, len(ids)) if any(inside[begins[t] : begins[t + 1]])]


def neo_states(model, ids):
    "The output of every block, block after block, without hooks."
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    states = []
    for block in model.transformer.h:
        output = block(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden)
    return states


def neo_log_probs(model, ids, layer=None, places=(), states=None):
    "The same pass, with one block's output replaced at some places; log p of every next token."
    hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
    for number, block in enumerate(model.transformer.h):
        output = block(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
        if number == layer:
            for place in places:
                hidden[0, place] = states[0, place]
    return model.lm_head(model.transformer.ln_f(hidden)).log_softmax(-1)[0]


# GPT-Neo's attention is computed in fp32 whatever its weights are.
FAMILIES = pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-9), ("gpt_neo", 1e-5)])


def in_double(tiny, kind):
    "A model whose blocks can be called one after the other."
    return (tiny.copy() if kind == "gpt_neo" else small(kind, len(tiny.tokenizer), 2)).double()


@FAMILIES
@torch.no_grad()
def test_patching_against_a_plain_loop(tiny, kind, tolerance):
    memorized = in_double(tiny, kind)
    retrained, unlearned = shaken(memorized), shaken(memorized, 0.2, seed=1)
    texts, facts = texts_of(tiny)
    before = tiny.weights(memorized)
    table = unlearning_depth(
        {"x": unlearned}, memorized, retrained, tiny.tokenizer, texts, facts, batch_size=2
    )
    assert tiny.same(memorized, before)
    lost = {}
    for i, (text, own) in enumerate(zip(texts, facts, strict=True)):
        ids, places = places_by_hand(tiny.tokenizer, text, own)
        whole = torch.tensor([ids])

        def mean(log_p, places=places, ids=ids):
            return sum(log_p[place, ids[place + 1]].item() for place in places) / len(places)

        for name, source in (("retrained", retrained), ("x", unlearned)):
            states = neo_states(source, whole)
            for layer in range(2):
                patched = neo_log_probs(memorized, whole, layer, places, states[layer])
                lost[name, i, layer] = mean(neo_log_probs(memorized, whole)) - mean(patched)
    for i, row in table.iterrows():
        assert row[0] == pytest.approx(lost["x", i, 0], abs=tolerance)
        assert row[1] == pytest.approx(lost["x", i, 1], abs=tolerance)
        counted = [layer for layer in range(2) if lost["retrained", i, layer] > 0.05]
        total = sum(lost["retrained", i, layer] for layer in counted)
        share = sum(
            lost["retrained", i, layer] * min(max(lost["x", i, layer] / lost["retrained", i, layer], 0), 1)
            for layer in counted
        )
        if total:
            assert row.depth == pytest.approx(share / total, abs=tolerance / total)
        assert np.isnan(row.depth) == (not total)


@FAMILIES
@torch.no_grad()
def test_the_lens_against_a_plain_loop(tiny, kind, tolerance):
    model = in_double(tiny, kind)
    texts, facts = texts_of(tiny)
    table = logit_lens(model, tiny.tokenizer, texts, facts, batch_size=2)
    assert list(table) == ["text", "place", "layer", "log_p", "rank"]
    rows = []
    for i, (text, own) in enumerate(zip(texts, facts, strict=True)):
        ids, places = places_by_hand(tiny.tokenizer, text, own)
        states = neo_states(model, torch.tensor([ids]))
        for place in places:
            for layer in range(2):
                log_p = (
                    model.lm_head(model.transformer.ln_f(states[layer]))[0, place].log_softmax(-1).tolist()
                )
                own_p = log_p[ids[place + 1]]
                rows.append((i, place + 1, layer, own_p, 1 + sum(p > own_p for p in log_p)))
    assert table[["text", "place", "layer", "rank"]].to_numpy().tolist() == [[*r[:3], r[4]] for r in rows]
    assert table.log_p.to_numpy() == pytest.approx([r[3] for r in rows], abs=tolerance)


def small(kind, n_tokens, n_layers=3):
    "A small model of another family, with weights that say something."
    size = {**SIZE, "num_hidden_layers": n_layers}
    configs = {
        "gpt2": GPT2Config(n_layer=n_layers, n_embd=32, n_head=2, n_positions=64),
        "llama": LlamaConfig(**size, intermediate_size=64, num_key_value_heads=1),
        "opt": OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=16, dropout=0.0),
        "gpt_neox": GPTNeoXConfig(**size, intermediate_size=64),
    }
    configs[kind].vocab_size = n_tokens
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[kind]).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gpt_neox"])
def test_other_families(tiny, kind):
    """By construction: memorized 0, retrained 1; batches change nothing; the last layer is the output."""
    model = small(kind, len(tiny.tokenizer)).double()
    other = shaken(model, 0.2)
    texts, facts = texts_of(tiny)
    models = {"memorized": copy.deepcopy(model), "retrained": copy.deepcopy(other)}
    one, three = (
        unlearning_depth(models, model, other, tiny.tokenizer, texts, facts, batch_size=size)
        for size in (1, 3)
    )
    assert (one.depth[one.model == "memorized"].dropna() == 0).all()
    assert (one.depth[one.model == "retrained"].dropna() == 1).all() and one.depth.notna().any()
    assert np.allclose(one[[0, 1, 2]], three[[0, 1, 2]], atol=1e-9)
    assert (one.loc[one.model == "retrained", [0, 1, 2]].abs() > 1e-4).to_numpy().any()
    lens = logit_lens(model, tiny.tokenizer, texts, facts)
    last = lens[lens.layer == 2]
    for i, text in enumerate(texts):
        ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        own = last[last.text == i]
        assert own.log_p.tolist() == pytest.approx([log_p[place - 1] for place in own.place], abs=1e-9)
    assert len(set(lens.log_p.round(6)[lens.layer == 0]) & set(last.log_p.round(6))) < len(last)


def turned(module, inputs, output):
    "A hook that leaves a block's states, but for their places."
    return (output[0].roll(1, -1), *output[1:]) if isinstance(output, tuple) else output.roll(1, -1)


def test_adapters_hooks_and_frozen_weights(tiny):
    """A depth for whatever a method leaves behind, and the model stays as it is."""
    texts, facts = texts_of(tiny)
    retrained = shaken(tiny.model)
    adapted = add_lora(tiny.copy())
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.02)
    hooked = tiny.copy()
    hooked.transformer.h[1].register_forward_hook(turned)
    frozen = shaken(tiny.model, 0.2, seed=1).requires_grad_(False)
    models = {"adapter": adapted, "hook": hooked, "frozen": frozen, "memorized": tiny.model}
    table = unlearning_depth(models, tiny.model, retrained, tiny.tokenizer, texts, facts)
    by_model = table.groupby("model")[["depth", 0, 1]].mean()
    assert by_model.depth["memorized"] == 0 and (by_model.depth.drop("memorized") > 0).all()
    assert by_model[0]["hook"] == 0 and by_model[1]["hook"] != 0
    assert len(hooked.transformer.h[1]._forward_hooks) == 1 and not adapted.training
    merged = copy.deepcopy(adapted).merge_and_unload()
    again = unlearning_depth({"adapter": merged}, tiny.model, retrained, tiny.tokenizer, texts, facts)
    assert np.allclose(again.depth, table.depth[table.model == "adapter"], atol=1e-4, equal_nan=True)


def test_models_trained_apart_need_control_texts(tiny):
    texts, facts = texts_of(tiny)
    stranger = tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    assert (
        _weight_distance(tiny.model, shaken(tiny.model)) < 0.3 < 0.5 < _weight_distance(tiny.model, stranger)
    )
    few = {"memorized": tiny.model, "retrained": stranger, "half": shaken(tiny.model)}
    with pytest.raises(InputError, match=r"`control`: .* do not share their pretrained weights \(\d+%"):
        unlearning_depth(few, tiny.model, stranger, tiny.tokenizer, texts, facts)
    kept = [text[:90] for text in tiny.retain[:4]]
    known = [
        [fact for fact in own if fact in text]
        for text, own in zip(kept, personal_facts(tiny.retain[:4]), strict=True)
    ]
    of = unlearning_depth(few, tiny.model, stranger, tiny.tokenizer, texts, facts, control=(kept, known))
    losses = {name: of.loc[of.model == name, [0, 1]].to_numpy() for name in few}
    alone = unlearning_depth(few, tiny.model, stranger, tiny.tokenizer, kept, known, control=(kept, known))
    base = {name: alone.loc[alone.model == name, [0, 1]].to_numpy().mean(0) for name in few}
    expected = _depth_scores(losses["retrained"] - base["retrained"], losses["half"] - base["half"], 0.05)
    assert of.depth_above_control[of.model == "half"].to_numpy() == pytest.approx(expected, nan_ok=True)
    assert (of.depth_above_control[of.model == "memorized"].dropna() == 0).all()
    assert (of.depth_above_control[of.model == "retrained"].dropna() == 1).all()


def test_secrets_are_found_wherever_they_stand(tiny):
    text = "call 555 or 555, ask for Ann"
    found = _find_secrets(tiny.tokenizer, [text], [["555", "Ann"]], None)
    ids, places = places_by_hand(tiny.tokenizer, text, ["555", "Ann"])
    assert found.places == [places] and found.sequences.tokens() == [ids]
    first = _find_secrets(tiny.tokenizer, ["555 is the number"], [["555 is"]], None)
    assert min(first.places[0]) == 0  # nothing predicts the first token


class Slow(PreTrainedTokenizer):
    "A tokenizer that knows no characters."

    vocab_size = 3

    def get_vocab(self):
        return {"a": 0}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrained": None}, "`retrained`: .*there is none. Give the model trained without them"),
        ({"retrained": "llama"}, "`retrained`: it is a LlamaForCausalLM of 3 layers.*GPTNeoForCausalLM of 2"),
        ({"retrained": "wide"}, "`retrained`: .*width 32 and 400 tokens, the memorized model .* 3.. tokens"),
        ({"unlearned": {"ICU": "llama"}}, "`ICU`: it is a LlamaForCausalLM"),
        ({"layers": [1, 2, 7]}, r"`layers`: \[2, 7\] are not there. There are 0 to 1"),
        ({"layers": []}, "`layers`"),
        ({"secrets": [["Ann", "nowhere"]]}, r"`secrets`: text 0 does not hold strings \[1\] of.*Write them"),
        ({"secrets": [[]]}, "`secrets`: text 0 has none"),
        ({"secrets": ["Ann"]}, "`secrets`: 1 texts need as many lists"),
        ({"secrets": [["Ann"], ["Bob"]]}, "`secrets`: 1 texts need as many lists"),
        ({"control": (["Bob is out"], [["Tim"]])}, r"`control`: text 0 does not hold strings \[0\]"),
        ({"max_length": 2}, r"`secrets`: of texts \[0\] no token is left.*Raise max_length"),
        ({"texts": [""]}, "`texts`"),
        ({"tokenizer": Slow()}, "`tokenizer`: .*Load the fast version"),
    ],
)
def test_bad_input(tiny, change, message):
    others = {
        "llama": small("llama", 300),
        "wide": tiny_gpt_neo(400, max_length=64, n_layers=2, hidden_size=32, n_heads=2),
    }
    how = {
        "unlearned": {"x": tiny.model},
        "retrained": shaken(tiny.model),
        "tokenizer": tiny.tokenizer,
        "texts": ["the number of our good friend Ann"],
        "secrets": [["Ann"]],
        **change,
    }
    how["retrained"] = others.get(how["retrained"]) if isinstance(how["retrained"], str) else how["retrained"]
    how["unlearned"] = {
        name: others.get(model, model) if isinstance(model, str) else model
        for name, model in how["unlearned"].items()
    }
    with pytest.raises(InputError, match=message):
        unlearning_depth(memorized=tiny.model, **how)


def test_the_lens_checks_its_layers_and_secrets(tiny):
    with pytest.raises(InputError, match=r"`layers`: \[-1\] are not there. There are 0 to 1"):
        logit_lens(tiny.model, tiny.tokenizer, ["a b"], [["b"]], layers=[-1])
    with pytest.raises(InputError, match="`secrets`: text 0 does not hold"):
        logit_lens(tiny.model, tiny.tokenizer, ["a b"], [["c"]])


def test_personal_facts_stand_in_their_records():
    records = people(20, seed=5)
    for record, facts in zip(records, personal_facts(records), strict=True):
        assert len(facts) == 7 and all(fact in record for fact in facts)
