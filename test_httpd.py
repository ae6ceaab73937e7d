"""Tests of httpd.py, in the order of the file. A row is (raw bytes, what must come of it, why)."""
import ast
import asyncio
import contextlib
import contextvars
import errno
import gc
import hashlib
import http.client
import io
import json
import logging
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import wsgiref.validate

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
    (dict(tls_cert_file="/x"), "tls_cert_file is set without tls_key_file: HTTPS wants both"),
    (dict(tls_key_file="/x"), "tls_key_file is set without tls_cert_file: HTTPS wants both"),
    (dict(tls_ca_file="/x"), "tls_ca_file is set without tls_cert_file and tls_key_file"),
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
    ('[http]\nip = 127.0.0.1', ['1: http: no such module, did you mean "httpd"?'], "the standard library has one of that name"),
    ('[json]\nindent = 2', ['1: json: no such module, or it takes no parameters: it has no mod_init'], "a module that takes no parameters"),
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
    (dict(access_handler_cb=3), "no function: 3"), (dict(flush_data_cb=3), "no function: 3"), (dict(upload_data_cb="x"), "no function: 'x'"), (dict(methods="GET"), "methods must be a tuple of names"),
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
                                         ("Content-Length", "x"), ("Content-Length", "-3"), ("transfer-encoding", "chunked"), ("Connection", "close"), ("Date", "now")])
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


@pytest.mark.parametrize("value", [b"a" + b" " * 60000 + b"b", b"a" + b"\t," * 30000 + b"close", b"," * 60000, b" " * 60000],
                         ids=["blanks", "blanks and commas", "commas", "nothing but blanks"])
def test_no_connection_field_costs_more_than_its_length(value):
    """RFC 9112, 9.3: a list. 60 kB of blanks in it took 3 s; now they take a millisecond."""
    httpd.register_httpdcb("test", "h", lambda request, page: 204)
    server = httpd.Server(ip="127.0.0.1", port=0, max_header_size=65536)
    before = time.process_time()
    with server, connect(server) as client:
        client.sendall(get(b"/h", b"Connection: " + value))
        assert client.recv(1000)[:12] == b"HTTP/1.1 204"
    assert time.process_time() - before < 1


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


@pytest.mark.parametrize("line", [b"HEAD / HTTP/2.0", b"HEAD /a b HTTP/1.1", b"HEAD https://q/ HTTP/1.1", b"HEAD * HTTP/1.1"])
def test_no_error_to_head_has_content_whatever_was_seen(server, line):
    for count in range(5):                                  # the section is known from the second on, the whole from the third
        data, end = exchange(server, line + b"\r\n" + HOST + b"\r\n")
        assert data.endswith(b"\r\n\r\n") and end == "closed", count
        exchange(server, get())


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


@pytest.mark.parametrize("pause, total", [(0.1, 9), (9, 0.1)], ids=["without a byte", "in all"])
def test_lingering_is_bounded_by_time(server, monkeypatch, pause, total):
    """Not by bytes, which take no memory: an upload that was refused can be read to its end."""
    monkeypatch.setattr(httpd, "LINGER_PAUSE", pause)
    monkeypatch.setattr(httpd, "LINGER_TIME", total)
    with server, connect(server) as client:
        client.sendall(b"\x00")
        assert b"400" in client.recv(1000)
        end = time.monotonic() + 8
        while server.connections and time.monotonic() < end:
            time.sleep(0.01)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.send(b"x" if pause > total else b"")
        assert not server.connections and server.held == 0


def test_a_refused_upload_of_any_size_reads_its_413(server):
    with server, connect(server) as client:
        client.sendall(P + b"Content-Length: 30000000\r\n\r\n")
        for _ in range(30):
            client.sendall(b"x" * 1000000)
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


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
        raise KeyboardInterrupt
    httpd.register_httpdcb("test", "leave", leave)
    with connect(server) as client:
        client.send(get(b"/leave"))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3):
                server.run_once(0.1)
        assert client.recv(10) == b"" and not server.connections


def raising(error):
    def function(*_):
        raise error
    return function


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError(), BaseException("odd"), MemoryError()], ids=repr)
def test_no_exception_of_a_callback_ends_the_server(server, caplog, error):
    """Only KeyboardInterrupt leaves the loop: what a client can provoke must not end the service for the others."""
    fails = raising(error)
    httpd.register_httpdcb("test", "handler", fails)
    httpd.register_httpdcb("test", "flush", lambda request, page: 200, fails)
    httpd.register_httpdcb("test", "later", lambda request, page: 200, lambda request, pos, buf: 1 if not pos else fails())
    httpd.register_httpdcb("test", "upload", lambda request, page: 200, upload_data_cb=fails)
    httpd.register_wsgi("test", "wsgi", fails)
    httpd.register_wsgi("test", "pool", fails, threads=1)
    for path, statuses in ((b"/handler", [500]), (b"/flush", [500]), (b"/wsgi", [500]), (b"/pool", [500])):
        with connect(server) as client:
            client.send(get(path))
            data = b""
            while not data:
                data = pump(server, client)[0]
            assert [answer.status for answer in answers(data)] == statuses
    assert exchange(server, get(b"/later"))[1] == "closed"
    assert b"HTTP/1.1 500" in exchange(server, post(b"abc", path=b"/upload"))[0]
    assert "failed" in caplog.text and repr(error)[:8] in caplog.text
    assert b"HTTP/1.1 200" in exchange(server, get())[0] and server.held == 0


@pytest.mark.parametrize("error, status, line", [
    (httpd.HTTPError(400, "no such key: \ud800"), 400, "400 no such key: \ufffd"),
    (httpd.HTTPError(404, "line\r\nends"), 404, "404 line\r\nends"),
    (httpd.HTTPError(200, "fine"), 500, None), (httpd.HTTPError(99), 500, None), (httpd.HTTPError(-32000, "MI"), 500, None),
])
def test_what_an_http_error_may_say(server, error, status, line):
    """The place that answers must not fail: json.loads() makes lone surrogates of what a client sends."""
    httpd.register_httpdcb("test", "handler", raising(error))
    httpd.register_httpdcb("test", "upload", lambda request, page: 200, upload_data_cb=raising(error))
    for raw in (get(b"/handler"), post(b"abc", path=b"/upload")):
        answer, = answers(exchange(server, raw)[0])
        assert answer.status == status and (line is None or answer.body.decode() == line + "\n")


def test_an_http_error_that_was_changed_after_it_was_made(server):
    error = httpd.HTTPError(400, "x")
    error.headers = {"X": "a\r\nY: b"}
    httpd.register_httpdcb("test", "upload", lambda request, page: 200, upload_data_cb=raising(error))
    assert answers(exchange(server, post(b"abc", path=b"/upload"))[0])[0].status == 500


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
    (lambda number: get(b"/h"), 1, 8, "the same GET again"), (lambda number: get(b"/h?%d" % number), 1, 12, "a new URL"),
    (lambda number: get(b"/h", b"X-Unique: %d" % number), 1, 17, "a field never seen before"),
    (lambda number: get(b"/h") * 16, 16, 56, "16 pipelined ones"),
    (lambda number: post(b'{"jsonrpc":"2.0","method":"none","id":1}', b"Content-Type: application/json", path=b"/mi"), 1, 16, "JSON-RPC"),
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


# ----------------------------------------------------------------------------------------------------------------- TLS

SUFFIXES = {"G": "AES256-GCM-SHA384", "g": "AES128-GCM-SHA256", "P": "CHACHA20-POLY1305", "C": "AES256-CCM", "c": "AES128-CCM", "S": "AES256-SHA", "s": "AES128-SHA",
            "8": "AES256-CCM8", "3": "AES256-SHA384", "2": "AES256-SHA256", "1": "AES128-SHA256"}
SUITES13 = {"G": "TLS_AES_256_GCM_SHA384", "P": "TLS_CHACHA20_POLY1305_SHA256", "g": "TLS_AES_128_GCM_SHA256"}
EXCHANGES = {"E": "ECDHE-ECDSA-", "R": "ECDHE-RSA-", "-": ""}
STRONG, ALL = "384 521 8192", "256 384 521 X25519 X448 2048 3072 4096 6144 8192"
MIXED = "384 521 8192 256 X25519 X448 2048 3072 4096 6144"
NORMAL, SECURE128 = "E:GPCSgcs R:GPSgs -:GCSgcs", "E:GPSCgsc R:GPSgs -:GSCgsc"
NOTHING, OPENSSL = "leaves nothing of TLS 1.2 and 1.3", "if it is OpenSSL's language, write it in GnuTLS', for example NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"

