#!/usr/bin/env python3
"""What a request costs: httpd.py beside other servers, on this machine.

    python .ci/bench.py --quick                     two minutes: the main scenarios, four other servers
    python .ci/bench.py --json result.json          all of it: half an hour

Measured is the CPU time of a server per request: user and system time of its process and its children, in microseconds, from the kernel's
accounting. It stands still where requests per second follow whatever else the machine does. A server runs on the first core, its load on
the last one. Servers take turns within a round, so what disturbs the machine disturbs all of them; the first round warms up and is dropped.
A row gives the median of the rounds, their least and greatest, and the ratio to httpd.py on the first Python, both ways around. A row with
errors (a status that is not 2xx, a socket error, too few requests) is marked as failed, and its ratio is left out.

Every server sends the same status, content, Content-Type and Date, keeps connections alive, and logs nothing. The size of a response is
printed. A few servers have fields that cannot be turned off: nginx has Server and Connection, bjoern Connection, granian Server.

Needed is Python 3.11 on Linux. The other servers go into a virtual environment in the user's cache directory; what Debian packages comes
from apt-get if this is root. What cannot be had is named and left out. "bare" is no HTTP server: epoll, recv, and a constant sent, in
Python: the limit of what is possible.
"""
import argparse
import contextlib
import gc
import glob
import importlib.util
import json
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from email.utils import formatdate
from pathlib import Path
from typing import Callable, NamedTuple, Optional

