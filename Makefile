# Every target makes what it needs: `.venv` is created on first use and brought up to date when pyproject.toml,
# constraints.txt or scripts/make_venv change. PYTHON=python3.12 chooses the interpreter.

VENV := .venv
FLASHINFER_VENV := .venv-flashinfer
RECIPE := scripts/make_venv pyproject.toml constraints.txt
BIN := $(VENV)/bin
TYPESCRIPT := typescript@7.0.2
TSC := .typescript/node_modules/.bin/tsc

# `make test LEVEL=avx2` holds the package's native code, and torch with its oneDNN, to that level of processor.
ifdef LEVEL
export CASCADE_LLM_LEVEL := $(LEVEL)
export ATEN_CPU_CAPABILITY := $(or $(if $(filter avx512% amx,$(LEVEL)),avx512),$(if $(filter avx%,$(LEVEL)),avx2),default)
ONEDNN_ISA_baseline := SSE41
ONEDNN_ISA_avx2 := AVX2
ONEDNN_ISA_avxvnni := AVX2_VNNI
ONEDNN_ISA_avx512 := AVX512_CORE_VNNI
ONEDNN_ISA_avx512bf16 := AVX512_CORE_BF16
ONEDNN_ISA_amx := AVX512_CORE_AMX
export ONEDNN_MAX_CPU_ISA := $(or $(ONEDNN_ISA_$(LEVEL)),DEFAULT)
endif

.PHONY: help demo test test-slow check check-page typescript format venv flashinfer-signatures clean clean-venv

help:
	@echo "make demo                   a first look: a small real model on this machine, prefixes shared"
	@echo "make test                   the tests, a few minutes on two cores, no GPU needed"
	@echo "make test LEVEL=avx2        the same, held to a lower level of processor"
	@echo "make test-slow              the tests that take longer"
	@echo "make check                  ruff, mypy and the import rules; changes nothing"
	@echo "make check-page             types of the server's page, by TypeScript, which npm brings; changes nothing"
	@echo "make format                 let ruff mend what it can"
	@echo "make venv                   only the virtual environment, $(VENV)"
	@echo "make flashinfer-signatures  compare FlashInfer's signatures with the committed ones, in $(FLASHINFER_VENV)"
	@echo "make clean                  remove caches and build output (make clean-venv: the environments)"

venv: $(VENV)/.installed

$(VENV)/.installed: $(RECIPE)
	@scripts/make_venv $(VENV) dev

$(FLASHINFER_VENV)/.installed: $(RECIPE)
	@scripts/make_venv $(FLASHINFER_VENV) flashinfer

demo: venv
	@$(BIN)/cascade-llm demo

test: venv
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal

test-slow: venv
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal -m slow

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy scripts benchmarks
	$(BIN)/python -m pytest tests/test_imports.py

typescript: $(TSC)

$(TSC): Makefile
	@npm install --prefix .typescript --no-save --no-audit --no-fund --loglevel error $(TYPESCRIPT)
	@touch $(TSC)

check-page: typescript
	$(TSC) --project tsconfig.json

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

flashinfer-signatures: $(FLASHINFER_VENV)/.installed
	@$(FLASHINFER_VENV)/bin/python scripts/flashinfer_signatures.py --check tests/attention/flashinfer_signatures.json

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV) $(FLASHINFER_VENV) .typescript
