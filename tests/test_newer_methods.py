"""Refusals, the methods since the paper, and step rules; fixed numbers come from loops in plain Python.

The table, the texts and the numbers: next tokens have logits 2 sin(1 + 3a + 7b) now and 2 cos(2 + 5a + 3b)
in the original, after token a for token b; the losses were summed by hand-written loops over Python floats.
"""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from test_checkpoint import assert_same_run, run
from test_methods import Bigram
from test_prompts import tiny_llama, tokenizer_with

from icu_nb.checkpoint import _CheckpointError
from icu_nb.data.people import people
from icu_nb.errors import InputError
from icu_nb.methods import step_rules
from icu_nb.methods.alternatives import generate_alternatives, refusals
from icu_nb.methods.objectives import CEU, DPO, IDK, JensUn, MeanNPO, _distance
from icu_nb.methods.registry import METHODS, get_method
from icu_nb.methods.step_rules import GRU, SAM
from icu_nb.models.loading import add_lora
from icu_nb.objective import GradientAscent, Objective
from icu_nb.pairs import Task
from icu_nb.reference import OriginalModel
from icu_nb.text import Sequences

# ---- fixed numbers ----

TEXTS = {
    "forget": ([[0, 1, 2, 3, 1, 4], [2, 0, 3, 3]], [2, 1]),
    "neighbor": ([[1, 3, 0, 2, 4], [3, 2, 1, 0, 2, 2], [4, 4, 1], [0, 3, 1, 2]], [1, 2, 0, 0]),
    "alternative": ([[0, 1, 3, 0], [2, 0, 0, 1, 4]], [2, 1]),
}
CE_R, CE_ALT = 2.243333159675782, 1.3211131572004977
NUMBERS = [
    (DPO(), {"l_fgt": 9.515461864383557, "l_lrn": CE_R}),
    (MeanNPO(), {"l_fgt": 13.093823526484904, "l_lrn": CE_R}),
    (IDK(), {"l_idk": CE_ALT, "l_lrn": CE_R}),
    (IDK(alpha=0, ap=1), {"l_idk": CE_ALT, "l_lrn": 0.0, "l_keep": 8.133079533786562}),
    (JensUn(), {"l_fgt": 0.46787422929276523, "l_near": 0.1773367306267589}),
    (CEU(), {"l_fgt": 1.363508225596578}),
]


def table_of(function):
    return torch.tensor([[2 * function(a, b) for b in range(5)] for a in range(5)], dtype=torch.float64)


def setting():
    """A model, the reference and a task of two texts with two neighbors each."""
    parts = {
        name: Sequences([torch.tensor(row) for row in rows], prompts)
        for name, (rows, prompts) in TEXTS.items()
    }
    task = Task(
        parts["forget"], parts["neighbor"], np.arange(4).reshape(2, 2), alternatives=parts["alternative"]
    )
    original = Bigram(table_of(lambda a, b: math.cos(2 + 5 * a + 3 * b)))
    return Bigram(table_of(lambda a, b: math.sin(1 + 3 * a + 7 * b))), OriginalModel(original, parts), task


@pytest.mark.parametrize("objective, numbers", NUMBERS, ids=lambda value: type(value).__name__)
def test_losses_are_the_fixed_numbers(objective, numbers):
    model, reference, task = setting()
    terms = objective(model, task.batch(torch.arange(2), "cpu"), reference)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(numbers, abs=1e-9)
    step, pieces = torch.arange(2), []
    for row in step.split(1):
        pieces.append(sum(objective(model, task.batch(row, "cpu", step), reference).values()).item())
    assert np.mean(pieces) == pytest.approx(sum(numbers.values()), abs=1e-9)


def test_distance_of_states_is_the_fixed_number():
    """Over units, over the tokens of a text (of an answer: its own), over texts; padding is filled with 9."""
    rows = [[math.sin(1 + i + 2 * t + 3 * u) for u in range(3)] for i in range(3) for t in range(4)]
    states = torch.tensor(rows, dtype=torch.float64).view(3, 4, 3)
    texts = Sequences([torch.zeros(n, dtype=torch.long) for n in (4, 2, 3)], [0, 1, 0])
    states[1, 2:] = states[2, 3:] = 9.0
    part = SimpleNamespace(sequences=texts, attention_mask=texts.attention_mask)
    target = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    assert _distance(states, target, part).item() == pytest.approx(0.6044618300160874, abs=1e-9)


