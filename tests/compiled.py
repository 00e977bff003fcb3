"""The suite compiles without optimisation (tests/conftest.py), which a program of thousands of iterations pays for."""

from functools import partial

import jax

optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "1"})
