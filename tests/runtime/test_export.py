"""Exported files act as the policies that they were made from, or are not written."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.cli_helpers import ROOT, assert_refused, cli

import contraflow
from contraflow import EnvSpec, Part, UserError
from contraflow.agents.online.rfm import RFM, SMALL
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.encoder import Pixels
from contraflow.nets.transformer import ChunkTransformer
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy import noise
from contraflow.policy.artifact import save_policy
from contraflow.policy.best_of import Argmax
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.rl.critics import Critics
from contraflow.runtime import export as module
from contraflow.runtime.export import LIMIT, export, fresh_exports, onnx_runner, stablehlo_runner

pytestmark = pytest.mark.usefixtures("allow_rank_promotion")  # jax2onnx and onnxruntime are not ours
SPEC = EnvSpec(3, 4, 1, None, False, horizon=2, execute=1, low=(-2.0, 0.1), high=(2.0, 0.7))
STATS = RunningMoments(jnp.array([1.0, 0.0, 50.0]), jnp.array([4.0, 1.0, 100.0]), jnp.asarray(10.0))
NET = ResidualMLP(16, 1, 4)
AGENT = RFM(flow=replace(SMALL, network=NET), critic=Critics(width=8, depth=1))
AGENT = replace(AGENT, choose=replace(AGENT.choose, greedy=Argmax(4)))
RUNNERS = {"onnx": onnx_runner, "stablehlo": stablehlo_runner}
FORMATS = [pytest.param("onnx", marks=pytest.mark.skipif("not has_onnx()")), "stablehlo"]
QUICK = [pytest.param("onnx", marks=[pytest.mark.skipif("not has_onnx()"), pytest.mark.slow]), "stablehlo"]


def has_onnx() -> bool:
    import importlib.util

    return all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnx", "onnxruntime"))


def best_of(spec: EnvSpec = SPEC):
    return Normalised(STATS, AGENT.policy(AGENT.init(jr.key(0), spec)))


def one_draw():
    """Compiles faster."""
    return Normalised(STATS, FlowPolicy(FlowSpec(network=NET, solver=Ddim(2)).init(jr.key(0), 4, 3)))


def saved(folder: Path, network=None, spec: EnvSpec = SPEC) -> contraflow.Policy:
    save_policy(folder, network or best_of(spec), spec, "probe:action")
    return contraflow.load(folder, seed=3)


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_acts_as_the_policy_in_the_range_of_the_robot(to, tmp_path: Path):
    """Best of 4 chunks, normalised observations, two ranges: all of it is in the file, for batches of any size."""
    policy = saved(tmp_path)
    found = export(policy, tmp_path, to)
    assert found.parity <= LIMIT and found.rows == 2 * 80
    assert found.inputs == {"obs": (3,), "noise": (4 * 4,)} and found.output == (2, 2)
    run = RUNNERS[to]((tmp_path / f"policy.{to}").read_bytes())
    free = noise.with_noise(policy.network, 3)
    for n in (1, 7):
        obs = np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32) * 10
        keys = jax.vmap(jr.fold_in, (None, 0))(jr.key(3), jnp.arange(n))
        got = run({"obs": obs, "noise": np.asarray(jax.vmap(free.draw)(keys))})
        wanted = policy.raw(contraflow.load(tmp_path, seed=3)(obs))
        np.testing.assert_allclose(got, wanted, atol=2 * LIMIT)  # half a range is at most 2
        assert got.shape == (n, 2, 2) and got[..., 1].min() >= 0.1
    assert contraflow.load(tmp_path, seed=3)(obs).shape == (7, 2, 2), "the folder is a policy as before"


@pytest.mark.parametrize("to", QUICK)
def test_what_is_kept_in_the_config(to, tmp_path: Path):
    found = export(saved(tmp_path, one_draw()), tmp_path, to)
    about = json.loads((tmp_path / "config.json").read_text())["exports"][to]
    assert about["parity"] == found.parity and about["largest"] == found.largest and about["rows"] == 160
    assert about["inputs"] == {"obs": [3], "noise": [4]} and about["made_by"]["jax"] == jax.__version__
    assert fresh_exports(tmp_path) == {to: about}
    with (tmp_path / about["file"]).open("ab") as file:
        file.write(b"?")
    assert fresh_exports(tmp_path) == {}, "not the file that was compared"
    export(contraflow.load(tmp_path), tmp_path, to)
    policy = jax.tree.map(lambda x: 0.5 * x, one_draw())
    config = json.loads((tmp_path / "config.json").read_text())
    save_policy(tmp_path, policy, SPEC, "probe:action")
    assert "exports" not in json.loads((tmp_path / "config.json").read_text()), "training went on"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fresh_exports(tmp_path) == {}, "not of these weights"


def off_by(amount: float, rows):
    """Runs what it should, and moves the actions of some rows by a part of half their range."""

    def runner(content: bytes):
        run = stablehlo_runner(content)

        def moved(inputs):
            out = np.array(run(inputs))
            out[rows(inputs)] += amount * (np.array([0.7, -0.1]) - np.array([0.1, -0.7])) / 2
            return out

        return moved

    return runner


WRONG = {
    "everywhere": off_by(2 * LIMIT, lambda inputs: slice(None)),
    "in one row of a batch": off_by(2 * LIMIT, lambda inputs: slice(5, 6)),
    "far out": off_by(2 * LIMIT, lambda inputs: np.abs(inputs["obs"][:, 0]) > 15),
    "not a number": off_by(np.nan, lambda inputs: slice(3, 4)),
    "one action for all": lambda content: lambda inputs: stablehlo_runner(content)(inputs)[:, 0],
    "without its noise": lambda content: (
        lambda inputs: stablehlo_runner(content)(inputs | {"noise": 0 * inputs["noise"]})
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_differs_is_not_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = saved(tmp_path, one_draw())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(module, "stablehlo_runner", WRONG[name])
    with pytest.raises(UserError, match=r"differ from the policy by .* 1e-05 is allowed: nothing was written"):
        export(policy, tmp_path, "stablehlo")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_small_difference_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "stablehlo_runner", off_by(LIMIT / 2, lambda inputs: slice(None)))
    assert LIMIT / 3 < export(saved(tmp_path, one_draw()), tmp_path, "stablehlo").parity < LIMIT


class Steep(eqx.Module):
    """tanh(sum s), and sin(weight sum s) far out: the last bits of s = 10 move the action by 1e-6 times the weight."""

    weight: jax.Array

    def __call__(self, obs, key, greedy=True):
        total = obs.sum()
        return jnp.where(jnp.abs(total) > 25, jnp.sin(self.weight * total), jnp.tanh(total)) * jnp.ones(4)


@pytest.mark.parametrize(("weight", "written"), [(1.0, False), (1e3, True)])
def test_what_float32_does_not_determine_is_allowed(weight: float, written: bool, tmp_path: Path, monkeypatch):
    """A difference of the size of the policy's own rounding error, at the observation where that is largest."""
    network = Steep(jnp.asarray(weight))
    check, *more = module._checks(network, SPEC, noise.with_noise(network, 3))
    assert not more, "it draws no noise"
    worst = int(check.rounding.argmax())
    assert (check.rounding[worst] > 10 * LIMIT) == written and np.median(check.rounding) < LIMIT / module.SLACK
    monkeypatch.setattr(module, "stablehlo_runner", off_by(2 * LIMIT, lambda inputs: slice(worst, worst + 1)))
    save_policy(tmp_path, network, SPEC, "probe:action")
    policy = contraflow.load(tmp_path, trust="all")
    if written:
        found = export(policy, tmp_path, "stablehlo")
        assert found.parity < LIMIT < found.largest
        worst = 0  # where the policy is not steep, nothing more is allowed than elsewhere
    with pytest.raises(UserError, match="differ from the policy"):
        export(policy, tmp_path, "stablehlo")


