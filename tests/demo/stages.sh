# What the scripts that make images share; they source it with the directory of the trees as $1 and say what comes from where
# in `base`, `install` and `stage`. Needs root, mmdebstrap and the package sources of this machine.
#
# shellcheck shell=sh
set -eu

mkdir -p "$1"
# Whole, as the kernel's table of mounts has it.
out=$(CDPATH='' cd -- "$1" && pwd -P)
suite=bookworm
work=$out/.work

# Everything that is mounted below the trees, deepest first: also what mmdebstrap mounts, if it was killed.
cleanup() {
    awk -v under="$out/" 'index($2, under) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r mounted; do
        umount -l "$mounted"
    done
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# An earlier run may have been killed in the middle; whoever belongs to it would mount again what is unmounted here. Of a mount that
# is left nothing must be removed: it may be /proc, /sys or /dev of this machine.
exec 9> "$out.lock"
flock -n 9 || { printf '%s\n' "somebody else works on $out" >&2; exit 1; }
cleanup
rm -rf --one-file-system "$out"
mkdir -p "$work/archives" "$work/lists/partial"

# Package sources of this machine: whatever reaches Debian here reaches it in the chroot.
sources() {
    cat /etc/apt/sources.list 2>/dev/null || true
    for file in /etc/apt/sources.list.d/*.list; do [ -f "$file" ] && cat "$file"; done
    true
}
if [ -f /etc/apt/sources.list.d/debian.sources ]; then
    sources=/etc/apt/sources.list.d/debian.sources
else
    sources > "$work/sources.list"
    sources=$work/sources.list
fi

say() { printf '  image: %s\n' "$*" >&2; }

# stage NAME COMMAND...: a new layer over all earlier ones, made by running COMMAND in a chroot.
lower=
stage() {
    name=$1
    shift
    say "layer $name"
    mkdir -p "$out/$name" "$work/overlay" "$work/root"
    mount -t overlay overlay -o "lowerdir=$lower,upperdir=$out/$name,workdir=$work/overlay" "$work/root"
    mount -t proc proc "$work/root/proc"
    mount --bind /etc/resolv.conf "$work/root/etc/resolv.conf"
    mount --bind "$work/archives" "$work/root/var/cache/apt/archives"
    mount --bind "$work/lists" "$work/root/var/lib/apt/lists"
    chroot "$work/root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@" \
        > "$work/$name.log" 2>&1 || { tail -n 30 "$work/$name.log" >&2; exit 1; }
    cleanup
    # Relative, since the options of a mount have to fit into a page.
    lower=$name:$lower
}

# install NAME "PACKAGE...": a new layer with packages. What there is to be had is asked for once.
install() {
    stage "$1" sh -ec "ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 || apt-get update
        apt-get install -y --no-install-recommends $2
        apt-get clean"
}

# base: the lowest layer.
base() {
    say "layer 1-base"
    # Names of layers are relative to it.
    cd "$out"
    mmdebstrap --quiet --variant=minbase --include=ca-certificates "$suite" "$out/1-base" "$sources" 2> "$work/base.log" \
        || { tail -n 30 "$work/base.log" >&2; exit 1; }
    # No service starts in a chroot or in the image.
    printf '#!/bin/sh\nexit 101\n' > "$out/1-base/usr/sbin/policy-rc.d"
    chmod 755 "$out/1-base/usr/sbin/policy-rc.d"
    touch "$out/1-base/etc/resolv.conf"
    lower=1-base
}

finish() {
    cleanup
    rm -rf --one-file-system "$work"
    say "done: $(du -sh "$out" | cut -f1) in $(find "$out" | wc -l) files"
}
