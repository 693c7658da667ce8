# The doors of this project. `make help` lists them.

# The oldest toolchain that can build it; Cargo.toml says the same to cargo.
RUST := 1.90

.PHONY: help build install check fmt lint test unit e2e clients big soak demo bench bench-quick bench-full bench-built fuzz docs deny tools toolchain

help: ## list the doors
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

toolchain:
	@command -v cargo >/dev/null || { echo "cargo is missing; hint: install Rust $(RUST) or newer with rustup" >&2; exit 1; }
	@command -v cc >/dev/null || tests/tools/install.sh compiler
	@have=$$(cargo --version | cut -d' ' -f2); \
	oldest=$$(printf '%s\n%s\n' "$(RUST)" "$$have" | sort -V | head -n 1); \
	[ "$$oldest" = "$(RUST)" ] || { echo "Rust $$have is too old, $(RUST) is the oldest that works; hint: rustup update stable" >&2; exit 1; }

build: toolchain ## build the release binaries: millstreamd, millstream-server, millstream
	cargo build --release --locked -p millstream-node -p millstream-server -p millstream-cli

PREFIX ?= /usr/local
SHARE := $(DESTDIR)$(PREFIX)/share

install: build ## install programs, unit, manual and completions below PREFIX (/usr/local)
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin target/release/millstreamd target/release/millstream-server target/release/millstream
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system config/millstreamd.service
	rm -rf target/man && mkdir -p target/man && target/release/millstream man target/man >/dev/null
	install -D -m 0644 -t $(SHARE)/man/man1 target/man/*.1
	install -D -m 0644 -t $(SHARE)/man/man8 target/man/*.8
	install -d $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	for program in millstream millstreamd millstream-server; do \
		target/release/millstream completions bash $$program > $(SHARE)/bash-completion/completions/$$program; \
		target/release/millstream completions zsh $$program > $(SHARE)/zsh/site-functions/_$$program; \
		target/release/millstream completions fish $$program > $(SHARE)/fish/vendor_completions.d/$$program.fish; \
	done

check: fmt lint ## what continuous integration asks of the sources

fmt: toolchain
	cargo fmt --all --check

# The fuzz targets are compiled as well (not linked: that needs libFuzzer), so that they do not rot between two runs of `make fuzz`.
lint: toolchain
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTFLAGS='--cfg fuzzing' CUSTOM_LIBFUZZER_PATH=/nonexistent/libFuzzer.a \
		cargo check --manifest-path tests/fuzz/Cargo.toml --target-dir target/fuzz-check --locked

tools: toolchain ## install what the tests need (Debian packages, containerd 2.x)
	tests/tools/install.sh

# In continuous integration a tier that cannot run is a failure.
ifdef CI
export MILLSTREAM_REQUIRE_ALL ?= 1
endif

# Everything is built in one go with one set of features; another selection of packages would build half of it again. The
# tests with containers wait for each other by a lock of the machine, whatever else runs.
test: toolchain tools ## all tests; needs root
	tests/tools/test.sh --workspace

unit: toolchain ## tests of the crates only
	tests/tools/test.sh --workspace --exclude millstream-e2e --features millstream-wire/cri

e2e: toolchain ## tests with real containerd, runc, registry and mounts only; needs root
	cargo test --workspace --no-run --locked
	tests/tools/test.sh --workspace $(patsubst tests/e2e/tests/%.rs,--test %,$(wildcard tests/e2e/tests/*.rs))

clients: toolchain ## the releases of containerd and the clients of the README's table (builds them); needs root
	tests/tools/install.sh clients
	cargo test --workspace --no-run --locked
	tests/tools/test.sh --workspace --test clients --test config_files -- --ignored

big: toolchain ## an image of 5 GB; needs root, 25 GB of disk, some minutes
	cargo build --release --workspace --bins --locked
	tests/tools/test.sh --release --workspace --test big -- --ignored --nocapture

# The long form of what `make test` does for some seconds each: deaths of the worker, disks that are cut off, every damage, orders
# of events; slow leaks, which take minutes to show; and deaths on the kernel of Debian 12, in a machine that qemu emulates.
soak: toolchain ## deaths, cut disks, damage, leaks and orders of events, at length; needs root
	tests/tools/install.sh soak
	cargo test --workspace --no-run --locked
	tests/tools/test.sh --workspace --test takeover --test old_kernel --test upgrade --test power_cut --test damage --test leaks -- --ignored --nocapture
	MILLSTREAM_SCHEDULES=200000 cargo test --locked -p millstream-prefetch -p millstream-chunkstore -p millstream-layerfs \
		-p millstream-node --lib schedules

demo: toolchain ## the main job on real input, with a table at the end; needs root
	tests/tools/install.sh demo
	cargo build --release --workspace --bins --locked
	target/release/millstream-demo

bench: bench-built ## time to ready, bytes and processor time beside containerd and stargz (two hours, resumed if stopped); needs root
	target/release/millstream-bench run

bench-quick: bench-built ## the same of one image on one link, three runs (ten minutes once the image is made)
	target/release/millstream-bench run --quick

bench-full: bench-built ## the same with every image, peer and setting (a night, 60 GB of disk)
	target/release/millstream-bench run --full

bench-built: toolchain
	tests/tools/install.sh bench
	cargo build --release --workspace --bins --locked

fuzz: ## every fuzz target for FUZZ_SECONDS (300); needs cargo-fuzz and a nightly toolchain
	tests/fuzz/run.sh

docs: toolchain ## the documentation of the crates
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

deny: ## licences, sources and duplicates of dependencies (needs cargo-deny)
	cargo deny check licenses bans sources
