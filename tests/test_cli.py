"""icu-unlearn: what it writes, what it says, how it ends; and that no text to forget gets out."""

import copy
import importlib
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors.torch import load_file
from test_processes import ON_CPU, child, free_port
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import icu_nb.cli
import icu_nb.pairs
import icu_nb.run
import icu_nb.sampled_pool
from icu_nb.cli import _OUTCOMES, main
from icu_nb.errors import InputError, NonFinite
from icu_nb.iur import Thresholds
from icu_nb.models.loading import load_model
from icu_nb.models.tiny import tiny_gpt_neo
from icu_nb.result import _MESSAGES
from icu_nb.sampled_pool import sample_pool
from icu_nb.text import tokenize

ROOT = Path(__file__).resolve().parents[1]
LOOP = importlib.import_module("icu_nb.unlearn")  # `icu_nb.unlearn` is the function


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory):
    """A model and files of texts; never write into it."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model.save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    for name in ("forget", "retain", "heldout"):
        lines(folder / f"{name}.jsonl", getattr(tiny, name))
    return folder


def options(given, out, **changes):
    """A command line that runs two epochs; None leaves an option out, True stands for a flag."""
    words = {
        "model": given / "model",
        "forget": given / "forget.jsonl",
        "retain": given / "retain.jsonl",
        "out": out,
        "learning_rate": 2e-3,
        "batch_size": 4,
        "max_epochs": 2,
        "max_length": 48,
        **changes,
    }
    return [
        str(word)
        for name, value in words.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", value)[: 1 if value is True else 2]
    ]


@pytest.fixture
def call(given, tmp_path, capsys):
    """Run the command in this process; its exit code, stdout and stderr without the progress bar."""

    def run(out=tmp_path / "out", **changes):
        try:
            code = main(options(given, out, **changes))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return (
            code,
            out,
            "".join(
                line + "\n"
                for line in err.replace("\r", "\n").splitlines()
                if line.startswith("icu-unlearn: ")
            ),
        )

    return run


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(out):
    return load_file(out / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def holds_a_piece(data, texts):
    """Whether bytes hold five words in a row of any of the texts."""
    pieces = {
        " ".join(words[k : k + 5])
        for text in texts
        for words in [text.split()]
        for k in range(len(words) - 4)
    }
    return any(piece.encode() in data or json.dumps(piece)[1:-1].encode() in data for piece in pieces)


# ---- what it does ----


def test_the_summary_and_the_folder(call, given, tmp_path, tiny):
    code, out, err = call(
        heldout=given / "heldout.jsonl", max_epochs=40, learning_rate=5e-3, refinement="icu"
    )
    summary = json.loads(out)
    assert (
        code == 0
        and summary["stop_reason"] == "thresholds"
        and summary["texts"] == len(tiny.forget)
        and summary["out"] == str(tmp_path / "out")
    )
    limits, before, after = (summary[name] for name in ("threshold", "before", "after"))
    assert after["ma"] <= limits["ma"] < before["ma"] and after["el"] <= limits["el"]
    assert before["el"] is None, "the run was far from its end, and null is JSON"
    assert f"MA {summary['threshold']['ma']:.4f}" in err
    stored = json.loads((tmp_path / "out" / "icu_result.json").read_text())
    assert (
        stored["config"]["max_length"] == 48
        and stored["refinement"].endswith("select_icu")
        and stored["history"][-1]["ma"] == summary["after"]["ma"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"], (
        "checkpoints are gone, and nothing is half written"
    )
    before, after = (
        AutoModelForCausalLM.from_pretrained(given / "model").state_dict(),
        weights(tmp_path / "out"),
    )
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    "options, objective, neighbors",
    [({"heldout": "heldout.jsonl"}, "ICUPlus", "redraw"), ({}, "ICU(", "nearest")],
)
def test_the_defaults_are_those_of_python(call, given, tmp_path, options, objective, neighbors):
    """Held-out texts make the recommended recipe the default; without them it is the paper's loss."""
    files = {name: given / file for name, file in options.items()}
    call(max_epochs=1, learning_rate=None, n_neighbors=None, **files)
    stored = json.loads((tmp_path / "out" / "icu_result.json").read_text())
    assert stored["objective"].startswith(objective) and stored["config"]["neighbors"] == neighbors
    assert stored["config"]["learning_rate"] == (1e-3 if options else 5e-6)


