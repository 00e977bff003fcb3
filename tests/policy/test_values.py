"""Guidance by functions on a Gaussian flow, where tilts and soft values are known, and choice by a known critic."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats as distributions
from tests.cli_helpers import cli
from tests.flow.tilts import Tilt, affine

from contraflow.core.types import EnvSpec, UserError
from contraflow.flow.model import Ddim, Flow, FlowSpec
from contraflow.flow.solver import RK4
from contraflow.flow.support import Real, Tanh
from contraflow.nets.critic import QEnsemble
from contraflow.nets.mlp import MLPSpec
from contraflow.nets.velocity import ResidualMLP
from contraflow.policy.artifact import load_policy, save_policy
from contraflow.policy.base import Cost
from contraflow.policy.best_of import Argmax, BestOf, First, chosen
from contraflow.policy.flow import FlowPolicy
from contraflow.policy.gaussian import Deterministic
from contraflow.policy.guided import CONTROLLER, NRG, Rule, guided
from contraflow.policy.normalise import Normalised, RunningMoments
from contraflow.policy.value import Judge, Plain

M, S, GOAL, CURVE = 0.3, 0.5, 0.8, 3.0
OBS = jnp.ones(1)


class Gaussian(eqx.Module):
    """The velocity of data N(M, S^2)."""

    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        slope, shift = affine(jnp.minimum(t / 5.0, 1 - 1e-6), M, S)  # the clock of the flow
        return slope * x + shift


FLOW = FlowPolicy(Flow(Gaussian(), FlowSpec(support=Real(), solver=RK4(64))))


def line(x, cond):
    return 0.7 * jnp.sum(x * cond)


def bowl(x, cond):
    return -0.5 * CURVE * jnp.sum((x - GOAL) ** 2)


def soft(x, t, cond):
    """log E[exp(bowl(x_1)) | x_t] for N(M, S^2), up to a constant."""
    d = t**2 * S**2 + (1 - t) ** 2
    mean, var = (t * S**2 * x + (1 - t) ** 2 * M) / d, S**2 * (1 - t) ** 2 / d
    return jnp.sum(-0.5 * CURVE * (mean - GOAL) ** 2 / (1 + CURVE * var) - 0.5 * jnp.log1p(CURVE * var))


def ends(policy):
    """Mean and standard deviation of the ends: the map from noise is affine."""
    x = policy.pushed(OBS)
    zero, one = (float(x.from_noise(OBS, jnp.full(1, z))[0]) for z in (0.0, 1.0))
    return zero, one - zero


def test_the_soft_value_makes_the_exact_tilt():
    """v + (1 - t) / t grad V is the velocity of p exp(r) to rounding, and the ends have its mean and deviation, up to
    what the gain misses below t = .02."""
    policy = guided(FLOW, 1.0, soft, Rule("state", "score"))
    mean, std = Tilt(M, S, GOAL, CURVE).tilted
    field = policy.pushed(OBS).flow
    for t in (0.05, 0.3, 0.7, 0.95):
        slope, shift = affine(t, mean, std)
        for x in (-1.0, 0.4, 2.0):
            found = float(field.velocity(jnp.full(1, x), jnp.asarray(t), OBS)[0])
            assert np.isclose(found, slope * x + shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ends(policy), (mean, std), rtol=3e-3)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_linear_reward_at_the_predicted_end_is_exact_between_gaussians(weight):
    """E[x_1 | x_t] is linear in x_t, so grad r(E[x_1 | x_t]) is the gradient of the soft value: mean M + w c S^2."""
    mean, std = ends(guided(FLOW, weight, line))
    np.testing.assert_allclose((mean, std), (M + weight * 0.7 * S**2, S), rtol=3e-3)


def test_the_predicted_end_is_not_the_soft_value_of_a_bowl():
    """It leaves out that x_1 still varies, and pulls too much: too narrow by more than a twentieth, .344 for .378."""
    assert ends(guided(FLOW, 1.0, bowl))[1] < 0.95 * Tilt(M, S, GOAL, CURVE).tilted[1]


def test_the_controller_moves_ends_by_the_sum_of_its_pushes():
    """v - w c moves all ends by -w c int_0^1 S / sqrt(t^2 S^2 + (1 - t)^2) dt, the ODE's derivative from t to 1."""
    t = (np.arange(4000) + 0.5) / 4000
    c = np.mean(S / np.sqrt(t**2 * S**2 + (1 - t) ** 2))
    mean, std = ends(guided(FLOW, 0.4, lambda x, t, cond: -0.7 * jnp.sum(x), CONTROLLER))
    np.testing.assert_allclose((mean, std), (M - 0.4 * 0.7 * c, S), rtol=1e-3)


def net_policy(guidance=1.0):
    spec = FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4), guidance=guidance)
    return FlowPolicy(spec.init(jr.key(0), 2, 1))


STATS = RunningMoments(jnp.ones(1), jnp.full(1, 4.0), jnp.asarray(10.0))


