"""What a request costs: httpd.py beside other servers, on this machine.

    python .ci/bench.py                  all scenarios: 20 minutes; writes bench.json and bench.svg
    python .ci/bench.py get mi           these only, which writes nothing
    python .ci/bench.py readme           write the tables of README.md from bench.json

Measured is the CPU time of a server per request, user and system, of all its processes and threads, in
microseconds. It follows the load of the machine far less than requests per second do. A server runs on the
first core, its load on the last. The servers of a scenario take turns within a round; the first round warms
up and is dropped. A row has the median of the rounds and the least. A row with errors (a status that is not
2xx, a socket error, no request at all, a TLS session resumed) has failed, and no ratio is made of it.

Every server sends the same status, content and Content-Type, and all but bjoern with a framework a Date;
nothing is logged. It needs Linux. The peers go into a virtual environment in the user's cache directory,
and what Debian has comes from apt-get if this is root. What cannot be had is named and left out.
"""
import argparse
import collections
import contextlib
import functools
import gc
import http.client
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from typing import Callable
from typing import NamedTuple

from peers import ANSWER, CALL, COMMON, C_PROGRAMS, DONE, NGINX, NODE, OURS, PROGRAMS, SCRIPTS

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "httpd-bench"
VENV = CACHE / ("python%d.%d" % sys.version_info[:2])
CORES = sorted(os.sched_getaffinity(0))
MIB = 2**20
GET = b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n"
RATE = 1000                 # requests a second when latency is measured
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
PAUSE = 300_000             # nanoseconds: later than that, the load generator itself has paused

# ------------------------------------------------------------------------------------------ The servers

PORTS = iter(range(20000 + os.getpid() % 5000, 32000))         # below those that the kernel gives to clients


class Failed(Exception):
    """A server, a load or an installation that did not work; its text says why."""


FAULTS = (Failed, OSError, http.client.HTTPException)


