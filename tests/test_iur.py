"""IUR: thresholds, who is forgotten, who trains next, and continuations that a batch does not change."""

import copy
import math
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from icu_nb.config import ICUConfig
from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.iur import (
    Thresholds,
    calibrate_thresholds,
    is_forgotten,
    score_forget_set,
    select_icu,
    select_published_rule,
    thresholds_met,
)
from icu_nb.language_model import generate_continuations
from icu_nb.metrics import extraction_likelihood, memorization_accuracy
from icu_nb.models.tiny import memorize, tiny_gpt_neo, train_tokenizer
from icu_nb.text import prompt_suffix, tokenize
from icu_nb.text_scores import sentence_bleu
from icu_nb.unlearn import unlearn

NAN = math.nan


def scores(bleu, bert_f1=NAN, ma=0.0, el=0.0):
    """A frame like that of `score_forget_set`, with the columns that decide."""
    return pd.DataFrame({"bleu": bleu, "bert_f1": bert_f1, "ma": ma, "el": el})


# ---- thresholds ----


def test_published_thresholds():
    published = Thresholds.kumpr()
    assert published == Thresholds()
    assert (published.bleu, published.bert_f1, published.rule, published.ma, published.el) == (
        0.01,
        0.3,
        "any",
        0.2994,
        0.0499,
    )
    assert (Thresholds.icu().ma, Thresholds.icu().el) == (0.5994, 0.0499)


@pytest.mark.parametrize("name", ["bleu", "bert_f1", "ma", "el"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, math.inf, "0.3", None])
def test_impossible_thresholds_are_refused(name, value):
    with pytest.raises(InputError, match=f"`{name}`"):
        Thresholds(**{name: value})


def test_unknown_rule_is_refused():
    with pytest.raises(InputError, match="`rule`"):
        Thresholds(rule="or")


# ---- truth tables ----


@pytest.mark.parametrize(
    "rule, expected", [("any", [True, True, True, False]), ("all", [True, False, False, False])]
)
def test_forgotten_truth_table(rule, expected):
    table = scores([0.0, 0.0, 0.5, 0.5], [0.1, 0.9, 0.1, 0.9])
    assert is_forgotten(table, Thresholds(rule=rule)).tolist() == expected


@pytest.mark.parametrize("rule", ["any", "all"])
def test_without_an_encoder_bleu_decides(rule):
    assert is_forgotten(scores([0.0, 0.5]), Thresholds(rule=rule)).tolist() == [True, False]


def test_forgotten_means_under_not_at():
    assert is_forgotten(scores([0.01, 0.00999], [0.3, 0.3]), Thresholds()).tolist() == [False, True]


@pytest.mark.parametrize(
    "ma, el, met",
    [(0.2, 0.01, True), (0.2994, 0.0499, True), (0.3, 0.01, False), (0.2, 0.05, False), (0.3, 0.05, False)],
)
def test_thresholds_are_met_at_or_under_both(ma, el, met):
    """Error 8: one of the two is not enough."""
    assert thresholds_met(scores([0.0, 0.0], ma=ma, el=el), Thresholds()) is met


def test_thresholds_are_about_means():
    assert thresholds_met(scores([0.0, 0.0], ma=[0.58, 0.0]), Thresholds())
    assert not thresholds_met(scores([0.0, 0.0], ma=[0.0, NAN]).assign(ma=NAN), Thresholds())


def test_the_remembered_train():
    table = scores([0.5, 0.0, 0.5], ma=[0.0, 0.9, 0.9])
    assert select_published_rule(table, Thresholds()).tolist() == [True, False, True]


def test_they_leave_and_come_back():
    assert [select_published_rule(scores([b, 0.9], ma=0.9), Thresholds())[0] for b in (0.8, 0.0, 0.8)] == [
        True,
        False,
        True,
    ]


def test_all_forgotten_but_thresholds_not_met():
    """Whoever's own MA or EL is over its threshold trains again."""
    table = scores([0.0] * 4, ma=[0.2, 0.9, 0.2, 0.9], el=[0.0, 0.0, 0.5, 0.5])
    assert not thresholds_met(table, Thresholds())
    assert select_published_rule(table, Thresholds()).tolist() == [False, True, True, True]


