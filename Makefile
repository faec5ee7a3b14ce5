# Everything runs from .venv, which `make setup` builds from the lock for its Python; each target calls it by itself.
# Without PYTHON= an environment that is there keeps its Python: `make check` must not undo `make setup PYTHON=python3.13`.
VENV := .venv
PYTHON ?= $(or $(shell sed -n 's/^executable = //p' $(VENV)/pyvenv.cfg 2>/dev/null | xargs -r ls 2>/dev/null),python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# JAX ended its releases for Python 3.11 at 0.10.2: later Pythons have a lock of their own.
LOCK = requirements-$$($(PYTHON) -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")').lock

.DEFAULT_GOAL := help
.PHONY: help setup lock check test test-gcs-servers test-slurm test-image test-versions test-orbax test-adopt demo bitrot unreadable incidents bench bench-quick chaos recovery docs pictures format clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A content key, not file times: a fresh checkout, a branch switch or a restored cache must not be mistaken for a change.
setup: ## make .venv from the lock for PYTHON (needs only Python 3.11+ and make)
	@command -v $(PYTHON) >/dev/null || { echo "make setup: $(PYTHON) not found; say which: make setup PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make setup: Python 3.11 or newer is needed, $(PYTHON) is older; say which: make setup PYTHON=python3.11" >&2; exit 2; }
	@set -e; lock=$(LOCK); key=$$({ cat $$lock pyproject.toml; $(PYTHON) -V; } | cksum); \
	if [ -x $(BIN)/python ] && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$key" ]; then exit 0; fi; \
	echo "make setup: building $(VENV) from $$lock"; \
	rm -f $(STAMP); \
	$(PYTHON) -m venv --clear $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $$lock; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	echo "$$key" > $(STAMP)

# uv keeps the pins that are there and still fit pyproject.toml: a new version is an edit of its line, or of the bounds.
lock: setup ## make both locks again from pyproject.toml: pins stay, hashes are the index's
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@set -e; for version in 3.11 3.12; do lock=requirements-$$version.lock; \
	  $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
	    $(BIN)/uv pip compile pyproject.toml - --extra=train --extra=grain --extra=dev --extra=traces --extra=safetensors \
	      --python-version=$$version --generate-hashes --no-annotate --no-header --quiet --output-file=$$lock; \
	  sed -i '1i # Every package of `make setup`, pinned with all it needs, and the hashes of all its files on the index, whatever their\n# platform and Python; setuptools builds the editable install. `make lock` makes it.' $$lock; \
	done

check: setup ## ruff, format, mypy --strict, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout_rules.py

# Three files at a time on two cores: the jobs' processes wait more than they compute. Those come first (tests/conftest.py).
test: check ## make check and the whole test suite
	$(BIN)/python -m pytest -n 3 --dist=loadfile --no-loadscope-reorder

test-gcs-servers: setup ## conformance, whole runs, faults and the demo on two servers of others; into docs/gcs.md (TESTBENCH=path or URL)
	TESTBENCH=$(TESTBENCH) $(BIN)/python -m tests.proof.gcs_servers --write=docs/gcs.md

test-slurm: setup ## a real Slurm of four nodes: preempt, lose and drain nodes; writes docs/slurm.md's table (needs root, Debian)
	@{ command -v slurmctld && command -v munged; } >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends slurm-wlm munge; }
	SLURM_REPORT=docs/slurm.md $(BIN)/python -m pytest tests/launch/test_slurm_real.py

test-image: setup ## build the image here and run the demo in it; writes docs/containers.md's figures (needs root, Debian)
	@{ command -v podman && command -v buildah && command -v debootstrap && command -v docker-compose; } >/dev/null || \
	  { apt-get update -q && apt-get install -qy --no-install-recommends podman buildah debootstrap docker-compose; }
	IMAGE_REPORT=docs/containers.md $(BIN)/python -m pytest -o faulthandler_timeout=1560 tests/launch/test_image.py tests/launch/test_compose.py

test-versions: setup ## the package beside older and newer JAX, Orbax and Pythons; into docs/versions.md (ROWS=, ONLY=; a row: 5 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/python -m tests.proof.versions --rows=$(ROWS) --only=$(ONLY) --write=docs/versions.md

test-orbax: setup ## Orbax's own tests of its CheckpointManager and v1 API with ours; into docs/from-orbax.md (ORBAX=checkout; 2 minutes)
	@test -n "$(ORBAX)" || { echo "make test-orbax: say where Orbax's repository is: make test-orbax ORBAX=path" >&2; exit 2; }
	$(BIN)/python -m tests.proof.orbax_suite $(ORBAX) --only='$(ONLY)' $(if $(ONLY),,--write=docs/from-orbax.md)
	$(BIN)/python -m tests.proof.orbax_suite $(ORBAX) --api=v1 --only='$(ONLY)' $(if $(ONLY),,--write=docs/from-orbax.md)

test-adopt: setup ## directories of Orbax 0.4.8 to 0.12, adopted and compared; into docs/from-orbax.md (ONLY=versions; 5 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/python -m tests.proof.adopt_matrix --only='$(ONLY)' $(if $(ONLY),,--write=docs/from-orbax.md)

demo: setup ## train on 4 simulated hosts, kill one in mid-save, come back on 2 with another mesh; STORAGE=gcs: in a bucket
	$(BIN)/python -m launch.demo --storage=$(or $(STORAGE),local)

bitrot: setup ## 700 damaged files, each restored and compared bit for bit (about 2 minutes); FAULTS=, SEED=
	$(BIN)/python -m tests.proof.bitrot --faults=$(or $(FAULTS),700) --seed=$(or $(SEED),1) --report=bitrot-report.md

unreadable: setup ## every way of not being able to read a run, and of it being damaged (about 3 minutes; needs a C compiler)
	$(BIN)/python -m tests.proof.unreadable --report=unreadable-report.md --write=docs/integrity.md

incidents: setup ## real jobs in trouble, and what watch, doctor, alerts and report say; into docs/failure-modes.md (10 minutes; needs root, Debian)
	@command -v prometheus >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends prometheus; }
	$(BIN)/python -m tests.proof.incidents --write=docs/failure-modes.md

