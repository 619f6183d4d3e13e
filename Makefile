# Everything a user or a contributor types. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
UV_VERSION := 0.13.9
UV := .uv/bin/uv
VENV := .venv
CHECKOV_VERSION := 3.3.30
PIP_AUDIT_VERSION := 2.10.1
CLI := node_modules/.bin/cdk
# What `make run` takes; see `make help`. Exported, so that values with spaces or quotes reach Python as they are.
DATA ?=
WEIGHTS ?=
BACKBONE ?=
INPUT ?= {}
OVERRIDE ?=
PORT ?= 4566
EXIT ?=
STAGE ?= dev
APPROVAL ?= broadening
# What `make report`, `make compare`, `make predict` and `make logs` take.
RUN ?=
BUCKET ?=
OUT ?=
IMAGE ?=
# In how many processes tests run. More than two gain little: most of the time goes into two groups that cannot be divided.
PROCESSES ?= 2
PYTEST = $(VENV)/bin/python -m pytest --numprocesses "$(PROCESSES)" --dist loadfile
# What `make verify` takes.
NAMES ?=
export DATA WEIGHTS BACKBONE INPUT OVERRIDE
export RUN BUCKET OUT IMAGE STAGE
export PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION := python
# Container images often set it. Every process of a run would then compile torch anew, ten seconds of processor time each.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: permissions faults audit help run diff deploy predict logs report compare test test-all verify bench bench-training bench-preparation bench-observability bench-serving check synth lock clean versions

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make run takes: DATA=folder|archive|https URL|s3 URI|dogs  WEIGHTS=state dict  BACKBONE=torchvision name"
	@echo "                  INPUT='{...}' (the state machine's input)  OVERRIDE='{...}' (the stage's configuration)"
	@echo "                  PORT=4566  EXIT=1 (post one test picture and end)"
	@echo "  make test, test-all and faults take: PROCESSES=2 (how many run tests side by side)"
	@echo "  make report takes:  RUN=s3://bucket/runs/execution  OUT=folder (default: below build/reports)"
	@echo "  make compare takes: BUCKET=s3://bucket  OUT=folder"
	@echo "  make diff, deploy, predict and logs take: STAGE=dev  IMAGE=picture (predict)  RUN=execution (logs; default: the newest)"

run: $(VENV)/.run $(CLI)  ## train and serve on this machine, without an AWS account
	@$(VENV)/bin/python -m local_cloud.run --data "$$DATA" --weights "$$WEIGHTS" --backbone "$$BACKBONE" --input "$$INPUT" \
	  --override "$$OVERRIDE" --port $(PORT) $(if $(EXIT),--exit)

# Of the two ways to compare, the one that needs no more than CDK's look-up role, which may only read.
diff: $(VENV)/.run $(CLI)  ## what a deployment of STAGE would change
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(CLI) diff -c "stage=$$STAGE" --method=template

deploy: $(VENV)/.run $(CLI)  ## cdk deploy of STAGE (default dev) with your own AWS credentials; APPROVAL=never does not ask
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(CLI) deploy -c "stage=$$STAGE" --require-approval "$(APPROVAL)"

predict: $(VENV)/.run  ## what IMAGE shows, asked of STAGE's API; waits for an endpoint that sleeps
	@$(VENV)/bin/python -m local_cloud.client predict --stage "$$STAGE" --image "$$IMAGE"

logs: $(VENV)/.run  ## states and last log lines of STAGE's newest execution, or of RUN
	@$(VENV)/bin/python -m local_cloud.client logs --stage "$$STAGE" --run "$$RUN"

report: $(VENV)/.run  ## the page on one run, at any time, from S3 with your own credentials
	@$(VENV)/bin/python -m local_cloud.report report --uri "$$RUN" --out "$$OUT"

compare: $(VENV)/.run  ## the page over all runs of a bucket
	@$(VENV)/bin/python -m local_cloud.report compare --uri "$$BUCKET" --out "$$OUT"

test: $(VENV)/.test $(CLI)  ## the fast tests, the whole state machine among them
	@$(PYTEST) -m "not slow"

test-all: $(VENV)/.test $(CLI)  ## all tests, minutes-long ones too
	@$(PYTEST)

faults: $(VENV)/.test $(CLI)  ## the fault tests alone, slow ones too (an hour and a half), and docs/faults.md made from them
	@$(PYTEST) tests/faults --write-faults

audit: $(UV)  ## known vulnerabilities of every locked package (asks PyPI and npm)
	@for list in requirements.txt model_code/requirements.txt model_code/requirements-server.txt model_code/requirements-server-gpu.txt; do \
	  echo "$$list" && $(UV) tool run "pip-audit==$(PIP_AUDIT_VERSION)" --strict --disable-pip --require-hashes -r "$$list" || exit 1; done
	@npm audit

