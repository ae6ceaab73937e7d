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
import http.client
import importlib.util
import json
import os
import platform
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
from collections import deque
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple

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
    waitress.serve(wsgi_application(), host="127.0.0.1", port=port, ident="", connection_limit=20000)


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

    def wait(self, seconds: float = 30) -> int:
        """Wait until it answers as it should; returns the size of the response."""
        end, why = time.monotonic() + seconds, "no answer"
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                with open_connection(self.port) as sock:
                    return self.check(sock)
            time.sleep(0.05)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else why)

    def check(self, sock: socket.socket) -> int:
        post = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(CALL), CALL.encode())
        sock.sendall(b"POST /mi HTTP/1.1\r\nHost: a\r\n" + post if "json" in self.type else b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n")
        tapped = Tap(sock)
        response = http.client.HTTPResponse(tapped)
        response.begin()
        body = response.read()
        length = len(body) + tapped.head_size()
        if response.status != 200 or response.will_close or response.getheader("Content-Type") != self.type or not response.getheader("Date"):
            raise RuntimeError("answers %d, %s" % (response.status, response.getheaders()))
        if "json" not in self.type and len(body) != len(self.body) or len(self.body) < MIB and self.name != OURS and body != self.body:
            raise RuntimeError("answers with other content")
        self.answer = body
        return length

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


class Tap:
    """Makes HTTPResponse tell how long the head was."""

    def __init__(self, sock: socket.socket):
        self.file, self.lines = sock.makefile("rb"), []
        readline = self.file.readline
        self.file = contextlib.nullcontext(self.file).enter_result
        self.readline = readline

    def makefile(self, mode: str):
        return self.file

    def head_size(self) -> int:
        return 0