def test_a_full_check_has_every_number(call, tmp_path):
    _, out, _ = call(max_epochs=1, check="full")
    summary = json.loads(out)
    assert 0 <= summary["after"]["el"] <= summary["before"]["el"] <= 1
    code, _, err = call(check="half")
    assert code == 2 and "'half'" in err


def test_max_epochs(call, tmp_path):
    code, out, err = call()
    assert code == 3 and json.loads(out)["stop_reason"] == "max_epochs" and json.loads(out)["epochs"] == 2
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out.checkpoints").exists()
    assert "published thresholds" in err and "0.2994" in err


def test_nothing_to_forget(call, given, tmp_path, tiny):
    lines(tmp_path / "strange.jsonl", tiny.heldout[:4])
    lines(tmp_path / "unseen.jsonl", tiny.heldout[4:])
    code, out, _ = call(forget=tmp_path / "strange.jsonl", heldout=tmp_path / "unseen.jsonl")
    assert code == 0 and json.loads(out)["stop_reason"] == "nothing_to_forget"
    assert same(weights(tmp_path / "out"), load_file(given / "model" / "model.safetensors"))


def test_every_end_of_a_run_has_an_exit_code():
    assert _OUTCOMES.keys() == _MESSAGES.keys() | {"non_finite_loss"} and _OUTCOMES["all_forgotten"] == 0


