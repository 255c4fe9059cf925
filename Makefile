# One command each: make demo | test | lint | bench | readme | lock | clean.  Needs python3 (3.11 or later) alone.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
# Those of benchmarks/ that need minutes and no files; the others say in their --help what they need.
BENCHMARKS := $(addprefix benchmarks., calibration_cost engine_speed equality qat_step)

.PHONY: demo test lint bench readme lock clean
.DEFAULT_GOAL := demo

# Installs once, and again when the list of versions changes.
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("error: python 3.11 or later is needed, " + sys.version.split()[0] + " found; give another with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV) (a few minutes the first time)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-input -r requirements.lock
	@touch $@

demo: $(READY)
	@$(RUN) -m examples.demo

test: $(READY)
	@$(RUN) -m pytest

lint: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

# Tables are written to runs/bench/.
bench: $(READY)
	@set -e; for program in $(BENCHMARKS); do echo "== $$program"; $(RUN) -m $$program; done

# The demo's table and picture in README.md, and all tables of results/ there.
readme: $(READY)
	@$(RUN) -m examples.demo --save-path runs/demo
	@mkdir -p results docs
	@cp runs/demo/table.csv results/demo.csv
	@cp runs/demo/demo.png docs/demo.png
	@$(RUN) -m benchmarks.readme_tables

# What the extra "peers" alone brings: runtimes to compare with, which no test needs.
PEERS := nncf openvino openvino-telemetry markdown-it-py mdurl ninja psutil pydot rich tabulate

# Write down what is installed in $(VENV).  CUDA packages come with torch on Linux x86_64 only.
lock:
	@{ sed -n '/^#/p' requirements.lock; $(RUN) -m pip freeze --exclude-editable $(PEERS:%=--exclude %) | sed -E '/^(nvidia-|cuda-|triton==)/s/$$/ ; sys_platform == "linux" and platform_machine == "x86_64"/'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