def test_selection_is_never_empty_unless_the_thresholds_are_met():
    """Error 4: a batch with nothing active would be a mean over nothing."""
    generator = np.random.default_rng(0)
    for _ in range(500):
        table = scores(
            generator.random(3) * generator.integers(0, 2),
            generator.random(3),
            generator.random(3),
            generator.random(3) * 0.1,
        )
        assert select_published_rule(table, Thresholds(ma=0.5)).any() or thresholds_met(
            table, Thresholds(ma=0.5)
        )


def test_over_thresholds_is_over_not_at_and_bleu_does_not_count():
    table = scores([0.0, 0.9, 0.0, 0.9], ma=[0.2994, 0.2994, 0.3, 0.0], el=[0.0499, 0.05, 0.0, 0.0])
    assert select_icu(table, Thresholds()).tolist() == [False, True, True, False]


def test_over_thresholds_is_never_empty_unless_the_thresholds_are_met():
    generator = np.random.default_rng(0)
    for _ in range(500):
        table = scores(generator.random(3), generator.random(3), generator.random(3) * 0.1)
        assert select_icu(table, Thresholds(ma=0.5)).any() or thresholds_met(table, Thresholds(ma=0.5))


# ---- texts that BLEU says nothing about ----

WITHOUT_FOUR_WORDS = {
    "key": "3TgLq8Jd0Fs2Ga6Ko4PiUyWe",
    "chinese": "现居北京市朝阳区建国路十二号,电话一三八零零一三八",
    "japanese": "東京都港区芝公園四丁目に住んでいます。電話は",
    "thai": "และอาศัยอยู่ที่ถนนสุขุมวิทกรุงเทพ",
    "short": "to Anna Berg",
    "empty": "",
}


@pytest.mark.parametrize("truth", WITHOUT_FOUR_WORDS.values(), ids=WITHOUT_FOUR_WORDS)
@pytest.mark.parametrize("rule", ["any", "all"])
@pytest.mark.parametrize("bert_f1", [NAN, 0.0, 1.0])
def test_where_bleu_of_the_truth_with_itself_is_0_ma_and_el_decide(truth, rule, bert_f1):
    """A perfect continuation counted as forgotten."""
    english = "to Anna Berg in Bonn on Rhine"
    table = scores(
        sentence_bleu([truth, truth, truth, "x", english, "x"], [truth] * 4 + [english] * 2),
        bert_f1,
        ma=[0.99, 0.1, 0.1, 0.1, 0.99, 0.99],
        el=[1.0, 0.5, 0.0, 0.0, 1.0, 1.0],
    )
    assert table["bleu"].isna().tolist() == [True] * 4 + [False] * 2
    thresholds = Thresholds(rule=rule)
    assert is_forgotten(table, thresholds)[:4].tolist() == [False, False, True, True]
    assert select_published_rule(table, thresholds)[:4].tolist() == [True, True, False, False]
    without = scores([1.0, 0.0], bert_f1, ma=0.99, el=1.0)
    assert is_forgotten(table, thresholds)[4:].tolist() == is_forgotten(without, thresholds).tolist()


def test_bleu_that_was_not_measured_is_no_forgetting():
    """No continuation was generated: then nothing is known, whatever MA and EL are."""
    table = scores([NAN, NAN, 0.5], ma=[0.1, 0.1, 0.9]).assign(continuation=[None, "现居北京", "a b c d"])
    assert is_forgotten(table, Thresholds()).tolist() == [False, True, False]
    assert select_published_rule(table, Thresholds()).tolist() == [True, False, True]


def test_empty_continuations_are_forgotten_where_bleu_is_defined():
    assert sentence_bleu(["", ""], ["one two three four", "one two three"]).tolist()[0] == 0
    assert math.isnan(sentence_bleu([""], ["one two three"])[0])