def test_settings_reach_the_run(call, tmp_path):
    code, *_ = call(
        max_epochs=1,
        alpha=0.25,
        n_neighbors=2,
        el_n=5,
        micro_batch_size=2,
        gradient_checkpointing=True,
        seed=7,
        check_steps=3,
    )
    config = json.loads((tmp_path / "out" / "icu_result.json").read_text())["config"]
    expected = {
        "max_epochs": 1,
        "alpha": 0.25,
        "n_neighbors": 2,
        "el_n": 5,
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
        "seed": 7,
        "check_steps": 3,
        "learning_rate": 2e-3,
        "batch_size": 4,
        "beta": 1.0,
    }
    assert code == 3 and {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("rank, expected", [(True, 8), (2, 2)])
def test_an_adapter_is_merged(call, given, tmp_path, monkeypatch, rank, expected):
    pytest.importorskip("peft")
    ranks = []
    monkeypatch.setattr(
        "icu_nb.models.loading.load_model",
        lambda *args, lora, **options: (ranks.append(lora), load_model(*args, lora=lora, **options))[1],
    )
    assert call(lora=rank, max_epochs=1)[0] == 3 and ranks == [expected]
    before, after = load_file(given / "model" / "model.safetensors"), weights(tmp_path / "out")
    assert before.keys() == after.keys() and {
        name for name in after if not torch.equal(before[name], after[name])
    } == {name for name in after if "q_proj" in name or "v_proj" in name}


def test_duplicates_are_left_out_and_counted(call, tmp_path, tiny):
    lines(tmp_path / "twice.jsonl", [*tiny.forget, *tiny.forget[:3]])
    code, out, err = call(forget=tmp_path / "twice.jsonl", max_epochs=1)
    assert (
        code == 3
        and json.loads(out)["texts"] == len(tiny.forget)
        and "--forget: 3 duplicates left out, 8 texts remain" in err
    )


def test_another_column_of_a_csv(call, tmp_path, tiny):
    for name in ("forget", "retain"):
        pd.DataFrame({"id": range(len(getattr(tiny, name))), "body": getattr(tiny, name)}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    assert (
        call(forget=tmp_path / "forget.csv", retain=tmp_path / "retain.csv", column="body", max_epochs=1)[0]
        == 3
    )


def test_one_column_is_read_whole(call, tmp_path, tiny, monkeypatch):
    """Commas without quotes had made an index of all that stands before the last one."""
    texts = [text.replace("\n", " ") for text in tiny.forget]
    assert sum(text.count(",") for text in texts) > 0
    (tmp_path / "FORGET.CSV").write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8-sig")
    seen = []
    monkeypatch.setattr(LOOP, "unlearn", lambda model, tokenizer, forget, *rest, **more: seen.append(forget))
    with suppress(AttributeError):  # there is no result to be saved
        call(forget=tmp_path / "FORGET.CSV")
    assert [rows["text"].tolist() for rows in seen] == [texts]


def test_a_warning_is_one_line(call, given, tmp_path, tiny):
    lines(tmp_path / "retain.jsonl", [tiny.forget[0], *tiny.retain])
    heldout = given / "heldout.jsonl"
    code, _, err = call(retain=tmp_path / "retain.jsonl", heldout=heldout, max_epochs=1)
    assert (
        code == 3
        and len(said := [line for line in err.splitlines() if "warning" in line]) == 1
        and "also stand in --forget" in said[0]
    )


# ---- what must not get out ----


def test_no_text_to_forget_gets_out(call, given, tmp_path, tiny):
    seen = []

    def look(*given, save=icu_nb.cli._save):
        checkpoints = tmp_path / "out.checkpoints"
        seen.append(
            {name: data for name, data in content(checkpoints).items() if not name.endswith("state.pt")}
        )
        save(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icu_nb.cli, "_save", look)
        code, out, err = call(heldout=given / "heldout.jsonl")
    assert code == 3 and holds_a_piece((given / "forget.jsonl").read_bytes(), tiny.forget)
    everything = b"".join(content(tmp_path).values()) + (out + err).encode()
    assert not holds_a_piece(everything, tiny.forget)
    assert seen and len(seen[0]) == 2 and not holds_a_piece(b"".join(seen[0].values()), tiny.forget)


HEADLESS = {
    "csv": lambda text: f'"{text}"\n"{text}"\n',
    "json": lambda text: json.dumps([text, text]),
    "jsonl": lambda text: json.dumps({text: 1}) + "\n",
    "cut.jsonl": lambda text: json.dumps({"text": text})[:-5],
    "pair.jsonl": lambda text: json.dumps({"text": text}) + "\n" + json.dumps(text) + "\n",
    "open.csv": lambda text: f'text\n"{text}\n',
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_an_error_shows_no_text(call, tmp_path, tiny, kind):
    (tmp_path / f"bad.{kind}").write_text(HEADLESS[kind](tiny.forget[0]))
    code, out, err = call(forget=tmp_path / f"bad.{kind}")
    assert (
        code == 2
        and err.startswith("icu-unlearn: error: --forget: ")
        and not holds_a_piece((out + err).encode(), tiny.forget)
    )


# ---- resume ----


def started(given, out, **changes):
    """A run in a process of its own."""

    def alone():
        tqdm.set_lock(
            threading.RLock()
        )  # its default is shared with this process, and whoever is killed does not give it back
        torch.set_num_threads(1)
        main(options(given, out, **changes))

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def killed(given, out, **changes):
    """One that is killed when its second epoch is on disk."""
    process = started(given, out, **changes)
    while process.is_alive() and not Path(f"{out}.checkpoints/epoch-00002").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -9 and not out.exists()


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"lora": 4, "retain": None}, id="adapter, sampled pool")]
)
def test_killed_and_resumed(call, given, tmp_path, changes):
    changes = dict(max_epochs=4, **changes)
    assert call(out=tmp_path / "whole", **changes)[0] == 3
    killed(given, tmp_path / "cut", **changes)
    code, out, err = call(out=tmp_path / "cut", **changes)
    assert (
        code == 2
        and out == ""
        and "--resume-from-checkpoint" in err
        and "--overwrite" in err
        and not (tmp_path / "cut").exists()
    )
    assert call(out=tmp_path / "cut", resume_from_checkpoint=True, **changes)[0] == 3
    assert (
        same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
        and not (tmp_path / "cut.checkpoints").exists()
    )


