"""Tests of httpd.py, in the order of the file. A row is (raw bytes, what must come of it, why)."""
import ast
import contextlib
import errno
import gc
import http.client
import io
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import httpd

HERE = pathlib.Path(__file__).parent
HOST = b"Host: example\r\n"


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """What a test registers, it does not leave behind."""
    for name in ("params", "roots", "mi_commands"):
        monkeypatch.setattr(httpd, name, dict(getattr(httpd, name)))
    for name in ("loaded", "pending_inits"):
        monkeypatch.setattr(httpd, name, [])
    monkeypatch.setattr(httpd, "known_methods", set(httpd.known_methods))
    monkeypatch.setattr(sys, "path", list(sys.path))


def echo(request, page):
    """Says what it has understood."""
    names = ("method", "target", "version", "path", "url", "query", "root", "scheme")
    json.dump({**{name: getattr(request, name) for name in names}, "headers": dict(request.headers), "body": request.body.decode("latin-1")}, page)
    return 200


@pytest.fixture
def server():
    """A server in this thread: it does something only when `exchange` says so. The root echo takes everything."""
    httpd.register_httpdcb("test", "echo", echo, content_type="application/json", methods=("GET", "POST", "PUT"))
    server = httpd.Server(ip="127.0.0.1", port=0, max_header_size=4096)
    yield server
    server.stop(0)


class Wire(io.BytesIO):
    """Bytes as http.client wants them: what we send must be readable by others."""

    def makefile(self, mode):
        return self

    def close(self):
        pass


class Answer:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    def json(self):
        return json.loads(self.body)


def answers(data, methods="GET"):
    """The responses that stand in `data`, taken apart by http.client; nothing may be left over."""
    wire, found = Wire(data), []
    while wire.tell() < len(data):
        response = http.client.HTTPResponse(wire, method=methods if isinstance(methods, str) else methods[len(found)])
        response.begin()
        while response.status == 100:
            response.begin()
        found.append(Answer(response))
    return found


def connect(server, **options):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10, **options)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def pump(server, client, patience=2):
    """Let the server work until nothing comes any more. Returns what came, and whether the server has ended the connection."""
    data, quiet = b"", 0
    client.setblocking(False)
    while quiet < patience:
        server.run_once(0.003 * quiet)
        try:
            more = client.recv(1 << 20)
        except BlockingIOError:
            quiet += 1
            continue
        except ConnectionResetError:
            return data, "reset"
        if not more:
            return data, "closed"
        data, quiet = data + more, 0
    return data, "open"


def exchange(server, *pieces, half_close=False):
    """Send each piece by itself, and let the server work after each; returns the bytes that came and how it ended."""
    with connect(server) as client:
        received = b""
        for piece in pieces:
            client.setblocking(True)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(piece)
            data, end = pump(server, client, 1)
            received += data
        if half_close and end == "open":
            client.shutdown(socket.SHUT_WR)
            data, end = pump(server, client, 50)
        elif end == "open":
            data, end = pump(server, client)
        else:
            data = b""
        return received + data, end


CUTS = {"whole": lambda raw: [raw],
        "bytes": lambda raw: [raw[i:i + 1] for i in range(len(raw))],
        "random": lambda raw: cut_at_random(raw, random.Random(len(raw)))}


def cut_at_random(raw, chance):
    places = sorted({0, len(raw), *(chance.randrange(len(raw)) for _ in range(chance.randrange(1, 8)))})
    return [raw[a:b] for a, b in zip(places, places[1:])]


def rows(table):
    """Each row of a table, in the three cuts."""
    return [pytest.param(raw, expected, cut, id="%s, %s" % (why, cut)) for raw, expected, why in table for cut in CUTS]


def get(path=b"/echo", *fields):
    return b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def post(content, *fields, path=b"/echo"):
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n" % len(content) + b"".join(f + b"\r\n" for f in fields) + b"\r\n" + content


def chunked(content, *fields):
    return b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n" + b"".join(f + b"\r\n" for f in fields) + b"\r\n" + content


# ---------------------------------------------------------------------------------------------------------- Parameters

MODPARAM_ROWS = [
    ("port", 1024, 1024, "lowest port"),
    ("port", "8000", 8000, "a number as text, as the CLI and the file give it"),
    ("port", 0, 0, "any free port"),
    ("port", 1023, "port must be 0 or 1024 to 65535, not 1023", "a port below the bound"),
    ("port", 65536, "port must be 0 or 1024 to 65535", "a port above the bound"),
    ("port", "8888x", "port must be a whole number, not '8888x'", "rubbish behind a number"),
    ("port", "1_000", "must be a whole number", "int() would take the underscore"),
    ("port", "\u0663", "must be a whole number", "int() would take Arabic digits"),
    ("port", " 8888", "must be a whole number", "int() would take the blank"),
    ("port", "+8888", "must be a whole number", "int() would take the sign"),
    ("port", 8888.0, "must be a whole number", "a float is no port"),
    ("port", True, "must be a whole number", "nor is a bool"),
    ("post_buf_size", 256, 256, "lowest post_buf_size"),
    ("post_buf_size", 255, "post_buf_size must be at least 256, not 255", "post_buf_size below the bound"),
    ("post_buf_size", -1, "must be at least 256", "a negative size"),
    ("conn_timeout", "0.5", 0.5, "parts of a second"),
    ("conn_timeout", "nan", "must be a number of seconds", "nan is no time"),
    ("conn_timeout", float("nan"), "must be at least 0", "nan from Python neither"),
    ("conn_timeout", -1, "must be at least 0", "a negative time"),
    ("ip", "", "", "every address"),
    ("ip", "*", "*", "every address, as nginx writes it"),
    ("ip", "::1", "::1", "IPv6"),
    ("ip", "localhost", "ip must be an IPv4 or IPv6 address", "a name is no address"),
    ("ip", "127.1", "must be an IPv4 or IPv6 address", "nor is half an address"),
    ("ip", 127, "ip must be text", "a number is no text"),
    ("prot", 1, 'httpd: unknown parameter "prot", did you mean "port"?', "a typing error"),
    ("zzzzzz", 1, 'httpd: unknown parameter "zzzzzz"', "nothing near"),
    ("tls_cert_file", pathlib.Path("/x"), "/x", "a path object"),
]


@pytest.mark.parametrize("name, value, expected, why", MODPARAM_ROWS, ids=[row[3] for row in MODPARAM_ROWS])
def test_modparam(name, value, expected, why):
    if isinstance(expected, str) and expected != value and not isinstance(value, pathlib.Path):
        with pytest.raises(httpd.ConfigError, match=re.escape(expected)):
            httpd.modparam("httpd", name, value)
        assert name not in httpd.params.get("httpd", {})
    else:
        httpd.modparam("httpd", name, value)
        assert httpd.in_force("httpd")[name] == expected


def test_keywords_come_before_modparam():
    httpd.modparam("httpd", "max_header_size", 512)
    assert httpd.Server().params.max_header_size == 512
    assert httpd.Server(max_header_size="1024").params.max_header_size == 1024
    with pytest.raises(httpd.ConfigError, match='"max_heder_size", did you mean "max_header_size"'):
        httpd.Server(max_heder_size=512)


@pytest.mark.parametrize("values, message", [
    (dict(tls_cert_file="/x"), "tls"),
    (dict(tls_key_file="/x"), "tls"),
    (dict(post_buf_size=10 ** 7), r"memory_budget 4194304 has no room .* at least 20032772"),
    (dict(buf_size=10 ** 7), "memory_budget .* at least"),
])
def test_what_does_not_go_together(values, message):
    with pytest.raises(httpd.ConfigError, match=message):
        httpd.Server(**values)
    if "budget" in message:         # and what the message says to do, does it
        with pytest.raises(httpd.ConfigError) as error:
            httpd.Server(**values)
        httpd.Server(memory_budget=int(str(error.value).split()[-1]), **values)


def config(tmp_path, text):
    path = tmp_path / "test.cfg"
    path.write_text(text, encoding="utf-8")
    return str(path)


CONFIG_ROWS = [
    ('[httpd]\nport = 8000', {"port": 8000}, "INI"),
    ('\ufeff[httpd]\nport = 8000', {"port": 8000}, "a byte order mark"),
    ('  [ httpd ]\r\n  port=8000\r\n', {"port": 8000}, "blanks and CRLF"),
    ('# a\n; b\n\n[httpd] # c\nport = 8000 ; d\nip = "127.0.0.1" # e', {"port": 8000, "ip": "127.0.0.1"}, "comments"),
    ('[httpd]\ntls_key_file = "/a ;b #c"', {"tls_key_file": "/a ;b #c"}, "quotes protect a comment sign"),
    ('[httpd]\ntls_key_file = /a;b#c%d', {"tls_key_file": "/a;b#c%d"}, "no blank before it, no comment; % needs no escaping"),
    (r'[httpd]' '\n' r'tls_key_file = "a\"b\\c\d"', {"tls_key_file": r'a"b\c\d'}, "backslashes in quotes"),
    ('[httpd]\nip =', {"ip": ""}, "an empty value"),
    ('[httpd]\nip = # none', {"ip": ""}, "an empty value and a comment"),
    ('modparam("httpd", "ip", "")', {"ip": ""}, "OpenSIPS' manual: ip"),
    ('modparam("httpd", "port", 8000)', {"port": 8000}, "OpenSIPS' manual: port"),
    ('modparam("httpd", "buf_size", 524288)', {"buf_size": 524288}, "OpenSIPS' manual: buf_size"),
    ('modparam("httpd", "post_buf_size", 4096)', {"post_buf_size": 4096}, "OpenSIPS' manual: post_buf_size"),
    ('modparam("httpd", "tls_cert_file", "/etc/pki/tls/certs/opensips.pem")', {"tls_cert_file": "/etc/pki/tls/certs/opensips.pem"}, "manual: certificate"),
    ('modparam("httpd", "tls_key_file", "/etc/pki/tls/private/opensips.key")', {"tls_key_file": "/etc/pki/tls/private/opensips.key"}, "manual: key"),
    ('modparam("httpd", "tls_ciphers", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2")', {"tls_ciphers": "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2"},
     "manual: ciphers"),
    ('loadmodule "httpd.so"\nloadmodule "/usr/lib/opensips/modules/mi_http.so"; # both\nmodparam( "mi_http" ,"root","x" ) ;', {}, "OpenSIPS' loadmodule"),
    ('[httpd]\nprot = 1', ['2: httpd: unknown parameter "prot", did you mean "port"?'], "an unknown name"),
    ('[httpd]\nport = 1023\npost_buf_size = 255\n\nfoo\nip = ::g', ["2: httpd: port must be 0 or 1024 to 65535, not '1023'",
     "3: httpd: post_buf_size must be at least 256, not '255'", "5: cannot read 'foo'", "6: httpd: ip must be"], "every problem, not only the first"),
    ('port = 8000', ["1: cannot read 'port = 8000': write [module]"], "no section"),
    ('[httpd]\nport = 1\nport = 8000\nport = 8001', ["2: httpd: port must be", "3: httpd: port is set already, at %s:2", "4: httpd: port is set already"],
     "set twice"),
    ('modparam("mi_http", "root", "x")', ['1: mi_http: is not loaded: write loadmodule "mi_http.so"'], "a parameter of what is not loaded"),
    ('[mi_htp]', ['1: mi_htp: cannot be loaded: ModuleNotFoundError: ', 'did you mean "mi_http"'], "an unknown module"),
    ('[mi_http]\nroot = a/b', ["2: mi_http: root must be one path segment of letters, digits and _, not 'a/b'"], "a bad root"),
    ('[httpd]\nip = "127.0.0.1', ["2: cannot read"], "an open quote"),
    ('[httpd]\nip = "127.0.0.1"# e', ["2: cannot read"], "a comment without a blank before it"),
    ('modparam("httpd", "port", )', ["1: cannot read"], "no value"),
    ('[httpd]\n= 3', ["2: cannot read"], "no name"),
]


@pytest.mark.parametrize("text, expected", [row[:2] for row in CONFIG_ROWS], ids=[row[2] for row in CONFIG_ROWS])
def test_load_config(tmp_path, text, expected):
    path = config(tmp_path, text)
    if isinstance(expected, dict):
        httpd.load_config(path)
        values = httpd.in_force("httpd")
        assert {name: values[name] for name in expected} == expected
        return
    with pytest.raises(httpd.ConfigError) as error:
        httpd.load_config(path)
    lines = str(error.value).split("\n")
    for part in expected:
        part = part.replace("%s", path)
        assert any(line.startswith("%s:%s" % (path, part)) or not part[0].isdigit() and part in line for line in lines), (part, lines)
    assert len(lines) == sum(part[0].isdigit() for part in expected)


