"""The server, with the unmodified clients of openpi and vla-eval."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from tests.cli_helpers import COMMAND, ENVIRON, assert_refused, cli
from tests.runtime.serve_helpers import (
    OBS,
    ONE,
    SPEC,
    Asks,
    Continues,
    Gate,
    client,
    echo,
    flow_policy,
    get,
    metric,
    mutations,
    until,
)

from contraflow.agents.offline.fql import FQL
from contraflow.cli.serve import resuming
from contraflow.core.codec import pack, unpack
from contraflow.core.observation import Part
from contraflow.core.types import EnvSpec
from contraflow.flow.model import Ddim, FlowSpec
from contraflow.nets.critic import QEnsemble
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import save_policy
from contraflow.policy.base import Noisy
from contraflow.policy.best_of import Argmax, BestOf
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.guided import guided
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.value import Judge
from contraflow.rl.critics import Critics
from contraflow.runtime.policy import Policy
from contraflow.runtime.serve.server import Address, running
from contraflow.runtime.serve.worker import abilities

pytest.importorskip("openpi_client.websocket_client_policy")
from openpi_client.action_chunk_broker import ActionChunkBroker
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

# The client of openpi connects in a way that websockets 17 advises against.
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning")
STATE = {"observation/state": OBS}
NOISE = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
LOW, HIGH = np.float32(SPEC.low), np.float32(SPEC.high)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of chunks of 4 actions, of which 2 are carried out."""
    with running(flow_policy(), batch=4) as port:
        yield port


def robot(unit) -> np.ndarray:
    """Actions in [-1, 1] in the range of the robot, by another formula."""
    return LOW + (np.asarray(unit).reshape(-1, 2) + 1) / 2 * (HIGH - LOW)


def test_metadata_describe_the_policy(port: int):
    with client(port) as policy:
        about = policy.get_server_metadata()
    assert about.pop("contraflow")
    assert about == {
        "policy": "FlowPolicy",
        "env": "probe:action",
        "revision": "",
        "observation": {"observation/state": {"shape": [3], "dtype": "float32"}},
        "action_horizon": 4,
        "action_dim": 2,
        "execute": 2,
        "action_low": [-2.0, 0.1],
        "action_high": [2.0, 0.7],
        "noise_shape": [4, 2],
        "supports": ["noise", "reset", "seed", "session"],
    }


def test_an_answer_is_a_chunk_in_the_range_of_the_robot(port: int):
    with client(port) as policy:
        first, second = policy.infer(STATE), policy.infer(STATE)
    for answer in (first, second):
        actions = answer["actions"]
        assert actions.shape == (4, 2) and actions.dtype == np.float32
        assert (actions >= LOW).all() and (actions <= HIGH).all()
        assert answer["server_timing"]["infer_ms"] >= answer["policy_timing"]["infer_ms"] > 0
        arrays = [x for x in jax.tree.leaves(answer) if isinstance(x, np.ndarray)]
        assert len(arrays) == 1, "the broker takes rows of every array"
    assert not np.array_equal(first["actions"], second["actions"]), "each request draws its own noise"
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


