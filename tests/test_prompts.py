"""Prompts are read and answers count; a tokenizer's habits do not matter, and it stays as it is."""

import copy
import dataclasses
import hashlib
import itertools
import json
import zlib
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icu_nb.cli import main
from icu_nb.config import ICUConfig
from icu_nb.data.people import people
from icu_nb.embedding import second_half
from icu_nb.errors import InputError
from icu_nb.evals.extraction import extract, extract_secrets
from icu_nb.examples import Examples
from icu_nb.iur import Thresholds, calibrate_thresholds
from icu_nb.language_model import mean_token_nll, predicted_positions, token_losses
from icu_nb.methods.objectives import _refused
from icu_nb.methods.registry import METHODS
from icu_nb.metrics import extraction_likelihood, memorization_accuracy, memorization_scores, perplexity
from icu_nb.models.loading import add_lora
from icu_nb.pairs import prepare_task, unseen_log_probs
from icu_nb.reference import OriginalModel
from icu_nb.tables import read_table
from icu_nb.text import el_positions, prompt_suffix, special_ends, tokenize
from icu_nb.unlearn import unlearn

TEXTS = people(24, seed=5)


def trained_bpe():
    bpe = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special, show_progress=False)
    return bpe._tokenizer


BPE = trained_bpe().to_str()
HABITS = {"plain": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}


def tokenizer_with(habit, **settings):
    """A fast tokenizer that adds BOS, EOS or both, as those of Llama and T5 do."""
    backend = Tokenizer.from_str(BPE)
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single=HABITS[habit], special_tokens=ends)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)


