"""A served policy against the same policy here: actions, noise, chunks that go on, and a server that is lost."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.cli_helpers import assert_refused
from tests.runtime.serve_helpers import OBS, SPEC, echo, flow_policy
from tests.train.loop_helpers import QUICK, WARM, begin, run_epoch

pytest.importorskip("websockets")

from contraflow.core.bounds import action_range
from contraflow.core.observation import Part
from contraflow.core.types import EnvSpec, UserError
from contraflow.envs.bandit import Bandit
from contraflow.envs.over_noise import OverNoise
from contraflow.policy import served as client
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import act_batch
from contraflow.policy.served import connection, served
from contraflow.policy.start_noise import acted
from contraflow.runtime.policy import Policy, load
from contraflow.runtime.serve.server import running
from contraflow.training.frozen import Frozen
from contraflow.training.frozen import load as load_frozen
from contraflow.training.loop import World
from contraflow.training.sources import Replay

UNIT = replace(SPEC, low=(), high=())


@pytest.fixture(autouse=True)
def hung_up():
    """Every test has its own server; connections to those of before are of no use."""
    yield
    for one in client._connections.values():
        one.close()
    client._connections.clear()


@pytest.fixture(scope="module")
def unit():
    """A policy of chunks in [-1, 1], and its address."""
    policy = flow_policy(UNIT)
    with running(policy) as port:
        yield policy, f"ws://127.0.0.1:{port}"


def test_noise_over_the_wire_gives_the_same_actions(unit):
    """Bit for bit between one request and one compiled row, as actions in [-1, 1] are sent unchanged."""
    local, address = unit
    remote, spec, _ = served(address)
    assert spec == UNIT
    decode = jax.jit(lambda policy, obs, x0: jax.vmap(lambda o, x: acted(policy, o, x))(obs, x0))
    for i in range(5):
        x0 = jr.normal(jr.key(i), (1, 8))
        right = decode(local.network, OBS[None], x0)
        np.testing.assert_array_equal(decode(remote, OBS[None], x0), right)
        frozen = Frozen(remote, spec, 2.0, False)
        np.testing.assert_array_equal(frozen.decode(OBS[None], x0 / 2), right)


def test_actions_come_back_from_the_range_of_the_robot():
    """To the rounding of two maps between ranges, a few steps of single precision."""
    local = flow_policy()
    with running(local) as port:
        remote, spec, _ = served(f"ws://127.0.0.1:{port}")
        assert (spec.low, spec.high) == (SPEC.low, SPEC.high)
        x0 = jnp.linspace(-2, 2, 8)
        np.testing.assert_allclose(
            remote.from_noise(OBS, x0), acted(local.network, jnp.asarray(OBS), x0), rtol=1e-5, atol=1e-6
        )
        low, high = action_range(spec)
        whole = Policy(remote, spec, "").raw(remote(OBS, jr.key(0)).reshape(4, 2))
        assert (low <= whole).all() and (whole <= high).all()


def test_its_own_noise_follows_the_key(unit):
    remote, *_ = served(unit[1])
    obs = jnp.tile(OBS, (3, 1))
    one, two = (np.asarray(act_batch(remote, obs, jr.key(0), 0)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one[0], one[1])


def test_a_chunk_goes_on_over_the_wire(unit):
    from contraflow.cli.serve import resuming

    with running(resuming(unit[0])) as port:
        remote, spec, _ = served(f"ws://127.0.0.1:{port}")
        previous = np.linspace(-0.5, 0.5, 8, dtype=np.float32).reshape(4, 2)
        chunk = Policy(remote, spec, "").resume(OBS[None], previous[None], [3], 2)[0]
        np.testing.assert_allclose(chunk[:2], previous[:2], atol=1e-7)  # the server maps ranges in single precision
        fresh = Policy(remote, spec, "").resume(OBS[None], previous[None], [0], 2)[0]
        assert np.abs(fresh[:2] - previous[:2]).max() > 1e-3


def test_a_run_over_a_served_policy_saves_what_acts(tmp_path):
    """The folder holds the address; here it acts as with the policy itself. Without its server it is refused."""
    local, obs = flow_policy(EnvSpec(1, 2, 1, None, False)), jnp.zeros(1)
    with running(local) as port:
        frozen = load_frozen(Replay(base=f"ws://127.0.0.1:{port}"), "")
        assert frozen is not None
        env = OverNoise(Bandit(num_envs=2), frozen)
        carry, _, error = run_epoch(WARM, QUICK, env, begin(QUICK, env, jr.key(0)), jr.key(1), 3)
        assert error is None and int(carry.learner.buffer.size) == 6
        whole, spec = World(env.spec, env).acting(QUICK.policy(carry.learner.agent))
        save_policy(tmp_path / "run", whole, spec, "bandit:constant")
        network = load(tmp_path / "run").network
        right = acted(local.network, obs, 1.5 * network.chooser(obs, jr.key(0)))
        np.testing.assert_allclose(network(obs, jr.key(0)), right, rtol=1e-5)  # computed alone and compiled
    client._connections.clear()
    with pytest.raises(UserError, match="no policy is served at"):
        load(tmp_path / "run")
    assert load_policy(tmp_path / "run")[0].base.address.endswith(str(port))


def test_what_cannot_be_used_is_refused(unit):
    remote, *_ = served(unit[1])
    with pytest.raises(UserError, match="serves revision"):
        replace(remote, revision="0123").ask(OBS, {"seed": 0})
    with pytest.raises(UserError, match="leave out the key"):
        connection("ws://user:secret@127.0.0.1:1")
    with pytest.raises(UserError, match="start `contraflow serve`"):
        connection("ws://127.0.0.1:1")
    with running(echo()) as port, pytest.raises(UserError, match="no function of its start noise"):
        load_frozen(Replay(base=f"ws://127.0.0.1:{port}"), "")


def test_images_and_states_are_described_as_they_are_served():
    parts = Part("camera", (4, 4, 3), "uint8"), Part("state", (2,))
    spec = EnvSpec(50, 2, 1, None, False, obs_parts=parts)

    class Bright(type(echo().network)):
        def __call__(self, obs, key, greedy=True):
            return self.scale * obs["state"] + obs["camera"].mean() / 255

    with running(Policy(Bright(jnp.ones(())), spec, "")) as port:
        remote, found, _ = served(f"ws://127.0.0.1:{port}")
        assert found == spec
        obs = {"camera": np.full((4, 4, 3), 51, np.uint8), "state": np.array([0.1, -0.3], np.float32)}
        np.testing.assert_allclose(remote(obs, jr.key(0)), [0.3, -0.1], rtol=1e-5)


def test_a_lost_server_ends_in_one_line_and_may_come_back(unit):
    with running(unit[0]) as port:
        remote, *_ = served(f"ws://127.0.0.1:{port}")
        one = remote.ask(OBS, {"seed": 3})
        client._connections[remote.address].close()
        with pytest.raises(UserError, match="answers no longer"):
            remote.ask(OBS, {"seed": 3})
        np.testing.assert_array_equal(remote.ask(OBS, {"seed": 3}), one)


def test_a_server_lost_within_a_compiled_program_ends_in_the_same_line(monkeypatch):
    """JAX puts an error of its own in the place of that of the callback."""
    send = client.Connection.ask

    def ask(self, fields):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked == 2:
            self.close()
        return send(self, fields)

    monkeypatch.setattr(client.Connection, "ask", ask)
    with running(flow_policy(replace(UNIT, action_dim=4))) as port:
        args = ["eval", f"ws://127.0.0.1:{port}", "--env", "jax:pendulum", "--episodes", "1"]
        assert_refused(args, "answers no longer")