def test_the_broker_takes_a_chunk_action_by_action(port: int):
    before = metric(port, "requests_total")
    with client(port) as policy:
        broker = ActionChunkBroker(policy, action_horizon=4)
        taken = [broker.infer(STATE | {"seed": k // 4})["actions"] for k in range(8)]
        assert metric(port, "requests_total") == before + 2
        chunks = [policy.infer(STATE | {"seed": k})["actions"] for k in range(2)]
    assert np.array_equal(taken, np.concatenate(chunks))


def test_the_actions_are_those_of_the_policy(port: int):
    """By key and by noise, computed without a server."""
    network, obs = flow_policy().network, jnp.asarray(OBS)
    key = jr.key(5)
    for word in (0, 0, 0):
        key = jr.fold_in(key, word)
    with client(port) as remote:
        drawn, steered = (remote.infer(STATE | more)["actions"] for more in ({"seed": 5}, {"noise": NOISE}))
    np.testing.assert_allclose(drawn, robot(network(obs, key)), rtol=1e-4, atol=1e-5)
    wanted = network.policy.from_noise(network.stats(obs), jnp.asarray(NOISE.reshape(-1)))
    np.testing.assert_allclose(steered, robot(wanted), rtol=1e-4, atol=1e-5)


def test_the_same_noise_gives_the_same_bits_whoever_else_asks(port: int):
    """Sums of a larger batch round differently."""

    def ask(number: int) -> list[np.ndarray]:
        with client(port) as policy:
            kinds = STATE | {"noise": NOISE}, STATE | {"noise": NOISE[None]}, STATE | {"seed": 3}, STATE
            return [policy.infer(kind)["actions"] for _ in range(12) for kind in kinds]

    with ThreadPoolExecutor(4) as pool:
        noise, nested, seed, plain = (
            np.array([a for x in pool.map(ask, range(4)) for a in x]).reshape(-1, 4, 4, 2)
        ).swapaxes(0, 1)
    assert (noise == noise[0]).all() and (nested == noise[0]).all() and (seed == seed[0]).all()
    assert different(np.concatenate([plain, noise[:1], seed[:1]])) == len(plain) + 2


def different(chunks: np.ndarray) -> int:
    return len(np.unique(chunks.reshape(len(chunks), -1), axis=0))


def test_a_session_repeats_its_noise():
    """It depends on the name, the resets and the requests since, and on nobody else."""

    def episodes(others: bool) -> np.ndarray:
        with running(flow_policy(), batch=1) as port, client(port) as policy, client(port) as other:
            found = []
            for k in range(6):
                if others:
                    other.infer(STATE | {"session": "b"})
                    other.infer(STATE)
                found.append(policy.infer(STATE | {"session": "a", "reset": k % 3 == 0})["actions"])
            return np.array(found)

    alone = episodes(False)
    assert np.array_equal(alone, episodes(True))
    assert different(alone) == 6, "the noise differs between requests and episodes"


SEEN = {"observation/state": OBS, "state": 2 * OBS, "x": 3 * OBS}


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        (SEEN, 1), ({"state": 2 * OBS, "x": OBS}, 2), ({"pose": 3 * OBS, "prompt": "pick up"}, 3),
        ({"state": OBS.astype(np.float64)}, 1), ({"state": OBS.tolist()}, 1),
        ({"state": np.array([2, 4, 0], np.uint8)}, None),
    ],
)  # fmt: skip
def test_where_an_observation_is_found(fields: dict, scale: float | None):
    with running(echo(), batch=1) as port, client(port) as policy:
        wanted = scale * OBS[:2] if scale else [2.0, 4.0]
        np.testing.assert_allclose(policy.infer(fields)["actions"], [np.clip(wanted, *([-9, 9]))])


IMAGE = Part("top", (4, 4, 3), "uint8")
PARTS = EnvSpec(53, 2, 1, None, False, obs_parts=(IMAGE, Part("arm", (5,))))


def _see(obs: dict) -> np.ndarray:
    return np.array([obs["arm"].mean(), obs["top"].mean() / 255], np.float32)


def test_an_observation_of_parts_goes_by_name():
    policy = Policy(Asks(jnp.ones(()), _see), PARTS, "probe:action")
    image, arm = np.full((4, 4, 3), 51, np.uint8), np.full(5, 0.5)
    with running(policy, batch=1) as port:
        with client(port) as robot:
            keys = robot.get_server_metadata()["observation"]
            assert keys["observation/top"] == {"shape": [4, 4, 3], "dtype": "uint8"}
            for fields in (
                {"observation/top": image, "observation/arm": arm},
                {"top": image, "arm": arm, "wrist": image},
            ):
                np.testing.assert_allclose(robot.infer(fields)["actions"], [[0.5, 0.2]], rtol=1e-6)
        refused(port, {"top": image}, "lacks observation/arm; its keys: top")
        refused(port, {"top": image / 255, "arm": arm}, r"observation/top must have shape \[4, 4, 3\] of uint8")


def test_an_image_alone_may_have_any_name():
    """A stack of bytes is served as the policy sees it."""
    spec = EnvSpec(4 * 4 * 9, 2, 1, None, False, obs_parts=(Part("", (4, 4, 9), "uint8"),))
    stack = np.arange(144, dtype=np.uint8).reshape(4, 4, 9)
    policy = Policy(
        Asks(jnp.ones(()), lambda obs: np.array([obs.mean(), obs[..., 8].mean()], np.float32) / 255),
        spec,
        "probe:action",
    )
    with running(policy, batch=1) as port, client(port) as robot:
        assert robot.get_server_metadata()["observation"]["observation/image"] == {"shape": [4, 4, 9], "dtype": "uint8"}
        for name in ("observation/image", "image", "camera"):
            wanted = [[stack.mean() / 255, stack[..., 8].mean() / 255]]
            np.testing.assert_allclose(robot.infer({name: stack})["actions"], wanted, rtol=1e-5)


def refused(port: int, fields: object, message: str) -> str:
    """The client raises, with one line that says what is wrong, and the connection is closed by code 1011."""
    with client(port) as policy:
        with pytest.raises(RuntimeError, match=message) as error:
            policy.infer(fields)
        said = str(error.value).removeprefix("Error in inference server:\n")
        assert "\n" not in said and "Traceback" not in said and 'File "' not in said
        with pytest.raises(ConnectionClosedError) as closed:
            policy.infer(STATE)
        assert closed.value.rcvd.code == 1011
    return said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "lacks observation/state; its keys: none"),
        ({"a": OBS, "b": OBS}, "lacks observation/state; its keys: a, b"),
        ([OBS], "must be a dict"),
        ({"state": OBS[:2]}, r"must have shape \[3\]"),
        ({"state": OBS[None]}, r"got \[1, 3\]"),
        ({"state": "ready"}, "must be an array of numbers"),
        ({"state": [[1], [2, 3]]}, "must be an array of numbers"),
        ({"state": np.array([1, np.nan, 0])}, "not finite"),
        ({"state": np.array([1e300, 0, 0])}, "not finite"),
        (STATE | {"seed": -1}, "seed must be a whole number"),
        (STATE | {"seed": 1.5}, "seed must be a whole number"),
        (STATE | {"seed": True}, "seed must be a whole number"),
        (STATE | {"seed": 2**32}, "seed must be a whole number"),
        (STATE | {"reset": 1}, "reset must be true or false"),
        (STATE | {"session": ""}, "session must be a text"),
        (STATE | {"session": "x" * 101}, "session must be a text"),
        (STATE | {"noise": NOISE[:3]}, r"noise must have shape \(4, 2\), got \(3, 2\)"),
        (STATE | {"noise": NOISE * np.inf}, "noise is not finite"),
        (STATE | {"delay": 1}, "cannot continue a chunk"),
        (STATE | {"prev_chunk": NOISE}, "cannot continue a chunk"),
    ],
)
def test_a_mistake_is_named_and_others_go_on(port: int, fields: object, message: str):
    errors = metric(port, "errors_total")
    with client(port) as other:
        other.infer(STATE)
        refused(port, fields, message)
        other.infer(STATE)
    assert metric(port, "errors_total") == errors + 1


