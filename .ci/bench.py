"""What a request costs: httpd.py beside other servers, on this machine.

    python .ci/bench.py --quick                 two minutes: the main scenarios, four other servers
    python .ci/bench.py --json result.json      all of it: 35 minutes

Measured is the CPU time of a server per request, user and system, of its process and its children, in microseconds, from the kernel's accounting.
It follows the load of the machine far less than requests per second do. A server runs on the first core, its load on the last one. Servers take
turns within a round, so what disturbs the machine disturbs all of them; the first round warms up and is dropped. A row gives the median of the
rounds, the least and the greatest, and the ratio of the first row to it. A row with errors (a status that is not 2xx, a socket error, too few
requests, a TLS session resumed) is marked as failed and has no ratio.

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
import http.client
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "httpd-bench"
CORES = sorted(os.sched_getaffinity(0))
MIB = 2**20
HELLO, TYPE, JSON = b"Hello, world!\n", "text/html; charset=utf-8", "application/json"
CONNECTIONS = 64                            # 8 for 1 MiB and more: what is on its way should stay in the processor's cache
IDLE, RATE = 5000, 5000                     # idle connections, and requests a second when latency is measured
CALL = '{"jsonrpc":"2.0","id":1,"method":"httpd_list_root_path"}'
ANSWER = b'{"jsonrpc":"2.0","result":[{"http_root":"mi","module":"mi_http"},{"http_root":"hello","module":"bench"}],"id":1}'
FIELDS = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0", "Accept-Language": "en-US,en;q=0.5",
          "Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "Accept-Encoding": "gzip, deflate, br, zstd", "DNT": "1",
          "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none", "Priority": "u=0, i"}     # Host makes ten

OURS, STAND_IN = "httpd.py", "mi stand-in in C"
PEERS = {                           # what each needs: packages from PyPI; and programs and C headers, which Debian has
    "bare": [], "libmicrohttpd": ["cc", "microhttpd.h"], "nginx": ["nginx"], "bjoern": ["bjoern", "cc", "ev.h"], "granian-wsgi": ["granian"],
    "granian-asgi": ["granian", "uvloop"], "node": ["node"], "uvicorn": ["uvicorn", "httptools", "uvloop"], "aiohttp": ["aiohttp", "uvloop"],
    "http.server": [], STAND_IN: ["cc", "microhttpd.h", "cjson/cJSON.h"]}
TOOLS = {"wrk": ["wrk"], "load": ["cc"], "handshakes": ["cc", "openssl"]}
DEBIAN = {"wrk": "wrk", "nginx": "nginx-light", "node": "nodejs", "cc": "gcc", "ev.h": "libev-dev", "microhttpd.h": "libmicrohttpd-dev",
          "cjson/cJSON.h": "libcjson-dev", "openssl": "openssl"}
QUICK_PEERS = ["libmicrohttpd", "nginx", "uvicorn", "http.server"]
CERTIFICATES = {"RSA-2048": ["rsa:2048"], "P-256": ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]}
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
import httpd, json, queue, threading
kind, content, waiting = os.environ["BENCH_KIND"], memoryview(BODY), queue.SimpleQueue()
def hello(request, page):
    page.write(BODY)
    return 200
def stream(request, page):
    kind == "chunked" or page.set_header("Content-Length", str(len(BODY)))
    return 200
def flush(request, pos, buf):
    size = min(len(buf), len(BODY) - pos)
    buf[:size] = content[pos:pos + size]
    return size or httpd.END
def suspend(request, page):
    if request.state:
        return hello(request, page)
    request.state = True
    resume(request)
    return httpd.SUSPEND
def resume_those_waiting():
    while True: waiting.get().resume()
callbacks = (stream, flush) if kind in ("chunked", "Content-Length") else (suspend,) if kind else (hello,)
resume = httpd.Request.resume if kind == "resumed by itself" else waiting.put
kind == "resumed by a thread" and threading.Thread(target=resume_those_waiting, daemon=True).start()
httpd.register_httpdcb("bench", "hello", *callbacks)
for number in range(1, int(os.environ["BENCH_ROOTS"])):
    httpd.register_httpdcb("bench", "root%d" % number, hello)
httpd.loadmodule("mi_http")
httpd.run(ip="127.0.0.1", port=port, **json.loads(os.environ["BENCH_PARAMETERS"]))
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
                data and sock.sendall(last if closing else response)    # one, whatever came: pipelined requests fail
            except OSError:
                closing = True
            if closing:
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
        for field in fields + [("Connection", "close")] * self.close_connection: self.send_header(*field)
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

# 1 MiB is put together in memory for each request, as in the page of httpd.py: one copy by the server, one by send(). For 64 MiB that
# would be 16,000 new pages for each request. The like of flush_data_cb, which copies a piece into a buffer that is there already, is a
# file in memory without sendfile: read() copies. With sendfile neither copies: for information.
NGINX = """
worker_processes 1; daemon off; pid nginx.pid; error_log /dev/null crit; USER
events { worker_connections 20000; }
http {
    access_log off; server_tokens off; keepalive_requests 1000000000; default_type "text/html; charset=utf-8";
    client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
    server {
        listen 127.0.0.1:PORT backlog=1024 TLS
        location /hello { CONTENT }
    }
}
"""

HEADERS = "#define _GNU_SOURCE\n" + "".join(f"#include <{name}.h>\n" for name in (
    "arpa/inet", "dlfcn", "stdio", "stdlib", "string", "strings", "sys/epoll", "time", "unistd"))
# With -DMI it does for a call what OpenSIPS' modules httpd and mi_http do: it looks through the fields for the type, gathers the
# content, parses it with cJSON, looks the command up, builds the answer as a cJSON tree, has it printed into the one page, and
# has that copied into a response. Its allocator, logs and select() are not here. Measured once, the real one took 1.6-1.9 x a GET of the library.
MICROHTTPD = r"""
#include <microhttpd.h>
static char content[1 << 21], *type;
static size_t size;
#ifndef MI
#define MODE MHD_RESPMEM_PERSISTENT
#define begin() content
#define gather(call, data, size)
#define finish(call, connection)
#else
#define MODE MHD_RESPMEM_MUST_COPY
#include <cjson/cJSON.h>
struct call { size_t size; char text[1024]; };
static cJSON *list_root_path(void) {
    static const char *roots[][2] = {{"mi", "mi_http"}, {"hello", "bench"}};
    cJSON *list = cJSON_CreateArray(), *root;
    for (int i = 0; i < 2; i++) {
        cJSON_AddItemToArray(list, root = cJSON_CreateObject());
        cJSON_AddStringToObject(root, "http_root", roots[i][0]);
        cJSON_AddStringToObject(root, "module", roots[i][1]);
    }
    return list;
}
static struct { const char *name; cJSON *(*run)(void); } commands[] = {
    {"uptime"}, {"version"}, {"pwd"}, {"arg"}, {"which"}, {"ps"}, {"kill"}, {"httpd_list_root_path", list_root_path}, {0}};
