#!/usr/bin/env python3
"""A minute of mixed load in which every request is accounted for.

    python .ci/soak.py [SECONDS]

A child process serves, plain and over TLS if there is an openssl command for the certificate. Threads here
ask it in many ways; each request carries a marker that its answer must bring back. At the end memory,
descriptors, threads and what is held must be as after the first part. Prints a summary; exit 1: a finding.
"""
import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLIENTS = 8             # threads that ask
FIRST_PART = 0.25       # of the time; what is in use then is the measure for the end
GROWTH = 3 * 2 ** 20    # bytes that resident memory may grow behind it
LARGE = 200000          # bytes of a large page
SHOWN = 10              # findings that are printed


def content_of(marker, size):
    """Content by which a mistaken or shifted piece is seen."""
    unit = "<%s:%%06d>" % marker
    text = "".join(unit % i for i in range(size // len(unit % 0) + 1))
    return text[:size].encode()


# -------------------------------------------------------------------------------------------------- The child

def serve(cert_file, key_file):
    """Every way to answer; ports and measurements by /stats."""
    # For all threads to come as well: sigwait() takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.path.insert(0, str(ROOT))
    import httpd
    servers = []

    def later(request, seconds):
        timer = threading.Timer(seconds, request.resume)
        timer.daemon = True
        timer.start()

    def page(request, page):
        page.write(content_of(request.query, 500 if request.root == "page" else LARGE))
        return 200

    def post(request, page):
        page.write(request.body)
        return 200

    def suspended(request, page):
        if request.state is None:
            request.state = "waits"
            later(request, random.random() / 20)
            return httpd.SUSPEND
        page.write(content_of(request.query, 500))
        return 200

    def begin(request, page):
        request.state = [content_of(request.query, 30000), 0]
        return 200

    def flush(request, position, buffer):
        content, turn = request.state
        request.state[1] += 1
        if turn % 4 == 1:
            later(request, 0.002)
            return 0
        piece = content[position:position + min(len(buffer), 4000)]
        buffer[:len(piece)] = piece
        return len(piece) or httpd.END

    def upload(request, data):
        request.state = (request.state or b"") + data

    def uploaded(request, page):
        page.write(request.state or b"")
        return 200

    def application(environ, start_response):
        content = environ["wsgi.input"].read() or content_of(environ["QUERY_STRING"], 70000)
        start_response("200 OK", [("Content-Type", "text/plain")])
        time.sleep(0.002)
        for start in range(0, len(content), 9000):
            yield content[start:start + 9000]

    def stats(request, page):
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        json.dump({"memory": resident, "descriptors": len(os.listdir("/proc/self/fd")),
                   "threads": threading.active_count(),
                   "held": sum(server.held for server in servers),
                   "connections": sum(len(server.connections) for server in servers)}, page)
        return 200

    for name, handler in ("page", page), ("large", page), ("post", post), ("suspended", suspended), ("stats",
                                                                                                     stats):
        httpd.register_httpdcb("soak", name, handler)
    httpd.register_httpdcb("soak", "stream", begin, flush)
    httpd.register_httpdcb("soak", "upload", uploaded, upload_data_cb=upload)
    httpd.register_wsgi("soak", "wsgi", application, threads=4)
    servers.append(httpd.Server(ip="127.0.0.1", port=0, receive_buf_size=4096))
    if cert_file:
        servers.append(httpd.Server(ip="127.0.0.1", port=0, receive_buf_size=4096, tls_cert_file=cert_file,
                                    tls_key_file=key_file,
                                    tls_ciphers="NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"))
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        print(*[server.port for server in servers], flush=True)
        signal.sigwait({signal.SIGTERM})


# ---------------------------------------------------------------------------------------------------- Clients

class Ledger:
    """What was asked, what was answered, and what was wrong. For several threads."""

    def __init__(self):
        self.asked, self.answered, self.left = collections.Counter(), collections.Counter(), 0
        self.findings, self.lock, self.number = [], threading.Lock(), 0

    def marker(self):
        with self.lock:
            self.number += 1
            return "m%d" % self.number

    def count(self, kind, expected, came):
        """An answer has come, or something else."""
        with self.lock:
            self.asked[kind] += 1
            if came == (200, expected):
                self.answered[kind] += 1
            else:
                status, content = came
                self.findings.append("%s: status %s, %d of %d bytes: %r instead of %r" % (
                    kind, status, len(content), len(expected), content[:60], expected[:60]))


class Tape:
    """Several answers, one behind the other on a socket, as http.client wants them."""

    def __init__(self, sock):
        self.file = sock.makefile("rb")

    def makefile(self, mode):
        return self

    def close(self):
        pass

    def flush(self):
        pass

    def __getattr__(self, name):
        return getattr(self.file, name)

    def answer(self, method="GET"):
        """(status, content); what ends too early has what came."""
        response = http.client.HTTPResponse(self, method=method)
        try:
            response.begin()
            return response.status, response.read()
        except http.client.IncompleteRead as cut:
            return "cut", cut.partial
        except (OSError, http.client.HTTPException) as error:
            return repr(error), b""


class Load:
    """The ways to ask. Each method is one; it makes its own connection."""

    def __init__(self, ports, ledger, seed):
        self.ports, self.ledger, self.chance = ports, ledger, random.Random(seed)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        self.ways = [self.gets, self.gets, self.pipelined, self.pipelined, self.posts, self.chunked,
                     self.streams, self.suspended, self.wsgi,
                     self.slow_reader, self.resets, self.half_closed,
                     self.mixed] + [self.secure] * (len(ports) > 1)

    def run(self, until):
        while time.monotonic() < until:
            way = self.chance.choice(self.ways)
            try:
                way()
            except Exception as error:
                with self.ledger.lock:
                    self.ledger.findings.append("%s: %r" % (way.__name__, error))

    @contextlib.contextmanager
    def connection(self, port=None, receive=0):
        with socket.socket() as sock:
            if receive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            sock.settimeout(20)
            sock.connect(("127.0.0.1", port or self.ports[0]))
            yield sock

    def get(self, root, marker, *fields):
        return ("GET /%s?%s HTTP/1.1\r\nHost: soak\r\n%s\r\n" % (root, marker, "".join(fields))).encode()

    def one_by_one(self, sock, root, size, count):
        tape = Tape(sock)
        for _ in range(count):
            marker = self.ledger.marker()
            sock.sendall(self.get(root, marker))
            self.ledger.count(root, content_of(marker, size), tape.answer())

    def gets(self):
        with self.connection() as sock:
            self.one_by_one(sock, "page", 500, self.chance.choice((1, 5, 30)))

    def streams(self):
        with self.connection() as sock:
            self.one_by_one(sock, "stream", 30000, 2)

    def suspended(self):
        with self.connection() as sock:
            self.one_by_one(sock, "suspended", 500, 2)

    def secure(self):
        with self.connection(self.ports[1]) as sock, self.context.wrap_socket(sock) as secured:
            for root, size in ("page", 500), ("large", LARGE), ("suspended", 500), ("stream", 30000):
                self.one_by_one(secured, root, size, 1)

    def pipelined(self):
        with self.connection() as sock:
            markers = [self.ledger.marker() for _ in range(self.chance.choice((2, 10, 40)))]
            raw = b"".join(self.get("page", marker) for marker in markers)
            place = self.chance.randrange(len(raw))
            sock.sendall(raw[:place])
            sock.sendall(raw[place:])
            tape = Tape(sock)
            for marker in markers:
                self.ledger.count("pipelined", content_of(marker, 500), tape.answer())

    def mixed(self):
        """Pipelined requests of every kind on one connection."""
        roots = {"page": 500, "stream": 30000, "suspended": 500, "large": LARGE, "wsgi": 70000}
        with self.connection() as sock:
            asked = [(root, self.ledger.marker()) for root in self.chance.choices(list(roots), k=5)]
            sock.sendall(b"".join(self.get(root, marker) for root, marker in asked))
            tape = Tape(sock)
            for root, marker in asked:
                self.ledger.count("mixed", content_of(marker, roots[root]), tape.answer())

    def posts(self):
        with self.connection() as sock:
            tape = Tape(sock)
            for _ in range(5):
                root, size = self.chance.choice((("post", 1000), ("post", 4096), ("upload", 30000),
                                                 ("wsgi", 30000)))
                content = content_of(self.ledger.marker(), size)
                head = b"POST /%s HTTP/1.1\r\nHost: soak\r\nContent-Length: %d\r\n\r\n" % (root.encode(),
                                                                                           size)
                sock.sendall(head + content)
                self.ledger.count("POST", content, tape.answer())

    def chunked(self):
        with self.connection() as sock:
            tape = Tape(sock)
            for root, size in ("post", 3000), ("upload", 30000), ("wsgi", 30000):
                content, place = content_of(self.ledger.marker(), size), 0
                head = b"POST /%s HTTP/1.1\r\nHost: soak\r\nTransfer-Encoding: chunked\r\n\r\n"
                sock.sendall(head % root.encode())
                while place < size:
                    piece = content[place:place + self.chance.randrange(1, 9000)]
                    sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                    place += len(piece)
                sock.sendall(b"0\r\n\r\n")
                self.ledger.count("chunked", content, tape.answer())

    def wsgi(self):
        with self.connection() as sock:
            self.one_by_one(sock, "wsgi", 70000, 2)

    def slow_reader(self):
        with self.connection(receive=4096) as sock:
            marker = self.ledger.marker()
            sock.sendall(self.get("large", marker, "Connection: close\r\n"))
            data = b""
            while more := sock.recv(8192):
                data += more
                time.sleep(0.005)
            head, _, content = data.partition(b"\r\n\r\n")
            status = int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else head[:80]
            self.ledger.count("slow reader", content_of(marker, LARGE), (status, content))

    def half_closed(self):
        with self.connection() as sock:
            root, size = self.chance.choice((("page", 500), ("suspended", 500), ("stream", 30000)))
            marker = self.ledger.marker()
            sock.sendall(self.get(root, marker))
            sock.shutdown(socket.SHUT_WR)
            self.ledger.count("half-closed", content_of(marker, size), Tape(sock).answer())

    def resets(self):
        """Clients that go away anywhere: they are owed nothing, but nothing may be left of them."""
        with self.connection(self.chance.choice(self.ports)) as sock:
            root = self.chance.choice(("page", "large", "stream", "suspended", "wsgi"))
            raw = self.get(root, "reset") * self.chance.choice((1, 5))
            if self.chance.random() < 0.3:
                raw = b"POST /wsgi HTTP/1.1\r\nHost: soak\r\nContent-Length: 50000\r\n\r\n" + b"x" * 20000
            sock.sendall(raw[:self.chance.choice((0, 10, len(raw)))])
            time.sleep(self.chance.choice((0, 0.001, 0.02)))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with self.ledger.lock:
            self.ledger.left += 1


def measure(port):
    """What the child has in use, once nobody is connected but who asks."""
    found = {}
    for _ in range(100):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as client:
            client.request("GET", "/stats")
            found = json.loads(client.getresponse().read())
        if found["held"] == 0 and found["connections"] <= 1:
            break
        time.sleep(0.1)
    return found


def load(ports, ledger, seconds, part):
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=Load(ports, ledger, "%s %d" % (part, i)).run, args=(until,))
               for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return measure(ports[0])


def make_certificate(directory):
    if not shutil.which("openssl"):
        return "", ""
    cert_file, key_file = os.path.join(directory, "cert.pem"), os.path.join(directory, "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                    "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-keyout", key_file, "-out", cert_file], check=True, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL)
    return cert_file, key_file


def compare(first, last):
    findings = []
    if last["held"] or last["connections"] > 1:
        findings.append("held at the end: %d bytes, %d connections" % (last["held"], last["connections"] - 1))
    for name in "descriptors", "threads":
        if last[name] > first[name]:
            findings.append("%s: %d, then %d" % (name, first[name], last[name]))
    if last["memory"] > first["memory"] + GROWTH:
        findings.append("memory: %d kB, then %d kB" % (first["memory"] // 1024, last["memory"] // 1024))
    return findings


def main(seconds):
    ledger = Ledger()
    with tempfile.TemporaryDirectory() as directory:
        log = os.path.join(directory, "log")
        with open(log, "w") as errors:
            child = subprocess.Popen([sys.executable, __file__, "--serve", *make_certificate(directory)],
                                     stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            ports = [int(port) for port in child.stdout.readline().split()]
            first = load(ports, ledger, seconds * FIRST_PART, "first")
            last = load(ports, ledger, seconds * (1 - FIRST_PART), "last")
        finally:
            child.terminate()
            try:
                code = child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                code = "none within 20 s of SIGTERM"
        text = pathlib.Path(log).read_text()
    findings = ledger.findings + compare(first, last)
    if code:
        findings.append("exit status %s" % code)
    tracebacks = re.findall(r"(?m)^(?:\w+\.)*\w*(?:Error|Exception|Exit): .*|^.*Warning: .*", text)
    findings += ["the log of the server: " + line for line in sorted(set(tracebacks))]
    for kind in sorted(ledger.asked):
        print("%-12s %7d asked %7d answered" % (kind, ledger.asked[kind], ledger.answered[kind]))
    print("%-12s %7d" % ("resets", ledger.left))
    for name in "memory", "descriptors", "threads", "held":
        print("%-12s %10d then %10d" % (name, first[name], last[name]))
    for kind, count in collections.Counter(finding.partition(":")[0] for finding in findings).items():
        print("FINDING %d times: %s" % (count, kind))
    for finding in findings[:SHOWN]:
        print("    " + finding)
    return 1 if findings else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*([*sys.argv[2:], "", ""][:2]))
        sys.exit(0)
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 60))
