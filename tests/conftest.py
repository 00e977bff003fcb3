"""Every test runs with the strictest settings: shapes and types checked at run time, no silent broadcasting, no key
used twice, warnings are errors (pyproject.toml).
"""

import ctypes
import os
import signal
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Half of the time goes into compiling. XLA reads this when its backend starts; a caller who names the level decides.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    if version("jaxlib").startswith("0.10."):  # later ones have no other generator of code
        QUICK += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("NPROC", "1")  # workers share the cores: a thread pool of one each, or they wait

# A shell starts its background jobs with Ctrl-C ignored, and tests that press it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first import of contraflow: annotations of every function and module in it are checked from here on.
# An int may stand for a float, as everywhere in Python: Fixed(0).
install_import_hook("contraflow", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)  # a key that is meant to be used twice: jax.random.clone

# The first example of a test compiles: no deadline. Derandomised, so that a red test is red again.
settings.register_profile("contraflow", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("contraflow")


MOST = 1.2e9  # bytes
trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the C library of Linux


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A worker that kept the compiled programs of every file would grow to 6 GB; what it frees must go back, too."""
    yield
    if resident() > MOST:
        jax.clear_caches()
        if trim is not None:
            trim(0)


def resident():
    """Memory of this process in bytes; where the system does not tell, infinite."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else float("inf")


@pytest.fixture
def allow_rank_promotion():
    """For code that calls libraries which broadcast ranks; also as @pytest.mark.usefixtures("allow_rank_promotion")."""
    with jax.numpy_rank_promotion("allow"):
        yield