# What GnuTLS 3.7.9 makes of them (gnutls-cli -l --priority), less TLS 1.1, 1.0, DHE and the CCM of TLS 1.3: versions, suites of TLS 1.2 and of 1.3, groups; or the error.
PRIORITY_ROWS = [
    ("SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2", "2", "E:GPC R:GP -:GC", "", STRONG),
    ("SECURE256:-VERS-TLS-ALL:+VERS-TLS1.2", "2", "E:GPC R:GP -:GC", "", STRONG),
    ("SECURE256:+SECURE128", "23", SECURE128, "GPg", MIXED),
    ("SECURE256:+SECURE128:-VERS-TLS-ALL:+VERS-TLS1.2", "2", SECURE128, "", MIXED),
    ("SECURE128:-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1:-VERS-DTLS-ALL:-CIPHER-ALL:-MAC-ALL:-KX-ALL:+AEAD:+ECDHE-ECDSA:+ECDHE-RSA:+AES-128-GCM:+CHACHA20-POLY1305"
     ":+AES-256-GCM", "23", "E:gPG R:gPG", "gPG", ALL),
    ("NONE:+SECURE256:-VERS-ALL:+VERS-TLS1.2:+VERS-TLS1.3", "23", "E:GPC R:GP -:GC", "GP", STRONG),
    ("NONE:+VERS-TLS1.0:+AES-128-CBC:+SHA1:+RSA:+COMP-NULL", NOTHING),
    ("NONE:+VERS-TLS1.3:+AES-128-GCM:+AEAD:+SIGN-ALL", NOTHING),
    ("NORMAL", "23", NORMAL, "GPg", ALL),
    ("NORMAL:+VERS-TLS1.2:+CTYPE-X509:+SIGN-ALL:+COMP-NULL", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2", "2", NORMAL, "", ALL),
    ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.3", "3", "", "GPg", ALL),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.2:+VERS-TLS1.3", "23", NORMAL, "GPg", ALL),
    ("NORMAL:%SERVER_PRECEDENCE:%COMPAT:-RSA:-VERS-ALL:+VERS-TLS1.2:-ARCFOUR-128", "2", "E:GPCSgcs R:GPSgs", "", ALL),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.0:+VERS-TLS1.3", NOTHING),
    ("NORMAL:-VERS-TLS1.2", NOTHING),
    ("NORMAL:-KX-ALL:+RSA", "23", "-:GCSgcs", "GPg", ALL),
    ("NORMAL:-AES-128-GCM:-AES-128-CCM:-AES-128-CBC:-VERS-ALL:+VERS-TLS1.3", "3", "", "GP", ALL),
    ("NORMAL:-SHA1", "23", "E:GPCgc R:GPg -:GCgc", "GPg", ALL),
    ("NORMAL:-CTYPE-ALL:+CTYPE-X509", "23", NORMAL, "GPg", ALL),
    ("PERFORMANCE", "23", "-:gGcCsS E:gGPcCsS R:gGPsS", "gGP", ALL),
    ("PFS", "23", "E:GPCSgcs R:GPSgs", "GPg", ALL),
    ("PFS:%SERVER_PRECEDENCE", "23", "E:GPCSgcs R:GPSgs", "GPg", ALL),
    ("SECURE128", "23", SECURE128, "GPg", ALL),
    ("SECURE128:+SECURE256:+NORMAL", "23", SECURE128, "GPg", ALL),
    ("SUITEB128", "2", "E:Gg", "", "256 384"),
    ("LEGACY", "23", NORMAL, "GPg", ALL),
    ("normal:-vers-tls1.0", "23", NORMAL, "GPg", ALL),
    ("NORMAL:", 'tls_ciphers item 2, "": is empty'),
    ("NORMAL::-VERS-TLS1.0", 'tls_ciphers item 2, "": is empty'),
    (" NORMAL", "23", NORMAL, "GPg", ALL),
    ("NORMAL:+BOGUS", 'tls_ciphers item 2, "+BOGUS": is unknown'),
    ("NORMAL:-CIPHER-BOGUS", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-VERS-SSL2.0", 'tls_ciphers item 2, "-VERS-SSL2.0": is unknown, did you mean "VERS-TLS1.0"?'),
    ("NORMAL:+VERS-SSL3.0", "23", NORMAL, "GPg", ALL),
    ("NORMAL:%PROFILE_MEDIUM", "23", NORMAL, "GPg", ALL),
    ("NORMAL:%NO_TICKETS", "23", NORMAL, "GPg", ALL),
    ("NORMAL:%UNSAFE_RENEGOTIATION", "23", NORMAL, "GPg", ALL),
    ("NORMAL:%FORCE_SESSION_HASH", 'tls_ciphers item 2, "%FORCE_SESSION_HASH": is unknown'),
    ("ECDHE-RSA-AES256-GCM-SHA384", OPENSSL),
    ("HIGH:!aNULL:!MD5", 'tls_ciphers item 1, "HIGH": is unknown; ' + OPENSSL),
    ("TLSv1.2", OPENSSL),
    ("DEFAULT", OPENSSL),
    ("AES256-SHA", OPENSSL),
    # More of the grammar; each was compared with gnutls-cli, too.
    ("NONE:-KX-ALL:NORMAL:+VERS-TLS1.2", "2", NORMAL, "", ALL),                         # after NONE, a bare level adds
    ("+AES-128-CBC:SUITEB192", "2", "E:G", "", "384"),                                  # the first bare level replaces
    ("+SUITEB192:NORMAL:-VERS-TLS1.3", "2", NORMAL, "", ALL),                           # also what a level with a sign had
    ("SUITEB192:NORMAL", "2", NORMAL, "", "384 256 521 X25519 X448 2048 3072 4096 6144 8192"),         # a later one adds
    ("SUITEB192:+AES-256-CCM-8:+AES-256-CBC:+SHA384:+SHA256:+RSA", "2", "E:G83 -:G82", "", "384"),
    ("SUITEB192: +AES-128-CBC: +SHA256", "2", "E:G1", "", "384"),                       # blanks after a colon
    ("NORMAL:-VERS-ALL:+VERS-TLS1.2:-GROUP-ALL:+GROUP-DH-ALL", "2", "-:GCSgcs", "", "2048 3072 4096 6144 8192"),       # no ECDHE without a curve
    ("NORMAL:-GROUP-ALL", "2", "-:GCSgcs", "", ""),                                     # no TLS 1.3 without a group
    ("NORMAL:-CURVE-ALL:+CURVE-X25519", "23", NORMAL, "GPg", "X25519"),
    ("NORMAL:-GROUP-EC-ALL:+GROUP-SECP521R1:!GROUP-DH-ALL", "23", NORMAL, "GPg", "521"),
    ("NORMAL:-KX-ALL", "3", "", "GPg", ALL),
    ("NORMAL:-MAC-ALL:+SHA1", "2", "E:Ss R:Ss -:Ss", "", ALL),                          # TLS 1.3 is AEAD only
    ("NORMAL:%NO_EXTENSIONS", "2", NORMAL, "", ALL),
    ("SECURE256:+SECURE192:+PFS:-SHA1", "23", "E:GPCgc R:GPg -:GCgc", "GPg", MIXED),
    ("", 'tls_ciphers item 1, "": is empty'),
    ("NORMAL :-RSA", 'item 1, "NORMAL ": is unknown, did you mean "NORMAL"?'),          # but blanks before it are part of the word
    ("NORMAL:-NORMAL", 'item 2, "-NORMAL": is unknown'),
    ("NORMAL:NONE", 'item 2, "NONE": needs + or -, or to be first'),
    ("NORMAL:+NONE", 'item 2, "+NONE": is unknown'),
    ("NORML", 'item 1, "NORML": is unknown, did you mean "NORMAL"?'),
    ("NORMAL:RSA", 'item 2, "RSA": needs + or -'),
    ("NORMAL:+ECDHE", 'item 2, "+ECDHE": is unknown'),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.4", 'item 3, "+VERS-TLS1.4": is unknown, did you mean "VERS-TLS1.3"?'),
    ("NORMAL:-VERS-ALLX", 'item 2, "-VERS-ALLX": is unknown, did you mean "VERS-ALL"?'),        # GnuTLS compares but the beginning
    ("NORMAL:%server_precedence", 'item 2, "%server_precedence": is unknown'),
    ("NORMAL:%PROFILE_HIGH", 'item 2, "%PROFILE_HIGH": is unknown, or cannot be enforced'),
    ("NORMAL:%FORCE_ETM", "cannot be enforced with Python's ssl: leave it out"),
    ("@SYSTEM", 'item 1, "@SYSTEM": there is no system priority file here'),
    ("@SECLEVEL=2", OPENSSL), ("ALL", OPENSSL), ("kEECDH", OPENSSL), ("TLS_AES_256_GCM_SHA384", OPENSSL), ("EECDH+AESGCM", OPENSSL),
    ("NORMAL:!aNULL", 'item 2, "!aNULL": is unknown; ' + OPENSSL),
    ("NORMAL:@SECLEVEL=0", 'item 2, "@SECLEVEL=0": is unknown; ' + OPENSSL),
    *[("NORMAL:+" + word, 'item 2, "+%s": is refused' % word) for word in
      "NULL ANON-DH ANON-ECDH PSK DHE-PSK ECDHE-PSK RSA-PSK SRP SRP-RSA SRP-DSS RSA-EXPORT ARCFOUR-40".split()],
    *[("NORMAL:-" + word, "23", NORMAL, "GPg", ALL) for word in "NULL ANON-DH PSK SRP RSA-EXPORT ARCFOUR-128 3DES-CBC MD5 VERS-SSL3.0 SIGN-RSA-MD5".split()],
    ("NORMAL:-VERS-ALL:+VERS-DTLS1.2", NOTHING),
    ("NORMAL:-VERS-TLS1.3:-KX-ALL:+DHE-RSA", NOTHING),
    ("NORMAL:-CIPHER-ALL:+CAMELLIA-128-GCM", NOTHING),
    ("NORMAL:-SIGN-ALL", NOTHING),
    ("NORMAL:-AES-256-GCM", "cannot offer only TLS_CHACHA20_POLY1305_SHA256 and TLS_AES_128_GCM_SHA256 for TLS 1.3: enable"),
    ("NORMAL:-CHACHA20-POLY1305", "cannot offer only TLS_AES_256_GCM_SHA384 and TLS_AES_128_GCM_SHA256 for TLS 1.3"),
    ("SECURE128:-CIPHER-ALL:+AES-128-GCM", "cannot offer only TLS_AES_128_GCM_SHA256 for TLS 1.3"),
    ("SECURE128:-CIPHER-ALL:+AES-256-GCM", "23", "E:G R:G -:G", "G", ALL),
]
ACCEPTED = [row for row in PRIORITY_ROWS if len(row) == 5]


def expected_plan(versions, suites, suites13, groups):
    parts = [part.split(":") for part in suites.split()]
    return (tuple("TLSv1." + v for v in versions), tuple(EXCHANGES[exchange] + SUFFIXES[letter] for exchange, letters in parts for letter in letters),
            tuple(SUITES13[letter] for letter in suites13), tuple("SECP%sR1" % g if len(g) == 3 else g if g[0] == "X" else "FFDHE" + g for g in groups.split()))


@pytest.mark.parametrize("text, expected", [(row[0], row[1:]) for row in PRIORITY_ROWS], ids=[repr(row[0])[:70] for row in PRIORITY_ROWS])
def test_priority(text, expected):
    if len(expected) == 1:
        with pytest.raises(httpd.ConfigError, match=re.escape(expected[0])):
            httpd.tls_priority(text)
    else:
        assert httpd.tls_priority(text)[:4] == expected_plan(*expected)


ONE_GROUP = "groups: before Python 3.15, which can set several, only "
SIGNATURES = "signatures: as OpenSSL likes, Python's ssl cannot restrict them"
PLAN_ROWS = [
    ("NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2", False, True, [], "the recommended string loses nothing"),
    ("SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2", False, True, [SIGNATURES, ONE_GROUP + "SECP384R1"], "OpenSIPS' default"),
    ("NORMAL", False, True, ["TLS1.1: skipped, too old or no suite left", "TLS1.0: skipped, too old or no suite left"], "old protocols"),
    ("SECURE128:-VERS-TLS1.1:-VERS-TLS1.0:%SERVER_PRECEDENCE", True, True, [], "server preference"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.3:-AES-128-GCM", True, True, [], "two of three TLS 1.3 suites need server preference"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:%NO_TICKETS", False, False, [], "no tickets"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:%NO_TICKETS_TLS12", False, False, [], "no tickets for TLS 1.2: none at all"),
    ("PFS:-VERS-ALL:+VERS-TLS1.2", False, False, [], "forward secrecy: no tickets"),
    ("SECURE128:+PFS:-VERS-ALL:+VERS-TLS1.2", False, False, [], "wherever it stands"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:-CIPHER-AES-128-CBC", False, True,
     ['item 4, "-CIPHER-AES-128-CBC": ignored, as by GnuTLS, did you mean "AES-128-CBC"?'], "an ignored family"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:+3DES-CBC:+ARCFOUR-128:-MD5", False, True,
     ['item %d, "+%s": skipped, Python\'s ssl has nothing of the kind' % item for item in ((4, "3DES-CBC"), (5, "ARCFOUR-128"))], "skipped ciphers"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:-SIGN-RSA-SHA1", False, True, [SIGNATURES], "signatures"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:-GROUP-DH-ALL", False, True, [], "FFDHE is no matter in TLS 1.2"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.3:-GROUP-DH-ALL", False, True, [ONE_GROUP + "SECP256R1"], "but in TLS 1.3, where OpenSSL's default has it"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-GROUP-EC-ALL", False, True, ["TLS1.3: skipped, too old or no suite left"], "FFDHE alone"),
]


@pytest.mark.parametrize("text, preference, tickets, notes, why", PLAN_ROWS, ids=[row[4] for row in PLAN_ROWS])
def test_plan(text, preference, tickets, notes, why):
    plan = httpd.tls_priority(text)
    assert (plan.server_preference, plan.tickets, list(plan.notes)) == (preference, tickets, notes)


def test_mutated_priority_strings():
    """A plan or ConfigError, whatever the text, in time that grows with its length."""
    chance = random.Random(7)
    for _ in range(3000):
        text = list(chance.choice(PRIORITY_ROWS)[0] + ":" + chance.choice(PRIORITY_ROWS)[0])
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(text) + 1)
            text[place:place + chance.randrange(3)] = chance.choice([":", "+", "-", "!", "%", "@", " ", "\n", "\0", "A", "\u017f", "\u00df", "ALL", "::", ""])
        try:
            plan = httpd.tls_priority("".join(text))
        except httpd.ConfigError as error:
            assert str(error).startswith("tls_ciphers")
        else:
            assert plan.versions and (plan.ciphers or plan.suites13)


def test_ssl_is_not_imported():
    """Plain HTTP does not pay for it, nor does reading a priority string."""
    code = "import sys, %s as httpd; httpd.tls_priority('NORMAL'); sys.exit('ssl' in sys.modules)" % httpd.__name__
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(httpd.__file__)).returncode == 0


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    """A directory of certificates and keys, made by the openssl command."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    here = tmp_path_factory.mktemp("pki")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=here, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    for name, kind in ("rsa", ["rsa:2048"]), ("other", ["rsa:2048"]), ("weak", ["rsa:1024"]), ("ec", ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]), ("ca", ["rsa:2048"]):
        openssl("req", "-x509", "-newkey", *kind, "-nodes", "-keyout", name + ".key", "-out", name + ".pem", "-subj", "/CN=" + name, "-days", "2")
        openssl("req", "-new", "-key", name + ".key", "-out", name + ".csr", "-subj", "/CN=" + name)
    openssl("x509", "-req", "-in", "ec.csr", "-signkey", "ec.key", "-days", "-1", "-out", "expired.pem")
    openssl("x509", "-req", "-in", "other.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-out", "client.pem")
    openssl("pkey", "-in", "rsa.key", "-aes128", "-passout", "pass:secret", "-out", "encrypted.key")
    openssl("rsa", "-in", "rsa.key", "-aes128", "-passout", "pass:secret", "-traditional", "-out", "traditional.key")
    openssl("x509", "-in", "rsa.pem", "-outform", "der", "-out", "der.pem")
    (here / "both.pem").write_bytes((here / "rsa.pem").read_bytes() + (here / "rsa.key").read_bytes())
    (here / "chain.pem").write_bytes((here / "client.pem").read_bytes() + (here / "ca.pem").read_bytes())
    (here / "cut.pem").write_bytes((here / "rsa.pem").read_bytes()[:500])
    (here / "empty.pem").write_bytes(b"")
    for path in here.iterdir():
        path.chmod(0o600)
    shutil.copy(here / "rsa.key", here / "open.key")
    (here / "open.key").chmod(0o644)
    return here


def context_of(pki, text, cert, key="", ca=""):
    name = cert.partition(".")[0]
    return httpd.tls_context(httpd.tls_priority(text), str(pki / cert), str(pki / (key or name + ".key")), ca and str(pki / ca))


BOTH, OLD = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2"
FILE_ROWS = [
    (BOTH, "rsa.pem", "rsa.key", "", "", "", "RSA"),
    (BOTH, "ec.pem", "ec.key", "", "", "", "ECDSA"),
    (OLD, "ec.pem", "ec.key", "", "", "", "ECDSA of P-256, though the group is P-384"),
    (BOTH, "chain.pem", "other.key", "", "", "", "a chain"),
    (BOTH, "both.pem", "both.pem", "", "", "", "certificate and key in one file"),
    (BOTH, "rsa.pem", "rsa.key", "ca.pem", "", "", "client certificates"),
    (BOTH, "rsa.pem", "open.key", "", "", "tls_key_file: {}/open.key can be read by everybody: chmod o-r", "a key that everybody can read"),
    (BOTH, "expired.pem", "ec.key", "", "", "tls_cert_file: {}/expired.pem: clients will refuse it: certificate has expired", "an expired certificate"),
    (BOTH, "none.pem", "rsa.key", "", "tls_cert_file: {}/none.pem cannot be read: No such file or directory", "", "no certificate"),
    (BOTH, "rsa.pem", "none.key", "", "tls_key_file: {}/none.key cannot be read: No such file or directory", "", "no key"),
    (BOTH, "", "rsa.key", "", "tls_cert_file: {} cannot be read: Is a directory", "", "a directory"),
    (BOTH, "rsa.pem", "a\0b", "", "tls_key_file: {}/a\0b cannot be read: embedded null byte", "", "a name that no file has"),
    (BOTH, "der.pem", "rsa.key", "", "tls_cert_file: {}/der.pem has no BEGIN CERTIFICATE: is it the right file, in PEM?", "", "DER"),
    (BOTH, "rsa.pem", "rsa.pem", "", "tls_key_file: {}/rsa.pem has no BEGIN PRIVATE KEY: is it the right file, in PEM?", "", "a certificate as key"),
    (BOTH, "rsa.key", "rsa.key", "", "tls_cert_file: {}/rsa.key has no BEGIN CERTIFICATE", "", "a key as certificate"),
    (BOTH, "rsa.pem", "encrypted.key", "", "tls_key_file: {}/encrypted.key is encrypted: remove the password with `openssl pkey`", "", "an encrypted key"),
    (BOTH, "rsa.pem", "traditional.key", "", "tls_key_file: {}/traditional.key is encrypted", "", "encrypted the old way"),
    (BOTH, "rsa.pem", "other.key", "", "tls_cert_file {0}/rsa.pem with tls_key_file {0}/other.key: the key does not belong to the certificate", "", "another's key"),
    (BOTH, "rsa.pem", "ec.key", "", "the key does not belong to the certificate", "", "a key of another type"),
    (BOTH, "cut.pem", "rsa.key", "", "tls_cert_file {0}/cut.pem with tls_key_file {0}/rsa.key: damaged? OpenSSL says", "", "half a certificate"),
    (BOTH, "weak.pem", "weak.key", "", "the key is too weak: make one of RSA with 2048 bits", "", "1024 bits"),
    ("SUITEB128", "rsa.pem", "rsa.key", "", "no client could connect: tls_ciphers has no suite for the certificate's type of key", "", "suites for ECDSA, key for RSA"),
    ("NORMAL:-KX-ALL:+RSA:-VERS-TLS1.3", "ec.pem", "ec.key", "", "no client could connect", "", "suites for RSA, key for ECDSA"),
    ("SUITEB128:+VERS-TLS1.3:+GROUP-ALL:+CIPHER-ALL", "rsa.pem", "rsa.key", "", "", "", "which TLS 1.3 does not mind"),
    (BOTH, "rsa.pem", "rsa.key", "none.pem", "tls_ca_file: {}/none.pem cannot be read", "", "no CA"),
    (BOTH, "rsa.pem", "rsa.key", "empty.pem", "tls_ca_file: {}/empty.pem has no BEGIN CERTIFICATE", "", "an empty CA file"),
    (BOTH, "rsa.pem", "rsa.key", "cut.pem", "tls_ca_file {}/cut.pem: damaged? OpenSSL says", "", "half a CA"),
]


@pytest.mark.parametrize("text, cert, key, ca, error, warning, why", FILE_ROWS, ids=[row[6] for row in FILE_ROWS])
def test_files(pki, caplog, text, cert, key, ca, error, warning, why):
    caplog.set_level(logging.WARNING, "httpd")
    if error:
        with pytest.raises(httpd.ConfigError, match=re.escape(error.format(pki))) as caught:
            context_of(pki, text, cert, key, ca)
        assert "\n" not in str(caught.value)
    else:
        context = context_of(pki, text, cert, key, ca)
        assert context.verify_mode == (ssl.CERT_REQUIRED if ca else ssl.CERT_NONE)
    assert [record.getMessage() for record in caplog.records] == ([warning.format(pki)] if warning else [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_key(pki, tmp_path):
    shutil.copy(pki / "rsa.key", tmp_path / "shut.key")
    (tmp_path / "shut.key").chmod(0)
    with pytest.raises(httpd.ConfigError, match="cannot be read: .*Permission denied"):
        httpd.tls_context(httpd.tls_priority(BOTH), str(pki / "rsa.pem"), str(tmp_path / "shut.key"))


def test_certificate_not_yet_valid(pki, tmp_path, caplog):
    (tmp_path / "index.txt").touch()
    config = "[ca] default_ca=d [d] database=index.txt new_certs_dir=. rand_serial=yes default_md=sha256 policy=p [p] commonName=supplied"
    (tmp_path / "ca.cnf").write_text(config.replace(" ", "\n"))
    subprocess.run(["openssl", "ca", "-batch", "-notext", "-config", "ca.cnf", "-selfsign", "-keyfile", pki / "ec.key", "-in", pki / "ec.csr", "-out", "later.pem",
                    "-startdate", "20900101000000Z", "-enddate", "20910101000000Z"], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    httpd.tls_context(httpd.tls_priority(BOTH), str(tmp_path / "later.pem"), str(pki / "ec.key"))
    assert [record.getMessage() for record in caplog.records] == ["tls_cert_file: %s/later.pem: clients will refuse it: certificate is not yet valid" % tmp_path]


def client_context(suite="ALL", version="", curve="", cert=None):
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_ciphers(suite + ":@SECLEVEL=0")
    client.set_alpn_protocols(["h2", "http/1.1"])
    if version:
        client.minimum_version = client.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
    if curve:
        client.set_ecdh_curve(curve)
    if cert:
        client.load_cert_chain(cert + ".pem", cert.replace("client", "other") + ".key")
    return client


def shake_hands(client, server, session=None):
    """Both ends after a handshake in this process; None if it failed."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up, session=session), server.wrap_bio(up, down, server_side=True)
    waiting = list(ends)
    for _ in range(6):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return None
    try:                                        # TLS 1.3: the client hears of tickets, and of its certificate's fate, by reading
        ends[0].read(1)
    except ssl.SSLWantReadError:
        pass
    return None if waiting else ends


def hello13(suites):
    """A ClientHello for TLS 1.3 that offers these suites; before Python 3.15, the client's context cannot choose them."""
    up = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client_context(version="TLSv1.3").wrap_bio(ssl.MemoryBIO(), up).do_handshake()
    codes = {"G": b"\x13\x02", "P": b"\x13\x03", "g": b"\x13\x01"}
    hello = up.read()
    assert hello.count(b"\x13\x02\x13\x03\x13\x01") == 1
    return hello.replace(b"\x13\x02\x13\x03\x13\x01", b"".join(codes[letter] for letter in (suites * 3)[:3]))


def chosen13(server, suites):
    """The suite of TLS 1.3 in the ServerHello (RFC 8446, 4.1.3) that answers such a ClientHello; "" for an alert."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    up.write(hello13(suites))
    try:
        server.wrap_bio(up, down, server_side=True).do_handshake()
    except ssl.SSLWantReadError:
        answer = down.read()
        session_id_end = 44 + answer[43]
        return {b"\x13\x02": "G", b"\x13\x03": "P", b"\x13\x01": "g"}[answer[session_id_end:session_id_end + 2]]
    except ssl.SSLError:
        return ""


OFFER_ROWS = list({row[1:]: row for row in reversed(ACCEPTED)}.values())            # one string for each plan
CURVES = {"SECP256R1": "prime256v1", "SECP384R1": "secp384r1", "SECP521R1": "secp521r1", "X25519": "X25519", "X448": "X448", "FFDHE2048": "ffdhe2048"}


@pytest.mark.parametrize("row", OFFER_ROWS, ids=[row[0][:70] for row in OFFER_ROWS])
def test_offer(pki, row):
    """Clients that can do but one thing come through if, and only if, it is in the plan."""
    plan = httpd.tls_priority(row[0])
    if sys.version_info < (3, 11) and plan.groups[:1] == ("X25519",):
        with pytest.raises(httpd.ConfigError, match="tls_ciphers: Python before 3.11 cannot set X25519"):
            context_of(pki, row[0], "ec.pem")
        return
    fit = {key: any(("ECDSA" in suite) == (key == "ec") for suite in plan.ciphers) for key in ("rsa", "ec")}       # TLS 1.2, with this type of key
    servers = {key: context_of(pki, row[0], key + ".pem") for key in fit if fit[key] or plan.suites13}
    taken = {suite for suite in available_suites() for server in servers.values() if shake_hands(client_context(suite, "TLSv1.2"), server)}
    hidden = set(plan.ciphers) - {suite["name"] for server in servers.values() for suite in server.get_ciphers()}
    assert taken == set(plan.ciphers) - hidden and all("CCM8" in suite for suite in hidden)        # OpenSSL 3.2 puts it on security level 0
    for key, server in servers.items():
        for version in "TLSv1.2", "TLSv1.3":
            ends = shake_hands(client_context(version=version), server)
            assert bool(ends) == (fit[key] if version == "TLSv1.2" else bool(plan.suites13))
            assert not ends or (ends[1].version(), ends[1].selected_alpn_protocol()) == (version, "http/1.1")
        if "TLSv1.3" in plan.versions:
            letters = [letter for letter, name in SUITES13.items() if name in plan.suites13]
            assert [chosen13(server, letter) for letter in letters] == letters
            assert chosen13(server, "gPG") == (letters[0] if plan.server_preference else "g")   # what the plan has is chosen before what it has not
        assert bool(server.options & ssl.OP_CIPHER_SERVER_PREFERENCE) == plan.server_preference
        assert server.options & ssl.OP_NO_COMPRESSION and server.options & getattr(ssl, "OP_NO_RENEGOTIATION", 0) == getattr(ssl, "OP_NO_RENEGOTIATION", 0)


def available_suites():
    """Every suite of TLS 1.2 for these certificates that this OpenSSL has; Camellia, ARIA and DHE are to be refused."""
    everything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    everything.set_ciphers("ALL:!PSK:!SRP:@SECLEVEL=0")
    return [suite["name"] for suite in everything.get_ciphers() if suite["protocol"] != "TLSv1.3"]


GROUP_ROWS = [
    (BOTH, "SECP256R1 SECP384R1 SECP521R1 X25519 X448 FFDHE2048", "all"),
    (OLD, "SECP384R1", "OpenSIPS' default"),
    ("NORMAL:-GROUP-ALL:+GROUP-SECP521R1", "SECP521R1", "one"),
    ("PFS:-GROUP-X448", "SECP256R1", "all but one: the first"),
    ("NORMAL:-GROUP-DH-ALL", "SECP256R1", "all but FFDHE, which OpenSSL's default has"),
    ("NORMAL:-GROUP-ALL:+GROUP-SECP384R1:+GROUP-SECP256R1", "SECP384R1", "the first of two"),
]


@pytest.mark.parametrize("text, offered, why", GROUP_ROWS, ids=[row[2] for row in GROUP_ROWS])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_groups(pki, text, offered, why, version):
    server = context_of(pki, text, "rsa.pem")
    if hasattr(server, "set_groups") and len(offered.split()) < 2:
        offered = " ".join(name for name in httpd.tls_priority(text).groups if name in CURVES)
    for name, curve in CURVES.items() if sys.version_info >= (3, 11) else list(CURVES.items())[:3]:
        ends = shake_hands(client_context("ECDHE+AESGCM", version, curve), server)
        possible = version in httpd.tls_priority(text).versions and (version, name) != ("TLSv1.2", "FFDHE2048")
        assert bool(ends) == (name in offered.split() and possible), name


def test_server_preference(pki):
    client = client_context("ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384", "TLSv1.2")
    chosen = [shake_hands(client, context_of(pki, text, "rsa.pem"))[0].cipher()[0] for text in ("NORMAL", "NORMAL:%SERVER_PRECEDENCE")]
    assert chosen == ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384"]


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("text, tickets", [("NORMAL", True), ("NORMAL:%NO_TICKETS", False), ("PFS", False)])
def test_tickets(pki, version, text, tickets):
    server, client = context_of(pki, text, "rsa.pem"), client_context(version=version)
    session = shake_hands(client, server)[0].session
    assert bool(session and session.has_ticket) == tickets
    assert shake_hands(client, server, session)[0].session_reused == tickets


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("cert, accepted", [("client", True), ("rsa", False), (None, False)])
def test_client_certificate(pki, version, cert, accepted):
    server = context_of(pki, BOTH, "rsa.pem", ca="ca.pem")
    assert bool(shake_hands(client_context(version=version, cert=cert and str(pki / cert)), server)) == accepted


class TLSClient:
    """A client whose TLS records can be cut at will: TLS in memory, and a socket."""

    def __init__(self, port, **options):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        for name, value in options.pop("context", {}).items():
            getattr(self.context, name)(*value) if isinstance(value, tuple) else setattr(self.context, name, value)
        self.inner, self.outer = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = self.context.wrap_bio(self.inner, self.outer, **options)
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.sock.close()

    def pull(self):
        data = self.sock.recv(65536)
        self.inner.write(data) if data else self.inner.write_eof()

    def push(self, cut=lambda raw: [raw]):
        for piece in cut(self.outer.read()):
            self.sock.sendall(piece)

    def handshake(self, cut=lambda raw: [raw]):
        while True:
            try:
                self.tls.do_handshake()
                return self.push(cut)
            except ssl.SSLWantReadError:
                self.push(cut)
                self.pull()

    def read(self, size=1 << 20):
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                self.pull()

    def exchange(self, raw, count=1, cut=lambda raw: [raw]):
        self.tls.write(raw)
        self.push(cut)
        data = b""
        while len(answers_so_far(data)) < count:
            if not (more := self.read()):
                raise ConnectionResetError("it ends before the answer")
            data += more
        return answers(data)


def every_byte(raw):
    return [raw[i:i + 1] for i in range(len(raw))]


@pytest.fixture
def https(pki):
    """Start a server with TLS, in a thread."""
    httpd.register_httpdcb("test", "echo", echo, content_type="application/json")
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 1000000) and 200)
    with contextlib.ExitStack() as stack:
        yield lambda name="rsa", **params: stack.enter_context(httpd.Server(**{
            "ip": "127.0.0.1", "port": 0, "tls_cert_file": pki / (name + ".pem"), "tls_key_file": pki / (name + ".key"), "tls_ciphers": BOTH, **params}))


@pytest.mark.parametrize("name", ["rsa", "ec"])
@pytest.mark.parametrize("text, version", [(BOTH, "TLSv1.3"), (OLD, "TLSv1.2")])
def test_https(https, name, text, version):
    server = https(name, tls_ciphers=text)
    with TLSClient(server.port, context={"set_alpn_protocols": (["h2", "http/1.1"],)}) as client:
        client.handshake()
        assert client.tls.version() == version and client.tls.selected_alpn_protocol() == "http/1.1"
        answer, = client.exchange(get())
        assert answer.json()["scheme"] == "https" and server.url.startswith("https://")
        assert [len(answer.body) for answer in client.exchange(get(b"/large") * 5, 5)] == [1000000] * 5
        assert client.exchange(post(b"x" * 1000))[0].json()["body"] == "x" * 1000
        assert client.exchange(get(b"/echo", b"Connection: close"))[0].status == 200
        assert client.read() == b""                         # close_notify: an orderly end


@pytest.mark.parametrize("cut", ["in two records", "every byte", "close_notify in the same segment", "pipelined in many records"])
def test_every_request_over_tls_is_answered(https, cut):                           # OPENSIPS, never 1
    server = https("ec")
    for _ in range(1000 if cut == "in two records" else 50):
        with TLSClient(server.port) as client:
            client.handshake(every_byte if cut == "every byte" else lambda raw: [raw])
            raw = get() * (5 if "pipelined" in cut else 1)
            for piece in [raw[:20], raw[20:]] if cut == "in two records" else every_byte(raw) if "pipelined" in cut else [raw]:
                client.tls.write(piece)
            if "close_notify" in cut:
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.tls.unwrap()
            client.push(every_byte if cut == "every byte" else lambda raw: [raw])
            data = b""
            while len(answers_so_far(data)) < raw.count(b"GET"):
                client.pull()
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                    while more := client.tls.read(1 << 20):
                        data += more
            assert [answer.status for answer in answers(data)] == [200] * raw.count(b"GET")


@pytest.mark.parametrize("raw", [get(), b"POST / HTTP/1.0\r\n\r\n", b"\x00", b"SSH-2.0\r\n"])
def test_plain_http_on_the_tls_port(https, raw):                                   # OPENSIPS, never 7
    with connect(https()) as client:
        client.sendall(raw)
        data = b""
        while more := client.recv(10000):
            data += more
        answer, = answers(data)
        assert answer.status == 400 and answer.body == b"400 this is the HTTPS port, say https://\n"


def test_silent_and_half_way_clients_delay_nobody_and_are_dropped(https):
    server = https("ec", request_timeout=1.5, conn_timeout=1.5)
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(TLSClient(server.port)) for _ in range(300)]
        for number, client in enumerate(stuck):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
            client.sock.sendall([b"", b"\x16", client.outer.read()[:-1], client.outer.read()][number % 4])
        start = time.monotonic()
        for _ in range(10):
            with TLSClient(server.port) as client:
                client.handshake()
                assert client.exchange(get())[0].status == 200
        assert time.monotonic() - start < 1.5               # before anybody is dropped
        for client in stuck:
            with contextlib.suppress(ConnectionResetError):
                while client.sock.recv(65536):
                    pass
    until = time.monotonic() + 10
    while server.connections:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_is_no_handshake_after_all_upsets_nobody(https):
    server = https()
    chance = random.Random(5)
    with TLSClient(server.port) as client:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        hello = client.outer.read()
    for _ in range(200):
        raw = bytearray(hello)
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(1, len(raw))] = chance.randrange(256)
        with connect(server) as client, contextlib.suppress(OSError):
            client.sendall(raw[:chance.randrange(1, len(raw) + 1)])
            client.shutdown(socket.SHUT_WR)
            client.recv(10000)
    with TLSClient(server.port) as client:
        client.handshake()
        assert client.exchange(get())[0].status == 200


def test_a_truncated_request_is_not_executed(https):
    calls = []
    httpd.register_httpdcb("test", "h", lambda request, page: calls.append(request) or 200)
    server = https()
    for raw in (post(b"abc", path=b"/h")[:-1], chunked(b"3\r\nabc\r\n").replace(b"/echo", b"/h"), get(b"/h")[:-2]):
        with TLSClient(server.port) as client:
            client.handshake()
            client.tls.write(raw)
            client.push()
    with TLSClient(server.port) as client:
        client.handshake()
        assert client.exchange(get())[0].status == 200 and not calls


def test_a_slow_reader_over_tls(https):
    server = https()
    with TLSClient(server.port) as client:
        client.handshake()
        client.tls.write(get(b"/large") * 20)
        client.push()
        until = time.monotonic() + 10
        while not server.held:
            assert time.monotonic() < until
        data = b""
        while len(data.rpartition(b"\r\n\r\n")[2]) < 1000000 or data.count(b"HTTP/1.1 200") < 20:
            data += client.read()
            assert server.held <= server.params.held_size
        assert len(answers(data)) == 20 and client.exchange(get())[0].status == 200


def test_sessions_are_resumed_by_tickets_unless_the_string_forbids(https):
    for text, tickets in ((OLD, True), (BOTH, True), (OLD + ":%NO_TICKETS", False), (BOTH + ":%NO_TICKETS", False)):
        server = https(tls_ciphers=text)
        with TLSClient(server.port) as first:
            first.handshake()
            first.exchange(get())
            assert (first.tls.session is not None and first.tls.session.has_ticket) == tickets
            with TLSClient(server.port) as second:
                second.tls = first.context.wrap_bio(second.inner, second.outer, session=first.tls.session)
                second.handshake()
                assert second.exchange(get())[0].status == 200 and (second.tls.session_reused or not tickets)


def test_renegotiation_is_off(https):
    if not hasattr(ssl, "OP_NO_RENEGOTIATION") or not shutil.which("openssl"):
        pytest.skip("cannot be tried here")
    server = https(tls_ciphers=OLD)
    client = subprocess.run(["openssl", "s_client", "-connect", "127.0.0.1:%d" % server.port, "-tls1_2"], input=b"R\n", capture_output=True, timeout=20)
    assert b"no renegotiation" in client.stderr.lower() or b"NO_RENEGOTIATION" in client.stderr.upper()


def test_a_renewed_certificate_needs_no_restart(https, pki, tmp_path, caplog):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes((pki / "rsa.pem").read_bytes()), key.write_bytes((pki / "rsa.key").read_bytes())
    key.chmod(0o600)
    server = https(tls_cert_file=cert, tls_key_file=key)
    with TLSClient(server.port) as old:
        old.handshake()
        cert.write_bytes(b"half of it")
        assert server.reload_tls() is False and "has no BEGIN CERTIFICATE" in caplog.text      # the old one stays
        cert.write_bytes((pki / "ec.pem").read_bytes())
        assert server.reload_tls() is False                 # the old key does not fit
        with TLSClient(server.port) as client:
            client.handshake()
            assert client.tls.getpeercert(True) == old.tls.getpeercert(True)
        key.write_bytes((pki / "ec.key").read_bytes())
        assert server.reload_tls() is True
        with TLSClient(server.port) as client:
            client.handshake()
            assert client.tls.getpeercert(True) != old.tls.getpeercert(True) and client.exchange(get())[0].status == 200
        assert old.exchange(get())[0].status == 200         # and old connections live on
    with httpd.Server(ip="127.0.0.1", port=0) as plain:
        assert plain.reload_tls() is False


def test_client_certificates(https, pki):
    httpd.register_httpdcb("test", "who", lambda request, page: page.write(json.dumps(request.client_cert)) and 200)
    server = https(tls_ca_file=pki / "ca.pem")
    for text, version in (("", None), ("", ssl.TLSVersion.TLSv1_2)):
        options = {"maximum_version": version} if version else {}
        with TLSClient(server.port, context={"load_cert_chain": (str(pki / "client.pem"), str(pki / "other.key")), **options}) as client:
            client.handshake()
            subject, serial = client.exchange(get(b"/who"))[0].json()
            assert subject == "CN=other" and re.fullmatch("[0-9A-F]+", serial)
        for files in ((), (str(pki / "ec.pem"), str(pki / "ec.key"))):              # none, or one of another CA
            with TLSClient(server.port, context={**({"load_cert_chain": files} if files else {}), **options}) as client, pytest.raises((ssl.SSLError, OSError)):
                client.handshake()
                client.exchange(get(b"/who"))
    with TLSClient(https().port) as client:
        client.handshake()
        assert client.exchange(get(b"/who"))[0].json() is None


def test_a_suite_that_cannot_be_switched_off_is_not_used(https, monkeypatch):
    """TLS 1.3 suites can be restricted only by closing what has got another."""
    server = https(tls_ciphers="SECURE256:-VERS-ALL:+VERS-TLS1.3")
    with TLSClient(server.port) as client:
        client.handshake()
        assert client.tls.cipher()[0] == "TLS_AES_256_GCM_SHA384" and client.exchange(get())[0].status == 200
    server.plan = server.plan._replace(suites13=("TLS_AES_128_GCM_SHA256",))
    with TLSClient(server.port) as client, pytest.raises((ssl.SSLError, OSError)):
        client.handshake()
        client.exchange(get())


def test_too_many_connections_with_tls(https, caplog):
    server = https("ec", max_connections=1)
    with TLSClient(server.port) as client:
        client.handshake()
        client.tls.write(get(b"/large") * 20)               # the only connection is sending: nobody can make room
        client.push()
        until = time.monotonic() + 5
        while not server.held:
            assert time.monotonic() < until
        with TLSClient(server.port) as other, pytest.raises((ssl.SSLError, OSError)):
            other.handshake()
            other.exchange(get())
    assert "fault" not in caplog.text


def test_plain_http_in_a_program_with_a_default_timeout(https):
    server = https("ec")
    socket.setdefaulttimeout(3)
    try:
        with connect(server) as plain:
            plain.sendall(get())
            assert plain.recv(1000)
            start = time.monotonic()
            with TLSClient(server.port) as client:
                client.handshake()
                assert client.exchange(get())[0].status == 200
            assert time.monotonic() - start < 2
    finally:
        socket.setdefaulttimeout(None)


def test_stop_does_not_wait_for_half_a_handshake(https):
    server = https("ec")
    with TLSClient(server.port) as client:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        client.sock.sendall(client.outer.read()[:-1])
        until = time.monotonic() + 5
        while not server.connections:
            assert time.monotonic() < until
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 5


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


# ---------------------------------------------------------------------------------- Streams, suspended requests, uploads

CONTENT = bytes(range(256)) * 1000


def flush_content(request, pos, buf):
    """CONTENT, from where it is asked for, as much as there is room for."""
    part = CONTENT[pos:pos + len(buf)]
    buf[:len(part)] = part
    return len(part) or httpd.END


def ends(request, pos, buf):
    raise KeyError(pos)


def read_all(client):
    client.setblocking(True)
    data = b""
    while more := client.recv(1 << 20):
        data += more
    return data


STREAM_ROWS = [
    (get(b"/s"), "chunked", None, "HTTP/1.1: chunked"), (get(b"/s?length"), None, "256000", "a Content-Length of the handler's"),
    (b"GET /s HTTP/1.0\r\n\r\n", None, None, "HTTP/1.0: until the connection closes"),
    (b"GET /s?length HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", None, "256000", "HTTP/1.0 with a length is kept"),
    (get(b"/s", b"Connection: close"), "chunked", None, "chunked and close"), (get(b"/s?fields"), "chunked", None, "large fields of its own")]


@pytest.mark.parametrize("raw, coding, length", [row[:3] for row in STREAM_ROWS], ids=[row[3] for row in STREAM_ROWS])
def test_streams(server, raw, coding, length):
    def begin(request, page):
        if request.query == "length":
            page.set_header("Content-Length", len(CONTENT))
        if request.query == "fields":
            page.set_header("X", "y" * 2000)
        return 201
    httpd.register_httpdcb("test", "s", begin, flush_content, content_type="text/x")
    data, end = exchange(server, raw)
    while end == "open" and len(data) < len(CONTENT):
        break
    answer, = answers(data)
    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (201, CONTENT, "text/x")
    assert (answer.headers["Transfer-Encoding"], answer.headers["Content-Length"]) == (coding, length)
    assert end == ("open" if b"1.1" in raw and b"close" not in raw or b"keep-alive" in raw else "closed")
    head, = answers(exchange(server, raw.replace(b"GET", b"HEAD"))[0], "HEAD")
    assert {**head.headers, "Date": ""} == {**answer.headers, "Date": ""} and head.body == b""


def test_a_handler_that_writes_does_not_stream(server):
    httpd.register_httpdcb("test", "s", lambda request, page: page.write("written") and 200, ends)
    httpd.register_httpdcb("test", "n", lambda request, page: 204, ends)
    data, end = exchange(server, get(b"/s") + get(b"/n") + get(b"/s"))
    assert [(answer.status, answer.body) for answer in answers(data)] == [(200, b"written"), (204, b""), (200, b"written")] and end == "open"


def test_head_may_say_a_length_without_writing(server):
    def handler(request, page):
        page.set_header("Content-Length", "1234")
        return 200
    assert ask(server, handler, get(b"/h").replace(b"GET", b"HEAD")).headers["Content-Length"] == "1234"
    assert ask(server, handler).status == 500               # GET has to keep the promise


CUT_ROWS = [
    (lambda request, pos, buf: ends(request, pos, buf) if pos else 1, None, "an exception"),
    (lambda request, pos, buf: httpd.END if pos else 1, "5", "too few"), (lambda request, pos, buf: 3, "5", "too many"),
    (lambda request, pos, buf: len(buf) + 1 if pos else 1, None, "more than there was room for"), (lambda request, pos, buf: None if pos else 1, None, "no count"),
    (lambda request, pos, buf: -3 if pos else 1, None, "a negative count"), (lambda request, pos, buf: 1.0 if pos else 1, None, "no whole number")]


@pytest.mark.parametrize("flush, length", [row[:2] for row in CUT_ROWS], ids=[row[2] for row in CUT_ROWS])
def test_a_broken_stream_is_cut(server, caplog, flush, length):
    def begin(request, page):
        if length:
            page.set_header("Content-Length", length)
        return 200
    httpd.register_httpdcb("test", "s", begin, flush)
    data, end = exchange(server, get(b"/s") + get(b"/echo"))
    assert data.startswith(b"HTTP/1.1 200") and not data.endswith(b"0\r\n\r\n") and data.count(b"HTTP/1.1") == 1 and end == "closed"
    assert "a callback of root path 's' failed" in caplog.text and "Traceback" in caplog.text
    with pytest.raises((http.client.HTTPException, ValueError)):
        answers(data)


def test_an_exception_before_anything_is_sent_is_a_500(server):
    httpd.register_httpdcb("test", "s", lambda request, page: 200, ends)
    data, end = exchange(server, get() + get(b"/s") + get())
    assert [answer.status for answer in answers(data)] == [200, 500, 200]


def test_streams_and_pages_pipelined(server):
    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush_content)
    raw = get(b"/echo/1") + get(b"/s") + post(b"abc") + get(b"/s").replace(b"GET", b"HEAD") + get(b"/s") + get(b"/echo/2")
    for cut in CUTS:
        data, end = exchange(server, *CUTS[cut](raw))
        found = answers(data, ["GET", "GET", "POST", "HEAD", "GET", "GET"])
        assert [len(answer.body) for answer in found[1::3]] == [len(CONTENT)] * 2 and found[1].body == CONTENT and end == "open"
        assert found[0].json()["url"] == "/1" and found[5].json()["url"] == "/2" and found[2].json()["body"] == "abc"


def test_a_stream_waits_until_it_is_resumed(server):
    waiting, pieces = [], []

    def flush(request, pos, buf):
        if not pieces:
            waiting.append(request)
            return 0
        piece = pieces.pop(0)
        buf[:len(piece)] = piece
        return len(piece) or httpd.END
    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush)
    with connect(server) as client:
        client.send(get(b"/s"))
        data, end = pump(server, client)
        assert data.endswith(b"\r\n\r\n") and b"chunked" in data and end == "open" and len(waiting) == 1      # the head is there at once
        client.setblocking(True)
        client.send(get())                                  # waits behind it
        assert pump(server, client) == (b"", "open") and len(waiting) == 1
        pieces.append(b"abc")
        waiting[0].resume()
        waiting[0].resume()
        assert pump(server, client) == (b"3\r\nabc\r\n", "open") and len(waiting) == 2
        pieces.extend([b"d", b""])
        waiting[0].resume()
        data, end = pump(server, client)
        assert data.startswith(b"1\r\nd\r\n0\r\n\r\nHTTP/1.1 200") and end == "open" and len(waiting) == 2


@pytest.mark.parametrize("flags", ["", "tls"])
def test_many_streams_share_the_page_and_never_mix(server, flags, pki):
    size = 3000000
    blocks = {number: bytes([number]) * 65536 for number in range(40)}

    def flush(request, pos, buf):
        count = min(len(buf), size - pos, 65536)
        buf[:count] = blocks[int(request.query)][:count]
        return count or httpd.END
    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush)
    params = dict(tls_cert_file=pki / "ec.pem", tls_key_file=pki / "ec.key", tls_ciphers=BOTH) if flags else {}
    with httpd.Server(ip="127.0.0.1", port=0, **params) as running:
        clients = [TLSClient(running.port) if flags else connect(running) for _ in blocks]
        for number, client in enumerate(clients):
            if flags:
                client.handshake()
                client.tls.write(get(b"/s?%d" % number))
                client.push()
            else:
                client.send(get(b"/s?%d" % number))
        most = 0

        def read(number):
            data = b""
            while len(data) < size or not data.endswith(b"\r\n0\r\n\r\n"):
                data += clients[number].read() if flags else clients[number].recv(1 << 18)
            answer, = answers(data)
            assert len(answer.body) == size and answer.body.count(bytes([number])) == size
        readers = [threading.Thread(target=read, args=(number,)) for number in blocks]
        time.sleep(0.2)                                     # until all sockets are full
        for reader in readers:
            reader.start()
        while any(reader.is_alive() for reader in readers):
            most = max(most, running.held)
            readers[0].join(0.01)
            readers = readers[1:] + readers[:1]
        assert most <= running.params.held_size and running.requests == len(blocks)
        for client in clients:
            (client.sock if flags else client).close()


def test_a_slow_reader_of_an_endless_stream_costs_a_piece(server):
    def flush(request, pos, buf):
        asked.append(pos)
        return len(buf)
    asked = []
    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush)
    with connect(server) as client, connect(server) as other:
        client.send(get(b"/s"))
        for _ in range(200):
            server.run_once(0)
        before = len(asked)
        for _ in range(50):
            server.run_once(0)
        assert len(asked) == before                         # backpressure: not called while the socket is full
        assert server.held <= server.params.held_size // 8 and asked == sorted(asked)
        other.send(get())
        assert pump(server, other)[0].startswith(b"HTTP/1.1 200")
        for _ in range(300):
            client.setblocking(True)
            client.recv(1 << 16)
            server.run_once(0)
        assert len(asked) > before and server.held <= server.params.held_size // 8
    for _ in range(5):
        server.run_once(0.01)
    assert server.held == 0 and not server.connections


def test_stalled_streams_do_not_use_up_the_memory_of_others():
    httpd.register_httpdcb("test", "s", lambda request, page: 200, lambda request, pos, buf: len(buf))
    httpd.register_httpdcb("test", "p", lambda request, page: page.write(b"x" * 500) and 200)
    server = httpd.Server(ip="127.0.0.1", port=0)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect(server)) for _ in range(100)]
        for client in stalled:
            client.send(get(b"/s"))
        for _ in range(600):
            server.run_once(0)
            assert server.held <= server.params.held_size
        assert len(server.connections) == 100               # nobody is closed for it
        assert answers(exchange(server, get(b"/p"))[0])[0].status == 200
    server.stop(0)


def test_suspend_and_resume(server):
    seen = []

    def handler(request, page):
        seen.append((request, request.state, len(page)))
        page.write("from before" if request.state is None else "%s" % request.state)
        page.set_header("X", "1")
        if request.state is None:
            request.state = 0
            return httpd.SUSPEND
        return 200
    httpd.register_httpdcb("test", "h", handler)
    with connect(server) as client:
        client.send(get(b"/echo") + get(b"/h") + get(b"/echo"))
        data, end = pump(server, client)
        assert len(answers(data)) == 1 and len(seen) == 1   # the answer before it does not wait for it
        request = seen[0][0]
        assert not request.closed
        request.state = 7
        for _ in range(3):
            request.resume()
        found = answers(pump(server, client)[0])
        assert found[0].body == b"7" and found[0].headers.get_all("X") == ["1"] and found[1].json()["root"] == "echo"
        request.resume()                                    # all is over
        assert pump(server, client) == (b"", "open") and [row[1:] for row in seen] == [(None, 0), (7, 0)]
        client.setblocking(True)
        client.send(get())
        assert pump(server, client)[0].startswith(b"HTTP/1.1 200")


def test_a_resume_before_the_handler_returns_is_not_lost(server):
    def handler(request, page):
        request.state = (request.state or 0) + 1
        if request.state < 4:
            request.resume()
            return httpd.SUSPEND
        page.write("%d" % request.state)
        return 200
    httpd.register_httpdcb("test", "h", handler)
    assert answers(exchange(server, get(b"/h"))[0])[0].body == b"4"
    data = exchange(server, get() + get(b"/h") + get(b"/h") + get())[0]
    assert [answer.body for answer in answers(data)][1:3] == [b"4", b"4"]


def test_one_that_resumes_itself_for_ever_delays_nobody(server):
    def handler(request, page):
        request.resume()
        return httpd.SUSPEND
    httpd.register_httpdcb("test", "h", handler)
    with connect(server) as client, connect(server) as other:
        client.send(get(b"/h"))
        server.run_once(0)
        other.send(get())
        assert pump(server, other, 5)[0].startswith(b"HTTP/1.1 200")


def park(request, page):
    """Suspends once, and then answers with its state."""
    parked.append(request)
    if request.state is None:
        return httpd.SUSPEND
    page.write("%s" % request.state)
    return 200


parked: list = []


@pytest.fixture
def parking(server):
    parked.clear()
    httpd.register_httpdcb("test", "park", park)
    return server


@pytest.mark.parametrize("raw", [get(b"/park"), get(b"/park") + get() * 3, get(b"/park") + get() * 3000],
                         ids=["alone", "requests behind it", "many behind it"])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_is_noticed_while_suspended(parking, raw, how):
    with connect(parking) as client:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sendall(raw)
        for _ in range(3):
            parking.run_once(0.01)
        assert not parked[0].closed
    for _ in range(5):
        parking.run_once(0.01)
    assert parked[0].closed and not parking.connections and parking.held == 0
    parked[0].state = 1
    parked[0].resume()
    parking.run_once(0.01)
    assert len(parked) == 1                                 # it is not called again


def test_who_has_only_finished_sending_gets_the_answer(parking):                    # RFC 9112, 9.6
    with connect(parking) as client:
        client.send(get(b"/park"))
        client.shutdown(socket.SHUT_WR)
        assert pump(parking, client, 5) == (b"HTTP/1.1 100 Continue\r\n\r\n", "open") and not parked[0].closed
        parked[0].state = 1
        parked[0].resume()
        data, end = pump(parking, client, 5)
        assert answers(data)[0].body == b"1" and end == "closed"


def test_a_half_closed_http_1_0_client_gets_the_answer(parking):
    """printf 'GET /park HTTP/1.0\\r\\n\\r\\n' | nc: HTTP/1.0 knows no 100 (Continue) that could ask whether it is still there."""
    with connect(parking) as client:
        client.send(b"GET /park HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert pump(parking, client, 5) == (b"", "open") and not parked[0].closed
        parked[0].state = 1
        parked[0].resume()
        data, end = pump(parking, client, 5)
        assert answers(data)[0].body == b"1" and end == "closed"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_half_closed_client_that_nothing_can_be_asked_is_given_up(parking, version):
    server = httpd.Server(ip="127.0.0.1", port=0, conn_timeout=0.1)
    httpd.register_httpdcb("test", "waits", lambda request, page: 200, lambda request, pos, buf: 0 if pos else 1)
    with connect(server) as client:
        client.send(b"GET /waits HTTP/%s\r\nHost: a\r\n\r\n" % version)
        client.shutdown(socket.SHUT_WR)
        until = time.monotonic() + 5
        while not server.accepted or server.connections and time.monotonic() < until:
            server.run_once(0.1)
        assert not server.connections and server.held == 0
    server.stop(0)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_half_closed_client_gets_all_of_a_generator(server, version, threads):
    def slowly(environ, start_response):
        start_response("200 OK", [])
        for number in range(3):
            yield b"piece %d " % number
            time.sleep(0.05)
    httpd.register_wsgi("test", "slowly", slowly, threads=threads)
    with server, connect(server) as client:
        client.send(b"GET /slowly HTTP/%s\r\nHost: a\r\n\r\n" % version)
        client.shutdown(socket.SHUT_WR)
        assert answers(read_all(client))[0].body == b"piece 0 piece 1 piece 2 "


def test_a_half_closed_client_gets_the_answer_of_a_command_in_a_thread(mi, server):
    httpd.register_mi("slowly", lambda: time.sleep(0.1), threads=True)
    raw = post(b'{"jsonrpc":"2.0","method":"slowly","id":1}', b"Content-Type: application/json", path=b"/mi")
    with server, connect(server) as client:
        client.send(raw.replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.shutdown(socket.SHUT_WR)
        assert answers(read_all(client))[0].json()["result"] is None


def test_a_suspended_request_has_all_the_time(parking):
    server = httpd.Server(ip="127.0.0.1", port=0, conn_timeout=0.1, request_timeout=0.1)
    with connect(server) as client:
        client.send(get(b"/park") + get(b"/echo"))
        until = time.monotonic() + 2.2                      # two sweeps
        while time.monotonic() < until:
            server.run_once(0.2)
        parked[0].state = "late"
        parked[0].resume()
        assert [answer.status for answer in answers(pump(server, client)[0])] == [200, 200]
    server.stop(0)


def test_suspended_requests_wait_without_a_poll_too_many(parking):
    with connect(parking) as client:
        client.sendall(get(b"/park") + get() * 1000)
        for _ in range(10):
            parking.run_once(0)
        start, turns = time.monotonic(), 0
        while time.monotonic() < start + 0.2:
            parking.run_once(0.2)
            turns += 1
        assert turns < 5


def test_suspended_requests_get_a_grace_at_the_end(parking):
    parking.start()
    with connect(parking) as client, connect(parking) as never:
        client.send(get(b"/park"))
        never.send(get(b"/park"))
        until = time.monotonic() + 10
        while len(parked) < 2:
            assert time.monotonic() < until
        stopper = threading.Thread(target=parking.stop, args=(0.5,))
        stopper.start()
        first = next(request for request in parked if request.client == client.getsockname())
        first.state = "done"
        first.resume()
        answer, = answers(read_all(client))
        assert answer.body == b"done" and answer.headers["Connection"] == "close"
        stopper.join(10)
        assert never.recv(10) == b"" and not stopper.is_alive()


def test_thousands_of_suspended_requests_resumed_by_many_threads(parking):
    """Each gets its own answer, once."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 200
    count = min(10000, room)
    parking.start()
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(count):
            clients.append(stack.enter_context(connect(parking)))
            clients[-1].send(get(b"/park?%d" % number))
        until = time.monotonic() + 20
        while len(parked) < count:
            assert time.monotonic() < until
            time.sleep(0.01)
        requests = list(parked)

        def resume(part):
            for request in requests[part::8]:
                request.state = request.query
                request.resume()
                request.resume()
        threads = [threading.Thread(target=resume, args=(part,)) for part in range(8)]
        for thread in threads:
            thread.start()
        for number, client in enumerate(clients):
            answer, = answers(client.recv(1000))
            assert answer.body == b"%d" % number
    assert len(parked) == 2 * count
    parking.stop()


def test_commands_that_take_long_delay_nobody(mi, server):                           # OPENSIPS, never 5
    gate = threading.Event()
    httpd.register_mi("slow", lambda number: [gate.wait(10), number][1], threads=True)
    httpd.register_mi("fails", fails, threads=True)
    httpd.register_mi("quick", lambda: "quick")
    call = lambda method, ident, *params: {"jsonrpc": "2.0", "method": method, "params": params, "id": ident}
    server.start()

    def ask_mi(client, calls):
        body = json.dumps(calls).encode()
        client.send(post(body, b"Content-Type: application/json", path=b"/mi"))
    with connect(server) as slow, connect(server) as batch, connect(server) as quick:
        ask_mi(slow, call("slow", 1, "x"))
        ask_mi(batch, [call("quick", 1), call("slow", 2, "y"), call("fails", 3, 0), call("slow", 4), {"jsonrpc": "2.0", "method": "slow", "params": [1]}])
        ask_mi(quick, call("quick", 1))
        assert answers(quick.recv(1000))[0].json()["result"] == "quick"              # while the others wait
        gate.set()
        assert answers(slow.recv(1000))[0].json() == {"jsonrpc": "2.0", "result": "x", "id": 1}
        found = answers(batch.recv(1000))[0].json()
        assert [answer.get("result", answer.get("error", {}).get("code")) for answer in found] == ["quick", "y", 404, -32602]


def upload_to(server, name="u", **options):
    """A root that says how many bytes it got, in how many pieces, and their sum."""
    def upload(request, data):
        assert request.method in ("POST", "PUT") and request.body == b"" and data
        request.state = request.state or []
        request.state.append(data)

    def handler(request, page):
        pieces = request.state or []
        page.write(json.dumps([len(pieces), sum(map(len, pieces)), sum(b"".join(pieces)), request.body.decode()]))
        return 200
    httpd.register_httpdcb("test", name, handler, upload_data_cb=upload, **options)


def chunks(content, size):
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[i:i + size] for i in range(0, len(content), size))) + b"0\r\n\r\n"