HERE = Path(__file__).resolve()
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "httpd-bench"
CORES = sorted(os.sched_getaffinity(0))
TYPE = "text/html; charset=utf-8"
HELLO = b"Hello, world!\n"
MIB = 2**20
CONNECTIONS = 64                    # that wrk opens
LARGE_CONNECTIONS = 8               # for 1 MiB each: what is not sent yet should stay in the cache of the processor
IDLE_CONNECTIONS = 2000             # for memory
BESIDE = 5000                       # idle connections beside the measured latency
RATE = 5000                         # requests a second for latency, about a twentieth of what is possible
CALL = '{"jsonrpc":"2.0","id":1,"method":"httpd_list_root_path"}'
GET_REQUEST = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
RPC_REQUEST = ("POST /mi HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(CALL), CALL)).encode()

OURS = "httpd.py"
PYPI = {"uvicorn": ("uvicorn", "httptools", "uvloop"), "granian-wsgi": ("granian",), "granian-asgi": ("granian", "uvloop"),
        "aiohttp": ("aiohttp", "uvloop"), "waitress": ("waitress",), "cheroot": ("cheroot",), "bjoern": ("bjoern",)}
DEBIAN = {"wrk": ("wrk",), "nginx": ("nginx",), "node": ("node",), "bjoern": ("cc", "ev.h"), "libmicrohttpd": ("cc", "microhttpd.h")}
PACKAGES = {"wrk": "wrk", "nginx": "nginx-light", "node": "nodejs", "cc": "gcc", "ev.h": "libev-dev", "microhttpd.h": "libmicrohttpd-dev"}
PEERS = ["bare", "libmicrohttpd", "nginx", "bjoern", "granian-wsgi", "granian-asgi", "node", "uvicorn", "aiohttp", "waitress", "cheroot",
         "http.server"]
QUICK_PEERS = ["libmicrohttpd", "nginx", "uvicorn", "http.server"]
left_out: dict[str, str] = {}       # what -> why


# ---------------------------------------------------------------------------------------- The servers, each in a process of its own
# `bench.py serve NAME PORT` runs one. What it answers stands in the environment, which granian's worker inherits, too.

def content() -> bytes:
    return Path(os.environ["BENCH_CONTENT"]).read_bytes()


def serve_ours(port: int) -> None:
    spec = importlib.util.spec_from_file_location("httpd", os.environ["BENCH_HTTPD"])
    httpd = sys.modules["httpd"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(httpd)
    body = content()

    def hello(request, page):
        page.write(body)
        return 200

    httpd.register_httpdcb("bench", "hello", hello)
    for number in range(int(os.environ.get("BENCH_ROOTS", 1)) - 1):
        httpd.register_httpdcb("bench", "root%d" % number, hello)
    httpd.loadmodule("mi_http")
    large = {"buf_size": 2 * MIB, "memory_budget": 64 * MIB} if len(body) >= MIB else {}
    httpd.run(ip="127.0.0.1", port=port, **large)


def serve_bare(port: int) -> None:
    head = "HTTP/1.1 200 OK\r\nDate: %s\r\nContent-Type: %s\r\n%%sContent-Length: %d\r\n\r\n" % (formatdate(usegmt=True), TYPE, len(content()))
    response, last = (head % "").encode() + content(), (head % "Connection: close\r\n").encode() + content()
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setblocking(False)
    poll, connections = select.epoll(), {}
    poll.register(listener, select.EPOLLIN)
    while True:
        for number, _ in poll.poll():
            sock = connections.get(number)
            if sock is None:
                with contextlib.suppress(BlockingIOError):
                    sock, _ = listener.accept()
                    connections[sock.fileno()] = sock
                    poll.register(sock, select.EPOLLIN)
                continue
            try:
                data = sock.recv(16384)
            except OSError:
                data = b""
            if data and b"\r\nConnection: close" not in data:
                sock.send(response)                             # one, whatever came: requests that are pipelined fail
                continue
            if data:
                sock.send(last)
            poll.unregister(number)
            connections.pop(number).close()


def serve_http_server(port: int) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    body = content()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1                                           # as shipped it sends twice, and waits 40 ms in between

        def do_GET(self):
            self.send_response_only(200)
            self.send_header("Date", self.date_time_string())
            self.send_header("Content-Type", TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    ThreadingHTTPServer.request_queue_size = 1024
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def serve_uvicorn(port: int) -> None:
    import uvicorn
    uvicorn.run(asgi_application(), host="127.0.0.1", port=port, http="httptools", loop="uvloop", log_level="critical", access_log=False,
                server_header=False, lifespan="off", timeout_keep_alive=60)


def serve_granian_wsgi(port: int, interface: str = "wsgi", loop: str = "asyncio") -> None:
    from granian import Granian
    Granian("bench:" + interface, address="127.0.0.1", port=port, interface=interface, loop=loop, workers=1, log_enabled=False,
            websockets=False, factory=True).serve()


def serve_granian_asgi(port: int) -> None:
    serve_granian_wsgi(port, "asgi", "uvloop")


def serve_aiohttp(port: int) -> None:
    import uvloop
    from aiohttp import web, web_response
    web_response.SERVER_SOFTWARE = ""
    body, fields = content(), {"Content-Type": TYPE}

    async def hello(request):
        return web.Response(body=body, headers=fields)

    uvloop.install()
    application = web.Application()
    application.router.add_get("/hello", hello)
    web.run_app(application, host="127.0.0.1", port=port, access_log=None, print=None)


def serve_waitress(port: int) -> None:
    import waitress
    waitress.serve(wsgi_application(), host="127.0.0.1", port=port, ident="", connection_limit=20000, asyncore_use_poll=True)


def serve_cheroot(port: int) -> None:
    from cheroot import wsgi
    server = wsgi.Server(("127.0.0.1", port), wsgi_application(), timeout=60)
    server.server_name = ""
    server.start()


def serve_bjoern(port: int) -> None:
    import bjoern
    body, fields, second = content(), [], 0

    def application(environ, start_response):
        nonlocal fields, second
        if int(time.time()) != second:                          # it has no Date of its own
            second = int(time.time())
            fields = [("Date", formatdate(usegmt=True)), ("Content-Type", TYPE), ("Content-Length", str(len(body)))]
        start_response("200 OK", fields)
        return [body]

    bjoern.run(application, "127.0.0.1", port)


def wsgi_application():
    body = content()
    fields = [("Content-Type", TYPE), ("Content-Length", str(len(body)))]

    def application(environ, start_response):
        start_response("200 OK", fields)
        return [body]

    return application


def asgi_application():
    body = content()
    start = {"type": "http.response.start", "status": 200,
             "headers": [(b"content-type", TYPE.encode()), (b"content-length", b"%d" % len(body))]}
    end = {"type": "http.response.body", "body": body}

    async def application(scope, receive, send):
        await send(start)
        await send(end)

    return application


wsgi, asgi = wsgi_application, asgi_application                 # by which granian finds them

SERVE = {OURS: serve_ours, "bare": serve_bare, "http.server": serve_http_server, "uvicorn": serve_uvicorn, "granian-wsgi": serve_granian_wsgi,
         "granian-asgi": serve_granian_asgi, "aiohttp": serve_aiohttp, "waitress": serve_waitress, "cheroot": serve_cheroot,
         "bjoern": serve_bjoern}

NODE = """
const http = require("http"), content = require("fs").readFileSync(process.env.BENCH_CONTENT);
const server = http.createServer((request, response) => {
    if (response.shouldKeepAlive) response.removeHeader("Connection");
    response.writeHead(200, {"Content-Type": "%s", "Content-Length": content.length});
    response.end(content);
});
server.keepAliveTimeout = 60000;
server.listen(+process.argv[2], "127.0.0.1", 1024);
""" % TYPE

# Content of 1 MiB is put together in memory for each request, like the page of httpd.py: one copy by the server, one by send(). nginx
# has no other way to hold it in memory; a file, even on a RAM disk, costs a read() or, with sendfile, none of these copies.
NGINX = """
worker_processes 1; daemon off; pid nginx.pid; error_log /dev/null crit; %(user)s
events { worker_connections 20000; }
http {
    access_log off; server_tokens off; keepalive_requests 1000000000; keepalive_timeout 75; default_type "text/html; charset=utf-8";
    client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
    server {
        listen 127.0.0.1:%(port)d backlog=1024;
        location / { set $k "%(block)s"; return 200 "%(content)s"; }
    }
}
"""

MICROHTTPD = r"""
#include <microhttpd.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char content[1 << 21], *type;
static size_t size;

static enum MHD_Result answer(void *c, struct MHD_Connection *connection, const char *url, const char *method, const char *version,
                              const char *data, size_t *data_size, void **seen) {
    if (!*seen) { *seen = content; return MHD_YES; }
    if (*data_size) { *data_size = 0; return MHD_YES; }
    struct MHD_Response *response = MHD_create_response_from_buffer(size, content, MHD_RESPMEM_PERSISTENT);
    MHD_add_response_header(response, "Content-Type", type);
    enum MHD_Result result = MHD_queue_response(connection, 200, response);
    MHD_destroy_response(response);
    return result;
}

int main(int count, char **arguments) {
    if (count < 2) return puts(MHD_get_version()) < 0;
    type = getenv("BENCH_TYPE");
    FILE *file = fopen(getenv("BENCH_CONTENT"), "rb");
    size = fread(content, 1, sizeof content, file);
    if (!MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_INTERNAL_POLLING_THREAD, atoi(arguments[1]), 0, 0, answer, 0,
                          MHD_OPTION_CONNECTION_LIMIT, 20000u, MHD_OPTION_END)) return 1;
    for (;;) pause();
}
"""


def command(name: str, python: str, port: int, work: Path, body: bytes) -> list:
    """What starts a server; its files are written."""
    if name == "libmicrohttpd":
        return [CACHE / "microhttpd", str(port)]
    if name == "node":
        (work / "node.js").write_text(NODE)
        return ["node", work / "node.js", str(port)]
    if name == "nginx":
        folder = Path(tempfile.mkdtemp(dir=work))
        block = "x" * 2048                                      # a word of the configuration has at most 4 kB
        text = "$k" * (len(body) // len(block)) if len(body) >= MIB else body.decode().replace("\n", "\\n")
        user = "" if os.geteuid() else "user root;"
        (folder / "nginx.conf").write_text(NGINX % {"port": port, "block": block, "content": text, "user": user})
        return ["nginx", "-p", folder, "-c", "nginx.conf", "-e", "/dev/null"]
    return [python, HERE, "serve", name, str(port)]


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def exchange(sock: socket.socket, request: bytes) -> tuple[str, bytes]:
    """Head and content of the answer."""
    sock.sendall(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536) or fail("it hangs up")
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)[1])
    while len(body) < length:
        body += sock.recv(MIB) or fail("it hangs up")
    return head.decode() + "\r\n\r\n", body


def fail(why: str):
    raise OSError(why)


class Server:
    """A running server. All that it starts is in its process group, which is how it is measured and ended."""

    def __init__(self, name: str, python: str, work: Path, body: bytes = HELLO, type: str = TYPE, roots: int = 1):
        self.name, self.body, self.type = name, body, type
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        (work / ("content%d" % self.port)).write_bytes(body)
        environment = dict(os.environ, BENCH_CONTENT=str(work / ("content%d" % self.port)), BENCH_TYPE=type, BENCH_ROOTS=str(roots),
                           BENCH_HTTPD=str(work / "httpd.py"), PYTHONPATH=str(HERE.parent), PYTHONDONTWRITEBYTECODE="1")
        self.log = work / ("log%d" % self.port)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command(name, python, self.port, work, body), env=environment, cwd=work, start_new_session=True,
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                                            preexec_fn=lambda: os.sched_setaffinity(0, CORES[:1]))

    def wait(self) -> None:
        """Wait until it answers as it should, and see what that is."""
        for _ in range(600):
            with contextlib.suppress(ConnectionRefusedError), connect(self.port) as sock:
                return self.check(sock)
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise OSError((self.log.read_text(errors="replace").strip().splitlines() or ["it does not start"])[-1])

    def check(self, sock: socket.socket) -> None:
        """One request: the answer must be comparable. Its size and content are kept."""
        rpc = self.type == "application/json"
        head, self.answer = exchange(sock, RPC_REQUEST if rpc else GET_REQUEST)
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        self.size = len(head) + len(self.answer)
        if not head.startswith("HTTP/1.1 200 ") or fields["content-type"] != self.type or "date" not in fields:
            raise OSError("it answers something else: %r" % head)
        if not rpc and self.answer != self.body:
            raise OSError("it answers with other content")

    def members(self) -> list[int]:
        """The processes of its group."""
        found = []
        for number in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.getpgid(int(number)) == self.process.pid:
                    found.append(int(number))
        return found

    def cpu(self) -> float:
        """Microseconds so far, of threads that have ended, too: the clock of a process, by the number that clock_getcpuclockid(3) gives it."""
        return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.members()) / 1000

    def memory(self) -> dict[str, int]:
        """Bytes that are resident: Rss, and Pss, where each process has its share of what it shares."""
        total = {"Rss": 0, "Pss": 0}
        for pid in self.members():
            for line in Path("/proc/%d/smaps_rollup" % pid).read_text().splitlines():
                if line.partition(":")[0] in total:
                    total[line.partition(":")[0]] += int(line.split()[1]) * 1024
        return total

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()



