"""Every method against a formula of its own, written here from logits with plain PyTorch in float64."""

import copy
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_fast_paths import VOCAB, build, gradients, sequences, shake
from torch.nn.functional import logsigmoid, mse_loss

from icu_nb.checkpoint import _CheckpointError
from icu_nb.data.people import people_corpus
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.methods.edits import _fuse_by_least_squares, retrain
from icu_nb.methods.objectives import _layer_states
from icu_nb.methods.registry import METHODS, get_method
from icu_nb.models.loading import add_lora
from icu_nb.models.tiny import memorize, tiny_gpt_neo, tiny_model
from icu_nb.pairs import Task, prepare_task
from icu_nb.reference import OriginalModel
from icu_nb.unlearn import unlearn

NEVER = Thresholds(ma=0, el=0)
LENGTHS = {
    "forget": [12, 7, 9],
    "neighbor": [11, 12, 4, 8, 12, 6],
    "alternative": [5, 12, 8],
}  # two neighbors each
SETTINGS = {
    "rmu": {"layer": 0, "c": 2.0, "alpha": 3.0}
}  # the published layer is no layer of so small a model
NAMES = [
    name for name, method in METHODS.items() if method.objective and not method.variant_of and name != "kumpr"
]
methods = pytest.mark.parametrize("name", NAMES)


class Bigram(torch.nn.Module):
    """Logits that are set by hand: those of whatever follows token x stand in row x."""

    def __init__(self, table):
        super().__init__()
        self.table, self.device = torch.nn.Parameter(table), table.device

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


def bigram():
    return Bigram(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)).double())


def task():
    parts = {name: sequences(lengths, seed) for seed, (name, lengths) in enumerate(LENGTHS.items(), start=1)}
    pairs, unseen = np.arange(6).reshape(3, 2), -torch.arange(1.0, VOCAB + 1).double() / 4
    return Task(parts["forget"], parts["neighbor"], pairs, alternatives=parts["alternative"], unseen=unseen)


def setting(model, **asked):
    """The original, a model that has moved away from it, the reference, and the task."""
    work, original = task(), copy.deepcopy(model)
    reference = OriginalModel(
        model, {"forget": work.forget, "neighbor": work.neighbors, "alternative": work.alternatives}, **asked
    )
    return original, shake(model, 0.1), reference, work


# ---- formulas ----


