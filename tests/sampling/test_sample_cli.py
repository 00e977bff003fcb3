import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.closeness import assert_close

from contraflow.cli.sample import sample_command as main
from contraflow.core.types import UserError
from contraflow.sampling.compare import Settings
from contraflow.sampling.targets import find_target, from_function

TINY = ["--steps", "4", "--batch", "4", "--samples", "4", "--width", "8", "--points", "50", "--no-progress"]
TINY += ["--solver-steps", "2", "3"]

MODULE = """
import jax.numpy as jnp

def ring(x):
    return -0.5 * ((jnp.sqrt(x @ x + 1e-12) - 2.0) / 0.2) ** 2

def wide(x):
    return -0.005 * x @ x

def vector(x):
    return x

def broken(x):
    return jnp.log(x[0])

def numeric(x):
    import math
    return math.exp(x[0])

number = 3.0
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_densities.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_densities", raising=False)
    return "my_densities"


@pytest.mark.parametrize("methods", [("qne",), pytest.param(("rfm", "qne"), marks=pytest.mark.slow)])
def test_the_command_writes_results_and_a_picture(methods, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "run"
    main(["two-moons", *TINY, "--seeds", "2", "--methods", *methods, "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert results["density_calls"] == 4 * 4 * 4
    assert {(r["method"], r["solver_steps"], r["seed"]) for r in results["rows"]} == {
        (m, s, i) for m in methods for s in (2, 3) for i in (0, 1)
    }
    assert (out / "samples.png").read_bytes()[:4] == b"\x89PNG"
    text = capsys.readouterr().out
    for word in (*methods, "exact", "sliced W", "MMD^2", "Sinkhorn", "samples.png"):
        assert word in text
    with pytest.raises(UserError, match="already holds results"):
        main(["two-moons", *TINY, "--out", str(out)])


@pytest.mark.slow
def test_many_dimensions_and_annealing(tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["many-well-32", *TINY, "--methods", "fab", "idem-ve", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["log_z"]["exact"] == pytest.approx(164.69568, rel=1e-5) and len(results["log_z"]["fab"]) == 1
    assert (tmp_path / "run" / "samples.png").exists()
    assert "log Z by fab: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_user_function_has_exact_samples_too(tmp_path: Path, user_module: str):
    main([f"{user_module}:ring", *TINY, "--methods", "qne", "--trust", "all", "--out", str(tmp_path / "ring")])
    assert (tmp_path / "ring" / "samples.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["two-mons"], "did you mean 'two-moons'"),
        (["zzz"], "eight-gaussians"),
        (["two-moons", "--methods", "rmf"], "did you mean 'rfm'"),
        (["two-moons", "--methods", "fob"], "did you mean 'fab'"),
        (["many-well"], "did you mean 'many-well-32'"),
        (["my_densities:ring"], "--trust my_densities"),
        (["my_densities:rong", "--trust", "all"], "my_densities:rong"),
        (["my_densities:wide", "--trust", "all"], "pass a larger --box"),
        (["my_densities:vector", "--trust", "all"], "must return one number"),
        (["my_densities:broken", "--trust", "all"], "NaN or infinite"),
        (["my_densities:numeric", "--trust", "all"], "failed on a JAX array"),
        (["my_densities:number", "--trust", "all"], "is not a function"),
    ],
)
def test_mistakes_are_named(args: list[str], message: str, user_module: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        main([*args, *TINY, "--out", str(tmp_path / "out")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong", ["--steps=0", "--seeds=0", "--solver-steps=0", "--samples=-3", "--box=0", "--seed=-1", "--points=1"]
)
def test_values_out_of_range_are_refused(wrong: str):
    with pytest.raises(UserError):
        main(["two-moons", wrong])


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("contraflow.sampling.compare.train", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be created .*: choose another --out"):
        main(["two-moons", "--out", str(tmp_path / "file/new")])


def test_calls_that_make_no_whole_chains_are_refused():
    with pytest.raises(UserError, match=r"fab makes 1 \+ 63 density calls per chain"):
        main(["two-moons", "--methods", "fab", "--batch", "5", "--samples", "3"])


def test_without_ott_nothing_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "ott", None)
    with pytest.raises(UserError, match=r"contraflow\[sample\]"):
        main(["two-moons", *TINY, "--out", str(tmp_path / "out")])


def test_samples_from_a_table_follow_the_density():
    def log_density(x):  # two unequal boxes of different width, smooth edges not needed
        return jnp.log(jnp.where(x[0] > 1.0, 3.0, 1.0)) - 0.5 * ((x[1] - 0.5) / 0.3) ** 2 - 8.0 * (jnp.abs(x[0]) > 2)

    x = np.asarray(from_function("test", log_density, 4.0).sample(jr.key(0), 20_000))
    error = 4 / 20_000**0.5  # four standard errors, in deviations
    assert_close(x[:, 1].mean(), 0.5, error, scale=0.3)
    assert_close(x[:, 1].std(), 0.3, error)
    assert_close(np.mean(x[:, 0] > 1.0), 0.5, error)  # 3 * 1 against 1 * 3
    assert len(np.unique(x[:, 0])) > 15_000  # not grid points


@pytest.mark.parametrize("name", ["two-moons", "eight-gaussians", "forty"])
def test_named_targets_lie_in_the_default_box(name: str):
    target = find_target(name, 4.0)
    table = from_function(name, target.log_density, 4.0)  # raises if mass lies at its edge
    direct, gridded = (t.sample(jr.key(1), 20_000) for t in (target, table))
    error = 4 * (2 / 20_000) ** 0.5  # four standard errors of a difference, in deviations
    assert_close(direct.mean(0), gridded.mean(0), error, scale=gridded.std())
    assert_close(direct.std(0), gridded.std(0), error)
    assert_close(np.exp(table.log_z - target.log_z), 1.0, 1e-3)  # of the mass
    assert bool(jnp.all(jnp.isfinite(jax.vmap(target.log_density)(direct))))


def test_settings_have_a_folder_per_target():
    assert Settings("two-moons").folder == Path("runs/sample-two-moons")
    assert Settings("a.b:ring").folder == Path("runs/sample-a-b-ring")
