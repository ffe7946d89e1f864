# Everything a developer types. Each target does its own set-up, once.

PYTHON ?= python3.11
SIZE   ?= demo
FILTER ?=

BIN    := .venv/bin
PINS   := constraints.txt pyproject.toml clients/python/pyproject.toml
STAMP  := .venv/.ready-$(shell cat $(PINS) 2>/dev/null | cksum | cut -d' ' -f1)
RANKS  := .venv/.ranks
EACH   := .venv/.each
CHROMA := .venv/chroma/.ready
BUF    := protos/node_modules/.bin/buf
CODE   := services clients protos/generate.py tests benchmarks examples
QUICK  := not slow and not storm and not gpu

.DEFAULT_GOAL := help
.PHONY: help setup proto fresh fmt lint types test test-slow test-storm test-gpu bench bench-full demo check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) $(RANKS) $(EACH) ## .venv with everything pinned (the second time under a second)

# torch goes first and alone: anything that pulls it takes a build of several GB.
$(STAMP): $(PINS)
	@command -v $(PYTHON) >/dev/null || { echo "qlorad needs Python 3.11, found no $(PYTHON); name another with make PYTHON=…"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e 'clients/python[cli]' -e '.[train,dev]'
	@rm -f .venv/.ready-*
	@touch $@

# DeepSpeed compiles what ranks need: two minutes, once. Only jobs of several ranks need it.
$(RANKS): $(STAMP)
	@if command -v g++ >/dev/null; then $(BIN)/python -m services.trainer.worker.prebuild && touch $@; \
	  else echo "no g++ here: jobs of several ranks will not run until there is one and 'make setup' ran again"; fi

# What serves adapters quickest on a processor is compiled too: a few seconds, once for each form of its source.
$(EACH): services/inference/worker/each.cpp $(STAMP)
	@if command -v g++ >/dev/null; then $(BIN)/python -m services.inference.worker.prebuild && touch $@ || true; \
	  else echo "no g++ here: adapters will cost more than they need until there is one and 'make setup' ran again"; fi

$(BUF): protos/package.json
	@if command -v npm >/dev/null; then \
	  npm install --prefix protos --no-package-lock --ignore-scripts --no-audit --no-fund --silent && touch $@; \
	  else echo "no npm here: buf is left out"; fi

proto: $(STAMP) ## make the stubs from the protos, and the tables in docs/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py
	$(BIN)/python -m tests.contract.reference

fresh: $(STAMP) ## whether the checked-in stubs are those of the protos
	$(BIN)/python -m pytest -q tests/contract/test_stubs.py

fmt: $(STAMP) $(BUF) ## format Python and protos
	$(BIN)/ruff check --fix-only --quiet $(CODE)
	$(BIN)/ruff format $(CODE)
	@if test -x $(BUF); then cd protos && ../$(BUF) format -w --path qlorad --path services; fi

lint: $(STAMP) $(BUF) ## ruff, buf lint, formats
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	@if test -x $(BUF); then cd protos && ../$(BUF) lint --path qlorad --path services && ../$(BUF) format -d --exit-code --path qlorad --path services; fi

types: $(STAMP) ## mypy --strict, plain inside worker/
	$(BIN)/mypy services clients/python/qlorad

test: $(STAMP) $(RANKS) $(EACH) ## all tests that take seconds (under 8 minutes in all)
	$(BIN)/python -m pytest -m "$(QUICK)" -n 2 --dist loadfile

# chromadb brings 240 MB and forty packages that nothing else here needs: an environment of its own, on top of .venv.
$(CHROMA): $(STAMP)
	@rm -rf .venv/chroma
	$(BIN)/python -m venv .venv/chroma
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$(.venv/chroma/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth"
	.venv/chroma/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt chromadb
	@touch $@

test-slow: $(STAMP) $(RANKS) $(EACH) $(if $(filter-out datasets%,$(FILTER)),,$(CHROMA)) ## storms in short form and the DeepSpeed matrix; FILTER=trainer narrows
	$(BIN)/python -m pytest -m slow --hypothesis-profile explore --timeout 1800 tests/$(FILTER)
	$(if $(filter-out datasets%,$(FILTER)),,.venv/chroma/bin/python -m pytest -m slow --timeout 600 tests/datasets/test_chroma.py)

test-storm: $(STAMP) $(RANKS) $(EACH) ## storms in long form; FILTER=trainer narrows
	$(BIN)/python -m pytest -m storm --hypothesis-profile explore --timeout 14400 tests/$(FILTER)

test-gpu: $(STAMP) ## what needs a CUDA device; torch in .venv must be a CUDA build
	$(BIN)/python -m pytest -m gpu --timeout 600 tests/gpu

bench: $(STAMP) $(EACH) ## what is quick to measure, against peers it installs; writes benchmarks/results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@missed=; for name in control datasets ledger neardup "train --quick" "serve --quick"; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || missed="$$missed $$name"; done; \
	  test -z "$$missed" || { echo "bars not met by:$$missed"; exit 1; }

bench-full: bench ## everything: training takes hours, on a machine that does nothing else
	@missed=; for name in train "train --checkpointing" serve; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || missed="$$missed $$name"; done; \
	  test -z "$$missed" || { echo "bars not met by:$$missed"; exit 1; }

demo: $(STAMP) ## the whole way, from documents to a tuned answer; SIZE=test is the quick one
	$(BIN)/python examples/demo.py --size $(SIZE)

check: lint types fresh test ## what must pass before a commit

clean: ## remove what was made here, .venv too
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache build dist protos/node_modules *.egg-info clients/python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