def test_without_weight_it_is_the_policy():
    """Bit for bit, with and without normalisation; the function sees the condition before it is normalised."""
    for policy in (net_policy(2.0), Normalised(STATS, net_policy())):
        act = jax.jit(jax.vmap(lambda p, k: p(OBS, k), (None, 0)))
        keys = jr.split(jr.key(1), 16)
        plain = act(policy, keys)
        np.testing.assert_array_equal(plain, act(guided(policy, 0.0, line), jr.split(jr.key(1), 16)))
        assert np.abs(plain - act(guided(policy, 3.0, line), jr.split(jr.key(1), 16))).max() > 1e-2
    hidden = lambda x, cond: (cond[0] != 1.0) * jnp.sum(x)  # 0 at the condition as it is
    moved = act(guided(Normalised(STATS, net_policy()), 5.0, hidden), jr.split(jr.key(1), 16))
    np.testing.assert_array_equal(plain, moved)


def affine_guided(weight):
    """Mean and deviation of NRG at the predicted end of the bowl, whose field is affine, by small steps."""
    mean, std, n = 0.0, 1.0, 4000
    for k in range(n):
        t = max((k + 0.5) / n, 0.02)
        slope, shift = affine(t, M, S)
        gain, at = 1 + (1 - t) * slope, (1 - t) * shift  # the predicted end is gain x + at
        push = -weight * CURVE * (1 - t) / t * gain
        slope, shift = slope + push * gain, shift + push * (at - GOAL)
        mean, std = mean + (slope * mean + shift) / n, std * (1 + slope / n)
    return mean, std


def test_how_far_guidance_at_the_predicted_end_is_from_the_tilt():
    """Its bias for a quadratic value: the ends are those of an affine equation, further and narrower than the tilted
    Gaussian, the more so the larger the weight, and at 3 they are past the goal (.8) itself."""
    gaps, ratios = [], []
    for weight in (0.3, 1.0, 3.0):
        mean, std = ends(guided(FLOW, weight, bowl))
        np.testing.assert_allclose((mean, std), affine_guided(weight), rtol=0.01)
        right = Tilt(M, S, GOAL, CURVE, weight).tilted
        gaps, ratios = [*gaps, mean - right[0]], [*ratios, std / right[1]]
    np.testing.assert_allclose(gaps, (0.013, 0.080, 0.218), atol=0.004)
    np.testing.assert_allclose(ratios, (0.99, 0.91, 0.58), atol=0.01)


def test_a_constraint_is_kept_more_often_the_larger_the_weight():
    """x <= .5 for N(.3, .5^2), by -relu(x - .4)^2 / 2: at weight 0 the Gaussian's own share, then more and more."""
    keep = lambda x, cond: -0.5 * jnp.sum(jnp.maximum(x - 0.4, 0.0) ** 2)
    act = jax.jit(jax.vmap(lambda p, x0: p.pushed(OBS).from_noise(OBS, x0), (None, 0)))
    flow = FlowPolicy(Flow(Gaussian(), FlowSpec(support=Real(), solver=Ddim(40))))
    noise = distributions.norm.ppf((np.arange(2000) + 0.5) / 2000).astype(np.float32)[:, None]
    shares = [float((act(guided(flow, w, keep), noise) <= 0.5).mean()) for w in (0.0, 1.0, 4.0, 16.0, 64.0)]
    np.testing.assert_allclose(shares[0], distributions.norm.cdf(0.2 / S), atol=0.01)
    assert (np.diff(shares) > 0.02).all() or shares[-1] > 0.99, shares
    assert shares[-1] > 0.95


def test_values_of_chunks_and_of_squashed_actions():
    """A function of a chunk gets [h, a]; of a = tanh(u) the slope by u is (1 - a^2) that by a."""
    flow = FlowPolicy(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 4, 1, horizon=2))
    shapes = []
    value = Plain(lambda chunk, obs: shapes.append(chunk.shape) or jnp.sum(chunk[1]), horizon=2)
    moved = guided(flow, 0.1, value, Rule("held", "equal"))(OBS, jr.key(0)) - flow(OBS, jr.key(0))
    assert set(shapes) == {(2, 2)} and np.allclose(moved[:2], 0, atol=0.05) and (moved[2:] > 0.05).all()
    policy = guided(
        FlowPolicy(Flow(Zero(), FlowSpec(support=Tanh(), solver=Ddim(1)))), 0.2, line, Rule("held", "equal")
    )
    u = 0.6
    want = np.tanh(u + 0.2 * 0.7 * (1 - np.tanh(u) ** 2))
    np.testing.assert_allclose(policy.pushed(OBS).from_noise(OBS, jnp.full(1, u)), want, rtol=1e-5)


class Zero(eqx.Module):
    """A flow whose ends are where it starts."""

    dim: int = eqx.field(static=True, default=1)

    def __call__(self, x, t, cond):
        return jnp.zeros_like(x)


class Sum(QEnsemble):
    """Q = s sum a."""

    def outputs(self, obs, action):
        return obs[0] * jnp.sum(action) * jnp.ones((self.num, 1))


