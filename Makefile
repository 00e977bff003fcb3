# Needs only Python >= 3.11, make and git. Everything is installed into .venv, at the versions in constraints.txt.
PYTHON ?= python3
SEED ?= 0
OUT ?= runs/train-seed$(SEED)
JOBS ?= 2

TRAIN_EXTRAS = envpool,mujoco
DEV_EXTRAS = dev,docs,align,dmc,envpool,mujoco,offline,ray,sample,serve

.PHONY: train test tutorials test-all test-portable planted lint types docs clean

# Below the bar is a result, not an error; a machine without OpenGL has no film.
train: .venv/installed-train
	@.venv/bin/python -m contraflow train rfm-walker --seed $(SEED) --out $(OUT) --require 120 || test $$? -eq 1
	@.venv/bin/python -m contraflow eval $(OUT)/best --episodes 1 --video $(OUT)/policy.gif --fps 40 --frames 200 \
		|| echo "no film could be made here; everything else is in $(OUT)"

test: .venv/installed-dev
	.venv/bin/python -m pytest -n $(JOBS)

# What the tutorials tell their readers to run.
tutorials: .venv/installed-dev
	.venv/bin/python -m pytest -m slow tests/test_docs.py

test-all: .venv/installed-dev
	.venv/bin/python -m pytest -n $(JOBS) -m "not gpu"

# The numerical tests with the machine code of other processors. VARIANTS=avx2,sse TESTS=tests/flow for a part.
test-portable: .venv/installed-dev
	.venv/bin/python tests/portable.py --jobs $(JOBS) $(if $(VARIANTS),--only $(VARIANTS)) $(TESTS)

# Does the suite notice what is wrong? BUGS=dppo for those whose names contain it.
planted: .venv/installed-dev
	.venv/bin/python -m tests.planted --jobs $(JOBS) $(BUGS)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed-dev
	.venv/bin/basedpyright

docs: .venv/installed-dev
	.venv/bin/mkdocs build --strict

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed-train: EXTRAS = $(TRAIN_EXTRAS)
.venv/installed-dev: EXTRAS = $(DEV_EXTRAS)
# Clients that the server is tested with; jax2onnx, which excludes the newer orbax-checkpoint that is tested here and does
# not import it; and metaworld for its scripted policies, which names an older mujoco. Their own requirements would not
# fit; what they do need is in dev.
.venv/installed-dev: WITHOUT = openpi-client==0.1.2 vla-eval==0.8.0 jax2onnx==0.17.1 metaworld==3.1.1
.venv/installed-train .venv/installed-dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@test -x .venv/bin/pip || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@$(if $(WITHOUT),.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(WITHOUT))
	@touch $@
