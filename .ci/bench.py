"""What a request costs: httpd.py beside other servers, on this machine.

    python .ci/bench.py --quick                 two minutes: the main scenarios, four other servers
    python .ci/bench.py --json result.json      all of it: 25 minutes

Measured is the CPU time of a server per request, user and system, of its process and its children, in microseconds, from the kernel's accounting.
It follows the load of the machine far less than requests per second do. A server runs on the first core, its load on the last one. Servers take
turns within a round, so what disturbs the machine disturbs all of them; the first round warms up and is dropped. A row gives the median of the
rounds, the least and the greatest, and the ratio to httpd.py on the first Python, both ways around. A row with errors (a status that is not 2xx,
a socket error, too few requests) is marked as failed and has no ratio.

Every server sends the same status, content, Content-Type and Date, keeps connections alive, and logs nothing. The bytes of a response are printed;
some have fields that cannot be turned off: nginx Server and Connection, bjoern Connection, granian server. "bare" is no HTTP server: epoll, recv,
and a constant sent, in Python, the limit of what is possible. Needed is Linux and Python 3.11. The other servers go into a virtual environment in
the user's cache directory, those that Debian has come from apt-get if this is root. What cannot be had is named and left out.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "httpd-bench"
CORES = sorted(os.sched_getaffinity(0))
MIB = 2**20
HELLO, TYPE, JSON = b"Hello, world!\n", "text/html; charset=utf-8", "application/json"
CONNECTIONS = 64                    # that wrk opens
LARGE_CONNECTIONS = 8               # for 1 MiB each: the cache of the processor should hold what is on its way
IDLE_CONNECTIONS = 2000             # whose memory is measured
BESIDE, RATE = 5000, 5000           # idle connections and requests a second when latency is measured
CALL = '{"jsonrpc":"2.0","id":1,"method":"httpd_list_root_path"}'
GET = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (f"POST /mi HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: {len(CALL)}\r\n\r\n" + CALL).encode()

OURS = "httpd.py"
PEERS = {                           # what each needs from PyPI, and which programs and C headers
    "bare": ((), ()), "libmicrohttpd": ((), ("cc", "microhttpd.h")), "nginx": ((), ("nginx",)), "bjoern": (("bjoern",), ("cc", "ev.h")),
    "granian-wsgi": (("granian",), ()), "granian-asgi": (("granian", "uvloop"), ()), "node": ((), ("node",)),
    "uvicorn": (("uvicorn", "httptools", "uvloop"), ()), "aiohttp": (("aiohttp", "uvloop"), ()), "waitress": (("waitress",), ()),
    "cheroot": (("cheroot",), ()), "http.server": ((), ()), "wrk": ((), ("wrk",))}
DEBIAN = {"wrk": "wrk", "nginx": "nginx-light", "node": "nodejs", "cc": "gcc", "ev.h": "libev-dev", "microhttpd.h": "libmicrohttpd-dev"}
QUICK_PEERS = ["libmicrohttpd", "nginx", "uvicorn", "http.server"]
left_out: dict[str, str] = {}       # what -> why


# ------------------------------------------------------------------------------------------------------- The servers
# Programs that are given a name and a port. The rest they find in the environment, as granian's worker does.

COMMON = """
import os, sys, time
from email.utils import formatdate
port, TYPE, BODY = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 0, os.environ["BENCH_TYPE"], open(os.environ["BENCH_CONTENT"], "rb").read()
fields, second = [("Content-Type", TYPE), ("Content-Length", str(len(BODY)))], 0
binary = [(name.lower().encode(), value.encode()) for name, value in fields]
def wsgi(environ, start_response):
    start_response("200 OK", fields)
    return [BODY]
