# make repro: sets up and runs the main job.   make test: sets up and runs all checks and tests.   make bench: speed.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport VIRTUAL_ENV

.PHONY: setup repro test lint docs audit ui exps bench clean

repro: setup
	dvc repro

# One process per core, each with separate test files and one thread, because the networks in the tests are small.
test: setup lint docs
	OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	ruff check .
	ruff format --check .
	mypy

# The documentation, in site/. A broken link or reference fails; no network is needed.
docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

# Known vulnerabilities of the pinned packages. Without access to the database, the audit is skipped.
audit: setup
	@if python -c 'import urllib.request; urllib.request.urlopen("https://api.osv.dev/v1/vulns/GHSA-462w-v97r-4m45", timeout=10)' 2>/dev/null; then \
		uv tool run pip-audit --requirement constraints.txt --no-deps --disable-pip --vulnerability-service osv; \
	else echo "audit skipped: https://api.osv.dev, the database of vulnerabilities, cannot be reached"; fi

ui: setup
	@autoslim experiments --address
	mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db

setup: .venv/installed

# uv installs the same packages in a fifth of pip's time. pip is the fallback, because uv does not read pip's settings.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' || \
		{ echo "autoslim needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) --version); run make PYTHON=python3.13"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --editable '.[dev]' --constraint constraints.txt || \
		.venv/bin/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

# Budget, cost, main measure by method and gain of all experiments.
exps: setup
	autoslim experiments

# Benchmarks of speed and memory, on the GPU if there is one. benchmarks/search.py without --quick takes hours.
bench: setup
	python benchmarks/speed.py
	python benchmarks/memory.py
	python benchmarks/search.py --quick

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache site
