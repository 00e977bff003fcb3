"""Runs an exported policy on NumPy and ONNX Runtime alone, both from `pip install numpy onnxruntime`.

Make the file with `contraflow export runs/x`, then `python run_onnx.py runs/x/policy/policy.onnx`.
"""

import sys
import time

import numpy as np
import onnxruntime


class OnnxPolicy:
    """Maps an observation, an array or a dict of arrays, to an action [a] or a chunk [h, a] for the robot."""

    def __init__(self, file, seed=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # small networks gain nothing from more
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.shapes = {x.name: x.shape for x in inputs}  # the first axis is the batch
        self.types = {x.name: np.uint8 if x.type == "tensor(uint8)" else np.float32 for x in inputs}
        self.rng = np.random.default_rng(seed)
        about = self.session.get_modelmeta().custom_metadata_map
        self.execute = int(about["execute"])  # how many actions of a chunk to carry out before the next call

    def __call__(self, obs):
        parts = {f"obs.{name}": x for name, x in obs.items()} if isinstance(obs, dict) else {"obs": obs}
        inputs = {name: np.asarray(x, self.types[name])[None] for name, x in parts.items()}
        if "noise" in self.shapes:
            inputs["noise"] = self.rng.standard_normal((1, self.shapes["noise"][1]), np.float32)
        return np.asarray(self.session.run(None, inputs)[0])[0]


if __name__ == "__main__":
    policy, times = OnnxPolicy(sys.argv[1]), []
    obs = np.zeros(policy.shapes["obs"][1], np.float32)  # read your sensors here
    for _ in range(100):
        start = time.perf_counter()
        policy(obs)
        times.append(time.perf_counter() - start)
    print(f"action {policy(obs)}, execute {policy.execute}, {1e6 * np.median(times):.0f} us per call")
