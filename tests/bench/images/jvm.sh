#!/bin/sh
# Tomcat on a JVM, up to the first page that it has to compile.
#
#   jvm.sh OUT
. "$(dirname -- "$0")/../../demo/stages.sh"

base
# The runtime keeps its manual pages there, and so expects the directory.
stage 2-prepare mkdir -p /usr/share/man/man1
install 3-java "openjdk-17-jdk-headless"
# It brings systemd, and that a directory for a journal with an access control list: with it the layer cannot be lazy.
stage 4-tomcat sh -ec '
    apt-get install -y --no-install-recommends tomcat10 tomcat10-examples tomcat10-docs
    apt-get clean
    rm -rf /var/log/journal
'
stage 5-site sh -ec '
    sed -i "s/port=\"8080\"/address=\"127.0.0.1\" port=\"\${PORT}\"/; s/<Server port=\"[-0-9]*\"/<Server port=\"-1\"/" /etc/tomcat10/server.xml
    cat > /usr/local/bin/start <<END
#!/bin/sh
export JAVA_HOME=\$(dirname \$(dirname \$(readlink -f /usr/bin/java)))
export CATALINA_HOME=/usr/share/tomcat10 CATALINA_BASE=/var/lib/tomcat10 CATALINA_TMPDIR=/tmp
export CATALINA_OPTS="-DPORT=\$PORT"
exec /usr/share/tomcat10/bin/catalina.sh run
END
    chmod 755 /usr/local/bin/start
'
finish
