"""Which runs a report takes, what it leaves out and why, and how returns become scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.cli_helpers import Guess, with_source
from tests.experiments.helpers import AGENTS, final, loose, write_matrix, write_run

from contraflow import UserError
from contraflow.agents.online.rfm import RFM
from contraflow.agents.online.sac import SAC
from contraflow.agents.online.sir import SIR
from contraflow.core.settings import to_json
from contraflow.experiments.bridge import env_steps, flat, gradient_steps
from contraflow.experiments.compare.matrix import FAILED, FINAL, cell_folder
from contraflow.experiments.report.runs import read
from contraflow.experiments.report.scores import Scale, collect, is_dmc, read_scales
from contraflow.presets import PRESETS, default_run
from contraflow.rl.critics import Critics
from contraflow.training.sources import OfflineToOnline

DMC = "envpool:CheetahRun-v1"


def cell(out: Path, agent: str, env: str = "probe:action", seed: int = 0) -> Path:
    return cell_folder(out, agent, env, seed)


def test_all_runs_of_a_matrix(tmp_path: Path):
    records, left = read(write_matrix(tmp_path))
    assert left == {} and len(records) == 30
    keys = [(r.agent, r.env, r.seed) for r in records]
    assert keys == sorted(keys) and keys[0] == ("rfm", DMC, 0)
    assert records[0].cost == {"particles": 32, "nfe": 6, "critic_calls": 32}


def test_what_is_left_out_and_why(tmp_path: Path):
    out = write_matrix(tmp_path, seeds=5)
    (cell(out, "rfm") / "eval.csv").write_text("step,seconds,return_mean\n20,1,3\n")
    (cell(out, "rfm", seed=1) / FAILED).write_text(json.dumps({"reason": "critic_loss became nan"}))
    (cell(out, "rfm", seed=2) / FINAL).unlink()
    (cell(out, "rfm", seed=3) / "config.json").write_text("{")
    (cell(out, "rfm", seed=4) / FINAL).write_text("{}")
    (cell(out, "sac") / "config.json").write_text('{"schema": 99}')
    (cell(out, "sac", seed=1) / "config.json").write_text('{"mine": 1}')
    (cell(out, "sac", seed=2) / "config.json").unlink()
    (cell(out, "sac", seed=3) / "eval.csv").write_text("step,seconds,return_mean\nx,y,z\n")
    for path in (seed4 := cell(out, "sac", seed=4)).iterdir():
        path.unlink()
    seed4.rmdir()
    (out / "holiday").mkdir()
    (out / "holiday" / "photo.jpg").write_bytes(b"")
    write_run(out / "extra", loose(), [1.0])
    records, left = read(out)
    assert len(records) == 20 and not any(r.agent in ("rfm", "sac") and r.env == "probe:action" for r in records)
    reasons = dict(left)
    for place, word in {
        "rfm/probe-action/seed0": "is not finished (40 of 40 steps)",
        "rfm/probe-action/seed1": "failed: critic_loss became nan",
        "rfm/probe-action/seed2": "is trained, but not evaluated yet",
        "rfm/probe-action/seed3": "config.json is damaged",
        "rfm/probe-action/seed4": "final.json is damaged",
        "sac/probe-action/seed0": "schema 99",
        "sac/probe-action/seed1": "was not written by contraflow",
        "sac/probe-action/seed2": "is not the folder of a run",
        "sac/probe-action/seed3": "eval.csv is damaged",
        "sac/probe-action/seed4": "not started",
        "holiday": "is not a cell of this matrix",
        "extra": "is not a cell of this matrix",
    }.items():
        assert word in reasons.pop(place), place
    assert reasons == {}


def test_any_folder_of_runs(tmp_path: Path):
    """Runs of `contraflow train`: agents are named by kind, and numbered when their settings differ."""
    write_run(tmp_path / "a", loose(0), [1.0])
    write_run(tmp_path / "deep/b", loose(1), [2.0])
    write_run(tmp_path / "c", loose(0, agent=SIR(critic=Critics(width=16))), [3.0])
    write_run(tmp_path / "d", loose(0, agent=SAC()), [4.0])
    write_run(tmp_path / "e", loose(0, agent=Guess()), [5.0])
    write_run(tmp_path / "f", loose(1), [2.5])
    (tmp_path / "notes.txt").write_text("beside the runs: not worth a word")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "x.png").write_bytes(b"")
    records, left = read(tmp_path)
    assert [(r.agent, r.seed) for r in records] == [("guess", 0), ("sac", 0), ("sir 1", 0), ("sir 1", 1), ("sir 2", 0)]
    assert records[0].cost is None, "code outside the library is not imported"
    assert {place: reason.split(" (")[0] for place, reason in left.items()} == {
        "f": "repeats the settings and the seed of b", "plots": "is not the folder of a run",
    }  # fmt: skip
    assert [r.folder.name for r in read(tmp_path / "a")[0]] == ["a"], "one run is a folder of runs"


def test_nothing_to_report(tmp_path: Path):
    with pytest.raises(UserError, match="is not a folder"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="there is no finished run"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"1 left out, the first \(\.\): is not the folder of a run"):
        read(tmp_path)


def test_gradient_steps():
    """3 updates after each step of 2 environments, from step 10 on."""
    run = flat(to_json(loose(num_envs=2, updates=3, collect=10)))
    assert [gradient_steps(run, step) for step in (0, 10, 12, 40)] == [0, 0, 3, 45]
    run = flat(to_json(loose(num_envs=4, updates=1, collect=10)))
    assert gradient_steps(run, 16) == 1, "warm-up ends with a whole round, at 12"


def test_steps_of_every_kind_of_run():
    """An on-policy run takes epochs x minibatches after each rollout; a dataset takes the place of an environment; and
    offline-to-online begins with steps of the one kind and goes on with those of both."""
    ppo = flat(to_json(with_source(PRESETS["ppo"], num_envs=2, unroll=16)))
    assert (env_steps(ppo, 64), gradient_steps(ppo, 64)) == (64, 2 * 10 * 32)
    bc = flat(to_json(with_source(PRESETS["bc"], data="set", env="probe:action")))
    assert (env_steps(bc, 40), gradient_steps(bc, 40)) == (None, 40)
    both = OfflineToOnline("set", "probe:action", offline_steps=30, num_envs=2, updates=3)
    both = flat(to_json(replace(PRESETS["rfm"], source=both)))
    assert [(env_steps(both, step), gradient_steps(both, step)) for step in (20, 30, 40)] == [
        (0, 20),
        (0, 30),
        (10, 45),
    ]
    mine = flat(to_json(default_run(Guess())))
    assert gradient_steps(mine | {"source": "Rollouts"}, 40) is None, "an agent that does not say how many"


def test_runs_of_every_kind(tmp_path: Path):
    """On-policy and offline runs beside off-policy ones; one without an environment was never evaluated."""
    write_run(tmp_path / "sir", loose(), [1.0, 2.0])
    write_run(tmp_path / "ppo", replace(with_source(PRESETS["ppo"], env="probe:obs-action"), steps=40), [3.0, 5.0])
    offline = replace(with_source(PRESETS["bc"], data="set", env="probe:obs-action"), steps=40)
    write_run(tmp_path / "bc", offline, [2.0, 4.0])
    write_run(tmp_path / "blind", with_source(offline, env=""), [])
    records, left = read(tmp_path)
    assert [(r.agent, r.cost and r.cost["nfe"]) for r in records] == [("bc", 10), ("ppo", 1), ("sir", 0)]
    assert left == {"blind": "was not evaluated: it has no environment"}
    curves = [record.curve("steps") for record in records]
    assert curves[0] is None and curves[1] is not None and curves[1][1].tolist() == [3, 5]
    assert all(record.curve(by) is not None for record in records for by in ("updates", "time"))
    table = collect(records, {})
    assert table.returns["ppo"]["probe:obs-action"] == {0: 5.0} and table.scores["ppo"].tolist() == [[1.0]]


def test_returns_by_rule(tmp_path: Path):
    table = collect(read(write_matrix(tmp_path))[0], {})
    assert [(m.name, m.effort) for m in table.methods] == [
        ("rfm", "32 x 6 NFE, 32 Q"),
        ("rfm, one particle", "32 x 6 NFE, 32 Q"),
        ("rfm, uniform actions instead of its actor", "32 x 6 NFE, 32 Q"),
        ("sac", "1 x 1 NFE, 0 Q"),
        ("sir", "32 x 0 NFE, 32 Q"),
    ]
    assert table.returns["sac"]["probe:action"] == {seed: 10.0 + seed for seed in range(5)}
    assert table.best["sac"]["probe:action"] == {seed: 11.0 + seed for seed in range(5)}
    assert "2 fresh episodes" in table.source


def test_without_the_evaluation_after_training_the_last_one_during_it(tmp_path: Path):
    write_run(tmp_path / "a", loose(0), [1.0, 7.0], final(SIR(), 100.0))
    write_run(tmp_path / "b", loose(1), [1.0, 8.0])
    table = collect(read(tmp_path)[0], {})
    assert table.returns == {"sir": {"probe:obs-action": {0: 7.0, 1: 8.0}}} and "last row of eval.csv" in table.source


def test_scales(tmp_path: Path):
    records, _ = read(write_matrix(tmp_path))
    found = collect(records, {}).scales
    dmc, probe = found[DMC], found["probe:action"]
    assert isinstance(dmc, Scale) and (dmc.low, dmc.high) == (0, 1000) and "DeepMind" in dmc.reason
    assert isinstance(probe, Scale) and (probe.low, probe.high) == (0.0, 24.0), "random actions, the best run of sir"
    assert probe(12.0) == 0.5
    given = collect(records, {DMC: (100.0, 200.0)}).scales[DMC]
    assert isinstance(given, Scale) and given(150.0) == 0.5 and given.reason == "given table of scales"


def test_no_scale_where_all_returns_are_the_same(tmp_path: Path):
    for seed, why in enumerate(("there is only one run", "no run is better than lowest evaluation")):
        write_run(tmp_path / str(seed), loose(seed), [3.0, 3.0])
        table = collect(read(tmp_path)[0], {})
        assert table.scales == {"probe:obs-action": why} and table.scores == {}
        assert table.notes == [f"probe:obs-action is left out of the aggregates: {why}"]


def test_tasks_of_the_control_suite():
    assert is_dmc("gym:dm_control/cheetah-run-v0") and is_dmc("dm_control/cheetah-run-v0")
    assert not any(map(is_dmc, ("gym:HalfCheetah-v5", "envpool:HalfCheetah-v5", "envpool:Hopper-v5", "probe:action")))
    assert not is_dmc("envpool:LqrLqr21-v1") and not is_dmc("gym:dm_control/lqr-lqr_2_1-v0")
    registry = pytest.importorskip("envpool.registration").registry
    families = {id: spec[0] for id, spec in registry.specs.items()}
    dmc = {id for id, family in families.items() if family.endswith(".dmc")}
    assert {id for id in families if is_dmc(f"envpool:{id}")} == dmc - {"LqrLqr21-v1", "LqrLqr62-v1"}


def test_scores_are_rectangular_and_say_what_is_missing(tmp_path: Path):
    out = write_matrix(tmp_path, seeds=3)
    (cell(out, "sac", DMC, 1) / FINAL).unlink()
    records, _ = read(out)
    data = collect(records, {})
    assert list(data.tasks) == [DMC, "probe:action"]
    assert np.allclose(data.scores["sac"], [[0.1, 10 / 22], [0.12, 12 / 22]]), "seeds 0 and 2"
    assert data.scores["sir"].shape == (3, 2)
    assert data.notes == ["sac: 1 run is left out of the aggregates, since the seed is not finished on every task"]
    for seed in (0, 2):
        (cell(out, "sac", DMC, seed) / FINAL).unlink()
    records, _ = read(out)
    data = collect(records, {})
    assert list(data.tasks) == ["probe:action"] and data.scores["sac"].shape == (3, 1)
    assert data.notes == [f"{DMC} is left out of the aggregates: no finished run of sac"]


def test_the_table_of_the_user(tmp_path: Path):
    path = tmp_path / "scores.csv"
    path.write_text("env,low,high\na,0,10\nb,-1,1.5\n")
    assert read_scales(path) == {"a": (0, 10), "b": (-1, 1.5)}
    for text in ("env,low\na,0\n", "env,low,high\na,0,x\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="columns env,low,high"):
            read_scales(path)
    path.write_text("env,low,high\na,1,1\n")
    with pytest.raises(UserError, match="low must be less than high"):
        read_scales(path)
    with pytest.raises(UserError, match="columns env,low,high"):
        read_scales(tmp_path / "absent.csv")


def test_agents_keep_their_names_from_the_matrix(tmp_path: Path):
    agents = {"paper": AGENTS["rfm"], "mine": replace(AGENTS["rfm"], agent=RFM(tau=0.5)), "sir": AGENTS["sir"]}
    records, _ = read(write_matrix(tmp_path, ["probe:action"], 1, agents, frozenset({"paper"})))
    assert [(r.agent, r.own) for r in records] == [("mine", False), ("paper", True), ("sir", False)]
