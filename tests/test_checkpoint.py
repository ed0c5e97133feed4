"""A run that is killed, at whatever moment, goes on as if nothing had happened.

What cannot be resumed is refused, and nothing good is lost.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from tqdm.auto import tqdm

import icu_nb.checkpoint
from icu_nb.checkpoint import Checkpoints, _CheckpointError
from icu_nb.config import ICUConfig
from icu_nb.errors import InputError
from icu_nb.iur import Thresholds
from icu_nb.objective import GradientAscent, Objective
from icu_nb.unlearn import unlearn

NEVER = Thresholds(ma=0.0, el=0.0)
EPOCHS = 5


def run(tiny, folder=None, model=None, **options):
    settings = {name: options.pop(name) for name in list(options) if name in ICUConfig.__dataclass_fields__}
    config = tiny.config(**{"max_epochs": EPOCHS, **settings})
    given = {"thresholds": NEVER, "checkpoint_dir": folder, **options}
    return unlearn(model or tiny.copy(), tiny.tokenizer, tiny.forget, tiny.retain, config, **given)


def but_seconds(table):
    return table.drop(columns=["seconds_train", "seconds_check"], errors="ignore")


def assert_same_run(result, other):
    for table in ("history", "samples"):
        pd.testing.assert_frame_equal(
            *(but_seconds(getattr(one, table)) for one in (result, other)), check_exact=True
        )
    assert result.stop_reason == other.stop_reason
    for a, b in zip(result.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(tiny):
    return run(tiny)


# ---- killed ----


def in_child(tiny, folder, before):
    """A run in a process of its own, which may not come back; True if it did."""

    def child():
        tqdm.set_lock(
            threading.RLock()
        )  # its default is shared with this process, and whoever is killed does not give it back
        torch.set_num_threads(1)
        before()
        run(tiny, folder, resume_from_checkpoint=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_epochs(folder, wanted, process):
    """Wait until a checkpoint of this epoch is there."""
    while process.is_alive() and not (folder / f"epoch-{wanted:05}").exists():
        time.sleep(0.001)


MOMENTS = [pytest.param(seed, marks=[] if seed < 3 else pytest.mark.slow) for seed in range(14)]


@pytest.mark.parametrize("seed", MOMENTS)
def test_killed_at_a_random_moment(tiny, tmp_path, undisturbed, seed):
    draw = random.Random(seed)
    for _ in range(2):  # the resumed run is killed, too
        process = in_child(tiny, tmp_path / "run", lambda: None)
        start_epochs(tmp_path / "run", draw.randint(1, EPOCHS - 1), process)
        time.sleep(draw.random() * undisturbed.history[["seconds_train", "seconds_check"]].sum(axis=1).mean())
        process.kill()
        process.join()
    assert_same_run(run(tiny, tmp_path / "run", resume_from_checkpoint=True), undisturbed)
    assert not list((tmp_path / "run").glob(".*"))


WRITES = [
    pytest.param(epoch, share, marks=[] if (epoch, share) in [(1, 0.0), (3, 0.5)] else pytest.mark.slow)
    for epoch, share in [(1, 0.0), (1, 0.5), (2, 0.9), (3, 0.5), (4, 0.1), (5, 0.99)]
]


@pytest.mark.parametrize("epoch, share", WRITES)
def test_killed_in_the_middle_of_a_write(tiny, tmp_path, undisturbed, epoch, share):
    """The checkpoint of this epoch is cut off when this share of its bytes is on disk."""
    whole = torch.save

    def die_half_way(state, path):
        whole(state, path)
        if state["epoch"] == epoch:
            os.truncate(path, int(share * path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    process = in_child(tiny, tmp_path / "run", lambda: setattr(torch, "save", die_half_way))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "run").glob("epoch-*")] == [f"epoch-{epoch - 1:05}"][
        : epoch - 1
    ] or epoch > 2
    assert list((tmp_path / "run").glob(".epoch-*"))
    assert_same_run(run(tiny, tmp_path / "run", resume_from_checkpoint=True), undisturbed)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tiny, tmp_path, undisturbed):
    """Killed at random moments until twenty kills have hit; every run that ends is the undisturbed one."""
    draw = random.Random(0)
    kills = ended = 0
    while kills < 20:
        folder = tmp_path / f"run {ended}"
        process = in_child(tiny, folder, lambda: None)
        process.join(draw.random() * 2 * undisturbed.history["seconds_check"].sum())
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:
            assert_same_run(run(tiny, folder, resume_from_checkpoint=True), undisturbed)
            ended += 1
    assert_same_run(run(tiny, tmp_path / f"run {ended}", resume_from_checkpoint=True), undisturbed)


# ---- resumed ----


def test_the_last_two_are_kept_and_a_finished_run_stays_finished(tiny, tmp_path, undisturbed):
    assert_same_run(run(tiny, tmp_path), undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-00004", "epoch-00005"]
    again = run(tiny, tmp_path, resume_from_checkpoint=True)
    assert_same_run(again, undisturbed)
    pd.testing.assert_frame_equal(
        again.history, run(tiny, tmp_path, resume_from_checkpoint=True).history
    )  # seconds too: nothing was done again


def test_resumes_from_a_path(tiny, tmp_path, undisturbed):
    run(tiny, tmp_path)
    shutil.rmtree(tmp_path / "epoch-00005")
    assert_same_run(run(tiny, None, resume_from_checkpoint=tmp_path / "epoch-00004"), undisturbed)
    assert (tmp_path / "epoch-00005").exists()


def test_going_on_from_an_earlier_one_leaves_no_later_one(tiny, tmp_path, undisturbed):
    run(tiny, tmp_path / "run", max_epochs=3)
    shutil.copytree(tmp_path / "run" / "epoch-00002", tmp_path / "epoch-00002")
    run(tiny, tmp_path / "run", resume_from_checkpoint=True)
    shutil.move(tmp_path / "epoch-00002", tmp_path / "run" / "epoch-00002")
    early = tmp_path / "run" / "epoch-00002"
    run(tiny, None, max_epochs=3, resume_from_checkpoint=early)
    assert names(tmp_path / "run") == ["epoch-00002", "epoch-00003"]
    assert_same_run(run(tiny, tmp_path / "run", resume_from_checkpoint=True), undisturbed)


HOW = [
    {"max_epochs": EPOCHS},
    {"eval_batch_size": 3},
    {"micro_batch_size": 2},
    {"gradient_checkpointing": True},
    {"checkpoint_every": 3},
]


@pytest.mark.parametrize("changes", HOW, ids=str)
def test_how_it_learns_may_change(tiny, tmp_path, undisturbed, changes):
    """What one changes after memory ran out, or where a run was too short."""
    run(tiny, tmp_path, max_epochs=3)
    resumed = run(tiny, tmp_path, resume_from_checkpoint=True, **changes)
    assert resumed.history.epoch.max() == EPOCHS and resumed.stop_reason == "max_epochs"
    if "micro_batch_size" in changes:  # its gradients are sums in another order
        for a, b in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    else:
        assert_same_run(resumed, undisturbed)


def test_thresholds_may_be_rounded_otherwise(tiny, tmp_path):
    """Measured again on held-out texts, in other batches; the run keeps the ones that it began with."""
    began = Thresholds(ma=0.3, el=0.1)
    run(tiny, tmp_path, thresholds=began, max_epochs=1)
    now = replace(began, ma=0.301)
    resumed = run(tiny, tmp_path, thresholds=now, max_epochs=2, resume_from_checkpoint=True)
    assert resumed.thresholds == began and resumed.history.epoch.max() == 2
    for other in (replace(began, ma=0.31), replace(began, bleu=0.011)):
        with pytest.raises(_CheckpointError, match=r"another run: (ma|bleu) was"):
            run(tiny, tmp_path, thresholds=other, resume_from_checkpoint=True)


def test_a_drawn_sample_is_drawn_again(tiny, tmp_path):
    """A staged check measures EL of a random sample: a resumed run draws the same."""
    settings = {"check": "staged", "check_sample": 3, "thresholds": Thresholds(ma=1.0, el=0.0)}
    whole = run(tiny, **settings)
    assert "sample of 3" in set(whole.history["check"])
    run(tiny, tmp_path, **settings)
    shutil.rmtree(tmp_path / "epoch-00005")
    assert_same_run(run(tiny, tmp_path, resume_from_checkpoint=True, **settings), whole)


def test_fewer_epochs_than_there_were_end_at_once(tiny, tmp_path):
    whole = run(tiny, tmp_path)
    resumed = run(tiny, tmp_path, max_epochs=3, resume_from_checkpoint=True)
    assert resumed.stop_reason == "max_epochs" and resumed.history.epoch.max() == EPOCHS
    assert tiny.same(resumed.model, tiny.weights(whole.model))


def test_every_other_epoch_and_the_last(tiny, tmp_path, undisturbed):
    seen = []

    def look(model, row):
        seen.append(names(tmp_path))

    assert_same_run(run(tiny, tmp_path, checkpoint_every=2, callback=look), undisturbed)
    # A callback comes before the checkpoint of its own epoch.
    assert seen == [[], [], [], ["epoch-00002"], ["epoch-00002"], ["epoch-00002", "epoch-00004"]]
    assert names(tmp_path) == ["epoch-00004", "epoch-00005"]
    shutil.rmtree(tmp_path / "epoch-00005")
    assert_same_run(run(tiny, tmp_path, checkpoint_every=5, resume_from_checkpoint=True), undisturbed)


def test_who_is_active_survives_epochs_without_a_check(tiny, tmp_path):
    """With a check every other epoch, the third epoch trains whom the second one chose."""

    def few(scores, thresholds):
        return scores["ma"].rank(ascending=False, method="first") <= 3

    whole = run(tiny, check_every=2, refinement=few)
    run(tiny, tmp_path, check_every=2, refinement=few)
    shutil.rmtree(tmp_path / "epoch-00005")
    assert_same_run(run(tiny, tmp_path, check_every=2, refinement=few, resume_from_checkpoint=True), whole)


def test_an_objective_may_draw_at_random(tiny, tmp_path):
    def noisy(model, batch, reference):
        return {
            name: value * (1 + torch.rand(1)[0] + random.random())
            for name, value in GradientAscent()(model, batch, reference).items()
        }

    whole = run(tiny, objective=noisy)
    run(tiny, tmp_path, objective=noisy)
    shutil.rmtree(tmp_path / "epoch-00005")
    assert_same_run(run(tiny, tmp_path, objective=noisy, resume_from_checkpoint=True), whole)


def test_an_adapter_is_all_that_is_kept(tiny, tmp_path):
    from icu_nb.models.loading import add_lora

    def adapted(seed):
        torch.manual_seed(seed)
        return add_lora(tiny.copy(), 4)

    whole = run(tiny, tmp_path, model=adapted(0))
    stored = torch.load(tmp_path / "epoch-00005" / "state.pt", weights_only=True)["weights"]
    assert stored and all("lora" in name for name in stored)
    shutil.rmtree(tmp_path / "epoch-00005")
    assert_same_run(
        run(tiny, tmp_path, model=adapted(1), resume_from_checkpoint=True), whole
    )  # whatever the new adapter began with
    with pytest.raises(_CheckpointError, match="add the adapter that the run began with"):
        run(tiny, tmp_path, model=add_lora(tiny.copy(), 8), resume_from_checkpoint=True)


@pytest.mark.parametrize("part", ["lm_head", "wte"])
def test_an_adapter_with_whole_modules_is_all_that_is_kept(tiny, tmp_path, part):
    from peft import LoraConfig

    from icu_nb.models.loading import add_lora

    def adapted():
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=[part], task_type="CAUSAL_LM")
        return add_lora(tiny.copy(), config)

    whole = run(tiny, tmp_path, model=adapted())
    trains = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    stored = torch.load(tmp_path / "epoch-00005" / "state.pt", weights_only=True)
    assert stored["weights"].keys() == trains.keys()
    assert all("lora" in name or f"{part}.modules_to_save" in name for name in stored["weights"])
    bytes_of_three = 3 * sum(p.numel() * 4 for p in trains.values())  # weights and Adam's two moments
    rest = {name: stored[name] for name in stored.keys() - {"weights", "optimizer"}}
    torch.save(rest, tmp_path / "rest.pt")
    size = (tmp_path / "epoch-00005" / "state.pt").stat().st_size - (tmp_path / "rest.pt").stat().st_size
    assert size < 1.2 * bytes_of_three + 20_000
    shutil.rmtree(tmp_path / "epoch-00005")
    (tmp_path / "rest.pt").unlink()
    assert_same_run(run(tiny, tmp_path, model=adapted(), resume_from_checkpoint=True), whole)


# ---- refused ----


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "run"
    run(tiny, folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "learning_rate was 0.002 and is 0.001": lambda tiny: {"learning_rate": 1e-3},
    "ma was 0.0 and is 0.5": lambda tiny: {"thresholds": replace(NEVER, ma=0.5)},
    "Load the original model again": lambda tiny: {
        "model": tiny.copy().apply(
            lambda m: m.weight.data.add_(1e-3) if isinstance(m, torch.nn.LayerNorm) else None
        )
    },
    "`objective` was": lambda tiny: {"objective": GradientAscent()},
    "`refinement` was": lambda tiny: {"refinement": None},
}


@pytest.mark.parametrize("words", OTHERS)
def test_another_run_is_refused(tiny, folder, words):
    before, changes = content(folder), OTHERS[words](tiny)
    model = changes.pop("model", None) or tiny.copy()
    weights = tiny.weights(model)
    with pytest.raises(_CheckpointError, match="another run") as error:
        run(tiny, folder, model=model, resume_from_checkpoint=True, **changes)
    assert words in str(error.value) and content(folder) == before and tiny.same(model, weights)


def test_an_old_checkpoint_is_refused_in_one_line(tiny, folder):
    """Written before the names changed: other names in its settings, and no number of a format."""
    for path in folder.glob("epoch-*/run.json"):
        stored = json.loads(path.read_text())
        del stored["format"]
        stored["config"]["lr"] = stored["config"].pop("learning_rate")
        stored["config"]["seq_len"] = stored["config"].pop("max_length")
        path.write_text(json.dumps(stored))
    with pytest.raises(_CheckpointError, match="epoch-00005 was written by another version") as error:
        run(tiny, folder, resume_from_checkpoint=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_other_texts_are_refused(tiny, folder):
    with pytest.raises(_CheckpointError, match="`forget` is another one"):
        unlearn(
            tiny.copy(),
            tiny.tokenizer,
            tiny.forget[:4],
            tiny.retain,
            tiny.config(max_epochs=EPOCHS),
            thresholds=NEVER,
            checkpoint_dir=folder,
            resume_from_checkpoint=True,
        )


def cut(path):
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size // 2)


def flip(path):
    file = path / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "half a file": cut,
    "one bit": flip,
    "no state": lambda path: (path / "state.pt").unlink(),
    "no identity": lambda path: (path / "run.json").unlink(),
    "somebody else's": lambda path: (path / "run.json").write_text("[1, 2]"),
    "a stranger's pickle": lambda path: torch.save({"x": Path("x")}, path / "state.pt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_good(tiny, folder, undisturbed, damage):
    DAMAGES[damage](folder / "epoch-00005")
    with pytest.raises(_CheckpointError, match=r"epoch-00005 .*Delete it to resume from epoch-00004"):
        run(tiny, folder, resume_from_checkpoint=True)
    shutil.rmtree(folder / "epoch-00005")
    assert_same_run(run(tiny, folder, resume_from_checkpoint=True), undisturbed)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"resume_from_checkpoint": True, "checkpoint_dir": None}, "checkpoint_dir"),
        ({"resume_from_checkpoint": "no/such/epoch-00001"}, "there is no checkpoint"),
        ({}, "resume_from_checkpoint=True"),
    ],
)
def test_what_would_mix_runs_is_refused(tiny, folder, arguments, words):
    model, before = tiny.copy(), content(folder)
    weights = tiny.weights(model)
    with pytest.raises(InputError, match=words):
        run(
            tiny,
            **{
                "folder": folder,
                **{("folder" if k == "checkpoint_dir" else k): v for k, v in arguments.items()},
            },
            model=model,
        )
    assert tiny.same(model, weights) and content(folder) == before


def test_nothing_to_resume_is_a_beginning(tiny, tmp_path, undisturbed):
    assert_same_run(run(tiny, tmp_path / "new", resume_from_checkpoint=True), undisturbed)


# ---- no room ----


def test_a_full_disk_leaves_the_good_checkpoint(tiny, tmp_path, undisturbed):
    """RLIMIT_FSIZE: a file may grow to so many bytes and no further, as on a full disk."""

    def no_room():
        size = (tmp_path / "run" / "epoch-00002" / "state.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    run(tiny, tmp_path / "all")
    (tmp_path / "run").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = Checkpoints.save

    def save(self, epoch, state):
        if epoch == 3:
            no_room()
        real(self, epoch, state)

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(_CheckpointError, match=r"epoch 3 cannot be written.*epoch-00002 is still good"),
    ):
        patch.setattr(Checkpoints, "save", save)
        try:
            run(tiny, tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["epoch-00002"]
    assert_same_run(run(tiny, tmp_path / "run", resume_from_checkpoint=True), undisturbed)


SMALL = {"x": torch.arange(5)}
CALLS = [(os, "fsync"), (os, "replace"), (os, "mkdir"), (torch, "save"), (Path, "write_text")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_each_call_fails_in_turn(tmp_path, error):
    """Wherever the disk is full, or Ctrl-C comes, the last good checkpoint is there, whole."""
    checkpoints = Checkpoints(tmp_path, {"format": icu_nb.checkpoint._FORMAT})
    checkpoints.save(1, {"epoch": 1, **SMALL})
    checkpoints.save(2, {"epoch": 2, **SMALL})
    fails_at = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, fails_at, error)
            with suppress(_CheckpointError, KeyboardInterrupt):
                checkpoints.save(3, {"epoch": 3, **SMALL})
        if calls[0] <= fails_at:  # there was no such call: all of them have failed once
            break
        checkpoints.sweep()
        assert "epoch-00002" in names(tmp_path) and len(names(tmp_path)) <= 2
        assert checkpoints.load()["epoch"] in (2, 3)  # 3: it failed when all was done
        assert torch.equal(checkpoints.load(tmp_path / "epoch-00002")["x"], SMALL["x"])
        fails_at += 1
    assert fails_at >= 10


def fail_at(patch, number, error):
    """The call of this number, of those that write, raises the error; the list holds how many came."""
    calls = [0]
    for place, name in CALLS:
        real = getattr(place, name)

        def counted(*args, real=real, **options):
            calls[0] += 1
            if calls[0] == number + 1:
                raise error
            return real(*args, **options)

        patch.setattr(place, name, counted)
    return calls


def test_two_copies_at_most(tiny, tmp_path, undisturbed):
    whole, seen = torch.save, []

    def save(state, path):
        whole(state, path)
        seen.append(names(tmp_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert_same_run(run(tiny, tmp_path), undisturbed)
    assert [len(folders) for folders in seen] == [1, 2, 2, 2, 2]


def test_killed_between_the_two_renames(tmp_path):
    """A checkpoint written again is moved aside first; where the process ends then, it comes back."""
    checkpoints = Checkpoints(tmp_path, {"format": icu_nb.checkpoint._FORMAT})
    checkpoints.save(1, {"epoch": 1, **SMALL})
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(checkpoints,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not checkpoints.paths()
    checkpoints.sweep()
    assert names(tmp_path) == ["epoch-00001"] and checkpoints.load()["epoch"] == 1


def write_and_die(checkpoints):
    rename = os.replace

    def replace_and_die(source, target):
        rename(source, target)
        if Path(target).name == "old":
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die
    checkpoints.save(1, {"epoch": 1, **SMALL})


def test_all_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def replace(source, target):
        done.append(f"rename to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    Checkpoints(tmp_path, {"format": icu_nb.checkpoint._FORMAT}).save(1, SMALL)
    renamed = done.index("rename to epoch-00001")
    assert {"state.pt", "run.json", "epoch-00001"} <= set(done[:renamed])
    assert done[renamed + 1 :] == [tmp_path.name]


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(_CheckpointError, match="cannot be written"):
        run(tiny, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


# ---- which run it is ----


def weighted(weight, model, batch, reference):
    return {name: weight * value for name, value in GradientAscent()(model, batch, reference).items()}


def closed_over(weight):
    def objective(model, batch, reference):
        return weighted(weight, model, batch, reference)

    return objective


@dataclass(frozen=True)
class Weighted(Objective):
    weight: float = 1.0
    rule: Callable | None = None  # its repr would show where it lies in memory

    def __call__(self, model, batch, reference):
        return weighted(self.weight, model, batch, reference)


class Counting:
    def __init__(self, parts):
        self.parts = parts

    def __call__(self, model, batch, reference):
        return weighted(len(self.parts), model, batch, reference)


PAIRS = {
    "partial": lambda x: partial(weighted, x),
    "keyword": lambda x: partial(weighted, weight=x),
    "closure": closed_over,
    "field": Weighted,
    "function in a field": lambda x: Weighted(rule=partial(weighted, x)),
    "set in an object": lambda x: Counting({"a", "b", "c", str(x)}),
    "tensor": lambda x: partial(weighted, torch.tensor([0.1, x], dtype=torch.bfloat16)),
    "method": lambda x: Counting([x]).__call__,
}


def identity_of(objective):
    plugs = {"objective": objective}
    names = icu_nb.checkpoint.names_of(**plugs)
    return names, icu_nb.checkpoint._state_of("objective", objective)


@pytest.mark.parametrize("kind", PAIRS)
def test_arguments_belong_to_a_run(kind, recwarn):
    make = PAIRS[kind]
    assert identity_of(make(0.5)) == identity_of(make(0.5)) != identity_of(make(0.25))
    assert not recwarn.list


def test_a_run_is_the_same_in_every_process(tmp_path):
    """Whatever order sets have, and wherever functions lie in memory."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_checkpoint import PAIRS, identity_of\n"
        "print([identity_of(make(0.5)) for make in PAIRS.values()])"
    )
    seen = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "error", "-c", code]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert " at 0x" not in child.stdout
        seen.add(child.stdout)
    assert len(seen) == 1