class Formulas:
    """Each loss from the logits of one sequence at a time: no padding, no batch, no code of the library."""

    def __init__(self, model, original, work):
        self.model, self.original = model, original
        self.f, self.r, self.alt = (
            part.tokens() for part in (work.forget, work.neighbors, work.alternatives)
        )

    @staticmethod
    def log_p(model, read, scored=None):
        scored = read if scored is None else scored
        n = min(len(read), len(scored))
        logits = model(
            input_ids=torch.tensor([read[:n]]), attention_mask=torch.ones(1, n, dtype=torch.long)
        ).logits[0]
        return logits[:-1].log_softmax(-1)[torch.arange(n - 1), torch.tensor(scored[1:n])]

    def all_log_p(self, model, text):
        return (
            model(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long))
            .logits[0, :-1]
            .log_softmax(-1)
        )

    def ce(self, texts):
        return -torch.cat([self.log_p(self.model, text) for text in texts]).mean()

    def kl(self, texts):
        pairs = [
            (self.all_log_p(self.original, text).detach(), self.all_log_p(self.model, text)) for text in texts
        ]
        return torch.cat([(p0.exp() * (p0 - p)).sum(-1) for p0, p in pairs]).mean()

    def other(self):
        return -torch.stack(
            [self.log_p(self.model, self.f[i], self.r[2 * i + k]).mean() for i in range(3) for k in range(2)]
        ).mean()

    def moved(self, texts):
        return torch.stack(
            [
                self.log_p(self.model, text).sum() - self.log_p(self.original, text).sum().detach()
                for text in texts
            ]
        )

    def weighted(self, weight):
        log_p = torch.cat([self.log_p(self.model, text) for text in self.f])
        return (weight(log_p.detach().exp()) * log_p).mean()

    def ga(self):
        return -self.ce(self.f)

    def icu(self):
        return -self.ce(self.f) + 0.5 * self.ce(self.r) + self.kl(self.r)

    def icu_plus(self):
        above = []
        for text in self.f:
            log_p = self.log_p(self.model, text)
            above += [p + (token + 1) / 4 for p, token in zip(log_p, text[1:], strict=True)]
        assert min(above) < 0 < 1 < max(above)
        bent = [d.clamp(min=0) if d <= 0 else d**2 / 2 if d < 1 else d - 0.5 for d in above]
        return torch.stack(bent).mean() + 0.5 * self.ce(self.r) + self.kl(self.r)

    def graddiff(self):
        return -self.ce(self.f) + self.ce(self.r)

    def kl_(self):
        return -self.ce(self.f) + self.kl(self.r)

    def llmu(self):
        return -self.ce(self.f) + 0.5 * self.other() + self.kl(self.r)

    def po(self):
        return self.other() + 0.5 * self.ce(self.r)

    def eul(self):
        return self.kl(self.r) - self.kl(self.f) + self.ce(self.r) - 0.2 * self.ce(self.f)

    def npo(self):
        return -(2 / 0.1) * logsigmoid(-0.1 * self.moved(self.f)).mean() + self.ce(self.r)

    def dpo(self, alpha=1.0):
        preference = 0.1 * (self.moved(self.alt) - self.moved(self.f))
        return -(2 / 0.1) * logsigmoid(preference).mean() + alpha * self.ce(self.r)

    def altpo(self):
        return self.dpo(alpha=2.0)

    def idk(self):
        return self.ce(self.alt) + self.ce(self.r)

    def idk_ap(self):
        kept = []
        for i, text in enumerate(self.r):
            half = len(text) // 2
            refused = [*text[:half], *self.alt[i // 2]]
            answer = self.log_p(self.model, text)[half - 1 :].sum()
            kept.append(logsigmoid(0.1 * (answer - self.log_p(self.model, refused)[half - 1 :].sum())))
        return self.ce(self.alt) - torch.stack(kept).mean() / 0.1

    @staticmethod
    def js(p, q):
        middle = (p + q) / 2
        kl = [(a * (a.clamp(min=1e-300) / middle).log()).sum(-1) for a in (p, q)]
        return sum(kl) / 2

    def jensun(self):
        far, near = [], []
        for text, words in zip(self.f, self.alt, strict=True):
            said = (words * 12)[: len(text) - 1]
            p = self.all_log_p(self.model, text).exp()
            far.append(self.js(p, torch.eye(VOCAB).double()[said]))
        for text in self.r:
            p0, p = (self.all_log_p(model, text).exp() for model in (self.original, self.model))
            near.append(self.js(p0.detach(), p))
        return torch.cat(far).mean() + torch.cat(near).mean()

    def ceu(self):
        losses = []
        for text in self.f:
            p = self.all_log_p(self.model, text)
            others = p.detach().exp() * (1 - torch.eye(VOCAB).double()[text[1:]])
            losses.append(-(others / others.sum(-1, keepdim=True) * p).sum(-1))
        return torch.cat(losses).mean()

    def npo_sam(self):
        lengths = torch.tensor([len(text) - 1 for text in self.f])
        moved = self.moved(self.f) / lengths
        return -(2 / 0.015) * logsigmoid(-0.015 * moved).mean() + 2.25 * self.ce(self.r)

    def gru(self):
        return self.ga()

    def wga(self):
        return self.weighted(lambda p: p) + self.ce(self.r)

    def satimp(self):
        return 0.1 * self.weighted(lambda p: p**5 * (1 - p)) + self.ce(self.r)

    def simnpo(self):
        means = torch.stack([self.log_p(self.model, text).mean() for text in self.f])
        return 0.125 * -(2 / 4.5) * logsigmoid(-4.5 * means - 0.0).mean() + self.ce(self.r)

    def undial(self):
        losses = []
        for text in self.f:
            z0 = self.all_log_p(self.original, text).detach() - 10.0 * torch.eye(VOCAB).double()[text[1:]]
            losses.append(-(z0.softmax(-1) * self.all_log_p(self.model, text)).sum(-1))
        return torch.cat(losses).mean()

    @staticmethod
    def first_layer(model, texts):
        outputs = [model(torch.tensor([text]), output_hidden_states=True) for text in texts]
        return [output.hidden_states[1][0] for output in outputs]

    def rmu(self):
        u = torch.rand(16, generator=torch.Generator().manual_seed(0)).double()
        u = 2.0 * u / u.norm()
        f, r = self.first_layer(self.model, self.f), self.first_layer(self.model, self.r)
        r0 = [states.detach() for states in self.first_layer(self.original, self.r)]
        forget = torch.stack([mse_loss(states, u.expand_as(states)) for states in f])
        retain = torch.stack([mse_loss(*pair) for pair in zip(r, r0, strict=True)])
        return forget.mean() + 3.0 * retain.mean()


@pytest.mark.parametrize(
    "make", [bigram, lambda: build("gpt2"), lambda: build("opt")], ids=["table", "gpt2", "opt"]
)  # GPT-Neo computes its attention in float32
@methods
def test_loss_and_gradient_are_those_of_the_formula(name, make, monkeypatch):
    if name == "rmu" and make is bigram:
        pytest.skip("a table has no layers")
    monkeypatch.setattr("icu_nb.losses.chunk_length", lambda head: 7)  # several chunks
    original, model, reference, work = setting(make(), anything=name == "rmu")
    terms = get_method(name).make(**SETTINGS.get(name, {}))(
        model, work.batch(torch.arange(3), "cpu"), reference
    )
    wanted = getattr(Formulas(model, original, work), name + "_" * (name == "kl"))()
    assert len({round(value.item(), 9) for value in terms.values()}) == len(terms)
    torch.testing.assert_close(sum(terms.values()), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        gradients(model, sum(terms.values())), gradients(model, wanted), rtol=0, atol=1e-9
    )


@methods
def test_pieces_add_up_to_the_step_exactly(name):
    _, model, reference, work = setting(build("gpt2"), anything=name == "rmu")
    objective, found = get_method(name).make(**SETTINGS.get(name, {})), []
    for size in (3, 2, 1):
        model.zero_grad()
        for rows in torch.arange(3).split(size):
            (
                sum(objective(model, work.batch(rows, "cpu", step=torch.arange(3)), reference).values())
                * len(rows)
                / 3
            ).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].norm() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-9)