static void *begin(void) { return calloc(1, sizeof(struct call)); }
static void gather(struct call *call, const char *data, size_t more) {
    if (call->size + more < sizeof call->text) memcpy(call->text + call->size, data, more), call->size += more;
}
static void finish(struct call *call, struct MHD_Connection *connection) {
    const char *kind = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Type");
    cJSON *request = kind && !strncasecmp(kind, "application/json", 16) ? cJSON_Parse(call->text) : 0, *answer = cJSON_CreateObject();
    const char *version = cJSON_GetStringValue(cJSON_GetObjectItem(request, "jsonrpc"));
    const char *method = cJSON_GetStringValue(cJSON_GetObjectItem(request, "method"));
    int i = 0;
    while (commands[i].name && (!method || strcmp(commands[i].name, method))) i++;
    cJSON_AddStringToObject(answer, "jsonrpc", "2.0");
    if (commands[i].run && version && !strcmp(version, "2.0")) cJSON_AddItemToObject(answer, "result", commands[i].run());
    cJSON_AddItemToObject(answer, "id", cJSON_Duplicate(cJSON_GetObjectItem(request, "id"), 1));
    cJSON_PrintPreallocated(answer, content, sizeof content, 0);
    size = strlen(content), cJSON_Delete(answer), cJSON_Delete(request), free(call);
}
#endif
static enum MHD_Result answer(void *c, struct MHD_Connection *connection, const char *url, const char *method,
                              const char *version, const char *data, size_t *data_size, void **call) {
    if (!*call) { *call = begin(); return MHD_YES; }
    if (*data_size) { gather(*call, data, *data_size); *data_size = 0; return MHD_YES; }
    finish(*call, connection);
    struct MHD_Response *response = MHD_create_response_from_buffer(size, content, MODE);
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


def command(name: str, python: str, port: int, folder: Path, body: bytes, kind: str, tls: str) -> list:
    """What starts a server; the files that it needs are written."""
    if name in C_PROGRAMS:
        return [CACHE / name, str(port)]
    if name == "node":
        (folder / "node.js").write_text(NODE)
        return ["node", folder / "node.js", str(port)]
    if name == "nginx":
        block, text = "x" * 2048, "$k" * (len(body) // 2048) or body.decode().replace("\n", "\\n")     # a word has at most 4 kB
        content = f"alias {folder}/content; {kind};" if kind else f'set $k "{block}"; return 200 "{text}";'
        secure = f"ssl; ssl_certificate {tls}.crt; ssl_certificate_key {tls}.key; ssl_protocols TLSv1.2 TLSv1.3;" if tls else ";"
        values = {"USER": "" if os.geteuid() else "user root;", "PORT": str(port), "TLS": secure, "CONTENT": content}
        (folder / "nginx.conf").write_text(re.sub("USER|PORT|TLS|CONTENT", lambda word: values[word[0]], NGINX))
        return ["nginx", "-p", folder, "-c", "nginx.conf", "-e", "/dev/null"]
    (folder / "serve.py").write_text(COMMON + PROGRAMS[name])
    return [python, folder / "serve.py", str(port)]


PORTS = iter(range(20000 + os.getpid() % 5000, 32000))         # below those that the kernel gives to clients


class Server:
    """A running server. All that it starts is in its process group, by which it is measured and ended."""

    def __init__(self, work: Path, name: str, python: str, body: bytes = HELLO, type: str = TYPE, roots: int = 1, kind: str = "", tls: str = "",
                 **parameters):
        self.body, self.type, self.tls, folder = body, type, tls and str(work / tls), Path(tempfile.mkdtemp(dir=work))
        self.port = next(port for port in PORTS if socket.socket().connect_ex(("127.0.0.1", port)))
        (folder / "content").write_bytes(body)
        self.log = folder / "log"
        if tls:
            parameters |= {"tls_cert_file": f"{self.tls}.crt", "tls_key_file": f"{self.tls}.key",
                           "tls_ciphers": "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"}
        environment = {**os.environ, "BENCH_CONTENT": str(folder / "content"), "BENCH_TYPE": type, "BENCH_ROOTS": str(roots),
                       "BENCH_KIND": kind, "BENCH_PARAMETERS": json.dumps(parameters), "PYTHONPATH": str(work)}
        os.sched_setaffinity(0, CORES[:1])                      # is inherited
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command(name, python, self.port, folder, body, kind, self.tls), stdin=subprocess.DEVNULL, cwd=folder,
                                            stdout=subprocess.DEVNULL, stderr=log, env=environment, start_new_session=True)
        os.sched_setaffinity(0, CORES[-1:])

    def wait(self) -> None:
        """Wait until it answers, as it should. The size of the response is kept."""
        for _ in range(600):
            with contextlib.suppress(ConnectionRefusedError), contextlib.closing(self.client()) as client:
                response, answer = self.exchange(client)
                break
            if self.process.poll() is not None:
                raise OSError((self.log.read_text(errors="replace").strip().splitlines() or ["it does not start"])[-1])
            time.sleep(0.05)
        else:
            raise OSError("it does not answer")
        fields = response.getheaders()
        self.size = len(f"HTTP/1.1 200 {response.reason}\r\n\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields)) + len(answer)
        if response.status != 200 or response.getheader("Content-Type") != self.type or not response.getheader("Date") or answer != self.body:
            raise OSError(f"it answers something else: {response.status} {fields} {answer[:200]}")

    def client(self) -> http.client.HTTPConnection:
        secure = {"context": ssl._create_unverified_context()} if self.tls else {}
        return (http.client.HTTPSConnection if self.tls else http.client.HTTPConnection)("127.0.0.1", self.port, timeout=10, **secure)

    def exchange(self, client: http.client.HTTPConnection) -> tuple[http.client.HTTPResponse, bytes]:
        client.request(*("POST", "/mi", CALL, {"Content-Type": JSON}) if self.type == JSON else ("GET", "/hello"))
        response = client.getresponse()
        return response, response.read()

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

    def memory(self) -> int:
        """Resident bytes, soon; what processes have in common is shared out among them."""
        time.sleep(0.3)
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.members()]
        return sum(int(size) * 1024 for text in texts for size in re.findall("Pss: *([0-9]+) kB", text))

    def kept_waiting(self) -> float:
        """Microseconds so far in which it could have run, but others ran on its core."""
        return sum(int(path.read_text().split()[1]) for pid in self.members() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1000

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(ChildProcessError):            # its children are ours now
            while True:
                os.waitpid(-self.process.pid, 0)


@contextlib.contextmanager
def running(work: Path, wanted: dict[str, dict]):
    """Servers by their labels, started at once. A peer that does not start is left out; without httpd.py there is nothing to compare."""
    servers = {}
    try:
        for label, arguments in wanted.items():
            servers[label] = Server(work, **arguments)
        for label, server in list(servers.items()):
            try:
                server.wait()
            except (OSError, http.client.HTTPException) as error:
                if label.startswith(OURS):
                    raise NotImplementedError(f"{label}: {error}") from error
                left_out[label] = str(error)
                servers.pop(label).stop()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


class Bench(NamedTuple):
    """What was asked for. Servers are labels and the arguments of Server."""
    work: Path
    rounds: int
    seconds: int
    available: dict[str, dict]

    def servers(self, names: list[str], variants: dict[str, dict]) -> dict[str, dict]:
        """Those of these names that can take part, in each variant: its name, and further arguments."""
        return {", ".join(filter(None, (label, variant))): {**server, **arguments} for variant, arguments in variants.items()
                for label, server in self.available.items() if server["name"] in names}

    def take(self, loads: dict[str, Callable]) -> list[dict]:
        """Rows of a table. The loads take turns, the first round is dropped."""
        samples = {label: [] for label in loads}
        for label, load in [*loads.items()] * (self.rounds + 1):
            try:
                samples[label].append(load())
            except (OSError, http.client.HTTPException) as error:
                samples[label].append({"value": 0.0, "errors": {str(error): 1}})
        return rows_of({label: taken[1:] for label, taken in samples.items()})


# ------------------------------------------------------------------------------------------------------------- Loads
# A load returns a sample: the value that is measured, the number of requests, and errors by their kind.

BROWSER = """
local run, number, fields = "", 0, {LIST}
init = function(arguments) run = arguments[1] end
request = function()
    number = number + 1
    NEVER_SEEN
    return wrk.format("GET", "/hello?n=" .. run .. number, fields)
end
""".replace("LIST", ", ".join(f'["{name}"] = "{value}"' for name, value in FIELDS.items()))
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
    print("RESULT", all.requests, all.duration, all.bytes, e.connect, e.read, e.write, e.status, e.timeout)
end"""

# wrk does not mean to, but by SSL_clear() it resumes its sessions. This is put before OpenSSL: it forgets them, and tells what came out.
HANDSHAKES = r"""
static int all, resumed;
static const char *version = "", *cipher = "", *group = "";
void *SSL_get_current_cipher(void *);
long SSL_ctrl(void *, int, long, void *);
const char *SSL_get_version(void *), *SSL_CIPHER_get_name(void *), *OBJ_nid2sn(int);
int SSL_connect(void *ssl) {
    if (SSL_in_before(ssl)) SSL_set_session(ssl, (void *)0);
    int result = ((int (*)(void *))dlsym(RTLD_NEXT, "SSL_connect"))(ssl);
    if (result != 1) return result;
    all++, resumed += SSL_session_reused(ssl), version = SSL_get_version(ssl), cipher = SSL_CIPHER_get_name(SSL_get_current_cipher(ssl));
    group = OBJ_nid2sn(SSL_ctrl(ssl, 134, 0, 0) & 0xffff);                      /* SSL_get_negotiated_group() */
    return result;
}
__attribute__((destructor)) static void tell(void) { printf("TLS %d %d %s %s %s\n", all, resumed, version, cipher, group); }
"""


def wrk(bench: Bench, script: str, connections: int, server: Server) -> dict:
    """CPU time per request, or per MiB of large content, under as much load as one thread gives."""
    (bench.work / "wrk.lua").write_text(SCRIPTS["mi" if server.type == JSON else script] + DONE)
    accepted = lambda: int(re.findall("Tcp: (.*)", Path("/proc/net/snmp").read_text())[1].split()[5])      # by this machine: PassiveOpens
    opened, before = accepted(), server.cpu()
    said = output("wrk", "-t1", f"-c{connections}", f"-d{bench.seconds}s", "-s", bench.work / "wrk.lua",
                  f"http{'s' * bool(server.tls)}://127.0.0.1:{server.port}/hello", "--", f"{time.time_ns():x}-",
                  env={**os.environ, "LD_PRELOAD": str(CACHE / "handshakes") if server.tls else ""})
    spent, opened = server.cpu() - before, accepted() - opened
    found = re.search("RESULT" + r"\s+([0-9]+)" * 8, said)
    requests, duration, size, *errors = map(int, found.groups()) if found else [0] * 8
    tls = re.search("TLS ([0-9]+) ([0-9]+) (.*)", said) or ("", requests, 0, "")
    amount = size / MIB if len(server.body) >= MIB else requests                # half a response counts, too
    errors = dict(zip(("connect", "read", "write", "status", "timeout"), errors, strict=True))
    errors.update({"too few": max(0, 100 * bench.seconds - int(amount)), "sessions resumed": int(tls[2])})
    errors["not opened"] = max(0, requests - min(opened, int(tls[1]))) if script == "new-connection" else 0
    return {"value": spent / max(amount, 1), "requests": requests, "per_second": amount * 1e6 / max(duration, 1), "bytes": server.size,
            "note": tls[3], "errors": {kind: number for kind, number in errors.items() if number}}


def idle_memory(bench: Bench, wanted: dict[str, dict]) -> dict:
    """Bytes for each connection that waits for its next request. What a server has freed it would use again: each time a new one."""
    with running(bench.work, wanted) as servers, contextlib.ExitStack() as stack:
        for server in servers.values():
            clients = [stack.enter_context(contextlib.closing(server.client())) for _ in range(IDLE + 1)]
            before = [server.exchange(client) for client in clients[:1] * 100] and server.memory()
            for client in clients[1:]:
                server.exchange(client)
            return {"value": (server.memory() - before) / IDLE, "errors": {}}
        raise OSError("it does not start")


# It never sleeps: waking up would be counted. It tells when each request was due and answered, and its own gaps: whenever more than
# 10 us have passed between two of its looks at the clock. At a rate it sends, by turns, the same head, a new URL, a never-seen field,
# and that URL once more, so that what is remembered turns over.
LOAD = r"""
static double last, gaps[1 << 20][2], (*answers)[2]; static long gap_count; static char text[2048], data[65536];
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    double time = t.tv_sec * 1e6 + t.tv_nsec / 1e3;
    if (time - last > 10 && gap_count < 1 << 20) gaps[gap_count][0] = last, gaps[gap_count++][1] = time;
    return last = time;
}
static int request(long n, const char *run, const char *fields) {
    if (!run || n % 4 == 0) return sprintf(text, "GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n");
    int size = sprintf(text, "GET /hello?n=%s%ld HTTP/1.1\r\nHost: localhost\r\n%s", run, n % 4 == 3 ? n - 2 : n, fields);
    return size + sprintf(text + size, n % 4 == 2 ? "X-Request-Id: id-%s%ld\r\n\r\n" : "\r\n", run, n);
}
int main(int count, char **argument) {      /* port, bytes of a response, seconds, busy, idle, requests per second or 0, run, fields */
    int size = atoi(argument[2]), busy = atoi(argument[4]), idle = atoi(argument[5]), poll = epoll_create1(0), wrong = 0, ready, length;
    long sent = 0, done = 0, rate = atol(argument[6]), total = rate ? rate * atol(argument[3]) : 1L << 60;
    struct connection { int descriptor, received; double due; } *c = calloc(busy + idle, sizeof *c), **rested = calloc(busy, sizeof *rested);
    struct sockaddr_in server = {AF_INET, htons(atoi(argument[1])), {htonl(INADDR_LOOPBACK)}}; struct epoll_event events[64];
    for (int i = 0; i < busy + idle; i++, c++) {
        c->descriptor = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(c->descriptor, (struct sockaddr *)&server, sizeof server)) return 1;
        send(c->descriptor, text, request(0, 0, 0), 0);
        if (recv(c->descriptor, data, size, MSG_WAITALL) != size) return 1;
        events->events = EPOLLIN, events->data.ptr = c;
        if (i < busy) rested[i] = c, epoll_ctl(poll, EPOLL_CTL_ADD, c->descriptor, events);
    }
    answers = calloc(rate ? total : 1, sizeof *answers);
    printf("ready\n"), fflush(stdout), read(0, data, 1);
    double begin = (now(), gap_count = 0, last), end = begin + atol(argument[3]) * 1e6, time;
    while ((time = now()) < end + 1e7 && (time < end || done < (rate ? total : sent))) {
        while (sent < done + busy && sent < total && (rate ? begin + sent * 1e6 / rate <= time : time < end)) {
            c = rested[sent % busy], c->received = 0, c->due = begin + sent * 1e6 / rate;
            length = request(sent++, argument[7], argument[8]);
            wrong += send(c->descriptor, text, length, MSG_NOSIGNAL) != length, now();
        }
        for (ready = epoll_wait(poll, events, 64, 0); ready-- > 0;) {
            c = events[ready].data.ptr;
            if ((length = recv(c->descriptor, data, sizeof data, MSG_DONTWAIT)) <= 0) return 1;
            wrong += !c->received && memcmp(data, "HTTP/1.1 200 ", 13) || (c->received += length) > size;
            if (c->received < size) continue;
            if (rate) answers[done][0] = c->due, answers[done][1] = now();
            rested[done++ % busy] = c;
        }
    }
    if (!rate) gap_count = 0;
    printf("%ld %ld %f %ld %ld\n", done, wrong + (rate ? total : sent) - done, time - begin, rate ? done : 0, gap_count), fflush(stdout);
    fwrite(answers, sizeof *answers, rate ? done : 0, stdout), fwrite(gaps, sizeof *gaps, gap_count, stdout), fflush(stdout);
    while (read(0, data, 1) > 0);
}
"""


def generate(bench: Bench, busy: int, idle: int, rate: int, server: Server) -> dict:
    """CPU time per request, without that of opening the connections, each of which has been used once.

    At a rate also latencies, from when a request was due, whether a connection was free by then or not: a server that stalls is charged
    for all who would have come. Without a rate each connection asks again as soon as it has its answer.
    """
    mix = (f"{time.time_ns():x}-", "".join(f"{name}: {value}\r\n" for name, value in FIELDS.items())) if rate else ()
    arguments = [CACHE / "load", *map(str, (server.port, server.size, bench.seconds, busy, idle, rate, *mix))]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdout.readline() != b"ready\n":
            raise OSError("connections cannot be opened")
        before, waited = server.cpu(), server.kept_waiting()
        os.write(process.stdin.fileno(), b"\n")
        requests, wrong, duration, count, gap_count = map(float, process.stdout.readline().split() or [0, 1, 1, 0, 0])
        spent, waited = server.cpu() - before, server.kept_waiting() - waited
        numbers = iter(memoryview(process.stdout.read(16 * int(count + gap_count))).cast("d"))
    pairs = list(zip(numbers, numbers, strict=True))
    return {"value": spent / max(requests, 1), "requests": int(requests), "per_second": requests * 1e6 / duration, "errors": {"answer": int(wrong)},
            "latencies": latencies(pairs[:int(count)], pairs[int(count):], duration, waited) if count else {}}


def latencies(answers: list[tuple], gaps: list[tuple], duration: float, waited: float) -> dict:
    """Microseconds by percentile, and those of the generator's gaps, each of which counts as long as it is. An answer is late if it took more
    than 2 ms, and still does without the gaps of more than 0.5 ms. Late ones that waited at the same time are one pause.
    """
    taken, lengths = sorted(done - due for due, done in answers), sorted((end - begin for begin, end in gaps), reverse=True)
    wide, result = [gap for gap in gaps if gap[1] - gap[0] > 500], {}
    for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)):
        longer = sum(total < duration * (1 - part) for total in itertools.accumulate(lengths))
        result[name] = {"value": taken[min(int(len(taken) * part), len(taken) - 1)], "note": f"gap {[*lengths, 0.0][longer]:.0f}"}
    late = [(due, done, slow) for due, done in answers if done - due > 2000
            and (slow := done - due - sum(max(0, min(end, done) - max(begin, due)) for begin, end in wide)) > 2000]
    pauses = sum(due > before for (due, *_), before in zip(late, itertools.accumulate((done for _, done, _ in late), max, initial=0), strict=False))
    longest = max((slow for *_, slow in late), default=0)
    result["max"]["note"] += f", {len(late)} late in {pauses} pauses, the longest {longest:.0f}, others had the core for {waited:.0f}"
    return result


C_PROGRAMS = {"libmicrohttpd": (MICROHTTPD, "-lmicrohttpd"), STAND_IN: (MICROHTTPD, "-DMI -lmicrohttpd -lcjson"),
              "load": (LOAD, ""), "handshakes": (HANDSHAKES, "-shared -fPIC")}


# --------------------------------------------------------------------------------------------------------- Scenarios

def with_wrk(script: str, *groups: list[tuple], connections: int = CONNECTIONS) -> Callable[[Bench], list]:
    """A scenario; each group of servers, which are names and their variants, is a comparison of its own."""
    def take(bench: Bench) -> list[dict]:
        rows = []
        for group in groups:
            wanted = {label: server for names, variants in group for label, server in bench.servers(names, variants).items()}
            with running(bench.work, wanted) as servers:
                rows += bench.take({label: functools.partial(wrk, bench, script, connections, server) for label, server in servers.items()})
        return rows
    return take


def take_memory(names: list[str], variants: dict[str, dict], bench: Bench) -> list[dict]:
    servers = bench.servers(names, variants)
    return bench._replace(rounds=2).take({label: functools.partial(idle_memory, bench, {label: server}) for label, server in servers.items()})


def take_connections(bench: Bench) -> list[dict]:
    """What connections add, to a server each."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100
    numbers = [pair for pair in ((64, 0), (64, 936), (64, 9936), (10, 0), (100, 0), (1000, 0), (10000, 0)) if sum(pair) < limit]
    with running(bench.work, bench.servers([OURS, "nginx"], PLAIN)) as servers:
        return [row for label, server in servers.items() for row in bench.take({
            f"{label}, {busy} busy, {idle} idle": functools.partial(generate, bench, busy, idle, 0, server) for busy, idle in numbers})]


