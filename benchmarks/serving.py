"""A server under load, and under frames of strangers; the numbers of docs/how-to/serve.md.

    python benchmarks/serving.py                # 10 000 requests of 8 clients, then 10 000 mutated frames

`contraflow serve` runs in a process of its own, and every client too, with the unmodified client of openpi. The bare
loop calls the same compiled policy on one observation after the other, without a server. Memory is the resident memory
of the server's process.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import DATA, Row, write

OBS, ACTION, HORIZON, EXECUTE = 20, 7, 8, 4
CLIENT = """
import json, sys, time, warnings
import numpy as np
warnings.simplefilter("ignore")
from openpi_client.websocket_client_policy import WebsocketClientPolicy
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
rng, took = np.random.default_rng(int(sys.argv[3])), []
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    obs = {"observation/state": rng.standard_normal(int(sys.argv[4])).astype(np.float32)}
    begin = time.perf_counter()
    policy.infer(obs)
    took.append(time.perf_counter() - begin)
print(json.dumps(took))
"""


def save(folder: Path):
    """Saves a cloned flow with fresh weights and returns it."""
    import jax.random as jr

    from contraflow.agents.offline.bc import BC
    from contraflow.core.types import EnvSpec
    from contraflow.policy.artifact import save_policy
    from contraflow.runtime.policy import load

    agent, spec = BC(), EnvSpec(OBS, ACTION * HORIZON, 1, None, False, horizon=HORIZON, execute=EXECUTE)
    save_policy(folder / "policy", agent.policy(agent.init(jr.key(0), spec)), spec, "probe:action")
    return load(folder)


@contextmanager
def server(folder: Path, batch: int) -> Iterator[tuple[int, int]]:
    """Yields the port and the process id of `contraflow serve`."""
    command = [sys.executable, "-m", "contraflow", "serve", str(folder), "--port", "0", "--batch", str(batch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = ""
            while "Ctrl-C stops" not in said:
                said += (line := process.stdout.readline())
                if not line:
                    raise SystemExit(f"the server did not start: {said}")
            found = re.search(r"ws://127\.0\.0\.1:(\d+) ", said)
            assert found is not None
            yield int(found[1]), process.pid
        finally:
            process.terminate()


def megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"contraflow_{name} "))


def row(case: str, took: list[float], seconds: float, **more: float) -> Row:
    p50, p99 = (1e3 * float(np.quantile(took, q)) for q in (0.5, 0.99))
    print(f"{case:34s} {len(took):6d} requests  p50 {p50:.2f} ms  p99 {p99:.2f} ms  {len(took) / seconds:.0f} a second")
    return {"case": case, "requests": len(took), "p50_ms": p50, "p99_ms": p99, "per_second": len(took) / seconds} | more


def bare(policy, count: int) -> Row:
    """The same program as the server's for one request, in a loop."""
    from contraflow.runtime.serve.request import Request
    from contraflow.runtime.serve.worker import Job, Worker

    worker, rng, took = Worker(policy, 1), np.random.default_rng(0), []
    begin = time.perf_counter()
    for k in range(count):
        job = Job(Request(rng.standard_normal(OBS).astype(np.float32)), (0, 0, 0, k))
        before = time.perf_counter()
        worker._compute([job])
        took.append(time.perf_counter() - before)
    seconds = time.perf_counter() - begin
    worker.close()
    return row("bare loop", took, seconds)


def load(port: int, pid: int, clients: int, count: int, case: str) -> Row:
    """`count` requests, shared among clients that ask as fast as they are answered."""
    memory, batches = megabytes(pid), metric(port, "batches_total")
    command = [sys.executable, "-c", CLIENT, str(port), str(count // clients)]
    processes = [
        subprocess.Popen([*command, str(seed), str(OBS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(clients)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    begin = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline() for process in processes if process.stdout is not None]
    seconds = time.perf_counter() - begin
    for process in processes:
        process.communicate()
    took = [x for answer in answers for x in json.loads(answer)]
    share = len(took) / (metric(port, "batches_total") - batches)
    return row(case, took, seconds, per_batch=share, before_mb=memory, after_mb=megabytes(pid))


def fuzz(port: int, pid: int, count: int, seed: int) -> Row:
    """Frames that were valid and were then changed, half of them in each protocol; the server answers every one."""
    from websockets.sync.client import connect

    from contraflow.core.codec import pack, unpack

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.runtime.serve_helpers import mutations

    obs, noise = np.zeros(OBS, np.float32), np.zeros((HORIZON, ACTION), np.float32)
    plain = [pack({"observation/state": obs, "seed": 3}), pack({"state": obs, "noise": noise, "session": "a"})]
    message = {"type": "observation", "payload": {"state": obs}, "seq": 1, "timestamp": 0.0}
    hello = pack(message | {"type": "hello"}, text_keys=True)
    image = {"__image__": True, "format": "png", "data": bytes(64), "shape": [8, 8, 3]}
    pictured = pack(message | {"payload": {"images": {"top": image}}}, text_keys=True)
    before, answered = megabytes(pid), 0
    for frame in mutations(plain, count // 2, seed):
        with connect(f"ws://127.0.0.1:{port}", compression=None) as socket:
            socket.recv(timeout=60)
            socket.send(frame)
            answered += isinstance(socket.recv(timeout=60), bytes)
    with connect(f"ws://127.0.0.1:{port}/vla-eval", compression=None) as socket:
        for frame in mutations([pack(message, text_keys=True), hello, pictured], count - count // 2, seed + 1):
            socket.send(frame)
            socket.send(hello)
            while (answer := unpack(socket.recv(timeout=60, decode=False)))["type"] != "hello":
                answered += answer["type"] == "action"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as health:
        alive = health.status == 200
    after = megabytes(pid)
    print(f"{count} mutated frames: {answered} answered with actions, healthy {alive}, {before:.1f} -> {after:.1f} MB")
    return {"case": f"mutated frames, seed {seed}", "requests": count, "before_mb": before, "after_mb": after}


def main() -> None:
    parser = argparse.ArgumentParser(description="A server under load, and under frames of strangers.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [bare(save(folder), chosen.requests)]
        with server(folder, chosen.clients) as (port, pid):
            rows.append(load(port, pid, 1, chosen.requests // 4, "1 client"))
            rows.append(load(port, pid, chosen.clients, chosen.requests, f"{chosen.clients} clients"))
            rows.append(load(port, pid, chosen.clients, chosen.requests, f"{chosen.clients} clients, again"))
            rows.append(fuzz(port, pid, chosen.frames, 0))
            rows.append(fuzz(port, pid, chosen.frames, 2))
        with server(folder, 1) as (port, pid):
            rows.append(load(port, pid, chosen.clients, chosen.requests, f"{chosen.clients} clients, no batches"))
    write(DATA / "serving.csv", rows, tuple(dict.fromkeys(key for row in rows for key in row)))


if __name__ == "__main__":
    main()