SUM = Sum(1, 1, 1, 1, 1, key=jr.key(0))


@pytest.mark.parametrize("n", [4, 16])
def test_the_best_of_n_is_the_nth_order_statistic(n):
    """For a rising critic the quantile of the chosen action is Beta(n, 1), with the mean n / (n + 1)."""
    act = jax.jit(jax.vmap(lambda k: chosen(FLOW, Judge(SUM), n)(OBS, k)))
    quantile = distributions.norm.cdf((np.asarray(act(jr.split(jr.key(5), 1000)))[:, 0] - M) / S)
    assert distributions.kstest(quantile, distributions.beta(n, 1).cdf).pvalue > 1e-3


def test_a_critic_trained_elsewhere_sees_its_own_normalisation():
    """The sign of s is another before its normalisation than after: both guidance and choice follow the latter."""
    low = Judge(SUM, RunningMoments(jnp.full(1, 3.0), jnp.ones(1), jnp.ones(())))  # s = 1 is -2 to this critic
    policy = Normalised(STATS, FlowPolicy(Flow(Gaussian(), FlowSpec(support=Real(), solver=Ddim(2)))))
    plain = policy(OBS, jr.key(3))
    assert (guided(policy, 0.1, low)(OBS, jr.key(3)) < plain).all()
    best, worst = (chosen(policy, Judge(SUM, s), 8)(OBS, jr.key(3)).sum() for s in (None, low.stats))
    assert worst < best
    np.testing.assert_array_equal(chosen(policy, low, 1)(OBS, jr.key(3)), plain)
    assert chosen(policy, low, 8).cost == Cost(8, 2, 8)


def test_bad_choices():
    with pytest.raises(UserError, match="at least 1"):
        chosen(FLOW, line, 0)
    with pytest.raises(UserError, match="draws"):
        chosen(Deterministic(MLPSpec(4, 1).init(jr.key(0), 1, 1), 0.1), line, 4)


def towards(chunk, obs):
    """A goal for a chunk of two: far to the right."""
    assert chunk.shape == (2, 1) and obs.shape == (1,)
    return jnp.sum(chunk)


def vector(chunk, obs):
    return chunk[0]


def test_values_on_the_command_line(tmp_path):
    """A line for each weight and number; no weight and one action are the policy; what does not fit is refused."""
    flow = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 1, horizon=2)
    spec = EnvSpec(1, 2, 1, None, True, 2, 2)
    save_policy(tmp_path / "bc", FlowPolicy(flow), spec, "probe:obs-action")
    critic = QEnsemble(2, 1, 2, 8, 1, key=jr.key(1))
    best = BestOf(FlowPolicy(flow), critic, None, First(), Argmax(2))
    save_policy(tmp_path / "ifql", best, spec, "probe:obs-action")
    single = FlowSpec(solver=Ddim(2), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 1, 1)
    other = BestOf(FlowPolicy(single), QEnsemble(2, 1, 1, 8, 1, key=jr.key(1)), None, First(), First())
    save_policy(tmp_path / "single", other, EnvSpec(1, 1, 1, None, True), "probe:obs-action")

    def lines(*args):
        code, out, err = cli("eval", tmp_path / "bc", "--episodes", "4", *args)
        assert code == 0, err
        return out.splitlines()[1:]

    own, *_, none, _, one, _ = lines("--guide", "0", "--best-of", "1", "8", "--value", tmp_path / "ifql")
    assert none == f"0      {own}" and one == f"1      {own}"
    trust = "--value", f"{__name__}:towards", "--trust", "tests"
    own, _, none, more = lines("--guide", "0", "5", *trust)
    assert none == f"0      {own}" and more[7:] != own
    for args, error in (
        (("--guide", "1"), "no critic"),
        (("--guide", "1", "--value", tmp_path / "bc"), "no critic"),
        (("--best-of", "4", "--value", tmp_path / "single"), "--horizon 2"),
        (("--best-of", "4", "--value", f"{__name__}:vector", "--trust", "tests"), "one number"),
        (("--guide", "1", "--value", f"{__name__}:nothing", "--trust", "tests"), "cannot import"),
        (("--value", tmp_path / "ifql"), "--guide WEIGHT or --best-of"),
    ):
        code, _, err = cli("eval", tmp_path / "bc", *args)
        assert code == 2 and error in err, err


def test_it_is_saved_as_any_policy(tmp_path):
    from contraflow.envs.align.mixture import pair

    flow, obs = FlowPolicy(FlowSpec(solver=Ddim(3), network=ResidualMLP(8, 1, 4)).init(jr.key(0), 2, 2)), jnp.ones(2)
    for i, policy in enumerate((guided(flow, 2.0, pair, NRG), chosen(flow, pair, 3))):
        save_policy(tmp_path / str(i), policy, EnvSpec(2, 2, 1, None, True), "align:mixture2d")
        loaded = load_policy(tmp_path / str(i), trust="contraflow")[0]
        np.testing.assert_array_equal(policy(obs, jr.key(0)), loaded(obs, jr.key(0)))
