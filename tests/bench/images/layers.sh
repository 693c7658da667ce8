#!/bin/sh
# A Python service that was put together in 50 layers; `flat` has all of it in one.
#
#   layers.sh OUT
. "$(dirname -- "$0")/../../demo/stages.sh"

base
# Their names are in the order of the layers.
install 10-python "python3"
number=10
for package in requests flask jinja2 sqlalchemy yaml lxml pil cryptography markdown pygments docutils psutil \
    redis pymysql psycopg2 jsonschema dateutil tz babel bs4 html5lib click colorama simplejson msgpack ujson \
    bcrypt nacl paramiko mako boto3 pandas-lib numpy networkx pyparsing openpyxl xlsxwriter reportlab \
    websocket aiohttp tornado zmq gevent kombu celery prettytable toml; do
    number=$((number + 1))
    [ $number -lt 58 ] || break
    install "$number-$package" "python3-$package"
done
stage 58-app sh -ec '
    cat > /usr/local/bin/start <<END
#!/usr/bin/python3
import http.server, os
import requests, flask, sqlalchemy, yaml, lxml.etree, cryptography.x509, markdown, psutil, jsonschema, numpy, networkx
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = markdown.markdown("# It works: %d" % numpy.arange(10).sum()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Answer).serve_forever()
END
    chmod 755 /usr/local/bin/start
'
say "the same in one layer"
mkdir -p "$out/flat"
mount -t overlay overlay -o "ro,lowerdir=$lower" "$work/root"
cp -a "$work/root/." "$out/flat/"
finish