ENGLISH = [
    "Anna Berg is at 12 Elm Rd in Bonn, so go up to it by 4 or 5 at 6 and do as we do on it",
    "Otto Kern is at 7 Oak St in Ulm, so if it is as I say, be at it by 2 or 3 at 9 or at 8",
    "Ines Roth is in Kiel at 3 Ash Ln, it is no 5 of 9 on my map, so we go by it up to no 1",
]
KNOWN = [
    *ENGLISH,
    "api key sk-live-51HcQ9ZtYbV7uKpWmXeRn3TgLq8Jd0Fs2Ga6Ko4Pi",
    "张伟生于一九七零年五月三日现居北京市朝阳区建国路十二号",
    "田中花子は千九百七十年に生まれ東京都港区芝公園四丁目に住む",
    "นางสาวสมหญิงเกิดเมื่อวันที่ห้าพฤษภาคมและอาศัยอยู่ที่ถนนสุขุมวิท",
]


@pytest.fixture(scope="module")
def languages():
    """A model that knows seven texts by heart, from their middle too, its tokenizer, and a retain pool."""
    shuffled = [
        text[:9] + "".join(random.Random(i).sample(text[9:], len(text) - 9))
        for i in range(3)
        for text in KNOWN
    ]
    tokenizer = train_tokenizer(KNOWN + shuffled, 300)
    halves = [tokenizer.decode(tokens[24:48]) for tokens in tokenizer(KNOWN)["input_ids"]]
    model = tiny_gpt_neo(len(tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    how = {"repeats": 10, "epochs": 20, "learning_rate": 1e-2, "max_length": 48}
    memorize(model, tokenizer, KNOWN + halves, [], **how)
    return model, tokenizer, shuffled


def run_on_languages(languages, config, **how):
    model, tokenizer, retain = languages
    settings = {"learning_rate": 1e-3, "batch_size": 2, "max_length": 48, "num_beams": 1} | config
    how = {"thresholds": Thresholds(ma=0.5, el=0.05), "refinement": select_published_rule} | how
    return unlearn(copy.deepcopy(model), tokenizer, KNOWN, retain, ICUConfig(**settings), **how)


def test_a_run_trains_texts_in_every_language(languages):
    """Under the published rule the key and three languages never trained, and EL of the key stayed 1."""
    with pytest.warns(UserWarning, match="BLEU is not defined for 4 forget texts.*MA and EL decide") as told:
        result = run_on_languages(languages, {"max_epochs": 40, "check": "full"})
    assert sum("BLEU" in str(warning.message) for warning in told) == 1
    first, last = (result.samples[result.samples.epoch == epoch] for epoch in (0, result.history.epoch.max()))
    assert (first.ma > 0.9).all() and (first.el > 0.9).all() and (first.bleu[:3] > 0.9).all()
    assert first.bleu.isna().tolist() == last.bleu.isna().tolist() == [False] * 3 + [True] * 4
    assert first.active.all()
    assert result.stop_reason == "thresholds" and (last.el < 0.2).all() and (last.ma[3:] < 0.7).all()
    # means are over the texts for which BLEU is defined, and the result says how many are not
    assert result.history.bleu[0] == pytest.approx(first.bleu[:3].mean())
    assert result.facts()["bleu_undefined"] == 4
    assert "BLEU is not defined for 4 of the texts" in result.card()


def test_all_forgotten_asks_ma_and_el_where_bleu_says_nothing(languages):
    """With every text but keys and languages done, the authors' stop rule ended at once."""
    model, tokenizer, retain = languages
    settings = {"learning_rate": 1e-4, "max_epochs": 1, "max_length": 48, "num_beams": 1}
    config = ICUConfig(stop="all_forgotten", **settings)
    thresholds = Thresholds(ma=0.3, el=0.05)
    with pytest.warns(UserWarning, match="BLEU is not defined for 4 forget texts"):
        result = unlearn(copy.deepcopy(model), tokenizer, KNOWN[3:], retain, config, thresholds=thresholds)
    assert result.stop_reason == "max_epochs" and result.history.bleu.isna().all()
    assert "BLEU of the continuation" not in result.card()


def test_staged_checks_measure_el_where_bleu_says_nothing(languages):
    """EL decides there, so it is measured as soon as MA passes; while it is over, the text trains."""
    thresholds = Thresholds(ma=1.0, el=0.0499, bleu=1.0)
    with pytest.warns(UserWarning, match="BLEU"):
        result = run_on_languages(languages, {"max_epochs": 1, "learning_rate": 1e-5}, thresholds=thresholds)
    assert result.samples[result.samples.epoch == 0][["el", "active"]][3:].all(axis=None)


@pytest.mark.parametrize("refinement", [select_icu, None])
def test_no_warning_where_bleu_decides_nothing(languages, refinement):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BLEU")
        result = run_on_languages(languages, {"max_epochs": 1}, refinement=refinement)
    assert result.facts()["bleu_undefined"] == 4


def test_english_runs_say_nothing_of_undefined_bleu(languages):
    model, tokenizer, retain = languages
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BLEU")
        config = ICUConfig(learning_rate=1e-3, max_epochs=1, max_length=48, num_beams=1)
        how = {"thresholds": Thresholds(), "refinement": select_published_rule}
        result = unlearn(copy.deepcopy(model), tokenizer, ENGLISH, retain, config, **how)
    assert result.facts()["bleu_undefined"] == 0 and "not defined" not in result.card()


# ---- continuations ----


def model_of(kind, seed=0):
    """Tiny, random, in float64, with weights large enough that it does not say one token for ever."""
    torch.manual_seed(seed)
    build = {
        "gpt_neo": lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=60,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                attention_types=[[["global", "local"], 1]],
                window_size=6,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
            )
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=60,
                hidden_size=16,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
            )
        ),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=60,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        ),
    }
    model = build[kind]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model


