"""The programs that bench.py runs: httpd.py and its peers, and what is put before a load generator.

Each finds its settings in the environment, as granian's worker does: BENCH is a JSON object.
"""

OURS = "httpd.py"
COMMON = """
import json, os, time
from email.utils import formatdate
S = json.loads(os.environ["BENCH"])
PORT, APP, THREADS = S["port"], S["app"], S["threads"]
BODY = open(S["content"], "rb").read()
FIELDS = [("Content-Type", S["type"]), ("Content-Length", str(len(BODY)))]
def fields():
    return FIELDS
def listed(environ, start_response):
    start_response("200 OK", fields())
    return [BODY]
def generated(environ, start_response):
    start_response("200 OK", fields())
    yield BODY[:7]
    yield BODY[7:]
def uploaded(environ, start_response):
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return listed(environ, start_response)
def flask():
    import flask
    app = flask.Flask("bench")
    app.add_url_rule("/hello", view_func=lambda: BODY.decode())
    return app
def bottle():
    import bottle
    app = bottle.Bottle()
    app.route("/hello", callback=lambda: BODY)
    return app
def django():
    from types import ModuleType
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse
    from django.urls import path
    urls = ModuleType("urls")
    urls.urlpatterns = [path("hello", lambda request: HttpResponse(BODY))]
    if not settings.configured:                                 # granian's worker loads this twice
        settings.configure(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None)
    return get_wsgi_application()
wsgi = globals().get(APP, listed)
if APP in ("flask", "bottle", "django"):
    wsgi = wsgi()
BINARY = [(name.lower().encode(), value.encode()) for name, value in FIELDS]
async def asgi(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": BINARY})
    await send({"type": "http.response.body", "body": BODY})
"""
GRANIAN = """
import granian
if __name__ == "__main__":                                      # its worker imports this, too
    granian.Granian(__file__ + ":KIND", address="127.0.0.1", port=PORT, interface="KIND", loop="LOOP",
                    log_enabled=False, websockets=False, backpressure=20000).serve()
"""
GUNICORN = """
from gunicorn.app.base import BaseApplication
class Application(BaseApplication):
    def load_config(self):
        for name, value in dict(bind="127.0.0.1:%d" % PORT, worker_class="KIND", THREADS).items():
            self.cfg.set(name, value)
    def load(self):
        return wsgi
Application().run()
"""
PROGRAMS = {
    OURS: """
import httpd
def page(request, page):
    page.write(BODY)
def posted(request, page):
    len(request.body)
    page.write(BODY)
def stream(request, page):
    page.set_header("Content-Length", str(len(BODY)))
def flush(request, pos, buf):
    size = min(len(buf), len(BODY) - pos)
    buf[:size] = memoryview(BODY)[pos:pos + size]
    return size or httpd.END
handlers = {"page": [page], "posted": [posted], "stream": [stream, flush]}
if APP in handlers:
    httpd.register_httpdcb("bench", "hello", *handlers[APP])
else:
    httpd.register_wsgi("bench", "", wsgi, threads=THREADS)
for number in range(1, S["roots"]):
    httpd.register_httpdcb("bench", "root%d" % number, page)
for module in S["modules"]:
    httpd.loadmodule(module)
httpd.run(ip="127.0.0.1", port=PORT, **S["parameters"])
""",
    "bjoern": """
import bjoern
second = 0
def fields():                                                   # it has no Date of its own
    global second, dated
    if int(time.time()) != second:
        second = int(time.time())
        dated = [("Date", formatdate(usegmt=True)), *FIELDS]
    return dated
bjoern.run(wsgi, "127.0.0.1", PORT)
""",
    "granian-wsgi": GRANIAN.replace("KIND", "wsgi").replace("LOOP", "asyncio"),
    "granian-asgi": GRANIAN.replace("KIND", "asgi").replace("LOOP", "uvloop"),
    "uvicorn": """
import uvicorn
uvicorn.run(asgi, host="127.0.0.1", port=PORT, http="httptools", loop="uvloop", lifespan="off",
            log_level="critical", access_log=False, server_header=False, timeout_keep_alive=60)
""",
    "aiohttp": """
import uvloop
from aiohttp import web
async def hello(request):
    return web.Response(body=BODY, headers=dict(FIELDS[:1]))
uvloop.install()
application = web.Application()
application.router.add_get("/hello", hello)
web.run_app(application, host="127.0.0.1", port=PORT, access_log=None, print=None)
""",
    "waitress": """
import waitress
waitress.serve(wsgi, host="127.0.0.1", port=PORT, threads=THREADS)
""",
    "cheroot": """
from cheroot.wsgi import Server
Server(("127.0.0.1", PORT), wsgi, numthreads=THREADS, request_queue_size=1024).start()
""",
    "gunicorn-sync": GUNICORN.replace("KIND", "sync").replace("THREADS", "workers=1"),
    "gunicorn-gthread": GUNICORN.replace("KIND", "gthread").replace("THREADS", "threads=THREADS"),
    "http.server": """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1                                               # as shipped, it sends twice
    def do_GET(self):
        self.send_response_only(200)
        self.send_header("Date", self.date_time_string())
        for field in FIELDS + [("Connection", "close")] * self.close_connection:
            self.send_header(*field)
        self.end_headers()
        self.wfile.write(BODY)
ThreadingHTTPServer.request_queue_size = 1024
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""}
NODE = """
const settings = JSON.parse(process.env.BENCH);
const content = require("fs").readFileSync(settings.content);
const server = require("http").createServer((request, response) => {
    if (response.shouldKeepAlive) response.removeHeader("Connection");
    response.writeHead(200, {"Content-Type": settings.type, "Content-Length": content.length});
    response.end(content);
});
server.keepAliveTimeout = 60000;
server.listen(settings.port, "127.0.0.1", 1024);
"""
# A large response is a file in memory, without sendfile: read() copies it as flush_data_cb does.
NGINX = """
worker_processes 1; daemon off; pid nginx.pid; error_log /dev/null crit; user root;
events { worker_connections 20000; }
http {
    access_log off; server_tokens off; keepalive_requests 1000000000; sendfile off;
    default_type "$type";
    client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4;
    scgi_temp_path t5;
    ssl_certificate $folder/../tls.crt; ssl_certificate_key $folder/../tls.key;
    ssl_protocols TLSv1.3; ssl_ecdh_curve X25519;
    server { listen 127.0.0.1:$listen backlog=1024; location /hello { $content; } }
}
"""
# With -DMI it does for a call what OpenSIPS' modules httpd and mi_http do: it looks through the fields for
# the type, gathers the content, parses it with cJSON, looks the command up, builds the answer as a tree,
# has it printed into the one page, and that copied into a response. Allocator, logs, select() are missing.
MICROHTTPD = r"""
#define _GNU_SOURCE
#include <microhttpd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>
static char content[1 << 16], *type;
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
    {"uptime"}, {"version"}, {"pwd"}, {"arg"}, {"which"}, {"ps"}, {"kill"},
    {"httpd_list_root_path", list_root_path}, {0}};