verify: $(VENV)/.test $(CLI) .checkov/.done  ## every stage and configuration against all verifiers (a minute and a half); NAMES=dev prod for some
	@$(VENV)/bin/python -m infra.verify $(NAMES)

permissions: $(VENV)/.test $(CLI)  ## tables of docs/permissions.md and docs/architecture.md from the templates
	@$(VENV)/bin/python -m infra.verify.table --write

bench: bench-preparation bench-training bench-observability bench-serving  ## all benchmarks, and the tables of the documents made from them

bench-training: $(VENV)/.bench  ## loaders, steps, tuning and accuracy against named peers (an hour on two cores)
	@$(VENV)/bin/python bench/training.py && $(VENV)/bin/python bench/tables.py --write

bench-preparation: $(VENV)/.bench  ## time, processors and memory of prepare.py as the data grow
	@$(VENV)/bin/python bench/preparation.py && $(VENV)/bin/python bench/tables.py --write

bench-observability: $(VENV)/.bench  ## what the hook, the sampler and the step phases cost a training (minutes)
	@$(VENV)/bin/python bench/observability.py && $(VENV)/bin/python bench/tables.py --write

bench-serving: $(VENV)/.bench  ## our serving container against LitServe, TorchServe, Ray Serve and FastAPI (20 minutes; needs Java 17)
	@$(VENV)/bin/python bench/serving.py && $(VENV)/bin/python bench/tables.py --write

check: $(VENV)/.test  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy infra lambdas local_cloud app.py
	cd model_code && ../$(VENV)/bin/mypy --config-file ../pyproject.toml .

synth: $(VENV)/.run $(CLI)  ## the CloudFormation template of STAGE (default dev), into cdk.out
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(CLI) synth --quiet -c stage=$(STAGE) && ls cdk.out/*.template.json

# What the SageMaker training container brings itself, so that our jobs do not install it over its own.
IN_CONTAINER := torch torchvision numpy pillow boto3 botocore s3transfer protobuf jmespath urllib3 python-dateutil six sympy mpmath \
  typing-extensions
EXPORT = $(UV) export --quiet --frozen --no-header --no-annotate

lock: $(UV)  ## write uv.lock and the requirements files made from it
	$(UV) lock
	$(EXPORT) --only-group deploy -o requirements.txt
	$(EXPORT) --only-group job $(addprefix --no-emit-package ,$(IN_CONTAINER)) -o model_code/requirements.txt
	$(EXPORT) --only-group server -o model_code/requirements-server.txt
	$(EXPORT) --only-group server-gpu -o model_code/requirements-server-gpu.txt
	echo "checkov==$(CHECKOV_VERSION)" | $(UV) pip compile --quiet --python-version 3.11 --universal --generate-hashes --no-header --no-annotate \
	  -o infra/verify/checkov.txt -

clean:  ## remove what make made
	rm -rf $(VENV) .uv .checkov node_modules cdk.out build .pytest_cache .mypy_cache .ruff_cache

versions:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing); Python 3.11 or newer is needed. Install it, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v node >/dev/null || { echo "error: node was not found; Node.js 20 or newer is needed by the AWS CDK. See https://nodejs.org" >&2; exit 1; }
	@node -e 'process.exit(Number(process.versions.node.split(".")[0]) < 20 ? 1 : 0)' || \
	  { echo "error: node is $$(node --version); Node.js 20 or newer is needed by the AWS CDK. See https://nodejs.org" >&2; exit 1; }

$(UV): | versions
	@echo "Setting up (once): uv $(UV_VERSION)"
	@$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"

# Two marks, one environment: the tests add their group to what a run needs.
$(VENV)/.run: uv.lock pyproject.toml | $(UV)
	@echo "Setting up (once): the locked Python packages"
	@$(UV) sync --quiet --frozen --inexact --python $(PYTHON) && touch $@

$(VENV)/.test: uv.lock pyproject.toml | $(UV)
	@echo "Setting up (once): the locked Python packages, the tests' among them"
	@$(UV) sync --quiet --frozen --inexact --all-groups --no-group bench --python $(PYTHON) && touch $@ $(VENV)/.run

$(VENV)/.bench: uv.lock pyproject.toml | $(UV)
	@echo "Setting up (once): the locked Python packages, the benchmarks' peers among them"
	@$(UV) sync --quiet --frozen --inexact --all-groups --python $(PYTHON) && touch $@ $(VENV)/.test $(VENV)/.run

# checkov pins an old boto3, so it lives apart.
.checkov/.done: infra/verify/checkov.txt | $(UV)
	@echo "Setting up (once): checkov, for its secret scan"
	@$(UV) venv --quiet --clear --python $(PYTHON) .checkov && VIRTUAL_ENV=.checkov $(UV) pip install --quiet --require-hashes -r $< && touch $@

$(CLI): package-lock.json | versions
	@echo "Setting up (once): the pinned AWS CDK command line"
	@npm ci --silent --no-fund --no-audit && touch $@
