"""Every fast path against its plain one, in float64 to 1e-9; and what 16 bits may change."""

import functools
import hashlib
import types
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import icu_nb.cle
import icu_nb.embedding
import icu_nb.models.head
import icu_nb.run
from icu_nb.batch import Batch, Part, Term
from icu_nb.cle import kl_loss, nearest_neighbors, pair_learning_loss
from icu_nb.config import ICUConfig
from icu_nb.embedding import _cached_embedder, model_embedder
from icu_nb.errors import InputError, NonFinite
from icu_nb.iur import Thresholds
from icu_nb.kui import unlearning_loss
from icu_nb.language_model import evaluating, generate_continuations, in_batches
from icu_nb.methods.registry import get_method
from icu_nb.metrics import memorization_accuracy
from icu_nb.models.head import chunk_length, head_losses, last_hidden_states, linear_head
from icu_nb.models.memory import fuse_activations
from icu_nb.models.rollouts import greedy_pass, roll_out
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.objective import ICU, GradientAscent, Objective, token_terms
from icu_nb.pairs import Task, prepare_task
from icu_nb.plumbing import Arithmetic, peak_memory
from icu_nb.reference import OriginalModel
from icu_nb.run import Run
from icu_nb.text import Sequences, pad
from icu_nb.text_scores import BERTScorer
from icu_nb.unlearn import unlearn

VOCAB = 31
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
FAMILIES = {
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=2.0)
    ),  # caps its logits: the plain way
}
families = pytest.mark.parametrize("family", FAMILIES)
FORGET, NEAR = [12, 7, 9], [11, 12, 4, 8, 12, 6]  # real lengths; two neighbors each


def build(family, seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family]().double().eval()


