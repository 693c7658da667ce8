#!/bin/sh
# Makes the file trees of the demo image from Debian packages: a wiki (DokuWiki) on PHP behind Apache, with the tools that
# such images tend to carry. One directory a layer below OUT, as overlayfs leaves them (whiteouts and all); the demo packs
# them into an image. Needs root, mmdebstrap and the package sources of this machine.
#
#   web-image.sh OUT
set -eu

mkdir -p "$1"
# Whole, as the kernel's table of mounts has it.
out=$(CDPATH='' cd -- "$1" && pwd -P)
suite=bookworm
work=$out/.work

cleanup() {
    # Deepest first; a chroot leaves nothing else behind.
    awk -v under="$work/" 'index($2, under) == 1 { print $2 }' /proc/self/mounts | sort -r | while read -r mounted; do
        umount -l "$mounted"
    done
}
trap cleanup EXIT INT TERM

# An earlier run may have been killed in the middle.
cleanup
rm -rf "$out"
mkdir -p "$work/archives"

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
    chroot "$work/root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@" \
        > "$work/$name.log" 2>&1 || { tail -n 30 "$work/$name.log" >&2; exit 1; }
    cleanup
    lower=$out/$name:$lower
}

install() {
    stage "$1" sh -ec "apt-get update; apt-get install -y --no-install-recommends $2; apt-get clean; rm -rf /var/lib/apt/lists/*"
}

say "layer 1-base"
mmdebstrap --quiet --variant=minbase --include=ca-certificates "$suite" "$out/1-base" "$sources" 2> "$work/base.log" \
    || { tail -n 30 "$work/base.log" >&2; exit 1; }
# No service starts in a chroot or in the image.
printf '#!/bin/sh\nexit 101\n' > "$out/1-base/usr/sbin/policy-rc.d"
chmod 755 "$out/1-base/usr/sbin/policy-rc.d"
touch "$out/1-base/etc/resolv.conf"
lower=$out/1-base

install 2-php "apache2 libapache2-mod-php php-cli php-curl php-gd php-intl php-ldap php-mbstring php-mysql php-pgsql php-sqlite3 php-xml php-zip"
install 3-tools "imagemagick ghostscript poppler-utils git build-essential"
install 4-wiki "dokuwiki"
stage 5-site sh -ec '
    printf "Listen 127.0.0.1:\${PORT}\n" > /etc/apache2/ports.conf
    printf "ServerName demo.example\n" > /etc/apache2/conf-available/name.conf
    a2enconf name
    ln -sf /etc/dokuwiki/apache.conf /etc/apache2/conf-enabled/dokuwiki.conf
    sed -i "s/\*:80/*/" /etc/apache2/sites-available/000-default.conf
    printf "#!/bin/sh\n. /etc/apache2/envvars\nmkdir -p \$APACHE_RUN_DIR \$APACHE_LOCK_DIR\nexec apache2 -D FOREGROUND\n" > /usr/local/bin/start
    chmod 755 /usr/local/bin/start
    rm -f /usr/sbin/policy-rc.d
    mkdir -p /var/lib/dokuwiki/data/pages
    printf "====== It works ======\nThis page came from a container that started before its image had arrived.\n" \
        > /var/lib/dokuwiki/data/pages/start.txt
    chown -R www-data:www-data /var/lib/dokuwiki/data/pages
'
rm -rf "$work"
say "done: $(du -sh "$out" | cut -f1) in $(find "$out" | wc -l) files"