def test_config_files_that_cannot_be_read(tmp_path):
    with pytest.raises(httpd.ConfigError, match="^/nowhere/x.cfg: cannot be read: No such file or directory$"):
        httpd.load_config("/nowhere/x.cfg")
    with pytest.raises(httpd.ConfigError, match="cannot be read: Is a directory$"):
        httpd.load_config(str(tmp_path))
    (tmp_path / "latin").write_bytes(b"[httpd]\nip = \xe4")
    with pytest.raises(httpd.ConfigError, match="latin: cannot be read: 'utf-8' codec"):
        httpd.load_config(str(tmp_path / "latin"))


def test_overrides(tmp_path):
    path = config(tmp_path, "[httpd]\nport = 8000\n[mi_http]")
    httpd.load_config(path, ["port=9000", "mi_http.root=other"])
    assert httpd.in_force("httpd")["port"] == 9000 and "other" in httpd.roots
    with pytest.raises(httpd.ConfigError, match='^-o prot=1: httpd: unknown parameter "prot", did you mean "port"\\?$'):
        httpd.load_config(config(tmp_path, ""), ["prot=1"])
    with pytest.raises(httpd.ConfigError, match="^-o port: httpd: port must be a whole number, not ''$"):
        httpd.load_config(config(tmp_path, ""), ["port"])


def test_modules_of_the_user(tmp_path):
    (tmp_path / "beside_config.py").write_text("import httpd\ndef mod_init(params):\n    httpd.register_httpdcb('beside', params['where'], print)\n")
    (tmp_path / "fails_in_init.py").write_text("def mod_init(params):\n    1 / 0\n")
    (tmp_path / "takes_the_root.py").write_text("import httpd\ndef mod_init(params):\n    httpd.register_httpdcb('taker', 'here', print)\n")
    with pytest.raises(httpd.ConfigError) as error:
        httpd.load_config(config(tmp_path, "[beside_config]\nwhere = here\n[fails_in_init]\n[takes_the_root]\n"))
    problems = str(error.value).split("\n")
    assert "beside" == httpd.roots["here"].module and httpd.loaded == ["beside_config"]
    assert problems[0].endswith("test.cfg:3: fails_in_init: cannot be loaded: ZeroDivisionError: division by zero")
    assert problems[1].endswith('test.cfg:4: taker: root path "here" is taken by beside')
    with pytest.raises(httpd.ConfigError, match="beside_config: is loaded already"):
        httpd.loadmodule("beside_config")


# ------------------------------------------------------------------------------------------------------------ Registry

ROOT_ROWS = [("x", "x", "letters"), (" x_1\t", "x_1", "blanks are trimmed"), ("", "", "the root of everything else"), ("A", "A", "case counts"),
             ("a/b", None, "two segments"), ("/a", None, "a slash"), ("a-b", None, "a dash"), ("ä", None, "no ASCII letter"), ("٣", None, "no ASCII digit"),
             ("a\n", "a", "a line end is a blank"), ("a\nb", None, "a line end inside"), (None, None, "no text"), ("echo", None, "a root that is taken")]


@pytest.mark.parametrize("root, name", [row[:2] for row in ROOT_ROWS], ids=[row[2] for row in ROOT_ROWS])
def test_root_paths(server, root, name):                # OPENSIPS, never 12
    if name is None:
        with pytest.raises(httpd.ConfigError, match="is taken by test|must be one path segment"):
            httpd.register_httpdcb("other", root, echo)
        assert len(httpd.roots) == 1
    else:
        httpd.register_httpdcb("other", root, echo)
        assert httpd.roots[name].module == "other"


@pytest.mark.parametrize("arguments, message", [
    (dict(access_handler_cb=3), "no function: 3"), (dict(flush_data_cb=print), "no flush_data_cb"), (dict(methods="GET"), "methods must be a tuple of names"),
    (dict(methods=("G T",)), "methods must be a tuple of names"), (dict(methods=("TRACE",)), "not CONNECT or TRACE"), (dict(methods=(3,)), "methods must be")])
def test_registrations_that_cannot_work(arguments, message):
    with pytest.raises(httpd.ConfigError, match=message):
        httpd.register_httpdcb(**{"module": "m", "root_path": "x", "access_handler_cb": echo, **arguments})
    with pytest.raises(ValueError):
        httpd.register_httpdcb("m", "x", echo, content_type="text/html\r\nX: y")


MATCH_ROWS = [(b"/echo", "", "the root"), (b"/echo/", "/", "with a slash"), (b"/echo/x", "/x", "below it"), (b"/echo//x/", "//x/", "slashes are kept"),
              (b"/echo?a=/x", "", "the query does not matter"), (b"/%65cho/%41%2f", "/A/", "decoded once, before matching"), (b"/echo%3fx", None, "? decoded"),
              (b"/echo%2Fx", "/x", "a decoded slash is a slash"), (b"/echo/%2541", "/%41", "decoded only once"), (b"/echo/%C3%A4", "/ä", "UTF-8"),
              (b"/echo/%ff", "/\ufffd", "no UTF-8"), (b"/echox", None, "a longer name"), (b"/ECHO", None, "another case"), (b"//echo", None, "an empty segment"),
              (b"/", None, "no name"), (b"/ech", None, "a shorter name"), (b"/x/echo", None, "below another"), (b"http://h/echo/x", "/x", "absolute-form")]


@pytest.mark.parametrize("target, url", [row[:2] for row in MATCH_ROWS], ids=[row[2] for row in MATCH_ROWS])
def test_matching(server, target, url):
    answer, = answers(exchange(server, get(target))[0])
    assert answer.status == (200 if url is not None else 404)
    if url is not None:
        assert answer.json()["url"] == url and answer.json()["root"] == "echo"
        return
    httpd.register_httpdcb("test", "", echo)            # what nobody takes goes to the root ""
    answer, = answers(exchange(server, get(target))[0])
    assert answer.status == 200 and answer.json()["url"] == answer.json()["path"] and answer.json()["root"] == ""


def test_unregister(server):
    httpd.unregister_httpdcb(" echo ")
    assert answers(exchange(server, get())[0])[0].status == 404
    with pytest.raises(httpd.ConfigError, match='root path "echo" is not registered'):
        httpd.unregister_httpdcb("echo")


def test_a_root_registered_while_serving_is_there_at_once(server, caplog):
    assert answers(exchange(server, get(b"/new"))[0])[0].status == 404
    called = []
    httpd.register_httpdcb("test", "new", lambda request, page: called.append("request") or 200, None, lambda: called.append("init"))
    httpd.register_httpdcb("test", "bad", echo, None, lambda: 1 / 0)
    assert answers(exchange(server, get(b"/new") * 2)[0])[0].status == 200 and called == ["init", "request", "request"]
    assert answers(exchange(server, get(b"/bad"))[0])[0].status == 200 and "an init_proc_cb failed" in caplog.text


def test_init_proc_cb_runs_once_before_the_first_request():
    calls = []
    httpd.register_httpdcb("test", "x", lambda request, page: calls.append("request") or 200, None, lambda: calls.append("init"))
    for _ in range(2):
        with httpd.Server(ip="127.0.0.1", port=0) as server:
            with connect(server) as client:
                client.sendall(get(b"/x"))
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert calls == ["init", "request", "request"]