def take_latency(bench: Bench) -> list[dict]:
    """Beside servers with no collector at work and no memo. Told is also for how long others had the server's core, which makes pauses, too."""
    variants = {"": {}, "the idle expire": {"conn_timeout": 0.5}}
    with running(bench.work, bench.servers([OURS], variants) | bench.servers(["nginx", "bare"], PLAIN)) as servers:
        taken = bench.take({label: functools.partial(generate, bench, CONNECTIONS, IDLE, RATE, server) for label, server in servers.items()})
    return [row for name in ("p50", "p99", "p99.9", "max") for row in rows_of({f"{row['server']}, {name}": [
        {"value": 0.0, **sample.get("latencies", {}).get(name, {}), "errors": sample["errors"]} for sample in row["samples"]] for row in taken})]


Scenario = namedtuple("Scenario", "title unit take needs", defaults=[("wrk",)])
EVERY, PLAIN, LARGE, SECURE = [OURS, *PEERS][:-1], {"": {}}, b"x" * MIB, ("wrk", "handshakes")
MAIN = {"get": "the same GET again and again, 14 bytes of content", "new-url": "GET with the 10 fields of a browser, a new URL each",
        "never-seen": "the same, and a field never seen before each", "pipelined": "GET, pipelined by 16",
        "new-connection": "GET, a new connection each"}