static void *begin(void) { return calloc(1, sizeof(struct call)); }
static void gather(struct call *call, const char *data, size_t more) {
    if (call->size + more >= sizeof call->text) return;
    memcpy(call->text + call->size, data, more), call->size += more;
}
static void finish(struct call *call, struct MHD_Connection *connection) {
    const char *kind = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Type");
    cJSON *request = kind && !strncasecmp(kind, "application/json", 16) ? cJSON_Parse(call->text) : 0;
    const char *version = cJSON_GetStringValue(cJSON_GetObjectItem(request, "jsonrpc"));
    const char *method = cJSON_GetStringValue(cJSON_GetObjectItem(request, "method"));
    cJSON *answer = cJSON_CreateObject();
    int i = 0;
    while (commands[i].name && (!method || strcmp(commands[i].name, method))) i++;
    cJSON_AddStringToObject(answer, "jsonrpc", "2.0");
    if (commands[i].run && version && !strcmp(version, "2.0"))
        cJSON_AddItemToObject(answer, "result", commands[i].run());
    cJSON_AddItemToObject(answer, "id", cJSON_Duplicate(cJSON_GetObjectItem(request, "id"), 1));
    cJSON_PrintPreallocated(answer, content, sizeof content, 0);
    size = strlen(content), cJSON_Delete(answer), cJSON_Delete(request), free(call);
}
#endif
static enum MHD_Result answer(
        void *c, struct MHD_Connection *connection, const char *url, const char *method,
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
int main(int count, char **arguments) {         /* port, type, file with the content */
    type = arguments[2];
    size = fread(content, 1, sizeof content, fopen(arguments[3], "rb"));
    struct MHD_Daemon *daemon = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_USE_INTERNAL_POLLING_THREAD, atoi(arguments[1]), 0, 0, answer, 0,
        MHD_OPTION_CONNECTION_LIMIT, 20000u, MHD_OPTION_END);
    while (daemon) pause();
}
"""
# wrk does not mean to, but by SSL_clear() it resumes its sessions. Put before OpenSSL, this forgets them.
HANDSHAKES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
int SSL_in_before(void *), SSL_set_session(void *, void *), SSL_session_reused(void *);
static int resumed;
int SSL_connect(void *ssl) {
    if (SSL_in_before(ssl)) SSL_set_session(ssl, (void *)0);
    int result = ((int (*)(void *))dlsym(RTLD_NEXT, "SSL_connect"))(ssl);
    resumed += result == 1 && SSL_session_reused(ssl);
    return result;
}
__attribute__((destructor)) static void tell(void) { printf("RESUMED %d\n", resumed); }
"""
C_PROGRAMS = {
    "libmicrohttpd": (MICROHTTPD, "-lmicrohttpd"),
    "mi-in-C": (MICROHTTPD, "-DMI -lmicrohttpd -lcjson"),
    "handshakes": (HANDSHAKES, "-shared -fPIC")}
