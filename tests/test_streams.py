"""Which neighbors a step gets: the nearest ones, these in turn, or random ones."""

from itertools import chain

import numpy as np
import pytest
import torch
from test_unlearn import NEVER, Spy

from icu_nb.config import ICUConfig
from icu_nb.errors import InputError
from icu_nb.pairs import prepare_task
from icu_nb.unlearn import unlearn


def stream(tiny, neighbors, forget=None, retain=None, **options):
    """The neighbors of every step, as texts, and the run."""
    spy = Spy()
    settings = {"max_epochs": 4, "n_neighbors": 2, **options}
    result = unlearn(
        tiny.copy(),
        tiny.tokenizer,
        forget or tiny.forget,
        retain or tiny.retain,
        tiny.config(neighbors=neighbors, **settings),
        thresholds=NEVER,
        objective=spy,
        refinement=None,
    )
    decode = tiny.tokenizer.batch_decode
    return [decode(list(batch.neighbor.sequences.rows)) for batch in spy.batches], spy, result


def test_one_of_the_nearest_in_each_epoch(tiny):
    nearest, spy, _ = stream(tiny, "nearest")
    turns, same, result = stream(tiny, "rotate")
    assert spy.rows == same.rows and result.pairs.shape == (len(tiny.forget), 2)
    steps = len(turns) // 4
    for number, (all_of_step, one_of_step) in enumerate(zip(nearest, turns, strict=True)):
        assert one_of_step == all_of_step[(number // steps) % 2 :: 2]


def test_random_texts_of_the_pool_at_every_step(tiny):
    drawn, spy, result = stream(tiny, "redraw")
    again, _, _ = stream(tiny, "redraw")
    other, _, _ = stream(tiny, "redraw", seed=1)
    assert drawn == again != other and drawn[0] != drawn[1]
    assert result.pairs.shape == (len(tiny.forget), 0)
    for texts, batch in zip(drawn, spy.batches, strict=True):
        assert len(texts) == 2 * len(batch.forget.rows)
    seen = {text for texts in drawn for text in texts}
    assert len(seen) > 2 * len(tiny.forget)  # more than fixed neighbors could be


def test_nothing_is_embedded_for_random_texts(tiny, monkeypatch):
    def embed(*_):
        raise AssertionError

    monkeypatch.setattr("icu_nb.pairs.model_embedder", embed)
    config = tiny.config(neighbors="redraw")
    texts = tiny.model, tiny.tokenizer, tiny.forget, tiny.retain
    assert len(prepare_task(*texts, config).neighbors) == len(tiny.retain)
    with pytest.raises(InputError, match="`embedder`: with redraw no neighbors are looked for"):
        prepare_task(*texts, config, embed)


def test_near_duplicates_are_never_drawn(tiny):
    copies = [f"X{text[1:]}" for text in tiny.forget]
    config = tiny.config(neighbors="redraw")
    task = prepare_task(tiny.model, tiny.tokenizer, tiny.forget, [*copies, *tiny.retain], config)
    assert len(task.neighbors) == len(tiny.retain)
    with pytest.raises(InputError, match="`retain`: no text is left"):
        prepare_task(tiny.model, tiny.tokenizer, tiny.forget, copies, config)


@pytest.mark.parametrize("neighbors", ["rotate", "redraw"])
def test_pieces_of_a_step_get_the_neighbors_of_the_step(tiny, neighbors):
    whole, _, one = stream(tiny, neighbors, learning_rate=1e-4)
    pieces, _, other = stream(tiny, neighbors, learning_rate=1e-4, micro_batch_size=1)
    assert [*chain(*pieces)] == [*chain(*whole)]
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("neighbors", ["rotate", "redraw"])
def test_a_resumed_run_gets_the_same(tiny, neighbors, tmp_path):
    def run(folder, epochs, **options):
        config = tiny.config(neighbors=neighbors, n_neighbors=3, max_epochs=epochs)
        texts = tiny.forget, tiny.retain
        given = {"thresholds": NEVER, "checkpoint_dir": folder, **options}
        return unlearn(tiny.copy(), tiny.tokenizer, *texts, config, **given).model

    whole = run(None, 4)
    run(tmp_path, 2)
    assert tiny.same(run(tmp_path, 4, resume_from_checkpoint=True), tiny.weights(whole))


def test_bad_streams_are_refused(tiny):
    with pytest.raises(InputError, match="`neighbors`: 'random' is not known"):
        ICUConfig(neighbors="random")
    config = tiny.config(neighbors="redraw")
    texts = tiny.model, tiny.tokenizer, tiny.forget, tiny.retain
    with pytest.raises(InputError, match="`neighbors`: with redraw there are no ready ones"):
        prepare_task(*texts, config, neighbors=np.zeros((len(tiny.forget), 1), dtype=int))
    with pytest.raises(InputError, match="is a setting: ICUConfig"):
        prepare_task(*texts, tiny.config(), neighbors="redraw")