def shake(model, strength=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(strength * torch.randn_like(parameter))
    return model


def sequences(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return pad([torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths])


def task():
    return Task(sequences(FORGET), sequences(NEAR, seed=2), np.arange(6).reshape(3, 2))


def by_hand(model, batch, reference, alpha=0.5, beta=1.0):
    f, r = batch.forget, batch.neighbor
    f_logits, r_logits = (
        model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits for part in (f, r)
    )
    return {
        "l_fgt": unlearning_loss(f_logits, f.input_ids, f.attention_mask),
        "l_lrn": alpha * pair_learning_loss(r_logits, r.input_ids, r.attention_mask),
        "l_kl": beta * kl_loss(r_logits, reference.logits("neighbor", r.rows), r.attention_mask),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def setting(family):
    """A model that is no longer the original, the original, and a step's batch."""
    model, work = build(family), task()
    reference = OriginalModel(model, {"neighbor": work.neighbors, "forget": work.forget})
    return shake(model), reference, work.batch(torch.arange(3), "cpu")


# ---- losses without all logits ----


@pytest.mark.parametrize("length", [1, 7, 10_000])
@families
def test_losses_and_gradients_are_those_of_whole_logits(family, length, monkeypatch):
    monkeypatch.setattr(icu_nb.models.head, "chunk_length", lambda head: length)
    model, reference, batch = setting(family)
    assert (linear_head(model) is None) == (family == "gemma2")
    plain, fast = by_hand(model, batch, reference), ICU()(model, batch, reference)
    assert plain.keys() == fast.keys() and plain["l_kl"] > 1e-3
    tolerance = 1e-6 if family == "gemma2" else 1e-9  # its own norms are computed in float32
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        gradients(model, sum(fast.values())), gradients(model, sum(plain.values())), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("name", ["l_fgt", "l_lrn", "l_kl"])
def test_one_term_alone_has_its_own_gradient(name):
    """The gradient at hand is that of the sum; another one is computed anew."""
    model, reference, batch = setting("gpt_neo")
    alone = [gradients(model, objective(model, batch, reference)[name]) for objective in (by_hand, ICU())]
    torch.testing.assert_close(*alone, rtol=0, atol=1e-9)


def test_a_graph_kept_for_a_second_time():
    model, reference, batch = setting("gpt2")
    loss = sum(ICU()(model, batch, reference).values())
    model.zero_grad()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    (3 * loss).backward()
    assert all(
        torch.allclose(p.grad, 4 * g, rtol=0, atol=1e-9)
        for p, g in zip(model.parameters(), once, strict=False)
    )


@pytest.mark.parametrize("bias, frozen", [(True, False), (False, True), (True, True)])
def test_heads_with_a_bias_and_frozen_heads(bias, frozen):
    torch.manual_seed(0)
    head, states, labels = (
        torch.nn.Linear(8, VOCAB, bias=bias).double().requires_grad_(not frozen),
        torch.randn(20, 8).double().requires_grad_(),
        torch.randint(VOCAB, (20,)),
    )
    weights = torch.randn(1, 20).double()
    plain = (weights[0] * torch.nn.functional.cross_entropy(head(states), labels, reduction="none")).sum()
    fast = head_losses(states, head, labels, weights).sum()
    wanted = [states, *(() if frozen else head.parameters())]
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(fast, wanted), torch.autograd.grad(plain, wanted), strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_position_counts():
    model, reference, batch = setting("gpt_neo")
    empty = Batch(
        *(
            Part(part.rows, Sequences(part.sequences.rows, part.sequences.lengths.tolist()))
            for part in (batch.forget, batch.neighbor)
        )
    )
    terms = ICU()(model, empty, reference)
    assert [value.item() for value in terms.values()] == [0, 0, 0]
    assert gradients(model, sum(terms.values())).abs().max() == 0


def test_a_divergence_on_both_parts():
    """As EUL wants it: far from the original on one part, near on the other."""
    model, reference, batch = setting("gpt2")
    terms = token_terms(
        model,
        batch,
        reference,
        far=Term("forget", kl_loss, -1.0),
        near=Term("neighbor", kl_loss),
        learn=Term("neighbor", pair_learning_loss, 0.3),
    )
    for name, part, factor in [("far", "forget", -1), ("near", "neighbor", 1)]:
        one = getattr(batch, part)
        plain = factor * kl_loss(
            model(one.input_ids, attention_mask=one.attention_mask).logits,
            reference.logits(part, one.rows),
            one.attention_mask,
        )
        torch.testing.assert_close(terms[name], plain, rtol=0, atol=1e-9)


def test_the_head_is_multiplied_once_per_position(monkeypatch):
    """And not at all for padding."""
    model, reference, batch = setting("gpt_neo")
    multiplied, linear = [], icu_nb.models.head.F.linear
    monkeypatch.setattr(
        icu_nb.models.head,
        "F",
        types.SimpleNamespace(linear=lambda x, *rest: multiplied.append(len(x)) or linear(x, *rest)),
    )
    gradients(model, sum(ICU()(model, batch, reference).values()))
    assert sum(multiplied) == sum(FORGET) + sum(NEAR) - 9


def test_memory_of_a_step():
    """Not all logits: with a large vocabulary less than half of the plain step's peak."""
    model, work = tiny_gpt_neo(20_000, hidden_size=32, n_heads=2), task()
    reference, batch = (
        OriginalModel(model, {"neighbor": work.neighbors}),
        Task(
            *(Sequences(part.rows * 8) for part in (work.forget, work.neighbors)),
            work.pairs,
        ).batch(torch.arange(8), "cpu"),
    )
    batch = Batch(
        *(
            Part(part.rows % 6 if part is batch.neighbor else part.rows, part.sequences)
            for part in (batch.forget, batch.neighbor)
        )
    )
    peaks = []
    for objective in (by_hand, ICU()):
        model.zero_grad(set_to_none=True)
        step = functools.partial(objective, model, batch, reference)
        peaks.append(peak_memory(lambda step=step: sum(step().values()).backward()))
    assert peaks[1] < 0.6 * peaks[0]


# ---- the head of a model ----


@families
def test_hidden_states_and_head_make_the_logits(family):
    model, texts = build(family), sequences(FORGET)
    states, head = last_hidden_states(model, texts), linear_head(model)
    logits = model(**texts.inputs).logits
    if family == "gemma2":
        assert head is None and not torch.allclose(model.get_output_embeddings()(states), logits)
    else:
        assert torch.equal(head(states), logits) and chunk_length(head) >= 1
    assert "forward" not in vars(model.get_output_embeddings())  # put back


def test_the_head_is_put_back_after_an_error():
    model = build("gpt2")
    with pytest.raises(IndexError):
        last_hidden_states(model, pad([[10**6] * 3]))
    assert "forward" not in vars(model.get_output_embeddings())


@families
def test_greedy_tokens_are_those_of_whole_logits(family, monkeypatch):
    monkeypatch.setattr("icu_nb.models.rollouts.chunk_length", lambda head: 5)
    model, texts = build(family), sequences(FORGET)
    with evaluating(model):
        greedy, _ = greedy_pass(model, texts)
        plain = model(**texts.inputs).logits[:, :-1].argmax(-1)
    assert torch.equal(greedy[:, 1:], plain * texts.attention_mask[:, 1:]) and (greedy[:, 0] == 0).all()


# ---- the original model, three ways ----


def assert_same(found, wanted, texts):
    """At the real tokens, as nothing is kept about padding. GPT-Neo's attention computes in 32 bits."""
    real = texts.attention_mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-8)


@families
def test_all_ways_of_remembering_say_the_same(family):
    peft = pytest.importorskip("peft")
    model, work = build(family), task()
    rows = torch.tensor([4, 0, 2])
    ids = work.neighbors[rows]
    with torch.no_grad():
        before, hidden = model(**ids.inputs).logits, last_hidden_states(model, ids)
    kept, copied = (
        OriginalModel(model, {"neighbor": work.neighbors}),
        OriginalModel(model, {"neighbor": work.neighbors}, anything=True),
    )
    assert (kept.way, copied.way) == ("copy" if family == "gemma2" else "hidden states", "copy")
    shake(model)
    for original in (kept, copied):
        assert_same(original.logits("neighbor", rows), before, ids)
        assert_same(original.hidden("neighbor", rows), hidden, ids)
        assert original.bytes > 0 and not original.logits("neighbor", rows).requires_grad
    torch.testing.assert_close(
        copied.apply(lambda m, batch: m(**batch.inputs).logits, ids), before, rtol=0, atol=1e-9
    )
    adapted = peft.get_peft_model(build(family), peft.LoraConfig(target_modules="all-linear"))
    switched = OriginalModel(adapted, {"neighbor": work.neighbors}, anything=True)
    assert switched.way == "adapter off" and switched.bytes == 0
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.add_(0.3)
    assert not torch.allclose(adapted(**ids.inputs).logits, before, atol=0.01)
    assert_same(switched.logits("neighbor", rows), before, ids)
    assert_same(switched.hidden("neighbor", rows), hidden, ids)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        name for name, _ in adapted.named_parameters() if "lora" in name
    }


def test_what_is_kept_is_counted():
    model, work = build("gpt_neo"), task()
    states, head = int(work.neighbors.lengths.sum()) * 16 * 8, VOCAB * 16 * 8  # float64, no padding
    assert OriginalModel(model, {"neighbor": work.neighbors}).bytes == states + head
    assert OriginalModel(model, {"neighbor": work.neighbors}, anything=True).bytes >= sum(
        p.nbytes for p in model.parameters()
    )
    assert OriginalModel(model, {}).bytes == 0 and OriginalModel(model, {}).way == "not needed"


def test_an_adapter_that_was_trained_before_is_part_of_the_original():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        build("gpt2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.add_(0.1)
    with torch.no_grad():
        before = adapted(**task().neighbors.inputs).logits
    original = OriginalModel(adapted, {"neighbor": task().neighbors})
    assert original.way == "hidden states"
    assert_same(original.logits("neighbor", torch.arange(6)), before, task().neighbors)


def test_weights_that_train_beside_an_adapter_cannot_be_switched_off():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        build("gpt2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    next(p for name, p in adapted.named_parameters() if "ln_f" in name).requires_grad_(True)
    assert OriginalModel(adapted, {"neighbor": task().neighbors}).way == "hidden states"


def test_other_texts_can_be_asked_about_only_if_that_was_said():
    work = task()
    with pytest.raises(InputError, match="anything"):
        OriginalModel(build("gpt2"), {"neighbor": work.neighbors}).apply(last_hidden_states, work.forget)


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "llama", "opt"])
def test_an_adapter_goes_on_like_the_merged_model(family):
    """peft's wrapper does not say what its model takes; positions matter for all but the longest."""
    peft = pytest.importorskip("peft")
    adapted = (
        peft.get_peft_model(
            shake(build(family), 0.3),
            peft.LoraConfig(
                target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
            ),
        )
        .double()
        .eval()
    )
    batch, needed = sequences([24] * 4), [[6, 12, 18]] * 4

    def said(model):
        with evaluating(model):
            return roll_out(model, batch, *greedy_pass(model, batch, use_cache=True), needed)

    with_adapter = said(adapted)
    assert with_adapter == said(adapted.merge_and_unload()) and len({str(row) for row in with_adapter}) == 4


def test_lora_runs_with_nothing_kept(tiny):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny.copy(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    result = unlearn(
        adapted,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(learning_rate=1e-2, max_epochs=4),
        thresholds=Thresholds(ma=0, el=0),
        refinement=None,
    )
    assert result.reference == "adapter off, 0.0 MB"
    assert (
        result.history.l_kl.iloc[1] < result.history.l_kl.iloc[-1]
        and result.history.l_fgt.iloc[-1] < result.history.l_fgt.iloc[1]
    )
    with adapted.disable_adapter():
        assert torch.allclose(
            adapted(tiny.sequences.input_ids).logits, tiny.model(tiny.sequences.input_ids).logits, atol=1e-5
        )


def test_an_objective_may_ask_about_anything(tiny):
    seen = []

    class Curious(Objective):
        needs_reference = ("anything",)

        def __call__(self, model, batch, reference):
            states = reference.apply(last_hidden_states, batch.together("forget", "neighbor"))
            seen.append((reference.way, states.shape))
            return GradientAscent()(model, batch, reference)

    unlearn(
        tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=1),
        objective=Curious(),
        refinement=None,
    )
    assert seen[0][0] == "copy" and seen[0][1][0] == 8


# ---- the step ----


def one_epoch(tiny, **settings):
    model = tiny.copy()
    result = unlearn(
        model,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(batch_size=6, n_neighbors=2, learning_rate=1e-4, **settings),
        thresholds=Thresholds(ma=0, el=0),
        refinement=None,
    )
    return result.history, torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_memory_settings_change_no_result(tiny, settings):
    (history, weights), (other, others) = one_epoch(tiny), one_epoch(tiny, **settings)
    numbers = ["loss", "l_fgt", "l_lrn", "l_kl", "ma", "el"]
    assert np.allclose(history[numbers], other[numbers], atol=1e-4, equal_nan=True)
    start = torch.nn.utils.parameters_to_vector(tiny.model.parameters())
    assert (weights - others).norm() < 0.02 * (weights - start).norm()


def test_pieces_add_up_to_the_step_exactly():
    """In float64, with texts of different lengths: the gradient of a step does not depend on its pieces."""
    model, reference, _ = setting("gpt_neo")
    found = []
    for size in (3, 2, 1):
        model.zero_grad()
        for rows in torch.arange(3).split(size):
            (
                sum(ICU()(model, task().batch(rows, "cpu", step=torch.arange(3)), reference).values())
                * len(rows)
                / 3
            ).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_and_activations_are_put_back(tiny, recomputed):
    model = tiny.copy()
    unlearn(
        model,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=1, gradient_checkpointing=recomputed),
        thresholds=Thresholds(ma=0, el=0),
    )
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_that_cannot_begin_leaves_the_layers_alone(tiny, monkeypatch):
    def fails(*_):
        raise InputError("no such processes")

    monkeypatch.setattr(icu_nb.run, "_prepared", fails)
    model = tiny.copy()
    with pytest.raises(InputError, match="no such processes"):
        unlearn(model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(gradient_checkpointing=True))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2"])