# What wrk sends. The name of a run, its first argument, makes the URLs of a run its own.
CALL = '{"jsonrpc":"2.0","id":1,"method":"httpd_list_root_path"}'
ANSWER = ('{"jsonrpc":"2.0","result":[{"http_root":"mi","module":"mi_http"},'
          '{"http_root":"hello","module":"bench"}],"id":1}')
BROWSER = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "Accept-Language": "en-US,en;q=0.5", "Accept-Encoding": "gzip, deflate, br, zstd", "DNT": "1",
    "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none",
    "Priority": "u=0, i"}                                               # Host makes ten
NEW_URL = """
local run, number, fields = "", 0, {LIST}
init = function(arguments) run = arguments[1] end
request = function()
    number = number + 1
    NEVER_SEEN
    return wrk.format("GET", "/hello?n=" .. run .. number, fields)
end
""".replace("LIST", ", ".join('["%s"] = "%s"' % field for field in BROWSER.items()))
POST = 'wrk.method, wrk.body, wrk.headers["Content-Type"] = "POST", %s, "%s"\n'
SCRIPTS = {
    "get": "",
    "new-url": NEW_URL.replace("NEVER_SEEN", ""),
    "never-seen": NEW_URL.replace("NEVER_SEEN", 'fields["X-Request-Id"] = "id-" .. run .. number'),
    "pipelined": "local all\ninit = function() all = string.rep(wrk.format('GET'), 16) end\n"
                 "request = function() return all end",
    "new-connection": 'wrk.headers["Connection"] = "close"',
    "post-400": POST % ("string.rep('x', 400)", "application/octet-stream"),
    "post-64k": POST % ("string.rep('x', 65536)", "application/octet-stream"),
    "mi": POST % ("[[%s]]" % CALL, "application/json") + "wrk.path = '/mi'"}
DONE = """
done = function(all)
    local e = all.errors
    print("RESULT", all.requests, all.bytes, e.connect + e.read + e.write + e.status + e.timeout)
end
"""
