"""The numerical tests with the machine code of other processors than this one: a tolerance must hold on all of them.

    make test-portable                                  # all variants, all numerical tests
    python tests/portable.py --only avx2,sse tests/flow # some

One row per variant: the tests that passed, failed and broke, minutes, and a print of the bits that one small program
computes with JAX and with NumPy, so that one sees whether a variant changed anything here (an older processor than the
variant asks for computes as before). The names of tests that fail come below. Exit code 1 if any did.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("flow", "nets", "policy", "rl", "agents", "contract", "sampling", "data/test_buffer.py", "experiments")
KEEP = "OPENBLAS_CORETYPE"  # where the machine sets it, its processor needs it

# tests/conftest.py compiles without optimisation, which is faster; what users run is optimised.
OPTIMISED = {"XLA_FLAGS": "--xla_backend_optimization_level=3", "NPROC": "1"}  # NPROC: threads


def processor(isa: str, onednn: str, openblas: str) -> dict[str, str]:
    """That of an older processor: XLA's own code, its matrix products, NumPy's and LAPACK's."""
    flags = f"{OPTIMISED['XLA_FLAGS']} --xla_cpu_max_isa={isa}"
    return OPTIMISED | {"XLA_FLAGS": flags, "ONEDNN_MAX_CPU_ISA": onednn, KEEP: openblas}


def vectors(bits: int) -> dict[str, str]:
    return OPTIMISED | {"XLA_FLAGS": f"{OPTIMISED['XLA_FLAGS']} --xla_cpu_prefer_vector_width={bits}"}


VARIANTS: dict[str, dict[str, str]] = {
    "here": OPTIMISED,
    "threads": OPTIMISED | {"NPROC": "2"},
    "plain": {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_enable_fast_math=false", "NPROC": "1"},
    "narrow": vectors(128),
    "wide": vectors(512),
    "avx2": processor("AVX2", "AVX2", "Haswell"),
    "avx": processor("AVX", "AVX", "Sandybridge"),
    "sse": processor("SSE4_2", "SSE41", "Nehalem"),
}

PRINT = """
import hashlib, jax, jax.numpy as jnp, numpy as np
x = np.sin(np.arange(90_000, dtype=np.float32)).reshape(300, 300)
loss = lambda x: jnp.mean(jnp.tanh(x @ x) ** 2) + jnp.sum(jnp.log1p(x[0] ** 2) / 7) + jnp.mean(x @ x[0])
jaxs = [jax.jit(jax.grad(loss))(x[:64, :64]), jax.jit(jnp.sum)(x), jax.jit(jnp.matmul)(x, x[0])]
print(*(hashlib.sha256(b"".join(np.asarray(y).tobytes() for y in ys)).hexdigest()[:4] for ys in (jaxs, [x @ x])))
"""


@dataclass(frozen=True)
class Outcome:
    """`failed` are names of tests, or what pytest said where it could not run them."""

    bits: str
    passed: int
    failed: tuple[str, ...]
    minutes: float


def environment(name: str) -> dict[str, str]:
    """That of a variant; what a machine sets for its OpenBLAS stays."""
    return os.environ | {k: v for k, v in VARIANTS[name].items() if k != KEEP or k not in os.environ}


def run(name: str, paths: list[str], jobs: int) -> Outcome:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        env = environment(name)
        bits = subprocess.run([sys.executable, "-c", PRINT], env=env, capture_output=True, text=True, check=True).stdout
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), f"--junitxml={report}", *paths]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = tuple(
        f"{case.get('classname')}::{case.get('name')}: {(fault.get('message') or '').splitlines()[0][:120]}"
        for case in cases
        for fault in (*case.findall("failure"), *case.findall("error"))
    )
    skipped = sum(case.find("skipped") is not None for case in cases)
    if done.returncode and not bad:  # 5: there was no test
        bad = (f"pytest ended with {done.returncode}: {' '.join((done.stdout + done.stderr).split())[-300:]}",)
    return Outcome(bits.strip(), len(cases) - skipped - len(bad), bad, (time.monotonic() - begin) / 60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files, folders or tests; all numerical ones")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, of %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="workers of pytest")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    paths = chosen.paths or [str(path) for part in TESTS if (path := ROOT / "tests" / part).exists()]
    if KEEP in os.environ:
        print(f"{KEEP}={os.environ[KEEP]} is set on this machine and stays: NumPy computes alike in all variants")
    outcomes = {}
    print(f"{'variant':10s} {'bits':>10s} {'passed':>7s} {'failed':>7s} {'minutes':>8s}", flush=True)
    for name in names:
        it = outcomes[name] = run(name, paths, chosen.jobs)
        print(f"{name:10s} {it.bits:>10s} {it.passed:7d} {len(it.failed):7d} {it.minutes:8.1f}", flush=True)
    for name, it in outcomes.items():
        for test in it.failed:
            print(f"{name}: {test}")
    return 1 if any(it.failed for it in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