def test_gelu_in_one_operation_changes_no_gradient(family):
    """In float64: losses and gradients are those of transformers' own GELU."""
    model, reference, batch = setting(family)
    plain, changed = ICU()(model, batch, reference), fuse_activations(model)
    fused = ICU()(model, batch, reference)
    assert len(changed) == model.config.num_hidden_layers
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=0, atol=1e-9)
    torch.testing.assert_close(
        gradients(model, sum(fused.values())), gradients(model, sum(plain.values())), rtol=0, atol=1e-9
    )


def test_recomputing_needs_layers(tiny):
    class Plain(torch.nn.Module):
        pass

    with pytest.raises(InputError, match="gradient_checkpointing"):
        icu_nb.run.recompute_layers(Plain())


def test_checks_every_other_epoch(tiny):
    """Unchecked epochs have losses and no scores; the last is always checked; training is the same."""
    arguments = {"thresholds": Thresholds(ma=0, el=0), "refinement": None}
    models = [tiny.copy(), tiny.copy()]
    always, seldom = (
        unlearn(
            model,
            tiny.tokenizer,
            tiny.forget,
            tiny.retain,
            tiny.config(max_epochs=5, check_every=every),
            **arguments,
        )
        for model, every in zip(models, (1, 3), strict=False)
    )
    assert (
        seldom.history.ma.notna().tolist() == [True, False, False, True, False, True]
        and seldom.history.loss[1:].notna().all()
    )
    assert sorted(set(seldom.samples.epoch)) == [0, 3, 5] and seldom.stop_reason == "max_epochs"
    assert np.allclose(always.history.ma[[0, 3, 5]], seldom.history.ma[[0, 3, 5]]) and tiny.same(
        models[0], tiny.weights(models[1])
    )


