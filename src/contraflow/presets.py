"""Named runs: `contraflow train NAME`. Every agent has a preset of its own name."""

from dataclasses import replace
from typing import Any

from contraflow.agents import BC, DACER, DPPO, FPO, PMD, PPO, RFM, SAC, SIR, TD3, ReinFlow
from contraflow.flow.fewstep import MeanFlow
from contraflow.flow.likelihood import ChangeOfVariables, Denoising, Hutchinson, Pushforward
from contraflow.flow.path import VE, VP, Cosine
from contraflow.flow.posterior.control import Fixed, MinVariance
from contraflow.flow.posterior.importance import Pooled, Reverse
from contraflow.flow.posterior.local import Local
from contraflow.flow.posterior.markov import Markov
from contraflow.flow.posterior.proposal import Noise, TruncatedNoise
from contraflow.flow.solver import Euler, Midpoint
from contraflow.nets.heads import Categorical
from contraflow.policy.select import Argmax, First, Softmax
from contraflow.rl.critics import Critics
from contraflow.rl.flow_policy import FlowPolicy
from contraflow.rl.temperature import Anneal, Constant, Tuned
from contraflow.train.offline import OfflineRun
from contraflow.train.onpolicy import OnPolicyRun
from contraflow.train.run import AnyRun, Run

RFM_PAPER = RFM(
    estimator=Reverse(samples=100, proposal=Noise(), control=MinVariance()),
    solver=Euler(steps=10),
    explore=Softmax(32),
    backup=Softmax(32),
    query=Softmax(32),
    greedy=Argmax(32),
    temperature=Constant(0.02),
    condition_on_temperature=True,
    t_min=0.01,
    critic=Critics(members=2, width=256, depth=2, gamma=0.99, tau=0.005, lr=1e-3, max_grad_norm=10.0),
    width=256,
    depth=2,
    embedding=128,
    actor_lr=3e-4,
    max_grad_norm=10.0,
)

# The family at its papers' defaults: networks of 256, no clipping. Deviations: docs/online.md.
WIDE = Critics(width=256, lr=3e-4, max_grad_norm=None)
ONE: dict[str, Any] = {"explore": First(), "backup": First()}
OWN: dict[str, Any] = ONE | {"width": 256, "actor_lr": 3e-4, "critic": WIDE, "max_grad_norm": None}
IN_BOX: dict[str, Any] = OWN | {"bounds": "box", "predict": "noise", "solver": Euler(20)}
BEST: dict[str, Any] = {"explore": Argmax(32), "backup": Argmax(32)}
KL_OF_2 = Tuned(1.47, of="weights", start=1.0)  # of 32 candidates: log 32 - 2
DIFFUSION = FlowPolicy(path=VP(), predict="noise", clip=1.0, steps=20, width=256, depth=3)
OWN_C51: dict[str, Any] = OWN | {"critic": replace(WIDE, head=Categorical(), depth=3, block="normalised")}
OWN_BEST: dict[str, Any] = OWN | BEST
FLAME = RFM(
    estimator=Reverse(100, TruncatedNoise(), Fixed(0.0)), endpoint="buffer", bounds="box",
    density=ChangeOfVariables(Euler(2), Hutchinson(1)), solver=Euler(20), temperature=Constant(0.01), depth=3,
    **OWN_BEST,
)  # fmt: skip
FAMILY: dict[str, Any] = {
    # 2502.11612
    "maxentdp": RFM(
        path=Cosine(), estimator=Reverse(500, TruncatedNoise(), Fixed(0.0)), endpoint="buffer",
        density=Denoising(20, 50), greedy=Argmax(10), temperature=Constant(0.05), **IN_BOX,
    ),
    # 2502.00361
    "sdac": RFM(
        path=VP(), estimator=Reverse(64, Noise(), Fixed(0.0)), query=Argmax(32), temperature=Constant(0.05),
        **(IN_BOX | BEST),
    ),
    # 2312.11752
    "qsm": RFM(
        path=VP(), estimator=Local(), endpoint="buffer", greedy=First(), temperature=Constant(0.02), depth=3, **IN_BOX,
    ),
    # 2410.01312
    "dqs": RFM(
        path=VE(1e-5, 1.0), estimator=Reverse(1000, Noise(), Fixed(1.0)), endpoint="buffer", greedy=First(),
        solver=Euler(20), temperature=Constant(0.05), condition_on_temperature=True, **OWN,
    ),
    # 2602.01606, the variants R and M
    "flame": FLAME,
    "flame-m": replace(FLAME, objective=MeanFlow(), solver=Euler(1)),
    # 2604.14698
    "mfpo": RFM(
        estimator=Pooled(), bounds="box", query=First(16), objective=MeanFlow(), solver=Euler(2), greedy=Argmax(10),
        density=Pushforward(), temperature=Tuned(-0.5, start=0.01), depth=3,
        **OWN_C51,
    ),
    # The default in one evaluation.
    "rfm-one": RFM(objective=MeanFlow(), solver=Euler(1)),
    # 2502.00361
    "dpmd": PMD(policy=DIFFUSION, critic=WIDE, greedy=Argmax(10), max_grad_norm=None),
    # 2507.23675, the variants R and M
    "fpmd": PMD(
        policy=FlowPolicy(steps=20, width=256, depth=3), candidates=32, noise=0.1, temperature=KL_OF_2,
        follow=1.0, critic=WIDE, max_grad_norm=None, **BEST,
    ),
    "fpmd-m": PMD(
        policy=FlowPolicy(steps=1, width=256, depth=3), objective=MeanFlow(), candidates=32, noise=0.1,
        temperature=KL_OF_2, follow=1.0, critic=WIDE, max_grad_norm=None, **BEST,
    ),
    # 2405.16173
    "qvpo": PMD(
        policy=replace(DIFFUSION, path=Cosine()), weight="advantage", uniform=10, noise=0.0, follow=0.005,
        temperature=Constant(0.02), explore=Argmax(4), backup=Argmax(4),
        critic=replace(WIDE, lr=1e-3), max_grad_norm=None,
    ),
}  # fmt: skip