TLS = [[([OURS, "nginx"], {kind: {"tls": kind}})] for kind in CERTIFICATES]
SCENARIOS = {
    **{name: Scenario(title, "us", with_wrk(name, [(EVERY, PLAIN)])) for name, title in MAIN.items()},
    "memory": Scenario("memory of an idle connection", "bytes", functools.partial(take_memory, EVERY, PLAIN), ()),
    "mi": Scenario("POST of httpd_list_root_path to /mi", "us", with_wrk("mi", [
        ([OURS, STAND_IN], {"": {"type": JSON, "body": ANSWER}}), (["libmicrohttpd"], {"GET": {}})])),
    "large": Scenario("GET of 1 MiB", "us/MiB", with_wrk("get", [
        ([OURS], {"": {"body": LARGE, "buf_size": 2 * MIB, "memory_budget": 64 * MIB}}), (EVERY[1:], {"": {"body": LARGE}})], connections=8)),
    "stream": Scenario("GET of 64 MiB, by flush_data_cb", "us/MiB", with_wrk("get", [
        ([OURS], {kind: {"body": 64 * LARGE, "kind": kind} for kind in ("chunked", "Content-Length")}),
        (["nginx"], {kind: {"body": 64 * LARGE, "kind": kind} for kind in ("sendfile off", "sendfile on")})], connections=8)),
    "suspend": Scenario("GET whose handler suspends it", "us", with_wrk("get", [
        ([OURS], {kind or "not suspended": {"kind": kind} for kind in ("", "resumed by itself", "resumed by a thread")})])),
    "roots": Scenario("GET with many roots", "us", with_wrk("get", [([OURS], {str(roots): {"roots": roots} for roots in (1, 100, 10000)})])),
    "tls-keepalive": Scenario("GET over TLS", "us", with_wrk("get", *TLS), SECURE),
    "tls-handshake": Scenario("GET, a new TLS connection each, with a full handshake", "us", with_wrk("new-connection", *TLS), SECURE),
    "tls-large": Scenario("GET of 1 MiB over TLS", "us/MiB", with_wrk("get", [
        ([OURS], {"P-256": {"tls": "P-256", "body": LARGE, "buf_size": 2 * MIB, "memory_budget": 64 * MIB}}),
        (["nginx"], {"P-256": {"tls": "P-256", "body": LARGE}})], connections=8), SECURE),
    "tls-memory": Scenario("memory of an idle TLS connection", "bytes", functools.partial(take_memory, *TLS[1][0]), ("handshakes",)),
    "connections": Scenario("GET on many connections", "us", take_connections, ("load",)),
    "latency": Scenario(f"latency at {RATE} requests/s, {IDLE} idle connections beside", "us", take_latency, ("load",))}