def test_ceu_pushes_by_the_probability_and_jensun_by_less_than_log_2():
    """As the formulas say: p for CE-U; and JensUn's divergence from a lost token is log 2."""
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0])
    CEU._distance(logits, label).sum().backward()
    p = logits.softmax(-1)[0]
    assert logits.grad[0, 0].item() == pytest.approx(p[0].item(), abs=1e-12)
    far = torch.tensor([[-800.0, 800.0]], dtype=torch.float64, requires_grad=True)
    value = JensUn._from_token(far, label)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(2), abs=1e-12) and torch.isfinite(far.grad).all()


class Twofold(Objective):
    """L_f = w0² w1 + sin w1 and L_r = (w0 - 1)² + w0 w1."""

    def __call__(self, model, batch, reference):
        w = model.w
        return {
            "l_fgt": w[0] ** 2 * w[1] + w[1].sin(),
            "l_lrn": (w[0] - 1) ** 2 + w[0] * w[1],
        }


class OnlyTerm(Twofold):
    def __init__(self, name):
        self.name = name

    def __call__(self, model, batch, reference):
        return {self.name: super().__call__(model, batch, reference)[self.name]}


class TwoWeights:
    """As much of a run as a rule needs."""

    def __init__(self, objective, *weights):
        self.core, self.objective, self.rule_state = torch.nn.Module(), objective, {}
        self.core.w = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def add_gradients(self, objective, rows, number):
        terms = objective(self.core, None, None)
        (self.core.w.grad,) = torch.autograd.grad(sum(terms.values()), self.core.w)
        return {name: value.item() for name, value in terms.items()}

    @property
    def gradient(self):
        return self.core.w.grad.tolist()


def test_sam_is_the_fixed_numbers():
    two = TwoWeights(Twofold(), 0.7, -0.4)
    SAM(rho=0.05).add_gradients(two, None, 1)
    assert two.gradient == pytest.approx([-1.481895761112939, 2.1026765796059275], abs=1e-9)
    assert two.core.w.tolist() == [0.7, -0.4]


def test_gru_is_the_fixed_numbers(monkeypatch):
    monkeypatch.setattr(step_rules, "_Neighbors", lambda: OnlyTerm("l_lrn"))
    two, rule = TwoWeights(OnlyTerm("l_fgt"), 0.7, -0.4), GRU()
    rule.add_gradients(two, None, 1)  # they agree: nothing is taken away
    assert two.gradient == pytest.approx([-0.56, 1.411060994002885], abs=1e-9)
    two.core.w.data = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    rule.add_gradients(two, None, 2)
    assert two.gradient == pytest.approx([-0.19471237569447775, 1.177330643734053], abs=1e-9)
    assert two.rule_state["w"].tolist() == pytest.approx([-4.16, -0.688], abs=1e-9)


# ---- rules in the loop ----