def test_thresholds_met_within_an_epoch_are_checked_at_once(tiny):
    easy = Thresholds(ma=0.9, el=1.0)
    result = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=30, check_every=10, check_steps=1),
        thresholds=easy,
        refinement=None,
    )
    assert (
        result.stop_reason == "thresholds"
        and result.history.epoch.iloc[-1] % 10 != 0
        and result.history.ma.iloc[-1] <= 0.9
    )


@pytest.mark.parametrize(
    "setting", [{"check_every": 0}, {"micro_batch_size": 0}, {"check_every": 1.5}], ids=str
)
def test_settings_that_make_no_sense(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        ICUConfig(**setting)


# ---- 16 bits ----


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_autocast_stays_near(dtype, tolerance):
    """Losses in 16-bit products, summed in 32: within a few rounding steps (2^-8, 2^-11) of fp32."""
    model = shake(build("gpt_neo").float(), 0.1)
    work = task()
    reference, batch = OriginalModel(model, {"neighbor": work.neighbors}), work.batch(torch.arange(3), "cpu")
    shake(model)
    exact = ICU()(model, batch, reference)
    wanted = gradients(model, sum(exact.values()))
    logits = model(**work.forget.inputs).logits
    with torch.autocast("cpu", dtype=dtype):
        again = ICU()(model, batch, reference)
        states, head = last_hidden_states(model, work.forget), linear_head(model)
        assert (head(states).float() - logits).abs().max() < tolerance * logits.abs().max()
    found = gradients(model, sum(again.values()))
    assert all(value.dtype == torch.float32 for value in again.values()) and all(
        p.grad.dtype == torch.float32 for p in model.parameters()
    )
    assert all(
        abs(exact[name] - again[name]) < tolerance * max(1, exact[name].abs().item()) for name in exact
    )
    assert (found - wanted).norm() < 2 * tolerance * wanted.norm()


def test_small_weights_survive_sixteen_bits():
    """The weights of a mean over very many tokens would be 0 in fp16; they are scaled before the product."""
    torch.manual_seed(0)
    head, states, labels = (
        torch.nn.Linear(8, 512, bias=False),
        torch.randn(64, 8).requires_grad_(),
        torch.randint(512, (64,)),
    )
    weights = torch.full((1, 64), 1e-7)
    (plain,) = torch.autograd.grad(
        (1e-7 * torch.nn.functional.cross_entropy(head(states), labels, reduction="none")).sum(), states
    )
    with torch.autocast("cpu", dtype=torch.float16):
        loss = head_losses(states, head, labels, weights).sum()
    (found,) = torch.autograd.grad(loss, states)
    assert (found - plain).norm() < 0.01 * plain.norm()


def a_model(millions, device="cpu", dtype=torch.float32):
    """Something of that size, of which nothing is allocated."""
    model = torch.nn.Linear(1000, 1000 * millions, bias=False, device="meta", dtype=dtype)
    model.device = torch.device(device)
    return model


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "fp16")])
def test_the_arithmetic_of_a_gpu(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: native)
    assert Arithmetic.of(a_model(1, "cuda")) == Arithmetic(expected, "cuda")
    assert Arithmetic.of(a_model(1, "cuda"), "fp32") == Arithmetic("fp32", "cuda")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert Arithmetic.of(a_model(1, "cuda")).name == "fp32"