bench: setup ## saves and restores beside Orbax and PyTorch, and growth, into docs/ (40 minutes at most, or BUDGET=; prints its plan first)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 torchsnapshot==0.1.0  # the `bench` extra
	$(BIN)/python -m benchmarks.whole --budget=$(or $(BUDGET),40) --write=docs

bench-quick: setup ## before and after a change: ratios in three minutes (AGAINST=another checkout; NEW=1: a new baseline)
	$(BIN)/python -m benchmarks.quick $(if $(AGAINST),--against=$(AGAINST)) $(if $(NEW),--new)

chaos: setup ## 210 rounds of faults against real jobs, the run checked after each, and 10,000 forged runs (about 35 minutes)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check fusepy==3.0.1  # the `chaos` extra
	$(BIN)/python -m tests.proof.chaos --rounds=$(or $(ROUNDS),210) --seed=$(or $(SEED),20261124) --report=chaos-report.md
	$(BIN)/python -m tests.proof.fuzz --mutations=$(or $(MUTATIONS),10000) --seed=$(or $(SEED),20261124) --commands --alone --report=fuzz-report.md

recovery: setup ## 100 losses of hosts within what copies promise and 20 beyond it, of a job that trains; into docs/tiers.md (30 minutes)
	$(BIN)/python -m tests.proof.recovery --rounds=$(or $(ROUNDS),100) --outside=$(or $(OUTSIDE),20) --seed=$(or $(SEED),20261127) \
	  --out=recovery-$(or $(SEED),20261127).jsonl --write=docs/tiers.md

docs: setup ## build the documentation's site into build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8'  # the `docs` extra
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

pictures: setup ## make the pictures of screens in docs/images again, from a run made for them
	$(BIN)/python -m tests.pages.pictures

format: setup ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info demo-run chaos-report.md fuzz-report.md bitrot-report.md unreadable-report.md recovery-*.jsonl .mypy_cache .ruff_cache .pytest_cache .hypothesis