@contextlib.contextmanager
def running(wanted: dict[str, dict], work: Path):
    """Servers by their labels, started at once; what does not start is left out."""
    servers = {}
    try:
        for label, arguments in wanted.items():
            servers[label] = Server(work=work, **arguments)
        for label, server in list(servers.items()):
            try:
                server.wait()
            except OSError as error:
                left_out[label] = str(error)
                servers.pop(label).stop()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


# ------------------------------------------------------------------------------------------------------------- Loads
# A load returns a sample: {"value": what is measured, "requests": completed, "errors": {kind: number}}.

DONE = r"""
done = function(summary)
    local e = summary.errors
    print(string.format("RESULT %d %d %d %d %d %d %d", summary.requests, summary.duration, e.connect, e.read, e.write, e.status, e.timeout))
end
"""
BROWSER = """
local run, number, fields = "", 0, {
    ["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    ["Accept"] = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    ["Accept-Language"] = "en-US,en;q=0.5", ["Accept-Encoding"] = "gzip, deflate, br, zstd", ["DNT"] = "1", ["Priority"] = "u=0, i",
    ["Sec-Fetch-Dest"] = "document", ["Sec-Fetch-Mode"] = "navigate", ["Sec-Fetch-Site"] = "none"}    -- and Host makes ten
init = function(arguments) run = arguments[1] end
request = function()
    number = number + 1
    NEVER_SEEN
    return wrk.format("GET", "/hello?n=" .. run .. number, fields)
end
"""
SCRIPTS = {
    "get": "",
    "new-url": BROWSER.replace("NEVER_SEEN", ""),
    "never-seen": BROWSER.replace("NEVER_SEEN", 'fields["X-Request-Id"] = "id-" .. run .. number'),
    "pipelined": """
local sixteen
init = function() sixteen = string.rep(wrk.format("GET", "/hello"), 16) end
request = function() return sixteen end
""",
    "new-connection": 'wrk.headers["Connection"] = "close"',
    "mi": 'wrk.method, wrk.path, wrk.body, wrk.headers["Content-Type"] = "POST", "/mi", [[%s]], "application/json"' % CALL,
}


