"""Every test runs with the strictest settings: shapes and types checked at run time, no silent broadcasting, no key
used twice, warnings are errors (pyproject.toml).

Most of the time goes into compiling, so a program is compiled once for all tests of a worker, and with
JAX_COMPILATION_CACHE_DIR=<folder> also for the next run. Annotations, shapes and keys are checked before that.
"""

import ctypes
import os
import signal
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:
    # Both are read when the backend starts, and what the caller sets has the last word. Workers share the cores: a
    # thread pool of one each, or they wait for one another. Most of the time goes into compiling: half of it without
    # optimisation.
    os.environ.setdefault("NPROC", "1")
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# A shell starts its background jobs with Ctrl-C ignored, and tests that press it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first import of contraflow: annotations of every function and module in it are checked from here on.
# An int may stand for a float, as everywhere in Python: Fixed(0).
install_import_hook("contraflow", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# One folder per worker: entries are not written atomically.
temporary = tempfile.TemporaryDirectory(prefix="contraflow-compiled-")
folder = os.path.join(
    os.environ.get("JAX_COMPILATION_CACHE_DIR") or temporary.name, os.environ.get("PYTEST_XDIST_WORKER", "main")
)
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)  # a key that is meant to be used twice: jax.random.clone

# The first example of a test compiles: no deadline. Derandomised, so that a red test is red again.
settings.register_profile("contraflow", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("contraflow")


trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the C library of Linux


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """A worker that kept the compiled programs of every file would grow to 6 GB; what it frees must go back, too."""
    yield
    jax.clear_caches()
    if trim is not None:
        trim(0)


@pytest.fixture
def allow_rank_promotion():
    """For code that calls libraries which broadcast ranks; also as @pytest.mark.usefixtures("allow_rank_promotion")."""
    with jax.numpy_rank_promotion("allow"):
        yield