class Server:
    """A running server. All that it starts is in its process group, by which it is measured and ended."""

    def __init__(self, work: Path, name: str, app: str = "page", body: str = "Hello, world!\n",
                 tls: bool = False, threads: int = 4, roots: int = 1, modules: tuple[str, ...] = (),
                 **parameters: Any) -> None:
        self.name = name
        self.body = body.encode()
        self.tls = tls
        self.mi = "mi_http" in modules
        self.folder = Path(tempfile.mkdtemp(dir=work))
        self.port = next(port for port in PORTS if socket.socket().connect_ex(("127.0.0.1", port)))
        self.type = "application/json" if self.mi else "text/html; charset=utf-8"
        content = self.folder / "content"
        content.write_bytes(self.body)
        if tls:
            parameters.update(tls_cert_file=str(work / "tls.crt"), tls_key_file=str(work / "tls.key"),
                              tls_ciphers="NORMAL:-VERS-ALL:+VERS-TLS1.3:-GROUP-ALL:+GROUP-X25519")
        settings = {"port": self.port, "app": app, "threads": threads, "roots": roots, "modules": modules,
                    "content": str(content), "type": self.type, "parameters": parameters}
        environment = {**os.environ, "BENCH": json.dumps(settings), "PYTHONPATH": str(work)}
        self.log = self.folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", str(CORES[0]), *self.command(content)], cwd=self.folder, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)

    def command(self, content: Path) -> list:
        """What starts it; the files that it needs are written."""
        if self.name in C_PROGRAMS:
            return [CACHE / self.name, str(self.port), self.type, content]
        if self.name == "node":
            (self.folder / "node.js").write_text(NODE)
            return ["node", "node.js"]
        if self.name == "nginx":
            (self.folder / "nginx.conf").write_text(self.nginx(content))
            return ["nginx", "-p", self.folder, "-c", "nginx.conf", "-e", "/dev/null"]
        (self.folder / "serve.py").write_text(COMMON + PROGRAMS[self.name])
        return [VENV / "bin/python", self.folder / "serve.py"]

    def nginx(self, content: Path) -> str:
        what = "alias %s" % content
        if len(self.body) < 100:
            what = "return 200 %s" % json.dumps(self.body.decode())
        listen = "%d ssl" % self.port if self.tls else str(self.port)
        return string.Template(NGINX).substitute(
            folder=self.folder, listen=listen, type=self.type, content=what)

    def wait(self) -> None:
        """Wait until it answers, as it should."""
        for _ in range(400):
            time.sleep(0.05)
            with contextlib.suppress(ConnectionRefusedError):
                return self.check()
            if self.process.poll() is not None:
                break
        lines = self.log.read_text(errors="replace").split("\n")
        raise Failed("it does not start: %s" % " ".join(lines[-3:]).strip())

    def check(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        if self.tls:                                            # its certificate is of today
            client = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=10, context=ssl._create_unverified_context())
        expected = self.body
        with contextlib.closing(client):
            if self.mi:
                expected = ANSWER.encode()
                client.request("POST", "/mi", CALL, {"Content-Type": "application/json"})
            else:
                client.request("GET", "/hello")
            response = client.getresponse()
            content = response.read()
        kind = response.getheader("Content-Type", "")
        if response.status != 200 or kind.lower() != self.type or content != expected:
            raise Failed("it answers something else: %d %s %r" % (response.status, kind, content[:100]))

    def members(self) -> list[int]:
        """The processes of its group."""
        found = []
        for number in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(number)) == self.process.pid:
                    found.append(int(number))
        return found

    def cpu(self) -> float:
        """Microseconds so far, of ended threads too: the clock whose number clock_getcpuclockid(3) gives."""
        if self.process.poll() is not None:
            raise Failed("it has died")
        return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.members()) / 1000

    def memory(self) -> int:
        """Resident bytes, soon."""
        time.sleep(0.3)
        texts = [Path("/proc/%d/smaps_rollup" % pid).read_text() for pid in self.members()]
        return sum(int(size) * 1024 for text in texts for size in re.findall("Rss: *([0-9]+) kB", text))

    def stop(self) -> None:
        """Ask, then insist."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(3)


# -------------------------------------------------------------------------------------------- The loads
# A load takes a server and seconds. It returns the value that is measured, or a dict of several by name.


def start_wrk(server: Server, script: str, connections: int, nice: int = 0) -> subprocess.Popen:
    """Its own timing knows whole seconds only; with SIGINT it ends at once and tells what there was."""
    lua = server.folder / "wrk.lua"
    lua.write_text(SCRIPTS[script] + DONE)
    url = "http://127.0.0.1:%d/hello" % server.port
    environment = dict(os.environ)
    if server.tls:
        url = url.replace("http", "https")
        environment["LD_PRELOAD"] = str(CACHE / "handshakes")
    options = ["-t1", "-c%d" % connections, "-d1h", "-s", lua, url, "--", "%x-" % time.time_ns()]
    return subprocess.Popen(["nice", "-n", str(nice), "wrk", *options], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wrk(server: Server, seconds: float, script: str, connections: int = 64) -> float:
    """CPU time per request, or per MiB of large content, under as much load as one thread gives."""
    before = server.cpu()
    with start_wrk(server, script, connections) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[0]
    spent = server.cpu() - before
    found = re.search(r"RESULT\s+(\d+)\s+(\d+)\s+(\d+)", said)
    if not found:
        raise Failed("wrk says: %s" % said[-100:])
    requests, size, errors = map(int, found.groups())
    if re.search("RESUMED [1-9]", said):
        raise Failed("TLS sessions were resumed")
    if errors or not requests + size:
        raise Failed("%d requests, %d errors" % (requests, errors))
    if len(server.body) >= MIB:
        return spent / (size / MIB)                             # half a response counts, too
    return spent / requests


per_mib = functools.partial(wrk, connections=8)


def open_connections(server: Server, number: int) -> list[socket.socket]:
    """Connections that have been used once each."""
    opened = []
    for _ in range(number):
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        sock.sendall(GET)
        received = b""
        while not received.endswith(server.body):
            received += sock.recv(4096) or b"\r\n".join([b"", server.body])
        opened.append(sock)
    return opened


@contextlib.contextmanager
def crowd(server: Server, number: int):
    """A process with idle connections; when it ends, all of them hang up at once."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.nice(19)
            opened = open_connections(server, number)
            os.write(writer, b"%d" % len(opened))
            signal.pause()
        os._exit(1)
    os.close(writer)
    try:
        if not os.read(reader, 10):
            raise Failed("%d connections cannot be opened" % number)
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.5)             # what the server has to do then is not of the next load


