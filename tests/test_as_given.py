"""A run leaves the process and the model as it found them, but for the weights that train."""

import copy
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainingArguments

import icu_nb.metrics
import icu_nb.plumbing
from icu_nb.embedding import model_embedder
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds, calibrate_thresholds
from icu_nb.language_model import evaluating
from icu_nb.models.head import linear_head
from icu_nb.models.loading import add_lora
from icu_nb.objective import ICU, Objective
from icu_nb.plumbing import Arithmetic
from icu_nb.unlearn import unlearn

NEVER = Thresholds(ma=0.0, el=0.0)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """No test sees what another one has told accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(tiny, model, objective=None, callback=None, refinement=None, embedder=None, **config):
    return unlearn(
        model,
        tiny.tokenizer,
        tiny.forget,
        tiny.retain,
        tiny.config(**{"max_epochs": 1, **config}),
        thresholds=NEVER,
        objective=objective,
        callback=callback,
        refinement=refinement,
        embedder=embedder,
    )


# ---- other users of accelerate in the same process ----


class TextRows(torch.utils.data.Dataset):
    def __init__(self, tiny):
        self.rows = tiny.sequences.input_ids

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer_of(tiny, model, folder, precision="fp32", **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16",
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=TextRows(tiny))


PRECISIONS = [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")]


@pytest.mark.parametrize("theirs, ours", PRECISIONS)
def test_after_a_trainer_and_before_one(tiny, tmp_path, theirs, ours):
    model = tiny.copy()
    trainer_of(tiny, model, tmp_path, theirs).train()
    wrapped = vars(model).get("forward")
    result = run(tiny, model, precision=ours)
    assert set(result.history.arithmetic) == {ours}
    assert vars(model).get("forward") is wrapped  # the trainer's own wrapper is there again
    before = tiny.weights(model)
    trainer_of(tiny, model, tmp_path, theirs).train()
    assert not tiny.same(model, before)


@pytest.mark.parametrize("theirs, ours", PRECISIONS)
def test_after_an_accelerator_and_before_one(tiny, theirs, ours):
    mixed = {"fp32": "no", "bf16": "bf16"}
    theirs_first = Accelerator(mixed_precision=mixed[theirs], gradient_accumulation_steps=4)
    other = theirs_first.prepare(tiny.copy())
    model = tiny.copy()
    result = run(tiny, model, precision=ours, max_epochs=2)
    assert set(result.history.arithmetic) == {ours} and result.history.loss.nunique() == 2
    assert theirs_first.gradient_accumulation_steps == 4
    assert theirs_first.mixed_precision == mixed[theirs] == Accelerator().mixed_precision
    assert not any(name in vars(model) for name in ("forward", "_is_accelerate_prepared"))
    prepared = theirs_first.prepare(model)
    assert vars(model)["_is_accelerate_prepared"] and prepared is model
    assert ("forward" in vars(model)) == (theirs == "bf16") == ("forward" in vars(other))


def test_while_it_runs_the_others_settings_hold(tiny):
    theirs, seen = Accelerator(mixed_precision="bf16"), []

    def look(model, row):
        seen.append((theirs.mixed_precision, Accelerator().mixed_precision))

    run(tiny, tiny.copy(), callback=look, precision="fp32")
    assert set(seen) == {("bf16", "bf16")}


def test_one_run_after_the_other_in_another_precision(tiny):
    model = tiny.copy()
    for precision in ("fp32", "bf16", "fp32"):
        result = run(tiny, model, precision=precision)
        assert set(result.history.arithmetic) == {precision}
        assert "forward" not in vars(model)


SCRIPT = """
import json, sys
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer
from icu_nb import ICUConfig, Thresholds, unlearn

folder, order, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def forget():
    config = ICUConfig(max_length=48, max_epochs=1, num_beams=1)
    unlearn(model, tokenizer, texts[:4], texts[4:], config, thresholds=Thresholds(ma=0.0, el=0.0))


if order == "after":
    Accelerator(mixed_precision="bf16").prepare(model)
    forget()
else:
    forget()
    Accelerator(mixed_precision="bf16").prepare(model)
