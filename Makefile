# Two commands are all the set-up there is:
#
#   make quickstart   makes .venv, installs, and runs the whole pipeline: response labels -> step scores -> PPO -> report
#   make test         makes the same .venv, installs the test extra, and runs every check
#
# Further: `make contract-oldest` (the oldest TRL that we support, in an environment of its own), `make clean`,
# `make bench-disaggregation DATA_DIR=...` (docs/disaggregation.md), `make bench-evidence` (docs/evidence.md).
# Another Python: `make test PYTHON=/path/to/python3.12`.

VENV := .venv
OLDEST_TRL := 1.14.2
OLDEST_VENV := .venv-trl-1.14

# The first interpreter that runs and is new enough: a name on PATH alone proves nothing (pyenv has shims for all).
CANDIDATES := python3.11 python3.12 python3.13 python3 python
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in $(CANDIDATES); do "$$name" $(IS_NEW_ENOUGH) && echo "$$name" && break; done)
endif

# Nothing here needs the network once pip is done, and nothing is to be sent anywhere.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test contract-oldest bench-disaggregation bench-evidence clean
.SECONDARY:   # keeps the .created stamps
.NOTPARALLEL: # two installations into one environment would trip over each other

quickstart: $(VENV)/.installed-plots
	$(OFFLINE) $(VENV)/bin/fractal-rm quickstart

test: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(OFFLINE) $(VENV)/bin/python -m pytest --durations=15

contract-oldest: $(OLDEST_VENV)/.installed-test
	$(OFFLINE) $(OLDEST_VENV)/bin/python -m pytest --durations=15 \
	    tests/test_trl_contract.py $(wildcard tests/test_step_ppo_trainer.py)

# Hours on two cores; goes on where it was. DATA_DIR names the folder of the data sets.
DATA_DIR ?= $(FRACTAL_RM_DATA)
bench-disaggregation: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/disaggregation.py --data-dir "$(DATA_DIR)" --jobs 2
	$(VENV)/bin/python benchmarks/tables.py

# Hours on two cores; goes on where it was. The settings of the arms are committed: --tune true makes them anew.
JOBS ?= 2
bench-evidence: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/dense_vs_outcome.py --jobs $(JOBS)
	$(VENV)/bin/python benchmarks/tables.py

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist .hypothesis .pytest_cache .ruff_cache
	find fractal_rm tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is the last thing that is written: an environment that was interrupted half way is made again.
%/.created:
	@"$(PYTHON)" $(IS_NEW_ENOUGH) || { \
	    echo "fractal_rm needs Python 3.11 or newer and found none (PYTHON='$(PYTHON)'): install one, or name it," \
	         "as in 'make $(MAKECMDGOALS) PYTHON=/path/to/python3.12'." >&2; exit 1; }
	"$(PYTHON)" -m venv $*
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

# The same pins, but for TRL itself.
$(OLDEST_VENV)/.installed-%: pyproject.toml constraints.txt Makefile | $(OLDEST_VENV)/.created
	sed 's/^trl==.*/trl==$(OLDEST_TRL)/' constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install -c $(OLDEST_VENV)/constraints.txt -e '.[$*]'
	@touch $@