def test_other_arguments_are_refused(tiny, tmp_path):
    run(tiny, tmp_path, objective=partial(weighted, 0.5), max_epochs=1)
    with pytest.raises(_CheckpointError, match="`objective` has other arguments") as error:
        run(tiny, tmp_path, objective=partial(weighted, 0.25), resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    run(tiny, tmp_path, objective=partial(weighted, 0.5), resume_from_checkpoint=True)


def test_what_cannot_be_told_from_others_is_refused(tiny, tmp_path):
    model = tiny.copy()
    weights = tiny.weights(model)
    objective = partial(weighted, (number for number in range(3)))
    with pytest.raises(InputError, match="`objective`: it holds what cannot be written down") as error:
        run(tiny, tmp_path / "run", model=model, objective=objective)
    assert "\n" not in str(error.value) and tiny.same(model, weights) and not (tmp_path / "run").exists()


def test_names_are_the_same_in_every_process():
    from icu_nb.objective import ICU

    assert (
        icu_nb.checkpoint._name_of(ICU()) == "ICU(alpha=0.5, beta=1.0)"
        and icu_nb.checkpoint._name_of(GradientAscent()) == "GradientAscent()"
    )
    assert icu_nb.checkpoint._name_of(GradientAscent().__call__).startswith("icu_nb.objective.")
    assert " at 0x" not in icu_nb.checkpoint._name_of(lambda: None)