def test_a_failing_init_proc_cb_fails_the_start(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    httpd.register_httpdcb("test", "x", echo, init_proc_cb=lambda: 1 / 0)
    server = httpd.Server(ip="127.0.0.1", port=0)
    port = server.port
    with pytest.raises(RuntimeError, match="init_proc_cb"):
        server.start()
    assert_free(port)


def assert_free(port, host="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


METHOD_ROWS = [
    (b"GET", [200], "GET"), (b"HEAD", [200], "HEAD comes with GET"), (b"PUT", [200], "a listed one"), (b"DELETE", [405], "a known one, not listed"),
    (b"TRACE", [405], "TRACE is refused"), (b"OPTIONS", [204], "OPTIONS is the server's"), (b"POSTX", [501], "OPENSIPS, never 9: no prefix"),
    (b"get", [501], "case counts"), (b"BREW", [501], "unknown"), (b"PROPFIND", [501], "unknown to us")]


@pytest.mark.parametrize("method, statuses", [row[:2] for row in METHOD_ROWS], ids=[row[2] for row in METHOD_ROWS])
def test_methods(server, method, statuses):
    raw, end = exchange(server, get().replace(b"GET", method))
    answer, = answers(raw, method.decode())
    assert [answer.status] == statuses
    if answer.status in (204, 405):
        assert answer.headers["Allow"] == "GET, POST, PUT, HEAD, OPTIONS"
    if answer.status == 204:
        assert "Content-Length" not in answer.headers and "Content-Type" not in answer.headers


def test_methods_of_ones_own(server):
    httpd.register_httpdcb("test", "pot", echo, methods=("BREW",))
    assert answers(exchange(server, get(b"/pot").replace(b"GET", b"BREW"))[0])[0].status == 200
    assert answers(exchange(server, get(b"/echo").replace(b"GET", b"BREW"))[0])[0].status == 405
    head, = answers(exchange(server, get(b"/pot").replace(b"GET", b"HEAD"))[0], "HEAD")
    assert head.status == 405 and head.headers["Allow"] == "BREW, OPTIONS"


def test_options_of_the_server_as_a_whole(server):
    answer, = answers(exchange(server, get(b"*").replace(b"GET", b"OPTIONS"))[0])
    assert answer.status == 204 and "GET" in answer.headers["Allow"]


# ---------------------------------------------------------------------------------------------------- Request and Page

def ask(server, handler, raw=get(b"/h"), **options):
    """The answer of a handler to one request."""
    httpd.register_httpdcb("test", "h", handler, **options)
    try:
        return answers(exchange(server, raw)[0], raw.split(b" ")[0].decode())[0]
    finally:
        httpd.unregister_httpdcb("h")


def test_what_a_request_says(server):
    seen = []
    raw = get(b"/h/a%20b?x=1&y=%C3%A4", b"X-A: 1", b"x-a:\t2 ", b"Cookie: a=1", b"Cookie: b=2", b"X-Latin: \xe4", b"X_Y: z")
    ask(server, lambda request, page: seen.append(request) or 200, raw)
    server.run_once(0)                                      # it sees that the client is gone
    request, = seen
    assert (request.method, request.version, request.scheme, request.root) == ("GET", "HTTP/1.1", "http", "h")
    assert (request.target, request.path, request.url, request.query) == ("/h/a%20b?x=1&y=%C3%A4", "/h/a b", "/a b", "x=1&y=%C3%A4")
    assert dict(request.headers) == {"host": "example", "x-a": "1, 2", "cookie": "a=1; b=2", "x-latin": "\xe4", "x_y": "z"}
    assert request.client[0] == "127.0.0.1" and request.body == b"" and request.state is None and request.closed
    with pytest.raises(TypeError):
        request.headers["x"] = "a head is shared by the requests that have it"
    with pytest.raises(AttributeError):
        request.method = "POST"


def test_server_and_client_address(server):
    def where(request, page):
        json.dump([request.client, request.server, request.closed], page)
        return 200
    assert ask(server, where).json()[1:] == [["127.0.0.1", server.port], False]


FORM = b"application/x-www-form-urlencoded"
MULTIPART = (b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--XX\r\ncontent-disposition: form-data; name="arg"\r\n\r\n\r\n--XX\r\n'
             b'Content-Disposition: form-data; name="f"; filename="a;\\"b.bin"\r\nContent-Type: application/octet-stream\r\n\r\n\x00\r\n--X\xff\r\n--XX--\r\n')
LOOKUP_ROWS = [
    (get(b"/h?a=1"), "a", "1", "a query"), (get(b"/h?arg=1"), "a", None, "OPENSIPS, never 10: arg does not answer for a"),
    (get(b"/h?a=1"), "arg", None, "nor a for arg"), (get(b"/h?a=1&a=2"), "a", "1", "the first one"), (get(b"/h?a="), "a", "", "an empty one"),
    (get(b"/h?a"), "a", "", "one without ="), (get(b"/h?a=%26%3D+b"), "a", "&= b", "decoded"), (get(b"/h?%61=1"), "a", "1", "a decoded name"),
    (post(b"a=1&b=%C3%A4", b"Content-Type: " + FORM, path=b"/h"), "b", "\xe4", "an urlencoded body"),
    (post(b"a=2", b"Content-Type: " + FORM, path=b"/h?a=1"), "a", "1", "the query before the body"),
    (post(b"a=1", b"Content-Type: " + FORM.title() + b" ; charset=utf-8", path=b"/h"), "a", "1", "the type in any case, with parameters"),
    (post(b"a=1", b"Content-Type: text/plain", path=b"/h"), "a", None, "a body that is no form"),
    (post(b"a=" + b"x" * 1000, b"Content-Type: " + FORM, path=b"/h"), "a", "x" * 1000, "a large value (OPENSIPS, never 7)"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", "1", "multipart"),
    (post(MULTIPART, b'Content-Type: multipart/form-data; boundary="XX"', path=b"/h"), "arg", "", "multipart, empty, quoted boundary"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "f",
     ["a;\"b.bin", "application/octet-stream", "\x00\r\n--X\xff"], "a file"),
    (post(MULTIPART[:-4], b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", 400, "multipart without its end"),
    (post(MULTIPART, b"Content-Type: multipart/form-data", path=b"/h"), "a", 400, "no boundary"),
    (post(MULTIPART.replace(b'name="a"', b"x"), b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", 400, "a part without a name"),
    (post(b"", b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", 400, "empty multipart"),
    *((post(MULTIPART, b"Content-Type: multipart/form-data; " + bad, path=b"/h"), "a", 400, "parameter %r" % bad) for bad in (
        b"boundary*=undefined''XX", b"boundary*=a%00b''XX", b"boundary*=a; boundary*0=b", b'boundary="XX', b"boundary=XX; x", b'boundary=XX;a="' + b";" * 2000)),
    (post(MULTIPART.replace(b'filename="a', b'filename*=undefined\'\'x; y="a'), b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "f",
     "\x00\r\n--X\ufffd", "RFC 7578, 4.2: no filename*"),
]


@pytest.mark.parametrize("raw, key, expected", [row[:3] for row in LOOKUP_ROWS], ids=[row[3] for row in LOOKUP_ROWS])
def test_lookup_arg(server, raw, key, expected):
    def lookup(request, page):
        found = request.lookup_arg(key)
        json.dump(found if not isinstance(found, httpd.FormFile) else [*found[:2], found.content.decode("latin-1")], page)
        return 200
    answer = ask(server, lookup, raw)
    assert answer.json() == expected if expected != 400 else answer.status == 400


def test_form_has_all_fields(server):
    def fields(request, page):
        json.dump(request.form, page)
        return 200
    raw = post(b"b=2&a=3&a=", b"Content-Type: " + FORM, path=b"/h?a=1")
    assert ask(server, fields, raw).json() == {"a": ["1", "3", ""], "b": ["2"]}


def test_multipart_of_any_bytes(server):
    chance = random.Random(7)
    content = bytes(chance.randrange(256) for _ in range(500)) + b"\r\n\r\n--\r\n"
    for kind in (b"message/rfc822", b"multipart/mixed; boundary=y", b"text/plain"):
        raw = b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\nContent-Type: ' + kind + b"\r\n\r\n" + content + b"\r\n--b--"
        got = []
        ask(server, lambda request, page: got.append(request.lookup_arg("f")) or 200, post(raw, b"Content-Type: multipart/form-data; boundary=b", path=b"/h"))
        assert got[0].content == content


def test_page_is_a_file(server):
    def handler(request, page):
        assert page.write("ä") == 2 and page.write(bytearray(b"x")) == 1 and page.write(memoryview(b"yz")) == 2
        print("line", file=page)
        assert len(page) == 10
        page.set_header("X-A", "1")
        page.clear()
        assert len(page) == 0
        json.dump({"a": 1}, page)
        page.content_type = "application/json"
        page.set_header("X-B", 2)
        page.set_header("x-b", "3")
        page.set_header("Set-Cookie", "a=1")
        page.set_header("Set-Cookie", "b=2")
        return http.HTTPStatus.CREATED
    answer = ask(server, handler)
    assert answer.status == 201 and answer.json() == {"a": 1}
    assert answer.headers.get_all("X-B") == ["3"] and answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"] and "X-A" not in answer.headers
    assert answer.headers["Content-Type"] == "application/json" and answer.headers["Content-Length"] == "8"


@pytest.mark.parametrize("name, value", [("X", "a\r\nY: b"), ("X", "a\nb"), ("X", "a\0"), ("X\r\n", "a"), ("X Y", "a"), ("", "a"), ("X", "\u20ac"),
                                         ("Content-Length", "3"), ("transfer-encoding", "chunked"), ("Connection", "close"), ("Date", "now")])
def test_header_fields_that_must_not_leave(server, name, value):
    def handler(request, page):
        with pytest.raises(ValueError):
            page.set_header(name, value)
        return 200
    assert ask(server, handler).status == 200


def test_large_header_fields(server):
    answer = ask(server, lambda request, page: page.set_header("X", "y" * 5000) or page.write("body") and 200)
    assert answer.headers["X"] == "y" * 5000 and answer.body == b"body"


def test_a_content_type_that_must_not_leave(server, caplog):
    def handler(request, page):
        page.content_type = "text/html\r\nX: y"
        return 200
    answer = ask(server, handler)
    assert answer.status == 500 and "X" not in answer.headers


HANDLER_ROWS = [
    (lambda request, page: 200, 200, b"", None, "no content"),
    (lambda request, page: page.write("x") and 404, 404, b"x", None, "a status of its own"),
    (lambda request, page: page.write("x") and 299, 299, b"x", None, "a status without a phrase"),
    (lambda request, page: page.write("x") and 204, 204, b"", None, "204 has no content"),
    (lambda request, page: page.write("x") and 304, 304, b"", None, "304 has no content"),
    (lambda request, page: None, 500, b"500 the handler failed", "returned None, not a status", "no status"),
    (lambda request, page: 100, 500, b"500 the handler failed", "returned 100, not a status", "a status that is no answer"),
    (lambda request, page: "200", 500, b"500 the handler failed", "returned '200', not a status", "a status in text"),
    (lambda request, page: page.write("half") / 0, 500, b"500 the handler failed", "ZeroDivisionError", "an exception: nothing half-sent"),
    (lambda request, page: page.write(b"x" * 2 ** 21), 500, b"500 the handler failed", "raise buf_size", "OPENSIPS, never 4: a response that outgrows"),
]


@pytest.mark.parametrize("handler, status, body, logged", [row[:4] for row in HANDLER_ROWS], ids=[row[4] for row in HANDLER_ROWS])
def test_what_handlers_return(server, caplog, handler, status, body, logged):
    answer = ask(server, handler)
    assert answer.status == status and answer.body.startswith(body) and b"half" not in answer.body
    assert logged is None or logged in caplog.text
    if status in (204, 304):
        assert "Content-Length" not in answer.headers and "Transfer-Encoding" not in answer.headers
    assert answers(exchange(server, get())[0])[0].status == 200     # and it goes on


def test_http_error_from_a_handler(server):
    def handler(request, page):
        page.write("half")
        raise httpd.HTTPError(429, "slow down", {"Retry-After": "7"})
    answer = ask(server, handler)
    assert (answer.status, answer.body, answer.headers["Retry-After"]) == (429, b"429 slow down\n", "7")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_a_page_of_exactly_buf_size(server):
    size = server.params.buf_size
    assert len(ask(server, lambda request, page: page.write(b"x" * size) and 200).body) == size
    assert ask(server, lambda request, page: page.write(b"x" * size) and page.write(b"y") and 200).status == 500


# -------------------------------------------------------------------------------------------------------------- Parser

V = b" HTTP/1.1\r\n" + HOST + b"\r\n"
REQUEST_LINE_ROWS = [
    (b"GET /echo" + V, 200, "a plain one"),
    (b"\r\n\r\n\r\n\r\nGET /echo" + V, 200, "a few empty lines before it (RFC 9112, 2.2)"),
    (b"\r\n" * 5 + b"GET /echo" + V, 400, "more than a few"),
    (b"\nGET /echo" + V, 400, "an empty line of LF alone"),
    (b"GET /echo HTTP/1.1\n" + HOST + b"\r\n", 400, "LF alone ends it"),
    (b"GET /echo HTTP/1.1\rHost: a\r\n\r\n", 400, "a bare CR"),
    (b"GET /echo HTTP/1.1\r\r\n" + HOST + b"\r\n", 400, "CR CR LF"),
    (b"GET  /echo" + V, 400, "two blanks"), (b"GET\t/echo" + V, 400, "a tab"), (b" GET /echo" + V, 400, "a blank before it"),
    (b"GET /echo  HTTP/1.1\r\n" + HOST + b"\r\n", 400, "two blanks before the version"), (b"GET /echo HTTP/1.1 \r\n" + HOST + b"\r\n", 400, "a blank behind"),
    (b"GET /echo x" + V, 400, "four words"), (b"GET" + V, 400, "two words"), (b"GET /echo\x00" + V, 400, "NUL"), (b"GET /echo\x7f" + V, 400, "DEL"),
    (b"GET /echo\x0b" + V, 400, "a control character"), (b"GET /ech\xc3\xb6" + V, 400, "no ASCII"), (b"GET /echo#x" + V, 400, "a fragment"),
    (b"GET /echo?a#x" + V, 400, "a fragment behind the query"),
    (b"GET /echo%" + V, 400, "a broken escape"), (b"GET /echo%4" + V, 400, "half an escape"), (b"GET /echo%zz" + V, 400, "no hexadecimal escape"),
    (b"GET /echo?%4" + V, 400, "half an escape in the query"), (b"GET /echo%00" + V, 400, "an escaped NUL"), (b"GET /echo?%00" + V, 400, "and in the query"),
    (b"G@T /echo" + V, 400, "a method that is no token"), (b"GET echo" + V, 400, "no slash"), (b"GET ?x" + V, 400, "a query alone"),
    (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400, "* with GET"), (b"OPTIONS *" + V, 204, "* with OPTIONS"), (b"OPTIONS *x" + V, 400, "*x"),
    (b"OPTIONS http://example" + V, 204, "* in absolute-form"),
    (b"GET example:80" + V, 400, "authority-form with GET"), (b"CONNECT example:80" + V, 501, "CONNECT is refused"),
    (b"CONNECT /echo" + V, 400, "CONNECT with a path"), (b"CONNECT example" + V, 400, "CONNECT without a port"), (b"CONNECT [::1]:80" + V, 501, "CONNECT, IPv6"),
    (b"GET http://other/echo" + V, 200, "absolute-form"), (b"GET HTTP://other:80/echo" + V, 200, "absolute-form, a port, capitals"),
    (b"GET http://user@other/echo" + V, 400, "userinfo"), (b"GET http:///echo" + V, 400, "an empty host"), (b"GET http://a b/echo" + V, 400, "a blank"),
    (b"GET http://:80/echo" + V, 400, "a port alone"), (b"GET http://a:99999/echo" + V, 400, "a port out of range"),
    (b"GET https://other/echo" + V, 421, "another scheme"), (b"GET ftp://other/echo" + V, 421, "any other scheme"), (b"GET foo:/echo" + V, 400, "no //"),
    (b"GET //echo" + V, 404, "two slashes are a path"), (b"GET /nowhere" + V, 404, "an unknown root"),
    (b"GET http://other HTTP/1.1\r\n" + HOST + b"\r\n", 404, "absolute-form without a path is /"),
    (b"GET /echo HTTP/1.0\r\n\r\n", 200, "HTTP/1.0"), (b"GET /echo HTTP/1.2\r\n" + HOST + b"\r\n", 200, "HTTP/1.2"),
    (b"GET /echo HTTP/1.9\r\n" + HOST + b"\r\n", 200, "HTTP/1.9"), (b"GET /echo HTTP/1.10\r\n" + HOST + b"\r\n", 400, "HTTP/1.10 is none"),
    (b"GET /echo HTTP/2.0\r\n" + HOST + b"\r\n", 505, "HTTP/2.0"), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "the HTTP/2 preface"),
    (b"GET /echo HTTP/0.9\r\n\r\n", 505, "HTTP/0.9 by name"), (b"GET /echo HTTP/3.1\r\n" + HOST + b"\r\n", 505, "HTTP/3.1"),
    (b"GET /echo\r\n\r\n", 400, "no version"), (b"GET /echo http/1.1\r\n" + HOST + b"\r\n", 400, "small letters"), (b"GET /echo HTTP/11\r\n\r\n", 400, "no dot"),
    (b"GET /echo HTTP/1.1x\r\n\r\n", 400, "rubbish behind"), (b"GET /echo HTTPS/1.1\r\n\r\n", 400, "HTTPS"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "a TLS hello"), (b"\x00\x01\x02", 400, "binary"), (b"\xff\xfe", 400, "more binary"),
    (b"SSH-2.0-OpenSSH_9\r\n", 400, "SSH"), (b"GET /" + b"x" * 5000, 414, "a line without end"), (b"G" * 5000, 414, "a method without end"),
    (b"GET /" + b"x" * 5000 + V, 414, "too long a line"), (b"GET /echo?" + b"x" * 4000 + V, 200, "a line just short enough"),
]
REQUEST_LINE_ROWS = [(raw, 505 if why == "the HTTP/2 preface" else status, why) for raw, status, why in REQUEST_LINE_ROWS]

B = b"GET /echo HTTP/1.1\r\n"
FIELD_ROWS = [
    (B + b"Host : a\r\n\r\n", 400, "a blank before the colon (RFC 9112, 5.1)"), (B + b" Host: a\r\n\r\n", 400, "a blank first line (RFC 9112, 2.2)"),
    (B + HOST + b"X: a\r\n b\r\n\r\n", 400, "obs-fold"), (B + HOST + b"X: a\r\n\tb\r\n\r\n", 400, "obs-fold with a tab"),
    (B + HOST + b"X(: a\r\n\r\n", 400, "a name that is no token"), (B + HOST + b": a\r\n\r\n", 400, "OPENSIPS, never 8: an empty name"),
    (B + HOST + b"X\r\n\r\n", 400, "no colon"), (B + HOST + b"X\xe4: a\r\n\r\n", 400, "a name that is no ASCII"), (B + HOST + b"X: a\x00\r\n\r\n", 400, "NUL"),
    (B + HOST + b"X: a\rb\r\n\r\n", 400, "a bare CR"), (B + HOST + b"X: a\nY: b\r\n\r\n", 400, "a bare LF"), (B + HOST + b"X: \x0b\r\n\r\n", 400, "control"),
    (B + HOST + b"X: \x7f\r\n\r\n", 400, "DEL"), (B + HOST + b"X:\ta\t b \t\r\n\r\n", 200, "tabs"), (B + HOST + b"X: \xe4\xff\r\n\r\n", 200, "latin-1"),
    (B + HOST + b"X:\r\n\r\n", 200, "an empty value"), (B + HOST + b"X: a\n\r\n\r\n", 400, "LF before CRLF"), (B + HOST + b"\n", 400, "LF ends the head"),
    (B + HOST + b"X: a\r\n\n", 400, "CRLF LF ends the head"),
    (B + b"\r\n", 400, "no Host in HTTP/1.1"), (B + HOST + HOST + b"\r\n", 400, "two Hosts"), (b"GET /echo HTTP/1.0\r\n" + HOST * 2 + b"\r\n", 400, "two, 1.0"),
    (b"GET /echo HTTP/1.0\r\nHost: a/b\r\n\r\n", 400, "a bad Host in HTTP/1.0"),
    *((B + b"Host: " + host + b"\r\n\r\n", status, "Host: %r" % host) for status, hosts in {
        200: (b"a", b"a:80", b"a:", b"a.b-c_d", b"127.0.0.1", b"[::1]", b"[::1]:8888", b"a%41", b"\ta ", b"[::ffff:1.2.3.4]"),
        400: (b"", b":80", b"u@a", b"a/b", b"a b", b"a,b", b"a:99999", b"a:65536", b"a:8x", b"a:+8", b"a:-1", b"[::g]", b"[::1", b"::1", b"[1.2.3.4]", b"a%4",
              b"http://a", b"a?b", b"a#b", b"a\\b", b"[::1]x", b"[v1.x]", b"[fe80::1%25eth0]", b"a\xe4", b"a:80:80", b'"a"')}.items() for host in hosts
      if host != b"a,b"),
    (B + HOST + b"X: y\r\n" * 127 + b"\r\n", 200, "128 fields"), (B + HOST + b"X: y\r\n" * 128 + b"\r\n", 431, "129 fields"),
    (B + HOST + b"X: " + b"y" * 5000 + b"\r\n\r\n", 431, "too large a section"), (B + HOST + b"X: " + b"y" * 5000, 431, "a value without end"),
    (B + HOST + b"X" * 5000, 431, "a name without end"), (B + HOST + b"X: y\r\n" * 1000, 431, "a section without end"),
    (B + HOST + b"X: " + b"y" * 4000 + b"\r\n\r\n", 200, "a section just small enough"),
]

P = b"POST /echo HTTP/1.1\r\n" + HOST
FRAMING_ROWS = [
    *((P + b"Content-Length:" + length + b"\r\n\r\nabc", 400, "Content-Length:%r" % length) for length in (
        b" +3", b" -3", b" 3 3", b" 0x3", b" 3_0", b" 3,3", b" 3;", b"", b" ", b" 3.0", b" \xb3", b" " + b"0" * 19, b" 1" + b"0" * 18, b" 3a", b' "3"')),
    (P + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400, "OPENSIPS, never 8: two of them, though equal"),
    (P + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400, "two of them"),
    (P + b"content-length: 000000000000000003\r\n\r\nabc", "abc", "18 digits"), (P + b"Content-Length: 0\r\n\r\n", "", "none"),
    (P + b"\r\n", "", "a POST without a length has no content (RFC 9112, 6.3)"),
    (P + b"Content-Length: 1024\r\n\r\n" + b"x" * 1024, "x" * 1024, "exactly post_buf_size"), (P + b"Content-Length: 1025\r\n\r\n", 413, "at once, before reading"),
    (P + b"Content-Length: 999999999999999999\r\n\r\n", 413, "18 nines"),
    (P + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "OPENSIPS, never 8: chunked with Content-Length"),
    (P + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "chunked twice"),
    (P + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400, "chunked twice in one line"),
    (P + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400, "chunked not last"), (P + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "gzip, chunked"),
    (P + b"Transfer-Encoding: gzip\r\n\r\n", 501, "gzip"), (P + b"Transfer-Encoding: identity\r\n\r\n", 501, "identity"),
    (P + b"Transfer-Encoding: xchunked\r\n\r\n", 501, "xchunked"), (P + b"Transfer-Encoding:\r\n\r\n", 400, "an empty one is not an absence"),
    (P + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n", 400, "a comma"), (P + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 400, "quotes"),
    (P + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400, "a control character"),
    (b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "chunked in HTTP/1.0"),
    (P + b"Transfer-Encoding: CHUNKED\t\r\n\r\n0\r\n\r\n", "", "any case"),
    (P + b"Expect: 100-continue\r\nContent-Length: 1025\r\n\r\n", 413, "no 100 before a refusal"), (P + b"Expect: x\r\n\r\n", 417, "another expectation"),
    (P + b"Expect:\r\n\r\n", 417, "an empty expectation"), (P + b"Expect: 100-continue, x\r\n\r\n", 417, "a list"),
    (b"GET /echo HTTP/1.1\r\n" + HOST + b"Expect: 100-Continue\r\n\r\n", "", "GET with Expect and no content must not hang"),
    (b"POST /echo HTTP/1.0\r\nExpect: x\r\n\r\n", "", "ignored in HTTP/1.0"),
    (P + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n", "", "Upgrade is ignored"),
]

CHUNK_ROWS = [
    (b"0\r\n\r\n", "", "empty"), (b"3\r\nabc\r\n0\r\n\r\n", "abc", "one chunk"), (b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", "abc", "two"),
    (b"A\r\n0123456789\r\n0\r\n\r\n", "0123456789", "hexadecimal"), (b"000000000000003\r\nabc\r\n000\r\n\r\n", "abc", "15 digits"),
    (b"0000000000000003\r\nabc\r\n0\r\n\r\n", 400, "16 digits"), (b"+3\r\nabc\r\n0\r\n\r\n", 400, "a sign"), (b"-3\r\n", 400, "a negative one"),
    (b"0x3\r\nabc\r\n0\r\n\r\n", 400, "0x"), (b" 3\r\nabc\r\n0\r\n\r\n", 400, "a blank before it"), (b"3 \r\nabc\r\n0\r\n\r\n", 400, "a blank behind it"),
    (b"\r\n", 400, "no size"), (b"g\r\n", 400, "no number"), (b"3\nabc\r\n0\r\n\r\n", 400, "LF behind the size"), (b"3\r\nabc\n0\r\n\r\n", 400, "LF behind the data"),
    (b"3\r\nabcd\r\n0\r\n\r\n", 400, "data longer than its size"), (b"3\r\nabc0\r\n\r\n", 400, "no CRLF behind the data"), (b"3\r\rabc", 400, "CR CR"),
    (b"3_0\r\n", 400, "an underscore"), (b"3\r\nabc\rX", 400, "CR X behind the data"),
    (b"3;a\r\nabc\r\n0\r\n\r\n", "abc", "an extension"), (b"3 ; a = b ;c=\"d;\\\"\r\"\r\nabc\r\n0\r\n\r\n", 400, "a CR in quotes"),
    (b"3 ; a = b\t;c=\"d;\\\"e\"\r\nabc\r\n0;x\r\n\r\n", "abc", "blanks around ; and =, quotes"), (b"3;\r\nabc\r\n0\r\n\r\n", 400, "an empty extension"),
    (b"3;a=\r\nabc\r\n0\r\n\r\n", 400, "an empty value"), (b"3;a b\r\nabc\r\n0\r\n\r\n", 400, "a blank inside"), (b"3;a=\"b\r\nabc\r\n0\r\n\r\n", 400, "open quotes"),
    (b"3;@\r\nabc\r\n0\r\n\r\n", 400, "no token"), (b"3;a\nb\r\nabc\r\n0\r\n\r\n", 400, "LF in an extension"), (b"3;a=\x00\r\n", 400, "NUL"),
    (b"1;a=" + b"b" * 3000 + b"\r\nx\r\n1;a=" + b"b" * 3000 + b"\r\n", 400, "too much in sum"), (b"1;" + b"a" * 5000, 400, "one without end"),
    (b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n", "x" * 1024, "exactly receive_buf_size"), (b"401\r\n", 413, "more, at once"),
    (b"400\r\n" + b"x" * 1024 + b"\r\n1\r\n", 413, "more in sum"), (b"fffffffffffffff\r\n", 413, "the largest size"),
    (b"0\r\nX: a\r\nY: b\r\n\r\n", "", "trailers are dropped"), (b"0\r\nX : a\r\n\r\n", 400, "a bad trailer"), (b"0\r\nX: a\r\n b\r\n\r\n", 400, "obs-fold"),
    *((b"0\r\n" + name + b": 3\r\n\r\n", 400, "the trailer %r" % name) for name in
      (b"Content-Length", b"Transfer-Encoding", b"HOST", b"Authorization", b"Trailer", b"Expect", b"Content-Type", b"Connection", b"Cookie")),
    (b"0\r\n" + b"X: y\r\n" * 129 + b"bad line\r\n\r\n", 400, "grammar before sizes"), (b"0\r\nX: " + b"y" * 4089 + b"\r\n\r\n", "", "just short enough"),
    (b"0\r\nX: " + b"y" * 4090 + b"\r\n\r\n", 431, "a byte too long"), (b"0\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 431, "too many trailers"), (b"0\r\n" + b"X: y\r\n" * 129 + b"\r\n", 431, "129 trailers"),
    (b"0\r\nX: " + b"y" * 5000, 431, "a trailer without end"), (b"0\r\n\n", 400, "LF at the end"), (b"0\r\nX: a\n\r\n", 400, "LF in a trailer"),
]


def expect(server, raw, expected, cut):
    """A refusal is answered at once, says close, and has a line of text; what is served keeps the connection."""
    data, end = exchange(server, *CUTS[cut](raw))
    answer, = answers(data, raw.lstrip(b"\r\n").split(b" ")[0].decode("latin-1"))
    if isinstance(expected, str):
        assert (answer.status, answer.json()["body"]) == (200, expected)
        return
    assert answer.status == expected
    if expected not in (200, 204):
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8" and answer.body.startswith(b"%d " % expected) and answer.body.count(b"\n") == 1
    if expected not in (200, 204, 404):
        assert answer.headers["Connection"] == "close" and end == "closed"


@pytest.mark.parametrize("raw, expected, cut", rows(REQUEST_LINE_ROWS))
def test_request_lines(server, raw, expected, cut):
    expect(server, raw, expected, cut)


@pytest.mark.parametrize("raw, expected, cut", rows(FIELD_ROWS))
def test_fields(server, raw, expected, cut):
    expect(server, raw, expected, cut)


@pytest.mark.parametrize("raw, expected, cut", rows(FRAMING_ROWS))
def test_framing(server, raw, expected, cut):
    expect(server, raw, expected, cut)


@pytest.mark.parametrize("raw, expected, cut", rows(CHUNK_ROWS))
def test_chunks(server, raw, expected, cut):
    expect(server, chunked(raw), expected, cut)


def test_absolute_form_counts_not_host(server):
    answer, = answers(exchange(server, get(b"http://Other:81/echo?x"))[0])
    assert answer.json()["headers"]["host"] == "Other:81" and answer.json()["query"] == "x"


ORDER_ROWS = [
    (b"BREW / HTTP/2.0\r\nbad\r\n\r\n", 400, "grammar before version"), (b"BREW / HTTP/2.0\r\n" + b"X: y\r\n" * 129 + b"\r\n", 505, "version before sizes"),
    (b"BREW / HTTP/2.0\r\nX: " + b"y" * 5000, 505, "version before sizes, cut off"), (b"BREW / HTTP/1.1\r\n" + b"X: y\r\n" * 129 + b"\r\n", 431, "sizes before method"),
    (b"BREW / HTTP/1.1\r\n\r\n", 501, "method before Host"), (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "Host before framing"),
    (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "framing before root"), (b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 421, "host before root"),
    (b"DELETE /x HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 9999\r\n\r\n", 404, "root before method"),
    (b"DELETE /echo HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 9999\r\n\r\n", 405, "method before expectation"),
    (b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 9999\r\n\r\n", 417, "expectation before size"),
    (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n401\r\n", 404, "root before size, chunked"),
    (b"GET foo HTTP/1.1\r\nX: " + b"y" * 5000, 400, "grammar before sizes, the target"), (b"PRI * HTTP/2.0\r\nX: " + b"y" * 5000, 505, "version before the target"),
    (b"\r\n" * 5 + b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "no request yet"),
]


@pytest.mark.parametrize("raw, expected, cut", rows(ORDER_ROWS))
def test_order_of_checks(server, raw, expected, cut):
    assert answers(exchange(server, *CUTS[cut](raw))[0])[0].status == expected


REFUSED_AT_ONCE = [(b"\x16", "a TLS hello"), (b"GET /a\x00", "NUL"), (b"GET /a HTTP/2x", "a version"), (b"GET / HTTP/1.1\r\nHost: a\x00", "NUL in a value"),
                   (b"GET / HTTP/1.1\r\nHost ", "a blank behind a name"), (b"GET / HTTP/1.1\r\n ", "a folded first line"), (b"GET / HTTP/1.1\n", "LF"),
                   (b"GET / HTTP/1.1\r\nHost: a\n", "LF behind a field"), (b"G(", "no token"), (b"\r\n\rX", "no empty line")]


@pytest.mark.parametrize("raw", [row[0] for row in REFUSED_AT_ONCE], ids=[row[1] for row in REFUSED_AT_ONCE])
def test_what_can_become_no_request_is_refused_at_once(server, raw):
    good, bad = exchange(server, raw[:-1]), exchange(server, raw)
    assert good[0] == b"" and good[1] == "open"
    assert bad[0].startswith(b"HTTP/1.1 400 ") and bad[1] == "closed"


def test_cutting_changes_nothing_and_no_input_gives_500(server):
    """Mutated requests: every cut of them gives the same answers, and never a 500."""
    chance = random.Random(20)
    seeds = [get(b"/echo?a=%41", b"X: y"), post(b"abc", b"Content-Type: text/plain"), chunked(b"3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n"), get() + post(b"x") + get(b"/no"),
             get(b"http://a:80/echo", b"Connection: close") + get(), b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2]
    for _ in range(400):
        raw = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(raw))
            raw[at:at + chance.randrange(3)] = chance.choice([b"", b"\r\n", b" ", b"\x00", b":", b"0", b"%", b",", b"chunked", b"\n", bytes([chance.randrange(256)])])
        raw = bytes(raw) or b"x"
        results = {cut: [re.sub(rb"Date: .*", b"", exchange(server, *pieces(raw), half_close=True)[0])] for cut, pieces in CUTS.items()}
        assert results["whole"] == results["bytes"] == results["random"], raw
        assert b"HTTP/1.1 500" not in results["whole"][0], raw


def test_a_flood_of_heads_neither_grows_the_memo_nor_pushes_out_what_is_used(server):
    often = get(b"/echo?often")
    for _ in range(3):                                      # its section, and then the whole, are remembered the second time
        exchange(server, often)
        assert server.heads[often] is None
    exchange(server, often)
    kept = server.heads[often]
    for number in range(3000):
        for _ in range(number % 5):
            line, _, block = get(b"/echo?%d" % number, b"X-Unique: %d" % number).partition(b"\r\n")
            server.admit(line + b"\r\n" + block, line, block, server.sections[block])
        if not number % 50:
            assert server.heads[often] is kept
    for memo in (server.heads, server.sections):
        held = sum(httpd.weight(raw) + httpd.weight(value) + 100 for part in (memo, memo.old) for raw, value in part.items())
        assert memo.old and held <= memo.size * 2
        assert len(memo.once) <= 1024
    assert sum(httpd.weight(line) + httpd.weight(pair) + 100 for line, pair in server.lines.items()) <= server.lines.size
    assert server.heads.size * 2 + server.sections.size * 2 + server.lines.size <= server.params.memo_size


# ---------------------------------------------------------------------------------------------------------- Connection

def test_keep_alive_and_the_fields_that_answers_always_have(server):
    with connect(server) as client:
        for _ in range(3):
            client.setblocking(True)
            client.sendall(get())
            data, end = pump(server, client)
            answer, = answers(data)
            assert end == "open" and re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["Date"])
            assert "Server" not in answer.headers and "Connection" not in answer.headers and "Transfer-Encoding" not in answer.headers


CONNECTION_ROWS = [
    (b"HTTP/1.1", b"", "open", None, "1.1 is kept"), (b"HTTP/1.1", b"Connection: close\r\n", "closed", "close", "close"),
    (b"HTTP/1.1", b"Connection: CLOSE\r\n", "closed", "close", "any case"), (b"HTTP/1.1", b"Connection: foo,\t close ,\r\n", "closed", "close", "a list"),
    (b"HTTP/1.1", b"Connection: foo\r\nConnection: close\r\n", "closed", "close", "several lines"), (b"HTTP/1.1", b"Connection: closed\r\n", "open", None, "closed"),
    (b"HTTP/1.1", b"Connection: keep-alive, close\r\n", "closed", "close", "close wins"), (b"HTTP/1.0", b"", "closed", "close", "1.0 is not kept"),
    (b"HTTP/1.0", b"Connection: Keep-Alive\r\n", "open", "keep-alive", "1.0 with keep-alive is, and told so"),
    (b"HTTP/1.0", b"Connection: keep-alive\r\nConnection: close\r\n", "closed", "close", "close wins in 1.0"), (b"HTTP/1.5", b"", "open", None, "1.5 is 1.1")]


@pytest.mark.parametrize("version, fields, end, said", [row[:4] for row in CONNECTION_ROWS], ids=[row[4] for row in CONNECTION_ROWS])
def test_connection_field(server, version, fields, end, said):
    data, ended = exchange(server, b"GET /echo " + version + b"\r\n" + HOST + fields + b"\r\n")
    answer, = answers(data)
    assert ended == end and answer.headers["Connection"] == said
    data, ended = exchange(server, (b"GET /echo " + version + b"\r\n" + HOST + fields + b"\r\n") * 2)
    assert len(answers(data)) == (2 if end == "open" else 1)        # after close nothing more is executed


def test_pipelined_requests_are_answered_in_order_in_one_send(server, monkeypatch):
    sends = count_calls(monkeypatch, "send")
    raw = b"".join(get(b"/echo/%d" % number) for number in range(50)) + b"HEAD /echo HTTP/1.1\r\n" + HOST + b"\r\n" + post(b"abc") + chunked(b"1\r\nx\r\n0\r\n\r\n")
    for cut in CUTS:
        del sends[:]
        data, end = exchange(server, *CUTS[cut](raw))
        found = answers(data, ["GET"] * 50 + ["HEAD", "POST", "POST"])
        assert [answer.json()["url"] for answer in found[:50]] == ["/%d" % number for number in range(50)]
        assert found[50].body == b"" and int(found[50].headers["Content-Length"]) > 0 and [found[51].json()["body"], found[52].json()["body"]] == ["abc", "x"]
        assert end == "open" and (cut != "whole" or len(sends) <= 3)


def count_calls(monkeypatch, name):
    """The sizes of what is handed to a method of the server's sockets."""
    calls = []

    class Counting(socket.socket):
        pass

    def method(self, data, *rest):
        calls.append(data if isinstance(data, int) else len(data))
        return getattr(socket.socket, name)(self, data, *rest)
    setattr(Counting, name, method)
    original = httpd.Connection.__init__

    def init(self, server, sock, peer):
        counting = Counting(sock.family, sock.type, sock.proto, fileno=sock.detach())
        counting.setblocking(False)
        original(self, server, counting, peer)
    monkeypatch.setattr(httpd.Connection, "__init__", init)
    return calls


def test_a_good_request_is_answered_even_when_rubbish_follows(server):
    for rubbish, statuses in ((b"\x00", [200, 400]), (b"GET /x y\r\n", [200, 400]), (b"GET / HTTP/2.0\r\n\r\n", [200, 505]), (b"\x16\x03", [200, 400])):
        data, end = exchange(server, get() + rubbish)
        assert [answer.status for answer in answers(data)] == statuses and end == "closed"
        assert "Connection" not in answers(data)[0].headers


def test_what_follows_a_last_request_is_ignored(server):
    for rest in (get(), b"\x00rubbish", b"GET /echo HT"):
        data, end = exchange(server, get(b"/echo", b"Connection: close") + rest)
        assert len(answers(data)) == 1 and end == "closed"
        data, end = exchange(server, b"GET /echo HTTP/1.0\r\n\r\n" + rest)
        assert len(answers(data)) == 1 and end == "closed"


def test_head_has_the_fields_of_get_and_no_content(server):
    whole, = answers(exchange(server, get())[0])
    data, end = exchange(server, get().replace(b"GET", b"HEAD"))
    assert data.endswith(b"\r\n\r\n") and end == "open"
    head, = answers(data, "HEAD")
    assert int(head.headers["Content-Length"]) == len(whole.body) + 1           # it says HEAD in the content
    for raw in (b"HEAD /nowhere" + V, b"HEAD /echo HTTP/1.1\r\n\r\n", b"HEAD /echo HTTP/2.0\r\n\r\n",
                b"HEAD /echo HTTP/1.1\r\n" + HOST + b"Expect: x\r\n\r\n", b"HEAD /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 9999\r\n\r\n"):
        assert exchange(server, raw)[0].endswith(b"\r\n\r\n")                    # nor has an error


def test_expect_100_continue(server):
    head = P + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    with connect(server) as client:
        client.sendall(head)
        assert pump(server, client) == (b"HTTP/1.1 100 Continue\r\n\r\n", "open")
        client.send(b"abc")
        assert answers(pump(server, client)[0])[0].json()["body"] == "abc"
        client.send(head + b"a")                                                # the content is on its way: no 100
        assert pump(server, client) == (b"", "open")
        client.send(b"bc" + get() + head)                                       # pipelined: answers leave before the 100
        data, end = pump(server, client)
        assert data.count(b"HTTP/1.1 200") == 2 and data.endswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.send(b"def")
        assert answers(pump(server, client)[0])[0].json()["body"] == "def"
    data, end = exchange(server, b"POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n", b"abc")
    assert data.startswith(b"HTTP/1.1 200")                                     # a 1.0 client never gets a 1xx
    for path, status in ((b"/nowhere", 404), (b"/get_only", 405)):
        httpd.register_httpdcb("test", "get_only", echo, methods=("GET",)) if status == 405 else None
        data, end = exchange(server, head.replace(b"/echo", path))
        assert answers(data)[0].status == status and end == "closed"            # the refusal instead, at once


def test_an_expectation_is_judged_every_time(server):
    for _ in range(4):
        assert answers(exchange(server, P + b"Expect: x\r\n\r\n")[0])[0].status == 417


def test_what_follows_a_request_without_content_is_no_part_of_it(server):
    expecting = B + HOST + b"Expect: 100-continue\r\n\r\n"
    for first, second, content in ((expecting.replace(b"GET", b"HEAD"), b"GET /x y\r\n", True), (expecting, b"HEAD /x y\r\n", False)):
        data, end = exchange(server, first + second)
        assert data.endswith(b"line\n") == content and data.count(b"HTTP/1.1 ") == 2


def test_a_last_answer_is_whole_though_the_client_goes_on_sending(server):
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 1000000) and 200)
    for raw in (get(b"/large", b"Connection: close"), b"GET /large HTTP/1.0\r\n\r\n"):
        with connect(server) as client:
            client.send(raw)
            server.run_once(0.1)
            client.send(b"\r\n")
            data, end = b"", "open"
            while end == "open":
                more, end = pump(server, client)
                data += more
            assert len(answers(data)[0].body) == 1000000 and end == "closed"


def test_a_refused_request_whose_content_is_short_keeps_the_connection(server):
    for raw in (post(b"x" * 1000, path=b"/nowhere"), post(b"abc").replace(b"POST", b"DELETE")):
        for cut in CUTS:
            data, end = exchange(server, *CUTS[cut](raw + get()))
            assert [answer.status for answer in answers(data)] in ([404, 200], [405, 200]) and end == "open"
    data, end = exchange(server, post(b"x" * 2000, path=b"/nowhere"))
    assert answers(data)[0].status == 404 and end == "closed"


def test_every_method_may_have_content(server):
    for method in (b"GET", b"PUT", b"OPTIONS", b"HEAD"):
        data, end = exchange(server, post(b"GET /x HTTP/1.1").replace(b"POST", method, 1) + get())
        assert [answer.status for answer in answers(data, [method.decode(), "GET"])] == [200 if method != b"OPTIONS" else 204, 200]


def test_the_wrong_method_is_never_executed(server):                              # OPENSIPS, never 2
    """Content is whole, or it is a 413: no part of it is dropped, and nothing of it passes for a request."""
    seen = []
    httpd.register_httpdcb("test", "h", lambda request, page: seen.append(request.body) or 200)
    content = b"".join(b"%04d" % number for number in range(256))
    exchange(server, *cut_at_random(post(content, path=b"/h"), random.Random(3)))
    exchange(server, *[piece for piece in CUTS["bytes"](post(content, path=b"/h"))])
    data, _ = exchange(server, post(content + b"x" + get(b"/h"), path=b"/h"))
    assert seen == [content, content] and answers(data)[0].status == 413


def test_half_close(server):
    for raw, statuses in ((get(), [200]), (get() * 3, [200] * 3), (post(b"abc"), [200]), (get()[:-1], [400]), (post(b"abc")[:-1], [400]), (b"", []),
                          (chunked(b"0\r\n\r"), [400]), (get() + b"GET", [200, 400]), (b"\r\n", [])):
        data, end = exchange(server, raw, half_close=True)
        assert [answer.status for answer in answers(data)] == statuses and end == "closed", raw


def test_a_refused_client_reads_its_answer_though_it_is_still_sending(server):
    """RFC 9112, 9.6: only who reads on after the refusal avoids the reset that would destroy it."""
    with server, connect(server) as client:
        client.sendall(P + b"Content-Length: 3000000\r\n\r\n")
        for _ in range(300):
            client.sendall(b"x" * 10000)
        data = b""
        while more := client.recv(65536):
            data += more
        assert answers(data)[0].status == 413


def test_lingering_is_bounded(server):
    with server, connect(server) as client:
        client.sendall(b"\x00")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100):
                client.sendall(b"x" * 1000000)
    assert not server.connections and server.held == 0


def test_a_slow_reader_stops_what_is_read_from_it(server):
    """While output waits, nothing is read or executed; what waits is counted, and given back."""
    calls = []

    def large(request, page):
        calls.append(1)
        page.write(b"x" * 1000000)
        return 200
    httpd.register_httpdcb("test", "large", large)
    with connect(server) as client:
        client.sendall(get(b"/large") * 20)
        for _ in range(5):
            server.run_once(0)
        executed = len(calls)
        assert executed < 20 and 0 < server.held <= server.params.held_size
        connection, = server.connections
        assert connection.interest == httpd.WRITE
        data = b""
        while data.count(b"HTTP/1.1 200") < 20 or len(data) < 20000000:
            more, end = pump(server, client)
            data += more
        assert len(answers(data)) == 20 and end == "open" and len(calls) == 20 and server.held == 0 and connection.interest == httpd.READ


def test_memory_is_bounded_under_slow_readers_and_slow_senders():
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * page_size) and 200)
    server = httpd.Server(ip="127.0.0.1", port=0, memory_budget=2 ** 21, buf_size=2 ** 18, post_buf_size=2 ** 17)
    page_size = server.params.buf_size
    clients = [connect(server) for _ in range(60)]
    statuses = set()
    for number, client in enumerate(clients):               # some read nothing, some do not finish their content, some their head
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall([get(b"/large") * 40, P + b"Content-Length: 131072\r\n\r\n" + b"x" * 131000, B + b"X: " + b"y" * 16000][number % 3])
    for _ in range(300):
        server.run_once(0)
        assert server.held <= server.params.held_size
    assert server.held > server.params.held_size // 2
    for client in clients:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            statuses.add(client.recv(100)[:12])
    assert b"HTTP/1.1 503" in statuses
    with connect(server) as newcomer:                       # whoever needs no memory is served
        newcomer.sendall(get(b"/nowhere"))
        assert pump(server, newcomer)[0].startswith(b"HTTP/1.1 404")
    for client in clients:
        client.close()
    for _ in range(100):
        server.run_once(0)
    assert server.held == 0 and not server.connections
    server.stop(0)


def test_partial_requests_behind_answered_ones_are_counted(server):
    tails = [B + b"X: " + b"a" * 3000, P + b"Content-Length: 1000\r\n\r\n" + b"x" * 999, chunked(b"3e8\r\n" + b"x" * 999)]
    clients = [connect(server) for _ in tails]
    for client, tail in zip(clients, tails):
        client.sendall(get() + tail)
        assert pump(server, client)[0].startswith(b"HTTP/1.1 200")
    assert len(tails[0]) + 2 * 999 <= server.held <= sum(map(len, tails))
    for client in clients:
        client.close()
    for _ in range(3):
        server.run_once(0.01)
    assert server.held == 0


def test_one_who_pipelines_without_end_does_not_keep_the_others_out(server):
    with connect(server) as greedy, connect(server) as other:
        greedy.setblocking(False)
        other.send(get())
        server.run_once(0)
        server.run_once(0)
        greedy.send(get() * 2000)
        server.run_once(0)
        assert server.requests <= 16384 // len(get()) + 2


@pytest.mark.parametrize("raw, status", [(b"A" * 300 + b" / HTTP/1.1\r\nHost:a\r\n\r\n", 501), (get(b"/h"), 403), (get(b"/h?field"), 500), (get(b"/h?304"), 500)])
def test_no_error_text_is_too_large_for_the_smallest_page(raw, status):
    def handler(request, page):
        if request.query == "304":
            raise httpd.HTTPError(304)
        raise httpd.HTTPError(403, "\u20ac" * 300, {"Location": "a\r\nb"} if request.query == "field" else None)
    httpd.register_httpdcb("test", "h", handler)
    server = httpd.Server(ip="127.0.0.1", port=0, buf_size=256)
    data, end = exchange(server, raw)
    assert answers(data)[0].status == status
    server.stop(0)


def test_content_that_comes_with_the_head_earns_time_too(server):
    with connect(server) as client:
        client.send(P + b"Content-Length: 1024\r\n\r\n" + b"x" * 1000)
        server.run_once(0.1)
        server.run_once(0.1)
        connection, = server.connections
        assert connection.deadline - server.now > server.params.request_timeout + 1000 / 500 - 1


def test_what_ends_the_program_ends_the_connection_first(server):
    def leave(request, page):
        raise SystemExit(3)
    httpd.register_httpdcb("test", "leave", leave)
    with connect(server) as client:
        client.send(get(b"/leave"))
        with pytest.raises(SystemExit):
            for _ in range(3):
                server.run_once(0.1)
        assert client.recv(10) == b"" and not server.connections


# -------------------------------------------------------------------------------------------------------------- Server

def raw_get(port, host="127.0.0.1", raw=get()):
    with socket.create_connection((host, port), timeout=10) as client:
        client.sendall(raw)
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(65536)
        return int(data[9:12])


def threads():
    return {thread.name for thread in threading.enumerate()}


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_life_in_a_thread():
    httpd.register_httpdcb("test", "echo", echo)
    before = descriptors()
    with httpd.Server(ip="127.0.0.1", port=0) as server:
        port = server.port
        assert server.url == "http://127.0.0.1:%d" % port and raw_get(port) == 200 and "httpd" in threads()
    assert "httpd" not in threads() and descriptors() == before
    assert_free(port)
    server.stop()
    server.stop(0)
    server.run_once(0)
    server.run()
    assert server.port == port
    with pytest.raises(RuntimeError, match="starts only once"):
        server.start()


def test_stop_from_a_handler_and_from_any_thread(server):
    def stop(request, page):
        running.stop()
        running.stop()
        page.write("bye")
        return 200
    httpd.register_httpdcb("test", "stop", stop)
    for life in ("start", "run", "run_once"):
        running = httpd.Server(ip="127.0.0.1", port=0)
        port = running.port
        client = connect(running)
        client.sendall(get(b"/stop"))
        if life == "start":
            running.start()
        elif life == "run":
            running.run()
        else:
            for _ in range(5):
                running.run_once(0)
        answer, = answers(client.recv(1000))
        assert answer.body == b"bye"
        running.stop()
        client.close()
        assert_free(port)
    running = httpd.Server(ip="127.0.0.1", port=0)
    running.start()
    stoppers = [threading.Thread(target=running.stop) for _ in range(8)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(10)
    assert "httpd" not in threads() and not any(stopper.is_alive() for stopper in stoppers)


def test_a_graceful_stop_lets_requests_finish(server):
    with connect(server) as client, connect(server) as idle, connect(server) as stuck:
        idle.send(get())
        client.sendall(post(b"abc")[:-1])
        stuck.sendall(b"GET")
        for _ in range(5):
            server.run_once(0)
        server.start()
        stopper = threading.Thread(target=server.stop, args=(1,))
        stopper.start()
        assert idle.recv(1000).startswith(b"HTTP/1.1 200") and idle.recv(10) == b""
        with pytest.raises(OSError):
            connect(server)
        client.sendall(b"c")
        data = b""
        while more := client.recv(1000):
            data += more
        answer, = answers(data)
        assert answer.status == 200 and answer.headers["Connection"] == "close"
        stopper.join(10)
        assert not stopper.is_alive() and stuck.recv(10) == b""


def test_stop_does_not_wait_for_who_has_nothing_under_way(server):
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 1000000) and 200)
    with connect(server) as reader, connect(server) as refused:
        refused.send(b"\x00")
        reader.send(get(b"/large") * 8)
        for _ in range(5):
            server.run_once(0.01)
        assert server.held
        server.start()
        start, stopper = time.monotonic(), threading.Thread(target=server.stop, args=(20,))
        stopper.start()
        while reader.recv(1 << 20):
            pass
        stopper.join(30)
        assert time.monotonic() - start < 10


def test_a_server_starts_once_and_can_be_stopped_before(server):
    with httpd.Server(ip="127.0.0.1", port=0) as running:
        for again in (running.start, running.run):
            with pytest.raises(RuntimeError):
                again()
        assert raw_get(running.port) == 200
    early = httpd.Server(ip="127.0.0.1", port=0)
    early.stop()
    early.run()
    early.run_once()
    assert early.timeout() is None and early.fileno() == -1 and running.timeout() is None and running.fileno() == -1
    httpd.register_httpdcb("test", "x", echo, None, lambda: pytest.fail("a server that does not serve"))
    idle = httpd.Server(ip="127.0.0.1", port=0)
    assert idle.port
    idle.stop()


def test_stop_from_another_thread_while_the_loop_is_somebody_elses(server):
    stopper = threading.Timer(0.1, server.stop, (5,))
    server.run_once(0)
    stopper.start()
    until = time.monotonic() + 10
    while server.fileno() >= 0 and time.monotonic() < until:
        server.run_once(0.05)
    stopper.join(10)
    assert not stopper.is_alive() and server.fileno() == -1


def test_who_has_sent_in_time_is_served_though_a_handler_was_slow():
    httpd.register_httpdcb("test", "echo", echo)
    httpd.register_httpdcb("test", "slow", lambda request, page: time.sleep(1.3) or 200)
    server = httpd.Server(ip="127.0.0.1", port=0, conn_timeout=1, request_timeout=1)
    with connect(server) as slow, connect(server) as kept, connect(server) as half:
        kept.send(get())
        half.send(get()[:20])
        pump(server, kept)
        slow.send(get(b"/slow"))
        server.run_once(0.1)
        kept.send(get())
        half.send(get()[20:])
        for client in (kept, half):
            assert pump(server, client)[0].startswith(b"HTTP/1.1 200")
    server.stop(0)


def test_bind_errors_raise_in_the_caller(server):
    for start in (lambda server: server.start(), lambda server: server.run(), lambda server: server.port, lambda server: server.fileno()):
        with pytest.raises(OSError, match="cannot listen on 127.0.0.1 port %d: Address already in use" % server.port) as error:
            start(httpd.Server(ip="127.0.0.1", port=server.port))
        assert error.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="cannot listen on 192.0.2.77 port"):
        httpd.Server(ip="192.0.2.77", port=0).start()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
@pytest.mark.parametrize("ip", ["", "*"])
def test_the_empty_ip_is_every_address_in_one_socket(server, ip):
    seen = []
    httpd.register_httpdcb("test", "h", lambda request, page: seen.append((request.client[0], request.server[0])) or 200)
    with httpd.Server(ip=ip, port=0) as both:
        assert raw_get(both.port, "127.0.0.1", get(b"/h")) == 200 and raw_get(both.port, "::1", get(b"/h")) == 200
        assert both.url == "http://127.0.0.1:%d" % both.port
    assert seen == [("127.0.0.1", "127.0.0.1"), ("::1", "::1")]
    with httpd.Server(ip="::1", port=0) as one:
        assert one.url == "http://[::1]:%d" % one.port and raw_get(one.port, "::1") == 200


def test_no_name_is_ever_looked_up(server, monkeypatch):
    for name in ("getaddrinfo", "gethostbyaddr", "getnameinfo", "getfqdn", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, lambda *_: pytest.fail("a look-up"))
    client = socket.socket()
    client.connect(("127.0.0.1", server.port))
    client.sendall(get())
    assert pump(server, client)[0].startswith(b"HTTP/1.1 200")
    client.close()


TIMEOUT_ROWS = [(b"", b"", "conn_timeout: an idle connection is closed silently"), (get(), b"HTTP/1.1 200", "conn_timeout: also after a request"),
                (b"GET /ec", b"HTTP/1.1 408", "request_timeout: the head"), (B + b"X: y\r\n", b"HTTP/1.1 408", "request_timeout: the fields"),
                (post(b"abc")[:-1], b"HTTP/1.1 408", "request_timeout: the content"), (chunked(b"3\r\nab"), b"HTTP/1.1 408", "request_timeout: chunks"),
                (b"\r\n", b"", "an empty line is no request"), (get() + b"GET", b"HTTP/1.1 200", "a request behind another")]


@pytest.mark.parametrize("raw, expected", [row[:2] for row in TIMEOUT_ROWS], ids=[row[2] for row in TIMEOUT_ROWS])
def test_deadlines_hold_though_nothing_else_happens(raw, expected):                # OPENSIPS, never 6
    httpd.register_httpdcb("test", "echo", echo)
    with httpd.Server(ip="127.0.0.1", port=0, conn_timeout=0.2, request_timeout=0.2) as server, connect(server) as client:
        client.sendall(raw)
        data = b""
        while more := client.recv(65536):
            data += more
        assert data.startswith(expected) and (expected or not data)
        assert not server.connections or data


def test_a_head_that_drips_is_cut_off():
    with httpd.Server(ip="127.0.0.1", port=0, request_timeout=0.3) as server, connect(server) as client:
        start, ended = time.monotonic(), b""
        client.settimeout(0.05)
        for byte in B + b"X: " + b"y" * 1000:
            client.send(bytes([byte]))
            with contextlib.suppress(TimeoutError, socket.timeout):
                ended = client.recv(1000)
                break
        assert ended.startswith(b"HTTP/1.1 408") and time.monotonic() - start < 8


def test_a_reader_that_takes_nothing_is_closed():
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 1000000) and 200)
    with httpd.Server(ip="127.0.0.1", port=0, conn_timeout=0.2) as server, connect(server) as client:
        client.sendall(get(b"/large") * 40)
        until = time.monotonic() + 10
        while not server.held:
            assert time.monotonic() < until
        while server.connections:
            assert time.monotonic() < until
        assert server.held == 0


def test_timeout_says_when_run_once_is_due(server):
    server.run_once(0)
    assert server.timeout() is None
    with connect(server) as client:
        client.send(b"G")
        server.run_once(0.1)
        assert 0 <= server.timeout() <= 1


def test_the_longest_idle_connection_makes_room():
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(ip="127.0.0.1", port=0, max_connections=3)
    clients = []
    for _ in range(3):
        clients.append(connect(server))
        clients[-1].send(get())
        assert pump(server, clients[-1])[1] == "open"
    clients[0].send(get())                                  # so the second is the one that has been idle longest
    pump(server, clients[0])
    clients.append(connect(server))
    clients[-1].send(get())
    assert pump(server, clients[-1])[0].startswith(b"HTTP/1.1 200")
    assert [pump(server, client)[1] for client in clients] == ["open", "closed", "open", "open"]
    for client in clients:
        client.close()
    server.stop(0)


@pytest.mark.parametrize("raw", [b"", b"GET", post(b"abc")[:-1]], ids=["silent", "in the head", "in the content"])
def test_stuck_clients_do_not_keep_a_newcomer_out(raw):
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(ip="127.0.0.1", port=0, max_connections=100)
    clients = [connect(server) for _ in range(100)]
    for client in clients:
        client.send(raw)
    for _ in range(5):
        server.run_once(0)
    assert len(server.connections) == (100 if raw else 0)   # the kernel keeps the silent ones for a while
    for _ in range(3):
        data, end = exchange(server, get())
        assert data.startswith(b"HTTP/1.1 200") and len(server.connections) <= 100
    for client in clients:
        client.close()
    server.stop(0)


def test_out_of_descriptors_without_spinning(server, caplog):
    """EMFILE: idle connections make room; when there are none the server waits instead of spinning, and then goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server.run_once(0)
    client = connect(server)
    client.send(get())
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        turns = 0
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            server.run_once(until - time.monotonic())
            turns += 1
        assert turns < 5 and "nobody is taken in for a second" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until = time.monotonic() + 5
    while not server.requests:
        assert time.monotonic() < until
        server.run_once(1)
    client.close()


def test_a_client_that_connects_and_closes_upsets_nothing(server):
    for _ in range(50):
        connect(server).close()
    server.run_once(0)
    data, end = exchange(server, get())
    assert data.startswith(b"HTTP/1.1 200") and not any(c for c in server.connections if c.state is not httpd.Connection.idle)


LONE_ROWS = [(get(b"/empty"), 1, "an answer without content"), (get(b"/large"), 1, "16 kB and more"), (get() * 5, 5, "pipelined requests"),
             (get()[:20], 0, "the first of two segments")]


@pytest.mark.parametrize("raw, count", [row[:2] for row in LONE_ROWS], ids=[row[2] for row in LONE_ROWS])
def test_a_lone_request_needs_nobody_else(server, raw, count):                      # OPENSIPS, never 1
    httpd.register_httpdcb("test", "empty", lambda request, page: 200)
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 500000) and 200)
    with server, connect(server) as client:
        client.sendall(raw)
        if not count:
            time.sleep(0.01)
            client.sendall(get()[20:])
            count = 1
        data = b""
        while len(answers_so_far(data)) < count:
            data += client.recv(65536)
        assert [answer.status for answer in answers(data)] == [200] * count


def answers_so_far(data):
    try:
        return answers(data)
    except (http.client.HTTPException, ValueError):
        return []


def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_floods_leave_memory_and_descriptors_where_they_were(server):              # OPENSIPS, never 3 and 6
    def flood(heads, opened, half_sent):
        with connect(server) as client:
            client.setblocking(True)
            raw = b"HEAD /echo HTTP/1.1\r\n" + HOST + b"\r\n"
            for method in (b"HEAD", b"PUT", b"OPTIONS"):
                for _ in range(heads // 75):
                    client.sendall(raw.replace(b"HEAD", method) * 25)
                    pump(server, client, 1)
                    client.setblocking(True)
        for _ in range(opened):
            connect(server).close()
            server.run_once(0)
        for _ in range(half_sent // 100):
            clients = [connect(server) for _ in range(100)]
            for number, client in enumerate(clients):
                client.send([b"GET /echo HT", B + b"X: y", post(b"abc")[:-1]][number % 3])
            server.run_once(0)
            server.run_once(0)
            for client in clients:
                client.close()
            for _ in range(3):
                server.run_once(0)
    flood(2500, 2000, 500)
    memory, open_files = resident(), descriptors()
    flood(25000, 20000, 2000)
    assert descriptors() == open_files and not server.connections and server.held == 0
    assert resident() - memory < 500000


COST_ROWS = [
    (lambda number: get(b"/h"), 1, 10, "the same GET again"), (lambda number: get(b"/h?%d" % number), 1, 16, "a new URL"),
    (lambda number: get(b"/h", b"X-Unique: %d" % number), 1, 24, "a field never seen before"),
    (lambda number: get(b"/h") * 16, 16, 16 * 8 + 4, "16 pipelined ones"),
    (lambda number: post(b'{"jsonrpc":"2.0","method":"none","id":1}', b"Content-Type: application/json", path=b"/mi"), 1, 15, "JSON-RPC"),
]


@pytest.mark.parametrize("raw, count, calls, why", COST_ROWS, ids=[row[3] for row in COST_ROWS])
def test_what_a_request_costs(server, raw, count, calls, why):
    """One poll, one recv, one send, and few calls of our own functions: a slow change is noticed here."""
    httpd.register_httpdcb("test", "h", lambda request, page: page.write(b"Hello, world!\n") and 200)
    httpd.register_mi("none", lambda: None)
    httpd.loadmodule("mi_http")
    own, system = [], []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == httpd.__file__:
            own.append(frame.f_code.co_name)
        elif event == "c_call" and argument.__name__ in ("poll", "recv", "send", "accept", "_accept", "register", "modify", "sendmsg", "close"):
            system.append(argument.__name__)
    with connect(server) as client:
        for number in range(4):
            client.setblocking(True)
            client.sendall(raw(number))
            pump(server, client)
        client.setblocking(True)
        client.sendall(raw(number + 1))
        while not system:                                   # until the kernel has brought it
            sys.setprofile(profile)
            server._turn(1)
            sys.setprofile(None)
            if "recv" not in system:
                own, system = [], []
        assert client.recv(65536).count(b"HTTP/1.1 200 OK") == count
    assert sorted(system) == ["poll", "recv", "send"] and len(own) <= calls, (len(own), own, system)


# ------------------------------------------------------------------------------------------------------------- mi_http

@pytest.fixture
def mi(server):
    """Send a body to /mi; returns the answer."""
    httpd.loadmodule("mi_http")

    def send(body, kind=b"application/json", *fields):
        raw = post(body if isinstance(body, bytes) else json.dumps(body).encode(), *([b"Content-Type: " + kind] if kind else []), *fields, path=b"/mi")
        return answers(exchange(server, raw)[0])[0]
    return send


def fails(call):
    raise httpd.HTTPError(404, "no such dialog")


def error(code, message, ident="null", data=""):
    return b'{"jsonrpc":"2.0","error":{"code":%d,"message":"%s"%s},"id":%s}' % (code, message.encode(), b',"data":"%s"' % data.encode() if data else b"",
                                                                             ident.encode())


def ok(result, ident="1"):
    return b'{"jsonrpc":"2.0","result":%s,"id":%s}' % (result.encode(), ident.encode())


INVALID = error(-32600, "Invalid Request")
MI_ROWS = [
    (b'{"jsonrpc":"2.0","method":"httpd_list_root_path","id":1}', ok('[{"http_root":"mi","module":"mi_http"},{"http_root":"echo","module":"test"}]'), "newest first"),
    (b'{"jsonrpc":"2.0","method":"httpd:list_root_path","id":1}', ok('[{"http_root":"mi","module":"mi_http"},{"http_root":"echo","module":"test"}]'), "the newer name"),
    *((b'{"jsonrpc":"2.0","method":"add","params":%s,"id":1}' % params, ok(result), "params %s" % params.decode()) for params, result in (
        (b"[1,2]", "3"), (b'{"a":1,"b":2}', "3"), (b'["1","2"]', "3"), (b'{"a":"-1","b":"2"}', "1"), (b"[1.5,2]", "3.5"))),
    *((b'{"jsonrpc":"2.0","method":"none","id":1%s}' % params, ok("null"), "no params: %s" % params.decode()) for params in (b"", b',"params":[]', b',"params":{}')),
    (b'{"jsonrpc":"2.0","method":"add","params":[1],"id":1}', error(-32602, "Invalid params", "1", "missing a required argument: 'b'"), "one too few"),
    (b'{"jsonrpc":"2.0","method":"add","params":[1,2,3],"id":1}', error(-32602, "Invalid params", "1", "too many positional arguments"), "one too many"),
    (b'{"jsonrpc":"2.0","method":"add","params":{"a":1,"b":2,"c":3},"id":1}', error(-32602, "Invalid params", "1", "got an unexpected keyword argument 'c'"), "unknown"),
    (b'{"jsonrpc":"2.0","method":"add","params":["x",2],"id":1}', error(-32602, "Invalid params", "1", "a must be a number, not 'x'"), "no number"),
    (b'{"jsonrpc":"2.0","method":"add","params":["1_0",2],"id":1}', error(-32602, "Invalid params", "1", "a must be a number, not '1_0'"), "int() would take it"),
    (b'{"jsonrpc":"2.0","method":"nothing","id":1}', error(-32601, "Method not found", "1"), "unknown method"),
    (b'{"jsonrpc":"2.0","method":"fails","params":[1],"id":1}', error(404, "no such dialog", "1"), "a command's own error"),
    (b'{"jsonrpc":"2.0","method":"breaks","id":1}', error(-32000, "Server error", "1", "the command failed, the log of the server says why"), "an exception"),
    (b'{"jsonrpc":"2.0","method":"odd","id":1}', error(-32000, "Server error", "1", "the command failed, the log of the server says why"), "a result that is no JSON"),
    *((body, error(-32700, "Parse error"), "no JSON: %r" % body[:20]) for body in (
        b"", b"{", b"x", b'{"jsonrpc":"2.0","method":"none","id":1}x', b"\xff", b"[" * 1000, b'{"a":NaN}', b"[Infinity]", b'\xef\xbb\xbf{}', b"'a'")),
    *((body, INVALID, "no request: %s" % body.decode()) for body in (
        b"1", b'"x"', b"null", b"true", b"{}", b"[]", b'{"jsonrpc":"1.0","method":"none"}', b'{"jsonrpc":2.0,"method":"none"}', b'{"method":"none"}',
        b'{"jsonrpc":"2.0","method":1}', b'{"jsonrpc":"2.0"}', b'{"jsonrpc":"2.0","method":"none","params":null}', b'{"jsonrpc":"2.0","method":"none","params":1}',
        b'{"jsonrpc":"2.0","method":"none","params":"x"}', b'{"jsonrpc":"2.0","method":"none","id":true}', b'{"jsonrpc":"2.0","method":"none","id":[]}',
        b'{"jsonrpc":"2.0","method":"none","id":{}}', b'{"jsonrpc":"2.0","method":"none","id":1e999}')),
    (b'{"jsonrpc":"2.0","method":1,"id":7}', error(-32600, "Invalid Request", "7"), "an invalid request with an id"),
    *((b'{"jsonrpc":"2.0","method":"none","id":%s}' % ident, ok("null", ident.decode()), "the id %s" % ident.decode()) for ident in (
        b'"x"', b"0", b"-1", b"4294967297", b"123456789012345678901234567890", b'"123456789012345678901234567890"', b"null", b"1.5", b'"\\u00e4"')),    # never 14
    (b'{"jsonrpc":"2.0","method":"none"}', b"", "a notification"), (b'{"jsonrpc":"2.0","method":"nothing"}', b"", "a notification of what there is not"),
    (b'[{"jsonrpc":"2.0","method":"none","id":1},{"jsonrpc":"2.0","method":"none"},1,{"jsonrpc":"2.0","method":"none","id":"2"}]',
     b"[" + ok("null") + b"," + INVALID + b"," + ok("null", '"2"') + b"]", "a batch"),
    (b'[{"jsonrpc":"2.0","method":"none"},{"jsonrpc":"2.0","method":"none"}]', b"", "a batch of notifications"), (b"[1]", b"[" + INVALID + b"]", "a batch of one"),
    (b'[[]]', b"[" + INVALID + b"]", "a batch in a batch"),
]


@pytest.mark.parametrize("body, expected", [row[:2] for row in MI_ROWS], ids=[row[2] for row in MI_ROWS])
def test_json_rpc(mi, body, expected, caplog):
    def add(a: int, b: "int"):
        return a + b
    httpd.register_mi("add", add)
    httpd.register_mi("none", lambda: None)
    httpd.register_mi("fails", fails)
    httpd.register_mi("breaks", lambda: 1 / 0)
    httpd.register_mi("odd", lambda: {1, 2})
    answer = mi(body)
    assert answer.body == expected and answer.status == (200 if expected else 202)
    assert answer.headers["Content-Type"] == "application/json"
    if b"32000" in expected:
        assert "Traceback" in caplog.text


MI_REFUSED = [(None, (), 415, "no type (OPENSIPS, never 7)"), (b"text/plain", (), 415, "text/plain"), (FORM, (), 415, "a form"), (b"xapplication/json", (), 415, "x"),
              (b"Application/JSON; charset=utf-8", (), 200, "any case, parameters"), (b"text/xml", (), 200, "text/xml is tolerated"),
              (b"application/json-rpc", (), 200, "begins with it"), (b"application/json", (b"Origin: http://evil",), 403, "a foreign origin"),
              (b"application/json", (b"Origin: null",), 403, "the origin null"), (b"application/json", (b"Origin: http://EXAMPLE",), 200, "its own origin"),
              (b"application/json", (b"Origin: https://example",), 403, "the other scheme")]


@pytest.mark.parametrize("kind, fields, status", [row[:3] for row in MI_REFUSED], ids=[row[3] for row in MI_REFUSED])
def test_what_mi_takes(mi, kind, fields, status):
    assert mi(b'{"jsonrpc":"2.0","method":"version","id":1}', kind, *fields).status == status


def test_mi_is_post_only(mi, server):                                               # OPENSIPS, never 13
    answer, = answers(exchange(server, get(b"/mi"))[0])
    assert answer.status == 405 and answer.headers["Allow"] == "POST, OPTIONS"


def test_mi_commands_of_every_server(mi, server):
    call = lambda method, *params: json.loads(mi({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).body)
    assert {"which", "httpd_list_root_path", "httpd:list_root_path", "version", "uptime", "ps", "get_statistics"} <= set(call("which")["result"])
    assert call("which", "which")["result"] == [[], ["command"]] and call("which", "get_statistics")["result"] == [["statistics"]]
    assert call("which", "x")["error"] == {"code": 404, "message": "unknown MI command"}
    assert call("version")["result"] == {"Server": "httpd.py " + httpd.__version__}
    assert set(call("uptime")["result"]) == {"Now", "Up since", "Up time"}
    assert call("ps")["result"]["Processes"][0]["PID"] == os.getpid()
    assert call("get_statistics", ["all"])["result"]["httpd:requests"] == server.requests - 1
    assert list(call("get_statistics", ["requests", "httpd:connections"])["result"]) == ["httpd:requests", "httpd:connections"]
    assert len(call("get_statistics", "httpd:")["result"]) == 4 and call("get_statistics", ["x:"])["error"]["code"] == 404


def test_register_mi_refuses_what_is_taken():
    httpd.register_mi("mine", fails)
    for name in ("mine", "which", "", "a b"):
        with pytest.raises(httpd.ConfigError, match="MI command"):
            httpd.register_mi(name, fails)


def test_a_batch_whose_answer_outgrows_the_page(server):
    httpd.register_mi("large", lambda: "x" * 100000)
    httpd.loadmodule("mi_http")
    body = b"[" + b",".join([b'{"jsonrpc":"2.0","method":"large","id":1}'] * 20) + b"]"
    answer, = answers(exchange(server, post(body, b"Content-Type: application/json", path=b"/mi"))[0])
    assert answer.status == 200 and answer.json()["error"]["code"] == -32000 and "buf_size" in answer.json()["error"]["data"]


# ---------------------------------------------------------------------------------------------------------------- main

def command(*arguments, **options):
    return subprocess.Popen([sys.executable, str(HERE / "httpd.py"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command_line_serves_until_a_signal(tmp_path):
    (tmp_path / "mine.py").write_text("import httpd, __main__\n\ndef mod_init(params):\n    assert httpd is __main__\n"
                                      "    httpd.register_httpdcb('mine', 'mine', lambda request, page: page.write('mine') and 200)\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        with command(config(tmp_path, "[httpd]\nip = 127.0.0.1\nport = 0\n[mi_http]\n[mine]\n")) as process:
            first, *roots = [process.stdout.readline() for _ in range(3)]
            port = int(re.fullmatch(r"httpd\.py \S+ listens on http://127\.0\.0\.1:(\d+)\n", first)[1])
            assert roots == ["  /mi  mi_http\n", "  /mine  mine\n"]
            assert raw_get(port, raw=get(b"/mine")) == 200
            process.send_signal(number)
            assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


COMMAND_ROWS = [
    (["nowhere.cfg"], 1, r"nowhere\.cfg: cannot be read: No such file or directory\n", "no file"),
    (["bad.cfg"], 1, r'bad\.cfg:2: httpd: unknown parameter "prot", did you mean "port"\?\nbad\.cfg:3: httpd: port must be .*\n', "two problems, two lines"),
    (["-t", "bad.cfg"], 1, r"bad\.cfg:2: .*\nbad\.cfg:3: .*\n", "-t says the same"),
    (["good.cfg", "-o", "port=1"], 1, r"-o port=1: httpd: port must be 0 or 1024 to 65535, not '1'\n", "-o is checked"),
    (["taken.cfg"], 1, r".*cannot listen on 127\.0\.0\.1 port \d+: Address already in use\n", "a port in use"),
    (["half.cfg"], 1, r"httpd: .*tls_cert_file.*\n", "OPENSIPS, never 11: one half of TLS"),
    ([], 2, r"usage: .*\n.*the following arguments are required: file\n", "no arguments"), (["--nonsense"], 2, r"(?s)usage: .*", "unknown option"),
]


@pytest.mark.parametrize("arguments, status, stderr", [row[:3] for row in COMMAND_ROWS], ids=[row[3] for row in COMMAND_ROWS])
def test_operators_mistakes_are_a_line_each(tmp_path, server, arguments, status, stderr):
    (tmp_path / "good.cfg").write_text("[mi_http]")
    (tmp_path / "bad.cfg").write_text("[httpd]\nprot = 1\nport = x")
    (tmp_path / "taken.cfg").write_text("[httpd]\nip = 127.0.0.1\nport = %d" % server.port)
    (tmp_path / "half.cfg").write_text("[httpd]\ntls_key_file = x")
    with command(*arguments, cwd=tmp_path) as process:
        output = process.communicate(timeout=20)
    assert process.returncode == status and re.fullmatch(stderr, output[1]) and output[0] == "" and "Traceback" not in output[1]


def test_check_version_and_help(tmp_path):
    with command("-t", config(tmp_path, "[httpd]\nport = 9999\n[mi_http]\nroot = other")) as process:
        output = process.communicate(timeout=20)[0]
        assert process.returncode == 0 and "port = 9999\n" in output and "[mi_http]\nroot = other\n" in output and "# /other  mi_http" in output
    again = config(tmp_path, output)
    httpd.load_config(again)                                # what it prints is itself a configuration
    assert httpd.in_force("httpd")["port"] == 9999
    with command("--version") as process:
        assert process.communicate(timeout=20)[0] == "httpd.py %s\n" % httpd.__version__
    with command("--help") as process:
        output = process.communicate(timeout=20)[0]
    for rows_of_module in httpd.PARAMETERS.values():
        for row in rows_of_module:
            assert re.search(r"^  %s .*%s" % (row.name, re.escape(row.meaning)), output, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------- Budgets

SOURCE = (HERE / "httpd.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_size_of_the_file():
    lines = SOURCE.split("\n")
    assert len(lines) <= 2500 and max(map(len, lines)) <= 120
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno + 1 - len(docstring.split("\n")) <= 40, node.name


def test_only_the_standard_library_is_imported():
    for source in (SOURCE, (HERE / "test_httpd.py").read_text(encoding="utf-8")):
        names = {name.name.split(".")[0] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names}
        names |= {node.module.split(".")[0] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
        if hasattr(sys, "stdlib_module_names"):
            assert names <= {*sys.stdlib_module_names, "pytest", "httpd"}


def test_layout_of_the_repository():
    git = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    if git.returncode == 0 and git.stdout:
        top = {name.split("/")[0] for name in git.stdout.split("\n") if name and not name.startswith(".")}
        assert top == {"httpd.py", "test_httpd.py", "example.cfg", "README.md", "LICENSE"}


def test_readme_names_everything_public():
    for name in httpd.__all__:
        assert getattr(httpd, name) and "`%s" % name in README, name
    for rows_of_module in httpd.PARAMETERS.values():
        for row in rows_of_module:
            assert "| %s | %s | %s |" % (row.name, '""' if row.default == "" else "%s" % row.default, row.meaning) in README, row.name


def test_example_cfg_works_as_it_is(tmp_path):
    httpd.load_config(str(HERE / "example.cfg"))
    values = httpd.in_force("httpd")
    assert values["ip"] == "127.0.0.1" and values["port"] == 8888 and list(httpd.roots) == ["mi"]
    text = (HERE / "example.cfg").read_text(encoding="utf-8")
    for row in httpd.PARAMETERS["httpd"]:
        assert re.search(r"^#? ?%s =" % row.name, text, re.MULTILINE), row.name
    uncommented = re.sub(r"(?m)^#( ?)([a-z_]+ =)", r"\2", text)
    (tmp_path / "all.cfg").write_text(re.sub(r"(?m)^(ip|port) = .*$", "", uncommented))
    httpd.loaded.clear(), httpd.roots.clear(), httpd.params.clear()
    httpd.load_config(str(tmp_path / "all.cfg"))            # the values in the comments are the defaults
    assert {row.name: row.default for row in httpd.PARAMETERS["httpd"]} == httpd.in_force("httpd")


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_readme_blocks_run(number, tmp_path, monkeypatch):
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    (tmp_path / "block.py").write_text(block.replace("port=8000", "port=0"))
    with subprocess.Popen([sys.executable, "-u", "block.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+)", process.stdout.readline())[1])
        assert raw_get(port, raw=get(b"/hello")) == 200
        process.terminate()
        assert process.wait(20) == 0