# ------------------------------------------------------------------------------------------------------------ Results

def rows_of(samples: dict[str, list]) -> list[dict]:
    """What a table shows; ratios are to the first row."""
    rows = []
    for label, taken in samples.items():
        values = [sample["value"] for sample in taken]
        errors = sum((Counter(sample["errors"]) for sample in taken), Counter())
        rows.append({"server": label, "median": statistics.median(values), "min": min(values), "max": max(values), "errors": errors,
                     "failed": bool(errors), "bytes": taken[0].get("bytes"), "samples": taken,
                     "note": "; ".join(dict.fromkeys(sample["note"] for sample in taken if sample.get("note")))})
    for row in rows:
        row["first_to_it"] = rows[0]["median"] / row["median"] if not (row["failed"] or rows[0]["failed"]) and row["median"] else None
    return rows


def show(name: str, scenario: Scenario, rows: list[dict]) -> None:
    print(f"\n{name}: {scenario.title}\n  {'':40}{scenario.unit:>9}{'min - max':>22}{'first/it':>9}{'bytes':>10}{'per s':>9}")
    for row in rows:
        rates = [sample["per_second"] for sample in row["samples"] if "per_second" in sample]
        ratio = "failed" if row["failed"] else f"{row['first_to_it']:.2f}" if row["first_to_it"] else ""
        errors = "  errors: " * row["failed"] + ", ".join(f"{kind} {number}" for kind, number in row["errors"].items())
        print(f"  {row['server']:40}{row['median']:9.2f}{row['min']:11.2f} -{row['max']:9.2f}{ratio:>9}{row['bytes'] or '':>10}"
              f"{f'{statistics.median(rates):.0f}' if rates else '':>9}  {row['note']}{errors}", flush=True)