def connections_accepted() -> int:
    """TCP connections that this machine has taken in so far."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:"))
    return int(values[names.index("PassiveOpens")])


def wrk(server: Server, work: Path, seconds: int, script: str = "get", connections: int = CONNECTIONS) -> dict:
    """CPU time per request under as much load as one thread of wrk gives."""
    (work / "wrk.lua").write_text(SCRIPTS[script] + DONE)
    accepted, before = connections_accepted(), server.cpu()
    run = subprocess.run(["wrk", "-t1", "-c%d" % connections, "-d%ds" % seconds, "-s", work / "wrk.lua",
                          "http://127.0.0.1:%d/hello" % server.port, "--", "%x-" % time.time_ns()], capture_output=True, text=True)
    spent, accepted = server.cpu() - before, connections_accepted() - accepted
    found = re.search("RESULT " + "([0-9]+) ?" * 7, run.stdout)
    if not found:
        return {"value": 0.0, "requests": 0, "errors": {"wrk": 1}}
    requests, duration, *errors = map(int, found.groups())
    errors = dict(zip(("connect", "read", "write", "status", "timeout"), errors))
    errors["too few"] = max(0, 100 * seconds - requests)
    if script == "new-connection":
        errors["not opened"] = max(0, requests - accepted)
    return {"value": spent / max(requests, 1), "requests": requests, "per_second": requests * 1e6 / duration,
            "errors": {kind: number for kind, number in errors.items() if number}}


@contextlib.contextmanager
def opened(server: Server, number: int):
    """Connections that have been used once."""
    socks = []
    try:
        for _ in range(number):
            socks.append(connect(server.port))
            exchange(socks[-1], GET_REQUEST)
        yield socks
    finally:
        for sock in socks:
            sock.close()


def idle_memory(server: Server) -> dict:
    """Bytes of a server that has just been started, for each connection that waits for its next request."""
    with opened(server, 1) as (sock,):
        for _ in range(100):
            exchange(sock, GET_REQUEST)
    time.sleep(0.3)
    before = server.memory()
    with opened(server, IDLE_CONNECTIONS):
        time.sleep(0.3)
        growth = {kind: (size - before[kind]) / IDLE_CONNECTIONS for kind, size in server.memory().items()}
    return {"value": growth["Pss"], "resident": growth["Rss"], "requests": IDLE_CONNECTIONS, "errors": {}}


def closed_loop(server: Server, seconds: float, connections: int) -> dict:
    """CPU time per request when each connection sends the next one as soon as it has its answer. Opening them is not counted."""
    with opened(server, connections) as socks, select.epoll() as poll:
        by_number = {sock.fileno(): sock for sock in socks}
        for sock in socks:
            poll.register(sock, select.EPOLLIN)
        before, end, requests, wrong = server.cpu(), time.monotonic() + seconds, 0, 0
        for sock in socks:
            sock.send(GET_REQUEST)
        waiting = connections
        while waiting and (ready := poll.poll(5)):
            late = time.monotonic() > end
            for number, _ in ready:
                sock = by_number[number]
                wrong += len(sock.recv(4096)) != server.size
                requests += 1
                waiting -= late
                late or sock.send(GET_REQUEST)
        return {"value": (server.cpu() - before) / requests, "requests": requests, "errors": {"answer": wrong + waiting} if wrong + waiting else {}}


def open_loop(server: Server, seconds: float) -> dict:
    """Microseconds until the answer, at a fixed rate, with idle connections beside. The time counts from when a request was meant to be sent,
    whether or not a connection was free by then: a server that stalls is charged for all who would have come meanwhile."""
    with opened(server, BESIDE), opened(server, CONNECTIONS) as socks, select.epoll() as poll:
        by_number = {sock.fileno(): sock for sock in socks}
        for sock in socks:
            poll.register(sock, select.EPOLLIN)
        free, meant, latencies, wrong = deque(socks), {}, [], 0
        total, sent, before, start = int(RATE * seconds), 0, server.cpu(), time.perf_counter()
        while len(latencies) < total and time.perf_counter() < start + seconds + 10:
            while free and sent < total and (due := start + sent / RATE) <= time.perf_counter():
                sock = free.popleft()
                meant[sock.fileno()] = due
                sock.send(GET_REQUEST)
                sent += 1
            for number, _ in poll.poll(0):                      # never asleep: this core is ours, and waking up takes its time
                wrong += len(by_number[number].recv(4096)) != server.size
                latencies.append((time.perf_counter() - meant[number]) * 1e6)
                free.append(by_number[number])
        latencies += [1e7] * (total - len(latencies))
        wrong += latencies.count(1e7)
        latencies.sort()
        return {"latencies": {name: latencies[int(total * part)] for name, part in (("p50", .5), ("p99", .99), ("p99.9", .999))},
                "cpu": (server.cpu() - before) / total, "requests": total, "errors": {"answer": wrong} if wrong else {}}


# --------------------------------------------------------------------------------------------------------- Scenarios

class Bench(NamedTuple):
    """What was asked for."""

    work: Path
    rounds: int
    seconds: int
    ours: dict[str, dict]           # label -> arguments of Server
    peers: dict[str, dict]


def in_turns(rounds: int, loads: dict) -> dict[str, list]:
    """Samples by label. The first round warms up."""
    samples = {label: [] for label in loads}
    for turn in range(rounds + 1):
        for label, load in loads.items():
            sample = attempt(load)
            if turn:
                samples[label].append(sample)
    return samples


def attempt(load) -> dict:
    try:
        return load()
    except OSError as error:
        return {"value": 0.0, "requests": 0, "errors": {str(error): 1}}


def with_wrk(bench: Bench, script: str, body: bytes = HELLO, connections: int = CONNECTIONS) -> list[dict]:
    """All servers, under wrk."""
    wanted = {label: dict(arguments, body=body) for label, arguments in {**bench.ours, **bench.peers}.items()}
    with running(wanted, bench.work) as servers:
        loads = {label: lambda server=server: wrk(server, bench.work, bench.seconds, script, connections) for label, server in servers.items()}
        return rows_of(in_turns(bench.rounds, loads), servers)


def with_large(bench: Bench) -> list[dict]:
    return with_wrk(bench, "get", b"x" * MIB, LARGE_CONNECTIONS)


def with_idle(bench: Bench) -> list[dict]:
    """A new server each time: what one has freed it would use again."""
    samples = {}
    for _ in range(min(bench.rounds, 3)):
        for label, arguments in {**bench.ours, **bench.peers}.items():
            with running({label: arguments}, bench.work) as servers:
                for server in servers.values():
                    samples.setdefault(label, []).append(attempt(lambda: idle_memory(server)))
    return rows_of(samples)


def with_mi(bench: Bench) -> list[dict]:
    """A JSON-RPC call; beside it libmicrohttpd, which reads the same and sends the same, but understands nothing of it."""
    json_type = {"type": "application/json"}
    with running({label: dict(arguments, **json_type) for label, arguments in bench.ours.items()}, bench.work) as servers:
        echo = {label: dict(arguments, body=next(iter(servers.values())).answer, **json_type)
                for label, arguments in bench.peers.items() if label == "libmicrohttpd" and servers}
        with running(echo, bench.work) as more:
            loads = {label: lambda server=server: wrk(server, bench.work, bench.seconds, "mi") for label, server in {**servers, **more}.items()}
            return rows_of(in_turns(bench.rounds, loads), {**servers, **more})


def with_connections(bench: Bench) -> list[dict]:
    """Of this server alone: whether many connections make a request dearer."""
    with running(bench.ours, bench.work) as servers:
        loads = {"%s, %d" % (label, number): lambda server=server, number=number: closed_loop(server, bench.seconds, number)
                 for label, server in servers.items() for number in (10, 100, 1000, 10000)
                 if number + 100 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] or left_out.update({"%d connections" % number: "RLIMIT_NOFILE"})}
        return rows_of(in_turns(bench.rounds, loads))


def with_roots(bench: Bench) -> list[dict]:
    """Of this server alone: whether many roots make a request dearer."""
    wanted = {"%s, %d" % (label, roots): dict(arguments, roots=roots) for label, arguments in bench.ours.items() for roots in (1, 100, 10000)}
    with running(wanted, bench.work) as servers:
        return rows_of(in_turns(bench.rounds, {label: lambda server=server: wrk(server, bench.work, bench.seconds) for label, server in servers.items()}))


def with_latency(bench: Bench) -> list[dict]:
    """Of this server alone: its percentiles."""
    with running(bench.ours, bench.work) as servers:
        samples = in_turns(bench.rounds, {label: lambda server=server: open_loop(server, bench.seconds) for label, server in servers.items()})
    return rows_of({"%s, %s" % (label, name): [dict(sample, value=sample.get("latencies", {}).get(name, 0.0)) for sample in taken]
                    for label, taken in samples.items() for name in ("p50", "p99", "p99.9")})


class Scenario(NamedTuple):
    title: str
    unit: str
    take: Callable[[Bench], list]
    tools: tuple = ("wrk",)


SCENARIOS = {
    "get": Scenario("the same GET again and again, 14 bytes of content", "us", lambda bench: with_wrk(bench, "get")),
    "new-url": Scenario("GET with the 10 fields of a browser, a new URL each", "us", lambda bench: with_wrk(bench, "new-url")),
    "never-seen": Scenario("the same and a field never seen before each", "us", lambda bench: with_wrk(bench, "never-seen")),
    "pipelined": Scenario("GET, pipelined by 16", "us", lambda bench: with_wrk(bench, "pipelined")),
    "new-connection": Scenario("GET, a new connection each", "us", lambda bench: with_wrk(bench, "new-connection")),
    "memory": Scenario("memory of an idle connection (PSS)", "bytes", with_idle, ()),
    "mi": Scenario("POST of httpd_list_root_path to /mi", "us", with_mi),
    "large": Scenario("GET of 1 MiB", "us/MiB", with_large),
    "connections": Scenario("GET on many connections at a time", "us", with_connections, ()),
    "roots": Scenario("GET with many roots", "us", with_roots),
    "latency": Scenario("latency at %d requests/s beside %d idle connections" % (RATE, BESIDE), "us", with_latency, ()),
}
QUICK_SCENARIOS = ["get", "new-url", "never-seen", "pipelined", "new-connection"]


# ------------------------------------------------------------------------------------------------------------ Results

def rows_of(samples: dict[str, list], servers: Optional[dict] = None) -> list[dict]:
    """What a table shows. The ratios are to the first row, httpd.py on the first Python."""
    rows = []
    for label, taken in samples.items():
        values = [sample["value"] for sample in taken]
        errors = Counter()
        for sample in taken:
            errors.update(sample["errors"])
        rows.append({"server": label, "median": statistics.median(values), "min": min(values), "max": max(values), "errors": errors,
                     "failed": bool(errors), "bytes": servers[label].size if servers else None, "samples": taken})
    for row in rows:
        sound = not (row["failed"] or rows[0]["failed"]) and row["median"] > 0 and rows[0]["median"] > 0
        row["it_to_ours"] = row["median"] / rows[0]["median"] if sound else None
        row["ours_to_it"] = rows[0]["median"] / row["median"] if sound else None
    return rows


def show(name: str, scenario: Scenario, rows: list[dict]) -> None:
    print("\n%s: %s\n  %-24s%10s%20s%9s%9s%9s%10s" % (name, scenario.title, "", scenario.unit, "min - max", "it/ours", "ours/it", "bytes", "per s"))
    for row in rows:
        spread = "%.2f - %.2f" % (row["min"], row["max"])
        rates = [sample["per_second"] for sample in row["samples"] if "per_second" in sample]
        ratios = "%9s%9s" % ("failed", "") if row["failed"] else "%9.2f%9.2f" % (row["it_to_ours"], row["ours_to_it"]) if row["it_to_ours"] else 18 * " "
        errors = "  errors: " + ", ".join("%s %d" % pair for pair in row["errors"].items()) if row["errors"] else ""
        print("  %-24s%10.2f%20s%s%9s%10s%s" % (row["server"], row["median"], spread, ratios, row["bytes"] or "",
                                                "%.0f" % statistics.median(rates) if rates else "", errors), flush=True)


def machine() -> dict:
    model = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"cpu": model[1] if model else platform.machine(), "cores": len(CORES), "kernel": platform.release()}


def output(*arguments) -> str:
    """The last word that a program says, mostly its version; empty if there is no such program."""
    try:
        run = subprocess.run(arguments, capture_output=True, text=True)
    except OSError:
        return ""
    return (run.stdout + run.stderr).strip()


def versions(pythons: list[str], python: str, peers: list[str]) -> dict[str, str]:
    """Of all that takes part."""
    found = {OURS + " on Python": ", ".join(map(python_version, pythons)), "Python of the others": python_version(python)}
    packages = installed(python, sorted({package for name in peers for package in PYPI.get(name, ())}))
    found.update({package: version for package, version in packages.items() if version})
    tools = {"nginx": ("nginx", "-v"), "node": ("node", "-v"), "libmicrohttpd": (CACHE / "microhttpd",), "wrk": ("wrk", "-v")}
    for name, arguments in tools.items():
        number = re.search("[0-9]+[.][0-9.]*[0-9]", output(*arguments))
        if number and name in peers + ["wrk"]:
            found[name] = number[0]
    return found


# ------------------------------------------------------------------------------------------------------- Installation

def present(tool: str) -> bool:
    """A program, or a header file of C."""
    return Path("/usr/include", tool).exists() if tool.endswith(".h") else bool(shutil.which(tool))


def install_from_debian(names: list[str]) -> None:
    """Name what is missing afterwards."""
    def missing(name):
        return [tool for tool in DEBIAN.get(name, ()) if not present(tool)]

    wanted = sorted({PACKAGES[tool] for name in names for tool in missing(name)})
    if wanted and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing", *wanted, flush=True)
        quiet = {"env": dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1"),       # which starts no service
                 "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update"], **quiet)
        for package in wanted:
            subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", package], **quiet)
    left_out.update({name: "there is no " + " and no ".join(missing(name)) for name in names if missing(name)})


def install_from_pypi(base: str, names: list[str]) -> str:
    """The Python of a virtual environment that has the packages."""
    packages = sorted({package for name in names for package in PYPI.get(name, ())})
    folder = CACHE / ("python" + python_version(base))
    python = str(folder / "bin/python")
    if packages and not os.path.exists(python):
        subprocess.run([base, "-m", "venv", folder], stdout=subprocess.DEVNULL)
    if not os.path.exists(python):
        left_out.update({name: "no virtual environment" for name in names if name in PYPI})
        return base
    for package in [package for package, version in installed(python, packages).items() if not version]:
        print("installing", package, flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package], stderr=subprocess.DEVNULL)
    have = installed(python, packages)
    for name in names:
        if lacking := [package for package in PYPI.get(name, ()) if not have[package]]:
            left_out.setdefault(name, "%s cannot be installed" % ", ".join(lacking))
    return python


def installed(python: str, packages: list[str]) -> dict[str, str]:
    """Their versions; empty for what is not there."""
    program = """import importlib.metadata as m, sys