@pytest.mark.parametrize(
    "native, millions, expected",
    [(True, 19, "fp32"), (True, 20, "bf16"), (False, 19, "fp32"), (False, 200, "fp32")],
)
def test_the_arithmetic_of_a_cpu(monkeypatch, native, millions, expected):
    """bf16 where the processor has it and the model is large enough to gain by it: a rule, no measurement."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)
    assert Arithmetic.of(a_model(millions)) == Arithmetic(expected, "cpu")
    assert Arithmetic.of(a_model(millions), "fp32").name == "fp32"
    assert Arithmetic.of(a_model(millions), "bf16").name == "bf16"
    assert Arithmetic.of(a_model(millions, "mps")).name == "fp32"
    assert Arithmetic.of(a_model(millions, dtype=torch.float16)).name == "fp32"
    adapted = a_model(millions, dtype=torch.bfloat16)
    adapted.disable_adapter = None  # what peft's models have
    assert Arithmetic.of(adapted).name == "bf16"
    with pytest.raises(InputError, match="`precision`"):
        Arithmetic.of(a_model(millions), "fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "name, settings", [("icu", {}), ("ga", {}), ("npo", {}), ("rmu", {"layer": 0}), ("undial", {})]
)
def test_a_gpu_says_what_the_cpu_says(tiny, name, settings):
    """In 32 bits: two epochs end at the same MA, and their losses differ by rounding."""
    ends = []
    for device in ("cpu", "cuda"):
        result = unlearn(
            tiny.copy().to(device),
            tiny.tokenizer,
            tiny.forget,
            tiny.retain,
            tiny.config(learning_rate=1e-4, max_epochs=2, precision="fp32"),
            objective=get_method(name).make(**settings),
            thresholds=Thresholds(ma=0.0, el=0.0),
        )
        ends.append(result.history.iloc[-1])
    assert ends[1].loss == pytest.approx(ends[0].loss, rel=1e-3) and ends[1].ma == pytest.approx(
        ends[0].ma, abs=0.01
    )


@pytest.mark.parametrize("scale, fails", [(65536.0, False), (1.0, True), (None, True)])
def test_an_overflow_is_the_scalers_business_until_its_scale_is_used_up(tiny, monkeypatch, scale, fails):
    """fp16: the scaler leaves such a step out and halves its scale, until nothing is left to halve."""
    work = prepare_task(tiny.model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config())
    run = Run(tiny.copy(), work, tiny.config(), ICU(), Thresholds())
    monkeypatch.setattr(run.accelerator, "scaler", scale and types.SimpleNamespace(get_scale=lambda: scale))
    monkeypatch.setattr(run.accelerator, "backward", lambda loss: loss.backward())
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    stepped = []
    run.optimizer = types.SimpleNamespace(zero_grad=lambda: None, step=lambda: stepped.append(1))
    if fails:
        with pytest.raises(NonFinite, match="gradient"):
            run.step(torch.arange(4), 1)
    else:
        run.step(torch.arange(4), 1)
    assert bool(stepped) != fails


# ---- evaluation ----


def greedy_for_memory(model, most, seen):
    """The model, on a device with room for a few rows only."""
    forward = model.forward

    @functools.wraps(forward)
    def limited(*args, input_ids=None, **rest):
        seen.append(len(input_ids))
        if len(input_ids) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, input_ids=input_ids, **rest)

    model.forward = limited
    return model


def test_whatever_is_asked_of_a_model_is_halved_until_it_fits(tiny, monkeypatch):
    whole, widths = (
        (
            model_embedder(tiny.model, tiny.tokenizer, 8)(tiny.forget),
            generate_continuations(tiny.model, [row[:20] for row in tiny.sequences.tokens()], [8] * 8),
        ),
        [],
    )
    original = type(tiny.model).forward

    def small(self, input_ids=None, *args, **options):
        widths.append(len(input_ids))
        if len(input_ids) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, input_ids, *args, **options)

    monkeypatch.setattr(type(tiny.model), "forward", small)
    body, inner = type(tiny.model.base_model), type(tiny.model.base_model).forward
    monkeypatch.setattr(
        body,
        "forward",
        lambda self, input_ids=None, *args, **options: (
            inner(self, input_ids, *args, **options)
            if len(input_ids) <= 4
            else (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        ),
    )
    assert np.allclose(model_embedder(tiny.model, tiny.tokenizer, 8)(tiny.forget), whole[0], atol=1e-5)
    assert (
        generate_continuations(tiny.model, [row[:20] for row in tiny.sequences.tokens()], [8] * 8) == whole[1]
        and max(widths) > 4
    )
    assert (
        OriginalModel(tiny.copy(), {"neighbor": tiny.sequences}, 8)
        .hidden("neighbor", torch.arange(8))
        .shape[0]
        == 8
    )


def test_batches_are_halved_until_they_fit():
    model, texts, seen = build("gpt_neo"), sequences([12] * 9), []
    wanted = memorization_accuracy(model, texts.input_ids)
    found = memorization_accuracy(greedy_for_memory(model, 2, seen), texts.input_ids, batch_size=16)
    assert torch.equal(found, wanted) and seen == [9, 5, 3, 2, 1, 2, 2, 2]  # nothing is done twice


def test_not_even_one_fits():
    with pytest.raises(torch.OutOfMemoryError, match=r"max_length.*12 tokens.*CUDA out of memory"):
        memorization_accuracy(greedy_for_memory(build("gpt_neo"), 0, []), sequences([12] * 3).input_ids)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    calls = []

    def fails(rows):
        calls.append(len(rows))
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_batches(fails, [5] * 8, 8, torch.nn.Linear(1, 1))
    assert calls == [8]


@families
def test_rollouts_do_not_copy_their_cache(family, monkeypatch):
    """Room for the whole continuation is made once: no layer of the cache is concatenated per token."""
    model, texts, concatenated = build(family), sequences([12] * 3), []
    cat = torch.cat
    with evaluating(model):
        greedy, cache = greedy_pass(model, texts, use_cache=True)
        needed = [list(range(4, 9))] * 3
        wanted = roll_out(model, texts, greedy, cache, needed)
        monkeypatch.setattr(
            torch,
            "cat",
            lambda tensors, *args, **rest: (
                concatenated.append([t.shape[-2:] for t in tensors]) or cat(tensors, *args, **rest)
            ),
        )
        assert roll_out(model, texts, greedy, cache, needed) == wanted
    assert not [shapes for shapes in concatenated if shapes[0][0] > shapes[1][0] == 1]


def test_a_model_without_a_cache_warns_once_per_run(tiny):
    model = OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=len(tiny.tokenizer), n_embd=16, n_layer=1, n_head=1, n_positions=64)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        unlearn(
            model,
            tiny.tokenizer,
            tiny.forget,
            tiny.retain,
            tiny.config(max_epochs=2, batch_size=8),
            thresholds=Thresholds(ma=0, el=0),
        )
    assert sum("no cache that can be copied" in str(w.message) for w in caught) == 1


@pytest.fixture
def scorer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
        )
    ).save_pretrained(tmp_path)
    return BERTScorer(str(tmp_path))


def test_references_are_read_once_per_run(scorer, monkeypatch):
    read, forward = [], scorer._model.forward
    monkeypatch.setattr(
        scorer._model,
        "forward",
        lambda **inputs: read.append(len(inputs["input_ids"])) or forward(**inputs),
    )
    truths, said = ["a b c", "d e"], ["a b", "c c c c"]
    first = scorer(said, truths)
    assert sum(read) == 4
    again = scorer(said, truths)
    assert sum(read) == 6 and np.allclose(first, again, atol=1e-6) and len(scorer._vectors) == 2


def test_batched_reading_scores_as_torchmetrics_does(scorer):
    from torchmetrics.text.bert import BERTScore

    plain = BERTScore(
        model=scorer._model,
        user_tokenizer=lambda texts, max_length: scorer._tokens(texts),
        max_length=64,
        device=scorer._model.device,
    )
    truths, said = ["a b c", "d e", "f g h a b"], ["a b", "c c c c", "f g"]
    wanted = []
    for pair in zip(said, truths, strict=False):
        plain.reset()
        plain.update(*([text] for text in pair))
        wanted.append(float(plain.compute()["f1"]))
    assert np.allclose(scorer(said, truths), wanted, atol=1e-5)


# ---- pairing ----


def test_embeddings_are_kept_by_content(cache):
    asked = []

    def embedder(texts):
        asked.extend(texts)
        return [[float(len(text)), 1.0] for text in texts]

    first = _cached_embedder(embedder, "one")(["a", "bb", "a"])
    assert first.tolist() == [[1, 1], [2, 1], [1, 1]] and asked == ["a", "bb"]
    assert _cached_embedder(embedder, "one")(["ccc", "bb"]).tolist() == [[3, 1], [2, 1]] and asked == [
        "a",
        "bb",
        "ccc",
    ]
    _cached_embedder(embedder, "another")(["a"])
    assert asked[-1] == "a" and len(asked) == 4


def test_a_damaged_file_of_embeddings_is_made_again(cache):
    embedder = _cached_embedder(lambda texts: [[1.0, 2.0] for _ in texts], "one")
    embedder(["a"])
    (file,) = (cache / "cache").rglob("*.npz")
    file.write_bytes(file.read_bytes()[:40])
    assert embedder(["a"]).tolist() == [[1, 2]] and icu_nb.embedding._load_vectors(file.parent)


def test_an_embedder_that_errs_leaves_nothing_behind(cache):
    with pytest.raises(InputError, match="embedder"):
        _cached_embedder(lambda texts: [[float("nan")]], "one")(["a"])
    assert not list((cache / "cache").rglob("*.npz"))


def test_one_call_of_faiss(monkeypatch):
    calls, knn = [], icu_nb.cle.faiss.knn
    monkeypatch.setattr(icu_nb.cle.faiss, "knn", lambda *args: calls.append(len(args[0])) or knn(*args))

    def letters(texts):
        return np.array([[text.count(c) for c in "abcd"] for text in texts], dtype=float)

    pairs = nearest_neighbors(["aab", "ccd", "bdb"], ["ab", "cd", "bbd", "dd"], embedder=letters)
    assert pairs[:, 0].tolist() == [0, 1, 2] and calls == [3]


def test_texts_are_tokenized_once(tiny, monkeypatch):
    """Their second halves are what the model's own embedder reads; nothing else is tokenized."""
    read, encode = [], type(tiny.tokenizer)._encode_plus
    monkeypatch.setattr(
        type(tiny.tokenizer),
        "_encode_plus",
        lambda self, text, *args, **rest: (
            read.extend([text] if isinstance(text, str) else text) or encode(self, text, *args, **rest)
        ),
    )
    prepare_task(tiny.model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config())
    read = [text for text in read if text != "a"]  # what shows where a tokenizer puts BOS and EOS
    assert all(read.count(text) == 1 for text in [*tiny.forget, *tiny.retain]) and len(read) == 2 * (
        len(tiny.forget) + len(tiny.retain)
    )


