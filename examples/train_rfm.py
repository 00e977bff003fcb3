"""Train Reverse Flow Matching on a task of its own kind, then use the policy."""

import numpy as np

import contraflow
from contraflow import RFM, Critics, Run, train

if __name__ == "__main__":
    agent = RFM(width=32, critic=Critics(width=32, gamma=0.9))
    run = Run(env="probe:obs-action", agent=agent, steps=3_000, collect=500, num_envs=8, updates=8)
    result = train(run, "runs/example-rfm")
    print(f"mean return {result.returns.mean():.2f} after {result.steps} steps")
    policy = contraflow.load(result.folder)
    print("actions for three observations:", policy(np.array([[-0.5], [0.0], [0.5]])).ravel())
