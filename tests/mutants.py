"""Deliberate bugs, planted one by one: does the suite catch them?

    python tests/mutants.py [--only REGEX] [--files REGEX] [--jobs 2]      # --files . for all

Each mutant is a replacement in a copy of `src`, which must match exactly once. The tests mapped to it run on that copy
with `pytest -x -q`; caught means that a test failed (not that pytest could not start). First the same tests run on an
untouched copy and must pass; what they compile is kept for the mutants, where it is the same program. Exit code 1 if a
mutant survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mutants_agents
import mutants_data
import mutants_envs
import mutants_flow
import mutants_imitation
import mutants_report
import mutants_rl
import mutants_running
import mutants_sample

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # for the tests of one mutant; all of them untouched get four times that


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in src/contraflow/`file`; `tests` are files or tests in tests/ that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PARTS = (
    mutants_flow,
    mutants_sample,
    mutants_rl,
    mutants_agents,
    mutants_envs,
    mutants_running,
    mutants_report,
    mutants_data,
    mutants_imitation,
)
MUTANTS = tuple(Mutant(*row) for part in PARTS for row in part.ROWS)


def copy_source(folder: Path) -> Path:
    target = folder / "src"
    shutil.copytree(ROOT / "src", target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def plant(mutant: Mutant, source: Path) -> None:
    """Raises ValueError unless the text to replace is there exactly once."""
    file = source / "contraflow" / mutant.file
    text = file.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {found} times in {mutant.file}; mend tests/mutants.py")
    file.write_text(text.replace(mutant.old, mutant.new))


def run(source: Path, tests: tuple[str, ...], cache: Path, timeout: float = TIMEOUT) -> tuple[int, str]:
    """Exit code and output of pytest on the copy; compiled programs are kept in `cache`, one folder per thread."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "XLA_FLAGS": flags}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache / threading.current_thread().name)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    if all("::" in t for t in tests):  # of a whole file the default tests, by name also a slow one
        command += ["-m", "not gpu"]
    paths = [str(Path("tests") / t) for t in tests]
    for _ in range(4):
        try:
            done = subprocess.run(
                command + paths, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end within {timeout} s"
        if done.returncode >= 0:  # a signal from outside says nothing about the mutant: once more
            break
    return done.returncode, f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


def judge(mutant: Mutant, cache: Path) -> tuple[Mutant, str | None, str, float]:
    """(mutant, the test that caught it or None, pytest's output, seconds)."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = copy_source(Path(folder))
        plant(mutant, source)
        code, output = run(source, mutant.tests, cache)
    caught = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    return mutant, caught[1] if code == 1 and caught else None, output, time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name matches this regular expression")
    parser.add_argument(
        "--files",
        default="^(?!compare/|report/|cli/compare)",
        help="mutants in files whose names match; by default all but comparing and reporting",
    )
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if re.search(options.only, m.name) and re.search(options.files, m.file)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        source = copy_source(Path(folder))
        for mutant in chosen:  # all replacements match before any time is spent
            text = (source / "contraflow" / mutant.file).read_text()
            if text.count(mutant.old) != 1:
                plant(mutant, source)
        where = [sys.executable, "-c", "import contraflow; print(contraflow.__file__)"]
        imported = subprocess.run(where, env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True)
        if not imported.stdout.startswith(str(source)):
            print(f"the copy is not what gets imported: {imported.stdout or imported.stderr}")
            return 2
        # The untouched tests in as many parts as there are jobs, each test once.
        tests = list(dict.fromkeys(t for m in chosen for t in m.tests))
        kinds = [[t for t in tests if "::" in t], [t for t in tests if "::" not in t]]
        parts = [
            tuple(kind[i :: options.jobs]) for kind in kinds for i in range(options.jobs) if kind[i :: options.jobs]
        ]
        for code, output in pool.map(lambda part: run(source, part, Path(folder), 4 * TIMEOUT), parts):
            if code != 0:
                print("the tests fail without any mutant:\n" + output)
                return 2
        print(f"{len(tests)} mapped files and tests pass untouched ({time.monotonic() - begin:.0f} s)", flush=True)
        survivors = 0
        for mutant, caught, output, seconds in pool.map(lambda mutant: judge(mutant, Path(folder)), chosen):
            survivors += caught is None
            print(
                f"{'caught  ' if caught else 'SURVIVED'} {mutant.name:52} {seconds:4.0f} s  {caught or ''}", flush=True
            )
            if caught is None:
                print(output[-2000:], flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught in {time.monotonic() - begin:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