def output(*arguments, **options) -> str:
    """What a program says; nothing if there is no such program."""
    try:
        return subprocess.run(arguments, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options).stdout.strip()
    except OSError:
        return ""


def installed(python: str) -> dict[str, str]:
    """The packages there, with their versions."""
    said = output(python, "-c", "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))")
    return dict(word.split("==") for word in said.split())


# ------------------------------------------------------------------------------------------------------- Installation

def install(base: str, names: list[str]) -> tuple[str, list[str]]:
    """The Python for the other servers, and those of them that can take part."""
    os.environ.update(PATH=os.environ["PATH"] + os.pathsep + "/usr/sbin", DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")  # starts no service
    folder = CACHE / f"python{output(base, '-V')[7:]}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        output(base, "-m", "venv", folder)
    python = str(folder / "bin/python") if folder.exists() else base

    def lacking() -> dict[str, list]:
        packages = installed(python)
        there = {need for need in DEBIAN if shutil.which(need) or Path("/usr/include", need).exists()} | packages.keys()
        return {name: needs for name in [*names, *TOOLS] if (needs := [need for need in {**PEERS, **TOOLS}[name] if need not in there])}

    for need in sorted({need for needs in lacking().values() for need in needs}):
        print("installing", need, flush=True)
        if need in DEBIAN:
            output("apt-get", "update")
            output("apt-get", "install", "-y", "--no-install-recommends", DEBIAN[need])
        else:
            output(python, "-m", "pip", "install", "--disable-pip-version-check", need)
    left_out.update({name: "there is no " + " and no ".join(needs) for name, needs in lacking().items()})
    for name, (source, options) in C_PROGRAMS.items():
        if name in [*names, *TOOLS] and name not in left_out:
            (CACHE / f"{name}.c").write_text(HEADERS + source)
            errors = output("cc", "-O2", "-w", "-o", CACHE / name, CACHE / f"{name}.c", *options.split())
            left_out.update({name: errors} if errors else {})
    return python, [name for name in names if name not in left_out]


# --------------------------------------------------------------------------------------------------------------- main

def arguments() -> argparse.Namespace:
    every, quick = [OURS, *PEERS], "--quick" in sys.argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"scenarios: {','.join(SCENARIOS)}; servers: {','.join(every)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1 s, the main scenarios, few servers, one Python")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all samples there")
    parser.add_argument("--rounds", type=int, default=3 if quick else 5, help="default: 5")
    parser.add_argument("--seconds", type=int, default=1 if quick else 2, help="of a load in a round; default: 2")
    parser.add_argument("--scenarios", metavar="A,B", default=",".join(MAIN if quick else SCENARIOS), help="default: all")
    parser.add_argument("--servers", metavar="A,B", default=",".join(QUICK_PEERS if quick else every), help="default: all; httpd.py always")
    parser.add_argument("--python", action="append", help="for httpd.py, may be repeated; default: every 3.11 and 3.13 of pyenv, or this one")
    parser.add_argument("--httpd", type=Path, default=HERE.parent.parent / "httpd.py", help="the file to measure")
    chosen = parser.parse_args()
    found = [str(path) for number in ("3.11", "3.13") for path in sorted(Path.home().glob(f".pyenv/versions/{number}*/bin/python"))]
    chosen.python = chosen.python or (found or [sys.executable])[:1 if quick else None]
    chosen.scenarios, servers = chosen.scenarios.split(","), chosen.servers.split(",")
    if unknown := [name for name in chosen.scenarios + servers if name not in [*SCENARIOS, *every]]:
        parser.error(f"there is no {', '.join(unknown)}, see --help")
    chosen.servers = [name for name in PEERS if name in servers]
    return chosen


