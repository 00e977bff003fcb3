"""The list "outstanding on GPU" of docs/background/benchmarks.md, in its order: checks, times, then training runs.

    python benchmarks/gpu.py --out DIR [--minutes M] [--only NAME]

Each stage is a program of its own whose output goes to DIR/NAME.log while it runs; how it ended goes to
DIR/stages.jsonl. A stage that failed does not stop the others, and training runs go on where an earlier call left them,
so the script may be given as little time as there is. `--only` runs the stages whose names contain it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import tyro

HERE = Path(__file__).parent
PYTHON = sys.executable
COMPARE = [PYTHON, "-m", "contraflow", "compare", "--agents"]
FIRST = ("CheetahRun-v1", "FishSwim-v1", "FingerTurnHard-v1", "WalkerRun-v1")
THEN = ("CartpoleSwingup-v1", "FishUpright-v1", "WalkerWalk-v1", "FingerSpin-v1")


def compared(tasks: tuple[str, ...], out: Path) -> list[str]:
    """The paper's setting: 250 000 steps, one environment, one update per step, width 256; two runs at a time."""
    envs = ",".join(f"envpool:{task}" for task in tasks)
    settings = "--steps 250000 --collect 10000 --eval-every 25000 --eval-episodes 25 --seeds 5 --jobs 2"
    settings += " --width 256 --critic.width 256"
    agents = "rfm-paper,rfm,sir,sac"
    return [*COMPARE, agents, "--own", "rfm-paper", "--envs", envs, *settings.split(), "--out", str(out)]


def family(out: Path) -> list[str]:
    """All presets of the online family on two of the study's tasks, at its settings."""
    agents = "rfm,rfm-one,maxentdp,sdac,dqs,qsm,flame,flame-m,mfpo,dpmd,fpmd,fpmd-m,qvpo,dacer,td3,sac,sir"
    settings = "--steps 40000 --collect 4000 --num-envs 4 --updates 2 --batch-size 128 --n-step 3 --buffer-size 40000"
    settings += " --critic.tau 0.02 --final-episodes 8 --seeds 3 --jobs 2"
    envs = "envpool:WalkerWalk-v1,envpool:CheetahRun-v1"
    return [*COMPARE, agents, "--envs", envs, *settings.split(), "--out", str(out)]


def stages(out: Path) -> dict[str, list[str]]:
    """Commands by name, in order."""
    device = "import jax; print(jax.__version__, jax.devices()); assert jax.default_backend() == 'gpu'"
    tests = [str(HERE.parent / "tests" / part) for part in ("flow", "contract")]
    speed = [PYTHON, str(HERE / "speed.py")]
    seeds = [*speed, "seeds", "--width", "256", "--env"]
    return {
        "device": [PYTHON, "-c", device],
        "tests": [PYTHON, "-m", "pytest", "-q", *tests],
        "speed": [*speed, "update", "act"],
        "seeds-sac": [*seeds, "jax:cartpole-swingup"],
        "seeds-rfm": [*seeds, "jax:cartpole-swingup", "--agent", "rfm"],
        "playground": [*speed, "environments"],
        "playground-seeds": [*seeds, "playground:CartpoleSwingup"],
        "returns-first": compared(FIRST, out / "returns"),
        "family": family(out / "family"),
        "returns-then": compared(THEN, out / "returns"),
    }


def main(out: Path, minutes: float = 600.0, only: str = "") -> int:
    """Run the stages until the time is up; 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * minutes, 0
    for name, command in stages(out).items():
        left = end - time.monotonic()
        if only not in name or left <= 0:
            continue
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        with (out / f"{name}.log").open("a") as log:
            env = os.environ | {"PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
            try:
                code: int | str = process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                code = "out of time"
        failed += code != 0
        row = {"stage": name, "code": code, "seconds": round(time.monotonic() - begin, 1), "command": command[1:]}
        with (out / "stages.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {'done' if code == 0 else code} after {row['seconds']:.0f} s, {out / name}.log", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
