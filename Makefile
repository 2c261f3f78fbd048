# Needs Rust's toolchain, a C compiler and make. See README.md, "From source".

CARGO ?= cargo
PKG_CONFIG ?= pkg-config
PREFIX ?= $(or $(CARGO_HOME),$(HOME)/.cargo)
BINARY := $(or $(CARGO_TARGET_DIR),target)/release/layercache

# rusoto_core compiles only with OpenSSL's headers at hand, though the program never calls OpenSSL.
# Where openssl-sys would find none, OpenSSL is built from source. OPENSSL_SOURCE=system (or vendored)
# decides it by hand.
FEATURES :=
ifeq ($(OPENSSL_SOURCE),)
  ifneq ($(OPENSSL_DIR)$(OPENSSL_LIB_DIR)$(OPENSSL_INCLUDE_DIR),)
    OPENSSL_SOURCE := system
  else
    OPENSSL_SOURCE := $(shell $(PKG_CONFIG) --exists openssl 2>/dev/null && echo system || echo vendored)
  endif
endif
ifeq ($(OPENSSL_SOURCE),vendored)
  FEATURES := --features vendored-openssl
endif

.DEFAULT_GOAL := help
.PHONY: help build check test soak fuzz demo bench install clean toolchain

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: toolchain ## the release binary
	$(CARGO) build --release --locked $(FEATURES)

check: toolchain ## formatting, lints, documentation: what a change must pass
	@$(CARGO) fmt --version >/dev/null 2>&1 || { echo "make: rustfmt is missing: rustup component add rustfmt" >&2; exit 1; }
	@$(CARGO) clippy --version >/dev/null 2>&1 || { echo "make: clippy is missing: rustup component add clippy" >&2; exit 1; }
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --locked $(FEATURES) -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps --document-private-items --locked $(FEATURES)

test: toolchain ## all tests, the long ones scaled down
	$(CARGO) test --locked $(FEATURES)

soak: toolchain ## all tests, the long ones at full size
	LAYERCACHE_SOAK=1 $(CARGO) test --locked $(FEATURES)

fuzz: toolchain ## the property tests of the parsers, FUZZ_CASES of each
	PROPTEST_CASES=$(or $(FUZZ_CASES),100000) $(CARGO) test --release --locked $(FEATURES) --test fuzz

demo: build ## export and import a cache through an S3 server on loopback
	$(CARGO) run --locked $(FEATURES) --example demo -- $(BINARY)

bench: toolchain ## against s5cmd, rclone and aws s3, on loopback
	$(CARGO) build --release --locked $(FEATURES) --bin layercache --example bench --example bench-server
	$(dir $(BINARY))examples/bench $(BINARY)

install: toolchain ## the release binary into PREFIX/bin (~/.cargo/bin)
	$(CARGO) install --path . --locked --root $(PREFIX) $(FEATURES)

clean: ## removes what cargo built
	$(CARGO) clean

toolchain:
	@command -v $(CARGO) >/dev/null || { echo "make: no cargo found: install Rust's toolchain from https://rustup.rs" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "make: no C compiler found: install one (Debian: build-essential)" >&2; exit 1; }
ifeq ($(OPENSSL_SOURCE),vendored)
	@perl -MIPC::Cmd -MFindBin -MFile::Compare -e 1 2>/dev/null || { \
	  echo "make: OpenSSL's headers were not found, and building OpenSSL from source needs perl with its standard modules." >&2; \
	  echo "      Install either (Debian: libssl-dev pkg-config, or perl; Fedora: openssl-devel, or perl)." >&2; exit 1; }
	@echo "make: OpenSSL's headers were not found; it is built from source, once (a few minutes)" >&2
endif
