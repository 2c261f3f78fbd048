# Needs Rust's toolchain, a C compiler and make. See README.md, "From source".

CARGO ?= cargo
PREFIX ?= $(or $(CARGO_HOME),$(HOME)/.cargo)
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Where shells look for completions: a prefix at home is not among those places.
SHARE := $(if $(filter $(HOME)/%,$(abspath $(PREFIX))),$(or $(XDG_DATA_HOME),$(HOME)/.local/share),$(PREFIX)/share)

.DEFAULT_GOAL := help
.PHONY: help build check docs test soak fuzz demo bench bench-check interop install dist clean toolchain

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: toolchain ## the release binary
	$(CARGO) build --release --locked

check: toolchain ## formatting, lints, documentation: what a change must pass
	@$(CARGO) fmt --version >/dev/null 2>&1 || { echo "make: rustfmt is missing: rustup component add rustfmt" >&2; exit 1; }
	@$(CARGO) clippy --version >/dev/null 2>&1 || { echo "make: clippy is missing: rustup component add clippy" >&2; exit 1; }
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items --locked
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --locked check; \
	else echo "make: cargo-deny is not installed; licenses and advisories were not checked"; fi

docs: toolchain ## docs/cli.md and every transcript, written anew from the program
	UPDATE_EXPECT=1 $(CARGO) test --locked --lib --test it -- docs:: story:: the_readme_shows

# Many tests wait for a timeout or for another process.
export RUST_TEST_THREADS ?= $(shell echo $$((2 * $$(getconf _NPROCESSORS_ONLN))))

test: toolchain ## all tests, the long ones scaled down
	$(CARGO) test --locked

soak: toolchain ## all tests, the long ones at full size
	LAYERCACHE_SOAK=1 $(CARGO) test --locked

fuzz: toolchain ## the property tests of the parsers, FUZZ_CASES of each
	PROPTEST_CASES=$(or $(FUZZ_CASES),100000) $(CARGO) test --release --locked --test fuzz

# In the profile of the tests, so that the dependencies are compiled once for both.
demo: toolchain ## export and import a cache through an S3 server on loopback
	$(CARGO) build --locked --bin layercache --example demo
	$(TARGET)/debug/examples/demo $(TARGET)/debug/layercache

# One by one: together, the program would get features of dependencies that only the example needs.
bench: toolchain ## against s5cmd, rclone and aws s3, on loopback, with and without TLS
	$(CARGO) build --release --locked --bin layercache
	$(CARGO) build --release --locked --example bench
	$(TARGET)/release/examples/bench $(TARGET)/release/layercache

# The same in every profile, so that of the tests serves.
bench-check: toolchain ## requests, bytes and calls of fixed runs against the committed figures; UPDATE=1 rewrites them
	$(CARGO) build --locked --bin layercache --example bench
	$(TARGET)/debug/examples/bench check $(if $(UPDATE),--update) $(TARGET)/debug/layercache

interop: toolchain ## against real S3 servers on loopback, installed below interop-work; options in INTEROP
	$(CARGO) build --locked --bin layercache --example interop
	$(TARGET)/debug/examples/interop $(INTEROP) $(TARGET)/debug/layercache

install: toolchain ## program and man pages into PREFIX (~/.cargo), completions for bash, zsh and fish
	$(CARGO) install --path . --locked --root $(PREFIX)
	$(PREFIX)/bin/layercache man $(PREFIX)/share/man/man1
	mkdir -p $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	$(PREFIX)/bin/layercache completion bash > $(SHARE)/bash-completion/completions/layercache
	$(PREFIX)/bin/layercache completion zsh > $(SHARE)/zsh/site-functions/_layercache
	$(PREFIX)/bin/layercache completion fish > $(SHARE)/fish/vendor_completions.d/layercache.fish

dist: toolchain ## the release archive for x86-64 Linux with glibc 2.17 or newer, into dist/
	scripts/dist.sh

clean: ## removes what cargo built
	$(CARGO) clean

toolchain:
	@command -v $(CARGO) >/dev/null || { echo "make: no cargo found: install Rust's toolchain from https://rustup.rs" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "make: no C compiler found: install one (Debian: build-essential)" >&2; exit 1; }