@pytest.mark.parametrize("rule", [SAM(), GRU()], ids=str)
def test_a_rule_in_pieces_is_the_rule(tiny, rule):
    whole, pieces = (
        run(tiny, step_rule=rule, objective=GradientAscent(), max_epochs=3, micro_batch_size=size)
        for size in (None, 1)
    )
    plain = run(tiny, objective=GradientAscent(), max_epochs=3)
    for a, b, c in zip(*(one.model.parameters() for one in (whole, pieces, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
        assert not torch.equal(a, c)
    assert type(rule).__name__ in whole.plugs["step_rule"] and "step_rule" not in plain.plugs


@pytest.mark.parametrize("rule", [SAM(), GRU()], ids=str)
def test_a_rule_leaves_alone_what_does_not_train(tiny, rule):
    model = add_lora(tiny.copy(), 4)
    run(tiny, model=model, step_rule=rule, max_epochs=1)
    with model.disable_adapter(), torch.no_grad():
        ids = tiny.sequences.input_ids
        assert torch.equal(model(ids).logits, tiny.model(ids).logits)
    frozen = tiny.copy()
    frozen.transformer.wte.weight.requires_grad_(False)
    run(tiny, model=frozen, step_rule=rule, max_epochs=1)
    assert torch.equal(frozen.transformer.wte.weight, tiny.model.transformer.wte.weight)


def test_gru_goes_on_where_it_was(tiny, tmp_path):
    whole = run(tiny, tmp_path, step_rule=GRU(), max_epochs=3)
    stored = torch.load(tmp_path / "epoch-00003" / "state.pt", weights_only=True)["rule"]
    assert stored.keys() == dict(tiny.model.named_parameters()).keys()
    shutil.rmtree(tmp_path / "epoch-00003")
    again = {"max_epochs": 3, "resume_from_checkpoint": True}
    with pytest.raises(_CheckpointError, match=r"`step_rule` was 'GRU\(share=0.8\)' and is None"):
        run(tiny, tmp_path, **again)
    with pytest.raises(_CheckpointError, match=r"`step_rule` was 'GRU\(share=0.8\)' and is 'GRU\(share=0.5"):
        run(tiny, tmp_path, step_rule=GRU(0.5), **again)
    assert_same_run(run(tiny, tmp_path, step_rule=GRU(), **again), whole)


class Fails(GradientAscent):
    """An objective that cannot be computed the second time."""

    calls = 0

    def __call__(self, model, batch, reference):
        type(self).calls += 1
        if self.calls == 2:
            raise ZeroDivisionError
        return super().__call__(model, batch, reference)


def test_weights_are_put_back_whatever_happens_nearby(tiny):
    model = tiny.copy()
    with pytest.raises(ZeroDivisionError):
        run(tiny, model=model, objective=Fails(), step_rule=SAM(rho=1.0))
    assert tiny.same(model, tiny.weights(tiny.model))


def neighbors_alone(model, batch, reference):
    return {"l_lrn": -GradientAscent()(model, batch, reference)["l_fgt"]}


@pytest.mark.parametrize("rule", [SAM(), GRU()], ids=str)
@pytest.mark.parametrize(
    "kind, arithmetic, words",
    [
        (DistributedType.FSDP, "fp32", "cuts them into shards"),
        (DistributedType.DEEPSPEED, "bf16", "cuts them into shards"),
        (DistributedType.NO, "fp16", "fp16 scales them"),
    ],
)
def test_what_a_rule_cannot_work_with_is_refused(rule, kind, arithmetic, words):
    where = SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type=kind), arithmetic=SimpleNamespace(name=arithmetic)
    )
    with pytest.raises(InputError, match=f"^`step_rule`: .*{words}.*[^\n]$"):
        rule.validate(where)


def test_what_a_rule_cannot_use_is_refused(tiny):
    for make, name in [(lambda: SAM(-1), "rho"), (lambda: GRU(1.5), "share"), (lambda: CEU(-1), "skip")]:
        with pytest.raises(InputError, match=f"`{name}`"):
            make()
    model = tiny.copy()
    with pytest.raises(InputError, match="of the terms l_lrn none belongs to forgetting"):
        run(tiny, model=model, objective=neighbors_alone, step_rule=SAM())
    assert tiny.same(model, tiny.weights(tiny.model))


# ---- texts to say instead ----


def test_a_refusal_for_every_form_of_data(tiny):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ana."}]
    rows = {
        "messages": ({"messages": turns}, {"messages": [turns[0], {**turns[1], "content": "No idea"}]}),
        "question": ({"question": "Who?", "answer": "Ana."}, {"question": "Who?", "answer": "No idea"}),
        "completion": (
            {"prompt": "Who? ", "completion": "Ana."},
            {"prompt": "Who? ", "completion": "No idea"},
        ),
    }
    tokenizer = tokenizer_with("bos", chat_template=TEMPLATE)
    for given, wanted in rows.values():
        assert refusals(tokenizer, [given], texts=["No idea"]) == [wanted]
    text, tokens = (
        refusals(tiny.tokenizer, given, texts=["No idea"], max_length=48)
        for given in (tiny.forget, [{"input_ids": row} for row in tiny.sequences.tokens()])
    )
    assert text == tokens and all(row["completion"].strip() == "No idea" for row in text)
    assert all(text.startswith(row["prompt"]) for text, row in zip(tiny.forget, tokens, strict=True))
    drawn = [row["completion"] for row in refusals(tiny.tokenizer, tiny.forget * 8)]
    assert len(set(drawn)) == 7 and drawn == [
        row["completion"] for row in refusals(tiny.tokenizer, tiny.forget * 8)
    ]


TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_refusals_of_tofu_are_drawn_where_they_lie(shared_data, tiny):
    drawn = [row["completion"] for row in refusals(tiny.tokenizer, tiny.forget * 8, data_dir=shared_data)]
    lines = (shared_data / "tofu" / "idontknow.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(set(drawn)) > 20 and {text.strip() for text in drawn} <= {line.strip() for line in lines}
    with pytest.raises(InputError, match="`texts`: `data_dir` is given, too"):
        refusals(tiny.tokenizer, tiny.forget, texts=["No."], data_dir=shared_data)


def test_alternatives_are_other_continuations_of_the_same_prompts(tiny):
    options = {"max_length": 48, "temperature": 2.0}
    before = torch.get_rng_state()
    written = generate_alternatives(tiny.model, tiny.tokenizer, tiny.forget, **options)
    assert torch.equal(torch.get_rng_state(), before)
    for text, row in zip(tiny.forget, written, strict=True):
        assert text.startswith(row["prompt"]) and row["completion"].strip()
        assert not text.startswith(row["prompt"] + row["completion"])
    assert written == generate_alternatives(tiny.model, tiny.tokenizer, tiny.forget, **options)
    assert written != generate_alternatives(tiny.model, tiny.tokenizer, tiny.forget, seed=1, **options)
    with pytest.raises(InputError, match="`model`: the model says nothing, or recites the text, at index"):
        generate_alternatives(tiny.model, tiny.tokenizer, tiny.forget, max_length=48, tries=1)


def test_a_chat_model_is_asked_for_other_facts():
    tokenizer, model, asked = tokenizer_with("bos", chat_template=TEMPLATE), tiny_llama(), []
    rows = [
        {"question": f"Who is {i}?", "answer": text[:20].strip()} for i, text in enumerate(people(3, seed=1))
    ]
    generate, model.generate = (
        model.generate,
        lambda input_ids, **more: asked.extend(input_ids) or generate(input_ids=input_ids, **more),
    )
    written = generate_alternatives(model, tokenizer, rows, instruction="Make up another one.", tries=1)
    texts = tokenizer.batch_decode(asked, skip_special_tokens=True)
    for row, other in zip(rows, written, strict=True):
        (text,) = [one for one in texts if row["question"] in one]
        assert row["answer"].strip() in text and "Make up another one." in text
        assert other["question"] == row["question"] and "Make up" not in other["answer"]
    with pytest.raises(InputError, match="`instruction`: the forget texts have no prompts"):
        generate_alternatives(model, tokenizer, ["A text."], instruction="Another one.")


@pytest.mark.parametrize("name", ["idk", "idk_ap", "jensun", "altpo", "dpo"])
def test_what_is_said_instead_has_to_be_given(tiny, name):
    model = tiny.copy()
    with pytest.raises(InputError, match=r"`alternatives`: .* none is given\. Call unlearn\(.*alternatives="):
        run(tiny, model=model, objective=get_method(name).make())
    assert tiny.same(model, tiny.weights(tiny.model))


def test_a_refusal_has_to_fit_behind_a_neighbors_prompt(tiny):
    long = refusals(tiny.tokenizer, tiny.forget, texts=["No idea at all, really not. " * 3], max_length=48)
    objective = get_method("idk_ap").make()
    with pytest.raises(InputError, match="`alternatives`: behind a neighbor's prompt they need"):
        run(tiny, objective=objective, alternatives=long, max_length=60)


def test_records_say_what_their_methods_need():
    for name, method in METHODS.items():
        rule = method.make_rule()
        assert (rule is not None) == (name in ("npo_sam", "gru"))
        later = method.since_paper and not method.edit_path
        assert later == (name in ("icu_plus", "idk", "idk_ap", "jensun", "ceu", "altpo", "npo_sam", "gru"))
    assert get_method("npo_sam").make_rule() == SAM(rho=0.01) != get_method("npo_sam").make_rule(rho=0.1)
    assert get_method("npo_sam").make() == MeanNPO(beta=0.015, alpha=2.25)
    assert get_method("idk_ap").make() == IDK(alpha=0, ap=1) != get_method("idk").make() == IDK()
