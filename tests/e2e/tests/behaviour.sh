# Run in a container, on overlayfs and on Millstream: what it prints must be the same. It changes what it finds, so what only
# reads comes first. No line may tell inode numbers or times of now.
cd /
say() { printf '== %s\n' "$*"; }
with_errors() { "$@" 2>&1; printf 'status %s\n' $?; }

say 'a tar of everything'
tar --sort=name --one-file-system --xattrs --pax-option=delete=atime,delete=ctime --exclude=./etc/hosts --exclude=./etc/hostname --exclude=./etc/resolv.conf \
    -cf - ./usr ./etc ./var ./bin ./opt ./root | sha256sum

say 'blocks of files, and what du makes of them'
find usr etc var -xdev -type f -printf '%b %s %n %p\n' | sort | sha256sum
find usr -xdev -type f -print0 | du -x --files0-from=- -c -k | tail -n 1
[ "$(du -x -s -k /usr | cut -f1)" -gt 10000 ] && echo 'du of a directory sees its files'

say 'programs and libraries'
perl -e 'print 6 * 7, "\n"'
bash -c 'echo $((1 + 1)); exec /usr/bin/env -i /bin/echo replaced'
ls -f /usr/bin | sort | sha256sum

say 'rights of files, as an ordinary user'
su -s /bin/sh nobody -c 'cat /root/secret; read-all /root/secret; root-id -un; id -un' 2>&1

say 'changing what is below'
echo more >>/etc/debian_version
tail -n 1 /etc/debian_version
stat -c '%a %u:%g %s %h %F' /etc/debian_version
chmod 4711 /usr/bin/md5sum
chown 5:6 /etc/profile
touch -d @1000000000 /etc/bash.bashrc
truncate -s 10 /etc/login.defs
stat -c '%a %u:%g %s %h %n' /usr/bin/md5sum /etc/profile /etc/login.defs
stat -c %Y /etc/bash.bashrc
sha256sum /usr/bin/md5sum /etc/login.defs
exec 3</usr/bin/sort 4>>/usr/bin/sort
echo tail >&4
tail -c 5 /usr/bin/sort
head -c 1000 <&3 | sha256sum
exec 3<&- 4>&-

say 'names'
echo new >/etc/new
with_errors mv /etc/new /etc/issue
cat /etc/issue
with_errors mv /etc/issue.net /etc/elsewhere
with_errors ls /etc/issue.net
cat /etc/elsewhere
readlink /usr/bin/awk
with_errors mv /usr/bin/awk /usr/bin/awk-moved
with_errors readlink /usr/bin/awk
readlink /usr/bin/awk-moved
with_errors ln /usr/bin/tac /usr/bin/tac-too
stat -c '%h' /usr/bin/tac /usr/bin/tac-too
with_errors ln -s tac /usr/bin/tac-soft
with_errors mv /etc/apt /etc/apt-moved
find /etc/apt-moved | sort

say 'renameat2: without replacing, exchanging, leaving a whiteout'
rename2() {
    perl -e '
        my ($number, $from, $to, $flags) = @ARGV;
        print syscall($number + 0, -100, $from, -100, $to, $flags + 0) == 0 ? "renamed\n" : "$!\n";
    ' "$(perl -MPOSIX -e 'print((POSIX::uname())[4] eq "aarch64" ? 276 : 316)')" "$@"
}
rename2 /etc/shells /etc/shadow 1
rename2 /etc/shells /etc/shells-moved 1
rename2 /etc/group /etc/passwd 2
head -n 1 /etc/group /etc/passwd
rename2 /etc/passwd /etc/group 2
rename2 /usr/bin/vdir /usr/bin/vdir-moved 4
rename2 /usr/share/perl5 /usr/share/perl5-moved 0
rename2 /usr/share/doc /usr/share/info 2
ls /etc/shells /usr/bin/vdir /usr/bin/vdir-moved 2>&1

say 'removing, and making again'
rm -rf /usr/share/doc /var/lib/dpkg/info
with_errors ls -d /usr/share/doc
with_errors mkdir /usr/share/doc
ls -A /usr/share/doc /var/lib/dpkg | sort
with_errors rmdir /usr/share/man
exec 3</usr/bin/shred
rm /usr/bin/shred
sha256sum <&3
exec 3<&-
cp -a /usr/lib/terminfo /tmp/terminfo && diff -r /usr/lib/terminfo /tmp/terminfo && echo 'the copy is equal'
find usr etc -xdev ! -type d -printf '%y %m %U:%G %l %p\n' | sort | sha256sum