def tiny_llama(seed=0, vocab_size=400):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def overfit(model, rows, steps):
    """A model that has learned some of these rows, so that no measure is 0 or 1."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for row in rows:
            ids = row[None]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.double()


@pytest.fixture(scope="module")
def learned():
    """Llama in float64 with the sequences that it half knows."""
    sequences = tokenize(TEXTS[:6], tokenizer_with("bos"), 60)
    return overfit(tiny_llama(), sequences.rows, 12), sequences


# ---- a tokenizer's habits ----


@pytest.mark.parametrize("habit", HABITS)
@pytest.mark.parametrize("sides", [*itertools.product(("left", "right"), repeat=2)])
def test_texts_are_cut_at_their_end_whatever_the_tokenizer_does(habit, sides):
    tokenizer = tokenizer_with(habit, truncation_side=sides[0], padding_side=sides[1])
    front, back = special_ends(tokenizer)
    assert [front, back] == [[1] * ("<s>" in HABITS[habit]), [2] * ("</s>" in HABITS[habit])]
    whole = tokenize(TEXTS, tokenizer)
    plain = tokenize(TEXTS, tokenizer_with("plain"))
    assert whole.tokens() == [front + row + back for row in plain.tokens()]
    cut = tokenize(TEXTS, tokenizer, 20)
    assert cut.tokens() == [row[:20] for row in whole.tokens()]  # the end goes, and EOS with it
    assert tokenize(TEXTS, tokenizer, special_tokens="front").tokens() == [
        front + row for row in plain.tokens()
    ]
    assert tokenize(TEXTS, tokenizer, special_tokens="none").tokens() == plain.tokens()


STATES = {
    "as made": {},
    "truncation": {
        "truncation": {"max_length": 7, "stride": 0, "strategy": "longest_first", "direction": "left"}
    },
    "padding": {"padding": {"direction": "left", "pad_id": 3, "pad_token": "<pad>", "length": 9}},
}


@pytest.mark.parametrize("state", STATES)
def test_the_tokenizer_stays_as_it_was_given(state, tmp_path, learned):
    """A call with truncation=True sets it for good, and it would be saved along."""
    tokenizer = tokenizer_with("bos")
    backend = tokenizer.backend_tokenizer
    if "truncation" in STATES[state]:
        backend.enable_truncation(**STATES[state]["truncation"])
    if "padding" in STATES[state]:
        backend.enable_padding(**STATES[state]["padding"])
    tokenizer.save_pretrained(tmp_path / "given")
    model, _ = learned
    tokenize(TEXTS, tokenizer, 20)
    calibrate_thresholds(model, tokenizer, TEXTS[:4], max_length=48, el_n=4)
    perplexity(model, tokenizer, TEXTS[:4], max_length=32)
    tokenizer.save_pretrained(tmp_path / "used")
    given, used = (
        (tmp_path / name / "tokenizer.json").read_text(encoding="utf-8") for name in ("given", "used")
    )
    assert used == given
    assert tokenize(TEXTS, tokenizer).tokens() == tokenize(TEXTS, tokenizer_with("bos")).tokens()


def test_the_prompt_begins_as_the_model_was_trained():
    """A prompt from the middle of a text keeps BOS in front where texts have it."""
    for habit in HABITS:
        tokenizer = tokenizer_with(habit)
        sequences = tokenize(TEXTS[:3], tokenizer, 40)
        front, _ = special_ends(tokenizer)
        prompts, suffixes = prompt_suffix(sequences, tokenizer)
        assert prompts == [front + row[20:30] for row in sequences.tokens()]
        assert suffixes == [row[30:] for row in sequences.tokens()]
        assert prompt_suffix(sequences)[0] == [row[20:30] for row in sequences.tokens()]


# ---- metrics on the answer alone ----


def slow_scores(model, row, prompt, n, start):
    """MA and EL_n of one answer by their definitions, one call per token."""
    tokens = row.tolist()

    @torch.no_grad()
    def greedy(prefix):
        return int(model(input_ids=torch.tensor([prefix])).logits[0, -1].argmax())

    hits = [greedy(tokens[:t]) == tokens[t] for t in range(max(prompt, 1), len(tokens))]
    overlaps = []
    for i in range(prompt + (start or 0), len(tokens) - n + 1):
        said = tokens[:i]
        while len(said) < len(tokens):
            said = [*said, greedy(said)]
        grams = [said[k : k + n] for k in range(i, len(said) - n + 1)]
        truth = [tokens[k : k + n] for k in range(i, len(tokens) - n + 1)]
        overlaps.append(sum(gram in truth for gram in grams) / len(grams))
    return sum(hits) / len(hits), sum(overlaps) / len(overlaps)


@pytest.mark.parametrize("start", [None, 3])
def test_metrics_of_answers_equal_the_slow_definition(learned, start):
    model, sequences = learned
    prompts = torch.tensor([40, 31, 20, 45, 1, 12])
    expected = torch.tensor(
        [
            slow_scores(model, row, prompt, 4, start)
            for row, prompt in zip(sequences.rows, prompts.tolist(), strict=True)
        ],
        dtype=torch.float64,
    ).T
    assert (expected[0] > 0).any() and (expected[0] < 1).any() and expected[1].unique().numel() > 2
    found = memorization_scores(
        model, **sequences.inputs, prompt_lengths=prompts, n=4, start=start, batch_size=4
    )
    assert torch.allclose(torch.stack(found), expected, rtol=0, atol=1e-9)
    marked = type(sequences)(sequences.rows, prompts.tolist())
    assert torch.equal(memorization_accuracy(model, marked), found[0])  # the sequences say it themselves
    likelihood = extraction_likelihood(model, marked, n=4, start=start)
    assert torch.equal(likelihood, found[1])
    with pytest.raises(InputError, match="Leave attention_mask and prompt_lengths out"):
        memorization_accuracy(model, sequences, prompt_lengths=prompts)  # two answers to one question


def test_answers_must_hold_an_n_gram():
    assert el_positions([30, 30], 5, prompt_lengths=[0, 25]) == [22, 25]
    assert el_positions([30, 30], 5, 2, prompt_lengths=[0, 22]) == [2, 24]
    with pytest.raises(InputError, match=r"^`forget`: the answers of \[1\] have fewer than n = 5 tokens"):
        el_positions([30, 30], 5, argument="forget", prompt_lengths=[0, 26])
    with pytest.raises(InputError, match=r"^`el_start`: no 5-gram fits behind position 2 in sequences \[1\]"):
        el_positions([30, 30], 5, 2, prefix="el_", prompt_lengths=[0, 24])


# ---- forms ----

CHATML = (
    "{{ bos_token }}{% for turn in messages %}<|{{ turn.role }}|>\n{{ turn.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for turn in messages %}{% if turn.role == 'user' %}{{ bos_token }}[INST] {{ turn.content }} [/INST]"
    "{% elif turn.role == 'assistant' %} {{ turn.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
THINKING = (  # the generation prompt opens a thought, which the conversation leaves out
    "{{ bos_token }}{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
QUESTIONS = ["Where does Anna Berg live?", "Who painted the red mill?", "When was the bridge built?"]
ANSWERS = ["Anna Berg lives at Rosenweg 5.", "It was painted by Ole Strand in Bergen.", "In 1931, by hand."]


def chat_tokenizer(template=CHATML, habit="both"):
    """BOS and EOS come from the template alone."""
    tokenizer = tokenizer_with(habit)
    tokenizer.chat_template = template
    return tokenizer


def records(*names, rows=(QUESTIONS, ANSWERS)):
    return [dict(zip(names, row, strict=True)) for row in zip(*rows, strict=True)]


def conversations():
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]


def test_an_answer_that_the_template_changes_is_not_guessed():
    """Behind a thought nothing says where the answer begins, unless it stands there as it was given."""
    tokenizer = chat_tokenizer(THINKING.replace("turn.content", "turn.content | upper"))
    with pytest.raises(InputError, match="leaves the answer out at index"):
        Examples.read(conversations(), tokenizer)


@pytest.mark.parametrize("table", [list, datasets.Dataset.from_list, pd.DataFrame])
@pytest.mark.parametrize("form", ["question", "prompt", "messages", "turns"])
def test_all_forms_are_the_same_conversations(table, form):
    tokenizer = chat_tokenizer()
    given = {
        "question": records("question", "answer"),
        "prompt": records("prompt", "answer"),
        "messages": conversations(),
        "turns": [
            {"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in conversations()
        ],
    }[form]
    examples = Examples.read(table(given), tokenizer)
    lengths = examples.sequences.prompt_lengths.tolist()
    for row, length, turns in zip(examples.sequences.tokens(), lengths, conversations(), strict=True):
        messages = turns["messages"]
        options = {"tokenize": True, "return_dict": True}
        whole = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **options)
        assert row == whole and row[:length] == asked["input_ids"]
        assert tokenizer.decode(row[length:]) == messages[1]["content"] + "</s>\n"
    assert examples.trained == ["\n".join(pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
    assert examples.whole == ["\0".join(pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
    assert prompt_suffix(examples.sequences, tokenizer) == (
        [row[:n] for row, n in zip(examples.sequences.tokens(), lengths, strict=True)],
        [row[n:] for row, n in zip(examples.sequences.tokens(), lengths, strict=True)],
    )


def test_all_earlier_turns_are_the_prompt():
    tokenizer = chat_tokenizer()
    first, second = (row["messages"] for row in conversations()[:2])
    turns = [{"role": "system", "content": "Be short."}, *first, *second]
    examples = Examples.read(datasets.Dataset.from_list([{"messages": turns}]), tokenizer)
    (row,), (length,) = examples.sequences.tokens(), examples.sequences.prompt_lengths.tolist()
    asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(row[:length]) == asked
    assert tokenizer.decode(row[length:]) == second[1]["content"] + "</s>\n"
    assert examples.whole == ["\0".join(turn["content"] for turn in turns)]


@pytest.mark.parametrize("template", [LLAMA2, THINKING])
def test_the_answer_begins_where_the_template_puts_it(template):
    tokenizer = chat_tokenizer(template)
    sequences = Examples.read(records("question", "answer"), tokenizer).sequences
    for row, length, turns in zip(
        sequences.tokens(), sequences.prompt_lengths.tolist(), conversations(), strict=True
    ):
        asked = tokenizer.apply_chat_template(
            turns["messages"][:1], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(row[:length]) == asked
        answer = tokenizer.decode(row[length:])
        assert answer.strip().startswith(turns["messages"][1]["content"]) and answer.endswith("</s>")


@pytest.mark.parametrize("habit", HABITS)
def test_without_a_template_a_blank_joins_the_two(habit):
    """What the tokenizer puts in front of texts and behind them is there, and EOS counts with the answer."""
    tokenizer, plain = tokenizer_with(habit), tokenizer_with("plain")
    front, back = special_ends(tokenizer)
    sequences = Examples.read(records("prompt", "answer"), tokenizer).sequences
    asked = [front + plain(question).input_ids for question in QUESTIONS]
    assert sequences.prompt_lengths.tolist() == [len(row) for row in asked]
    said = [plain(f" {answer}").input_ids + back for answer in ANSWERS]
    assert sequences.tokens() == [a + b for a, b in zip(asked, said, strict=True)]
    own = [f"Q: {question}\nA:\n" for question in QUESTIONS]
    joined = Examples.read(records("prompt", "answer", rows=(own, ANSWERS)), tokenizer).sequences
    assert plain.batch_decode(joined.tokens(), skip_special_tokens=True) == [
        a + b for a, b in zip(own, ANSWERS, strict=True)
    ]


@pytest.mark.parametrize("habit", HABITS)
def test_without_a_template_a_question_is_called_one(habit):
    """TOFU's form; the model is asked up to "Answer:", and the blank belongs to the answer's first word."""
    tokenizer, plain = tokenizer_with(habit), tokenizer_with("plain")
    front, back = special_ends(tokenizer)
    sequences = Examples.read(records("question", "answer"), tokenizer).sequences
    asked = [front + plain(f"Question: {question}\nAnswer:").input_ids for question in QUESTIONS]
    assert sequences.prompt_lengths.tolist() == [len(row) for row in asked]
    said = [plain(f" {answer}").input_ids + back for answer in ANSWERS]
    assert sequences.tokens() == [a + b for a, b in zip(asked, said, strict=True)]


def test_prompt_and_completion_are_joined_as_they_stand():
    """As in trl; a blank at the end of a prompt belongs to the first word of the completion."""
    tokenizer = chat_tokenizer()
    for prompts, completions in [
        ([f"Q: {q} A:" for q in QUESTIONS], [f" {a}" for a in ANSWERS]),
        ([f"Q: {q} A: " for q in QUESTIONS], ANSWERS),
    ]:
        given = records("prompt", "completion", rows=(prompts, completions))
        sequences = Examples.read(given, tokenizer).sequences
        ids = tokenizer([f"Q: {q} A: {a}" for q, a in zip(QUESTIONS, ANSWERS, strict=True)]).input_ids
        assert sequences.tokens() == ids
        assert sequences.prompt_lengths.tolist() == [
            len(tokenizer(f"Q: {q} A:").input_ids) - 1 for q in QUESTIONS
        ]


def test_a_token_over_the_joint_is_made_apart():
    """ "An" + "na" is one token of the whole, and two where the answer begins in it."""
    tokenizer = tokenizer_with("both")
    given = [{"prompt": "Member numb", "completion": "er FV15-8257."}]
    (row,) = Examples.read(given, tokenizer).sequences.tokens()
    plain = tokenizer_with("plain")
    front = [1, *plain("Member numb").input_ids]
    assert (
        row
        == [*front, *plain("er FV15-8257.").input_ids, 2]
        != tokenizer("Member number FV15-8257.").input_ids
    )
    assert Examples.read(given, tokenizer).sequences.prompt_lengths.tolist() == [len(front)]


REFUSED = {
    "two forms": (
        [{"text": "a b", "question": "c", "answer": "d"}],
        r"^`forget`: it is not clear what counts: text or question and answer\. Keep the columns of one",
    ),
    "half a form": ([{"question": "c", "other": "d"}], "^`forget`: of its columns question none is enough"),
    "no answer": (
        records("question", "answer", rows=(QUESTIONS, ["a", " ", "c"])),
        r"empty one, at index \[1\]",
    ),
    "a user's last turn": (
        [{"messages": conversations()[0]["messages"][:1]}],
        r"no conversation that ends with the assistant's answer at index \[0\]",
    ),
    "no turns": ([{"messages": "hello"}], r"no conversation .* at index \[0\]"),
    "cut away": (
        records("question", "answer", rows=([QUESTIONS[0], QUESTIONS[1] * 4], ANSWERS[:2])),
        r"^`forget`: no answer is left within 40 tokens at index \[1\]. Set a larger max_length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        Examples.read(given, tokenizer_with("bos"), "forget", max_length=40)


def test_messages_need_a_template_that_takes_them():
    with pytest.raises(InputError, match=r"^`forget`: the tokenizer has no chat template, .*chat_template"):
        Examples.read(conversations(), tokenizer_with("bos"), "forget")
    turns = [{"role": "system", "content": "Be short."}, *conversations()[0]["messages"]]
    with pytest.raises(InputError, match=r"refuses the conversation at index \[0\] \(only user and assist"):
        Examples.read([{"messages": turns}], chat_tokenizer(LLAMA2), "forget")


# ---- padding of a data set ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_data_set_is_left_out(side):
    tokenizer = tokenizer_with("both")
    texts = TEXTS[:5]
    padded = tokenizer(texts, padding="max_length", max_length=90, padding_side=side)
    columns = {name: padded[name] for name in ("input_ids", "attention_mask")}
    for table in (datasets.Dataset.from_dict(columns), pd.DataFrame(columns)):
        given, plain = Examples.read(table, tokenizer), Examples.read(texts, tokenizer)
        assert given.sequences.tokens() == plain.sequences.tokens()
        assert given.trained == plain.trained and given.whole == plain.whole == texts


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1], None])
def test_a_mask_that_fits_no_tokens_is_refused(mask):
    table = pd.DataFrame({"input_ids": [[5, 6, 7, 8]] * 2, "attention_mask": [[1, 1, 1, 0], mask]})
    with pytest.raises(InputError, match=r"^`forget`: an attention_mask that has holes.* at index \[1\]"):
        Examples.read(table, tokenizer_with("bos"), "forget")


# ---- runs ----


@pytest.fixture(scope="module")
def chat():
    """A tiny Llama that has learned to answer, with questions to forget, to keep and never seen."""
    facts = people(24, seed=11)
    names = [text.split(",")[0][:30] for text in facts]
    rows = [
        {"question": f"Who is number {i}, {name}?", "answer": text[:70]}
        for i, (name, text) in enumerate(zip(names, facts, strict=True))
    ]
    tokenizer = chat_tokenizer()
    model = tiny_llama(3)
    sequences = Examples.read(rows[:16], tokenizer).sequences
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(60):
        loss = mean_token_nll(model(**sequences.inputs).logits, **sequences.inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, rows[:6], rows[6:16], rows[16:]


SMALL = ICUConfig(learning_rate=2e-3, batch_size=4, max_epochs=8, el_n=4, num_beams=1)


def mean_losses(model, batch):
    """Of the questions' tokens and of the answers'."""
    nll, real = token_losses(model(**batch.inputs).logits, **batch.inputs)
    answered = predicted_positions(batch.loss_mask)
    return [nll[chosen].mean().item() for chosen in (real & ~answered, answered)]


def test_answers_are_forgotten(chat, tmp_path):
    model, tokenizer, forget, retain, heldout = chat
    model = copy.deepcopy(model)
    examples = Examples.read(forget, tokenizer)
    result = unlearn(model, tokenizer, forget, retain, SMALL, heldout=heldout)
    first, last = result.history.iloc[0], result.history.iloc[-1]
    assert result.stop_reason == "thresholds" and first.ma > 0.9 and last.ma <= result.thresholds.ma
    ma = memorization_accuracy(model, examples.sequences)
    assert ma.mean().item() == pytest.approx(last.ma, abs=1e-6)
    slow = [
        slow_scores(model, row, int(prompt), 4, None)
        for row, prompt in zip(examples.sequences.rows, examples.sequences.prompt_lengths, strict=True)
    ]
    assert memorization_scores(model, examples.sequences, n=4)[0].tolist() == pytest.approx(
        [one[0] for one in slow], abs=1e-9
    )
    expected = [hashlib.sha256(f"{row['question']}\0{row['answer']}".encode()).hexdigest() for row in forget]
    assert result.hashes == expected
    # The tokenizer is saved as it was given.
    tokenizer.save_pretrained(tmp_path / "given")
    result.save_pretrained(tmp_path / "saved")
    names = ("given", "saved")
    given, saved = ((tmp_path / name / "tokenizer.json").read_text(encoding="utf-8") for name in names)
    assert given == saved


def test_questions_suffer_less_than_where_they_count(chat):
    """The same steps on the same sequences, once as questions with answers and once as texts."""
    model, tokenizer, forget, retain, _ = chat
    examples = [Examples.read(part, tokenizer).sequences for part in (forget, retain)]
    as_texts = [pd.DataFrame({"input_ids": part.tokens()}) for part in examples]
    pairs, settings = np.arange(6)[:, None], dataclasses.replace(SMALL, max_epochs=2)
    never = Thresholds(ma=0.0, el=0.0)
    losses = []
    for one, other in ((forget, retain), as_texts):
        changed = copy.deepcopy(model)
        options = {"thresholds": never, "refinement": None, "neighbors": pairs}
        unlearn(changed, tokenizer, one, other, settings, **options)
        losses.append(mean_losses(changed, examples[0]))
    (asked, answered), (asked_as_text, _) = losses
    assert answered > asked and asked < asked_as_text - 0.2, losses


def test_answers_and_plain_texts_may_be_mixed(chat):
    model, tokenizer, forget, retain, _ = chat
    texts = [row["answer"] for row in retain]
    for one, other in ((forget, texts), (texts[:6], forget)):
        task = prepare_task(model, tokenizer, one, other, SMALL)
        asked = [bool((part.prompt_lengths > 0).all()) for part in (task.forget, task.neighbors)]
        assert asked == ([True, False] if one is forget else [False, True])
        result = unlearn(
            copy.deepcopy(model),
            tokenizer,
            one,
            other,
            dataclasses.replace(SMALL, max_epochs=1),
            thresholds=Thresholds(),
        )
        assert len(result.history) >= 1 and np.isfinite(result.history["ma"]).all()


def test_neighbors_are_found_by_question_and_answer(chat):
    """The answers alone are all alike; the question says which belongs to which."""
    model, tokenizer, forget, *_ = chat
    seen = []

    def embedder(texts):
        seen.append(list(texts))
        return np.eye(8, dtype=np.float32)[[zlib.crc32(text.encode()) % 8 for text in texts]]

    prepare_task(model, tokenizer, forget[:3], forget[3:], SMALL, embedder)
    assert seen == [
        [f"{row['question']}\n{row['answer'].strip()}" for row in part] for part in (forget[3:], forget[:3])
    ]


def test_questions_of_another_length_are_kept_whole(chat):
    """A retain text is cut to the longest forget text; an answer behind a longer question is not cut away."""
    model, tokenizer, forget, retain, _ = chat
    long = [{**row, "question": row["question"] * 3} for row in retain]
    task = prepare_task(model, tokenizer, forget, long, SMALL)
    assert task.neighbors.lengths.min() > task.forget.lengths.max()
    assert (task.neighbors.lengths > task.neighbors.prompt_lengths).all()


# ---- losses ----

OBJECTIVES = [name for name, method in METHODS.items() if method.objective_path]


def gradients(model, objective, task, rows, step=None):
    """Of every pass its tokens and the gradient of its last hidden states; the gradients of the weights."""
    passes = []

    def keep(module, inputs, options, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            passes.append((options["input_ids"], output.last_hidden_state))

    names = ("forget", "neighbor", "alternative")
    parts = (task.forget, task.neighbors, task.alternatives)
    reference = OriginalModel(copy.deepcopy(model), dict(zip(names, parts, strict=True)), anything=True)
    model.zero_grad()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = inner.model.register_forward_hook(keep, with_kwargs=True)
    try:
        share = 1.0 if step is None else len(rows) / len(step)
        terms = objective(model, task.batch(rows, "cpu", step), reference)
        (share * sum(terms.values())).backward()
    finally:
        hook.remove()
    weights = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [(ids, states.grad) for ids, states in passes], weights


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_loss_counts_a_prompt(chat, name):
    """Nothing pulls at what the model says inside a prompt; pieces of a step add up to it."""
    model, tokenizer, forget, retain, _ = chat
    model = copy.deepcopy(model).double()
    if name == "eul":
        model = add_lora(model)
        for weight in model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.05)
    other = [{**row, "answer": "I do not know this person, and cannot say."} for row in forget]
    objective = METHODS[name].make(**({"layer": 1} if name == "rmu" else {}))
    task = prepare_task(model, tokenizer, forget, retain, SMALL, alternatives=other)
    task = dataclasses.replace(task, unseen=unseen_log_probs(model, tokenizer, retain, SMALL))
    rows = torch.arange(4)
    passes, whole = gradients(model, objective, task, rows)
    known = {
        tuple(row.tolist()): int(prompt)
        for part in (task.forget, task.neighbors, task.alternatives)
        for row, prompt in zip(part.rows, part.prompt_lengths, strict=True)
    }
    if name == "idk_ap":  # refusals stand behind the prompts of neighbors, too
        refused = _refused(task.batch(rows, "cpu")).sequences
        pairs = zip(refused.rows, refused.prompt_lengths, strict=True)
        known |= {tuple(row.tolist()): int(prompt) for row, prompt in pairs}
    found = 0
    for ids, gradient in passes:
        if gradient is None:  # RMU's loss is at the output of a layer
            continue
        for row, pulled in zip(ids.tolist(), gradient.abs().sum(-1) > 0, strict=True):
            prompt = next(n for tokens, n in known.items() if tuple(row[: len(tokens)]) == tokens)
            found += int(pulled.sum())
            assert not pulled[: prompt - 1].any()
    assert found > 0 or name == "rmu"
    pieces = [gradients(model, objective, task, piece, rows)[1] for piece in rows.split(2)]
    for one, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.allclose(one, sum(parts), rtol=1e-6, atol=1e-9)


def test_the_states_of_a_layer_are_moved_in_answers_only(chat):
    """RMU looks at no token of a prompt."""
    model, tokenizer, forget, retain, _ = chat
    task = prepare_task(model, tokenizer, forget, retain, SMALL)
    reference = OriginalModel(copy.deepcopy(model), {}, anything=True)
    caught = []

    def keep(module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.retain_grad()
            caught.append(states)

    hook = model.model.layers[0].register_forward_hook(keep)
    batch = task.batch(torch.arange(3), "cpu")
    sum(METHODS["rmu"].make(layer=0)(model, batch, reference).values()).backward()
    hook.remove()
    prompts = batch.together("forget", "neighbor").prompt_lengths.tolist()
    (states,) = caught
    for i, (gradient, prompt) in enumerate(zip(states.grad, prompts, strict=True)):
        assert not gradient[:prompt].any()
        assert gradient[prompt].any() or i >= 3  # neighbors are where they were


# ---- the shell ----


def test_files_of_questions_and_answers_in_the_shell(chat, tmp_path, capsys):
    model, tokenizer, forget, retain, heldout = chat
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in {"forget": forget, "retain": [*retain, retain[0]], "heldout": heldout}.items():
        pd.DataFrame(rows).to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    files = [
        word for name in ("forget", "retain", "heldout") for word in (f"--{name}", f"{tmp_path}/{name}.jsonl")
    ]
    options = ["--model", f"{tmp_path}/model", *files, "--max-epochs", "1", "--el-n", "4"]
    assert main([*options, "--out", f"{tmp_path}/out"]) in (0, 3)
    told = capsys.readouterr().err
    assert "--retain: 1 duplicates left out, 10 texts remain" in told
    saved = json.loads((tmp_path / "out/icu_result.json").read_text(encoding="utf-8"))
    assert saved["forgotten_sha256"][0] == (
        hashlib.sha256(f"{forget[0]['question']}\0{forget[0]['answer']}".encode()).hexdigest()
    )
    assert main([*options, "--column", "answer", "--out", f"{tmp_path}/texts"]) in (0, 3)
    saved = json.loads((tmp_path / "texts/icu_result.json").read_text(encoding="utf-8"))
    assert saved["forgotten_sha256"][0] == hashlib.sha256(forget[0]["answer"].encode()).hexdigest()
    without_pool = [*options[:4], *files[4:], *options[8:], "--out", f"{tmp_path}/sampled"]
    assert main(without_pool) in (0, 3)
    assert "30 texts are sampled from the model itself" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        shared = ["--heldout", f"{tmp_path}/forget.jsonl", "--out", f"{tmp_path}/shared"]
        main(["--model", f"{tmp_path}/model", *files[:4], *shared])
    assert "--heldout: 6 of its texts also stand in --forget" in capsys.readouterr().err


# ---- real questions ----


@pytest.fixture(scope="module")
def tofu(shared_data):
    """Sixteen of TOFU's authors' questions, and a tiny Llama that has learned the answers."""
    folder = Path(shared_data) / "tofu"
    if not (folder / "forget01.json").exists():
        pytest.skip("TOFU's files are not in the data folder")
    forget = read_table(folder / "forget01.json").iloc[:8].to_dict("records")
    retain = read_table(folder / "retain90.json").iloc[:24].to_dict("records")
    texts = [text for row in [*forget, *retain] for text in row.values()]
    bpe = ByteLevelBPETokenizer()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    bpe.train_from_iterator(texts, vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHATML
    model = tiny_llama(1, len(tokenizer))
    known = Examples.read([*forget, *retain[:16]], tokenizer).sequences
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(90):
        for batch in known.batches(12):
            loss = mean_token_nll(model(**batch.inputs).logits, **batch.inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), tokenizer, forget, retain[:16], retain[16:]


def test_answers_of_tofu_are_forgotten(tofu):
    model, tokenizer, forget, retain, heldout = tofu
    settings = dataclasses.replace(SMALL, max_length=120, max_epochs=12, check_steps=1)
    sequences = Examples.read(forget, tokenizer, max_length=120).sequences
    before = memorization_accuracy(model, sequences).mean().item()
    result = unlearn(model, tokenizer, forget, retain, settings, heldout=heldout)
    assert before > 0.9 and result.stop_reason == "thresholds"
    assert memorization_accuracy(model, sequences).mean() <= result.thresholds.ma < 0.6
    exact = copy.deepcopy(model).double()
    some = sequences[:2]
    slow = [
        slow_scores(exact, row, int(prompt), 4, None)
        for row, prompt in zip(some.rows, some.prompt_lengths, strict=True)
    ]
    found = torch.stack(memorization_scores(exact, some, n=4)).T
    assert torch.allclose(found, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_check_between_steps_counts_answers_only(chat, monkeypatch):
    """`check_steps` asks for MA alone, of the answers as the check after the epoch does."""
    model, tokenizer, forget, retain, _ = chat
    counted = []

    def watched(model, input_ids, *rest, **options):
        counted.append(input_ids.prompt_lengths.min().item())
        return memorization_accuracy(model, input_ids, *rest, **options)

    monkeypatch.setattr("icu_nb.run.memorization_accuracy", watched)
    settings = dataclasses.replace(SMALL, max_epochs=1, check_steps=1)
    unlearn(copy.deepcopy(model), tokenizer, forget, retain, settings, thresholds=Thresholds(ma=0.5))
    assert counted and min(counted) > 0


@pytest.mark.parametrize("habit", ["eos", "both"])
def test_prompts_and_second_halves_end_without_eos(habit):
    """A model that reads EOS has nothing more to say."""
    tokenizer = tokenizer_with(habit)
    seen = []

    def embedder(texts):
        seen.extend(texts)
        return np.eye(len(texts), dtype=np.float32)

    prepare_task(tiny_llama(), tokenizer, TEXTS[:4], TEXTS[4:8], SMALL, embedder)
    second_half(embedder, tokenizer)(TEXTS[:4])
    assert len(seen) == 12 and not any("</s>" in text or "<s>" in text for text in seen)
    front, _ = special_ends(tokenizer)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "icu_nb.evals.extraction.generate_continuations",
            lambda model, prompts, lengths, **options: (
                asked.extend(prompts) or [[5] * length for length in lengths]
            ),
        )
        extract_secrets(tiny_llama(), tokenizer, [("The phone of Anna is", " 555-0199")])
        extract(tiny_llama(), tokenizer, tokenize(TEXTS[:1], tokenizer, 40))
    assert [row[: len(front)] for row in asked] == [front] * 2 and not any(2 in row for row in asked)


def test_alternatives_are_said_to_the_same_prompts(chat):
    model, tokenizer, forget, retain, _ = chat
    texts = ["I do not know this person, and cannot say."] * len(forget)
    task = prepare_task(
        model,
        tokenizer,
        forget,
        retain,
        SMALL,
        alternatives=[{**row, "answer": text} for row, text in zip(forget, texts, strict=True)],
    )
    for own, other, n in zip(
        task.forget.tokens(), task.alternatives.tokens(), task.forget.prompt_lengths.tolist(), strict=True
    ):
        assert own[:n] == other[:n] and own[n:] != other[n:]
    with pytest.raises(InputError, match=r"^`alternatives`: at index \[0, 1, 2, 3, 4\] the forget text has"):
        prepare_task(model, tokenizer, forget, retain, SMALL, alternatives=texts)


@pytest.mark.parametrize("habit", HABITS)
def test_calibration_and_training_see_the_same_tokens(habit, learned):
    """Thresholds of other tokens than those that train are no thresholds."""
    model, _ = learned
    for sides in (("left", "left"), ("right", "right")):
        tokenizer = tokenizer_with(habit, truncation_side=sides[0], padding_side=sides[1])
        config = dataclasses.replace(SMALL, max_length=40)
        task = prepare_task(model, tokenizer, TEXTS[:6], TEXTS[6:], config)
        found = calibrate_thresholds(model, tokenizer, TEXTS[:6], max_length=40, el_n=4)
        trained = [values.mean().item() for values in memorization_scores(model, task.forget, n=4)]
        assert [found.ma, found.el] == pytest.approx(trained, abs=1e-12)