PARTS = (Part("image", (12, 12, 2), "uint8"), Part("state", (3,)))
ALONE = (Part("", (12, 12, 9), "uint8"),)


@pytest.mark.parametrize("to", QUICK)
@pytest.mark.parametrize(
    ("parts", "inputs"),
    [(PARTS, {"obs.image": (12, 12, 2), "obs.state": (3,)}), (ALONE, {"obs": (12, 12, 9)})],
    ids=["parts", "alone"],
)
def test_images_and_vectors(to, parts, inputs, tmp_path: Path):
    spec = replace(SPEC, obs_dim=sum(part.size for part in parts), obs_parts=parts)
    flow = FlowSpec(network=NET, solver=Ddim(2), pixels=Pixels((4, 4), (2, 1), features=5))
    network = FlowPolicy(flow.init(jr.key(0), 4, parts))
    found = export(saved(tmp_path, network, spec), tmp_path, to)
    assert found.inputs == inputs | {"noise": (4,)} and found.parity <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_a_transformer(to, tmp_path: Path):
    flow = FlowSpec(network=ChunkTransformer(16, 2, 4, 2), solver=Ddim(2))
    assert export(saved(tmp_path, FlowPolicy(flow.init(jr.key(0), 4, 3, 2))), tmp_path, to).parity <= LIMIT