@pytest.mark.parametrize("cut", [*CUTS])
@pytest.mark.parametrize("coded", [False, True])
def test_uploads(server, cut, coded):
    upload_to(server)
    content = CONTENT[:3000]
    raw = (chunked(chunks(content, 700)) if coded else post(content)).replace(b"/echo", b"/u")
    data, end = exchange(server, *CUTS[cut](raw + get() + raw + post(b"", path=b"/u")))
    first, second, third, fourth = answers(data)
    assert first.json()[1:] == third.json()[1:] == [3000, sum(content), ""] and second.json()["root"] == "echo" and fourth.json() == [0, 0, 0, ""] and end == "open"


def test_an_upload_of_any_size_takes_no_memory(server):
    total, largest = [0], [0]

    def upload(request, data):
        total[0] += len(data)
        largest[0] = max(largest[0], len(data), server.held)
    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=upload)
    with server, connect(server) as client:
        client.sendall(b"POST /u HTTP/1.1\r\n" + HOST + b"Content-Length: 50000000\r\n\r\n")
        for _ in range(50):
            client.sendall(b"x" * 1000000)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"POST /u HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n989680\r\n")
        for _ in range(10):
            client.sendall(b"x" * 1000000)
        client.sendall(b"\r\n0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert total == [60000000] and largest[0] <= 2 * httpd.RECEIVE_SIZE


def test_an_upload_can_be_refused_early(server, caplog):
    def upload(request, data):
        if request.query == "fail":
            raise KeyError("x")
        raise httpd.HTTPError(409, "not now", {"Retry-After": "9"})
    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=upload)
    upload_to(server, "limited", upload_limit=1000)
    rows = [(b"/u", 409, b""), (b"/u?fail", 500, b""), (b"/limited", 413, b""), (b"/limited", 413, b"Expect: 100-continue\r\n"), (b"/nowhere", 404, b"")]
    with server:
        for path, status, field in rows:
            with connect(server) as client:
                client.sendall(b"POST " + path + b" HTTP/1.1\r\n" + HOST + field + b"Content-Length: 5000000\r\n\r\n")
                if not field:
                    for _ in range(40):
                        client.sendall(b"x" * 100000)       # whoever is still sending reads the answer
                answer, = answers(read_all(client))
                assert answer.status == status and answer.headers["Connection"] == "close"
    assert caplog.text.count("Traceback") == 1 and "KeyError" in caplog.text