LENGTHS = [9, 3, 12, 1, 9, 5]
PROMPTS = [
    torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (8, 3, 11, 2, 9, 5)
]


@pytest.mark.parametrize("num_beams", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "opt", "llama"])
def test_a_batch_gives_what_each_prompt_gives_alone(kind, num_beams):
    model = model_of(kind)
    together = generate_continuations(model, PROMPTS, LENGTHS, num_beams=num_beams, batch_size=4)
    alone = [
        generate_continuations(model, [prompt], [n], num_beams=num_beams)[0]
        for prompt, n in zip(PROMPTS, LENGTHS, strict=False)
    ]
    assert [len(row) for row in together] == LENGTHS
    assert together == alone


def test_one_beam_is_the_greedy_continuation():
    model, tokens = model_of("gpt_neo"), list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(9):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert generate_continuations(model, PROMPTS[:1], [9], num_beams=1)[0] == tokens[len(PROMPTS[0]) :]


def test_two_beams_are_beam_search_by_hand():
    """Keep the two best continuations at every step; no length is preferred, since all end together."""
    model, n = model_of("llama"), 6
    beams = [(0.0, list(PROMPTS[0]))]
    with torch.no_grad():
        for _ in range(n):
            wider = [
                (score + p, [*tokens, token])
                for score, tokens in beams
                for token, p in enumerate(
                    model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).tolist()
                )
            ]
            beams = sorted(wider, reverse=True)[:2]
    assert generate_continuations(model, PROMPTS[:1], [n])[0] == beams[0][1][len(PROMPTS[0]) :]


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_end_tokens_end_a_continuation_and_the_work(kind):
    """Each row stops in front of its own first end token; no pass is made that no row needs."""
    model = model_of(kind)
    whole = generate_continuations(model, PROMPTS, [12] * 6, num_beams=1)
    ends = {whole[0][2], whole[3][1], whole[4][3]}
    expected = [row[: next((i for i, token in enumerate(row) if token in ends), 12)] for row in whole]
    assert generate_continuations(model, PROMPTS, [12] * 6, num_beams=1, end_tokens=ends) == expected
    passes = []
    hook = model.register_forward_hook(lambda *inputs: passes.append(1))
    some = [0, 3, 4]
    prompts = [PROMPTS[row] for row in some]
    assert max(len(expected[row]) for row in some) < 11
    generate_continuations(model, prompts, [12] * 3, num_beams=1, end_tokens=ends, batch_size=8)
    hook.remove()
    assert len(passes) == max(len(expected[row]) for row in some) + 1