def test_nothing_of_a_forget_text_is_kept_on_disk(tiny, cache):
    """Vectors and hashes of the pool are; those of the forget set would outlive it."""
    embedder = _cached_embedder(
        lambda texts: [[len(text), text.count("e") + 1.0] for text in texts], "counts"
    )
    prepare_task(tiny.model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(), embedder)
    kept = {key for file in (cache / "cache").rglob("*.npz") for key in np.load(file)["keys"].tolist()}
    halves = tiny.tokenizer.batch_decode([row[len(row) // 2 :] for row in tiny.sequences.tokens()])
    assert len(kept) > 1 and not kept & {
        hashlib.sha256(text.encode()).hexdigest() for text in [*tiny.forget, *halves]
    }


def test_neighbors_are_those_of_second_halves(tiny):
    """What the loop embeds is what `second_half` gives."""
    config = tiny.config(n_neighbors=2)
    task = prepare_task(tiny.model, tiny.tokenizer, tiny.forget, tiny.retain, config)

    def cut(texts):
        return tiny.tokenizer.batch_decode([row[:48] for row in tiny.tokenizer(texts)["input_ids"]])

    embedder = icu_nb.embedding.second_half(model_embedder(tiny.model, tiny.tokenizer), tiny.tokenizer)
    wanted = nearest_neighbors(cut(tiny.forget), cut(tiny.retain), embedder=embedder, k=2)
    assert (task.pairs == wanted).mean() > 0.9  # a cut text may be tokenized otherwise at its end
