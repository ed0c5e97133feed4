"""ICU+: how likely tokens are in texts never seen, and a push that ends there."""

from collections import Counter, defaultdict

import pytest
import torch
from test_unlearn import NEVER

from icu_nb.batch import Batch, Part
from icu_nb.config import ICUConfig
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.methods.registry import get_method
from icu_nb.metrics import memorization_accuracy
from icu_nb.objective import ICU, GradientAscent, ICUPlus
from icu_nb.pairs import unseen_log_probs
from icu_nb.reference import OriginalModel
from icu_nb.text import pad
from icu_nb.unlearn import unlearn


def start(tiny, model=None, objective=None, **options):
    settings = {"thresholds": NEVER, "heldout": tiny.heldout, "refinement": None, **options}
    config = settings.pop("config", tiny.config())
    texts = (tiny.forget, tiny.retain)
    return unlearn(
        model or tiny.copy(), tiny.tokenizer, *texts, config, objective=objective or ICUPlus(), **settings
    )


# ---- how likely tokens are in texts never seen ----


def test_the_mean_over_all_places_of_a_token(tiny):
    """One text at a time and with dictionaries: no padding, no batch."""
    model, found = tiny.model.double(), defaultdict(list)
    try:
        for row in tiny.tokenizer(tiny.heldout)["input_ids"]:
            row = row[:48]
            with torch.no_grad():
                log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
            for place, token in enumerate(row[1:]):
                found[token].append(log_p[place, token].item())
        unseen = unseen_log_probs(model, tiny.tokenizer, tiny.heldout, tiny.config())
    finally:
        tiny.model.float()
    means = [sum(values) / len(values) for values in found.values()]
    prior = sum(means) / len(means)
    wanted = torch.full((len(tiny.tokenizer),), prior)
    for token, values in found.items():
        wanted[token] = (sum(values) + prior) / (len(values) + 1)
    torch.testing.assert_close(unseen, wanted, rtol=1e-5, atol=1e-5)
    counts = Counter(len(values) for values in found.values())
    assert counts[1] and max(counts) > 4  # rare tokens and frequent ones


def test_batches_and_prompts_do_not_matter(tiny):
    config = tiny.config(eval_batch_size=2)
    other = unseen_log_probs(tiny.model, tiny.tokenizer, tiny.heldout, config)
    whole = unseen_log_probs(tiny.model, tiny.tokenizer, tiny.heldout, tiny.config())
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)
    rows = [{"prompt": text[:30], "answer": text[30:60]} for text in tiny.heldout]
    answers = unseen_log_probs(tiny.model, tiny.tokenizer, rows, tiny.config())
    assert not torch.allclose(answers, whole, atol=0.01)


# ---- the push ----


class Table(torch.nn.Module):
    """Logits of what follows token x stand in row x."""

    def __init__(self, table):
        super().__init__()
        self.table, self.device = torch.nn.Parameter(table), table.device

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return type("Output", (), {"logits": self.table[input_ids]})


def pull(log_p, unseen):
    """How the loss of one token changes with its logit."""
    others = torch.log1p(-torch.tensor(log_p).exp()) - torch.log(torch.tensor(3.0))
    model = Table(torch.stack([others, torch.tensor(log_p), others, others]).repeat(4, 1).double())
    part = Part(torch.tensor([0]), pad([[0, 1]]))
    batch = Batch(part, part, unseen=torch.full((4,), unseen).double())
    reference = OriginalModel(model, {"neighbor": part.sequences})
    ICUPlus()(model, batch, reference)["l_fgt"].backward()
    return model.table.grad[0, 1].item()


def test_a_token_is_pushed_down_to_its_place_and_no_further():
    p = 0.5
    log_p = torch.log(torch.tensor(p)).item()
    assert pull(log_p, log_p - 3) == pytest.approx(1 - p)  # as in KUI
    assert pull(log_p, log_p - 0.5) == pytest.approx(0.5 * (1 - p))
    assert pull(log_p, log_p + 1e-3) == pull(log_p, log_p + 3) == 0


def test_forgetting_stays_where_unseen_texts_are(tiny):
    """ICU goes on as long as it may; ICU+ comes to rest."""
    config = tiny.config(max_epochs=40, learning_rate=2e-3, n_neighbors=2)
    limit = memorization_accuracy(
        tiny.model, pad(tiny.tokenizer(tiny.heldout)["input_ids"]).input_ids[:, :48]
    ).mean()
    left = {}
    for objective in (ICU(), ICUPlus()):
        result = start(tiny, objective=objective, config=config)
        left[type(objective)] = result.history.ma.iloc[-1]
    assert left[ICU] < 0.6 * limit < left[ICUPlus] < 1.5 * limit


