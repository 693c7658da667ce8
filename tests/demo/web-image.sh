#!/bin/sh
# Makes the file trees of the demo image from Debian packages: a wiki (DokuWiki) on PHP behind Apache, with the tools that
# such images tend to carry. One directory a layer below OUT, as overlayfs leaves them (whiteouts and all); the demo packs
# them into an image. Needs root, mmdebstrap and the package sources of this machine.
#
#   web-image.sh OUT
. "$(dirname -- "$0")/stages.sh"

base
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
finish
