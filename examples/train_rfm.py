"""Train Reverse Flow Matching on a task of its own kind, then use the policy."""

import numpy as np

import contraflow
from contraflow import RFM, Critics, Replay, Run, train

if __name__ == "__main__":
    agent = RFM(critic=Critics(width=32, gamma=0.9))
    run = Run(agent, Replay("probe:obs-action", num_envs=8, collect=500, updates=8), steps=3_000)
    result = train(run, "runs/example-rfm")
    print(f"mean return {result.returns.mean():.2f} after {result.steps} steps")
    policy = contraflow.load(result.folder)
    print("actions for three observations:", policy(np.array([[-0.5], [0.0], [0.5]])).ravel())