@pytest.mark.skipif("not has_onnx()")
@pytest.mark.parametrize("unroll", [0, 16])
def test_loops_are_kept_on_request(unroll: int, tmp_path: Path):
    import onnx

    flow = FlowSpec(network=NET, solver=Ddim(3))
    export(saved(tmp_path, FlowPolicy(flow.init(jr.key(0), 4, 3))), tmp_path, "onnx", unroll)
    kinds = [node.op_type for node in onnx.load(tmp_path / "policy.onnx").graph.node]
    assert ("Loop" in kinds) == (unroll == 0)


def test_the_command(tmp_path: Path):
    saved(tmp_path / "run/policy", one_draw())
    code, out, err = cli("export", tmp_path / "run", "--to", "stablehlo")
    assert code == 0 and err == ""
    assert f"written  {tmp_path / 'run/policy/policy.stablehlo'}, " in out
    assert "input    obs [B, 3], noise [B, 4]\noutput   action [B, 2, 2], in the range of the environment\n" in out
    assert re.search(r"parity   \d\.\de-0\d of half the range of an action over 160 inputs; 1e-05 is allowed\n", out)
    assert re.search(r"latency  \d+ us for the saved policy, \d+ us for the file", out)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, one_draw())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for to, name in (("onnx", "jax2onnx"), ("stablehlo", "flatbuffers")):
        assert_refused(["export", str(tmp_path), "--to", to], f"need {name}", 'pip install "contraflow[export]"')
    assert_refused(["export", str(tmp_path / "nothing")], "holds no policy")
    assert not list(tmp_path.glob("policy.*"))


@pytest.mark.skipif("not has_onnx()")
def test_the_example_needs_numpy_and_onnxruntime_alone(tmp_path: Path):
    """In a process where JAX and this library cannot be imported."""
    policy = saved(tmp_path / "policy", one_draw())
    export(policy, tmp_path / "policy", "onnx")
    for name in ("jax", "contraflow", "jax2onnx", "onnx"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on a robot')\n")
    script = ROOT / "examples/run_onnx.py"
    code = f"import sys, runpy; sys.argv = ['x', {str(tmp_path / 'policy/policy.onnx')!r}]\n"
    code += f"import numpy as np; space = runpy.run_path({str(script)!r}, run_name='__main__')\n"
    code += "print(space['OnnxPolicy'](sys.argv[1], seed=5)([1.0, 2.0, 60.0]).tolist())"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shown, action = done.stdout.rstrip().rsplit("\n", 1)
    assert "execute 1" in shown and "us per call" in shown
    noise_ = np.random.default_rng(5).standard_normal((1, 4), np.float32)
    free = noise.with_noise(policy.network, 3)
    wanted = policy.raw(free.act(jnp.array([1.0, 2.0, 60.0]), jnp.asarray(noise_[0])).reshape(2, 2))
    np.testing.assert_allclose(json.loads(action), wanted, atol=2 * LIMIT)
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
    assert re.findall(r"^(?:import|from) (\w+)", script.read_text(), re.M) == ["sys", "time", "numpy", "onnxruntime"]