async def asgi(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": binary})
    await send({"type": "http.response.body", "body": BODY})
"""
PROGRAMS = {OURS: """
import httpd
def hello(request, page):
    page.write(BODY)
    return 200
httpd.register_httpdcb("bench", "hello", hello)
for number in range(1, int(os.environ["BENCH_ROOTS"])):
    httpd.register_httpdcb("bench", "root%d" % number, hello)
httpd.loadmodule("mi_http")
large = {"buf_size": 2 << 20, "memory_budget": 64 << 20} if len(BODY) >= 1 << 20 else {}
httpd.run(ip="127.0.0.1", port=port, **large)
""", "bare": """
import select, socket
head = f"HTTP/1.1 200 OK\\r\\nDate: {formatdate(usegmt=True)}\\r\\nContent-Type: {TYPE}\\r\\nContent-Length: {len(BODY)}\\r\\n"
response, last = (head + "\\r\\n").encode() + BODY, (head + "Connection: close\\r\\n\\r\\n").encode() + BODY
listener = socket.create_server(("127.0.0.1", port), backlog=1024)
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
poll, connections = select.epoll(), {}
poll.register(listener, select.EPOLLIN)
def loop():
    while True:
        for number, _ in poll.poll():
            sock = connections.get(number)
            if sock is None:
                sock, _ = listener.accept()
                connections[sock.fileno()] = sock
                poll.register(sock, select.EPOLLIN)
                continue
            try:
                data = sock.recv(16384)
                closing = not data or b"\\r\\nConnection: close" in data
                if data:
                    sock.sendall(last if closing else response)     # one, whatever came: pipelined requests fail
            except OSError:
                closing = True
            if closing:
                poll.unregister(number)
                connections.pop(number).close()
loop()
""", "http.server": """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1                                               # as shipped it sends twice, and waits 40 ms in between
    def do_GET(self):
        self.send_response_only(200)
        self.send_header("Date", self.date_time_string())
        for field in fields + [("Connection", "close")] * self.close_connection:
            self.send_header(*field)
        self.end_headers()
        self.wfile.write(BODY)
ThreadingHTTPServer.request_queue_size = 1024
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
""", "uvicorn": """
import uvicorn
uvicorn.run(asgi, host="127.0.0.1", port=port, http="httptools", loop="uvloop", lifespan="off", log_level="critical", access_log=False,
            server_header=False, timeout_keep_alive=60)
""", **{f"granian-{kind}": f"""
import granian
if __name__ == "__main__":                                      # its worker imports this, too
    granian.Granian(__file__ + ":{kind}", address="127.0.0.1", port=port, interface="{kind}", loop="{loop}", log_enabled=False,
                    websockets=False, backpressure=20000).serve()
""" for kind, loop in (("wsgi", "asyncio"), ("asgi", "uvloop"))}, "aiohttp": """
import uvloop
from aiohttp import web, web_response
web_response.SERVER_SOFTWARE = ""                               # the field stays, empty
async def hello(request):
    return web.Response(body=BODY, headers=dict(fields[:1]))
uvloop.install()
application = web.Application()
application.router.add_get("/hello", hello)
web.run_app(application, host="127.0.0.1", port=port, access_log=None, print=None)
""", "waitress": """
import waitress
waitress.serve(wsgi, host="127.0.0.1", port=port, ident="", connection_limit=20000, asyncore_use_poll=True)
""", "cheroot": """
from cheroot.wsgi import Server
server = Server(("127.0.0.1", port), wsgi, timeout=60)
server.server_name = ""                                         # the field stays, empty
server.start()
""", "bjoern": """
import bjoern
def dated(environ, start_response):                             # it has no Date of its own
    global second, with_date
    if int(time.time()) != second:
        second, with_date = int(time.time()), [("Date", formatdate(usegmt=True)), *fields]
    start_response("200 OK", with_date)
    return [BODY]
bjoern.run(dated, "127.0.0.1", port)
"""}
NODE = """
const content = require("fs").readFileSync(process.env.BENCH_CONTENT);
const server = require("http").createServer((request, response) => {
    if (response.shouldKeepAlive) response.removeHeader("Connection");
    response.writeHead(200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": content.length});
    response.end(content);
});
server.keepAliveTimeout = 60000;
server.listen(+process.argv[2], "127.0.0.1", 1024);
"""

# 1 MiB is put together in memory for each request, as in the page of httpd.py: one copy by the server, one by send(). It
# is the way in which nginx serves from memory; a file, even on a RAM disk, costs a read(), or with sendfile neither copy.
NGINX = """
worker_processes 1; daemon off; pid nginx.pid; error_log /dev/null crit; USER
events { worker_connections 20000; }
http {
    access_log off; server_tokens off; keepalive_requests 1000000000; default_type "text/html; charset=utf-8";
    client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
    server {
        listen 127.0.0.1:PORT backlog=1024;
        location / { set $k "BLOCK"; return 200 "CONTENT"; }
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
static enum MHD_Result answer(void *c, struct MHD_Connection *connection, const char *url, const char *method,
                              const char *version, const char *data, size_t *data_size, void **seen) {
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
    size = fread(content, 1, sizeof content, fopen(getenv("BENCH_CONTENT"), "rb"));
    struct MHD_Daemon *daemon = MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_INTERNAL_POLLING_THREAD, atoi(arguments[1]), 0, 0, answer, 0,
                                                 MHD_OPTION_CONNECTION_LIMIT, 20000u, MHD_OPTION_END);
    while (daemon) pause();
}
"""


def command(name: str, python: str, port: int, folder: Path, body: bytes) -> list:
    """What starts a server; the files that it needs are written."""
    if name == "libmicrohttpd":
        return [CACHE / "microhttpd", str(port)]
    if name == "node":
        (folder / "node.js").write_text(NODE)
        return ["node", folder / "node.js", str(port)]
    if name == "nginx":
        block = "x" * 2048                                      # a word of the configuration has at most 4 kB
        text = "$k" * (len(body) // len(block)) if len(body) >= MIB else body.decode().replace("\n", "\\n")
        configuration = NGINX.replace("USER", "" if os.geteuid() else "user root;").replace("PORT", str(port))
        (folder / "nginx.conf").write_text(configuration.replace("BLOCK", block).replace("CONTENT", text))
        return ["nginx", "-p", folder, "-c", "nginx.conf", "-e", "/dev/null"]
    (folder / "serve.py").write_text(COMMON + PROGRAMS[name])
    return [python, folder / "serve.py", str(port)]


def free_ports():
    """Each is given once, and below those that the kernel gives to clients."""
    for port in range(20000 + os.getpid() % 5000, 32000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            yield port


ports = free_ports()


class Server:
    """A running server. All that it starts is in its process group, by which it is measured and ended."""

    def __init__(self, work: Path, name: str, python: str, body: bytes = HELLO, type: str = TYPE, roots: int = 1):
        self.body, self.type, folder = body, type, Path(tempfile.mkdtemp(dir=work))
        self.port = next(ports)
        (folder / "content").write_bytes(body)
        self.log = folder / "log"
        environment = dict(os.environ, BENCH_CONTENT=str(folder / "content"), BENCH_TYPE=type, BENCH_ROOTS=str(roots), PYTHONPATH=str(work))
        os.sched_setaffinity(0, CORES[:1])                      # is inherited
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command(name, python, self.port, folder, body), stdin=subprocess.DEVNULL, cwd=folder,
                                            stdout=subprocess.DEVNULL, stderr=log, env=environment, start_new_session=True)
        os.sched_setaffinity(0, CORES[-1:])

    def wait(self) -> None:
        """Wait until it answers, as it should. Size and content of the response are kept."""
        for _ in range(600):
            with contextlib.suppress(ConnectionRefusedError), connect(self.port) as sock:
                head, self.answer = exchange(sock, POST if self.type == JSON else GET)
                break
            if self.process.poll() is not None:
                raise OSError((self.log.read_text(errors="replace").strip().splitlines() or ["it does not start"])[-1])
            time.sleep(0.05)
        else:
            raise OSError("it does not answer")
        self.size = len(head) + len(self.answer)
        fields = dict(re.findall("\r\n([^:]+): *([^\r]*)", head.lower()))
        if not head.startswith("HTTP/1.1 200 ") or fields.get("content-type") != self.type or "date" not in fields:
            raise OSError(f"it answers something else: {head!r}")
        if self.type != JSON and self.answer != self.body:
            raise OSError("it answers with other content")

    def members(self) -> list[int]:
        """The processes of its group."""
        found = []
        for number in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(ProcessLookupError):
                found += [int(number)] * (os.getpgid(int(number)) == self.process.pid)
        return found

    def cpu(self) -> float:
        """Microseconds so far, also of threads that have ended: from the clock whose number clock_getcpuclockid(3) gives."""
        if self.process.poll() is not None:
            raise ChildProcessError("it has died")
        return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.members()) / 1000

    def memory(self, kind: str = "Pss") -> int:
        """Resident bytes: Rss; or Pss, in which processes share out what they have in common."""
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.members()]
        return sum(int(size) * 1024 for text in texts for size in re.findall(f"{kind}: *([0-9]+) kB", text))

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ChildProcessError):            # its children are ours now
            while True:
                os.waitpid(-self.process.pid, 0)


@contextlib.contextmanager
def running(work: Path, wanted: dict[str, dict]):
    """Servers by their labels, started at once; what does not start is left out."""
    servers = {}
    try:
        for label, arguments in wanted.items():
            servers[label] = Server(work, **arguments)
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
# A load returns a sample: the value that is measured, the number of requests, and errors by their kind.

BROWSER = """
local run, number, fields = "", 0, {
    ["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    ["Accept"] = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", ["Accept-Language"] = "en-US,en;q=0.5",
    ["Accept-Encoding"] = "gzip, deflate, br, zstd", ["DNT"] = "1", ["Sec-Fetch-Dest"] = "document",
    ["Sec-Fetch-Mode"] = "navigate", ["Sec-Fetch-Site"] = "none", ["Priority"] = "u=0, i"}      -- and Host makes ten
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
    "pipelined": 'local all\ninit = function() all = string.rep(wrk.format("GET"), 16) end\nrequest = function() return all end',
    "new-connection": 'wrk.headers["Connection"] = "close"',
    "mi": f'wrk.method, wrk.path, wrk.body, wrk.headers["Content-Type"] = "POST", "/mi", [[{CALL}]], "{JSON}"'}
DONE = """
done = function(all)
    local e = all.errors
    print("RESULT", all.requests, all.duration, e.connect, e.read, e.write, e.status, e.timeout)
end
"""


def wrk(work: Path, seconds: int, script: str, connections: int, server: Server) -> dict:
    """CPU time per request under as much load as one thread gives."""
    (work / "wrk.lua").write_text(SCRIPTS[script] + DONE)
    accepted, before = connections_accepted(), server.cpu()
    said = output("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", work / "wrk.lua", f"http://127.0.0.1:{server.port}/hello",
                  "--", f"{time.time_ns():x}-")
    spent, accepted = server.cpu() - before, connections_accepted() - accepted
    found = re.search("RESULT" + r"\s+([0-9]+)" * 7, said)
    requests, duration, *errors = map(int, found.groups()) if found else [0] * 7
    errors = dict(zip(("connect", "read", "write", "status", "timeout"), errors, strict=True))
    errors["too few"] = max(0, 100 * seconds - requests)
    errors["not opened"] = max(0, requests - accepted) if script == "new-connection" else 0
    return {"value": spent / max(requests, 1), "requests": requests, "per_second": requests * 1e6 / max(duration, 1),
            "errors": {kind: number for kind, number in errors.items() if number}}


def connections_accepted() -> int:
    """TCP connections that this machine has taken in so far."""
    names, values = re.findall("Tcp: (.*)", Path("/proc/net/snmp").read_text())
    return int(values.split()[names.split().index("PassiveOpens")])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def exchange(sock: socket.socket, request: bytes) -> tuple[str, bytes]:
    """Head and content of the answer."""
    sock.sendall(request)
    head, end, body = b"", b"", b""
    while not end or len(body) < int(re.search(rb"(?i)content-length: *([0-9]+)", head)[1]):
        data = sock.recv(MIB)
        head, end, body = (head, end, body + data) if end else (head + data).partition(b"\r\n\r\n")
        if not data or end and b"content-length:" not in head.lower():
            raise ConnectionError(f"it answers no more than {head[:80]!r}")
    return (head + end).decode(), body


@contextlib.contextmanager
def opened(server: Server, number: int):
    """Connections that have been used once; and a function for those that have an answer, at most so many seconds from now."""
    socks = {}
    with contextlib.ExitStack() as stack, select.epoll() as poll:
        for _ in range(number):
            sock = stack.enter_context(connect(server.port))
            exchange(sock, GET)
            socks[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)
        yield list(socks.values()), lambda timeout: [socks[number] for number, _ in poll.poll(timeout)]


def idle_memory(server: Server) -> dict:
    """Bytes of a server that has just been started, for each connection that waits for its next request."""
    with opened(server, 1) as ((sock,), _):
        for _ in range(100):
            exchange(sock, GET)
    time.sleep(0.3)
    before = server.memory(), server.memory("Rss")
    with opened(server, IDLE_CONNECTIONS):
        time.sleep(0.3)
        pss, rss = ((after - size) / IDLE_CONNECTIONS for after, size in zip((server.memory(), server.memory("Rss")), before, strict=True))
    return {"value": pss, "resident": rss, "requests": IDLE_CONNECTIONS, "errors": {}}


def closed_loop(seconds: int, connections: int, server: Server) -> dict:
    """CPU time per request when each connection asks again as soon as it has its answer; opening them is not counted."""
    with opened(server, connections) as (socks, answered):
        before, end, requests, wrong, waiting = server.cpu(), time.monotonic() + seconds, 0, 0, connections
        for sock in socks:
            sock.send(GET)
        while waiting and (ready := answered(5)):
            late = time.monotonic() > end
            for sock in ready:
                wrong += len(sock.recv(4096)) != server.size
                late or sock.send(GET)
            requests += len(ready)
            waiting -= late * len(ready)
        spent = server.cpu() - before
    return {"value": spent / max(requests, 1), "requests": requests, "per_second": requests / seconds,
            "errors": {"answer": wrong + waiting} if wrong + waiting else {}}


def open_loop(seconds: int, server: Server) -> dict:
    """Microseconds until the answer at a fixed rate, with idle connections beside, from when the request was meant to be sent.

    Whether a connection is free by then does not matter: a server that stalls is charged for all who would have come.
    """
    with opened(server, BESIDE), opened(server, CONNECTIONS) as (socks, answered):
        free, due, latencies, sent, wrong, total = deque(socks), {}, [], 0, 0, RATE * seconds
        before, start = server.cpu(), time.perf_counter()
        while len(latencies) < total and time.perf_counter() < start + seconds + 10:
            while free and sent < total and start + sent / RATE <= time.perf_counter():
                sock = free.popleft()
                due[sock] = start + sent / RATE
                sock.send(GET)
                sent += 1
            for sock in answered(0):                            # never asleep: waking up would be counted
                wrong += len(sock.recv(4096)) != server.size
                latencies.append((time.perf_counter() - due[sock]) * 1e6)
                free.append(sock)
        spent, wrong = server.cpu() - before, wrong + total - len(latencies)
    latencies = sorted(latencies) + [1e7] * (total - len(latencies))
    return {**{f"p{part}": latencies[int(total * part / 100)] for part in (50, 99, 99.9)}, "cpu": spent / total, "requests": total,
            "errors": {"answer": wrong} if wrong else {}}


# --------------------------------------------------------------------------------------------------------- Scenarios

class Bench(NamedTuple):
    """What was asked for. Servers are labels and the arguments of Server."""

    work: Path
    rounds: int
    seconds: int
    ours: dict[str, dict]
    peers: dict[str, dict]

    def servers(self, **arguments) -> dict[str, dict]:
        return {label: {**server, **arguments} for label, server in {**self.ours, **self.peers}.items()}

    def wrk(self, script: str, servers: dict[str, Server], connections: int = CONNECTIONS) -> list[dict]:
        load = functools.partial(wrk, self.work, self.seconds, script, connections)
        return rows_of(self.in_turns({label: functools.partial(load, server) for label, server in servers.items()}), servers)

    def in_turns(self, loads: dict[str, Callable]) -> dict[str, list]:
        """Samples by label, without those of the first round."""
        rounds = [{label: attempt(load) for label, load in loads.items()} for _ in range(self.rounds + 1)]
        return {label: [samples[label] for samples in rounds[1:]] for label in loads}


def attempt(load: Callable) -> dict:
    try:
        return load()
    except OSError as error:
        return {"value": 0.0, "requests": 0, "errors": {str(error): 1}}


def take_wrk(script: str, bench: Bench, body: bytes = HELLO, connections: int = CONNECTIONS) -> list[dict]:
    with running(bench.work, bench.servers(body=body)) as servers:
        return bench.wrk(script, servers, connections)


def take_memory(bench: Bench) -> list[dict]:
    """From a new server each time: what one has freed it would use again."""
    samples = {}
    for _ in range(min(bench.rounds, 3)):
        for label, arguments in bench.servers().items():
            with running(bench.work, {label: arguments}) as servers:
                if servers:
                    samples.setdefault(label, []).append(attempt(functools.partial(idle_memory, servers[label])))
    return rows_of(samples)


def take_mi(bench: Bench) -> list[dict]:
    """Beside httpd.py only libmicrohttpd, which reads and sends the same bytes but understands nothing of them."""
    wanted = bench.servers(type=JSON)
    with running(bench.work, {label: wanted[label] for label in bench.ours}) as ours:
        echo = {label: {**wanted[label], "body": next(iter(ours.values())).answer} for label in wanted if label == "libmicrohttpd" and ours}
        with running(bench.work, echo) as more:
            return bench.wrk("mi", {**ours, **more})


def take_connections(bench: Bench) -> list[dict]:
    """Of httpd.py alone. The client is the same program for each number, slower than wrk."""
    numbers = [number for number in (10, 100, 1000, 10000) if number + 100 < resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
    with running(bench.work, bench.ours) as servers:
        return rows_of(bench.in_turns({f"{label}, {number}": functools.partial(closed_loop, bench.seconds, number, server)
                                       for label, server in servers.items() for number in numbers}))


def take_roots(bench: Bench) -> list[dict]:
    """Of httpd.py alone."""
    wanted = {f"{label}, {roots}": {**server, "roots": roots} for label, server in bench.ours.items() for roots in (1, 100, 10000)}
    with running(bench.work, wanted) as servers:
        return bench.wrk("get", servers)


def take_latency(bench: Bench) -> list[dict]:
    """Of httpd.py alone."""
    with running(bench.work, bench.ours) as servers:
        taken = bench.in_turns({label: functools.partial(open_loop, bench.seconds, server) for label, server in servers.items()})
    return rows_of({f"{label}, {name}": [{**sample, "value": sample.get(name, 0.0)} for sample in samples]
                    for label, samples in taken.items() for name in ("p50", "p99", "p99.9")})


class Scenario(NamedTuple):
    title: str
    unit: str
    take: Callable[[Bench], list]
    with_wrk: bool = True


SCENARIOS = {
    "get": Scenario("the same GET again and again, 14 bytes of content", "us", functools.partial(take_wrk, "get")),
    "new-url": Scenario("GET with the 10 fields of a browser, a new URL each", "us", functools.partial(take_wrk, "new-url")),
    "never-seen": Scenario("the same, and a field never seen before each", "us", functools.partial(take_wrk, "never-seen")),
    "pipelined": Scenario("GET, pipelined by 16", "us", functools.partial(take_wrk, "pipelined")),
    "new-connection": Scenario("GET, a new connection each", "us", functools.partial(take_wrk, "new-connection")),
    "memory": Scenario("memory of an idle connection", "bytes", take_memory, False),
    "mi": Scenario("POST of httpd_list_root_path to /mi", "us", take_mi),
    "large": Scenario("GET of 1 MiB", "us/MiB", lambda bench: take_wrk("get", bench, b"x" * MIB, LARGE_CONNECTIONS)),
    "connections": Scenario("GET on many connections", "us", take_connections, False),
    "roots": Scenario("GET with many roots", "us", take_roots),
    "latency": Scenario(f"latency at {RATE} requests/s, {BESIDE} idle connections beside", "us", take_latency, False)}
QUICK_SCENARIOS = ["get", "new-url", "never-seen", "pipelined", "new-connection"]


# ------------------------------------------------------------------------------------------------------------ Results

def rows_of(samples: dict[str, list], servers: dict[str, Server] | None = None) -> list[dict]:
    """What a table shows; ratios are to the first row."""
    rows = []
    for label, taken in samples.items():
        values = [sample["value"] for sample in taken]
        errors = sum((Counter(sample["errors"]) for sample in taken), Counter())
        rows.append({"server": label, "median": statistics.median(values), "min": min(values), "max": max(values), "errors": errors,
                     "failed": bool(errors), "bytes": servers[label].size if servers else None, "samples": taken})
    for row in rows:
        comparable = rows[0]["server"].startswith(OURS) and not (row["failed"] or rows[0]["failed"]) and row["median"] > 0 < rows[0]["median"]
        row["it_to_ours"] = row["median"] / rows[0]["median"] if comparable else None
        row["ours_to_it"] = rows[0]["median"] / row["median"] if comparable else None
    return rows


def show(name: str, scenario: Scenario, rows: list[dict]) -> None:
    print(f"\n{name}: {scenario.title}\n  {'':26}{scenario.unit:>10}{'min - max':>22}{'it/ours':>9}{'ours/it':>9}{'bytes':>9}{'per s':>9}")
    for row in rows:
        rates = [sample["per_second"] for sample in row["samples"] if "per_second" in sample]
        ratios = [f"{row[key]:.2f}" if row[key] else "" for key in ("it_to_ours", "ours_to_it")]
        errors = "  errors: " + ", ".join(f"{kind} {number}" for kind, number in row["errors"].items()) if row["failed"] else ""
        print(f"  {row['server']:26}{row['median']:10.2f}{row['min']:11.2f} -{row['max']:9.2f}{'failed' if row['failed'] else ratios[0]:>9}"
              f"{ratios[1]:>9}{row['bytes'] or '':>9}{f'{statistics.median(rates):.0f}' if rates else '':>9}{errors}", flush=True)


def output(*arguments, **options) -> str:
    """What a program says; nothing if there is no such program."""
    try:
        return subprocess.run(arguments, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options).stdout.strip()
    except OSError:
        return ""


def python_version(python: str) -> str:
    return output(python, "-c", "import platform; print(platform.python_version())")


def versions(bench: Bench, python: str) -> dict[str, str]:
    """Of all that takes part."""
    packages = {package for name in bench.peers for package in PEERS[name][0]}
    found = {"Python of the others": python_version(python), **{package: installed(python, package) for package in sorted(packages)}}
    tools = {"wrk": ("wrk", "-v"), "nginx": ("nginx", "-v"), "node": ("node", "-v"), "libmicrohttpd": (CACHE / "microhttpd",)}
    for name, arguments in tools.items():
        number = re.search("[0-9]+([.][0-9]+)+", output(*arguments))
        found.update({name: number[0]} if number and name in [*bench.peers, "wrk"] else {})
    return found


# ------------------------------------------------------------------------------------------------------- Installation

def install(base: str, names: list[str]) -> tuple[str, list[str]]:
    """The Python for the other servers, and those of them that can take part."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    CACHE.mkdir(parents=True, exist_ok=True)
    install_from_debian([*names, "wrk"])
    python = install_from_pypi(base, [name for name in names if name not in left_out])
    if "libmicrohttpd" in names and "libmicrohttpd" not in left_out:
        (CACHE / "microhttpd.c").write_text(MICROHTTPD)
        errors = output("cc", "-O2", "-w", "-o", CACHE / "microhttpd", CACHE / "microhttpd.c", "-lmicrohttpd")
        left_out.update({"libmicrohttpd": errors} if errors else {})
    return python, [name for name in names if name not in left_out]


def install_from_debian(names: list[str]) -> None:
    def missing(name: str) -> list[str]:
        return [tool for tool in PEERS[name][1] if not (shutil.which(tool) or Path("/usr/include", tool).exists())]

    wanted = sorted({DEBIAN[tool] for name in names for tool in missing(name)})
    if wanted and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing", *wanted, flush=True)
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")          # which starts no service
        output("apt-get", "update", env=environment)
        for package in wanted:
            output("apt-get", "install", "-y", "--no-install-recommends", package, env=environment)
    left_out.update({name: "there is no " + " and no ".join(missing(name)) for name in names if missing(name)})


def install_from_pypi(base: str, names: list[str]) -> str:
    """The Python of a virtual environment with what they need."""
    folder = CACHE / f"python{python_version(base)}"
    python = str(folder / "bin/python")
    packages = {package for name in names for package in PEERS[name][0]}
    if packages and not os.path.exists(python):
        output(base, "-m", "venv", folder)
    for package in sorted(packages):
        if not installed(python, package):
            print("installing", package, flush=True)
            output(python, "-m", "pip", "install", "--disable-pip-version-check", package)
    lacking = {package for package in packages if not installed(python, package)}
    left_out.update({name: "cannot be installed" for name in names if lacking & set(PEERS[name][0])})
    return python if os.path.exists(python) else base


def installed(python: str, package: str) -> str:
    """Its version; empty if it is not there."""
    said = output(python, "-c", "import importlib.metadata as m, sys; print('is', m.version(sys.argv[1]))", package)
    return said[3:] if said.startswith("is ") else ""


# --------------------------------------------------------------------------------------------------------------- main

def arguments() -> argparse.Namespace:
    servers = [OURS, *PEERS][:-1]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     epilog=f"scenarios: {','.join(SCENARIOS)}; servers: {','.join(servers)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1 s, the main scenarios, few servers, one Python")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all samples there")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--seconds", type=int, help="of a load in a round; default: 2")
    parser.add_argument("--scenarios", metavar="A,B", help="default: all")
    parser.add_argument("--servers", metavar="A,B", help="default: all; httpd.py always takes part")
    parser.add_argument("--python", action="append", help="for httpd.py, may be repeated, the others run on the first one; "
                                                          "default: every 3.11 and 3.13 of pyenv, or else the one that runs this")
    parser.add_argument("--httpd", type=Path, default=HERE.parent.parent / "httpd.py", help="the file to measure")
    chosen = parser.parse_args()
    found = [path for number in ("3.11", "3.13") for path in sorted(Path.home().glob(f".pyenv/versions/{number}*/bin/python"))]
    chosen.python = chosen.python or [str(path) for path in found or [sys.executable]][:1 if chosen.quick else None]
    chosen.rounds = chosen.rounds or (3 if chosen.quick else 5)
    chosen.seconds = chosen.seconds or (1 if chosen.quick else 2)
    quick = (QUICK_SCENARIOS, QUICK_PEERS) if chosen.quick else (list(SCENARIOS), servers)
    chosen.scenarios = chosen.scenarios.split(",") if chosen.scenarios else quick[0]
    chosen.servers = chosen.servers.split(",") if chosen.servers else quick[1]
    if unknown := [name for name in chosen.scenarios + chosen.servers if name not in [*SCENARIOS, *servers]]:
        parser.error(f"there is no {', '.join(unknown)}, see --help")
    chosen.servers = [name for name in servers if name in chosen.servers and name != OURS]
    return chosen


def measure(chosen: argparse.Namespace, work: Path) -> None:
    """One scenario after the other; the file is written after each."""
    shutil.copy(chosen.httpd, work / "httpd.py")                # it may be edited meanwhile
    python, peers = install(chosen.python[0], chosen.servers)
    bench = Bench(work, chosen.rounds, chosen.seconds,
                  {f"{OURS}, {python_version(path)}": {"name": OURS, "python": path} for path in chosen.python},
                  {name: {"name": name, "python": python} for name in peers})
    processor = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    result = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cpu": processor[1] if processor else platform.machine(),
              "cores": len(CORES), "kernel": platform.release(), "rounds": chosen.rounds, "seconds": chosen.seconds,
              "versions": versions(bench, python), "left_out": left_out, "scenarios": {}}
    print("\n".join(f"{key}: {value}" for key, value in result.items() if value))
    for name in chosen.scenarios:
        if SCENARIOS[name].with_wrk and "wrk" in left_out:
            left_out[name] = "it needs wrk"
            continue
        rows = SCENARIOS[name].take(bench)
        show(name, SCENARIOS[name], rows)
        result["scenarios"][name] = {"title": SCENARIOS[name].title, "unit": SCENARIOS[name].unit, "rows": rows}
        if chosen.json:
            chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\nleft out:", *(f"\n  {name}: {why}" for name, why in left_out.items() or [("nothing", "all took part")]))


def main() -> None:
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # through every `finally`
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)                     # PR_SET_CHILD_SUBREAPER: what servers leave behind comes to us
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()                                                # no pauses in what is timed
    with tempfile.TemporaryDirectory(prefix="httpd-bench-", ignore_cleanup_errors=True) as work:
        measure(chosen, Path(work))


if __name__ == "__main__":
    main()