# The critics of today's strongest results: residual blocks with layer norm (SimBa, BRO), values as probabilities, two
# updates for a step, normalised observations. Rewards in [0, 1] and gamma = .99 stay within the head's range.
STRONG = Critics(width=256, head=Categorical(target="hl-gauss"), block="residual", lr=3e-4)

PRESETS: dict[str, AnyRun] = {
    **{name: Run(agent=agent) for name, agent in FAMILY.items()},
    "rfm": Run(agent=RFM()),
    "rfm-max": Run(agent=RFM(critic=STRONG, normalise_obs=True), updates=2),
    "pmd": Run(agent=PMD()),
    "dacer": Run(agent=DACER()),
    "sac": Run(agent=SAC()),
    "td3": Run(agent=TD3()),
    "sir": Run(agent=SIR()),
    "ppo": OnPolicyRun(agent=PPO()),
    "reinflow": OnPolicyRun(agent=ReinFlow()),
    "dppo": OnPolicyRun(agent=DPPO()),
    "fpo": OnPolicyRun(agent=FPO()),
    "bc": OfflineRun(agent=BC()),
    # 2601.08136 and its official code: 250k steps at action repeat 1, one environment, one update per step.
    "rfm-paper": Run(
        env="envpool:CheetahRun-v1",
        agent=RFM_PAPER,
        steps=250_000,
        collect=10_000,
        buffer_size=250_000,
        eval_episodes=25,
    ),
    # The main job of `make train`: a few minutes on two cores.
    "rfm-cartpole": Run(
        env="envpool:CartpoleSwingup-v1",
        agent=RFM(
            estimator=Markov(),
            solver=Midpoint(steps=3),
            **ONE,
            temperature=Anneal(0.2, 0.02, steps=50_000),
            actor_lr=3e-4,
            critic=Critics(tau=0.02, decay_steps=58_000),
            embedding=32,
            decay_steps=58_000,
        ),
        steps=120_000,
        collect=4_000,
        num_envs=8,
        updates=4,
        n_step=5,
        buffer_size=120_000,
        eval_every=10_000,
        log_every=2_000,
    ),
}