# ---- in the loop ----


def test_without_heldout_nothing_begins(tiny):
    model = tiny.copy()
    with pytest.raises(InputError, match=r"`heldout`: ICU\+ asks how likely"):
        start(tiny, model, heldout=None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny.model.parameters(), strict=True))


def test_given_thresholds_go_before_those_of_heldout(tiny):
    mine = Thresholds(ma=0.7, el=1.0)
    assert start(tiny, thresholds=mine).thresholds == mine
    assert start(tiny, thresholds=None).thresholds.ma < 0.7


def test_a_resumed_run_goes_the_same_way(tiny, tmp_path):
    whole = start(tiny, config=tiny.config(max_epochs=4))
    start(tiny, checkpoint_dir=tmp_path)
    resumed = start(
        tiny, config=tiny.config(max_epochs=4), checkpoint_dir=tmp_path, resume_from_checkpoint=True
    )
    assert resumed.history.loss.tolist()[1:] == whole.history.loss.tolist()[1:]
    with pytest.raises(Exception, match="objective"):
        start(tiny, objective=ICUPlus(beta=2.0), checkpoint_dir=tmp_path, resume_from_checkpoint=True)


def test_it_stands_in_the_registry():
    method = get_method("icu_plus")
    assert method.make(beta=2.0) == ICUPlus(beta=2.0) and method.make() == ICUPlus()
    assert method.label == "ICU+" and method.neighbors == "redraw" and method.refinement == "icu"


# ---- the default ----


def by_default(tiny, **options):
    """What a run with one epoch and nothing chosen is made of."""
    settings = {"max_length": 48, "max_epochs": 1, **options.pop("settings", {})}
    texts = (tiny.forget, tiny.retain)
    result = unlearn(tiny.copy(), tiny.tokenizer, *texts, ICUConfig(**settings), thresholds=NEVER, **options)
    found = result.config
    objective = result.plugs["objective"].split("(")[0]
    return objective, found.learning_rate, found.neighbors, found.n_neighbors, found.bounded


@pytest.mark.filterwarnings("ignore:Neither")
def test_with_heldout_texts_it_is_the_default(tiny):
    assert by_default(tiny, heldout=tiny.heldout) == ("ICUPlus", 1e-3, "redraw", 2, True)
    assert by_default(tiny) == ("ICU", 5e-6, "nearest", 1, False)


def test_what_is_chosen_stays(tiny):
    chosen = {"learning_rate": 2e-4, "neighbors": "rotate", "n_neighbors": 3}
    assert by_default(tiny, heldout=tiny.heldout, settings=chosen) == ("ICUPlus", 2e-4, "rotate", 3, True)
    papers = {"bounded": False}
    assert by_default(tiny, heldout=tiny.heldout, settings=papers) == ("ICU", 5e-6, "nearest", 1, False)
    own = by_default(tiny, heldout=tiny.heldout, objective=GradientAscent())
    assert own == ("GradientAscent", 5e-6, "nearest", 1, False)
    pairs = [[i, i + 1] for i in range(len(tiny.forget))]
    ready = by_default(tiny, heldout=tiny.heldout, neighbors=pairs)
    assert ready == ("ICUPlus", 1e-3, "nearest", 1, True)


def test_an_embedder_asks_for_the_nearest(tiny):
    def embed(texts):
        return torch.eye(len(texts), 8).numpy()

    found = by_default(tiny, heldout=tiny.heldout, embedder=embed)
    assert found == ("ICUPlus", 1e-3, "nearest", 1, True)


def test_settings_and_objective_must_not_contradict_each_other(tiny):
    for bounded, objective in ((True, ICU()), (False, ICUPlus())):
        with pytest.raises(InputError, match="`bounded`"):
            by_default(tiny, heldout=tiny.heldout, objective=objective, settings={"bounded": bounded})


def test_it_needs_heldout_texts_where_it_is_asked_for(tiny):
    with pytest.raises(InputError, match="`heldout`"):
        by_default(tiny, settings={"bounded": True})
    with pytest.raises(InputError, match="`bounded`"):
        ICUConfig(bounded="yes")


def test_the_learning_rate_goes_by_the_models_size():
    def rate(weights, **options):
        return ICUConfig().complete(True, False, weights, **options).learning_rate

    sizes = (10**6, 135 * 10**6, 7 * 10**9)
    assert [rate(size) for size in sizes] == sorted(map(rate, sizes), reverse=True)
    assert rate(10**6) == 1e-3 and rate(7 * 10**9) == ICUConfig.paper().learning_rate
    assert rate(135 * 10**6, adapter=True) == 5 * rate(135 * 10**6)
