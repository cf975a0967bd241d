# `make help` lists the targets. VENV=<folder> uses an environment that is already there, as it is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# An environment named by the caller is not ours to change.
READY := $(if $(filter file,$(origin VENV)),$(VENV)/.installed)

export PATH := $(abspath $(VENV))/bin:$(PATH)
export CLEAR_HOME ?= $(CURDIR)/.clear
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv repro results ablations test test-all lint hashes format fuzz kill scale bench gpu plots experiments params check remote deploy prefect-local stack image clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(READY)  ## install everything into .venv (PYTHON=… names an interpreter)

.venv/.installed: pyproject.toml infra/constraints.txt infra/hashes.txt infra/install.sh
	@infra/install.sh .venv

repro: $(READY)  ## run what is out of date and print the results; PROFILE=smoke runs another profile aside, in .clear/scratch
ifdef PROFILE
	@python -m clear scratch $(PROFILE)
else
	@python -m clear.data.lock . -- dvc repro
	@python -m clear results
endif

SEEDS ?= 20260421 1 2 3
results: $(READY)  ## run the pipeline under SEEDS="20260421 1 2 3", in any number of sittings, and write docs/RESULTS.md
	@python -m clear seeds $(SEEDS)

ablations: $(READY)  ## change one setting at a time (NAMES="…" of clear/conf/ablations.yaml; default all; SEED=… of results), for docs/RESULTS.md
	@python -m clear ablations $(if $(SEED),--seed $(SEED)) $(NAMES)

# A file's tests share what is expensive, so a file stays together.
WORKERS ?= 2
test: $(READY)  ## run the suite, the smoke pipeline from end to end included, in WORKERS=2 processes
	@python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

test-all: $(READY)  ## run the slow tests too, reproducibility and resumption of the whole pipeline among them; new random examples
	@python -m pytest --hypothesis-profile=search --durations=15

lint: $(READY)  ## ruff: rules and format; workflows by zizmor; no secret in a tracked file
	@ruff check .
	@ruff format --check .
	@zizmor --offline --quiet .github/workflows
	@python -m infra.secrets

HASHES = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps --no-header --no-annotate
hashes: $(READY)  ## after an edit of infra/constraints.txt: look up the hashes of its packages (infra/hashes.txt)
	@{ grep '^#' infra/hashes.txt; grep -v '^torch==' infra/constraints.txt | $(HASHES) -; } > infra/hashes.txt.partial
	@mv infra/hashes.txt.partial infra/hashes.txt

format: $(READY)  ## rewrite the code in the house format
	@ruff check --fix .
	@ruff format .

INPUTS ?= 100000
fuzz: $(READY)  ## give every reader INPUTS=100000 mutated inputs (READERS="…" of tests/fuzz/targets.py), resumable; prints a table
	@python -m tests.fuzz.run $(INPUTS) $(READERS)

TURNS ?= 2
kill: $(READY)  ## TURNS=2 times: end every stage and long command (NAMES="…"), fill its disk, begin it twice (WAYS=full,twice,…), run it again: are the bytes the same? resumable
	@python -m tests.kill.run $(if $(WAYS),--ways $(WAYS)) $(TURNS) $(NAMES)

SIZES ?= 10000 100000
scale: $(READY)  ## drive metadata of SIZES="10000 100000" samples through the stages: seconds and memory, resumable; prints a table
	@python -m tests.scale.run $(SIZES)

bench: $(READY)  ## measure the hot paths and write data/results/bench.json
	@python tests/bench/run.py

gpu: $(READY)  ## measure BAGEL-7B's shapes on the local GPU in ten minutes and write data/results/gpu.json (ARGS="--small --device cpu" tries it)
	@python tests/bench/gpu.py --out data/results/gpu.json $(ARGS)

plots: $(READY)  ## draw DVC's plots of two revisions (BASE=main HEAD=my-branch; default HEAD against the workspace) on a page
	@python infra/plots.py .clear/plots $(BASE) $(HEAD)

# Few columns, none cut short: of the metrics the ends of the scale, of the parameters what differs, no hash of code or data.
experiments: $(READY)  ## list experiments with what differs between them (ARGS for `dvc exp show`, such as -A or -n 5)
	@COLUMNS=$${COLUMNS:-300} dvc exp show --only-changed --drop '(clear|data|plugins)(/|$$)|.*\.(low|mid)$$|Created$$' $(ARGS)

params: $(READY)  ## compose params.yaml from clear/conf
	@python -m clear params

check: $(READY)  ## compare dvc.lock with parameters, code and committed results (needs no data)
	@python -m clear check

remote: $(READY)  ## keep data in S3: BUCKET=bucket/prefix [ENDPOINT=url]; keys and region come from the AWS environment
	@python -m infra.remote "$(BUCKET)" "$(ENDPOINT)"

deploy: $(READY)  ## send flows, schedules, automations and alerts to the Prefect API of PREFECT_API_URL
	@python -m flows.service.deploy

prefect-local: $(READY)  ## Prefect server, deployments and a worker on this machine (PORT=4200) until Ctrl-C
	@python -m flows.service.local $(PORT)

stack: $(READY)  ## create or update the AWS stack of infra/compute.yaml, for stages on cloud GPUs [MAIL=address for its cost alarm]
	@python -m flows.batch.stack stack "$(MAIL)"

image: $(READY)  ## build the container image of this environment and push it to the stack's repository (needs docker)
	@python -m flows.batch.stack image

JUNK := .clear data/report .pytest_cache .ruff_cache .hypothesis build *.egg-info
# With a lock file a run may be on its way; then the removal happens as the only writer, or not at all.
LOCKS = $(wildcard .clear/writer.lock .clear/scratch/.clear/writer.lock .clear/scratch/*/.clear/writer.lock)
ALONE = $(if $(LOCKS),python3 -m clear.data.lock $(patsubst %.clear/writer.lock,%.,$(LOCKS)) --)

clean:  ## remove scratch runs, checkpoints, run records, rendered reports and tool caches (data and .venv stay)
	@$(ALONE) rm -rf $(JUNK)
	@find clear flows tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
