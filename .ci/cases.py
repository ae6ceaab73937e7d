"""Inputs that used up the memory, descriptors or time of a server, or ended it. Each has a server of its own.

    python .ci/cases.py                 all of them: about two minutes
    python .ci/cases.py pages starved   only these
    python .ci/cases.py --list          their names, and what is wanted

A line each: ok, WRONG or skipped, the name, what was seen, what is wanted. Exit status 1 if one is wrong.
HTTPD_PATH names another httpd.py, or its directory, than the one above this file. Needed are Linux, for the
resident memory of a process; `unshare` and `ip` for the cases with a network of MTU 1500; `openssl` for a
certificate. Limits of time and memory are generous: they lie between the fault and its mend, far from both.
"""
import contextlib
import http.client
import importlib.util
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
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

HERE = os.path.abspath(__file__)
MIB = 2**20
PAGE = bytes(range(256)) * (MIB // 256)
# More than the 4 MB that a socket of plain loopback may take at once.
LARGE_PAGE = PAGE * 8
# Clients of a crowd: the other descriptors are for files and single clients.
CROWD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100
CASE_SECONDS = 60                   # no case may last longer, whatever the server does
RECOMMENDED = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"
HELLO = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"


# ----------------------------------------------------------------------------- The program that is the server
class Site:
    """The roots that the cases ask, and a thread that reports while the loop may be busy.

    One byte on standard input asks for something: r, a report, a line of JSON; g, that the WSGI applications
    which wait go on. Its end is the end of this process, so that no server outlives the cases.
    """

    def __init__(self, httpd, threads: int) -> None:
        self.httpd = httpd
        self.server = None
        self.calls = 0
        self.child = 0
        self.child_has_ended = False
        self.released = threading.Event()
        httpd.loadmodule("mi_http")
        for name in ("hello", "page", "large", "wait", "fork", "again", "fail"):
            httpd.register_httpdcb("cases", name, getattr(self, name))
        post_only = ("POST",)
        httpd.register_httpdcb("cases", "form", self.form, methods=post_only)
        httpd.register_httpdcb("cases", "stream", self.stream, self.fill)
        failing = self.fail_in_upload
        httpd.register_httpdcb("cases", "upload", self.form, methods=post_only, upload_data_cb=failing)
        httpd.register_wsgi("cases", "loop", self.application)
        httpd.register_wsgi("cases", "pool", self.application, threads=threads)

    def hello(self, request, page):
        page.write("hello")
        return 200

    def page(self, request, page):
        page.write(PAGE)
        return 200

    def large(self, request, page):
        page.write(LARGE_PAGE)
        return 200

    def wait(self, request, page):
        self.calls += 1
        return self.httpd.SUSPEND

    def form(self, request, page):
        page.write("%d bytes, %d fields" % (len(request.body), len(request.form)))
        return 200

    def stream(self, request, page):
        return 200

    def fill(self, request, pos, buf):
        buf[:] = bytes(len(buf))
        return len(buf)

    def again(self, request, page):
        """It takes long enough for another client's request to arrive."""
        page.write("first ")
        time.sleep(0.3)
        try:
            self.server.run_once(0)
        except RuntimeError:
            page.write("RuntimeError")
        return 200

    def fork(self, request, page):
        child = os.fork()
        if child == 0:
            sys.exit(0)
        self.child = child
        page.write("parent")
        return 200

    def fail(self, request, page):
        raise self.failure(request.query)

    def fail_in_upload(self, request, data):
        raise self.failure(request.query)

    def failure(self, name: str) -> BaseException:
        import asyncio
        refusal = self.httpd.HTTPError
        makers = {
            "surrogate": lambda: refusal(400, "no such key: \ud800"),
            "line-break": lambda: refusal(400, "refused", {"X-Reason": "a\r\nb: c"}),
            "name": lambda: refusal(400, "refused", {"a b": "c"}),
            "status": lambda: refusal(999, "refused"),
            "CancelledError": asyncio.CancelledError,
            "GeneratorExit": GeneratorExit,
            "SystemExit": SystemExit,
        }
        return makers[name]()

    def application(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/fail":
            raise self.failure(environ["QUERY_STRING"])
        if path == "/wait":
            self.calls += 1
            self.released.wait(CASE_SECONDS)
        size = 0
        while True:
            data = environ["wsgi.input"].read(65536)
            if not data:
                break
            size += len(data)
        if path == "/pieces":
            start_response("200 OK", [("Content-Length", str(3 * MIB))])
            return (PAGE[:65536] for _ in range(3 * MIB // 65536))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"%d bytes" % size]

    def report(self) -> dict:
        if self.child and not self.child_has_ended:
            self.child_has_ended = os.waitpid(self.child, os.WNOHANG)[0] == self.child
        return {
            "port": self.server.port,
            "held": self.server.held,
            "connections": len(self.server.connections),
            "cpu": time.process_time(),
            "calls": self.calls,
            "child_has_ended": self.child_has_ended,
        }

    def obey(self) -> None:
        """Plain reads of the descriptor: a lock of sys.stdin would be held for ever in a forked child."""
        while True:
            command = os.read(0, 1)
            if command == b"r":
                os.write(1, json.dumps(self.report()).encode() + b"\n")
            elif command == b"g":
                self.released.set()
            elif command == b"":
                break
        if self.child and not self.child_has_ended:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        os._exit(0)


def load_httpd():
    path = os.environ.get("HTTPD_PATH") or os.path.dirname(os.path.dirname(HERE))
    if os.path.isdir(path):
        path = os.path.join(path, "httpd.py")
    spec = importlib.util.spec_from_file_location("httpd", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["httpd"] = module
    spec.loader.exec_module(module)
    return module


def serve(mode: str, settings: str) -> None:
    """The main program of the child. Modes: `run` in the main thread; `thread`, by `with Server()`; `forked`,
    in a child after its parent has served with the same pool."""
    parameters = json.loads(settings)
    descriptors = parameters.pop("descriptors", 0)
    if descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    httpd = load_httpd()
    site = Site(httpd, parameters.pop("threads", 2))
    if mode == "forked":
        fork_after_serving(httpd, parameters)
    site.server = httpd.Server(ip="127.0.0.1", port=0, **parameters)
    if mode == "thread":
        with site.server:
            os.write(1, b"%d\n" % site.server.port)
            site.obey()
    os.write(1, b"%d\n" % site.server.port)
    threading.Thread(target=site.obey, daemon=True).start()
    site.server.run()


def fork_after_serving(httpd, parameters: dict) -> None:
    """Go on in a child, for whose end the parent waits. The threads of the child's pool were the parent's."""
    with httpd.Server(ip="127.0.0.1", port=0, **parameters) as first:
        for _ in range(4):
            status, _content = ask(first.port, b"GET /pool/x HTTP/1.1\r\nHost: x\r\n\r\n")
            if status != 200:
                sys.exit("the pool does not serve before the fork")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)


# --------------------------------------------------------------------------------------- How the cases see it
class Running:
    """A server in a process of its own. Leaving the `with` block ends it."""

    def __init__(self, mode: str = "run", **parameters) -> None:
        self.errors = tempfile.TemporaryFile()
        command = [sys.executable, HERE, "--server", mode, json.dumps(parameters)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, bufsize=0)
        try:
            self.port = int(self.read_line(10))
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *exception) -> None:
        self.end()

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def read_line(self, seconds: float) -> bytes:
        line = b""
        end = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = max(0, end - time.monotonic())
            readable = select.select([self.process.stdout], [], [], left)[0]
            piece = os.read(self.process.stdout.fileno(), 4096) if readable else b""
            if not piece:
                raise RuntimeError("the server has ended or hangs: %s" % self.last_error())
            line += piece
        return line

    def last_error(self) -> str:
        lines = self.logged().split("\n")
        return lines[-1] or "no line on stderr"

    def logged(self) -> str:
        """All that is on stderr by now; pread leaves alone the position, which the child shares."""
        size = os.fstat(self.errors.fileno()).st_size
        return os.pread(self.errors.fileno(), size, 0).decode("utf-8", "replace").strip()

    def report(self) -> dict:
        with contextlib.suppress(OSError):
            self.process.stdin.write(b"r")
        return json.loads(self.read_line(10))

    def release(self) -> None:
        self.process.stdin.write(b"g")

    def resident(self) -> float:
        """Resident memory in MB."""
        with open("/proc/%d/status" % self.process.pid) as status:
            return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) / 1000

    def settle(self, seconds: float = 15) -> dict:
        """Wait until it has worked off what it was sent: until it uses no more CPU time. The last report."""
        end = time.monotonic() + seconds
        report = self.report()
        while time.monotonic() < end:
            before = report
            time.sleep(0.3)
            report = self.report()
            if report["cpu"] - before["cpu"] < 0.015:
                break
        return report

    def held_in_the_end(self, seconds: float = 5) -> int:
        """The bytes counted once all clients are gone: the count must return to zero."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            held = self.report()["held"]
            if held == 0:
                break
            time.sleep(0.1)
        return held


class Skipped(Exception):
    pass


class Case(NamedTuple):
    function: Callable          # returns whether it is right, and what was seen
    wanted: str
    network: bool               # to be run where the loopback device has an MTU of 1500


CASES: dict[str, Case] = {}


def case(wanted: str, network: bool = False) -> Callable:
    def add(function: Callable) -> Callable:
        CASES[function.__name__.replace("_", "-")] = Case(function, wanted, network)
        return function
    return add


def connect(port: int, receive_buffer: int = 0, seconds: float = 10) -> socket.socket:
    """A client that ends with a reset: thousands in TIME_WAIT would take the ports from the next case."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(seconds)
    client.connect(("127.0.0.1", port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def read_response(client: socket.socket) -> tuple[int, bytes]:
    """The status, 0 if there is none, and as much of the content as came within the socket's time-out."""
    response = http.client.HTTPResponse(client)
    content = b""
    try:
        response.begin()
        while True:
            piece = response.read1(65536)
            if not piece:
                break
            content += piece
    except http.client.IncompleteRead as end:
        content += end.partial
    except (OSError, http.client.HTTPException):
        pass
    finally:
        response.close()
    return response.status if isinstance(response.status, int) else 0, content


def ask(port: int, request: bytes, seconds: float = 5) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    try:
        with connect(port, seconds=seconds) as client:
            client.sendall(request)
            return read_response(client)
    except OSError:
        return 0, b""


def post(path: str, content: bytes, more: str = "") -> bytes:
    head = "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n" % (path, len(content), more)
    return head.encode() + content


class Crowd:
    """Clients that send each what `make` returns for their number, and then do nothing."""

    def __init__(self, port: int, number: int, make: Callable) -> None:
        self.clients = []
        for index in range(min(number, CROWD_LIMIT)):
            client = connect(port)
            self.clients.append(client)
            with contextlib.suppress(ConnectionError):      # it may have been refused before it has sent all
                client.sendall(make(index))

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def send(self, data: bytes) -> None:
        for client in self.clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)

    def answers(self, seconds: float = 0) -> Counter:
        """How many got which status, or "reset", "closed", "silence": those get so many seconds more."""
        found: Counter = Counter()
        silent = self.clients
        end = time.monotonic() + seconds
        while True:
            waiting = []
            for client in silent:
                answer = first_words(client)
                if answer == "silence":
                    waiting.append(client)
                else:
                    found[answer] += 1
            silent = waiting
            if not silent or time.monotonic() >= end:
                break
            time.sleep(0.2)
        if silent:
            found["silence"] = len(silent)
        return found


def first_words(client: socket.socket) -> str:
    client.setblocking(False)
    try:
        data = client.recv(4096)
    except BlockingIOError:
        return "silence"
    except ConnectionError:
        return "reset"
    return data[9:12].decode("latin-1") if data else "closed"


def listed(counter: Counter) -> str:
    return ", ".join("%d %s" % (number, answer) for answer, number in sorted(counter.items()))


def kilobytes(number: int) -> str:
    return "%.0f kB" % (number / 1000)


@contextlib.contextmanager
def certificate():
    """The paths of a certificate and its key."""
    if not shutil.which("openssl"):
        raise Skipped("no openssl command")
    with tempfile.TemporaryDirectory() as directory:
        files = {"tls_cert_file": directory + "/cert.pem", "tls_key_file": directory + "/key.pem"}
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost"]
        command += ["-out", files["tls_cert_file"], "-keyout", files["tls_key_file"]]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=20)
        yield files


# ------------------------------------------------------------------------------------- Memory and descriptors
def get_pages(port: int) -> tuple[int, str]:
    """20 clients ask for a page of 1 MiB before one of them reads. How many got all of it; that in words."""
    with Crowd(port, 20, lambda index: b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n") as crowd:
        time.sleep(0.5)
        answers = [read_response(client) for client in crowd.clients]
    cut = [len(content) // 1000 for status, content in answers if (status, content) != (200, PAGE)]
    whole = len(answers) - len(cut)
    seen = "%d of 20 whole" % whole
    if cut:
        seen += ", the others %d to %d kB" % (min(cut), max(cut))
    return whole, seen


@case("20 of 20 pages whole", network=True)
def pages():
    with Running() as server:
        whole, seen = get_pages(server.port)
        return whole == 20, seen


@case("20 of 20 pages whole beside three clients that read nothing", network=True)
def hogs():
    request = b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"
    with Running() as server, Crowd(server.port, 3, lambda index: request * 12):
        server.settle()
        whole, seen = get_pages(server.port)
        return whole == 20, seen


def measure_crowd(server: Running, number: int, make: Callable) -> tuple[float, int, Counter]:
    """What a crowd comes to while it is there: growth in MB, bytes counted, answers."""
    for _ in range(20):
        ask(server.port, HELLO)
    before = server.resident()
    with Crowd(server.port, number, make) as crowd:
        held = server.settle()["held"]
        growth = server.resident() - before
        answers = crowd.answers()
    return growth, held, answers


@case("at most 40 MB more, more than 1 MB counted, the others 503 or 408, the count returns to 0")
def heads():
    def half_a_post(index: int) -> bytes:
        fields = "".join("X-%03d: %06d%s\r\n" % (number, index, "x" * 85) for number in range(125))
        return post("/mi?%d" % index, b"0123456789", fields)[:-9]

    with Running() as server:
        growth, held, answers = measure_crowd(server, 6000, half_a_post)
        left = server.held_in_the_end()
        seen = "%+.0f MB, %s counted, then %d, %s" % (growth, kilobytes(held), left, listed(answers))
        refused = answers["503"] + answers["408"]
        return growth < 40 and held > MIB and refused > 0 and left == 0, seen


@case("at most 14 MB more, more than 1 MB counted, the others 503, the count returns to 0")
def suspended_heads():
    def long_head(index: int) -> bytes:
        return b"GET /wait?%d HTTP/1.1\r\nHost: x\r\nX-Long: %s\r\n\r\n" % (index, b"%05d" % index * 3000)

    with Running() as server:
        growth, held, answers = measure_crowd(server, 2000, long_head)
        left = server.held_in_the_end()
        seen = "%+.0f MB, %s counted, then %d, %s" % (growth, kilobytes(held), left, listed(answers))
        return growth < 14 and held > MIB and answers["503"] > 0 and left == 0, seen


@contextlib.contextmanager
def busy_pool(**parameters):
    """A server both of whose threads are occupied, until it is told to release them."""
    with Running(threads=2, **parameters) as server:
        with Crowd(server.port, 2, lambda index: b"GET /pool/wait HTTP/1.1\r\nHost: x\r\n\r\n"):
            end = time.monotonic() + 5
            while server.report()["calls"] < 2 and time.monotonic() < end:
                time.sleep(0.05)
            yield server


@case("at most 20 MB more behind clients that are gone, nothing of them counted, then 200")
def wsgi_gone():
    with busy_pool() as server:
        before = server.resident()
        for _ in range(12):
            Crowd(server.port, 500, lambda index: post("/pool/x", bytes(8000))).close()
        server.settle()
        growth = server.resident() - before
        held = server.report()["held"]
        server.release()
        status, _content = ask(server.port, post("/pool/x", b"x"), seconds=10)
        seen = "%+.0f MB, %s counted, then %d" % (growth, kilobytes(held), status)
        return growth < 20 and held < 10_000 and status == 200, seen


@case("at most 20 MB more, and each is 200 or 503 in the end")
def wsgi_queue():
    with busy_pool() as server:
        before = server.resident()
        with Crowd(server.port, 4000, lambda index: post("/pool/x", bytes(8000))) as crowd:
            number = len(crowd.clients)
            server.settle()
            growth = server.resident() - before
            server.release()
            answers = crowd.answers(10)
        seen = "%+.0f MB, %s" % (growth, listed(answers))
        return growth < 20 and answers["200"] + answers["503"] == number, seen


@case("at most 20 MB more, more than 100 kB counted, the count returns to 0")
def wsgi_uploads():
    with Running() as server:
        growth, held, answers = measure_crowd(server, 3000, lambda index: post("/pool/x", bytes(9000))[:-900])
        left = server.held_in_the_end()
        seen = "%+.0f MB, %s counted, then %d, %s" % (growth, kilobytes(held), left, listed(answers))
        return growth < 20 and held > 100_000 and left == 0, seen


@case("each of 600 uploads is 200 or 503, at least 100 of them 200")
def descriptors():
    """More than 8 KiB of content of all of them is there before one is whole. Twice: each client sends it as
    it comes, so that descriptors end at a newcomer; and once all have come, so that they end at a file."""
    seen = []
    right = True
    for steps in ([8500, 500], [100, 8400, 500]):
        with Running(descriptors=1024) as server:
            begin = post("/pool/x", bytes(9000))[:steps[0] - 9000]
            with Crowd(server.port, 600, lambda index, begin=begin: begin) as crowd:
                for size in steps[1:]:
                    server.settle()
                    crowd.send(bytes(size))
                answers = crowd.answers(10)
                number = len(crowd.clients)
        right = right and answers["200"] >= 100 and answers["200"] + answers["503"] == number
        seen.append(listed(answers))
    return right, "; ".join(seen)


@case("10 suspended, 200 with 503")
def max_connections():
    """Each waits a moment for its answer before the next one comes, and all of them stay."""
    request = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
    refused = 0
    with Running(max_connections=10) as server, contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(210):
            client = stack.enter_context(connect(server.port))
            with contextlib.suppress(ConnectionError):
                client.sendall(request)
            waiting.append(client)
            select.select([client], [], [], 0.03)
        server.settle()
        for client in waiting:
            refused += first_words(client) == "503"
        calls = server.report()["calls"]
    return calls == 10 and refused == 200, "%d suspended, %d with 503" % (calls, refused)


@case("200 for a POST in two segments 3 s after the crowd, whose members get 408 or 503")
def starved():
    def most_of_a_post(index: int) -> bytes:
        return post("/form", bytes(1024))[:-24]

    with Running() as server, Crowd(server.port, 2200, most_of_a_post) as crowd:
        time.sleep(3)
        begin = time.monotonic()
        request = post("/form", bytes(1024))
        with connect(server.port, seconds=3) as client:
            client.sendall(request[:500])
            time.sleep(0.1)
            with contextlib.suppress(ConnectionError):
                client.sendall(request[500:])
            status, _content = read_response(client)
        seconds = time.monotonic() - begin
        answers = crowd.answers()
    seen = "%d after %.1f s; of the crowd %s" % (status, seconds, listed(answers))
    return status == 200 and answers["408"] > 0, seen


@case("closed within 5 s by conn_timeout=3; one who takes 3 kB/s lives")
def unread_stream():
    request = b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n"
    with Running(conn_timeout=3) as server:
        with connect(server.port, 2048) as silent, connect(server.port, 2048) as reader:
            silent.sendall(request)
            reader.sendall(request)
            begin = time.monotonic()
            seconds = 0.0
            taken = 0
            while seconds < 15:
                taken += len(read_some(reader, 300))
                time.sleep(0.1)
                seconds = time.monotonic() - begin
                left = server.report()["connections"]
                if left < 2 and seconds > 1:
                    break
            closed = seconds
            while time.monotonic() < begin + 7:             # a mend that closes everybody is none
                taken += len(read_some(reader, 300))
                time.sleep(0.1)
            left = server.report()["connections"]
    seen = "after %.1f s, the other took %s, connections left: %d" % (closed, kilobytes(taken), left)
    return closed < 5 and left == 1, seen


def read_some(client: socket.socket, size: int) -> bytes:
    try:
        return client.recv(size)
    except OSError:
        return b""


@case("8 MiB whole over HTTPS to one who takes 20 kB/s for 10 s, conn_timeout=3")
def tls_reader():
    """The small buffer lets the server's system see progress each second. Plain HTTP passes this as it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with certificate() as files, Running(conn_timeout=3, memory_budget=64 * MIB, **files) as server:
        with context.wrap_socket(connect(server.port, 4096)) as client:
            client.sendall(b"GET /large HTTP/1.0\r\n\r\n")
            received = bytearray()
            end = time.monotonic() + 10
            while time.monotonic() < end:
                received += read_some(client, 2000)
                time.sleep(0.1)
            while True:
                piece = read_some(client, 65536)
                if not piece:
                    break
                received += piece
    content = received.partition(b"\r\n\r\n")[2]
    return content == LARGE_PAGE, "%s of %s" % (kilobytes(len(content)), kilobytes(len(LARGE_PAGE)))


@case("200 for another, and the four readers at 1.5 kB/s live, conn_timeout=3", network=True)
def wsgi_readers():
    request = b"GET /pool/pieces HTTP/1.1\r\nHost: x\r\n\r\n"
    with Running(threads=4, conn_timeout=3) as server, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(connect(server.port, 2048)) for _ in range(4)]
        for reader in readers:
            reader.sendall(request)
        answers = []

        def ask_for_another() -> None:
            answers.append(ask(server.port, b"GET /pool/x HTTP/1.1\r\nHost: x\r\n\r\n", seconds=5))

        other = threading.Timer(2, ask_for_another)
        other.start()
        end = time.monotonic() + 8
        while time.monotonic() < end:
            for reader in readers:
                read_some(reader, 150)
            time.sleep(0.1)
        other.join()
        left = server.report()["connections"]
    return answers == [(200, b"0 bytes")] and left == 4, "%d, readers left: %d" % (answers[0][0], left)


# ----------------------------------------------------------------- One request that ends or stalls the server
def long_texts() -> dict[str, str]:
    """Requests of nearly 16 kB with a run of something that two parts of a pattern might both match."""
    blanks = " " * 15_000
    tabs = " \t" * 7_500
    fields = {
        "Connection": "a%sb" % blanks,
        "Connection tabs": "a%sb" % tabs,
        "Connection commas": "a%sb" % ("," * 15_000),
        "Connection comma and blanks": "a%sb" % (" ," * 7_500),
        "Transfer-Encoding": "chunked%sb" % blanks,
        "Content-Length": "1%sb" % blanks,
        "Content-Type": "multipart/form-data;%sboundary%s=b" % (blanks[:7_000], blanks[:7_000]),
        "Content-Type quoted": 'multipart/form-data; boundary="%s' % ("\\" * 15_000),
        "Expect": "100-continue%sb" % blanks,
        "Host": "a%sb" % blanks,
        "Host dots": "a" + ".a" * 7_500 + "!",
        "Origin": "http://%s" % ("a." * 7_500),
        "Authorization": "Basic%sb" % blanks,
        "Cookie": "a=b;%sb" % blanks,
        "X-Other": "a%sb" % blanks,
        "Forwarded": "for=a%s;b" % blanks,
    }
    requests = {}
    for name, value in fields.items():
        own = "" if name.startswith("Host") else "Host: x\r\n"
        own += "Content-Length: 2\r\n" if name.startswith("Content-Type") else ""
        requests[name] = "POST /form?NUMBER HTTP/1.1\r\n%s%s: %s\r\n\r\n{}" % (own, name.split()[0], value)
    targets = {
        "slashes": "/" * 15_000,
        "percents": "/%25" * 3_700,
        "query": "/form?" + "a=&" * 5_000,
        "dots": "/form" + "/.." * 5_000,
        "absolute": "http://a" + ":a" * 7_500,
    }
    for name, target in targets.items():
        requests["target of " + name] = post(target + "?NUMBER", b"").decode()
    chunked = "POST /form?NUMBER HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    requests["chunk extension"] = chunked + "1;a%s=b\r\nx\r\n0\r\n\r\n" % blanks
    requests["trailer"] = chunked + "0\r\nX: a%sb\r\n\r\n" % blanks
    multipart = "multipart/form-data; boundary=b"
    part = "--b\r\n%s\r\n\r\n\r\n--b--\r\n"
    disposition = 'Content-Disposition: form-data; name="'
    bodies = {
        "urlencoded": ("/form", "application/x-www-form-urlencoded", "a=%" * 5_000),
        "part head": ("/form", multipart, part % ("X: a%sb" % blanks)),
        "part name": ("/form", multipart, part % (disposition + "\\" * 15_000)),
        "boundaries": ("/form", multipart, "--b\r\n" * 3_000),
        "JSON": ("/mi", "application/json", "[" * 15_000),
    }
    for name, (path, content_type, body) in bodies.items():
        requests[name] = post(path + "?NUMBER", body.encode(), "Content-Type: %s\r\n" % content_type).decode()
    return requests


@case("at most 20 ms of CPU for each kind of a long head")
def blanks():
    """Each is sent three times, with another query, so that no answer comes from what is remembered."""
    found = {}
    with Running(post_buf_size=16384, receive_buf_size=16384) as server:
        ask(server.port, HELLO)
        for name, request in long_texts().items():
            before = server.report()["cpu"]
            for number in range(3):
                ask(server.port, request.replace("NUMBER", str(number)).encode(), seconds=3)
            found[name] = (server.report()["cpu"] - before) / 3 * 1000
    slow = ["%s %.0f ms" % item for item in found.items() if item[1] > 20]
    worst = max(found, key=found.get)
    return not slow, "; ".join(slow) or "at most %.1f ms, %s" % (found[worst], worst)


@case("400 with a replacement character, 500 for bad headers or status, the server lives")
def error_texts():
    wrong = []
    requests = {"handler": b"GET /fail?%s HTTP/1.1\r\nHost: x\r\n\r\n",
                "upload_data_cb": b"POST /upload?%s HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"}
    for place, request in requests.items():
        for name in ("surrogate", "line-break", "name", "status"):
            with Running() as server:
                status, content = ask(server.port, request % name.encode())
                lives = ask(server.port, HELLO)[0] == 200
            right = status == 500
            if name == "surrogate":
                text = content.decode("utf-8", "replace")
                right = status == 400 and ("no such key: ?" in text or "no such key: \ufffd" in text)
            if not right or not lives:
                dead = "" if lives else ", server dead"
                wrong.append("%s in %s: %s%s" % (name, place, status or "cut", dead))
    return not wrong, "; ".join(wrong) or "so it is"


@case("500 and a traceback for each of the three exceptions in each of three places, the server lives")
def exits():
    wrong: dict[str, list[str]] = {}
    paths = {"handler": "/fail", "WSGI in the loop": "/loop/fail", "WSGI in a thread": "/pool/fail"}
    for name in ("CancelledError", "GeneratorExit", "SystemExit"):
        for place, path in paths.items():
            with Running("thread") as server:
                status, _content = ask(server.port, b"GET %s?%s HTTP/1.1\r\nHost: x\r\n\r\n"
                                       % (path.encode(), name.encode()), seconds=3)
                lives = ask(server.port, HELLO, seconds=3)[0] == 200
                logged = server.logged()
            faults = [] if status == 500 else [str(status or "cut")]
            if not lives:
                faults.append("server dead")
            if "Traceback" not in logged or name not in logged:
                faults.append("no traceback")
            if faults:
                wrong.setdefault(", ".join(faults), []).append("%s in %s" % (name, place))
    seen = ["%s: %d of 9, such as %s" % (fault, len(rows), rows[0]) for fault, rows in wrong.items()]
    return not wrong, "; ".join(seen) or "so it is"


@case("the parent answers the request, the same connection again, and new ones; the child has ended")
def fork_exit():
    with Running() as server, connect(server.port, seconds=3) as client:
        client.sendall(b"GET /fork HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = [read_response(client)]
        time.sleep(0.3)
        with contextlib.suppress(ConnectionError):
            client.sendall(HELLO)
        answers.append(read_response(client))
        answers.append(ask(server.port, HELLO, seconds=3))
        answers.append(ask(server.port, HELLO, seconds=3))
        ended = server.report()["child_has_ended"]
    seen = " ".join("%d" % status for status, _content in answers)
    if not ended:
        seen += ", the child lives on"
    return answers == [(200, b"parent")] + [(200, b"hello")] * 3 and ended, seen


@case("RuntimeError for the handler that calls run_once, its own answer for the other client")
def run_once():
    with Running() as server, connect(server.port) as first, connect(server.port) as second:
        first.sendall(b"GET /again HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        second.sendall(HELLO)
        answers = [read_response(first), read_response(second)]
    seen = ", ".join("%d %r" % (status, content.decode()) for status, content in answers)
    return answers == [(200, b"first RuntimeError"), (200, b"hello")], seen


@case("200 from the pool of a forked child")
def fork_pool():
    with Running("forked") as server:
        status, _content = ask(server.port, b"GET /pool/x HTTP/1.1\r\nHost: x\r\n\r\n", seconds=4)
    return status == 200, "%d" % status if status else "nothing in 4 s"


def hello_ffdhe8192() -> bytes:
    """A ClientHello whose key share costs the client nothing: 4 is a square, so it is in the group."""
    def with_length(data: bytes, size: int) -> bytes:
        return len(data).to_bytes(size, "big") + data

    group = b"\x01\x04"
    share = with_length(group + with_length(b"\x04".rjust(1024, b"\0"), 2), 2)
    extensions = {
        10: with_length(group, 2),
        13: with_length(bytes.fromhex("080408050806040305030401"), 2),
        43: with_length(b"\x03\x04", 1),
        51: share,
    }
    joined = b"".join(kind.to_bytes(2, "big") + with_length(data, 2) for kind, data in extensions.items())
    suites = with_length(bytes.fromhex("130213011303"), 2)
    no_session = with_length(b"", 1)
    no_compression = with_length(b"\0", 1)
    body = b"\x03\x03" + bytes(32) + no_session + suites + no_compression + with_length(joined, 2)
    return b"\x16\x03\x01" + with_length(b"\x01" + with_length(body, 3), 2)


@case("at most 20 ms of CPU for a replayed ClientHello with ffdhe8192")
def ffdhe():
    record = hello_ffdhe8192()
    with certificate() as files, Running(tls_ciphers=RECOMMENDED, **files) as server:
        answer = replay(server.port, record)
        before = server.report()["cpu"]
        for _ in range(8):
            replay(server.port, record)
        each = (server.report()["cpu"] - before) / 8 * 1000
    kinds = {b"\x15": "an alert", b"\x16": "a ServerHello", b"": "nothing"}
    return each < 20, "%.1f ms, answered by %s" % (each, kinds.get(answer[:1], "something else"))


def replay(port: int, record: bytes) -> bytes:
    with connect(port, seconds=3) as client:
        client.sendall(record)
        return read_some(client, 4096)


@case("a byte costs behind 15 kB about what it costs behind 1 kB")
def bytewise():
    chunked = b"POST /form HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    begins = {
        "value": (b"GET /hello HTTP/1.1\r\nHost: x\r\nX-Long: ", b"x"),
        "trailer": (chunked + b"0\r\nX-Long: ", b"x"),
        "fields": (b"GET /hello HTTP/1.1\r\nHost: x\r\n", b"X-%s: x\r\n" % (b"y" * 143)),
        "target": (b"GET /", b"x"),
        "chunks": (chunked, b"1\r\nx\r\n"),
    }
    seen = []
    right = True
    with Running() as server:
        for name, (begin, unit) in begins.items():
            shallow = cost_of_a_byte(server, begin, unit, 1_000)
            deep = cost_of_a_byte(server, begin, unit, 15_000)
            right = right and deep < 1.5 * shallow + 15
            seen.append("%s %.0f and %.0f us" % (name, shallow, deep))
    return right, ", ".join(seen)


def cost_of_a_byte(server: Running, begin: bytes, unit: bytes, size: int) -> float:
    """CPU in us of a byte behind so many others. Each round ends with an ordinary request: the server answers
    it when it has read what came before, so every byte is read alone. A fifth of its cost is in it."""
    clients, rounds = 5, 200
    behind = unit * (size // len(unit) + 3)
    with Crowd(server.port, clients, lambda index: begin + behind[:size]) as crowd:
        with connect(server.port) as ordinary:
            server.settle()
            before = server.report()["cpu"]
            for position in range(size, size + rounds):
                crowd.send(behind[position % len(unit):][:1])
                ordinary.sendall(HELLO)
                ordinary.recv(1000)
            return (server.report()["cpu"] - before) / (clients * rounds) * 1e6


@case("100 calls have 100 answers; 511 calls in 1 kB: one error, code -32600")
def batch():
    kind = "Content-Type: application/json\r\n"
    call = {"jsonrpc": "2.0", "id": 1, "method": "which"}
    with Running(receive_buf_size=16384, allowed_hosts="*") as server:
        calls = json.dumps([call] * 100).encode()
        status, content = ask(server.port, post("/mi", calls, kind))
        number = len(json.loads(content)) if status == 200 else 0
        before = server.report()["cpu"]
        members = json.dumps([1] * 511, separators=(",", ":")).encode()
        _status, content = ask(server.port, post("/mi", members, kind))
        cost = (server.report()["cpu"] - before) * 1000
    answer = json.loads(content) if content else None
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict):
        seen = "one answer, code %s" % answer.get("error", {}).get("code")
    else:
        seen = "%d answers" % len(answer or ())
    seen = "%d answers; %s, %.1f ms" % (number, seen, cost)
    return number == 100 and "one answer, code -32600" in seen, seen


@case("at most 150 ms, the median of 15 ordinary requests")
def pipelining():
    with Running() as server:
        command = [sys.executable, HERE, "--load", str(server.port)]
        load = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            load.stdout.read(1)                             # all have sent
            seconds = []
            for number in range(15):
                time.sleep(0.05 + 0.01 * number)            # not in step with the load
                begin = time.monotonic()
                status, _content = ask(server.port, HELLO, seconds=5)
                seconds.append(time.monotonic() - begin if status == 200 else 5)
        finally:
            load.kill()
            load.wait()
            load.stdout.close()
    seen = "%.0f ms, the worst %.0f ms" % (statistics.median(seconds) * 1000, max(seconds) * 1000)
    return statistics.median(seconds) < 0.15, seen


def pipeline(port: int) -> None:
    """300 clients that send 16 kB of small requests again and again, for a minute or until this is killed."""
    with connect(port) as client:
        client.sendall(HELLO)
        answer_size = len(client.recv(4096))
    number = 16384 // len(HELLO)
    requests = HELLO * number
    poll = select.epoll()
    clients = {}
    missing = {}            # bytes of answers
    for _ in range(300):
        client = connect(port)
        clients[client.fileno()] = client
    for descriptor, client in clients.items():
        client.sendall(requests)
        missing[descriptor] = number * answer_size
        poll.register(descriptor, select.EPOLLIN)
    os.write(1, b".")
    end = time.monotonic() + CASE_SECONDS
    while time.monotonic() < end:
        for descriptor, _event in poll.poll(1):
            client = clients[descriptor]
            try:
                data = client.recv(262144)
                missing[descriptor] -= len(data)
                if missing[descriptor] <= 0:
                    missing[descriptor] = number * answer_size
                    client.sendall(requests)
            except OSError:
                data = b""
            if not data:
                poll.unregister(descriptor)


# ----------------------------------------------------------------------------------------------- Main program
def run_in_network(name: str) -> tuple[str, str]:
    """The case in a network namespace of its own: with plain loopback a socket takes 1 MiB at once."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "skipped", "no unshare or no ip command"
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    set_up = "ip link set lo up mtu 1500"
    if subprocess.run([*unshare, "sh", "-c", set_up], capture_output=True, timeout=10).returncode != 0:
        return "skipped", "unshare is not allowed here"
    command = [*unshare, "sh", "-c", set_up + ' && exec "$@"', "sh", sys.executable, HERE, "--inside", name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS + 10)
    word, _, seen = result.stdout.strip().partition(" ")
    if not seen:
        return "WRONG", "the case failed: %s" % result.stderr.strip()[-200:]
    return word, seen


def interrupt(number, frame) -> None:
    raise TimeoutError("the case did not end in %d s" % CASE_SECONDS)


def run_here(name: str) -> tuple[str, str]:
    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(CASE_SECONDS)
    try:
        right, seen = CASES[name].function()
    except Skipped as reason:
        return "skipped", str(reason)
    except Exception as error:
        return "WRONG", "%s: %s" % (type(error).__name__, error)
    finally:
        signal.alarm(0)
    return "ok" if right else "WRONG", seen


def main(arguments: list[str]) -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if arguments[:1] == ["--server"]:
        serve(*arguments[1:])
        return 0
    if arguments[:1] == ["--load"]:
        pipeline(int(arguments[1]))
        return 0
    if arguments[:1] == ["--inside"]:
        print(*run_here(arguments[1]))
        return 0
    if arguments == ["--list"]:
        for name, row in CASES.items():
            print("%-16s %s" % (name, row.wanted))
        return 0
    unknown = [name for name in arguments if name not in CASES]
    if unknown:
        print("no such case: %s; see --list" % ", ".join(unknown), file=sys.stderr)
        return 2
    wrong = 0
    for name in arguments or CASES:
        row = CASES[name]
        word, seen = run_in_network(name) if row.network else run_here(name)
        print("%-7s %-16s %s (wanted: %s)" % (word, name, seen, row.wanted), flush=True)
        if word == "WRONG":
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
