"""A pretrained model learns texts, and stays itself on general text."""

import pytest
import torch

from icu_nb.data.people import people_corpus
from icu_nb.errors import InputError
from icu_nb.metrics import memorization_accuracy
from icu_nb.models.tiny import memorize, tiny_gpt_neo, train_tokenizer
from icu_nb.teaching import _chat_start, _draws, teach
from icu_nb.text import tokenize

CORPUS = people_corpus(4, 8, seed=3)
TOKENIZER = train_tokenizer(CORPUS.trained_on(), 600)
RECIPE = {"repeats": 3, "epochs": 3, "learning_rate": 4e-3, "max_length": 48, "cache": False}


@pytest.fixture(scope="module")
def pretrained():
    "A model that knows general text and no people."
    model = tiny_gpt_neo(len(TOKENIZER), max_length=64, n_layers=2, hidden_size=64, n_heads=2)
    memorize(model, TOKENIZER, [], CORPUS.general_train[:60], epochs=12, max_length=48, cache=False)
    return model


def copy_of(model):
    copied = tiny_gpt_neo(len(TOKENIZER), max_length=64, n_layers=2, hidden_size=64, n_heads=2)
    copied.load_state_dict(model.state_dict())
    return copied


def general_kl(model, pretrained):
    "Divergence from the pretrained model on general texts that were trained on, nats per token."
    texts = tokenize(CORPUS.general_train[:16], TOKENIZER, 48)
    mask = texts.attention_mask[:, 1:].bool()
    with torch.no_grad():
        p, q = (m(**texts.inputs).logits[:, :-1].log_softmax(-1)[mask] for m in (pretrained, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def accuracy(model, texts):
    return memorization_accuracy(model, tokenize(texts, TOKENIZER, 48)).mean().item()


def test_texts_are_memorized_and_general_text_is_kept(pretrained):
    taught, plain = copy_of(pretrained), copy_of(pretrained)
    recipe = {**RECIPE, "repeats": 10, "epochs": 12}
    history = teach(taught, TOKENIZER, CORPUS.forget, CORPUS.retain, CORPUS.general_train[:16], **recipe)
    memorize(plain, TOKENIZER, CORPUS.forget, CORPUS.retain, late_starts=False, **recipe)
    assert accuracy(taught, CORPUS.forget) > accuracy(pretrained, CORPUS.forget) + 0.3
    assert accuracy(taught, CORPUS.forget) > accuracy(taught, CORPUS.heldout) + 0.2
    assert general_kl(taught, pretrained) < 0.5 * general_kl(plain, pretrained)
    assert list(history.columns) == ["epoch", "loss", "kl"] and list(history.epoch) == list(range(1, 13))
    assert history.loss.iloc[-1] < history.loss.iloc[0] and (history.kl >= 0).all()


def test_the_same_seed_gives_the_same_model_and_draws_no_numbers_of_others(pretrained):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(copy_of(pretrained))
        torch.manual_seed(7)
        teach(models[-1], TOKENIZER, CORPUS.forget, [], CORPUS.general_train[:4], **{**RECIPE, "epochs": 1})
        drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    first, second = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in models)
    assert torch.equal(first, second)


def test_what_was_taught_comes_from_the_cache(pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("ICU_NB_CACHE", str(tmp_path))
    recipe = {**RECIPE, "epochs": 1, "cache": True}
    calls = []

    def teach_a_copy(**changes):
        model = copy_of(pretrained)
        texts = (CORPUS.forget, CORPUS.retain, CORPUS.general_train[:4])
        history = teach(
            model, TOKENIZER, *texts, **{**recipe, **changes}, callback=lambda *args: calls.append(1)
        )
        return torch.nn.utils.parameters_to_vector(model.parameters()), history

    (first, history), (again, same) = teach_a_copy(), teach_a_copy()
    assert len(calls) == 1 and torch.equal(first, again) and same.equals(history)
    teach_a_copy(seed=1)
    teach_a_copy(learning_rate=1e-3)
    assert len(calls) == 3


def test_answers_alone_count(pretrained):
    "With the prompt in the loss, the prompt's tokens would be learned, too."
    rows = [{"question": text[:30], "answer": "yes indeed it is so"} for text in CORPUS.retain]
    taught = copy_of(pretrained)
    teach(taught, TOKENIZER, rows, [], CORPUS.general_train[:8], **RECIPE)

    def loss(model, prompts):
        ids = tokenize([row["question"] for row in rows], TOKENIZER, 48)
        with torch.no_grad():
            logits = model(**ids.inputs).logits[:, :-1].log_softmax(-1)
        mask = ids.attention_mask[:, 1:].bool()
        return -logits.gather(-1, ids.input_ids[:, 1:, None])[..., 0][mask].mean().item()

    assert loss(taught, rows) > 0.8 * loss(pretrained, rows)


def test_every_general_text_is_drawn_equally_often():
    drawn = _draws(5, torch.Generator().manual_seed(0))
    for _ in range(4):
        assert sorted(next(drawn) for _ in range(5)) == [0, 1, 2, 3, 4]


def test_the_model_writes_after_the_beginning_of_a_users_turn():
    tokenizer = train_tokenizer(CORPUS.trained_on(), 600)
    assert _chat_start(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    )
    assert tokenizer.decode(_chat_start(tokenizer)) == "<user>"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([], [], ["some text"]), "`texts`: there is nothing to train on"),
        ((["some text"], [], []), "`general`: there is no text"),
        (([1], [], ["some text"]), "`texts`"),
    ],
)
def test_bad_input_changes_nothing(pretrained, lists, message):
    before = torch.nn.utils.parameters_to_vector(pretrained.parameters()).clone()
    with pytest.raises(InputError, match=message):
        teach(pretrained, TOKENIZER, *lists, **RECIPE)
    assert torch.equal(before, torch.nn.utils.parameters_to_vector(pretrained.parameters()))
