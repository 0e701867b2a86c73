# Every target installs first what it needs: `make demo` on a fresh Debian 12 or newer is all it takes.
# Run as root, since namespaces, TUN and BPF need it.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := python3 python3-bpfcc python3-venv linux-libc-dev iproute2 curl procps openssl util-linux \
	'?dante-server' microsocks tinyproxy dnsmasq-base nginx-light bind9-dnsutils \
	iperf3 wrk bpftool nftables tcpdump ethtool iputils-ping netcat-openbsd socat systemd strace
COMPILER_PACKAGES := gcc libc6-dev python3-dev
# For tests of scripts; machines of users have no need of them.
TEST_PACKAGES := shellcheck ruby
comma := ,
SYSTEM_STAMP := $(VENV)/.system
DEV_STAMP := $(VENV)/.dev
BENCH_STAMP := $(VENV)/.bench
# ztun as a wheel has it, packets' way compiled: what is tested and measured. An editable install stays interpreted.
COMPILED := build/compiled
COMPILED_STAMP := build/.compiled
# Python takes the compiled ones, wherever it is started; tests and benchmarks are found behind them.
WITH_COMPILED = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(COMPILED):$(CURDIR)
SOURCES = $(shell find ztun bpf packaging/compiling.py pyproject.toml -name '*.py' -o -name '*.[ch]' -o -name '*.toml')
FUZZ_STAMP := $(VENV)/.fuzz

.PHONY: setup demo up lint test test-interpreted compiled differential fuzz bench vm-smoke vm-test vm-clean clean guest-packages

setup: $(DEV_STAMP)

# Debian packages that dpkg does not know as installed; ? in front: where there is such a package.
$(SYSTEM_STAMP): Makefile packaging/install-packages
	packaging/install-packages $(PACKAGES) $(TEST_PACKAGES)
	@mkdir -p $(VENV) && touch $@

# System site packages, since that is where Debian's bcc lives. sing-box is the second server for datagrams,
# and the only one in Debian 13, which has no Dante.
$(DEV_STAMP): $(SYSTEM_STAMP) pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --system-site-packages $(VENV)
	ZTUN_BUILD=pure $(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,sing-box]"
	@touch $@

$(COMPILED_STAMP): $(DEV_STAMP) $(SOURCES)
	packaging/install-packages $(COMPILER_PACKAGES)
	rm -rf build/wheel $(COMPILED)
	ZTUN_BUILD=compiled $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(COMPILED) build/wheel/*.whl
	@touch $@

$(BENCH_STAMP): $(DEV_STAMP)
	ZTUN_BUILD=pure $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	@touch $@

# atheris has wheels for some versions of Python only; without it the fuzzing is not guided.
$(FUZZ_STAMP): $(DEV_STAMP)
	ZTUN_BUILD=pure $(BIN)/pip install --quiet --disable-pip-version-check --only-binary atheris --editable '.[dev,fuzz]' || \
		echo "atheris is not to be had for this Python: fuzzing goes on without coverage"
	@touch $@

demo: setup
	$(BIN)/ztun demo

# make up ARGS="--proxy socks5://10.1.1.1:1080 --lan eth1"
up: setup
	$(BIN)/ztun up $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file mypy-darwin.ini
	$(BIN)/lint-imports

# make test ARGS="tests/stack -k sack"
test: setup compiled
	$(WITH_COMPILED) $(BIN)/pytest $(ARGS)

# The same on the code as it is written: nothing is compiled first.
test-interpreted: setup
	$(BIN)/pytest $(ARGS)

compiled: $(COMPILED_STAMP)

# make differential SCRIPTS=100000: random segments to the stack and to the kernel (CI plays 10,000)
SCRIPTS ?= 100000
differential: setup
	ZTUN_SCRIPTS=$(SCRIPTS) $(BIN)/pytest -s tests/differential

# make fuzz FUZZ_SECONDS=600 ARGS="stack": each target for so long, guided by coverage (docs/fuzzing.md)
FUZZ_SECONDS ?= 60
fuzz: $(FUZZ_STAMP)
	nice -n 10 $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

# make bench ARGS="--rounds 3 --seconds 2"
bench: $(BENCH_STAMP) compiled
	$(WITH_COMPILED) $(BIN)/python -m bench $(ARGS)

# Virtual machines (docs/vm-tests.md). What they need is installed here and not by `setup`; the images are made here too.
VM_DIR := $(or $(ZTUN_VM_DIR),/var/tmp/ztun-vm)
# The wheel is made out here, where it takes a second and pip has its index.
VM_WHEEL = rm -rf $(VM_DIR)/wheel && ZTUN_BUILD=pure $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(VM_DIR)/wheel .
VM_PYTEST = $(BIN)/python vagrant/world.py $(BIN)/pytest -p no:cacheprovider --durations=10 tests/vm
GATEWAYS ?= bookworm,trixie

# Three machines with plain qemu, the kernel of Debian 12, the quick part of the tests.
vm-smoke: setup
	packaging/install-vm-packages
	vagrant/image/build bookworm
	$(VM_WHEEL)
	$(VM_PYTEST) --machines=qemu --gateways=bookworm -m smoke $(ARGS)

# make vm-test GATEWAYS=trixie MACHINES=qemu: all tests, on each of these kernels, through Vagrant unless told otherwise
MACHINES ?= vagrant
vm-test: setup
	packaging/install-vm-packages $(MACHINES)
	for suite in bookworm $(subst $(comma), ,$(GATEWAYS)); do \
		vagrant/image/build $$suite && { [ $(MACHINES) = qemu ] || vagrant/image/box $$suite; } || exit 1; \
	done
	$(VM_WHEEL)
	$(VM_PYTEST) --machines=$(MACHINES) --gateways=$(GATEWAYS) $(ARGS)

vm-clean:
	rm -rf $(VM_DIR)

# What vagrant/image/build puts into the image of a virtual machine.
guest-packages:
	@echo $(PACKAGES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench/results fuzz/corpus fuzz/crashes
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