def test_uploads_and_100_continue(server):
    upload_to(server)
    with connect(server) as client:
        client.send(b"POST /u HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert pump(server, client) == (b"HTTP/1.1 100 Continue\r\n\r\n", "open")
        client.send(b"abc")
        assert answers(pump(server, client)[0])[0].json() == [1, 3, sum(b"abc"), ""]


def test_an_upload_that_drips_is_cut_off():
    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=lambda request, data: None)
    with httpd.Server(ip="127.0.0.1", port=0, request_timeout=0.3, conn_timeout=1) as server, connect(server) as client:
        start, ended = time.monotonic(), b""
        client.sendall(b"POST /u HTTP/1.1\r\n" + HOST + b"Content-Length: 5000000\r\n\r\n")
        client.settimeout(0.05)
        while not ended:
            assert time.monotonic() < start + 8
            client.send(b"x")
            with contextlib.suppress(TimeoutError, socket.timeout):
                ended = client.recv(1000)
        assert ended.startswith(b"HTTP/1.1 408")


def test_an_upload_may_be_followed_by_a_suspension_and_a_stream(server):
    got = []

    def handler(request, page):
        if request.state is None:
            request.state = "suspended"
            threading.Timer(0.05, request.resume).start()
            return httpd.SUSPEND
        return 200
    httpd.register_httpdcb("test", "u", handler, flush_content, upload_data_cb=lambda request, data: got.append(data))
    with server, connect(server) as client:
        client.sendall(post(b"x" * 100000, path=b"/u"))
        data = b""
        while not answers_so_far(data):
            data += client.recv(1 << 20)
        assert answers(data)[0].body == CONTENT and len(b"".join(got)) == 100000