@methods
def test_the_original_is_asked_only_about_what_was_announced(name):
    """With nothing kept but what `needs_reference` names, as in a run."""
    model, work = build("gpt2"), task()
    objective = get_method(name).make(**SETTINGS.get(name, {}))
    parts = {"forget": work.forget, "neighbor": work.neighbors, "alternative": work.alternatives}
    reference = OriginalModel(
        model,
        {part: parts[part] for part in parts if part in objective.needs_reference},
        anything="anything" in objective.needs_reference,
    )
    shake(model)
    assert all(
        torch.isfinite(value)
        for value in objective(model, work.batch(torch.tensor([2, 0]), "cpu"), reference).values()
    )
    assert (reference.way == "not needed") == (objective.needs_reference == ())


# ---- values that are known ----


def forget_gradient(model, terms):
    return gradients(model, terms["l_fgt"])


def test_npo_without_beta_is_gradient_ascent_on_sums():
    """Equal lengths, so that the sum over a text is its mean times a constant."""
    _, model, reference, work = setting(build("gpt2"))
    batch = work.batch(torch.tensor([0]), "cpu")
    npo, ascent = (
        forget_gradient(model, get_method(name).make()(model, batch, reference)) for name in ("npo", "ga")
    )
    assert not torch.allclose(npo, 11 * ascent, rtol=0.01)
    limit = forget_gradient(model, get_method("npo").make(beta=1e-7)(model, batch, reference))
    torch.testing.assert_close(limit, 11 * ascent, rtol=0, atol=1e-5)


def test_npo_at_the_original_is_its_known_value():
    """Nothing has moved: (2/beta) log 2, with the gradient of ascent."""
    model, work = build("gpt2"), task()
    reference, batch = OriginalModel(model, {"forget": work.forget}), work.batch(torch.tensor([0]), "cpu")
    terms = get_method("npo").make(beta=0.5)(model, batch, reference)
    assert terms["l_fgt"].item() == pytest.approx(4 * np.log(2))
    torch.testing.assert_close(
        forget_gradient(model, terms),
        11 * forget_gradient(model, get_method("ga").make()(model, batch, reference)),
        rtol=0,
        atol=1e-9,
    )


