"""The cells of a matrix, its record on disk, and the state that is read off a folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli_helpers import Guess

from contraflow import UserError
from contraflow.agents.online.rfm import RFM, Choice
from contraflow.agents.online.sir import SIR
from contraflow.core.optim import Optim
from contraflow.experiments.compare.matrix import (
    FAILED,
    FINAL,
    Cell,
    Matrix,
    Settings,
    failure,
    prepare,
    read_record,
    state,
    steps_taken,
)
from contraflow.policy.best_of import Softmax
from contraflow.presets import PRESETS, default_run
from contraflow.rl.critics import Critics
from contraflow.training.run import read_config

SETTINGS = Settings(steps=40, collect=10, num_envs=2, width=8, critic=Critics(depth=1, optim=Optim(0.01)))
AGENTS: dict[str, Any] = {name: PRESETS[name] for name in ("rfm", "sac", "sir")}
SIR_ONLY: dict[str, Any] = {"sir": PRESETS["sir"]}
EVERY: dict[str, Any] = AGENTS | {name: PRESETS[name] for name in ("pmd", "dacer", "td3", "ppo", "fpo")}


def record(agents, envs, seeds, settings, out, own=frozenset(), data=None) -> None:
    Matrix(out, agents, envs, settings, seeds, own, data or {}).record()


def test_every_combination_once_seed_by_seed(tmp_path: Path):
    cells = Matrix(tmp_path, AGENTS, ["probe:action", "bandit:linear/3"], SETTINGS, 2).cells()
    assert len(cells) == 12 == len({cell.folder for cell in cells})
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert [(c.agent, c.env) for c in cells[:2]] == [("rfm", "probe:action"), ("sac", "probe:action")]
    assert all((c.run.env, c.run.seed) == (c.env, c.seed) for c in cells)
    assert cells[3].folder == tmp_path / "rfm" / "bandit-linear-3" / "seed0"


def test_all_agents_share_critic_and_budget_but_those_that_keep_their_own(tmp_path: Path):
    agents = EVERY | {"paper": PRESETS["rfm-paper"]}
    cells = Matrix(tmp_path, agents, ["probe:action"], SETTINGS, 1, frozenset({"paper"})).cells()
    *fair, paper = (cell.run for cell in cells)
    for agent in (run.agent for run in fair):
        assert getattr(agent, "critic", SETTINGS.critic) == SETTINGS.critic
        flow, ppo = getattr(agent, "flow", None), getattr(agent, "ppo", None)
        actor = flow.network if flow else getattr(agent, "actor", None)
        assert actor is None or (actor.width, actor.depth) == (8, SETTINGS.depth)
        assert ppo is None or (ppo.critic.width, ppo.critic.depth) == (SETTINGS.critic.width, 1)
        optim = ppo.actor_optim if ppo else getattr(agent, "optim", None)
        assert optim is None or (optim.max_grad_norm, optim.decay_steps) == (10.0, None)
    assert paper.agent == PRESETS["rfm-paper"].agent and paper.agent.flow.network.width == 256
    assert {(run.steps, run.source.num_envs, run.env) for run in (*fair, paper)} == {(40, 2, "probe:action")}
    off = [run.source for run in (*fair, paper) if hasattr(run.source, "collect")]
    assert {(source.updates, source.collect) for source in off} == {(1, 10)} and len(off) == 7
    rfm, own = fair[0].agent, RFM()
    network = replace(rfm.flow.network, width=own.flow.network.width, depth=own.flow.network.depth)
    assert replace(rfm, flow=replace(rfm.flow, network=network), critic=own.critic) == own, "its own stays"
    ppo = fair[list(EVERY).index("ppo")]
    assert ppo.source == replace(PRESETS["ppo"].source, env="probe:action", num_envs=2), "it keeps its rollouts"
    assert (ppo.eval_every, ppo.log_every, ppo.trackers) == (10_000, 1_000, ())


def test_the_warm_up_depends_on_the_budget(tmp_path: Path):
    """As in `train`: a short comparison needs no --collect."""
    (cell,) = Matrix(tmp_path, {"sir": EVERY["sir"]}, ["probe:action"], Settings(steps=3000), 1).cells()
    assert cell.run.source.collect == 150


def test_an_agent_that_learns_from_data_is_told_from_which(tmp_path: Path):
    """One dataset for each environment; the one of its own run where none is given."""
    envs, data, agents = ["probe:action", "probe:constant"], {"probe:action": "a", "probe:constant": "b"}, dict(EVERY)
    agents["bc"] = PRESETS["bc"]
    cells = Matrix(tmp_path, agents, envs, SETTINGS, 1, data=data).cells()
    assert [(c.run.source.data, c.run.env) for c in cells if c.agent == "bc"] == [("a", envs[0]), ("b", envs[1])]
    run = next(c.run for c in cells if c.agent == "bc")
    assert (run.steps, run.source.batch_size, run.agent.flow.network.width) == (40, 256, 8)
    with pytest.raises(UserError, match=r"agent bc: it learns from a dataset: give --data, one for probe:action"):
        Matrix(tmp_path, {"bc": PRESETS["bc"]}, envs, SETTINGS).cells()
    named = {"bc": replace(PRESETS["bc"], source=replace(PRESETS["bc"].source, data="mine"))}
    assert {cell.run.source.data for cell in Matrix(tmp_path, named, envs, SETTINGS, 1).cells()} == {"mine"}
    record(named, envs, 1, SETTINGS, tmp_path / "m", data=data)
    with pytest.raises(UserError, match="data of probe:action = a, not c"):
        record(named, envs, 1, SETTINGS, tmp_path / "m", data={"probe:action": "c"})
    record(named, envs[:1], 1, SETTINGS, tmp_path / "m")
    assert read_record(tmp_path / "m")["data"] == data


def test_an_agent_without_a_shared_setting_keeps_what_it_has(tmp_path: Path):
    (cell,) = Matrix(tmp_path, {"guess": default_run(Guess())}, ["probe:action"], SETTINGS, 1).cells()
    assert cell.run.agent == Guess()
    with pytest.raises(UserError, match="agent guess: --n-step 2 needs an agent with a discount"):
        Matrix(tmp_path, {"guess": default_run(Guess())}, ["a"], replace(SETTINGS, n_step=2), 1).cells()


def test_a_second_call_may_add_but_not_change(tmp_path: Path):
    out = tmp_path / "m"
    record(SIR_ONLY, ["a"], 2, SETTINGS, out)
    record(SIR_ONLY, ["a"], 2, SETTINGS, out)
    record({"sac": PRESETS["sac"], "ppo": PRESETS["ppo"]}, ["b"], 1, SETTINGS, out)
    have = read_record(out)
    assert (list(have["agents"]), have["envs"], have["seeds"]) == (["sir", "sac", "ppo"], ["a", "b"], 2)
    before = (out / "matrix.json").read_text()
    for change, says in (
        ((SIR_ONLY, replace(SETTINGS, steps=80), frozenset()), "steps = 40, not 80"),
        (({"sir": default_run(SIR(kappa=0.5))}, SETTINGS, frozenset()), "agent sir: kappa = 1.0, not 0.5"),
        ((SIR_ONLY, SETTINGS, frozenset({"sir"})), "agent sir: own = False, not True"),
        (({"sir": PRESETS["sac"]}, SETTINGS, frozenset()), "agent sir: kind = SIR, not SAC"),
        (
            ({"ppo": replace(PRESETS["ppo"], source=replace(PRESETS["ppo"].source, unroll=64))}, SETTINGS, frozenset()),
            "agent ppo: unroll = 128, not 64",
        ),
    ):
        agents, settings, own = change
        with pytest.raises(UserError, match=f"{says}: use the same settings, or another --out"):
            record(agents, ["a"], 2, settings, out, own)
    assert (out / "matrix.json").read_text() == before


def test_a_field_that_an_older_release_did_not_know_has_its_default(tmp_path: Path):
    """Also one deep inside: a component of a mixture of an estimator of an agent."""
    agents = {"rfm": default_run(RFM()), "warm": default_run(RFM(choose=Choice(Softmax(4)), tau=0.25))}

    def forget(data, name):
        if isinstance(data, dict):
            data.pop(name, None)
        for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
            forget(value, name)

    (cell,) = Matrix(tmp_path / "m", {"rfm": default_run(RFM())}, ["probe:action"], SETTINGS, 1).cells()
    record(agents, ["a"], 1, SETTINGS, tmp_path / "m")
    prepare(cell)
    for file in (tmp_path / "m" / "matrix.json", cell.folder / "config.json"):
        data = json.loads(file.read_text())
        forget(data, "condition_on_temperature"), forget(data, "low"), forget(data, "query")
        file.write_text(json.dumps(data))
    record(agents, ["a"], 1, SETTINGS, tmp_path / "m")
    prepare(cell)
    data = json.loads((tmp_path / "m" / "matrix.json").read_text())
    del data["agents"]["warm"]["agent"]["tau"]
    (tmp_path / "m" / "matrix.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"agent warm: tau = 0.005, not 0.25"):
        record(agents, ["a"], 1, SETTINGS, tmp_path / "m")


def test_a_folder_that_is_no_matrix_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no matrix"):
        record(AGENTS, ["a"], 1, SETTINGS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 99}', "schema 99.*upgrade"),
        ('{"schema": 1}', "schema 1.*create it again"),
        ("{", "not valid JSON"),
        ("[]", "not written by contraflow"),
        ('{"schema": 2}', "damaged"),
    ],
)
def test_a_damaged_or_newer_record_is_refused(text: str, says: str, tmp_path: Path):
    (tmp_path / "matrix.json").write_text(text)
    with pytest.raises(UserError, match=says):
        record(AGENTS, ["a"], 1, SETTINGS, tmp_path)
    assert (tmp_path / "matrix.json").read_text() == text


def cell_in(out: Path) -> Cell:
    (cell,) = Matrix(out, SIR_ONLY, ["probe:action"], SETTINGS, 1).cells()
    return cell


def test_the_state_is_read_off_the_folder(tmp_path: Path):
    cell = cell_in(tmp_path)
    assert prepare(cell) == "new" and state(cell.folder) == "started"
    assert read_config(cell.folder) == cell.run
    assert prepare(cell) == "started"
    (cell.folder / FAILED).write_text(json.dumps({"reason": "no luck"}))
    assert prepare(cell) == "failed" and failure(cell.folder) == "no luck"
    (cell.folder / FINAL).write_text("{}")
    assert prepare(cell) == "done"


def test_what_a_killed_process_leaves_is_no_obstacle(tmp_path: Path):
    cell = cell_in(tmp_path)
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json.7.tmp").write_text('{"sch')
    assert prepare(cell) == "new" and read_config(cell.folder) == cell.run
    (cell.folder / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    assert steps_taken(cell.folder) == 20


def test_folders_of_others_are_refused(tmp_path: Path):
    cell = cell_in(tmp_path)
    prepare(replace(cell, run=replace(cell.run, source=replace(cell.run.source, batch_size=7))))
    with pytest.raises(UserError, match=r"another run.*source.batch_size = 7, not 256"):
        prepare(cell)
    (cell.folder / "config.json").unlink()
    (cell.folder / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="something other"):
        prepare(cell)