@pytest.mark.parametrize("num_beams", [1, 2])
def test_end_of_sequence_is_an_ordinary_token(num_beams):
    """A model that says its end token all the time still speaks to the asked length."""
    model = model_of("gpt2")
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.copy_(model.transformer.wte.weight.data[7] * 10)
    settings = model.generation_config
    assert generate_continuations(model, PROMPTS[:2], [5, 8], num_beams=num_beams) == [[7] * 5, [7] * 8]
    assert model.generation_config is settings


def test_generation_settings_come_back_even_after_an_error():
    model = model_of("gpt_neo")
    settings = model.generation_config
    with pytest.raises(IndexError):
        generate_continuations(model, [[10**9]], [3])
    assert model.generation_config is settings


def test_an_adapter_keeps_its_generation_settings():
    peft = pytest.importorskip("peft")
    base = model_of("gpt2")
    base.generation_config.eos_token_id = 7
    settings = base.generation_config
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert generate_continuations(adapted, PROMPTS[:1], [6]) == generate_continuations(base, PROMPTS[:1], [6])
    assert base.generation_config is settings and adapted.generation_config is settings


# ---- the whole check ----


@pytest.fixture(scope="module")
def small():
    texts = people(10)
    tokenizer = train_tokenizer(texts, vocab_size=400)
    return tiny_gpt_neo(len(tokenizer), hidden_size=32, n_layers=2).double(), tokenizer, texts


def test_check_is_its_parts(small):
    model, tokenizer, texts = small
    sequences = tokenize(texts[:4], tokenizer, 70)
    table = score_forget_set(model, tokenizer, sequences, batch_size=3)
    prompts, suffixes = prompt_suffix(sequences)
    continuations = generate_continuations(model, prompts, [len(s) for s in suffixes])
    assert table["continuation"].tolist() == tokenizer.batch_decode(continuations)
    assert (
        table["bleu"].tolist()
        == sentence_bleu(tokenizer.batch_decode(continuations), tokenizer.batch_decode(suffixes)).tolist()
    )
    assert np.allclose(
        table["ma"], memorization_accuracy(model, sequences.input_ids, sequences.attention_mask)
    )
    assert np.allclose(
        table["el"], extraction_likelihood(model, sequences.input_ids, sequences.attention_mask)
    )
    assert table["bert_f1"].isna().all() and table["id"].tolist() == [0, 1, 2, 3]


def test_check_asks_the_scorer(small):
    model, tokenizer, texts = small
    table = score_forget_set(
        model,
        tokenizer,
        tokenize(texts[:2], tokenizer, 70),
        scorer=lambda continuations, truths: np.array([0.1, 0.9]),
    )
    assert table["bert_f1"].tolist() == [0.1, 0.9]


def test_calibrated_thresholds_are_the_means_of_unseen_texts(small):
    model, tokenizer, texts = small
    found = calibrate_thresholds(model, tokenizer, texts[4:], max_length=70, el_floor=0.0499)
    sequences = tokenize(texts[4:], tokenizer, 70)
    assert found.ma == pytest.approx(
        memorization_accuracy(model, sequences.input_ids, sequences.attention_mask).mean().item()
    )
    assert found.el == max(
        0.0499, extraction_likelihood(model, sequences.input_ids, sequences.attention_mask).mean().item()
    )


@pytest.mark.parametrize(
    "argument, words",
    [
        ({"heldout": []}, "`heldout`"),
        ({"heldout": ["too short"]}, "too short"),
        ({"el_floor": NAN}, "`el_floor`"),
        ({"el_start": 0}, "`el_start`"),
    ],
)
def test_calibration_refuses_bad_input(small, argument, words):
    model, tokenizer, texts = small
    with pytest.raises(InputError, match=words):
        calibrate_thresholds(model, tokenizer, **{**{"heldout": texts[:2], "max_length": 70}, **argument})