def test_text_is_no_observation(port: int):
    with connect(f"ws://127.0.0.1:{port}") as socket:
        socket.recv()
        socket.send("{}")
        assert "binary frames" in socket.recv()


def test_a_policy_without_noise_says_so():
    with running(echo(), batch=1) as port:
        refused(port, STATE | {"noise": np.zeros((1, 2))}, "cannot start from given noise: leave out noise")


FLOW = FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 3)
STATS = RunningMoments(jnp.array([1.0, 0.0, 2.0]), jnp.array([4.0, 1.0, 0.25]), jnp.asarray(10.0))


def test_noise_is_found_within_wrappers():
    """Behind normalisation it is the flow at the normalised observation; best of n has no choice to make."""
    critic = QEnsemble(2, 3, 2, 8, 1, key=jr.key(1))
    best = BestOf(FlowPolicy(FLOW), critic, None, Argmax(4), Argmax(4))
    noise = np.array([[0.3, -0.8]], np.float32)
    wanted = FlowPolicy(FLOW).from_noise(STATS(jnp.asarray(OBS)), jnp.asarray(noise[0]))
    for policy in (Noisy(Normalised(STATS, FlowPolicy(FLOW)), None, 0.1), Normalised(STATS, best)):
        assert abilities(policy) == {"noise"}
    with (
        running(Policy(Normalised(STATS, FlowPolicy(FLOW)), ONE, "probe:action"), batch=1) as port,
        client(port) as robot,
    ):
        np.testing.assert_allclose(robot.infer(STATE | {"noise": noise})["actions"][0], wanted, rtol=1e-4, atol=1e-5)
    assert abilities(guided(FlowPolicy(FLOW), 1.0, Judge(critic))) == set(), "guidance would be lost"


def test_the_one_step_actor_of_fql_takes_noise():
    """Its noise is the input of a network, not the start of a flow."""
    agent = FQL(flow=FLOW.spec, critic=Critics(width=8, depth=1))
    network = agent.policy(agent.init(jr.key(0), ONE))
    noise = np.array([[0.3, -0.8]], np.float32)
    wanted = network.from_noise(jnp.asarray(OBS), jnp.asarray(noise[0]))
    with running(Policy(network, ONE, "probe:action"), batch=1) as port, client(port) as robot:
        np.testing.assert_allclose(robot.infer(STATE | {"noise": noise})["actions"][0], wanted, rtol=1e-4, atol=1e-5)