def test_begun_anew(call, given, tmp_path):
    killed(given, tmp_path / "cut", max_epochs=4)
    assert call(out=tmp_path / "cut", overwrite=True, learning_rate=1e-3)[0] == 3, (
        "other settings: the old checkpoints would be refused"
    )
    assert not (tmp_path / "cut.checkpoints").exists()


def test_nothing_to_resume_is_a_beginning(call):
    assert call(resume_from_checkpoint=True, max_epochs=1)[0] == 3


def test_another_run_is_not_resumed(call, given, tmp_path):
    killed(given, tmp_path / "cut", max_epochs=4)
    before = content(tmp_path)
    code, _, err = call(out=tmp_path / "cut", max_epochs=4, learning_rate=1e-3, resume_from_checkpoint=True)
    assert code == 2 and "learning_rate was 0.002 and is 0.001" in err and content(tmp_path) == before


def test_interrupted(call, tmp_path, monkeypatch):
    def press_stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("icu_nb.run.Reports.tell", lambda self, row: row["epoch"] == 1 and press_stop())
    code, out, err = call()
    assert (
        code == 130
        and out == ""
        and "--resume-from-checkpoint" in err
        and not (tmp_path / "out").exists()
        and (tmp_path / "out.checkpoints" / "epoch-00001").exists()
    )
    monkeypatch.undo()
    assert call(resume_from_checkpoint=True)[0] == 3