assert "forward" in vars(model) and model._is_accelerate_prepared
"""


@pytest.mark.parametrize("order", ["after", "before"])
def test_in_a_process_of_its_own(tiny, tmp_path, order):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), order, json.dumps(tiny.forget + tiny.retain)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "ACCELERATE_USE_CPU": "yes",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- the model and the generators ----


def snapshot(model):
    """Everything of a model but its weights, and the generators."""
    modules = []
    for name, module in model.named_modules():
        own = {key: vars(module).get(key) for key in ("forward", "_original_forward")}
        hooks = {key: dict(held) for key, held in vars(module).items() if key.endswith("_hooks")}
        modules.append((name, module.training, own, hooks))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "modules": modules,
        "prepared": vars(model).get("_is_accelerate_prepared"),
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {n: p.grad.sum().item() for n, p in model.named_parameters() if p.grad is not None},
        "generation": base.generation_config.to_dict(),
        "same settings": id(base.generation_config),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "devices": {p.device for p in model.parameters()},
        "dtypes": {p.dtype for p in model.parameters()},
    }


def as_people_have_them(model):
    """Dropout in one block, a hook, a forward of its own, settings for generation."""
    blocks = list(model.modules())
    model.eval()
    blocks[3].train()
    blocks[5].register_forward_hook(lambda *_: None)
    last = blocks[-1]
    last.forward = types.MethodType(type(last).forward, last)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config.num_beams = 5
    some = next(p for p in model.parameters() if p.requires_grad)
    some.grad = torch.ones_like(some)
    return model


def a_part_frozen(tiny):
    model = tiny.copy()
    model.transformer.wte.requires_grad_(False)
    return model


def an_adapter_a_part_frozen(tiny):
    torch.manual_seed(0)
    model = add_lora(tiny.copy(), 4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


class Fails(Objective):
    needs_reference = ("neighbor",)

    def __init__(self, error, where="after"):
        self.error, self.where = error, where

    def validate(self, model, task):
        if self.where == "validate":
            raise self.error

    def __call__(self, model, batch, reference):
        random.random(), np.random.rand(), torch.rand(1)
        terms = ICU()(model, batch, reference)
        sum(terms.values()).backward(retain_graph=True)
        if self.where == "after":
            raise self.error
        return terms


def no_forward(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def fail_in(target, name, error):
    def prepare(monkeypatch):
        monkeypatch.setattr(target, name, no_forward(error))

    return prepare


ENDS = {
    "normal": {},
    "an error in the objective": {"objective": Fails(ZeroDivisionError())},
    "Ctrl-C in the objective": {"objective": Fails(KeyboardInterrupt())},
    "an error in the callback": {"callback": no_forward(ZeroDivisionError())},
    "Ctrl-C in the callback": {"callback": no_forward(KeyboardInterrupt())},
    "an error in the refinement": {"refinement": no_forward(ZeroDivisionError())},
    "an error in set-up": {"objective": Fails(ZeroDivisionError(), "validate")},
    "Ctrl-C in set-up": {"patch": ("icu_nb.run._prepared", KeyboardInterrupt())},
    "an error while the original is kept": {"patch": ("icu_nb.run.OriginalModel", ZeroDivisionError())},
    "an error at the end of set-up": {"patch": ("icu_nb.run.fuse_activations", ZeroDivisionError())},
    "Ctrl-C in the first check": {"patch": ("icu_nb.iur.generate_continuations", KeyboardInterrupt())},
    "Ctrl-C while neighbors are looked for": {
        "patch": ("icu_nb.embedding._mean_states", KeyboardInterrupt())
    },
}


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "precision": "bf16"}], ids=str)
@pytest.mark.parametrize("make", [a_part_frozen, an_adapter_a_part_frozen])
@pytest.mark.parametrize("end", ENDS)
def test_it_comes_back_as_it_was_given(tiny, monkeypatch, end, make, settings):
    model = as_people_have_them(make(tiny))
    options = dict(ENDS[end])
    name, error = options.pop("patch", (None, None))
    if name:
        monkeypatch.setattr(name, no_forward(error))
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = snapshot(model)
    try:
        run(tiny, model, **options, **settings)
    except (ZeroDivisionError, KeyboardInterrupt):
        assert end != "normal"
    after = snapshot(model)
    assert all(after[key] == before[key] for key in before), [k for k in before if after[k] != before[k]]


def test_frozen_parts_of_an_adapter_do_not_train(tiny):
    """peft trains all of an adapter once it was switched off and on again."""
    model = an_adapter_a_part_frozen(tiny)
    before = tiny.weights(model)
    result = run(tiny, model, max_epochs=2)
    assert result.reference.startswith("adapter off")
    moved = {name for name, value in tiny.weights(model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_B" in name for name in moved)


def test_each_block_keeps_its_mode(tiny, monkeypatch):
    """Also where measuring is interrupted, and where the head is looked at."""
    model = as_people_have_them(tiny.copy())
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    linear_head(copy.deepcopy(model).train())
    calibrate_thresholds(model, tiny.tokenizer, tiny.heldout, max_length=48)
    monkeypatch.setattr(icu_nb.metrics, "greedy_pass", no_forward(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        calibrate_thresholds(model, tiny.tokenizer, tiny.heldout, max_length=48)
    assert [module.training for module in model.modules()] == modes
    in_training = as_people_have_them(tiny.copy()).train()
    in_training.transformer.h[0].eval()
    modes = [module.training for module in in_training.modules()]
    linear_head(in_training)
    assert [module.training for module in in_training.modules()] == modes


# ---- which numbers have how many bits ----


def dtypes(model):
    return {name: p.dtype for name, p in model.named_parameters()}


def test_the_base_below_an_adapter_keeps_its_dtype(tiny):
    """In bf16 it takes half the memory; the adapter trains in 32 bits, and the run computes in bf16."""
    model = add_lora(tiny.copy().to(torch.bfloat16), 4)
    result = run(tiny, model, max_epochs=2, learning_rate=1e-2)
    for name, dtype in dtypes(model).items():
        assert dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    assert set(result.history.arithmetic) == {"bf16"} and result.history.loss.notna().sum() == 2
    assert result.history.loss.iloc[-1] < result.history.loss.iloc[1]


def test_without_an_adapter_all_weights_are_of_one_dtype(tiny):
    """Frozen ones, too: a model of two dtypes could not be used afterwards."""
    model = tiny.copy().to(torch.bfloat16).requires_grad_(False)
    model.transformer.h[1].requires_grad_(True)
    for _ in range(2):
        run(tiny, model)
        assert set(dtypes(model).values()) == {torch.float32}
    assert model(tiny.sequences.input_ids).logits.dtype == torch.float32


def test_an_adapter_whose_base_is_fp16(tiny):
    """CPUs mix fp16 with nothing: the base is fp32 while it runs."""
    seen, model = {}, add_lora(tiny.copy().to(torch.float16), 4)

    def look(model, row):
        seen.update(dtypes(model))

    result = run(tiny, model, callback=look)
    assert set(result.history.arithmetic) == {"fp32"} and set(seen.values()) == {torch.float32}
    assert set(dtypes(model).values()) == {torch.float32, torch.float16}
    with pytest.raises(InputError, match=r"`precision`.*fp16"):
        run(tiny, model, precision="bf16")


def test_who_asks_for_32_bits_gets_them_everywhere(tiny):
    """While it runs; frozen weights come back as they were."""
    seen = {}

    def look(model, row):
        seen.update(dtypes(model))

    model = add_lora(tiny.copy().to(torch.bfloat16), 4)
    result = run(tiny, model, precision="fp32", callback=look)
    assert set(seen.values()) == {torch.float32} and set(result.history.arithmetic) == {"fp32"}
    for name, dtype in dtypes(model).items():
        assert dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def watch(monkeypatch, target, name, seen):
    """Note in which arithmetic a function is called."""
    function = getattr(target, name)

    def watched(*args, **kwargs):
        seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
        return function(*args, **kwargs)

    monkeypatch.setattr(target, name, watched)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_of_a_run_has_one_arithmetic(tiny, monkeypatch, precision):
    import icu_nb.embedding
    import icu_nb.reference

    seen = {}
    watch(monkeypatch, icu_nb.embedding, "last_hidden_states", seen)
    watch(monkeypatch, icu_nb.metrics, "greedy_pass", seen)
    watch(monkeypatch, icu_nb.reference, "last_hidden_states", seen)
    config = tiny.config(max_epochs=1, precision=precision)
    unlearn(tiny.copy(), tiny.tokenizer, tiny.forget, tiny.retain, config, heldout=tiny.heldout)
    assert set(seen) == {"last_hidden_states", "greedy_pass"}
    assert all(states == {precision == "bf16"} for states in seen.values())


def test_an_embedder_of_the_user_is_left_alone(tiny):
    seen = set()

    def embed(texts):
        seen.add(torch.is_autocast_enabled("cpu"))
        return np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32)

    run(tiny, tiny.copy(), precision="bf16", embedder=embed)
    assert seen == {False}


def test_the_first_step_diverges_from_nothing(tiny):
    """The original is kept in the run's own arithmetic, so next to nothing differs before the first step."""
    divergence = []

    class Note(ICU):
        def __call__(self, model, batch, reference):
            terms = super().__call__(model, batch, reference)
            divergence.append(terms["l_kl"].item())
            return terms

    run(tiny, tiny.copy(), objective=Note(), precision="bf16")
    assert abs(divergence[0]) < 2e-4 < divergence[1]


def test_vectors_of_small_models_are_as_they_were(tiny):
    vectors = model_embedder(tiny.model, tiny.tokenizer)(tiny.forget)
    assert Arithmetic.of(tiny.model).name == "fp32" and vectors.dtype == np.float32
