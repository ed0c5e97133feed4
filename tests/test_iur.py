"""IUR: thresholds, who is forgotten, who trains next, and continuations that a batch does not change."""

import math

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
from icu_nb.models.tiny import tiny_gpt_neo, train_tokenizer
from icu_nb.text import prompt_suffix, tokenize
from icu_nb.text_scores import sentence_bleu

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