def measure(chosen: argparse.Namespace, work: Path) -> None:
    """One scenario after the other; the file is written after each."""
    shutil.copy(chosen.httpd, work / "httpd.py")                # it may be edited meanwhile
    python, peers = install(chosen.python[0], chosen.servers)
    bench = Bench(work, chosen.rounds, chosen.seconds,
                  {f"{OURS}, {output(path, '-V')[7:]}": {"name": OURS, "python": path} for path in chosen.python}
                  | {name: {"name": name, "python": python} for name in peers})
    tools = {"wrk": ("wrk", "-v"), "nginx": ("nginx", "-v"), "node": ("node", "-v"), "libmicrohttpd": (CACHE / "libmicrohttpd",)}
    found = {tool: re.findall("[0-9]+(?:[.][0-9]+)+", output(*command))[:1] for tool, command in tools.items()}
    versions = {"Python of the others": output(python, "-V")[7:], **{tool: number for tool, numbers in found.items() for number in numbers},
                **{package: number for package, number in installed(python).items() if package in sum(PEERS.values(), [])}}
    cpu = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    result = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cpu": " ".join(cpu), "cores": len(CORES), "kernel": os.uname().release,
              "rounds": chosen.rounds, "seconds": chosen.seconds, "versions": versions, "left_out": left_out, "scenarios": {}}
    print("\n".join(f"{key}: {value}" for key, value in result.items() if value))
    for kind, options in CERTIFICATES.items():
        output("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-newkey", *options,
               "-keyout", work / f"{kind}.key", "-out", work / f"{kind}.crt")
    for name in chosen.scenarios:
        try:
            if lacking := [tool for tool in SCENARIOS[name].needs if tool in left_out]:
                raise NotImplementedError(f"it needs {lacking[0]}")
            rows = SCENARIOS[name].take(bench)
        except NotImplementedError as error:
            left_out[name] = str(error)
            continue
        show(name, SCENARIOS[name], rows)
        result["scenarios"][name] = {"title": SCENARIOS[name].title, "unit": SCENARIOS[name].unit, "rows": rows}
        if chosen.json:                                         # a row is a line
            chosen.json.write_text(json.dumps(result).replace('{"server":', '\n{"server":') + "\n")
    print("\nleft out:", *(f"\n  {name}: {why}" for name, why in left_out.items() or [("nothing", "all took part")]))


def main() -> None:
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # through every `finally`
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)                     # PR_SET_CHILD_SUBREAPER: what servers leave behind comes to us
    resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1:] * 2)
    gc.disable()                                                # no pauses in what is timed
    with tempfile.TemporaryDirectory(prefix="httpd-bench-", dir="/dev/shm", ignore_cleanup_errors=True) as work:
        measure(chosen, Path(work))


if __name__ == "__main__":
    main()