def test_what_is_left_of_a_chunk_is_handed_on():
    """In [-1, 1], padded with zeros, with its length and the delay."""
    policy = Policy(Continues(jnp.ones(())), SPEC, "probe:action")
    left = robot([[0.5, -0.5], [0.25, 1.0]])
    with running(policy, batch=1) as port:
        with client(port) as remote:
            assert remote.get_server_metadata()["supports"] == ["reset", "rtc", "seed", "session"]
            actions = remote.infer(STATE | {"prev_chunk": left, "delay": 1})["actions"]
        np.testing.assert_allclose(actions, robot([[0.5, -0.5], [0.25, 1.0], [0, 0], [2 / 8, 1 / 8]]), rtol=1e-5)
        for wrong, message in (
            ({"delay": 4}, "delay must be a whole number from 0 to 3"),
            ({"delay": 3}, "has 2 actions, fewer than the delay of 3"),
            ({"prev_chunk": left * np.nan}, "prev_chunk is not finite"),
            ({"prev_chunk": np.zeros((5, 2))}, r"shape \(1 to 4, 2\), got \(5, 2\)"),
        ):
            refused(port, STATE | {"prev_chunk": left, "delay": 1} | wrong, message)
        refused(port, STATE | {"prev_chunk": left}, "prev_chunk needs delay")


def test_the_command_lets_flows_of_chunks_continue_one():
    """The answer begins with what is executed while it is computed; noise still works, and single actions do not
    change."""
    policy = resuming(flow_policy())
    low, high = np.array(SPEC.low, np.float32), np.array(SPEC.high, np.float32)
    left = np.linspace(low, high, 3).astype(np.float32)
    with running(policy) as port, client(port) as remote:
        actions = remote.infer({"state": OBS, "prev_chunk": left, "delay": 2})["actions"]
        np.testing.assert_allclose(actions[:2], left[:2], rtol=1e-5, atol=1e-6)
        noise = np.zeros((4, 2), np.float32)
        same = remote.infer({"state": OBS, "noise": noise})["actions"]
    with running(flow_policy()) as port, client(port) as remote:
        np.testing.assert_array_equal(same, remote.infer({"state": OBS, "noise": noise})["actions"])
    assert not hasattr(resuming(flow_policy(ONE)).network, "resume")
    assert not hasattr(resuming(echo(SPEC)).network, "resume")  # no flow


def test_actions_that_are_not_finite_are_not_sent():
    policy = Policy(Asks(jnp.ones(()), lambda obs: np.float32([0, np.inf])), ONE, "probe:action")
    with running(policy, batch=1) as port:
        refused(port, {"state": np.zeros(3)}, "not finite; none are sent")


def _broken(obs: np.ndarray) -> np.ndarray:
    if np.any(obs):
        raise RuntimeError("secret of the policy")
    return np.zeros(2, np.float32)


def test_no_traceback_for_strangers(caplog: pytest.LogCaptureFixture):
    policy = Policy(Asks(jnp.ones(()), _broken), ONE, "probe:action")
    with running(policy, batch=1) as port:
        said = refused(port, STATE, "in the policy; the log of the server says more")
        assert "secret" not in said and str(Path(__file__).parent) not in said
        with client(port) as other:
            other.infer({"state": np.zeros(3)})
    assert "secret of the policy" in caplog.text
    with (
        running(policy, batch=1, debug=True) as port,
        client(port) as other,
        pytest.raises(RuntimeError, match=r"(?s)Traceback.*secret of the policy"),
    ):
        other.infer(STATE)


def test_health_answers_while_a_slow_policy_infers():
    gate = Gate()
    with running(gate.policy(), batch=1) as port, ThreadPoolExecutor(1) as pool, client(port) as policy:
        gate.shut()
        try:
            answer = pool.submit(policy.infer, STATE)
            assert gate.waiting.acquire(timeout=60)
            assert get(port, "/healthz") == (200, "OK\n")
            assert get(port, "/health") == (200, '{"status": "ok"}\n')
            with client(port) as other:  # and others are let in
                assert other.get_server_metadata()
            assert not answer.done()
        finally:
            gate.open.set()
        np.testing.assert_allclose(answer.result()["actions"], OBS[None, :2] / 10)


