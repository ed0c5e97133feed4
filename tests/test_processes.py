"""Two processes that share a run do what one does: each active sequence once, one loss, one writer."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import one_of_several
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = {
    "ACCELERATE_USE_CPU": "yes",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """What all jobs begin with: a model, a tokenizer, texts."""
    folder = tmp_path_factory.mktemp("job")
    tiny.model.save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    (folder / "texts.json").write_text(json.dumps({"forget": tiny.forget, "retain": tiny.retain}))
    return folder


def job_of(config=(), **job):
    return {
        "config": {"learning_rate": 2e-3, "batch_size": 4, "max_epochs": 2, "max_length": 48, "num_beams": 1}
        | dict(config),
        **job,
    }


def child(rank, world, port, *work):
    """A forked process finds its place as a launched one does: in the environment."""
    os.environ.update(ON_CPU)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    one_of_several.main(*work)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """Do a job in one process or two, forked (imports take seconds); returns what each of them saw."""

    def call(world, config=(), **job):
        out, port = tmp_path_factory.mktemp("out"), free_port()
        processes = [
            multiprocessing.get_context("fork").Process(
                target=child, args=(rank, world, port, folder, out, job_of(config, **job))
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        for process in processes:
            if process.exitcode is None:  # it hangs
                process.kill()
        assert [process.exitcode for process in processes] == [0] * world
        return seen_in(out)

    return call


def seen_in(out):
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]


def table(seen, name):
    return pd.DataFrame(seen[name]).drop(columns=["seconds_train", "seconds_check"], errors="ignore")


def assert_same_run(one, two, tolerance=1e-5):
    """The history of both, and the weights at the end; the two processes agree to the bit."""
    assert [seen["world"] for seen in two] == [2, 2] and len(
        {seen["stop_reason"] for seen in [*one, *two]}
    ) == 1
    for name in ("history", "samples"):
        pd.testing.assert_frame_equal(table(one[0], name), table(two[0], name), rtol=0, atol=tolerance)
        pd.testing.assert_frame_equal(table(two[0], name), table(two[1], name), check_exact=True)
    for name, value in one[0]["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], value, rtol=0, atol=tolerance)
        assert torch.equal(*(seen["weights"][name] for seen in two))


SGD_LIKE = {
    "learning_rate": 1e-4
}  # Adam divides by the gradient's size: where that is nearly nothing, rounding would decide
JOBS = {
    "ICU": {"config": SGD_LIKE},
    "two neighbors, pieces": {"config": dict(SGD_LIKE, n_neighbors=2, micro_batch_size=1)},
    "neighbors in turn": {"config": dict(SGD_LIKE, n_neighbors=2, neighbors="rotate")},
    "neighbors redrawn, pieces": {"config": dict(SGD_LIKE, neighbors="redraw", micro_batch_size=1)},
    "three active, fewer than the pieces of a step": {
        "config": dict(SGD_LIKE, batch_size=2),
        "rows": [0, 3, 5],
    },
    "an adapter": {"config": {"learning_rate": 1e-3}, "lora": True},
    "layers computed twice": {"config": dict(SGD_LIKE, gradient_checkpointing=True)},
    "SAM in pieces": {"config": dict(SGD_LIKE, micro_batch_size=1), "rule": "SAM"},
    "GRU": {"config": SGD_LIKE, "ascent": True, "rule": "GRU"},
    "EL of a sample of all": {"config": dict(SGD_LIKE, check_sample=3, check_steps=1), "ma": 1.0},
    "thresholds within an epoch": {"config": dict(SGD_LIKE, check_steps=1), "ascent": True},
}


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_do_what_one_does(start, name):
    assert_same_run(start(1, **JOBS[name]), start(2, **JOBS[name]))


def test_a_sample_is_the_same_in_all_processes(start):
    """What the job of two processes above compares are samples indeed."""
    assert "sample of 3" in start(1, **JOBS["EL of a sample of all"])[0]["history"]["check"]


def test_each_active_sequence_is_trained_once(start):
    first, second = (seen["visited"] for seen in start(2, config={"batch_size": 2}, rows=[0, 3, 5]))
    assert (
        len(first) == len(second) == 2 * 2
    )  # two epochs of three chosen sequences, in batches of two and one
    shared, alone = first[0] + second[0], first[1]
    assert sorted(shared + alone) == [0, 3, 5] and len(alone) == 1
    assert second[1] == alone  # the stand-in, whose weight is 0


def test_one_active_sequence_moves_the_weights_as_in_one_process(start):
    job = {"config": dict(SGD_LIKE, max_epochs=3), "rows": [6]}
    one, two = start(1, **job), start(2, **job)
    assert_same_run(one, two)
    assert two[1]["visited"] == one[0]["visited"] == [[6]] * 3


def test_an_error_of_one_is_an_error_of_all(start):
    one, other = start(2, breaks=True, rows=list(range(8)))
    assert one["stop_reason"] == other["stop_reason"] == "non_finite_loss"
    assert all(
        torch.equal(a, b) and a.isfinite().all()
        for a, b in zip(one["weights"].values(), other["weights"].values(), strict=False)
    )


PLACES = [
    "embedder",
    "validate",
    "check",
    "refinement",
    "callback",
    *(f"{when} step {number}" for number in (1, 2, 3) for when in ("before", "after")),
]


@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_one_ends_all_with_its_message(start, place):
    """Nobody waits for a process that has failed: all get its error, whatever it is and wherever it is."""
    one, other = start(2, fails=place)
    assert other["error"] == f"ZeroDivisionError: nothing goes into {place}"
    assert one["error"] == f"ICUError: process 1 failed: {other['error']}"


def test_only_the_first_writes_and_all_resume(start, tmp_path):
    whole = start(2, config=SGD_LIKE, checkpoint_dir=str(tmp_path / "whole"))
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["epoch-00001", "epoch-00002"]
    (tmp_path / "run").mkdir()
    (tmp_path / "whole" / "epoch-00001").rename(tmp_path / "run" / "epoch-00001")
    resumed = start(2, config=SGD_LIKE, checkpoint_dir=str(tmp_path / "run"), resume_from_checkpoint=True)
    assert_same_run(whole, resumed, tolerance=0)
    assert_same_run(
        start(1, config=SGD_LIKE, checkpoint_dir=str(tmp_path / "run"), resume_from_checkpoint=True),
        resumed,
        tolerance=0,
    )  # one process reads what two wrote


def test_a_full_disk_stops_all(start, tmp_path):
    assert all(
        "cannot be written" in seen["error"]
        for seen in start(2, checkpoint_dir=str(tmp_path / "run"), no_room=True)
    )


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
        "--num_machines=1",
        "--config_file",
        str(ROOT / "configs" / "one_gpu.yaml"),
    ],
}


@pytest.mark.parametrize("launcher, world", [("torchrun", 2), ("accelerate launch", 1)])
def test_launchers(start, folder, tmp_path, launcher, world):
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        str(ROOT / "tests" / "one_of_several.py"),
        str(folder),
        str(tmp_path),
        json.dumps(job_of(SGD_LIKE, save=True)),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen = seen_in(tmp_path)
    assert [one["world"] for one in seen] == [world] * world
    pd.testing.assert_frame_equal(
        table(seen[0], "history"), table(start(1, config=SGD_LIKE)[0], "history"), rtol=0, atol=1e-5
    )
    assert (tmp_path / "saved" / "model.safetensors").exists() and not list(tmp_path.glob(".saved*"))


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="needs two GPUs: on a CPU accelerate turns FSDP into DDP without a word",
)
@pytest.mark.parametrize("config", ["ddp", "fsdp", "zero2"])
def test_two_gpus_do_what_one_does(start, folder, tmp_path, config):
    """Not run yet: no machine with two GPUs was at hand."""
    command = [
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / f"{config}.yaml"),
        "--num_processes=2",
        str(ROOT / "tests" / "one_of_several.py"),
        str(folder),
        str(tmp_path),
    ]
    subprocess.run(
        [sys.executable, "-m", *command, json.dumps(job_of(SGD_LIKE))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    history = table(seen_in(tmp_path)[0], "history")
    pd.testing.assert_frame_equal(
        history, table(start(1, config=SGD_LIKE)[0], "history"), rtol=0, atol=0.02
    )  # bf16 there, fp32 here