def test_a_time_out_behind_answers_that_nobody_reads_ends_that_connection_only():
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 1000000) and 200)
    with httpd.Server(ip="127.0.0.1", port=0, conn_timeout=0.3, request_timeout=0.3) as server, connect(server) as client:
        client.sendall(get(b"/large") * 10 + post(b"x" * 900)[:-100])
        until = time.monotonic() + 10
        while not server.accepted or server.connections:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert raw_get(server.port, raw=get(b"/large")) == 200


def test_the_question_to_a_half_closed_client_whose_socket_is_full_waits(parking):
    with connect(parking) as client:
        client.send(get(b"/park"))
        settle(parking, lambda: parked)
        connection, = parking.connections
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection.sock.send(b"x" * 1000)
        client.shutdown(socket.SHUT_WR)
        settle(parking, lambda: connection.state is httpd.Connection.flush or connection.interest == httpd.RESET)
        start, turns = time.monotonic(), 0
        while time.monotonic() < start + 0.2:
            parking.run_once(0.2)
            turns += 1
        assert turns < 5
        while connection.state is httpd.Connection.flush:
            client.setblocking(True)
            client.recv(100000)
            parking.run_once(0.01)
        parked[0].state = "later"
        parked[0].resume()
        data, end = b"", "open"
        while end == "open":
            more, end = pump(parking, client, 5)
            data += more
        assert data.endswith(b"later")