def test_requests_that_wait_are_computed_together():
    """One is at work, four wait: two batches, and to each its own."""
    gate = Gate()
    with running(gate.policy(), batch=8) as port, ThreadPoolExecutor(5) as pool:
        gate.shut()

        def ask(scale: int) -> np.ndarray:
            with client(port) as policy:
                return policy.infer({"state": scale * OBS})["actions"]

        try:
            first = pool.submit(ask, 1)
            assert gate.waiting.acquire(timeout=60)
            others = [pool.submit(ask, scale) for scale in range(2, 6)]
            until(lambda: metric(port, "requests_total") == 5)
        finally:
            gate.open.set()
        for scale, answer in enumerate([first, *others], 1):
            np.testing.assert_allclose(answer.result(), [scale * OBS[:2] / 10], rtol=1e-6)
        assert metric(port, "batches_total") == 2


def test_a_client_that_leaves_does_no_harm():
    gate = Gate()
    with running(gate.policy(), batch=1) as port:
        gate.shut()
        with client(port) as hasty:
            hasty._ws.send(pack({"state": OBS}))
            assert gate.waiting.acquire(timeout=60)
        gate.open.set()
        with client(port) as policy:
            policy.infer(STATE)
        until(lambda: metric(port, "clients") == 0)
        assert metric(port, "errors_total") == 0


def test_the_key():
    with running(echo(), Address(port=0, key="open sesame ä"), batch=1) as port:
        for key in (None, "open", "open sesame b", "ü"):
            with pytest.raises(InvalidStatus) as refusal, client(port, key and key.encode().decode("latin-1")):
                pass
            assert refusal.value.response.status_code == 401
        assert get(port, "/metrics")[0] == 401 and get(port, "/healthz")[0] == 200
    with running(echo(), Address(port=0, key="open:sesame"), batch=1) as port:
        with client(port, "open:sesame") as policy:
            policy.infer(STATE)
        assert get(port, "/metrics", Authorization="Api-Key open:sesame")[0] == 200
        assert get(port, "/metrics", Authorization="Bearer open:sesame")[0] == 401
        with client(port, host="ws://robot:open%3Asesame@127.0.0.1") as policy:
            policy.infer(STATE)


def test_a_web_page_is_refused(port: int):
    with pytest.raises(InvalidStatus) as refusal, connect(f"ws://127.0.0.1:{port}", origin="http://localhost"):
        pass
    assert refusal.value.response.status_code == 403


def test_metrics(port: int):
    with client(port) as policy:
        policy.infer(STATE)
        text = get(port, "/metrics")[1]
    assert "contraflow_clients 1" in text
    p50, p99 = (float(re.search(rf'seconds{{quantile="{q}"}} (\S+)', text)[1]) for q in ("0.5", "0.99"))
    assert 0 < p50 <= p99
    count, requests, errors = (
        metric(port, name) for name in ("request_seconds_count", "requests_total", "errors_total")
    )
    assert count == requests - errors > 0


def test_fuzzed_frames(port: int):
    """Each is answered, if by an error, and the server goes on."""
    frames = [pack(STATE | {"seed": 3}), pack({"state": OBS, "noise": NOISE, "session": "a", "reset": True})]
    answered = 0
    for frame in mutations(frames, 200, seed=0):
        with connect(f"ws://127.0.0.1:{port}", compression=None) as socket:
            socket.recv(timeout=30)
            socket.send(frame)
            answer = socket.recv(timeout=30)
            answered += isinstance(answer, bytes)
            assert isinstance(answer, bytes) or "in the policy" not in answer
    assert 0 < answered < 200
    with client(port) as policy:
        assert policy.infer(STATE)["actions"].shape == (4, 2)


def test_fuzzed_messages(port: int):
    """The same for vla-eval, on one connection that stays open."""
    message = {"type": "observation", "payload": {"state": OBS}, "seq": 1, "timestamp": 0.0}
    hello = pack(message | {"type": "hello"}, text_keys=True)
    kinds = set()
    with connect(f"ws://127.0.0.1:{port}/vla-eval", compression=None) as socket:
        for frame in mutations([pack(message, text_keys=True), hello], 200, seed=1):
            socket.send(frame)
            socket.send(hello)  # always answered, which the start of an episode is not
            while (answer := unpack(socket.recv(timeout=30)))["type"] != "hello":
                kinds.add(answer["type"])
                assert "in the policy" not in answer["payload"].get("error", "")
    assert kinds == {"action", "error"}