def test_simnpo_of_a_sure_model():
    sure = Bigram(torch.full((VOCAB, VOCAB), -60.0).double())
    work = Task(sequences([6], seed=5), sequences([6]), np.array([[0]]))
    ids = work.forget.input_ids[0]
    assert len(set(ids[:5].tolist())) == 5
    with torch.no_grad():
        sure.table[ids[:-1], ids[1:]] = 60.0
    terms = get_method("simnpo").make(beta=2.0, weight=1.0)(sure, work.batch(torch.tensor([0]), "cpu"), None)
    assert terms["l_fgt"].item() == pytest.approx(np.log(2))  # (2/2) log 2


@pytest.mark.parametrize(
    "name, settings",
    [
        ("wga", {"beta": 0}),
        ("satimp", {"beta1": 0, "beta2": 0, "weight": 1}),
        ("graddiff", {"alpha": 0}),
        ("kl", {"beta": 0}),
        ("llmu", {"alpha": 0, "beta": 0}),
        ("icu", {"alpha": 0, "beta": 0}),
    ],
)
def test_methods_that_become_gradient_ascent(name, settings):
    _, model, reference, work = setting(build("gpt2"))
    batch = work.batch(torch.arange(3), "cpu")
    ours, ascent = (
        forget_gradient(model, get_method(method).make(**more)(model, batch, reference))
        for method, more in ((name, settings), ("ga", {}))
    )
    torch.testing.assert_close(ours, ascent, rtol=0, atol=1e-9)


def test_undial_without_beta_starts_at_rest():
    """The target is the original itself: no gradient there."""
    model, work = build("gpt2"), task()
    reference, batch = OriginalModel(model, {"forget": work.forget}), work.batch(torch.arange(3), "cpu")
    at_rest, pushed = (
        gradients(model, sum(get_method("undial").make(beta=beta)(model, batch, reference).values()))
        for beta in (0, 10)
    )
    assert at_rest.abs().max() < 1e-12 < 1e-3 < pushed.abs().max()


def test_dpo_at_the_original_is_indifferent():
    model, work = build("gpt2"), task()
    reference = OriginalModel(model, {"forget": work.forget, "alternative": work.alternatives})
    terms = get_method("dpo").make(beta=0.5)(model, work.batch(torch.arange(3), "cpu"), reference)
    assert terms["l_fgt"].item() == pytest.approx(2 / 0.5 * np.log(2))


# ---- RMU and EUL ----


def test_rmu_trains_no_layer_behind_its_own():
    _, model, reference, work = setting(build("gpt2"), anything=True)
    gradients(
        model,
        sum(
            get_method("rmu")
            .make(**SETTINGS["rmu"])(model, work.batch(torch.arange(3), "cpu"), reference)
            .values()
        ),
    )
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("h.0." in name for name in trained) and not any(
        "h.1." in name or "ln_f" in name for name in trained
    )
    assert not model.transformer.h[0]._forward_hooks  # nothing is left behind