def settle(server, until):
    """Turns until it is so."""
    limit = time.monotonic() + 5
    while not until():
        assert time.monotonic() < limit
        server.run_once(0.02)


def test_a_resume_while_the_loop_wakes_up_is_not_lost(parking):
    """Between the reading of the byte that wakes the loop and the note that it has been read."""
    real = None

    class Woken:
        def recv(self, size):
            data = real.recv(size)
            thread = threading.Thread(target=parking._wake_up)
            thread.start(), thread.join()
            return data

        def close(self):
            real.close()
    parking.fileno()
    real, parking._woken = parking._woken, Woken()
    parking.start()
    for _ in range(3):
        with connect(parking) as client:
            client.send(get(b"/park"))
            until = time.monotonic() + 5
            while not parked:
                assert time.monotonic() < until
            request, start = parked[-1], time.monotonic()
            time.sleep(0.02)
            request.state = 1
            request.resume()
            assert client.recv(1000).startswith(b"HTTP/1.1 200") and time.monotonic() - start < 0.5
            parked.clear()
    parking.stop()


def test_connections_that_are_late_together_are_closed_in_parts():
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(ip="127.0.0.1", port=0, conn_timeout=0.1)
    with contextlib.ExitStack() as stack:
        for _ in range(250):
            client = stack.enter_context(connect(server))
            client.send(get())
        settle(server, lambda: server.requests == 250)
        settle(server, lambda: len(server.connections) <= 150)
        assert len(server.connections) == 150 and server.timeout() == 0
        settle(server, lambda: not server.connections)
    server.stop(0)


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {"Date": "now"}, {"Content-Length": "x"}])
def test_fields_of_an_http_error_that_the_server_sets_itself(server, caplog, headers):
    """write_error() raises: from upload_data_cb the server ends, from a handler the client gets no answer."""
    def fail(*_):
        raise httpd.HTTPError(503, "later", headers)
    httpd.register_httpdcb("test", "h", fail)
    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=fail)
    assert answers(exchange(server, get(b"/h"))[0])[0].status == 500
    assert answers(exchange(server, post(b"abc", path=b"/u"))[0])[0].status == 500


def test_contents_of_suspended_requests_are_counted(server):
    """kept = 0 when the content is whole: any number of suspended requests may keep a body each."""
    parked.clear()
    httpd.register_httpdcb("test", "park", park)
    small = httpd.Server(ip="127.0.0.1", port=0, memory_budget=2 ** 20, receive_buf_size=100000, buf_size=4096)
    with contextlib.ExitStack() as stack:
        clients, said = [stack.enter_context(connect(small)) for _ in range(30)], b""
        for client in clients:
            client.sendall(post(b"x" * 100000, path=b"/park"))
            said += pump(small, client)[0]
        assert small.held <= small.params.held_size and sum(len(request.body) for request in parked if not request.closed) <= 2 ** 20
        assert b"503" in said and parked
        parked[0].state = 1
        parked[0].resume()
        assert answers(pump(small, clients[0])[0])[0].body == b"1"
    settle(small, lambda: not small.connections)
    assert small.held == 0
    small.stop(0)


def test_contents_of_requests_with_streams_are_counted(server):
    httpd.register_httpdcb("test", "s", lambda request, page: 200, lambda request, pos, buf: waiting.append(request) or httpd.END if pos or waiting[1:] else waiting.append(request) or 0, methods=("POST",))
    waiting = []
    with connect(server) as client:
        client.sendall(post(b"x" * 1000, path=b"/s"))
        pump(server, client)
        assert server.held == 1000
        waiting[0].resume()
        waiting.append(0)
        assert pump(server, client) == (b"0\r\n\r\n", "open") and server.held == 0


def test_a_handler_that_outlasts_a_stop_from_another_thread(server):
    """AttributeError out of run_once(), into the foreign loop."""
    begun, faults = threading.Event(), []

    def slow(request, page):
        begun.set()
        time.sleep(1.6)
        return 200
    httpd.register_httpdcb("test", "slow", slow)

    def loop():
        try:
            while server.fileno() >= 0:
                server.run_once(0.1)
        except BaseException as fault:
            faults.append(fault)
    thread = threading.Thread(target=loop)
    server.port                                             # listens, in this thread: see D18
    thread.start()
    with connect(server) as client:
        client.send(get(b"/echo"))                          # so that the selector knows it
        assert client.recv(1000)
        client.send(get(b"/slow"))
        assert begun.wait(5)
        server.stop(0)
        thread.join(5)
    assert not thread.is_alive() and faults == []


def test_content_length_0_is_kept_by_a_page_without_content(server):
    """500, "has set Content-Length 0 and written nothing"."""
    def handler(request, page):
        page.set_header("Content-Length", 0)
        return 200
    answer = ask(server, handler)
    assert (answer.status, answer.headers["Content-Length"]) == (200, "0")


def test_a_command_in_a_thread_that_leaves(mi, server, caplog):
    """SystemExit ends the thread of the pool, and the request waits for ever."""
    httpd.mi_pool.cache_clear()
    httpd.register_mi("leave", lambda: sys.exit(1), threads=True)
    server.start()
    for _ in range(5):
        with connect(server) as client:
            client.settimeout(2)
            client.send(post(b'{"jsonrpc":"2.0","method":"leave","id":1}', b"Content-Type: application/json", path=b"/mi"))
            assert answers(client.recv(1000))[0].json()["error"]["code"] == -32000
    httpd.mi_pool.cache_clear()


def test_commands_that_wait_for_a_thread_are_bounded(mi, server):
    """who sends slow commands and goes away, again and again, fills the memory with what waits for a thread."""
    httpd.mi_pool.cache_clear()
    gate = threading.Event()
    httpd.register_mi("slow", lambda: gate.wait(30), threads=True)
    server.start()
    raw = post(json.dumps([{"jsonrpc": "2.0", "method": "slow"}] * 20).encode(), b"Content-Type: application/json", path=b"/mi")
    for _ in range(300):
        with connect(server) as client:
            client.send(raw)
    time.sleep(0.5)
    waiting = httpd.mi_pool().jobs.qsize()
    gate.set()
    httpd.mi_pool.cache_clear()
    assert waiting <= 1100


@pytest.mark.parametrize("flush", [None, ends])
def test_503_for_want_of_memory_closes_though_a_request_suspends(flush):
    """count() inside the try of serve: answered by write_error as a handler's, and the connection is kept."""
    httpd.register_httpdcb("test", "park", lambda request, page: 200 if flush else httpd.SUSPEND, flush)
    server = httpd.Server(ip="127.0.0.1", port=0)
    with connect(server) as client:
        client.send(get(b"/park") + get(b"/park"))
        settle(server, lambda: server.connections)
        server.stop(0)
    server = httpd.Server(ip="127.0.0.1", port=0)
    with connect(server) as client:
        server.held = server.params.held_size
        client.send(get(b"/park") + get(b"/park"))
        data, end = pump(server, client, 5)
        assert data.startswith(b"HTTP/1.1 503") and data.count(b"HTTP/1.1") == 1 and end == "closed"
    server.stop(0)


def test_a_piece_that_is_kept_cannot_touch_what_others_get(server):
    """flush_data_cb keeps buf (mostly: a thread fills it and resumes): it writes into other clients' responses."""
    kept = []
    httpd.register_httpdcb("test", "s", lambda request, page: 200, lambda request, pos, buf: kept.append(buf) or httpd.END)
    exchange(server, get(b"/s"))

    def handler(request, page):
        page.write("secret")
        with contextlib.suppress(ValueError):
            kept[0][:3] = b"bad"
        return 200
    assert ask(server, handler).body == b"secret"


def test_a_broken_stream_to_http_1_0_is_no_whole_one(server, caplog):
    """a content that ends with the connection: FIN says that it is whole, only a reset says that it is not."""
    httpd.register_httpdcb("test", "s", lambda request, page: 200, lambda request, pos, buf: ends(request, pos, buf) if pos else 1)
    data, end = exchange(server, b"GET /s HTTP/1.0\r\n\r\n")
    assert end == "reset"


def test_a_408_is_followed_by_an_orderly_end(server):
    """expire() closes at once what it has refused: `unsent` is from before the refusal."""
    small = httpd.Server(ip="127.0.0.1", port=0, request_timeout=0.1)
    with connect(small) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        settle(small, lambda: small.connections)
        connection, = small.connections
        settle(small, lambda: connection.state is not httpd.Connection.receive_head)
        assert connection.state is httpd.Connection.linger
    small.stop(0)


def test_what_ends_a_turn_does_not_hold_up_who_is_resumed(server):
    """KeyboardInterrupt out of a turn skips the wake-up for those who have been resumed in it: they wait for a second."""
    parked.clear()
    httpd.register_httpdcb("test", "park", park)

    def leave(request, page):
        parked[0].state = 1
        parked[0].resume()
        raise KeyboardInterrupt
    httpd.register_httpdcb("test", "leave", leave)
    with connect(server) as client, connect(server) as other:
        client.send(get(b"/park"))
        settle(server, lambda: parked)
        other.send(get(b"/leave"))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                server.run_once(0.05)
        import select
        assert select.select([server.fileno()], [], [], 0.3)[0]


def test_upload_data_cb_is_not_for_what_its_handler_will_not_see(server):
    """OPTIONS is answered by the server, but its content goes to upload_data_cb."""
    got = []
    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=lambda request, data: got.append(data))
    assert answers(exchange(server, post(b"abc", path=b"/u").replace(b"POST", b"OPTIONS"))[0])[0].status == 204 and got == []


