"""One process of a run that several share; the first one writes what came of it.

test_processes.py forks it, and starts it through launchers too.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from icu_nb.config import ICUConfig
from icu_nb.errors import ICUError
from icu_nb.iur import Thresholds
from icu_nb.methods.step_rules import GRU, SAM
from icu_nb.models.loading import add_lora
from icu_nb.objective import ICU, GradientAscent, Objective
from icu_nb.unlearn import unlearn


class Watched(Objective):
    "An objective, with a note of whom this process trains."

    needs_reference = ("neighbor",)

    def __init__(self, inner, breaks=False, fails=""):
        self.inner, self.breaks, self.fails, self.visited = inner, breaks, fails, []

    def validate(self, model, task):
        self.fail_at("validate")

    def fail_at(self, place):
        """An error in the second process, if the job wants one there."""
        if place == self.fails and PartialState().process_index == 1:
            raise ZeroDivisionError(f"nothing goes into {place}")

    def __call__(self, model, batch, reference):
        self.visited.append(batch.forget.rows.tolist())
        self.fail_at(f"before step {len(self.visited)}")
        terms = self.inner(model, batch, reference)
        self.fail_at(f"after step {len(self.visited)}")
        broken = self.breaks and len(self.visited) == 3 and PartialState().process_index == 1
        return {name: value * float("nan") for name, value in terms.items()} if broken else terms


def only(rows):
    """A refinement that always picks these."""

    def chosen(scores, thresholds):
        return scores["id"].isin(rows).to_numpy()

    return chosen


def no_file(thing, file, save=torch.save, **options):
    """A full disk: what is sent to another process still goes through memory."""
    if isinstance(file, (str, Path)):
        raise OSError(28, "No space left on device")
    save(thing, file, **options)


def main(folder, out, job):
    """Do a job from the folder's model and texts; write what this process saw."""
    torch.set_num_threads(1)
    folder, out, config, texts = (
        Path(folder),
        Path(out),
        ICUConfig(**job["config"]),
        json.loads((Path(folder) / "texts.json").read_text()),
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    if job.get("lora"):
        torch.manual_seed(0)
        model = add_lora(model, 4)
    objective = Watched(
        GradientAscent() if job.get("ascent") else ICU(config.alpha, config.beta),
        job.get("breaks"),
        job.get("fails"),
    )

    def at(place, result):
        def function(*arguments, **settings):
            objective.fail_at(place)
            return result(*arguments, **settings) if result else None

        return function

    options = {"refinement": only(job["rows"])} if "rows" in job else {}
    options["step_rule"] = {"SAM": SAM(), "GRU": GRU(), None: None}[job.get("rule")]
    if "fails" in job:
        options |= {
            "callback": at("callback", None),
            "refinement": at("refinement", only(range(8))),
            "embedder": at("embedder", lambda texts: np.random.default_rng(0).normal(size=(len(texts), 4))),
        }
        model.generate = at("check", model.generate)
    no_room = (
        job.get("no_room") and os.environ.get("RANK", "0") == "0"
    )  # accelerate is not asked: the first question settles what it takes itself for
    try:
        with patch("torch.save", no_file) if no_room else nullcontext():
            result = unlearn(
                model,
                tokenizer,
                texts["forget"],
                texts["retain"],
                config,
                objective=objective,
                thresholds=Thresholds(ma=job.get("ma", 0.0), el=0.0),
                checkpoint_dir=job.get("checkpoint_dir"),
                resume_from_checkpoint=job.get("resume_from_checkpoint", False),
                **options,
            )
    except (ICUError, ZeroDivisionError) as error:
        seen = {"error": f"{type(error).__name__}: {error}"}
    else:
        seen = {
            "stop_reason": result.stop_reason,
            "history": result.history.to_dict("list"),
            "samples": result.samples.to_dict("list"),
            "weights": {name: p.detach() for name, p in result.model.named_parameters()},
        }
        if job.get("save"):
            result.save_pretrained(out / "saved")
    rank, world = PartialState().process_index, PartialState().num_processes
    torch.save({"world": world, "visited": objective.visited, **seen}, out / f"rank{rank}.pt")
    if world > 1:
        PartialState().wait_for_everyone()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
