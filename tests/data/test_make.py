"""OGBench's datasets made here: the same for a seed whatever made them, in the package's own layout."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ogbench")

from tests.cli_helpers import assert_refused, cli

from contraflow.core.types import UserError
from contraflow.data.datasets.readers import load
from contraflow.data.make import make
from contraflow.data.make.episodes import Maker
from contraflow.data.make.ogbench import NAMES, find

SET, STEPS = "ogbench:pointmaze-medium-stitch", 200


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_a_set_follows_from_its_seed_alone(tmp_path: Path):
    """Bitwise: by one process or two, with what a shorter one has first, and with no episode twice."""
    one, two, more, other = (tmp_path / f"{name}.npz" for name in ("one", "two", "more", "other"))
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert make(SET, 3 * STEPS - 1, one) and make(SET, 3 * STEPS, two, jobs=2) and make(SET, 5 * STEPS, more)
    assert make(SET, STEPS, other, seed=1)
    assert (np.random.get_state()[1] == state).all(), "the global generator is left alone"  # noqa: NPY002
    assert one.read_bytes() == two.read_bytes()
    short, long = arrays(one), arrays(more)
    rows = 3 * (STEPS + 1)
    assert all((long[key][:rows] == short[key]).all() for key in short)
    walks = [*np.split(long["observations"], 5), arrays(other)["observations"]]
    assert len({walk.tobytes() for walk in walks}) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.npz", "one.npz", "other.npz", "two.npz"]


def test_an_episode_does_not_know_what_was_made_before_it():
    maker = Maker(find("ogbench:pointmaze-medium-navigate", 3))
    first, second = maker.episode(0), maker.episode(1)
    for number, made in ((1, second), (0, first)):
        again = Maker(find("ogbench:pointmaze-medium-navigate", 3)).episode(number)
        assert all((again[key] == made[key]).all() for key in made)


def test_what_was_stopped_goes_on(tmp_path: Path):
    whole, parts, told = tmp_path / "whole.npz", tmp_path / "parts.npz", []
    make(SET, 4 * STEPS, whole)
    assert not make(SET, 4 * STEPS, parts, progress=lambda rows: told.append(rows) or rows >= 2 * STEPS)
    assert told == [0, STEPS, 2 * STEPS] and not parts.exists()
    with pytest.raises(UserError, match=r"holds episodes of another set \(name ogbench:pointmaze-"):
        make(SET, STEPS, parts, seed=1)
    told.clear()
    assert make(SET, 4 * STEPS, parts, jobs=2, progress=lambda rows: told.append(rows) or False)
    assert told[0] == 2 * STEPS, "finished episodes are not made again"
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_loses_nothing(jobs: int, tmp_path: Path):
    out = tmp_path / "walks.npz"
    flags = ["data", "make", SET, "--rows", "400000", "--jobs", str(jobs), "--out", str(out)]
    command = [sys.executable, "-m", "contraflow", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    folder, late = tmp_path / "walks.npz.making", time.monotonic() + 60
    while len(list(folder.glob("0*.npz"))) < 4 and time.monotonic() < late:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said + errors and said.count("interrupted with") == 1
    done = len(list(folder.glob("0*.npz")))
    assert f"interrupted with {done * STEPS:,} rows, which are kept: contraflow data make {SET}" in said


# as the package has it


def test_the_package_reads_it_and_so_do_we(tmp_path: Path):
    from ogbench import load_dataset

    path = tmp_path / "walks.npz"
    make("ogbench:pointmaze-medium-navigate", 2000, path)
    ours, theirs = load(path, task="pointmaze-medium-singletask-task1-v0"), load_dataset(path)
    assert len(ours) == 2000 and ours.lengths.tolist() == [1000, 1000]
    for mine, name in ((ours.obs, "observations"), (ours.action, "actions"), (ours.next_obs, "next_observations")):
        np.testing.assert_array_equal(mine, theirs[name])
    assert set(np.unique(ours.reward)) <= {-1, 0} and (ours.terminated == (ours.reward == 0)).all()


def test_walks_arrive(tmp_path: Path):
    """A short walk of four cells takes 16 m at .2 m a step: it is near its goal long before its 200 steps are over."""
    maker = Maker(find("ogbench:pointmaze-large-stitch", 0))
    rows = [maker.episode(i) for i in range(8)]
    for walk in rows:
        assert walk["observations"].shape == (201, 2) and walk["terminals"].sum() == walk["terminals"][-1] == 1
        way = np.linalg.norm(walk["observations"][-1] - walk["observations"][0])
        assert 4 < way < 20
        steps = np.linalg.norm(np.diff(walk["observations"][-50:], axis=0), axis=1)
        assert steps.mean() < 0.2 * np.sqrt(2) + 1e-3 and abs(walk["actions"]).max() <= 1
    maker = Maker(find("ogbench:pointmaze-medium-navigate", 0))
    for walk in (maker.episode(i)["observations"] for i in range(4)):
        assert len(walk) == 1001 and np.ptp(walk, axis=0).min() > 12, "it goes all over the maze, and stays nowhere"


@pytest.mark.parametrize(
    ("name", "columns", "objects"),
    [
        ("cube-single-play", (28, 21, 20), {"cube"}),
        ("cube-double-noisy", (37, 28, 26), {"cube"}),
        ("scene-play", (40, 25, 24), {"cube", "button", "drawer", "window"}),
        ("puzzle-3x3-play", (55, 23, 23), {"button"}),
    ],
)
def test_an_arm_moves_what_there_is(name: str, columns: tuple[int, ...], objects: set[str]):
    """Two episodes of 1001 states; actions in [-1, 1] that are not all at a bound; every kind of target is moved."""
    maker = Maker(find(f"ogbench:{name}"))
    assert set(maker._source.oracles) == objects
    episodes = [maker.episode(i) for i in range(2)]
    moved = set()
    for rows in episodes:
        assert [rows[key].shape for key in ("observations", "qpos", "qvel")] == [(1001, n) for n in columns]
        assert rows["actions"].shape == (1001, 5) and abs(rows["actions"]).max() <= 1
        assert 0 < (abs(rows["actions"]) == 1).mean() < 0.5 and rows["actions"].std(0)[:4].min() > 0.1
        assert rows["terminals"].nonzero()[0].tolist() == [1000]
        assert {rows[key].dtype.name for key in ("observations", "actions", "qpos", "qvel")} == {"float32"}
        if "button" in objects and (np.diff(rows["button_states"], axis=0) != 0).any():
            moved.add("button")
        if "cube" in objects and np.ptp(rows["qpos"][:, 14:16], axis=0).max() > 0.1:
            moved.add("cube")
        if name.startswith("scene"):
            moved |= {part for part, at in (("drawer", 23), ("window", 24)) if np.ptp(rows["qpos"][:, at]) > 0.1}
    assert moved == objects


def test_names():
    assert find("ogbench:cube-single-play-v0").name == "ogbench:cube-single-play"
    assert len(NAMES) == len(set(NAMES)) == 28
    import gymnasium

    assert all(f"{name.rpartition('-')[0]}-v0" in gymnasium.registry for name in NAMES)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("ogbench:cube-singel-play --out a.npz", ["did you mean 'ogbench:cube-single-play'"]),
        ("cube-single-play --out a.npz", ["did you mean 'ogbench:cube-single-play'"]),
        ("ogbench:antmaze-large-navigate --out a.npz", ["trained policies", "download"]),
        (f"{SET} --out a.npy", ["ends in .npz"]),
        (f"{SET} --out there.npz", ["already exists"]),
        (f"{SET} --out /proc/nowhere/a.npz", ["cannot be created", "choose another --out"]),
        (f"{SET} --out a.npz --rows 0", ["must be at least 1"]),
        (SET, ["--out"]),
    ],
)
def test_mistakes(args: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("there.npz").touch()
    assert_refused(["data", "make", *args.split()], *words)
    assert os.listdir() == ["there.npz"]


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(["data", "make", SET, "--out", str(tmp_path / "a.npz")], 'pip install "contraflow[ogbench]"')
    assert not list(tmp_path.iterdir())


def test_make_on_the_command_line(tmp_path: Path):
    out = tmp_path / "new" / "walks.npz"
    code, said, errors = cli("data", "make", SET, "--rows", "300", "--out", str(out))
    assert code == 0 and not errors
    assert "written" in said and "400 rows" in said and f"contraflow data info {out}" in said