def idle_memory(server: Server, seconds: float, script: str) -> float:
    """Bytes for each connection that waits for its next request."""
    for _ in range(100):
        server.check()
    before = server.memory()
    with crowd(server, 5000):
        return (server.memory() - before) / 5000


def beside_idle(server: Server, seconds: float, script: str) -> dict[str, float]:
    alone = wrk(server, seconds, script)
    with crowd(server, 10000):
        return {"64 connections": alone, "beside 10,000 idle": wrk(server, seconds, script)}


def start_cost(server: Server, seconds: float, script: str) -> dict[str, float]:
    """The CPU time of an import in a new process, and the memory of a server that has had one request."""
    module = server.name.replace(OURS, "httpd")
    program = "import time; a = time.process_time_ns(); import %s; print(time.process_time_ns() - a)"
    command = [VENV / "bin/python", "-c", program % module]
    taken = [int(output(*command, cwd=server.folder.parent)) for _ in range(7)]
    return {"import, ms": statistics.median(taken) / 1e6, "idle, MB": server.memory() / 1e6}


def answer_times(server: Server, seconds: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """When requests, RATE a second, were due and answered; and the generator's own pauses, each from when it
    should have woken to when it did. A request is due whether a connection is free or not: a server that
    stands still is charged for all who would have come.
    """
    free, waiting = open_connections(server, 64), {}
    total, sent = int(RATE * seconds), 0
    answers, pauses = [], []
    begin = now = time.perf_counter_ns()
    while len(answers) < total:
        wake = now + 1_000_000
        if free and sent < total:
            wake = max(now, begin + sent * 10**9 // RATE)
        ready = select.select(list(waiting), [], [], (wake - now) / 1e9)[0]
        now = time.perf_counter_ns()
        if now - wake > PAUSE:
            pauses.append((wake, now))
        for sock in ready:
            if not sock.recv(4096).endswith(server.body):
                raise Failed("a connection of the ordinary client has ended")
            answers.append((waiting.pop(sock), now))
            free.append(sock)
        while free and sent < total and begin + sent * 10**9 // RATE <= now:
            sock = free.pop()
            waiting[sock] = begin + sent * 10**9 // RATE
            sock.sendall(GET)
            sent += 1
        if now - begin > (seconds + 20) * 1e9:
            raise Failed("%d of %d requests are not answered" % (total - len(answers), total))
    return answers, pauses


def percentiles(server: Server, seconds: float, crowded: str) -> dict[str, float]:
    """Milliseconds without the generator's own pauses, and in the last row the 99th percentile with them."""
    answers, pauses = answer_times(server, seconds)
    seen, told = [], []
    for due, done in answers:
        own = sum(max(0, min(done, end) - max(due, begin)) for begin, end in pauses)
        seen.append((done - due) / 1e6)
        told.append((done - due - own) / 1e6)
    seen.sort()
    told.sort()
    result = {"%s, %s" % (crowded, name): told[int(len(told) * part)] for name, part in PERCENTILES.items()}
    result[crowded + ", p99 with own pauses"] = seen[int(len(seen) * 0.99)]
    return result


def latency(server: Server, seconds: float, script: str) -> dict[str, float]:
    with crowd(server, 5000):
        result = percentiles(server, 2 * seconds, "5,000 idle")
    with start_wrk(server, "pipelined", 300, nice=19) as process:
        time.sleep(0.5)
        result.update(percentiles(server, 2 * seconds, "300 pipelining"))
        process.kill()
    with crowd(server, 5000) as pid:
        threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
        result.update(percentiles(server, 1, "5,000 hang up"))          # in this second
    return result


# ---------------------------------------------------------------------------------------- The scenarios

class Target(NamedTuple):
    limit: float
    row: str
    beside: str = ""
    how: str = "x"              # "x": so many times the other row; "+": so much more; "<=": by itself


class Scenario(NamedTuple):
    title: str
    servers: dict[str, dict]    # label -> arguments of Server
    targets: list[Target]
    script: str = "get"
    load: Callable[..., Any] = wrk
    unit: str = "us"
    once: bool = False          # what has been freed would be used again: only a new server tells


def plain(*names: str, **settings: Any) -> dict[str, dict]:
    return {name: {"name": name, **settings} for name in names}


def ours(**variants: dict) -> dict[str, dict]:
    return {"%s, %s" % (OURS, label): {"name": OURS, **settings} for label, settings in variants.items()}


def limits(**peers: float) -> list[Target]:
    return [Target(limit, OURS, peer.replace("_", "-")) for peer, limit in peers.items()]


def framework(name: str, **peers: float) -> Scenario:
    inline = {OURS + ", threads=0": {"name": OURS, "app": name, "threads": 0}}
    others = plain("waitress", "gunicorn-sync", "gunicorn-gthread", "cheroot", "bjoern", "granian-wsgi",
                   app=name)
    servers = {**plain(OURS, app=name), **inline, **others}
    return Scenario("the hello of %s, 4 threads" % name.capitalize(), servers, limits(**peers))


EVERY = [OURS, "libmicrohttpd", "nginx", "bjoern", "granian-wsgi", "granian-asgi", "node", "uvicorn",
         "aiohttp", "http.server"]
EQUAL = [Target(1.0, OURS, name) for name in EVERY[2:]]
ALL = plain(*EVERY)
LARGE = {"body": "x" * MIB, "buf_size": 2 * MIB, "memory_budget": 64 * MIB}
STREAM = {"app": "stream", "body": "x" * 64 * MIB}
POSTED = {**plain(OURS, app="posted", receive_buf_size=2**17, memory_budget=64 * MIB),
          **plain("bjoern", app="uploaded")}
LISTED = plain(OURS, "bjoern", app="listed", threads=0)     # an application in the thread of the server
GENERATED = plain(OURS, "bjoern", app="generated", threads=0)
UPLOADED = plain(OURS, "bjoern", app="uploaded", threads=0)
THREADED = plain(OURS, "waitress", app="listed")
SECURE = plain(OURS, "nginx", tls=True)
JSON_LOG = {"access_log": "access.log", "access_log_format": "json"}
SCENARIOS = {
    "get": Scenario("the same GET repeated", ALL, limits(libmicrohttpd=1.25) + EQUAL),
    "new-url": Scenario("a new URL each, 10 fields of a browser", ALL, limits(bjoern=1.05, uvicorn=0.5),
                        "new-url"),
    "never-seen": Scenario("the same, and a never-seen field each", ALL, limits(uvicorn=0.65, node=1.0),
                           "never-seen"),
    "pipelined": Scenario("pipelined by 16", plain(OURS, "nginx", "node", "uvicorn"), limits(nginx=0.6),
                          "pipelined"),
    "new-connection": Scenario("a new connection for each request", ALL, limits(nginx=1.1), "new-connection"),
    "post-400": Scenario("POST of 400 bytes", POSTED, limits(bjoern=1.05), "post-400"),
    "post-64k": Scenario("POST of 64 KiB", POSTED, limits(bjoern=1.05), "post-64k"),
    "mi": Scenario("JSON-RPC by POST to /mi", plain(OURS, "mi-in-C", modules=("mi_http",)),
                   limits(mi_in_C=1.5), "mi"),
    "wsgi-list": Scenario("WSGI, threads=0: a list", LISTED, limits(bjoern=1.8)),
    "wsgi-generator": Scenario("WSGI, threads=0: a generator", GENERATED, limits(bjoern=2.5)),
    "wsgi-400": Scenario("WSGI, threads=0: upload of 400 bytes", UPLOADED, limits(bjoern=2.0), "post-400"),
    "wsgi-64k": Scenario("WSGI, threads=0: upload of 64 KiB", UPLOADED, limits(bjoern=1.3), "post-64k"),
    "wsgi-threads": Scenario("WSGI, threads=4: 64 connections", THREADED, limits(waitress=0.3)),
    "wsgi-one": Scenario("WSGI, threads=4: one connection", THREADED, limits(waitress=0.9),
                         load=functools.partial(wrk, connections=1)),
    "flask": framework("flask", waitress=0.5),
    "django": framework("django"),
    "bottle": framework("bottle"),
    "tls": Scenario("TLS 1.3, P-256, kept alive", SECURE, limits(nginx=1.15)),
    "handshake": Scenario("TLS 1.3, P-256, a full handshake with X25519 each", SECURE, limits(nginx=1.15),
                          "new-connection"),
    "large": Scenario("1 MiB from the page", plain(OURS, "nginx", **LARGE), limits(nginx=1.2),
                      load=per_mib, unit="us/MiB"),
    "stream": Scenario("64 MiB streamed", plain(OURS, "nginx", **STREAM), limits(nginx=1.0),
                       load=per_mib, unit="us/MiB"),
    "idle": Scenario("an idle connection", ALL, [Target(1000, OURS, how="<=")],
                     load=idle_memory, unit="bytes", once=True),
    "beside-idle": Scenario("64 connections beside 10,000 idle ones", plain(OURS), [
        Target(1.05, OURS + ": beside 10,000 idle", OURS + ": 64 connections")], load=beside_idle),
    "log": Scenario("access log", ours(off={}, combined={"access_log": "access.log"}, json=JSON_LOG), [
        Target(2, "httpd.py, combined", "httpd.py, off", "+"),
        Target(2, "httpd.py, json", "httpd.py, off", "+")]),
    "metrics": Scenario("metrics", ours(off={}, on={"modules": ("prometheus",)}), [
        Target(1.1, "httpd.py, on", "httpd.py, off", "+")]),
    "workers": Scenario("workers on one core", ours(one={}, two={"workers": 2}), [
        Target(1.05, "httpd.py, two", "httpd.py, one")]),
    "roots": Scenario("roots", ours(**{"1": {}, "10,000": {"roots": 10000}}), [
        Target(1.05, "httpd.py, 10,000", "httpd.py, 1")]),
    "start": Scenario("import and an idle server", plain(OURS, "http.server"), [
        Target(1.0, "httpd.py: import, ms", "http.server: import, ms"),
        Target(22, "httpd.py: idle, MB", how="<=")], load=start_cost, unit=""),
    "latency": Scenario(
        "latency of an ordinary client at %d/s, beside others" % RATE, plain(OURS, "nginx"), [
            Target(20, "httpd.py: 300 pipelining, p99", how="<="),
            Target(20, "httpd.py: 5,000 hang up, p99", how="<=")], load=latency, unit="ms")}


@contextlib.contextmanager
def running(scenario: Scenario, work: Path, left_out: dict[str, str]):
    """Servers by their labels, started at once. One that does not start is left out."""
    servers: dict[str, Server] = {}
    try:
        for label, settings in scenario.servers.items():
            if settings["name"] not in left_out:
                servers[label] = Server(work, **settings)
        for label, server in list(servers.items()):
            try:
                server.wait()
            except FAULTS as error:
                left_out["%s, %s" % (label, scenario.title)] = str(error)
                servers.pop(label).stop()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def take(scenario: Scenario, work: Path, rounds: int, seconds: float,
         left_out: dict[str, str]) -> dict[str, dict]:
    """Rows by their labels. The servers take turns; the first round warms up."""
    rows: dict[str, dict] = collections.defaultdict(lambda: {"samples": []})
    if scenario.once:
        rounds = 0
    with running(scenario, work, left_out) as servers:
        for number in range(rounds + 1):
            if number == 1:
                for row in rows.values():
                    row["samples"].clear()
            for label, server in servers.items():
                try:
                    result = scenario.load(server, seconds, scenario.script)
                except FAULTS as error:
                    rows[label]["failed"] = str(error)
                    continue
                if isinstance(result, float):
                    rows[label]["samples"].append(round(result, 4))
                    continue
                for name, value in result.items():
                    rows["%s: %s" % (label, name)]["samples"].append(round(value, 4))
    for row in rows.values():
        if row["samples"] and "failed" not in row:
            row.update(median=statistics.median(row["samples"]), least=min(row["samples"]))
    return dict(rows)


def reached(target: Target, rows: dict[str, dict]) -> dict[str, Any]:
    """The target with the figure beside it, which is None if a row is missing or has failed."""
    figure = rows.get(target.row, {}).get("median")
    beside = rows.get(target.beside, {}).get("median")
    if target.how != "<=":
        if figure is None or not beside:
            figure = None
        elif target.how == "+":
            figure -= beside
        else:
            figure /= beside
    return {**target._asdict(), "figure": figure}


def show(name: str, result: dict) -> None:
    print("\n%s: %s%s" % (name, result["title"], ", %s" % result["unit"] if result["unit"] else ""))
    print("    %-46s %10s %10s" % ("", "median", "least"))
    for label, row in result["rows"].items():
        if "median" in row:
            print("    %-46s %10.2f %10.2f" % (label, row["median"], row["least"]))
        else:
            print("    %-46s failed: %s" % (label, row.get("failed")))
    for target in result["targets"]:
        goal = "%s %s %g %s" % (target["row"], target["how"], target["limit"], target["beside"])
        if target["figure"] is None:
            verdict = "not measured"
        elif target["figure"] <= target["limit"]:
            verdict = "%.2f reached" % target["figure"]
        else:
            verdict = "%.2f MISSED" % target["figure"]
        print("    target %-60s %s" % (goal, verdict))
    sys.stdout.flush()


# ------------------------------------------------------------------------------- The picture and README

STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600; font-size: 15px }
.bar { fill: #8c959f } .ours { fill: #1a7f64 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .bar { fill: #6e7681 } .ours { fill: #3fb68f } }
</style>"""


def bars(scenario: dict, top: int) -> list[str]:
    """A horizontal bar for each server, the shortest first."""
    rows = [(row["median"], label) for label, row in scenario["rows"].items() if "median" in row]
    rows.sort()
    title = "CPU per request, microseconds: " + scenario["title"]
    drawn = ['<text class="title" x="10" y="%d">%s</text>' % (top, title)]
    for number, (value, label) in enumerate(rows):
        y = top + 12 + 24 * number
        width = 500 * value / rows[-1][0]
        kind = "bar ours" if label == OURS else "bar"
        drawn.append('<text x="130" y="%d" text-anchor="end">%s</text>' % (y + 14, label))
        drawn.append('<rect class="%s" x="138" y="%d" width="%.1f" height="18" rx="2"/>' % (kind, y, width))
        drawn.append('<text x="%.1f" y="%d">%.1f</text>' % (144 + width, y + 14, value))
    return drawn


def draw(result: dict) -> None:
    drawn: list[str] = []
    height = 28
    for name in ("get", "new-connection"):
        if name in result["scenarios"]:
            scenario = result["scenarios"][name]
            drawn += bars(scenario, height)
            height += 56 + 24 * len(scenario["rows"])
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 %d" role="img">' % (height - 28)
    title = "<title>CPU time of the server for each request, in microseconds; less is better</title>"
    (HERE / "bench.svg").write_text("\n".join([head, title, STYLE, *drawn, "</svg>"]) + "\n")


def number(value: Any) -> str:
    if value is None:
        return "fails"
    if value < 1000:
        return "%.3g" % value
    return str(round(value))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| %s |" % " | ".join(line) for line in lines)


def by_server(scenarios: dict[str, dict], wanted: list[str]) -> str:
    columns = [name for name in wanted if name in scenarios]
    head = ["server"] + ["%s, %s" % (scenarios[name]["title"], scenarios[name]["unit"]) for name in columns]
    rows = []
    for label in dict.fromkeys(label for name in columns for label in scenarios[name]["rows"]):
        found = [scenarios[name]["rows"].get(label) for name in columns]
        if any(found):
            rows.append([label] + [number(row.get("median")) if row else "" for row in found])
    return table(head, rows)


def by_task(scenarios: dict[str, dict]) -> str:
    """Each task beside one other row, as the targets have it."""
    rows = []
    for name, scenario in scenarios.items():
        for target in scenario["targets"]:
            row, beside = (scenario["rows"].get(target[key], {}) for key in ("row", "beside"))
            if target["how"] != "<=" and "median" in row and "median" in beside and name != "get":
                title = "%s, %s" % (scenario["title"], scenario["unit"] or target["row"].split(", ")[-1])
                kind = ", %s" % target["row"].split(", ")[-1] if target["how"] == "+" else ""
                rows.append([title + kind, target["beside"], number(row["median"]), number(beside["median"]),
                             "%.2f" % (row["median"] / beside["median"])])
    return table(["task", "the other", "httpd.py", "the other", "ratio"], rows)


def by_latency(rows: dict[str, dict]) -> str:
    lines: dict[str, list[str]] = {}
    for label, row in rows.items():
        start, _, name = label.rpartition(", ")
        if name in PERCENTILES:
            lines.setdefault(start, [start]).append(number(row.get("median")))
    return table(["server: beside", *PERCENTILES], list(lines.values()))


def described(result: dict) -> str:
    versions = ", ".join("%s %s" % pair for pair in result["versions"].items())
    return "%s, Linux %s, %s" % (result["machine"], result["kernel"], versions)


def write_readme(result: dict) -> None:
    scenarios = result["scenarios"]
    parts = ["Measured on %s: medians of %d rounds of %g seconds." % (
        described(result), result["rounds"], result["seconds"])]
    parts.append(by_server(scenarios, ["get", "new-url", "never-seen", "new-connection", "idle"]))
    parts.append("![CPU time for each request, of all servers](.ci/bench.svg)")
    parts.append(by_server(scenarios, ["flask", "django", "bottle"]))
    parts.append(by_task(scenarios))
    if "latency" in scenarios:
        parts.append("Milliseconds of an ordinary client, which sends %d requests a second:" % RATE)
        parts.append(by_latency(scenarios["latency"]["rows"]))
    readme = HERE.parent / "README.md"
    before, begin, rest = readme.read_text().partition("<!-- measured -->\n")
    after = rest.partition("<!-- /measured -->")[2]
    if not after:
        sys.exit("README.md has no place for the tables: <!-- measured --> and <!-- /measured -->")
    readme.write_text(before + begin + "\n" + "\n\n".join(parts) + "\n\n<!-- /measured -->" + after)


# -------------------------------------------------------------------------------- Installation and main

PACKAGES = ["aiohttp", "bjoern", "bottle", "cheroot", "django", "flask", "granian", "gunicorn", "httptools",
            "uvicorn", "uvloop", "waitress"]
PIP = [VENV / "bin/python", "-m", "pip", "--disable-pip-version-check"]
DEBIAN = {          # package -> what shows that it is there
    "wrk": "wrk", "nginx-light": "nginx", "nodejs": "node", "gcc": "cc", "openssl": "openssl",
    "libev-dev": "/usr/include/ev.h", "libmicrohttpd-dev": "/usr/include/microhttpd.h",
    "libcjson-dev": "/usr/include/cjson/cJSON.h"}


def output(*command: Any, **options: Any) -> str:
    """What a program says; Failed if there is no such program, or it fails."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    except OSError as error:
        raise Failed(str(error)) from error
    if done.returncode:
        raise Failed(" ".join(done.stdout.split("\n")[-4:]).strip() or "%s fails" % command[0])
    return done.stdout.strip()


def attempt(left_out: dict[str, str], name: str, *command: Any, **options: Any) -> None:
    """Run it; why it fails is why `name` is left out."""
    try:
        output(*command, **options)
    except Failed as error:
        left_out[name] = str(error)


def install() -> dict[str, str]:
    """The peers, and why some of them are left out."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    left_out: dict[str, str] = {}
    # With this runlevel no service is started.
    options = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}}
    missing = {package: sign for package, sign in DEBIAN.items()
               if not shutil.which(sign) and not os.path.exists(sign)}
    if missing:
        attempt({}, "", "apt-get", "update", **options)
    for package, sign in missing.items():
        attempt(left_out, sign, "apt-get", "install", "-y", "--no-install-recommends", package, **options)
    CACHE.mkdir(parents=True, exist_ok=True)
    if not VENV.exists():
        output(sys.executable, "-m", "venv", VENV)
    for package in sorted(set(PACKAGES) - set(packages())):
        attempt(left_out, package, *PIP, "install", "-q", package)
    for name, (source, flags) in C_PROGRAMS.items():
        path = CACHE / name
        path.with_suffix(".c").write_text(source)
        attempt(left_out, name, "cc", "-O2", "-w", "-o", path, path.with_suffix(".c"), *flags.split())
    return left_out


def packages() -> dict[str, str]:
    """Those of the environment, with their versions."""
    found = json.loads(output(*PIP, "list", "--format=json"))
    return {package["name"].lower(): package["version"] for package in found}


def machine() -> dict[str, Any]:
    cpu = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {"Python": "%d.%d.%d" % sys.version_info[:3]}
    there = packages()
    versions.update((name, there[name]) for name in PACKAGES if name in there)
    for program, option in [("nginx", "-v"), ("node", "-v")]:
        with contextlib.suppress(Failed):
            versions[program] = re.findall("[0-9]+(?:[.][0-9]+)+", output(program, option))[0]
    return {"machine": "%s, %d cores" % (cpu[0] if cpu else os.uname().machine, len(CORES)),
            "kernel": os.uname().release, "versions": versions}


def measure(names: list[str], rounds: int, seconds: float, path: Path) -> None:
    """One scenario after the other; the file is written after each."""
    left_out = install()
    result = {**machine(), "rounds": rounds, "seconds": seconds, "left_out": left_out, "scenarios": {}}
    print(described(result))
    with tempfile.TemporaryDirectory(prefix="httpd-bench-", dir="/dev/shm") as folder:
        work = Path(folder)
        shutil.copy(HERE.parent / "httpd.py", work)             # it may be edited meanwhile
        output(VENV / "bin/python", "-m", "compileall", "-q", work)
        output("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-newkey", "ec",
               "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", work / "tls.key", "-out", work / "tls.crt")
        for name in names:
            scenario = SCENARIOS[name]
            rows = take(scenario, work, rounds, seconds, left_out)
            targets = [reached(target, rows) for target in scenario.targets]
            result["scenarios"][name] = {
                "title": scenario.title, "unit": scenario.unit, "rows": rows, "targets": targets}
            show(name, result["scenarios"][name])
            if path:
                path.write_text(json.dumps(result, indent=1) + "\n")
    if path == HERE / "bench.json":
        draw(result)
    for name, why in left_out.items():
        print("left out: %s: %s" % (name, why))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="scenario",
                        help="readme, or some of: " + " ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a load in a round")
    parser.add_argument("--json", type=Path, help="write there; bench.json if all are measured")
    chosen = parser.parse_args()
    path = chosen.json
    if not chosen.names and not path:
        path = HERE / "bench.json"
    if chosen.names == ["readme"]:
        result = json.loads((path or HERE / "bench.json").read_text())
        draw(result)
        return write_readme(result)
    unknown = set(chosen.names) - set(SCENARIOS)
    if unknown:
        parser.error("no such scenario: %s" % " ".join(unknown))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # through every `finally`
    os.sched_setaffinity(0, CORES[-1:])
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2)
    gc.disable()                                                # no pauses in what is timed
    measure(chosen.names or list(SCENARIOS), chosen.rounds, chosen.seconds, path)


if __name__ == "__main__":
    main()
