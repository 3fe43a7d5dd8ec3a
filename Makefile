# Thin over the command line: whatever a target does, `identity-service` does in a container too.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help

help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run.stamp ## Run the service (embedded Postgres unless DATABASE_URL is set)
	@IDENTITY_MIGRATE_ON_START=$${IDENTITY_MIGRATE_ON_START:-on} exec $(BIN)/identity-service serve

demo: .venv/run.stamp ## Sign up, log in, verify, refresh, log out, and see the token refused
	@$(BIN)/python -m examples.demo

example-todos: .venv/run.stamp ## Run examples/todos.py: an API that verifies tokens (PORT=8001)
	@$(BIN)/python -m examples.start todos

example-chat: .venv/run.stamp ## Run examples/chat.py: a WebSocket chat with a page (PORT=8002)
	@$(BIN)/python -m examples.start chat

test: .venv/dev.stamp ## Run the tests (they start their own Postgres)
	@$(BIN)/pytest -q -n auto --dist worksteal

check: static coverage ## Everything a change must pass: lint, types, contracts, tests with coverage

static: .venv/dev.stamp ## Lint, types and import contracts
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports > .import_linter.log 2>&1 || { cat .import_linter.log; exit 1; }

coverage: .venv/dev.stamp ## Run the tests and hold the core at full branch coverage
	@$(BIN)/pytest -q -n auto --dist worksteal --cov --cov-report=
	@$(BIN)/coverage report --fail-under=100 --include='identity_service/accounts/*,identity_service/sessions/*,identity_service/tokens/*,identity_service/signing/*,identity_service/revocation/*,identity_service/throttling/*,identity_service/verifier/*'

soak: .venv/dev.stamp ## Measure revocations and rotations between processes, for some ten minutes
	@$(BIN)/pytest -q tests/processes --soak -o log_cli=true -o log_cli_level=info --log-disable=httpx2

jose: ## Install Node's jose, which `make test` verifies tokens with if it is there (needs npm)
	@npm install --loglevel=error --prefix .local/node --no-save --no-package-lock --no-audit --no-fund --ignore-scripts jose@6.2.17

fast-hash: .venv/run.stamp ## Build Argon2 for this processor: about twice the logins (needs a C compiler)
	@command -v cc > /dev/null || { echo "A C compiler is needed (Debian: apt install gcc python3-dev)"; exit 2; }
	@echo "Building Argon2 for this processor ..."
	@sh requirements/build-argon2.sh $(BIN)/python .local/fast-hash
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-index --force-reinstall .local/fast-hash/*.whl
	@$(BIN)/identity-service doctor | grep -E ' (argon2|password hashes) '

migrate: .venv/run.stamp ## Bring the database schema up to date
	@$(BIN)/identity-service migrate

keys: .venv/run.stamp ## List the signing keys
	@$(BIN)/identity-service keys list

rotate-keys: .venv/run.stamp ## Rotate the signing keys (NOW=1 skips the wait)
	@$(BIN)/identity-service keys rotate $(if $(NOW),--now)

bench: .venv/dev.stamp ## Measure what the goals are about (ONLY="P11 P13" for some of them)
	@$(BIN)/python -m bench $(ONLY)

bench-peers: .venv/dev.stamp ## Measure comparable systems beside ours (needs wrk, npm and a network for the first time)
	-@$(MAKE) --silent --keep-going .local/bench/node.stamp .local/bench/python.stamp .local/bench/joserfc.stamp
	@PYTHONPATH=.local/bench/joserfc $(BIN)/python -m bench.peers

bench-scale: .venv/dev.stamp ## Measure what ten times as many sessions cost (SESSIONS="1000000 10000000")
	@$(BIN)/python -m bench.scale $(SESSIONS)

bench-pictures: .venv/bench.stamp ## Draw the pictures of docs/benchmarks.md from what was measured last
	@$(BIN)/python -m bench.pictures

profile: .venv/bench.stamp ## Look where the time of a refresh goes (needs wrk, and leave to trace a process)
	@$(BIN)/python -m bench.profile

format: .venv/dev.stamp ## Format the code
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q

lock: ## Pin the dependencies again (needs uv)
	$(LOCK) pyproject.toml --extra server --group build -o requirements/server.txt
	$(LOCK) pyproject.toml --extra server --group build --group embedded --group examples -o requirements/run.txt
	$(LOCK) pyproject.toml --extra server --group build --group embedded --group examples --group test --group lint -o requirements/dev.txt
	$(LOCK) --group fast-hash --constraints requirements/server.txt -o requirements/fast-hash.txt
	$(LOCK) --group bench --constraints requirements/dev.txt -o requirements/bench.txt

clean: ## Remove the environment and the local database; the keys stay
	rm -rf .venv .local .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .import_linter.log .hypothesis .coverage

.venv/bin/python:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "Cannot make a virtual environment (Debian: apt install python3-venv)"; exit 2; }

.venv/run.stamp: requirements/run.txt pyproject.toml | .venv/bin/python
	@echo "Installing what the service needs into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps --require-hashes -r requirements/run.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/dev.stamp: requirements/dev.txt .venv/run.stamp
	@echo "Installing what the tests need into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps --require-hashes -r requirements/dev.txt
	@touch $@

.venv/bench.stamp: requirements/bench.txt .venv/dev.stamp
	@echo "Installing what draws and profiles into .venv ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps --require-hashes -r requirements/bench.txt
	@touch $@

# What `bench-peers` compares with, away from what the service runs on.
.local/bench/node.stamp: Makefile
	@npm install --loglevel=error --prefix .local/bench/node --no-save --no-package-lock --no-audit --no-fund --ignore-scripts oidc-provider@9.13.3 jose@6.2.17
	@touch $@

.local/bench/python.stamp: Makefile
	@$(PYTHON) -m venv .local/bench/python
	@.local/bench/python/bin/python -m pip install -q --disable-pip-version-check "fastapi-users[sqlalchemy]==15.0.5" \
		asyncpg==0.32.0 fastapi==0.165.0 sqlalchemy==2.0.58 uvicorn==0.54.0 uvloop==0.23.0 httptools==0.9.0
	@touch $@

.local/bench/joserfc.stamp: Makefile
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .local/bench/joserfc joserfc==1.8.0
	@touch $@

.PHONY: help run demo example-todos example-chat test check static coverage soak jose fast-hash migrate keys rotate-keys bench bench-peers bench-scale bench-pictures profile format lock clean
