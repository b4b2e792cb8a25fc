# Every target sets up what it needs: nothing but Python 3.11+ and make is expected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests keep their zoo here, so that a second run starts at once.
export MOPE_BB_TEST_HOME ?= $(CURDIR)/.cache/test-home

.PHONY: demo test check format wheel clean

# The main job, end to end: experts, training of the PCM, what it brought, and one question for three preferences.
demo: $(STAMP)
	@set -e; pcm=$$($(BIN)/mope-bb train --merge product --max-minutes 3); \
	$(BIN)/mope-bb eval --quick --pcm "$$pcm"; \
	$(BIN)/mope-bb chat --pcm "$$pcm" --seed 7 --once "How do I fix a bike?" \
		--pref concise,technical,grumpy --pref simple,friendly --pref informative,technical,friendly

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not deadlines and not slow" --ignore tests/page
	$(BIN)/python -m pytest -m deadlines

# What `make test` has no time for, beside `make page` and `make engines`.
.PHONY: slow
slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[zoo,dev]'
	touch $@

# vLLM on CPU for the tests of tests/engines, in an environment of its own (3 GB): its versions are not the package's.
VLLM := .venv-vllm
.PHONY: vllm-env
vllm-env: $(VLLM)/.installed

$(VLLM)/.installed: tests/engines/requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --progress-bar off --no-compile --no-deps -r $<
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .cache dist build .mypy_cache .ruff_cache .pytest_cache

# Two to three hours: what docs/evidence.md rests on. Results go to evidence/.
.PHONY: evidence
evidence: $(STAMP)
	$(BIN)/python -m tests.evidence
	$(BIN)/python -m tests.evidence_training
	$(BIN)/python -m tests.evidence_async
	$(BIN)/python -m tests.evidence_speed
	$(BIN)/python -m tests.evidence_faults

# Tests against the real vLLM on CPU and `transformers serve`, in an environment of their own (3 GB).
.PHONY: engines
engines: $(STAMP) vllm-env
	$(BIN)/python -m pytest tests/engines --engines

# The page of `mope-bb serve` in Chromium, which has to be on the PATH (Debian: apt-get install chromium).
.PHONY: page
page: $(STAMP)
	$(BIN)/python -m pytest tests/page

# Claims about speed, as ratios measured side by side. Results go to benchmarks/.
.PHONY: bench
bench: $(STAMP)
	$(BIN)/python -m benchmarks