def test_two_threads_that_are_the_first(server, monkeypatch):
    """Thread(target=server.run).start(); server.url: both open a listener, and the port is not the one that is served."""
    real, found = httpd.listen, []
    monkeypatch.setattr(httpd, "listen", lambda *address: time.sleep(0.1) or real(*address))
    threads = [threading.Thread(target=lambda: found.append(server.port)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["close", "stop"])
def test_the_last_answer_to_who_was_suspended_is_not_lost_to_a_reset(server, how):
    """what came behind it is still in the socket, not in `received`: close() means a reset, also at a graceful stop."""
    parked.clear()
    httpd.register_httpdcb("test", "park", park)
    with connect(server) as client:
        client.send(get(b"/park", b"Connection: " + (b"close" if how == "close" else b"keep-alive")))
        settle(server, lambda: parked)
        client.send(get())
        pump(server, client, 3)
        if how == "stop":
            server._stop_at = time.monotonic() + 5          # as stop() does
            server._wake_up()
            server.run_once(0.1)
        parked[0].state = 1
        parked[0].resume()
        server.run_once(0.1)
        time.sleep(0.05)
        client.setblocking(True)
        assert answers(client.recv(10000))[0].headers["Connection"] == "close"
        assert client.recv(10) == b""                       # ConnectionResetError


def wait_for(condition, seconds=5):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def small_buffers(monkeypatch):
    """As for a client far away: what is sent soon has to wait."""
    listen = httpd.listen

    def listen_small(*address):
        listener = listen(*address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener
    monkeypatch.setattr(httpd, "listen", listen_small)


# SIGHUP while a file is being replaced: load_cert_chain() raises FileNotFoundError, which is no SSLError; from the signal handler it ends run().
@pytest.mark.parametrize("gone", ["cert.pem", "key.pem", "ca.pem"])
def test_a_file_that_goes_during_reload(https, pki, tmp_path, monkeypatch, caplog, gone):
    for name, source in ("cert.pem", "ec.pem"), ("key.pem", "ec.key"), ("ca.pem", "ca.pem"):
        shutil.copy(pki / source, tmp_path / name)
    server = https(tls_cert_file=tmp_path / "cert.pem", tls_key_file=tmp_path / "key.pem", tls_ca_file=tmp_path / "ca.pem")
    check = httpd._check_pem

    def check_and_remove(parameter, path, kind):
        check(parameter, path, kind)
        if path.endswith(gone):
            os.unlink(path)
    monkeypatch.setattr(httpd, "_check_pem", check_and_remove)
    assert server.reload_tls() is False and "is not loaded anew" in caplog.text and gone in caplog.text


# The socket is full when the last byte of the answer is in it: close_notify gets SSLWantWriteError, which is ignored, and FIN follows: truncated.
def test_close_notify_comes_even_if_the_socket_is_full(https, small_buffers):
    httpd.register_httpdcb("test", "n", lambda request, page: page.write(b"y" * int(request.lookup_arg("n"))) and 200)
    server = https("ec")
    for size in range(17000, 60000, 997):
        with TLSClient(server.port) as client:
            requests = server.requests
            client.handshake()
            client.tls.write(get(b"/n?n=%d" % size, b"Connection: close"))
            client.push()
            wait_for(lambda: server.requests > requests)
            time.sleep(0.01)
            data = b""
            while more := client.read():                # SSLEOFError
                data += more
            assert len(answers(data)[0].body) == size


# The subject is put together without escapes: O="Ex, Inc" or CN="x,CN=admin" read as something else (RFC 4514, 2.4).
# tls_ca_file with an intermediate CA alone takes the start's checks, and then refuses everybody ("signed by one").
def test_an_intermediate_ca_and_a_comma_in_the_subject(https, tmp_path):
    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "root.key", "-out", "root.pem", "-subj", "/CN=root", "-days", "2")
    (tmp_path / "ca.ext").write_text("basicConstraints=CA:TRUE\n")
    for name, signer, more in ("inter", "root", ("-extfile", "ca.ext")), ("bob", "inter", ()):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", name + ".key", "-out", name + ".csr", "-subj", "/O=Ex, Inc/CN=%s,CN=admin" % name)
        openssl("x509", "-req", "-in", name + ".csr", "-CA", signer + ".pem", "-CAkey", signer + ".key", "-CAcreateserial", "-days", "2", "-out", name + ".pem", *more)
    httpd.register_httpdcb("test", "who", lambda request, page: page.write(request.client_cert.subject) and 200)
    server = https("ec", tls_ca_file=tmp_path / "inter.pem")
    with TLSClient(server.port, context={"load_cert_chain": (str(tmp_path / "bob.pem"), str(tmp_path / "bob.key"))}) as client:
        client.handshake()
        assert client.exchange(get(b"/who"))[0].body == rb"CN=bob\,CN=admin,O=Ex\, Inc"


# README: "Every mistake is a line FILE:LINE: MODULE: what to do". What comes from the files has neither.
@pytest.mark.parametrize("lines, expected", [
    (["tls_cert_file = {}/none.pem", "tls_key_file = {}/rsa.key"], "test.cfg:2: httpd: tls_cert_file: {}/none.pem cannot be read: No such file or directory\n"),
    (["tls_cert_file = {}/rsa.pem", "tls_key_file = {}/encrypted.key"], "test.cfg:3: httpd: tls_key_file: {}/encrypted.key is encrypted: "),
    (["tls_cert_file = {}/rsa.pem", "", "tls_key_file = {}/other.key"], "test.cfg:2: httpd: tls_cert_file {}/rsa.pem with tls_key_file"),
    (["tls_key_file = {}/rsa.key"], "test.cfg:2: httpd: tls_key_file is set without tls_cert_file"),
    (["tls_cert_file = {}/rsa.pem", "tls_key_file = {}/rsa.key", "tls_ca_file = {}/empty.pem"], "test.cfg:4: httpd: tls_ca_file: {}/empty.pem has no BEGIN CERT"),
    (["tls_cert_file = {}/rsa.pem", "tls_key_file = {}/rsa.key", "tls_ciphers = SUITEB128"], "no client could connect: tls_ciphers has no suite"),
], ids=range(6))
@pytest.mark.parametrize("option", [["-t"], []])
def test_mistakes_name_file_and_line(pki, tmp_path, lines, expected, option):
    (tmp_path / "test.cfg").write_text("\n".join(["[httpd]", *lines, "ip = 127.0.0.1", "port = 0"]).replace("{}", str(pki)))
    done = subprocess.run([sys.executable, os.path.join(HERE, "httpd.py"), *option, "test.cfg"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    last = done.stderr.splitlines(True)[-1]
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert expected.replace("{}", str(pki)) in last and last.startswith("test.cfg:")


# Pipelined answers are a bytearray, of which TLS takes a record of 16 KiB at a time, and out[sent:] copies the rest: the square of its size.
def test_pipelined_large_answers_cost_no_more(https):
    size = 30_000_000
    large = bytes(size)
    httpd.register_httpdcb("test", "l", lambda request, page: page.write(large) and 200)
    server = https("ec", memory_budget=8 * size, buf_size=size)
    clock = time.pthread_getcpuclockid(server._thread.ident)
    cost = {}
    for together in 1, 2:
        context = ssl._create_unverified_context()
        with context.wrap_socket(socket.create_connection(("127.0.0.1", server.port), timeout=60)) as client:
            start = time.clock_gettime(clock)
            for _ in range(2 // together):
                client.sendall(get(b"/l") * together)
                left = together * size
                while left > 0:
                    left -= len(client.recv(1 << 18))
            cost[together] = time.clock_gettime(clock) - start
    assert cost[2] < 4 * cost[1]


# A client without certificate that sends on at once (as curl -d does) gets a reset, which overtakes the alert that would say why.
def test_the_alert_comes_before_the_end(https, pki):
    server = https("ec", tls_ca_file=pki / "ca.pem")
    for _ in range(5):
        with TLSClient(server.port) as client:
            while True:
                try:
                    client.tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.push()
                    client.pull()
            client.tls.write(post(b"x" * 5000))         # leaves with the Finished
            client.push()
            time.sleep(0.02)
            client.tls.write(b"y" * 100)
            client.push()                               # BrokenPipeError, ConnectionResetError
            time.sleep(0.02)
            client.sock.getpeername()                   # what curl does next; OSError after a reset
            with pytest.raises(ssl.SSLError, match="(?i)certificate.required"):
                client.read()


# SIGHUP for a server without TLS: it used to end it (a terminal that is closed); now it is an ERROR line, and an orphan that holds its port.
def test_sighup_without_tls_is_a_log_line(tmp_path):
    (tmp_path / "test.cfg").write_text("[httpd]\nip = 127.0.0.1\nport = 0\n")
    with subprocess.Popen([sys.executable, os.path.join(HERE, "httpd.py"), "test.cfg"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        port = int(re.search(rb":([0-9]+)", process.stdout.readline())[1])
        process.send_signal(signal.SIGHUP)
        assert b"nothing to reload" in process.stderr.readline()
        assert raw_get(port, raw=get(b"/nowhere")) == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


# ---------------------------------------------------------------------------------------------------------------- WSGI

@pytest.fixture
def running():
    """A server in a thread."""
    with httpd.Server(ip="127.0.0.1", port=0) as server:
        yield server
        server.stop(0)


def mount(app, threads=0, root="app"):
    httpd.register_wsgi("test", root, app, threads=threads)


def fetch(server, raw=None, method="GET", path="/app", fields=""):
    """All that comes of one request, and how it ended; the answer is taken apart if it is whole."""
    raw = raw or ("%s %s HTTP/1.1\r\nHost: example\r\nConnection: close\r\n%s\r\n" % (method, path, fields)).encode()
    with connect(server) as client:
        client.sendall(raw)
        data = read_all(client)
    try:
        answer, = answers(data, method)
    except http.client.IncompleteRead:
        return data, None
    return data, answer


def until(condition, why=None):
    """Threads have their own time."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.002)


def inspect(environ, start_response):
    """Says what it has been given."""
    told = {name: value for name, value in environ.items() if isinstance(value, str)}
    told["body"] = environ["wsgi.input"].read().decode("latin-1")
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]


BODY = b"Content-Length: 3\r\n\r\nabc"
ENVIRON_ROWS = [
    (b"GET /app", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "", "QUERY_STRING": "", "REQUEST_METHOD": "GET"}, "the mount itself"),
    (b"GET /app/", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/"}, "with a slash"),
    (b"GET /app/a%20b%2Fc;d?x=1&y=%20", b"\r\n", {"PATH_INFO": "/a b/c;d", "QUERY_STRING": "x=1&y=%20"}, "decoded once, the query not at all"),
    (b"GET /app/%25%32%46", b"\r\n", {"PATH_INFO": "/%2F"}, "once is not twice"),
    (b"GET /app/%FF%C3%A4", b"\r\n", {"PATH_INFO": "/\xff\xc3\xa4"}, "bytes that are no UTF-8 are kept, as latin-1"),
    (b"GET /%61pp/x", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/x"}, "an encoded root is the root"),
    (b"GET /app%2Fx", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/x"}, "so is its slash"),
    (b"GET http://elsewhere/app/x?y", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/x", "QUERY_STRING": "y", "HTTP_HOST": "elsewhere"}, "absolute-form"),
    (b"GET /appx/y", b"\r\n", {"SCRIPT_NAME": "", "PATH_INFO": "/appx/y"}, "mounted at the root"),
    (b"GET /", b"\r\n", {"SCRIPT_NAME": "", "PATH_INFO": "/"}, "the root itself"),
    (b"GET http://elsewhere", b"\r\n", {"SCRIPT_NAME": "", "PATH_INFO": "/"}, "absolute-form without a path"),
    (b"OPTIONS *", b"\r\n", {"PATH_INFO": "/", "REQUEST_METHOD": "OPTIONS"}, "PATH_INFO begins with a slash"),
    (b"GET /app", b"X_Real-IP: evil\r\nX-Real-IP: good\r\nX_A: b\r\n\r\n", {"HTTP_X_REAL_IP": "good", "HTTP_X_A": None}, "names with _ are left out"),
    (b"GET /app", b"X-A: b\r\nX-A: c\r\nCookie: d=e\r\nCookie: f=g\r\n\r\n", {"HTTP_X_A": "b, c", "HTTP_COOKIE": "d=e; f=g"}, "several of a name"),
    (b"GET /app", b"X-A: \xe4\r\n\r\n", {"HTTP_X_A": "\xe4"}, "a field is latin-1"),
    (b"GET /app", b"\r\n", {"CONTENT_LENGTH": None, "CONTENT_TYPE": None, "HTTP_CONTENT_LENGTH": None, "body": ""}, "no content"),
    (b"POST /app", b"Content-Length: 0\r\n\r\n", {"CONTENT_LENGTH": "0", "body": ""}, "content of no bytes"),
    (b"POST /app", b"Content-Type: text/x\r\n" + BODY, {"CONTENT_LENGTH": "3", "CONTENT_TYPE": "text/x", "HTTP_CONTENT_TYPE": None, "HTTP_CONTENT_LENGTH": None,
                                                         "body": "abc"}, "content"),
    (b"POST /app", b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", {"CONTENT_LENGTH": "3", "HTTP_TRANSFER_ENCODING": None, "body": "abc"}, "chunks"),
    *[(method + b" /app", BODY, {"REQUEST_METHOD": method.decode(), "body": "abc"}, method.decode()) for method in (b"GET", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")],
]


@pytest.mark.parametrize("begin, rest, expected", [row[:3] for row in ENVIRON_ROWS], ids=[row[3] for row in ENVIRON_ROWS])
def test_environ(server, begin, rest, expected):
    mount(inspect), mount(inspect, root="")
    answer, = answers(exchange(server, begin + b" HTTP/1.1\r\n" + HOST + rest)[0])
    told = answer.json()
    assert answer.status == 200 and {name: told.get(name) for name in expected} == expected
    assert told["SERVER_PORT"] == str(server.port) and told["SERVER_NAME"] == told["REMOTE_ADDR"] == "127.0.0.1" and told["SERVER_PROTOCOL"] == "HTTP/1.1"


@wsgiref.validate.validator
def reads_and_tells(environ, start_response):
    """Reads its input in every way, and answers in pieces."""
    content = environ["wsgi.input"]
    lines = [content.read(2), content.readline(), *content.readlines(3), *content, content.read(1)]
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Method", environ["REQUEST_METHOD"])])
    return iter(lines if any(lines) else [b"", b"no", b"thing"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("threads", [0, 2])
def test_the_validator_is_silent(running, threads, capfd):
    mount(reads_and_tells, threads)
    lines = b"first\nsecond\nthird\nfourth"
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for fields in ("", "Content-Length: 25\r\n\r\n" + lines.decode(), "Transfer-Encoding: chunked\r\n\r\n19\r\n" + lines.decode() + "\r\n0\r\n"):
            answer = fetch(running, method=method, path="/app/x?y=z", fields=fields)[1]
            assert answer.status == 200 and answer.headers["X-Method"] == method, answer.body
            assert answer.body == (b"" if method == "HEAD" else lines if fields else b"nothing")
    gc.collect()
    assert capfd.readouterr() == ("", "")


class Pieces:
    """An iterable that counts how often it is closed; an exception among the pieces is raised."""

    def __init__(self, *pieces):
        self.pieces, self.closed, self.given = iter(pieces), 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self.pieces)
        if isinstance(piece, Exception):
            raise piece
        self.given += 1
        return piece

    def close(self):
        self.closed += 1


def says(result, status="200 OK", headers=(), written=()):
    """An application that answers so; a function makes what it returns."""
    def app(environ, start_response):
        write = start_response(status, list(headers))
        for data in written:
            write(data)
        return result(environ) if callable(result) else result
    return app


def late(environ, start_response):
    yield b""
    start_response("201 Created", [("X-Late", "yes")])
    yield b""
    yield b"late"


def changes_its_mind(environ, start_response):
    start_response("200 OK", [("X-First", "1"), ("Content-Length", "3")])
    try:
        raise KeyError("no")
    except KeyError:
        start_response("503 Busy", [("X-Second", "2")], sys.exc_info())
    return [b"busy"]


def from_file(environ):
    return environ["wsgi.file_wrapper"](io.BytesIO(b"x" * 200000), 512)


LENGTH = lambda number: [("Content-Length", str(number))]
RESPONSE_ROWS = [       # application; status, fields and content; how it is framed
    (says([b"abc"]), 200, {"Content-Length": "3"}, b"abc", "a list of one"),
    (says((b"a", b"", b"bc")), 200, {"Content-Length": "3"}, b"abc", "a tuple of three"),
    (says([]), 200, {"Content-Length": "0"}, b"", "an empty list"),
    (says(lambda environ: iter([])), 200, {"Transfer-Encoding": "chunked"}, b"", "an empty iterator"),
    (says(lambda environ: iter([b"a", b"", b"bc"])), 200, {"Transfer-Encoding": "chunked", "Content-Length": None}, b"abc", "an iterator"),
    (says(lambda environ: iter([b"a", b"bc"]), headers=LENGTH(3)), 200, {"Transfer-Encoding": None, "Content-Length": "3"}, b"abc", "its own Content-Length"),
    (says([b"x" * 3000000]), 200, {"Content-Length": "3000000"}, b"x" * 3000000, "a list larger than the page"),
    (says([b"x" * 300000] * 3), 200, {"Content-Length": "900000"}, b"x" * 900000, "a list of large ones"),
    (says(from_file, headers=LENGTH(200000)), 200, {"Content-Length": "200000"}, b"x" * 200000, "wsgi.file_wrapper"),
    (late, 201, {"X-Late": "yes"}, b"late", "start_response() as late as the iteration"),
    (changes_its_mind, 503, {"X-First": None, "X-Second": "2", "Content-Length": "4"}, b"busy", "a second start_response() with exc_info"),
    (says([], written=[b"", b"ab", b"c"]), 200, {}, b"abc", "write()"),
    (says([b"c", b"d"], written=[b"a", b"b" * 200000]), 200, {}, b"a" + b"b" * 200000 + b"cd", "write() and more than memory holds"),
    (says(lambda environ: iter([b"c"]), written=[b"ab"]), 200, {"Transfer-Encoding": "chunked"}, b"abc", "write() and an iterator"),
    (says([b"abc"], "204 No Content"), 204, {"Content-Length": None, "Transfer-Encoding": None}, b"", "204 has no content"),
    (says(lambda environ: iter([b"abc"]), "304 Not Modified", [("ETag", '"x"')]), 304, {"ETag": '"x"', "Transfer-Encoding": None}, b"", "304 neither"),
    (says([b"abc"], "404 No idea", [("Content-Type", "x/y")]), 404, {"Content-Type": "x/y"}, b"abc", "a status"),
    (says([b"abc"], "299"), 299, {"Content-Type": None}, b"abc", "no reason, no type"),
    (says([b"abc"], headers=[("Vary", "a"), ("Set-Cookie", "a=b"), ("vary", "c"), ("Set-Cookie", "d=e")]), 200, {"Vary": "a, c"}, b"abc", "several of a name"),
    (says([b"abc"], headers=[("Connection", "x"), ("keep-alive", "x"), ("Date", "x"), ("Transfer-Encoding", "x"), ("Upgrade", "x"), ("Server", "x")]), 200,
     {"Connection": "close", "Transfer-Encoding": None, "Keep-Alive": None, "Upgrade": None, "Server": "x"}, b"abc", "fields that are the server's"),
]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("app, status, fields, content", [row[:4] for row in RESPONSE_ROWS], ids=[row[4] for row in RESPONSE_ROWS])
def test_responses(running, threads, app, status, fields, content):
    mount(app, threads)
    data, answer = fetch(running)
    assert answer.status == status and answer.body == content and {name: ", ".join(answer.headers.get_all(name, [])) or None for name in fields} == fields
    assert len(answer.headers.get_all("Date")) == 1 and answer.headers["Date"] != "x" and data.count(b"Set-Cookie") in (0, 2)
    data, answer = fetch(running, method="HEAD")
    same = {name: value for name, value in fields.items() if name != "Transfer-Encoding"}
    assert answer.status == status and data.endswith(b"\r\n\r\n") and {name: ", ".join(answer.headers.get_all(name, [])) or None for name in same} == same


def test_head_keeps_the_length_that_the_application_says(running):
    for root, threads in (("loop", 0), ("pool", 1)):
        mount(says([], headers=LENGTH(12)), threads, root)
        assert fetch(running, method="HEAD", path="/" + root)[1].headers["Content-Length"] == "12"


def wrong(*headers, status="200 OK"):
    return lambda environ, start_response: (start_response(status, list(headers)), [b"x"])[1]


def twice(environ, start_response):
    start_response("200 OK", [])
    start_response("200 OK", [])
    return [b"x"]


def raises(environ, start_response):
    raise KeyError("before")


def too_late(environ, start_response):
    yield from says([b"x"])(environ, start_response)
    try:
        raise KeyError("too late")
    except KeyError:
        start_response("500 No", [], sys.exc_info())


FAULT_ROWS = [          # application; the content that has left before the connection is cut, None: 500; what the log says
    (raises, None, "KeyError: 'before'", "an exception"),
    (says(lambda environ: Pieces(KeyError("first"))), None, "KeyError: 'first'", "an exception instead of the first piece"),
    (says(lambda environ: Pieces(b"", KeyError("first"))), None, "KeyError: 'first'", "an exception after an empty piece"),
    (lambda environ, start_response: [b"x"], None, "has not called start_response", "no start_response()"),
    (lambda environ, start_response: [], None, "has not called start_response", "no start_response(), and nothing else"),
    (lambda environ, start_response: None, None, "TypeError: 'NoneType'", "nothing returned"),
    (says(None), None, "TypeError: 'NoneType'", "nothing to iterate over"), (says("text"), None, "TypeError.*'str'", "str"),
    (says(["text"]), None, "TypeError.*'str'", "a list of str"), (says([None]), None, "TypeError", "a list of None"),
    (says([], written=["text"]), None, "TypeError.*'str'", "write(str)"),
    (twice, None, "has been called already", "start_response() twice"),
    (wrong(status="20 OK"), None, "no status", "a short status"), (wrong(status="100 Continue"), None, "no status", "1xx"),
    (wrong(status="200 O\nK"), None, "no status", "LF in the status"), (wrong(status=200), None, "TypeError", "a number as status"),
    (wrong(("A", "b\r\nC: d")), None, "may not stand", "CR LF in a value"), (wrong(("A:", "b")), None, "may not stand", "a name that is none"),
    (wrong(("A", "\u20ac")), None, "may not stand", "a value that is not latin-1"), (wrong(("A", 1)), None, "TypeError", "a number as value"),
    (wrong((b"A", "b")), None, "TypeError", "bytes as name"), (wrong(("Content-Length", "x")), None, "ValueError", "a Content-Length that is no number"),
    (wrong(("Content-Length", "0")), None, "more than its Content-Length of 0", "more than its Content-Length at once"),
    (wrong(("Content-Length", "2")), b"", "before the Content-Length", "less than its Content-Length"),
    (says(lambda environ: Pieces(b"ab", KeyError("second"))), b"ab", "KeyError: 'second'", "an exception in the middle"),
    (says(lambda environ: Pieces(b"ab", KeyError("second")), headers=LENGTH(9)), b"ab", "KeyError: 'second'", "the same in a known length"),
    (says(lambda environ: Pieces(b"ab", "text")), b"ab", "TypeError", "str in the middle"),
    (says(lambda environ: Pieces(b"ab", b"cd"), headers=LENGTH(3)), b"ab", "more than its Content-Length of 3", "too much in the end"),
    (too_late, b"x", "KeyError: 'too late'", "exc_info after the head: raised again"),
]


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("app, sent, logged", [row[:3] for row in FAULT_ROWS], ids=[row[3] for row in FAULT_ROWS])
def test_faults_of_the_application(running, caplog, threads, app, sent, logged):
    mount(app, threads)
    data, answer = fetch(running)
    if sent is None or answer and answer.status == 500:     # a thread may fail before its first piece has left
        assert answer.status == 500 and b"the log of the server says why" in answer.body
    else:
        assert answer is None and data.startswith(b"HTTP/1.1 200 OK\r\n") and sent in data and not data.endswith(b"\r\n0\r\n\r\n")
    assert re.search(logged, caplog.text) and caplog.text.count("ERROR") == 1
    assert raises_nothing(running)


def raises_nothing(server):
    """The server is as good as before."""
    mount(says([b"well"]), root="well")
    return fetch(server, path="/well")[1].body == b"well"


@pytest.mark.parametrize("threads", [0, 1])
def test_the_iterable_is_closed_once(running, threads, caplog):
    results = {"ended": Pieces(b"a", b"b"), "failed": Pieces(b"a", KeyError("x")), "failed_first": Pieces(KeyError("x")), "empty": Pieces(),
               "unknown_type": Pieces(b"a", "b"), "no_content": Pieces(b"a", b"b"), "short": Pieces(b"a")}
    fields = {"short": LENGTH(9)}

    def app(environ, start_response):
        name = environ["PATH_INFO"][1:]
        start_response("204 No Content" if name == "no_content" else "200 OK", fields.get(name, []))
        return results[name]
    mount(app, threads)
    for name, result in results.items():
        fetch(running, path="/app/" + name)
        until(lambda: result.closed, name)
        assert result.closed == 1, name
    results["head"] = Pieces(*[b"a"] * 5)
    assert fetch(running, method="HEAD", path="/app/head")[1].status == 200
    until(lambda: results["head"].closed)
    assert results["head"].given == 1                       # nobody wants the rest


@pytest.mark.parametrize("threads", [0, 1])
def test_a_client_that_goes_ends_its_application(running, threads, caplog):
    given, closed = [], threading.Event()

    def endless(environ, start_response):
        start_response("200 OK", [])
        try:
            while True:
                given.append(len(given))
                yield b"x" * 10000
        finally:
            closed.set()
    mount(endless, threads)
    with connect(running) as client:
        client.sendall(get(b"/app"))
        assert client.recv(12) == b"HTTP/1.1 200"
        until(lambda: len(given) > 2)
        time.sleep(0.05)
        ahead = len(given)
        time.sleep(0.05)
        assert len(given) == ahead < 1000, "it waits for the client"
        assert not closed.is_set()
    gc.disable()
    try:
        assert closed.wait(3), "closed without the help of the garbage collector"
    finally:
        gc.enable()
    assert raises_nothing(running) and not caplog.text


def test_a_client_that_goes_before_its_turn_is_not_served(running):
    go, calls = threading.Event(), []

    def waits(environ, start_response):
        calls.append(environ["PATH_INFO"])
        go.wait(5)
        return says([b"done"])(environ, start_response)
    mount(waits, 1)
    with connect(running) as first, connect(running) as second, connect(running) as third:
        first.sendall(get(b"/app/1", b"Connection: close"))
        until(lambda: calls)
        second.sendall(get(b"/app/2"))
        third.sendall(get(b"/app/3", b"Connection: close"))
        until(lambda: len(running.connections) == 3)
        second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        second.close()                                      # with a reset
        until(lambda: len(running.connections) == 2)
        go.set()
        assert answers(read_all(first))[0].body == answers(read_all(third))[0].body == b"done"
    assert calls == ["/1", "/3"]


@pytest.mark.parametrize("threads", [0, 3])
def test_interleaved_applications_keep_their_context_variables(running, threads, capfd):
    path = contextvars.ContextVar("path")

    def tells(environ, start_response):
        start_response("200 OK", [])
        token = path.set(environ["PATH_INFO"].encode())
        try:
            for _ in range(200):
                yield path.get() * 10000
        finally:
            path.reset(token)                               # ValueError in another context
    mount(tells, threads)
    clients = [connect(running) for _ in range(3)]
    for number, client in enumerate(clients):
        client.sendall(get(b"/app/%d" % number, b"Connection: close"))
    clients.pop().close()
    for number, client in enumerate(clients):
        assert answers(read_all(client))[0].body == b"/%d" % number * 2000000
        client.close()
    until(lambda: not running.connections)
    assert capfd.readouterr() == ("", "")                   # where Python tells what fails in a finalizer


def test_a_slow_application_in_threads_delays_nobody(running):
    go = threading.Barrier(3)

    def slow(environ, start_response):
        go.wait(5)
        yield from says([b"slow"])(environ, start_response)
    mount(slow, 2)
    with connect(running) as first, connect(running) as second:
        first.sendall(get(b"/app", b"Connection: close"))
        second.sendall(get(b"/app", b"Connection: close"))
        until(lambda: go.n_waiting == 2)
        begin = time.monotonic()
        assert raises_nothing(running) and time.monotonic() - begin < 1
        go.wait(5)
        assert answers(read_all(first))[0].body == answers(read_all(second))[0].body == b"slow"


def test_a_piece_is_sent_while_the_application_makes_the_next(running):
    go = threading.Semaphore(0)

    def events(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/event-stream")])
        write(b"first")
        go.acquire(timeout=5)
        return then()

    def then():
        for piece in (b"second", b"third"):
            yield piece
            go.acquire(timeout=5)
    mount(events, 1)
    with connect(running) as client:
        client.sendall(get(b"/app"))
        for piece in (b"first", b"second", b"third", b"0\r\n\r\n"):
            data = b""
            while piece not in data:
                data += client.recv(1000)
            go.release()


@pytest.mark.parametrize("threads", [0, 1])
def test_a_large_download_at_the_readers_pace(running, threads):
    given = []

    def large(environ, start_response):
        start_response("200 OK", [("Content-Length", str(40 << 20))])
        for number in range(640):
            given.append(number)
            yield bytes([number % 251]) * 65536
    mount(large, threads)
    with connect(running) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(get(b"/app", b"Connection: close"))
        time.sleep(0.1)
        assert len(given) < 400
        data = read_all(client).partition(b"\r\n\r\n")[2]
    assert data == b"".join(bytes([number % 251]) * 65536 for number in range(640))


@pytest.mark.parametrize("threads", [0, 1])
def test_a_large_upload(running, threads):
    def digest(environ, start_response):
        content, found = environ["wsgi.input"], hashlib.sha256()
        for data in iter(lambda: content.read(100000), b""):
            found.update(data)
        content.seek(0)
        return says([("%s %d" % (found.hexdigest(), len(content.read()))).encode()])(environ, start_response)
    mount(digest, threads)
    content = bytes(range(256)) * 20000
    expected = ("%s %d" % (hashlib.sha256(content).hexdigest(), len(content))).encode()
    assert fetch(running, post(content, b"Connection: close", path=b"/app"))[1].body == expected
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (content[i:i + 99999] for i in range(0, len(content), 99999)))
    raw = b"POST /app HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\n" + chunks + b"0\r\n\r\n"
    assert fetch(running, raw)[1].body == expected


def test_wsgi_body_size(server):
    httpd.modparam("httpd", "wsgi_body_size", 5000)
    mount(inspect)
    content = b"x" * 5000
    assert answers(exchange(server, post(content, path=b"/app"))[0])[0].status == 200
    for raw in (post(content + b"x", path=b"/app"), b"POST /app HTTP/1.1\r\nContent-Length: 5001\r\nExpect: 100-continue\r\n" + HOST + b"\r\n",
                b"POST /app HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\n1388\r\n" + content + b"\r\n1\r\n"):
        data, end = exchange(server, raw)
        assert data.startswith(b"HTTP/1.1 413 ") and b"wsgi_body_size" in data and end == "closed"
    data = exchange(server, b"POST /app HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n" + HOST + b"\r\n", b"abc")[0]
    assert data.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n") and answers(data)[0].json()["body"] == "abc"


def test_more_requests_than_threads(running):
    seen = set()

    def app(environ, start_response):
        seen.add(threading.get_ident())
        return says([environ["PATH_INFO"].encode()])(environ, start_response)
    mount(app, 4)
    clients = [connect(running) for _ in range(300)]
    for number, client in enumerate(clients):
        client.sendall(get(b"/app/%d" % number, b"Connection: close"))
    for number, client in enumerate(clients):
        assert answers(read_all(client))[0].body == b"/%d" % number
        client.close()
    assert len(seen) <= 4


def test_pipelined_requests_to_threads_are_answered_in_order(running):
    mount(inspect, 4)
    with connect(running) as client:
        client.sendall(b"".join(get(b"/app/%d" % number) for number in range(50)) + get(b"/app/50", b"Connection: close"))
        assert [answer.json()["PATH_INFO"] for answer in answers(read_all(client))] == ["/%d" % number for number in range(51)]


def test_a_stuck_application_does_not_keep_the_program_from_ending(tmp_path):
    (tmp_path / "stuck.py").write_text(
        "import httpd, socket, threading\nstarted = threading.Event()\ndef app(environ, start_response):\n    started.set()\n    threading.Event().wait()\n"
        "httpd.register_wsgi('test', '', app, threads=1)\nwith httpd.Server(ip='127.0.0.1', port=0) as server:\n"
        "    client = socket.create_connection(('127.0.0.1', server.port))\n    client.sendall(b'GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
        "    started.wait()\n    server.stop(0)\nprint('ended')\n")
    done = subprocess.run([sys.executable, "stuck.py"], cwd=tmp_path, env={"PYTHONPATH": str(HERE)}, timeout=20, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_mounts_that_cannot_work():
    for app, threads in ((3, 0), (inspect, -1), (inspect, None), (inspect, "2")):
        with pytest.raises(httpd.ConfigError, match="test: "):
            httpd.register_wsgi("test", "app", app, threads=threads)
    mount(inspect)
    with pytest.raises(httpd.ConfigError, match="is taken by test"):
        mount(inspect)


@pytest.mark.parametrize("length", [" 500000", "+500000", "500_000", "9" * 30])
def test_a_length_that_is_none_frees_the_thread(running, length):
    """The 500 leaves the connection open: a thread that waited for its client would wait for long."""
    mount(says(lambda environ: (b"x" * 50000 for _ in range(10)), headers=LENGTH(length)), 1)
    with connect(running) as client:
        for _ in range(3):
            client.sendall(get(b"/app"))
            data = client.recv(10000)
            assert data.startswith(b"HTTP/1.1 500 ")


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
    (["half.cfg"], 1, r"half\.cfg:2: httpd: .*tls_cert_file.*\n", "OPENSIPS, never 11: one half of TLS"),
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
    assert len(lines) <= 5000 and max(map(len, lines)) <= 120
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


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_blocks_run(block, tmp_path):
    (tmp_path / "block.py").write_text(block.replace("port=8000", "port=0"))
    with subprocess.Popen([sys.executable, "-u", "block.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)}, stdout=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+)", process.stdout.readline())[1])
        assert raw_get(port, raw=get(b"/hello")) == 200
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)
    assert len([line for line in block.split("\n") if line.strip()]) < (10 if "Server(" in block else 15)
