"""Each evaluation in eval.csv names the policy, the seed, the episodes and the executed steps of a chunk."""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

from tests.cli_helpers import TINY, Guess, with_source

from contraflow import train
from contraflow.training.log import Log, read_evaluations

RUN = replace(TINY, agent=Guess(), seed=7)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_row_names_its_policy(tmp_path: Path):
    """`sha256sum policy/model.safetensors` begins with the revision of the last row."""
    train(RUN, tmp_path, quiet=True)
    rows = table(tmp_path)
    assert [(row["step"], row["seed"], row["episodes"], row["executed"]) for row in rows] == [
        ("20", "7", "2", "1"), ("40", "7", "2", "1"),
    ]  # fmt: skip
    file = hashlib.sha256((tmp_path / "policy/model.safetensors").read_bytes()).hexdigest()
    assert rows[-1]["revision"] == file[:12] != rows[0]["revision"]


def test_numbers_are_read_from_new_and_old_files(tmp_path: Path):
    log = Log(tmp_path, (), {})
    log.evaluation(1, {"seed": 12345678, "revision": "0123456789e1", "return_mean": 2.0, "success": None})
    assert read_evaluations(tmp_path) == [{"step": 1, "seed": 12345678, "return_mean": 2}]
    (tmp_path / "eval.csv").write_text("step,seconds,return_mean\n1,0.5,2\n")
    log.evaluation(2, {"seconds": 1.0, "seed": 3, "revision": "abc", "return_mean": 4.0})
    assert (tmp_path / "eval.csv").read_text() == "step,seconds,return_mean\n1,0.5,2\n2,1,4\n"
    assert read_evaluations(tmp_path, "return_mean")[1] == {"step": 2, "seconds": 1, "return_mean": 4}


def test_the_executed_steps_of_a_chunk(tmp_path: Path):
    train(with_source(replace(TINY, seed=7), horizon=3, execute=2, updates=0), tmp_path, quiet=True)
    assert {row["executed"] for row in table(tmp_path)} == {"2"}