for name in sys.argv[1:]:
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "")"""
    return {line.partition(" ")[0]: line.partition(" ")[2] for line in output(python, "-c", program, *packages).splitlines()}


def compile_microhttpd() -> None:
    (CACHE / "microhttpd.c").write_text(MICROHTTPD)
    run = subprocess.run(["cc", "-O2", "-o", CACHE / "microhttpd", CACHE / "microhttpd.c", "-lmicrohttpd"], capture_output=True, text=True)
    if run.returncode:
        left_out["libmicrohttpd"] = "the compiler fails: " + run.stderr.strip().splitlines()[-1]


def install(base: str, names: list[str]) -> tuple[str, list[str]]:
    """The Python for the other servers, and those of them that can take part."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    CACHE.mkdir(parents=True, exist_ok=True)
    install_from_debian(["wrk"] + names)
    python = install_from_pypi(base, [name for name in names if name not in left_out])
    if "libmicrohttpd" in names and "libmicrohttpd" not in left_out:
        compile_microhttpd()
    return python, [name for name in names if name not in left_out]


def python_version(python: str) -> str:
    return output(python, "-c", "import platform; print(platform.python_version())")


# --------------------------------------------------------------------------------------------------------------- main

def arguments() -> argparse.Namespace:
    def names(known):
        def convert(text):
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError("%s: choose from %s" % (", ".join(unknown), ", ".join(known)))
            return [name for name in known if name in text.split(",")]
        return convert

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="scenarios: %s; servers: %s" % (", ".join(SCENARIOS), ", ".join(PEERS)))
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1 s of the main scenarios, with few servers and one Python")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all samples there")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--seconds", type=int, help="of a load in a round; default: 2")
    parser.add_argument("--scenarios", metavar="A,B", type=names(SCENARIOS), help="default: all")
    parser.add_argument("--servers", metavar="A,B", type=names([OURS] + PEERS), help="default: all; httpd.py always takes part")
    parser.add_argument("--python", action="append", help="for httpd.py, may be repeated; the others run on the first; default: 3.11 and 3.13 of pyenv")
    parser.add_argument("--httpd", type=Path, default=HERE.parent.parent / "httpd.py", help="the file to measure")
    chosen = parser.parse_args()
    if not chosen.python:
        found = [path for number in ("3.11", "3.13") for path in sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/%s*/bin/python" % number)))]
        chosen.python = (found or [sys.executable])[:1 if chosen.quick else None]
    chosen.rounds = chosen.rounds or (3 if chosen.quick else 5)
    chosen.seconds = chosen.seconds or (1 if chosen.quick else 2)
    chosen.scenarios = chosen.scenarios or (QUICK_SCENARIOS if chosen.quick else list(SCENARIOS))
    chosen.servers = [name for name in chosen.servers or (QUICK_PEERS if chosen.quick else PEERS) if name != OURS]
    return chosen


def measure(chosen: argparse.Namespace, work: Path) -> None:
    """All scenarios, one after the other; the file is written after each."""
    python, peers = install(chosen.python[0], chosen.servers)
    shutil.copy(chosen.httpd, work / "httpd.py")                # it may be edited meanwhile
    result = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "versions": versions(chosen.python, python, peers),
              "rounds": chosen.rounds, "seconds": chosen.seconds, "left_out": left_out, "scenarios": {}}
    print("%(date)s, %(machine)s\n%(versions)s\n%(rounds)d rounds of %(seconds)d s" % result)
    bench = Bench(work, chosen.rounds, chosen.seconds,
                  {"%s, %s" % (OURS, python_version(path)): {"name": OURS, "python": path} for path in chosen.python},
                  {name: {"name": name, "python": python} for name in peers})
    os.sched_setaffinity(0, CORES[-1:])
    gc.disable()                                                # no pauses in what is timed
    for name in chosen.scenarios:
        scenario = SCENARIOS[name]
        if lacking := [tool for tool in scenario.tools if tool in left_out]:
            left_out[name] = "needs " + ", ".join(lacking)
            continue
        rows = scenario.take(bench)
        show(name, scenario, rows)
        result["scenarios"][name] = {"title": scenario.title, "unit": scenario.unit, "rows": rows}
        if chosen.json:
            chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    if left_out:
        print("\nleft out:", *("\n  %s: %s" % pair for pair in left_out.items()))


def main() -> None:
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # through every `finally`
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    work = Path(tempfile.mkdtemp(prefix="httpd-bench-"))
    try:
        measure(chosen, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        SERVE[sys.argv[2]](int(sys.argv[3]))
    else:
        main()
