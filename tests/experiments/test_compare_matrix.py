"""The cells of a matrix, its record on disk, and the state that is read off a folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cli_helpers import Guess

from contraflow import RFM, SAC, SIR, UserError
from contraflow.agents import DACER, PMD
from contraflow.experiments.compare.matrix import (
    FAILED,
    FINAL,
    Cell,
    Settings,
    failure,
    plan,
    prepare,
    read_record,
    record,
    state,
    steps_taken,
)
from contraflow.policy.select import Softmax
from contraflow.presets import PRESETS
from contraflow.rl.critics import Critics
from contraflow.training.run import read_config

SETTINGS = Settings(steps=40, collect=10, num_envs=2, width=8, critic=Critics(depth=1, lr=0.01))
AGENTS = {"rfm": RFM(), "sac": SAC(), "sir": SIR()}
EQUAL = AGENTS | {"pmd": PMD(), "dacer": DACER()}
NONE: frozenset[str] = frozenset()


def test_every_combination_once_seed_by_seed(tmp_path: Path):
    cells = plan(AGENTS, ["probe:action", "bandit:linear/3"], 2, SETTINGS, NONE, tmp_path)
    assert len(cells) == 12 == len({cell.folder for cell in cells})
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert [(c.agent, c.env) for c in cells[:2]] == [("rfm", "probe:action"), ("sac", "probe:action")]
    assert all((c.run.env, c.run.seed) == (c.env, c.seed) for c in cells)
    assert cells[3].folder == tmp_path / "rfm" / "bandit-linear-3" / "seed0"


def test_all_agents_share_critic_and_budget_but_those_that_keep_their_own(tmp_path: Path):
    agents = EQUAL | {"paper": PRESETS["rfm-paper"].agent}
    cells = plan(agents, ["probe:action"], 1, SETTINGS, frozenset({"paper"}), tmp_path)
    *fair, paper = (cell.run for cell in cells)
    for run in fair:
        assert run.agent.critic == SETTINGS.critic and getattr(run.agent, "width", 8) == 8
        policy = getattr(run.agent, "policy", None)
        assert policy is None or (policy.width, policy.depth) == (8, SETTINGS.depth)
    assert paper.agent == PRESETS["rfm-paper"].agent and paper.agent.width == 256
    assert {(run.steps, run.num_envs, run.updates, run.collect) for run in (*fair, paper)} == {(40, 2, 1, 10)}
    assert replace(fair[0].agent, width=64, critic=Critics()) == RFM(), "what is the agent's own stays"


def test_an_agent_without_a_shared_setting_keeps_what_it_has(tmp_path: Path):
    (cell,) = plan({"guess": Guess()}, ["probe:action"], 1, SETTINGS, NONE, tmp_path)
    assert cell.run.agent == Guess()
    with pytest.raises(UserError, match="agent guess: n_step=2 needs an agent with a discount"):
        plan({"guess": Guess()}, ["probe:action"], 1, replace(SETTINGS, n_step=2), NONE, tmp_path)


def test_a_second_call_may_add_but_not_change(tmp_path: Path):
    out = tmp_path / "m"
    record({"sir": SIR()}, ["a"], 2, SETTINGS, NONE, out)
    record({"sir": SIR()}, ["a"], 2, SETTINGS, NONE, out)
    record({"sac": SAC()}, ["b"], 1, SETTINGS, NONE, out)
    have = read_record(out)
    assert (list(have["agents"]), have["envs"], have["seeds"]) == (["sir", "sac"], ["a", "b"], 2)
    before = (out / "matrix.json").read_text()
    for change, says in (
        ((SIR(), replace(SETTINGS, steps=80), NONE), "steps = 40, not 80"),
        ((SIR(base=0.5), SETTINGS, NONE), "agent sir: base = 1.0, not 0.5"),
        ((SIR(), SETTINGS, frozenset({"sir"})), "agent sir: own = False, not True"),
    ):
        agent, settings, own = change
        with pytest.raises(UserError, match=f"{says}: use the same settings, or another --out"):
            record({"sir": agent}, ["a"], 2, settings, own, out)
    assert (out / "matrix.json").read_text() == before


def test_a_field_that_an_older_release_did_not_know_has_its_default(tmp_path: Path):
    """Also one deep inside: a component of a mixture of an estimator of an agent."""
    agents = {"rfm": RFM(), "warm": RFM(explore=Softmax(4), t_min=0.25)}

    def forget(data, name):
        if isinstance(data, dict):
            data.pop(name, None)
        for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
            forget(value, name)

    (cell,) = plan({"rfm": RFM()}, ["probe:action"], 1, SETTINGS, NONE, tmp_path / "m")
    record(agents, ["a"], 1, SETTINGS, NONE, tmp_path / "m")
    prepare(cell)
    for file in (tmp_path / "m" / "matrix.json", cell.folder / "config.json"):
        data = json.loads(file.read_text())
        forget(data, "control"), forget(data, "low"), forget(data, "query")
        file.write_text(json.dumps(data))
    record(agents, ["a"], 1, SETTINGS, NONE, tmp_path / "m")
    prepare(cell)
    data = json.loads((tmp_path / "m" / "matrix.json").read_text())
    del data["agents"]["warm"]["agent"]["t_min"]
    (tmp_path / "m" / "matrix.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"agent warm: t_min = 0.01, not 0.25"):
        record(agents, ["a"], 1, SETTINGS, NONE, tmp_path / "m")


def test_a_folder_that_is_no_matrix_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no matrix"):
        record(AGENTS, ["a"], 1, SETTINGS, NONE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"schema": 99}', "schema 99.*upgrade"), ("{", "damaged"), ("[]", "damaged"), ('{"schema": 1}', "damaged")],
)
def test_a_damaged_or_newer_record_is_refused(text: str, says: str, tmp_path: Path):
    (tmp_path / "matrix.json").write_text(text)
    with pytest.raises(UserError, match=says):
        record(AGENTS, ["a"], 1, SETTINGS, NONE, tmp_path)
    assert (tmp_path / "matrix.json").read_text() == text


def cell_in(out: Path) -> Cell:
    (cell,) = plan({"sir": SIR()}, ["probe:action"], 1, SETTINGS, NONE, out)
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
    (cell.folder / "config.json.tmp").write_text('{"sch')
    assert prepare(cell) == "new" and read_config(cell.folder) == cell.run
    (cell.folder / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    assert steps_taken(cell.folder) == 20


def test_folders_of_others_are_refused(tmp_path: Path):
    cell = cell_in(tmp_path)
    prepare(replace(cell, run=replace(cell.run, batch_size=7)))
    with pytest.raises(UserError, match=r"another run.*batch_size = 7, not 256"):
        prepare(cell)
    (cell.folder / "config.json").unlink()
    (cell.folder / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="something else"):
        prepare(cell)
