"""Named runs: `contraflow train NAME`. Every agent has a preset of its own name."""

from contraflow.agents import BC, DPPO, FPO, PPO, RFM, SAC, SIR, ReinFlow
from contraflow.flow.posterior import MinVariance, Reverse
from contraflow.flow.proposal import Noise
from contraflow.flow.solve import Euler
from contraflow.rl.critics import Critics
from contraflow.rl.select import Argmax, First, Softmax
from contraflow.rl.temperature import Anneal, Constant
from contraflow.train.offline import OfflineRun
from contraflow.train.onpolicy import OnPolicyRun
from contraflow.train.run import AnyRun, Run

RFM_PAPER = RFM(
    estimator=Reverse(samples=100, proposal=Noise(), control=MinVariance()),
    solver=Euler(steps=10),
    explore=Softmax(32),
    backup=Softmax(32),
    query=Softmax(32),
    exploit=Argmax(32),
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

PRESETS: dict[str, AnyRun] = {
    "rfm": Run(agent=RFM()),
    "sac": Run(agent=SAC()),
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
            explore=First(),
            backup=First(),
            temperature=Anneal(0.2, 0.02, steps=50_000),
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
