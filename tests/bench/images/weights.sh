#!/bin/sh
# A program that reads nearly all of its image before it answers: a gigabyte of weights.
#
#   weights.sh OUT
. "$(dirname -- "$0")/../../demo/stages.sh"

base
install 2-python "python3-minimal"
say "layer 3-weights"
mkdir -p "$out/3-weights/models"
# Weights do not compress. The same ones each time: an image that is made again is the same.
openssl enc -aes-128-ctr -nosalt -pass pass:weights -pbkdf2 -in /dev/zero 2>/dev/null | head -c 1073741824 \
    > "$out/3-weights/models/weights.bin"
lower=3-weights:$lower
stage 4-app sh -ec '
    cat > /usr/local/bin/start <<END
#!/usr/bin/python3
import os, socket, zlib
total = 0
with open("/models/weights.bin", "rb", buffering=0) as weights:
    while piece := weights.read(1 << 20):
        total = zlib.crc32(piece, total)
body = b"It works: %d" % total
with socket.create_server(("127.0.0.1", int(os.environ["PORT"]))) as server:
    while True:
        client, _ = server.accept()
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        client.close()
END
    chmod 755 /usr/local/bin/start
'
finish