def test_a_folder_that_was_filled_meanwhile(call, tmp_path):
    """Not replaced, and the result is not lost."""

    def save(*given, save=icu_nb.cli._save):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "letter.txt").write_text("mine")
        save(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icu_nb.cli, "_save", save)
        code, out, err = call()
    assert (
        code == 2
        and out == ""
        and re.search(
            "^icu-unlearn: error: --out: .* filled during the run.*--resume-from-checkpoint", err, re.M
        )
    )
    assert (
        content(tmp_path / "out") == {"letter.txt": b"mine"}
        and (tmp_path / "out.checkpoints" / "epoch-00002").exists()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.checkpoints"]
    (tmp_path / "out" / "letter.txt").unlink()
    assert (
        call(resume_from_checkpoint=True)[0] == 3
        and (tmp_path / "out" / "model.safetensors").exists()
        and not (tmp_path / "out.checkpoints").exists()
    )


def test_killed_while_saving(call, given, tmp_path, monkeypatch):
    """What it left is swept by the next run; what looks like it and is somebody else's stays."""

    def half(result, folder):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr("icu_nb.result.UnlearnResult.save_pretrained", half)
        process = started(given, tmp_path / "out")
        process.join()
    (leftover,) = tmp_path.glob(".out.*")
    assert process.exitcode == -9 and (leftover / "out" / "model.safetensors").exists()
    others = [".out.backups1/letters", ".out.config/out", ".other.abcd1234/other", ".out.abcd1234/old"]
    for other in others:
        (tmp_path / other).mkdir(parents=True)
    assert call(resume_from_checkpoint=True)[0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out", *(other.split("/")[0] for other in others)]
    ), "an old folder stays while there is no new one"
    assert (
        call(overwrite=True)[0] == 3
        and not (tmp_path / ".out.abcd1234").exists()
        and (tmp_path / ".out.backups1" / "letters").exists()
    )


def test_only_checkpoints_are_cleared(tmp_path):
    folder = tmp_path / "out.checkpoints"
    for name in ("epoch-00001", ".epoch-00002.k3_x9a0b", "letters"):
        (folder / name).mkdir(parents=True)
    icu_nb.cli._clear(folder)
    assert [path.name for path in folder.iterdir()] == ["letters"]
    (folder / "letters").rmdir()
    icu_nb.cli._clear(folder)
    icu_nb.cli._clear(folder)
    assert not folder.exists()


def test_no_number(call, tmp_path, monkeypatch):
    def broken(*args):
        raise NonFinite("the loss is nan in batch 1; the model is as it was before that step")

    monkeypatch.setattr(LOOP, "train_epoch", broken)
    code, out, err = call()
    assert (
        code == 4
        and out == ""
        and "batch 1" in err
        and "nothing was saved" in err
        and list(tmp_path.iterdir()) == []
    )


# ---- what is refused ----

BAD = {
    "no such model": ({"model": "no/such/folder/here"}, "--model: 'no/such/folder/here'"),
    "no option": ({"no_such_option": 3}, "no-such-option"),
    "no number": ({"learning_rate": "fast"}, "--learning-rate"),
    "out of range": ({"learning_rate": -1}, "--learning-rate: -1"),
    "no texts in the file": ({"forget": "empty.jsonl"}, "--forget: there are no texts"),
    "no file": ({"heldout": "missing.jsonl"}, "--heldout: there is no file"),
    "a folder": ({"forget": "."}, "--forget: there is no file"),
    "another kind of file": ({"retain": "texts.pdf"}, "--retain: files ending in '.pdf'"),
    "malformed": ({"forget": "malformed.jsonl"}, "--forget: malformed.jsonl .*line 3"),
    "no column": ({"column": "body"}, "--forget: none of the 1 columns is called 'body'"),
    "no text": ({"forget": "numbers.jsonl"}, r"--forget: no text.*line \[2\]"),
    "too short": ({"max_length": 30}, "--forget.*40 tokens"),
    "no rank": ({"lora": 0}, "--lora: 0 is not a whole number at least 1"),
    "below a file": ({"out": "numbers.jsonl/out"}, "--out: .*cannot be written"),
    "a file": ({"out": "numbers.jsonl"}, "--out: .*no name of a folder"),
    "no name": ({"out": "."}, "--out"),
    "in use": ({"out": "used"}, "--out: used is there and not empty.*--overwrite"),
    "held out and to forget": (
        {"heldout": "shared.jsonl"},
        "--heldout: 2 of its texts also stand in --forget",
    ),
    "a line that is null": ({"forget": "null.jsonl"}, "--forget: null.jsonl .*line 2"),
    "commas without quotes": (
        {"forget": "commas.csv"},
        "--forget: commas.csv cannot be read as .csv .line 2: 3 cells, and the first line names 2.*in quotes",
    ),
    "an open quote": ({"heldout": "open.CSV"}, "--heldout: open.CSV .*line 3: the quotes do not match"),
    "half a character": ({"retain": "half.jsonl"}, r"--retain: half a character .*line \[2\]"),
    "holds an embedder": (
        {"out": "used", "overwrite": True, "embedder": "used/embedder"},
        "--out: used holds what --embedder named",
    ),
    "holds an encoder": (
        {"out": "used", "overwrite": True, "encoder": "used"},
        "--out: used holds what --encoder named",
    ),
    "holds what is read": (
        {"out": "used", "overwrite": True, "forget": "used/forget.jsonl"},
        "--out: used holds what --forget names?",
    ),
}


@pytest.fixture
def work(tmp_path, monkeypatch, tiny):
    """A working folder with files that are wrong in some way."""
    work = tmp_path / "work"
    (work / "used").mkdir(parents=True)
    (work / "empty.jsonl").write_text("\n")
    (work / "texts.pdf").write_bytes(b"%PDF")
    (work / "malformed.jsonl").write_text('{"text": "a"}\n\n{"text": "b"')
    (work / "numbers.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    (work / "null.jsonl").write_text('{"text": "a"}\nnull\n')
    (work / "commas.csv").write_text("id,text\n1,Anna Berg, born 1970\n")
    (work / "open.CSV").write_text('id,text\n1,Anna\n2,"Bo')
    lines(work / "half.jsonl", ["fine", "half \ud83d"])
    lines(work / "shared.jsonl", [*tiny.heldout, *tiny.forget[:2]])
    lines(work / "used" / "forget.jsonl", tiny.forget)
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input(call, work, monkeypatch, wrong):
    changes, words = BAD[wrong]
    if wrong not in ("no such model", "too short", "no rank"):
        monkeypatch.setattr(
            "icu_nb.models.loading.load_model",
            lambda *args, **options: pytest.fail("it loaded the model first"),
        )
    before = content(work.parent)
    code, out, err = call(**{"out": work / "out", **changes})
    assert (
        code == 2
        and out == ""
        and content(work.parent) == before
        and not (work / "out").exists()
        and not list(work.glob("*.checkpoints"))
    )
    assert (
        len([line for line in err.splitlines() if "error: " in line]) == 1
        and pd.Series([err.splitlines()[-1]]).str.contains(words).all()
    ), err


@pytest.mark.parametrize(
    "there",
    [
        "out.checkpoints/epoch-best/model",
        "out.checkpoints/letter.txt",
        "out.checkpoints/epoch-1.pt",
        "out.checkpoints",
    ],
)
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume_from_checkpoint": True}], ids=str)
def test_a_folder_of_checkpoints_that_is_not_ours(call, tmp_path, there, changes):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("mine")
    code, out, err = call(**changes)
    assert (
        code == 2
        and out == ""
        and re.search("^icu-unlearn: error: --out: .*out.checkpoints, which is or holds something else", err)
    )
    assert content(tmp_path) == {there: b"mine"}


def test_a_folder_that_may_not_be_searched(call, tmp_path, monkeypatch):
    def locked(path, *args, is_dir=Path.is_dir):
        if "locked" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path, *args)

    monkeypatch.setattr(Path, "is_dir", locked)
    code, out, err = call(out=tmp_path / "locked" / "out")
    assert (
        code == 2
        and out == ""
        and re.search(r"^icu-unlearn: error: --out: .*cannot be written \(Permission denied\)", err)
        and len(err.splitlines()) == 1
    )


@pytest.mark.parametrize("overwrite", [None, True])
def test_a_mount_point(call, tmp_path, monkeypatch, overwrite):
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    code, out, err = call(overwrite=overwrite)
    assert code == 2 and out == "" and re.search("^icu-unlearn: error: --out: .*mount point", err)


@pytest.mark.parametrize(
    "heldout, words", [("fits", "--forget: texts"), ("long", "--heldout: texts")], ids=["forget", "heldout"]
)
def test_longer_than_the_context_is_said_first(call, tmp_path, tiny, monkeypatch, heldout, words):

    def short(texts):
        return tiny.tokenizer.batch_decode(tokenize(texts, tiny.tokenizer, 56).tokens())

    lines(tmp_path / "forget.jsonl", tiny.forget if heldout == "fits" else short(tiny.forget))
    lines(tmp_path / "heldout.jsonl", tiny.heldout if heldout == "long" else short(tiny.heldout))
    for name in ("icu_nb.iur.memorization_scores", "icu_nb.sampled_pool.sample_pool"):
        monkeypatch.setattr(name, lambda *args, **options: pytest.fail("it asked the model first"))
    code, out, err = call(
        forget=tmp_path / "forget.jsonl", heldout=tmp_path / "heldout.jsonl", retain=None, max_length=None
    )
    assert code == 2 and out == "" and re.search(f"^icu-unlearn: error: {words} .*context of 64", err, re.M)


def encoder(folder, tiny):
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "bert",
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).save_pretrained(folder)