def test_vla_eval(port: int):
    connection = pytest.importorskip("vla_eval.connection")

    async def episode() -> None:
        before = metric(port, "batches_total")
        async with connection.Connection(f"ws://127.0.0.1:{port}/vla-eval", max_retries=1) as bench:
            assert bench.server_info["protocol_version"] == 1
            assert bench.server_info["model_server"] == "contraflow FlowPolicy"
            await bench.start_episode({"task": {"name": "reach"}})
            state = {
                "images": {"top": np.zeros((8, 8, 3), np.uint8)},
                "task_description": "reach",
                "states": OBS,
                "seed": 3,
            }
            actions = [(await bench.act(state))["actions"] for _ in range(3)]
            assert metric(port, "batches_total") == before + 2, "two actions of each chunk are carried out"
            with client(port) as policy:
                chunk = policy.infer(STATE | {"seed": 3})["actions"]
            assert np.array_equal(actions, chunk[[0, 1, 0]])
            await bench.end_episode({"success": True})
            await bench.start_episode({"task": {}})
            assert np.array_equal((await bench.act(state))["actions"], chunk[0]), "an episode begins with a new chunk"
            await bench.start_episode({"task": {}})
            with pytest.raises(RuntimeError, match=r"observation_failed: UserError: .*lacks observation/state"):
                await bench.act({"images": {}})
            assert (await bench.act(state))["actions"].shape == (2,), "the connection stays open"

    asyncio.run(episode())


def test_the_only_camera_of_a_benchmark():
    connection = pytest.importorskip("vla_eval.connection")
    policy = Policy(Asks(jnp.ones(()), _see), PARTS, "probe:action")

    async def look(port: int) -> np.ndarray:
        async with connection.Connection(f"ws://127.0.0.1:{port}/vla-eval", max_retries=1) as bench:
            images = {"agentview": np.full((4, 4, 3), 51, np.uint8)}
            return (await bench.act({"images": images, "arm": np.full(5, 0.5)}))["actions"]

    with running(policy, batch=1) as port:
        np.testing.assert_allclose(asyncio.run(look(port)), [0.5, 0.2], rtol=1e-6)


def test_the_command(tmp_path: Path):
    """From the first line to Ctrl-C, while a client is connected."""
    policy = flow_policy()
    save_policy(tmp_path / "policy", policy.network, policy.spec, policy.env)
    args = [*COMMAND, "serve", str(tmp_path), "--port", "0", "--batch", "1"]
    with subprocess.Popen(args, env=ENVIRON, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            _use(process, tmp_path)
        finally:
            process.kill()


def _use(process: subprocess.Popen[str], folder: Path) -> None:
    assert process.stdout is not None and process.stderr is not None
    said = ""
    while "Ctrl-C stops" not in said:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        said += line
    port = int(re.search(r"ws://127\.0\.0\.1:(\d+) ", said)[1])
    for part in ("FlowPolicy for probe:action", "observation/state [3] float32", "[4, 2] in [-2, 2] [0.1, 0.7]"):
        assert part in said
    code, _, err = cli("serve", folder, "--port", port, "--batch", "1")
    assert code == 2 and f"port {port} cannot be used" in err and err.count("\n") == 1
    tried = re.search(r'try +python -c "(.*)"', said)[1]
    shown = subprocess.run([sys.executable, "-c", tried], text=True, capture_output=True, timeout=60)
    assert "actions" in shown.stdout, shown.stderr
    with client(port) as remote:
        remote.infer(STATE)
        assert len(remote.get_server_metadata()["revision"]) == 12
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        with pytest.raises(ConnectionClosed) as closed:
            remote.infer(STATE)
        assert closed.value.rcvd.code == 1001
    assert "stopped after 2 requests" in process.stdout.read() and process.stderr.read() == ""


def test_mistakes_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert_refused(["serve", str(tmp_path)], "holds no policy")
    assert_refused(["serve", str(tmp_path), "--key-file", str(tmp_path / "key")], "cannot be read")
    (tmp_path / "key").write_text("\n")
    assert_refused(["serve", str(tmp_path), "--key-file", str(tmp_path / "key")], "is empty")
    assert_refused(["serve", str(tmp_path), "--port", "70000"], "port lie in 0 to 65535")
    for name in [
        name for name in sys.modules if name.startswith(("contraflow.runtime.serve", "contraflow.core.codec"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert_refused(["serve", str(tmp_path)], 'serving needs msgpack: pip install "contraflow[serve]"')