@pytest.mark.parametrize("family", ["gpt_neo", "gpt2", "llama", "opt", "gemma2"])
def test_states_of_a_layer_are_those_that_transformers_reports(family):
    model, texts = build(family), task().forget
    wanted = model(**texts.inputs, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(_layer_states(model, texts, 0), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rmu", "llmu", "po", "npo", "undial", "dpo"])
def test_a_step_under_ddp(name):
    """DDP waits for every weight, and counts forward passes: two steps, with one process's gradient."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _, model, reference, work = setting(build("gpt2"), anything=name == "rmu")
        objective, batch = get_method(name).make(**SETTINGS.get(name, {})), work.batch(torch.arange(3), "cpu")
        gradients(model, sum(objective(model, batch, reference).values()))
        alone = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            sum(objective(wrapped, batch, reference).values()).backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, alone.get(n, torch.zeros_like(p)), rtol=0, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


def test_fusing_one_request_changes_nothing_and_two_are_a_compromise():
    generator = torch.Generator().manual_seed(0)
    W = [torch.randn(3, 5, generator=generator).double() for _ in range(2)]
    X = [torch.randn(20, 5, generator=generator).double() for _ in range(2)]
    torch.testing.assert_close(_fuse_by_least_squares(W[:1], X[:1]), W[0], rtol=0, atol=1e-9)
    stacked = torch.linalg.lstsq(
        torch.cat(X), torch.cat([x @ w.T for x, w in zip(X, W, strict=False)])
    ).solution.T
    torch.testing.assert_close(_fuse_by_least_squares(W, X), stacked, rtol=0, atol=1e-9)
    narrow = [
        x * torch.tensor([1, 1, 0, 0, 0]) for x in X
    ]  # directions that no request has seen stay as they are
    assert _fuse_by_least_squares(W, narrow)[:, 2:].abs().max() < 1e-9
    with pytest.raises(InputError, match="inputs"):
        _fuse_by_least_squares(W, X[:1])


# ---- in the loop ----


@methods
def test_every_method_runs_in_the_loop(tiny, name):
    """Three steps, in pieces, with the step rule and the texts to say instead that the method asks for."""
    model, method = add_lora(tiny.copy()) if name == "eul" else tiny.copy(), get_method(name)
    objective = method.make(**({"layer": 0} if name == "rmu" else {}))
    written = method.write_alternatives(tiny.model, tiny.tokenizer, tiny.forget, max_length=48)
    result = unlearn(
        model,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(max_epochs=1, learning_rate=1e-3, batch_size=3, micro_batch_size=2),
        objective=objective,
        heldout=tiny.heldout,
        thresholds=NEVER,
        refinement=None,
        alternatives=tiny.heldout if method.alternatives == "given" else written,
        step_rule=method.make_rule(),
    )
    terms = [
        column
        for column in result.history.columns
        if column.startswith("l_") and result.history[column].notna().any()
    ]
    row = result.history.iloc[1]
    assert result.stop_reason == "max_epochs" and row.loss == pytest.approx(
        sum(row[term] for term in terms), rel=1e-3, abs=1e-3
    )
    before = tiny.weights(tiny.model)
    if name == "eul":
        with model.disable_adapter():
            assert torch.equal(
                model(tiny.sequences.input_ids).logits, tiny.model(tiny.sequences.input_ids).logits
            )
    else:
        assert not tiny.same(model, before)


@pytest.mark.parametrize(
    "name, settings, more, message",
    [
        ("dpo", {}, {}, "`alternatives`: DPO needs"),
        ("eul", {}, {}, "add_lora"),
        ("rmu", {}, {}, "2 layers"),
        ("rmu", {"layer": 0.5}, {}, "0.5"),
        ("dpo", {}, {"alternatives": ["one"]}, "`alternatives`: there are 1 for 8"),
        ("dpo", {}, {"alternatives": "one"}, "`alternatives`"),
        ("ga", {}, {"alternatives": [""] * 8}, "`alternatives`"),
    ],
    ids=str,
)
def test_what_a_method_cannot_work_with_is_refused_before_anything_changes(
    tiny, name, settings, more, message
):
    model, before = tiny.copy(), tiny.weights(tiny.model)
    with pytest.raises(InputError, match=message):
        unlearn(
            model,
            tiny.tokenizer,
            tiny.forget,
            tiny.retain,
            tiny.config(),
            objective=get_method(name).make(**settings),
            **more,
        )
    assert tiny.same(model, before)


def test_alternatives_belong_to_the_run(tiny, tmp_path):
    def run(resume, alternatives):
        return unlearn(
            tiny.copy(),
            tiny.tokenizer,
            tiny.forget,
            tiny.retain,
            tiny.config(max_epochs=1),
            objective=get_method("dpo").make(),
            thresholds=NEVER,
            alternatives=alternatives,
            checkpoint_dir=tmp_path,
            resume_from_checkpoint=resume,
        )

    run(False, tiny.heldout)
    assert run(True, tiny.heldout).stop_reason == "max_epochs"
    with pytest.raises(_CheckpointError, match="Give the alternatives that the run began with"):
        run(True, tiny.heldout[::-1])


def test_alternatives_stand_in_the_order_of_the_forget_texts(tiny):
    work = prepare_task(
        tiny.model, tiny.tokenizer, tiny.forget, tiny.retain, tiny.config(), alternatives=tiny.heldout
    )
    batch = work.batch(torch.tensor([5, 2]), "cpu", step=torch.arange(8))
    for row, i in zip(batch.alternative.input_ids, (5, 2), strict=False):
        assert tiny.tokenizer.decode(row, skip_special_tokens=True) == tiny.tokenizer.decode(
            tiny.tokenizer(tiny.heldout[i])["input_ids"][:48]
        )
    assert work.alternatives.input_ids.shape[1] == work.forget.input_ids.shape[1]


# ---- registry ----


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("gradiff", {}, r"Known: original, .*icu, icu_published_rule, icu_plus, ga, kumpr, graddiff.*satimp"),
        ("retrained", {}, r"'retrained' has no objective: `retrain` makes it\. Objectives: icu, "),
        ("original", {}, r"'original' has no objective: it is only measured"),
        ("npo", {"betta": 1}, r"`betta`: npo has no such setting\. Its settings: beta, alpha"),
        ("ga", {"beta": 1}, r"none"),
    ],
)
def test_unknown_names_and_settings_list_the_known_ones(name, settings, message):
    with pytest.raises(InputError, match=message):
        get_method(name).make(**settings)


def test_settings_have_their_range():
    for name, wrong in [("npo", 0), ("npo", -1), ("npo", float("nan")), ("dpo", "much")]:
        with pytest.raises(InputError, match="beta"):
            get_method(name).make(beta=wrong)


def test_a_name_says_which_run_it_was():
    """What a checkpoint and a model card are told by."""
    from icu_nb.checkpoint import _name_of

    assert _name_of(get_method("npo").make(beta=0.2)) == "NPO(beta=0.2, alpha=1.0)"
    assert _name_of(get_method("kumpr").make()) == _name_of(get_method("ga").make())


# ---- retraining and task vectors ----


def test_retraining_leaves_the_forget_texts_out(tiny, cache):
    def fresh():
        return tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)

    recipe = {"epochs": 1, "max_length": 48}
    ours = retrain(fresh(), tiny.tokenizer, tiny.forget + tiny.retain, tiny.forget, **recipe)
    other = retrain(fresh(), tiny.tokenizer, [*tiny.retain, "never seen"], ["never seen"], **recipe)
    assert tiny.same(ours, tiny.weights(other)) and not tiny.same(ours, tiny.weights(fresh()))
    with pytest.raises(
        InputError, match="`forget`: 1 of 2 texts do not stand in `texts`"
    ):  # else the yardstick would know it
        retrain(
            fresh(),
            tiny.tokenizer,
            tiny.forget + tiny.retain,
            [tiny.forget[0], tiny.forget[1] + " "],
            **recipe,
        )


@pytest.mark.slow
def test_retraining_is_what_the_tiny_model_does_without_its_forget_texts():
    corpus = people_corpus()
    same, tokenizer, _ = tiny_model(corpus, retrained=True)
    fresh = tiny_gpt_neo(len(tokenizer))
    model = retrain(fresh, tokenizer, corpus.trained_on(), corpus.forget, epochs=corpus.epochs)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


RECIPE = {*inspect.signature(memorize).parameters}  # what a task vector hands on


def test_every_record_is_complete():
    """Its key, a style, and settings for every size; a variant differs from its method in settings alone."""
    for name, method in METHODS.items():
        trained = method.objective is not None
        assert method.name == name and method.label and re.fullmatch("#[0-9A-F]{6}", method.color)
        assert not (trained and method.edit)
        if trained or name == "task vector":
            assert method.published and method.source and 0 < method.tuned.learning_rate <= 0.01
        if method.edit and method.tuned:
            assert method.published and method.source
            assert {*method.tuned.of_edit()} <= {*inspect.signature(method.edit).parameters} | RECIPE
        if trained:
            method.make(**method.tuned.loss)
            method.make(**method.published.loss)
        if method.variant_of:
            assert METHODS[method.variant_of].objective is method.objective
            assert (method.refinement, method.tuned) != (
                METHODS[method.variant_of].refinement,
                METHODS[method.variant_of].tuned,
            )
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    assert len({method.style for method in METHODS.values()}) == len(METHODS)
    assert {method.refinement for method in METHODS.values()} == {"none", "icu", "published_rule"}