def smaller(folder, tiny):
    tiny_gpt_neo(200, max_length=64, n_layers=2, hidden_size=32, n_heads=2).save_pretrained(folder)


@pytest.mark.parametrize(
    "save, words",
    [(encoder, "--model: .*encoder"), (smaller, "--model: its tokenizer makes tokens up to 299")],
)
def test_models_that_do_not_fit(call, tmp_path, tiny, save, words):
    save(tmp_path / "model", tiny)
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    code, out, err = call(model=tmp_path / "model")
    assert (
        code == 2
        and out == ""
        and re.search(words, err)
        and len(err.splitlines()) == 1
        and [path.name for path in tmp_path.iterdir()] == ["model"]
    )


@pytest.mark.parametrize(
    "error, words",
    [
        (RepositoryNotFoundError("404", response=Mock()), "neither a folder nor a repository of the Hub"),
        (GatedRepoError("403", response=Mock()), "is gated.*hf auth login"),
        (OfflineModeIsEnabled("offline"), "the Hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_says(call, tmp_path, monkeypatch, error, words):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("icu_nb.models.loading.cached_file", fails)
    code, out, err = call(model="nobody/model")
    assert (
        code == 2
        and out == ""
        and re.search(f"^icu-unlearn: error: --model: 'nobody/model' .*{words}", err)
        and len(err.splitlines()) == 1
        and list(tmp_path.iterdir()) == []
    )


def test_a_required_option_is_missing(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--model", "x"])
    assert (
        end.value.code == 2
        and capsys.readouterr().err
        == "icu-unlearn: error: the following arguments are required: --forget, --out\n"
    )


def test_an_old_folder_goes_when_the_new_one_is_there(call, given, work, monkeypatch):
    assert (
        call(out=work / "used", overwrite=True, learning_rate=-1)[0] == 2
        and (work / "used" / "forget.jsonl").exists()
    )

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*given, save=icu_nb.cli._save):
        """Saved on a disk with no room for it: a file may grow to so many bytes and no further."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            save(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icu_nb.cli, "_save", save)
        code, out, err = call(out=work / "used", overwrite=True)
    assert (
        code == 2
        and "File too large" in err
        and "--resume-from-checkpoint" in err
        and out == ""
        and list((work / "used").iterdir()) == [work / "used" / "forget.jsonl"]
    )
    assert call(out=work / "used", overwrite=True, resume_from_checkpoint=True)[0] == 3
    assert (work / "used" / "model.safetensors").exists() and not (work / "used" / "forget.jsonl").exists()
    assert sorted(path.name for path in work.iterdir() if "used" in path.name) == ["used"]


def test_what_nobody_foresaw_keeps_its_traceback(call, monkeypatch):
    def bug(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LOOP, "unlearn", bug)
    with pytest.raises(ZeroDivisionError):
        call()


@pytest.mark.parametrize(
    "old, new",
    [
        ("lr", "learning-rate"),
        ("seq-len", "max-length"),
        ("n", "el-n"),
        ("resume", "resume-from-checkpoint"),
    ],
)
@pytest.mark.parametrize("form", ["--{}", "--{}=3"])
def test_an_old_name_says_the_new_one(capsys, old, new, form):
    with pytest.raises(SystemExit) as end:
        main(["--model", "x", "--forget", "f", "--out", "o", form.format(old)])
    expected = f"icu-unlearn: error: --{old}: this name is not used any more. Say --{new}.\n"
    assert end.value.code == 2 and capsys.readouterr().err == expected


def test_help_needs_no_torch_and_tells_all_settings():
    code = "import sys; from icu_nb.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'pandas', 'numpy'} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for words in ("--el-n N", "EL's n-gram size (default: 10)", "--refinement {icu,published_rule,none}"):
        assert words in done.stdout
    assert "None:" not in done.stdout and "--resume-from-checkpoint" in done.stdout


# ---- processes ----


def test_the_command(given, tmp_path):
    """As a shell starts it."""
    command = [sys.executable, "-m", "icu_nb.cli", *options(given, tmp_path / "out", max_epochs=1)]
    done = subprocess.run(
        command,
        env={**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 3
        and json.loads(done.stdout)["stop_reason"] == "max_epochs"
        and "Traceback" not in done.stderr
        and "epoch" in done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def speaks_to(folder, out, job):
    """One of several processes; what it says goes into files of its own."""
    rank = os.environ["RANK"]
    with (
        open(Path(out) / f"stdout{rank}", "w") as sys.stdout,
        open(Path(out) / f"stderr{rank}", "w") as sys.stderr,
    ):
        sys.exit(main(job))


@pytest.fixture
def in_two_processes(given, tmp_path, monkeypatch):
    """Run the command in two processes; their exit codes."""

    def run(speak=speaks_to, **changes):
        monkeypatch.setattr("one_of_several.main", speak)
        (tmp_path / "said").mkdir()
        port, work = free_port(), options(given, tmp_path / "out", learning_rate=1e-4, **changes)
        processes = [
            multiprocessing.get_context("fork").Process(
                target=child, args=(rank, 2, port, None, tmp_path / "said", work)
            )
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
            process.kill()
        return [process.exitcode for process in processes]

    return run


def test_two_processes(in_two_processes, tmp_path):
    assert in_two_processes() == [3, 3]
    assert (
        json.loads((tmp_path / "said" / "stdout0").read_text())["epochs"] == 2
        and "published" in (tmp_path / "said" / "stderr0").read_text()
    )
    assert (tmp_path / "said" / "stdout1").read_text() == "" and "icu-unlearn" not in (
        tmp_path / "said" / "stderr1"
    ).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "said"]


def rounds_otherwise(*job):
    """One of several processes, of which the second finds other thresholds and another pool."""
    rank = int(os.environ["RANK"])
    icu_nb.pairs.calibrate_thresholds = lambda *args, **options: Thresholds(ma=float(rank), el=float(rank))
    icu_nb.sampled_pool.sample_pool = lambda model, tokenizer, n, *args, **options: [
        f"{rank} says number {i} " * 20 for i in range(n)
    ]
    speaks_to(*job)


def test_the_first_of_two_processes_decides(in_two_processes, given, tmp_path):
    """By the second one's thresholds there would be nothing to forget."""
    assert in_two_processes(rounds_otherwise, heldout=given / "heldout.jsonl", retain=None) == [3, 3]
    stored = json.loads((tmp_path / "out" / "icu_result.json").read_text())
    assert stored["thresholds"]["ma"] == 0 and stored["history"][-1]["epoch"] == 2


# ---- a pool from the model itself ----


def test_a_sampled_pool(tiny):
    pool = sample_pool(tiny.model, tiny.tokenizer, 40, max_length=32)
    assert len(set(pool)) == 40 and pool == sample_pool(
        tiny.model, tiny.tokenizer, 40, max_length=32
    ) != sample_pool(tiny.model, tiny.tokenizer, 40, max_length=32, seed=1)


def test_what_the_model_recites_is_left_out(tiny):
    recited = sample_pool(tiny.model, tiny.tokenizer, 60, max_length=48)
    assert sample_pool(tiny.model, tiny.tokenizer, 40, recited[:20], max_length=48) == recited[20:60]


def test_a_model_that_says_nothing_else(tiny, monkeypatch):
    monkeypatch.setattr(
        icu_nb.sampled_pool,
        "_sample_tokens",
        lambda model, starts, length, generator: tiny.sequences.input_ids[:2],
    )
    assert len(sample_pool(tiny.model, tiny.tokenizer, 2, max_length=48)) == 2
    with pytest.raises(InputError, match=r"`forget`.*only 1 are new"):
        sample_pool(
            tiny.model, tiny.tokenizer, 2, [tiny.tokenizer.decode(tiny.sequences.input_ids[0])], max_length=48
        )


def test_a_sampled_pool_begins_as_the_tokenizer_does(tiny, bos_tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        icu_nb.sampled_pool,
        "_sample_tokens",
        lambda model, starts, length, generator: (seen.append(starts), starts)[1],
    )
    sample_pool(tiny.model, bos_tokenizer, 3, max_length=8)
    assert (
        seen[0].shape == (64, 2)
        and (seen[0][:, 0] == bos_tokenizer.bos_token_id).all()
        and seen[0][:, 1].unique().numel() > 20
    )


def test_a_tokenizer_with_more_tokens_than_the_model(tiny, monkeypatch):
    tokenizer, seen = copy.deepcopy(tiny.tokenizer), []
    tokenizer.add_tokens([f"<image{i}>" for i in range(300)])
    monkeypatch.setattr(
        icu_nb.sampled_pool,
        "_sample_tokens",
        lambda model, starts, length, generator: (seen.append(starts), starts)[1],
    )
    sample_pool(tiny.model, tokenizer, 3, max_length=8)
    assert len(tokenizer) == 600 and seen[0].max() < 300


def test_longer_than_the_context(tiny):
    with pytest.raises(InputError, match=r"`max_length`.*context of 64"):
        sample_pool(tiny.model, tiny.tokenizer, 3, max_length=65)
