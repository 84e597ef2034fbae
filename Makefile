# dolium: `make run` sets everything up and runs a container; `make test` sets everything up and runs all checks.
#
# As root, missing Debian packages are installed; otherwise they are named and left out. Nothing is fetched when all is
# there. Python: the first of the names below that is 3.11 or later.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory
export DEBIAN_FRONTEND := noninteractive
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PYTHONDONTWRITEBYTECODE :=

VENV := .venv
BIN := $(VENV)/bin
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3

.PHONY: test-crash test-levels control bench bench-images bench-network bench-storage bench-levels bench-packages help build native packages test-packages run check test-unit test-functional test-sanitize test test-vm fuzz clean

help:
	@echo "make build | run | test | bench | bench-images | bench-network | bench-storage | bench-levels | test-crash | test-levels | test-vm | control | fuzz | clean; parts of test: check test-unit test-sanitize test-functional"

# $(1): lists of packages. A package that dpkg knows is not asked for again.
define install_packages
	@command -v dpkg-query > /dev/null || { echo "not Debian: install what $(1) lists yourself"; exit 0; }
	missing=()
	for name in $$(grep -hv '^#' $(1)); do
		state=$$(dpkg-query -W -f '$${db:Status-Status}' "$$name" 2> /dev/null || true)
		[ "$$state" = installed ] || missing+=("$$name")
	done
	[ $${#missing[@]} -gt 0 ] || exit 0
	[ "$$(id -u)" = 0 ] || { echo "not root, so not installed: $${missing[*]}"; exit 0; }
	echo "installing $${missing[*]}"
	# no service of a package may start: engines are started by the tests, in folders of their own
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $$policy ]; then
		trap 'rm -f /usr/sbin/policy-rc.d' EXIT
		printf '#!/bin/sh\nexit 101\n' > $$policy
		chmod 755 $$policy
	fi
	apt-get update -qq < /dev/null
	apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "$${missing[@]}" < /dev/null > /dev/null
endef

packages:
	$(call install_packages,packaging/debian-packages.txt)

test-packages:
	$(call install_packages,packaging/debian-packages.txt packaging/debian-packages-test.txt)

$(VENV)/.installed: pyproject.toml packaging/build_native.py | packages
	@chosen=
	for python in $(PYTHONS); do
		if "$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
			chosen=$$python
			break
		fi
	done
	[ -n "$$chosen" ] || { echo "no Python 3.11 or later among: $(PYTHONS)"; exit 1; }
	[ -x $(BIN)/python ] || "$$chosen" -m venv $(VENV)
	# what the build itself needs, so that it can run without isolation and keep the compiler's cache
	$(BIN)/python -m pip install -qq $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])') editables
	$(BIN)/python -m pip install -qq --no-build-isolation -e '.[dev]'
	touch $@

native: $(VENV)/.installed
	@$(BIN)/python packaging/build_native.py

build: $(VENV)/.installed native
	@ln -sfn ../../src/dolium/_native/dolium-front $(BIN)/dolium-runtime
	ln -sfn ../../src/dolium/_native/dolium-front $(BIN)/dolium

run: build
	@$(BIN)/dolium run --rm --timings --rootfs /:O sh -c 'echo "pid $$$$ on $$(hostname)"; grep -c . /proc/self/mountinfo | sed "s/$$/ mounts:/"; cut -d " " -f 5 /proc/self/mountinfo'

check: build
	@$(BIN)/ruff check .
	$(BIN)/python -m mypy

test-unit: build
	@$(BIN)/python -m pytest -q tests/unit

test-sanitize: build test-packages
	@$(BIN)/python -m pytest -q tests/native

test-functional: build test-packages
	@$(BIN)/python -m pytest -q tests/functional

test: test-packages build check
	@$(BIN)/python -m pytest -q -m "not crash and not levels" tests/unit tests/native tests/functional

# The campaigns: daemon and runtime killed at every point, at random moments, a power cut
test-crash: test-packages build
	@$(BIN)/python -m pytest -q -m crash tests/functional

# The same on every level of isolation: dolium's own runtime, runc, crun, runsc
test-levels: test-packages build
	@$(BIN)/python -m pytest -q -m levels tests/functional

# Ten minutes each: config.json, the plan decoder, the archive reader (tests/fuzz). Parts: make fuzz TARGETS=config SECONDS=60
fuzz: build test-packages
	@$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),600) $(TARGETS)

# The runtime's tests on runc: what any runtime does passes there too; tests/functional/control.txt says what does not, and why.
control: build test-packages
	@DOLIUM_TEST_RUNTIME=$$(command -v runc) $(BIN)/python -m pytest -q tests/functional/test_runtime_{lifecycle,config,hooks,terminal,cgroups}.py

# In a machine of its own, with cgroup v2 only: what tests/vm/tests.txt lists. The first run makes a Debian root (80 s).
test-vm: build test-packages
	@$(BIN)/python tests/vm/run.py

clean:
	@rm -rf $(VENV) build dist src/dolium/_native src/dolium/data/seccomp.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

bench-packages:
	$(call install_packages,packaging/debian-packages.txt packaging/debian-packages-test.txt packaging/debian-packages-bench.txt)

# dolium beside its peers, in one run; writes docs/benchmarks.md
bench: build bench-packages
	@$(BIN)/python bench/spine.py

# networks beside docker's; writes docs/benchmarks-network.md
bench-network: build bench-packages
	@$(BIN)/python bench/network.py

# the levels of isolation, runc, crun, runsc, and docker; writes docs/benchmarks-levels.md
bench-levels: build bench-packages
	@$(BIN)/python bench/levels.py

# volumes, bind mounts, tmpfs and layers beside docker's; writes docs/benchmarks-storage.md
bench-storage: build bench-packages
	@$(BIN)/python bench/storage.py

# pull and unpack of a Debian image beside the peers; writes docs/benchmarks-images.md
bench-images: build bench-packages
	@$(BIN)/python bench/images.py
