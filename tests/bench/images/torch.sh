#!/bin/sh
# A Python program that imports torch, with the libraries that it comes with.
#
#   torch.sh OUT
. "$(dirname -- "$0")/../../demo/stages.sh"

base
install 2-python "python3"
# With the pip of this machine, which knows the way to its index, for the Python of the image. These are the last wheels of torch
# that bring the libraries of the processor and of one accelerator in less than 2 GB.
say "packages of pip"
mkdir -p "$out/3-torch/opt/torch"
python3 -m pip install --quiet --disable-pip-version-check --no-compile --no-cache-dir --target "$out/3-torch/opt/torch" \
    --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform manylinux_2_17_x86_64 --platform any \
    --only-binary=:all: "torch==1.13.1" "numpy==1.26.4" "pandas==2.2.3" > "$work/pip.log" 2>&1 \
    || { tail -n 30 "$work/pip.log" >&2; exit 1; }
lower=3-torch:$lower
stage 4-app sh -ec '
    cat > /usr/local/bin/start <<END
#!/usr/bin/python3
import http.server, os, sys
sys.path.insert(0, "/opt/torch")
import torch, pandas
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = b"It works: %d" % int(torch.arange(10).sum() + len(pandas.DataFrame({"a": []})))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Answer).serve_forever()
END
    chmod 755 /usr/local/bin/start
'
finish
