#!/bin/sh
# PostgreSQL with PostGIS and a small table.
#
#   postgres.sh OUT
. "$(dirname -- "$0")/../../demo/stages.sh"

base
install 2-postgres "postgresql"
install 3-postgis "postgresql-postgis postgresql-postgis-scripts"
stage 4-data sh -ec '
    cd /
    bin=$(ls -d /usr/lib/postgresql/*/bin)
    rm -rf /var/lib/postgresql/data
    install -d -o postgres -g postgres -m 0700 /var/lib/postgresql/data
    as() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
    as "$bin/initdb" -D /var/lib/postgresql/data --auth=trust
    echo "CREATE EXTENSION postgis" | as "$bin/postgres" --single -D /var/lib/postgresql/data postgres
    echo "CREATE TABLE place (name text, at geometry)" | as "$bin/postgres" --single -D /var/lib/postgresql/data postgres
    echo "INSERT INTO place SELECT format(\$\$place %s\$\$, i), ST_MakePoint(i, i) FROM generate_series(1, 10000) i" \
        | as "$bin/postgres" --single -D /var/lib/postgresql/data postgres
    cat > /usr/local/bin/start <<END
#!/bin/sh
exec setpriv --reuid postgres --regid postgres --clear-groups $bin/postgres -D /var/lib/postgresql/data \
    -c port=\$PORT -c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp
END
    chmod 755 /usr/local/bin/start
'
finish
