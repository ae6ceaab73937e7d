"""Tests of httpd.py, in the order of the file. A row is (raw bytes, what must come of it, why)."""

import ast
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import contextvars
import errno
import functools
import gc
import hashlib
import http
import http.client
import importlib.util
import io
import json
import logging
import math
import os
import pathlib
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import types
import wsgiref.validate
from typing import NamedTuple

import pytest

import httpd

# ------------------------------------------------------------------------------------------------------------- Helpers

HERE = pathlib.Path(__file__).parent
HOST = b"Host: example\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LOCAL = {"ip": "127.0.0.1", "port": 0, "allowed_hosts": "*"}
REGISTERED = ("params", "roots", "mi_commands", "loaded", "pending_inits", "pending_services", "observers",
              "known_methods", "metrics", "access_logs", "config_directories")
ended = math.inf  # so many answers never come: what is due is the end of the connection


@pytest.fixture(scope="session", autouse=True)
def session(request, tmp_path_factory):
    """Programs that tests start read httpd.py compiled, and those that take long start before the first test."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("compiled"))
    gc.freeze()  # thousands of rows need not be looked at by each collection
    wanted = {name for item in request.session.items for name in item.fixturenames}
    for name in sorted(wanted & {"mistakes", "programs"}):
        request.getfixturevalue(name)


@pytest.fixture
def prompt(monkeypatch):
    """Who connects is taken in before he sends something: the kernel has it wait for a second else."""
    monkeypatch.setattr(httpd, "DEFER", 0)


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """What a test registers, it does not leave behind."""
    for module, name in [*((httpd, name) for name in REGISTERED), (sys, "path")]:
        monkeypatch.setattr(module, name, getattr(module, name).copy())


def echo(request, page):
    """Says what it has understood."""
    names = ("method", "target", "version", "path", "url", "query", "root", "scheme")
    told = {name: getattr(request, name) for name in names}
    json.dump({**told, "headers": dict(request.headers), "body": request.body.decode("latin-1")}, page)
    return 200


def large(request, page):
    page.write(b"x" * 1000000)
    return 200


def raising(error):
    def fails(*arguments):
        raise error
    return fails


@pytest.fixture
def server():
    """A server without a thread: it does something only when it is told to. The root echo takes everything."""
    httpd.register_httpdcb("test", "echo", echo, content_type="application/json", methods=("GET", "POST", "PUT"))
    server = httpd.Server(**LOCAL, max_header_size=4096, receive_buf_size=1024)
    yield server
    server.stop(0)


@pytest.fixture
def running():
    """A server in a thread."""
    with httpd.Server(**LOCAL) as server:
        yield server
        server.stop(0)


@pytest.fixture
def far_away(request, monkeypatch):
    """What the server sends soon has to wait, as on its way to a client far away."""
    def listen(self, *backlog):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, getattr(request, "param", 50000))
        return real(self, *backlog)

    real = socket.socket.listen
    monkeypatch.setattr(socket.socket, "listen", listen)


@pytest.fixture
def later(monkeypatch):
    """The clock stands still, and later(3) puts it forward by 3 s: nobody waits, and nobody is too slow."""
    times = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: sum(times))
    return times.append


def table(names, rows):
    """A test for each row; its last column says why, and is the row's name."""
    return pytest.mark.parametrize(names, [pytest.param(*row[:-1], id=row[-1]) for row in rows])


def get(path=b"/echo", *fields):
    return b"".join([b"GET ", path, b" HTTP/1.1\r\n", HOST, *(field + b"\r\n" for field in fields), b"\r\n"])


def post(content, *fields, path=b"/echo"):
    return get(path, b"Content-Length: %d" % len(content), *fields).replace(b"GET", b"POST", 1) + content


def chunked(content, *fields, path=b"/echo"):
    return get(path, b"Transfer-Encoding: chunked", *fields).replace(b"GET", b"POST", 1) + content


def cut_at_random(raw, chance):
    places = sorted({0, len(raw), *(chance.randrange(len(raw)) for _ in range(chance.randrange(1, 8)))})
    return [raw[a:b] for a, b in zip(places, places[1:])]


CUTS = {
    "whole": lambda raw: [raw],
    "bytes": lambda raw: [raw[i:i + 1] for i in range(len(raw))],
    "random": lambda raw: cut_at_random(raw, random.Random(len(raw))),
}


class connect(socket.socket):
    """A client. What its system takes before it reads may be bounded, in bytes."""

    def __init__(self, server=None, host="127.0.0.1", port=None, takes=None):
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if takes:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, takes)
        self.settimeout(30)
        self.connect((host, port or server.port))
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    say = socket.socket.sendall

    def read(self):
        return self.recv(1 << 20)

    def reset(self):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class connect_tls(connect):
    """A client with TLS in memory and a socket, so that the records can be cut at will."""

    def __init__(self, server, context, **options):
        super().__init__(server)
        self.inner, self.outer = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.inner, self.outer, **options)

    def push(self, cut=CUTS["whole"]):
        """Send what TLS has made so far."""
        for piece in cut(self.outer.read()):
            self.sendall(piece)

    def pull(self):
        if data := self.recv(1 << 18):
            self.inner.write(data)
        else:
            self.inner.write_eof()

    def handshake(self, cut=CUTS["whole"]):
        while True:
            try:
                self.tls.do_handshake()
                return self.push(cut)
            except ssl.SSLWantReadError:
                self.push(cut)
                self.pull()

    def say(self, raw, cut=CUTS["whole"]):
        self.handshake(cut)
        self.tls.write(raw)
        self.push(cut)

    def ask(self, raw, count=1, cut=CUTS["whole"]):
        """The answers to that many requests."""
        self.say(raw, cut)
        found = answers(read(self, count))
        if len(found) < count:
            raise ConnectionResetError("it ends before the answer")
        return found

    def read(self):
        """What recv() gives, without TLS; b"" at the end."""
        parts = []
        while not parts or parts[-1]:
            try:
                parts.append(self.tls.read(1 << 20))
            except ssl.SSLWantReadError:
                if parts:
                    break
                self.pull()
            except ssl.SSLZeroReturnError:  # the end of who has said close_notify himself
                parts.append(b"")
        return b"".join(parts)


class Wire(io.BytesIO):
    """Bytes as http.client wants them: what we send must be readable by others."""
    def makefile(self, mode):
        return self

    def close(self):
        pass


class Answer(http.client.HTTPResponse):
    def __init__(self, wire, method):
        super().__init__(wire, method=method)
        self.begin()
        self.body = self.read()

    def json(self):
        return json.loads(self.body)


def answers(data, methods="GET"):
    """The responses that stand in `data`, taken apart by http.client; nothing may be left over."""
    wire, found = Wire(data), []
    while wire.tell() < len(data):
        found.append(Answer(wire, methods if isinstance(methods, str) else methods[len(found)]))
    return found


def is_due(data, due, methods="GET"):
    """Has it come: these bytes, what a function says, so many whole answers? More is due if they announce the end."""
    if not isinstance(due, (int, float)):
        return due in data if isinstance(due, bytes) else due(data)
    if data.count(b"HTTP/1.1 ") < due:
        return False
    try:
        found = answers(data, methods)
    except (http.client.HTTPException, ValueError):
        return False
    return len(found) >= due and not (found and found[-1].headers["Connection"] == "close")


def read(client, due=ended):
    """All that comes until it is due, or to the end, from a server in a thread."""
    data = bytearray()
    while more := client.read():
        data += more
        if due is not ended and not select.select([client], [], [], 0)[0] and is_due(data, due):
            break
    return bytes(data)


def pump(server, client, due=1, methods="GET", seconds=10):
    """Let a server without a thread work until it is due, and two turns more, in which nothing should come.
    Returns what has come, and whether the server has ended the connection: "open", "closed" or "reset"."""
    data, come = bytearray(), 0
    limit = time.monotonic() + seconds
    client.setblocking(False)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                while more := client.recv(1 << 20):
                    data += more
                return bytes(data), "closed"
            come += come > 0 or bool(is_due(data, due, methods))
            if come == 3 or time.monotonic() > limit:
                return bytes(data), "open"
            server.run_once(0 if come and data else 0.01)
    except ConnectionResetError:
        return bytes(data), "reset"
    finally:
        client.settimeout(30)


def exchange(server, *pieces, due=1, methods="GET", half_close=False):
    """Send each piece by itself, and let the server read it by itself; returns what came, and how it ended."""
    with connect(server) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                client.sendall(piece)
                server.run_once(0.02)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        return pump(server, client, ended if half_close else due, methods)


def raw_get(port, host="127.0.0.1", raw=get()):
    """The status of an answer of a server in a thread or a process of its own."""
    with connect(None, host, port) as client:
        client.sendall(raw)
        return int(read(client, b"\r\n\r\n")[9:12])


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def wait_for(condition, server=None, seconds=10):
    """Until it is so; a server without a thread takes its turns meanwhile."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it does not come to that"
        if server:
            server.run_once(0.02)
        else:
            time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------- Parameters

def config(tmp_path, text):
    path = tmp_path / "test.cfg"
    path.write_text(text, encoding="utf-8")
    return str(path)


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
    ("ip", "fe80::1%eth0", "fe80::1%eth0", "RFC 4007, 11: an address with a zone"),
    ("ip", "fe80::1%", "must be an IPv4 or IPv6 address", "a zone without a name"),
    ("ip", "127.0.0.1%lo", "must be an IPv4 or IPv6 address", "IPv4 has no zones"),
    ("ip", "unix:/run/x", "unix:/run/x", "a unix socket"),
    ("ip", "unix:@x", "unix:@x", "one of the abstract namespace"),
    ("ip", "unix:run/x", "ip must be unix:/PATH, or unix:@NAME", "a relative path would depend on the directory"),
    ("ip", "unix:@", "ip must be unix:/PATH, or unix:@NAME", "a socket without a name"),
    ("ip", "unix:/a\0b", "ip must be unix:/PATH, or unix:@NAME", "NUL would end the path"),
    ("ip", "unix:/" + 106 * "x", "unix:/" + 106 * "x", "unix(7): 107 bytes and a NUL"),
    ("ip", "unix:/" + 53 * "\xe4" + "x", "must have at most 107 bytes behind unix:", "bytes are counted"),
    ("prot", 1, 'httpd: unknown parameter "prot", did you mean "port"?', "a typing error"),
    ("zzzzzz", 1, 'httpd: unknown parameter "zzzzzz"', "nothing near"),
    ("tls_cert_file", pathlib.Path("/x"), "/x", "a path object"),
]


@table("name, value, expected", MODPARAM_ROWS)
def test_modparam(name, value, expected):
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


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(tls_cert_file="/x"), "tls_cert_file is set without tls_key_file: HTTPS wants both"),
        (dict(tls_key_file="/x"), "tls_key_file is set without tls_cert_file: HTTPS wants both"),
        (dict(tls_ca_file="/x"), "tls_ca_file is set without tls_cert_file and tls_key_file"),
        (dict(post_buf_size=10**7), r"memory_budget 4194304 has no room .* at least 20032772"),
        (dict(buf_size=10**7), "memory_budget .* at least"),
    ],
)
def test_what_does_not_go_together(values, message):
    with pytest.raises(httpd.ConfigError, match=message):
        httpd.Server(**values)
    if "budget" in message:  # and what the message says to do, does it
        with pytest.raises(httpd.ConfigError) as error:
            httpd.Server(**values)
        httpd.Server(memory_budget=int(str(error.value).split()[-1]), **values)


CONFIG_ROWS = [
    ('[httpd]\nport = 8000', {"port": 8000}, "INI"),
    ('\ufeff[httpd]\nport = 8000', {"port": 8000}, "a byte order mark"),
    ('  [ httpd ]\r\n  port=8000\r\n', {"port": 8000}, "blanks and CRLF"),
    ('# a\n; b\n\n[httpd] # c\nport = 8000 ; d\nip = "127.0.0.1" # e', {"port": 8000, "ip": "127.0.0.1"}, "comments"),
    ('[httpd]\ntls_key_file = "/a ;b #c"', {"tls_key_file": "/a ;b #c"}, "quotes protect a comment sign"),
    ('[httpd]\ntls_key_file = /a;b#c%d', {"tls_key_file": "/a;b#c%d"},
     "no blank before it, no comment; % needs no escaping"),
    (r'[httpd]' '\n' r'tls_key_file = "/a\"b\\c\d"', {"tls_key_file": r'/a"b\c\d'}, "backslashes in quotes"),
    ('[httpd]\nip =', {"ip": ""}, "an empty value"),
    ('[httpd]\nip = # none', {"ip": ""}, "an empty value and a comment"),
    ('modparam("httpd", "ip", "")', {"ip": ""}, "OpenSIPS' manual: ip"),
    ('modparam("httpd", "port", 8000)', {"port": 8000}, "OpenSIPS' manual: port"),
    ('modparam("httpd", "buf_size", 524288)', {"buf_size": 524288}, "OpenSIPS' manual: buf_size"),
    ('modparam("httpd", "post_buf_size", 4096)', {"post_buf_size": 4096}, "OpenSIPS' manual: post_buf_size"),
    ('modparam("httpd", "tls_cert_file", "/etc/pki/tls/certs/opensips.pem")',
     {"tls_cert_file": "/etc/pki/tls/certs/opensips.pem"}, "manual: certificate"),
    ('modparam("httpd", "tls_key_file", "/etc/pki/tls/private/opensips.key")',
     {"tls_key_file": "/etc/pki/tls/private/opensips.key"}, "manual: key"),
    ('modparam("httpd", "tls_ciphers", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2")',
     {"tls_ciphers": "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2"}, "manual: ciphers"),
    ('loadmodule "httpd.so"\nloadmodule "/usr/lib/opensips/modules/mi_http.so"; # both\n'
     'modparam( "mi_http" ,"root","x" ) ;',
     {}, "OpenSIPS' loadmodule"),
    ('[httpd]\nprot = 1', ['2: httpd: unknown parameter "prot", did you mean "port"?'], "an unknown name"),
    ('[httpd]\nport = 1023\npost_buf_size = 255\n\nfoo\nip = ::g',
     ["2: httpd: port must be 0 or 1024 to 65535, not '1023'",
      "3: httpd: post_buf_size must be at least 256, not '255'", "5: cannot read 'foo'", "6: httpd: ip must be"],
     "every problem, not only the first"),
    ('port = 8000', ["1: cannot read 'port = 8000': write [module]"], "no section"),
    ('[httpd]\nport = 1\nport = 8000\nport = 8001',
     ["2: httpd: port must be", "3: httpd: port is set already, at %s:2", "4: httpd: port is set already"],
     "set twice"),
    ('[httpd]\nPORT = 1', ['2: httpd: unknown parameter "PORT", did you mean "port"?'], "a name in capitals"),
    ('[httpd]\nhost = x', ['2: httpd: unknown parameter "host", did you mean "ip"?'], "what others call ip"),
    ('[httpd]\nbind = x', ['2: httpd: unknown parameter "bind", did you mean "ip"?'], "another name of it"),
    ('modparam("mi_htp", "root", "x")', ['1: mi_htp: is not loaded: write [mi_htp], ', 'did you mean "mi_http"?'],
     "a parameter of what nobody knows"),
    ('modparam("mi_http", "root", "x")',
     ['1: mi_http: is not loaded: write [mi_http], or loadmodule "mi_http.so"'],
     "a parameter of what is not loaded"),
    ('[mi_htp]', ['1: mi_htp: cannot be loaded: ModuleNotFoundError: ', 'did you mean "mi_http"'],
     "an unknown module"),
    ('[http]\nip = 127.0.0.1', ['1: http: no such module, did you mean "httpd"?'],
     "the standard library has one of that name"),
    ('[json]\nindent = 2', ['1: json: no such module, or it takes no parameters: it has no mod_init'],
     "a module that takes no parameters"),
    ('[mi_http]\nroot = a/b', ["2: mi_http: root must be one path segment of letters, digits and _, not 'a/b'"],
     "a bad root"),
    ('[httpd]\nip = "127.0.0.1', ["2: cannot read"], "an open quote"),
    ('[httpd]\nip = "127.0.0.1"# e', ["2: cannot read"], "a comment without a blank before it"),
    ('modparam("httpd", "port", )', ["1: cannot read"], "no value"),
    ('[httpd]\n= 3', ["2: cannot read"], "no name"),
]


@table("text, expected", CONFIG_ROWS)
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
        assert any(
            line.startswith("%s:%s" % (path, part)) or not part[0].isdigit() and part in line for line in lines
        ), (part, lines)
    assert len(lines) == sum(part[0].isdigit() for part in expected)


def test_config_files_that_cannot_be_read(tmp_path):
    with pytest.raises(httpd.ConfigError, match="^/nowhere/x.cfg: cannot be read: No such file or directory$"):
        httpd.load_config("/nowhere/x.cfg")
    with pytest.raises(httpd.ConfigError, match="cannot be read: Is a directory$"):
        httpd.load_config(str(tmp_path))
    (tmp_path / "latin").write_bytes(b"[httpd]\nip = \xe4")
    with pytest.raises(httpd.ConfigError, match="latin:2: httpd: is not UTF-8: save the file in that encoding$"):
        httpd.load_config(str(tmp_path / "latin"))


def test_paths_are_relative_to_the_configuration(tmp_path):
    path = config(tmp_path, "[httpd]\ntls_cert_file = a/cert.pem\ntls_key_file = /b/key.pem\n")
    httpd.load_config(path, ["tls_ca_file=c/ca.pem"])
    values = httpd.in_force("httpd")
    assert values["tls_cert_file"] == str(tmp_path / "a/cert.pem")
    assert values["tls_key_file"] == "/b/key.pem"
    assert values["tls_ca_file"] == "c/ca.pem"  # of the command line: relative to where that is


def test_overrides(tmp_path):
    path = config(tmp_path, "[httpd]\nport = 8000\n[mi_http]")
    httpd.load_config(path, ["port=9000", "mi_http.root=other"])
    assert httpd.in_force("httpd")["port"] == 9000 and "other" in httpd.roots
    with pytest.raises(
        httpd.ConfigError, match='^-o prot=1: httpd: unknown parameter "prot", did you mean "port"\\?$'
    ):
        httpd.load_config(config(tmp_path, ""), ["prot=1"])
    with pytest.raises(httpd.ConfigError, match="^-o port: write -o NAME=VALUE$"):
        httpd.load_config(config(tmp_path, ""), ["port"])


def test_modules_of_the_user(tmp_path):
    (tmp_path / "beside_config.py").write_text(
        "import httpd\ndef mod_init(params):\n    httpd.register_httpdcb('beside', params['where'], print)\n"
    )
    (tmp_path / "fails_in_init.py").write_text("def mod_init(params):\n    1 / 0\n")
    (tmp_path / "takes_the_root.py").write_text(
        "import httpd\ndef mod_init(params):\n    httpd.register_httpdcb('taker', 'here', print)\n"
    )
    with pytest.raises(httpd.ConfigError) as error:
        httpd.load_config(config(tmp_path, "[beside_config]\nwhere = here\n[fails_in_init]\n[takes_the_root]\n"))
    problems = str(error.value).split("\n")
    assert "beside" == httpd.roots["here"].module and httpd.loaded == ["beside_config"]
    assert problems[0].endswith(
        "test.cfg:3: fails_in_init: cannot be loaded: ZeroDivisionError: division by zero, raised at %s:2"
        % (tmp_path / "fails_in_init.py"))
    assert problems[1].endswith('test.cfg:4: taker: root path "here" is taken by beside')
    (tmp_path / "site.py").write_text(
        "import httpd\nhttpd.register_httpdcb('site', 'mine', lambda request, page: 200)\n")
    httpd.load_config(config(tmp_path, "[site]"))  # the standard library has one too
    assert httpd.roots["mine"].module == "site" and sys.modules["site"].__file__ != str(tmp_path / "site.py")
    with pytest.raises(httpd.ConfigError, match="beside_config: is loaded already"):
        httpd.loadmodule("beside_config")


# ------------------------------------------------------------------------------------------------------------ Registry

async def sleepy(request=None, page=None):
    return 200


ROOT_ROWS = [
    ("x", "x", "letters"),
    (" x_1\t", "x_1", "blanks are trimmed"),
    ("", "", "the root of everything else"),
    ("A", "A", "case counts"),
    ("a/b", None, "two segments"),
    ("/a", None, "a slash"),
    ("a-b", None, "a dash"),
    ("ä", None, "no ASCII letter"),
    ("٣", None, "no ASCII digit"),
    ("a\n", "a", "a line end is a blank"),
    ("a\nb", None, "a line end inside"),
    (None, None, "no text"),
    ("echo", None, "a root that is taken"),
]


@table("root, name", ROOT_ROWS)
def test_root_paths(server, root, name):  # OPENSIPS, never 12
    if name is None:
        with pytest.raises(httpd.ConfigError, match="is taken by test|must be one path segment"):
            httpd.register_httpdcb("other", root, echo)
        assert len(httpd.roots) == 1
    else:
        httpd.register_httpdcb("other", root, echo)
        assert httpd.roots[name].module == "other"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(access_handler_cb=3), "no function: 3"),
        (dict(flush_data_cb=3), "no function: 3"),
        (dict(upload_data_cb="x"), "no function: 'x'"),
        (dict(methods="GET"), "methods must be names in capitals"),
        (dict(methods=("G T",)), "methods must be names in capitals"),
        (dict(methods=("TRACE",)), "not CONNECT or TRACE"),
        (dict(methods=(3,)), "methods must be"),
        (dict(methods=("",)), "methods must be"),
        (dict(methods=("get",)), "methods must be names in capitals"),
        (dict(methods=()), "methods must be"),
        (dict(access_handler_cb=lambda request: 200), r"is called with \(request, page\): too many"),
        (dict(access_handler_cb=lambda request, page, more: 200), r"is called with \(request, page\): missing"),
        (dict(access_handler_cb=sleepy), "is async: it has to be a plain function"),
        (dict(upload_limit=None), "upload_limit must be a number of bytes, or the name .* not None"),
        (dict(upload_limit=b"9"), "upload_limit must be a number of bytes"),
        (dict(upload_limit=-1), "upload_limit must be a number of bytes"),
        (dict(upload_limit=math.nan), "upload_limit must be a number of bytes"),
        (dict(flush_data_cb=lambda request, pos: 0), r"is called with \(request, pos, buf\)"),
        (dict(upload_data_cb=lambda request: 0), r"is called with \(request, data\)"),
        (dict(init_proc_cb=lambda server: 0), r"is called with \(\): missing"),
        (dict(upload_limit="wsgi_size"), 'unknown parameter "wsgi_size", did you mean "wsgi_body_size"'),
    ],
)
def test_registrations_that_cannot_work(arguments, message):
    with pytest.raises(httpd.ConfigError, match=message):
        httpd.register_httpdcb(**{"module": "m", "root_path": "x", "access_handler_cb": echo, **arguments})
    with pytest.raises(ValueError):
        httpd.register_httpdcb("m", "x", echo, content_type="text/html\r\nX: y")


MATCH_ROWS = [
    (b"/echo", "", "the root"),
    (b"/echo/", "/", "with a slash"),
    (b"/echo/x", "/x", "below it"),
    (b"/echo//x/", "//x/", "slashes are kept"),
    (b"/echo?a=/x", "", "the query does not matter"),
    (b"/%65cho/%41%2f", "/A/", "decoded once, before matching"),
    (b"/echo%3fx", None, "? decoded"),
    (b"/echo%2Fx", "/x", "a decoded slash is a slash"),
    (b"/echo/%2541", "/%41", "decoded only once"),
    (b"/echo/%C3%A4", "/ä", "UTF-8"),
    (b"/echo/%ff", "/\ufffd", "no UTF-8"),
    (b"/echox", None, "a longer name"),
    (b"/ECHO", None, "another case"),
    (b"//echo", None, "an empty segment"),
    (b"/", None, "no name"),
    (b"/ech", None, "a shorter name"),
    (b"/x/echo", None, "below another"),
    (b"http://h/echo/x", "/x", "absolute-form"),
]


@table("target, url", MATCH_ROWS)
def test_matching(server, target, url):
    answer, = answers(exchange(server, get(target))[0])
    assert answer.status == (200 if url is not None else 404)
    if url is not None:
        assert answer.json()["url"] == url and answer.json()["root"] == "echo"
        return
    httpd.register_httpdcb("test", "", echo)  # what nobody takes goes to the root ""
    answer, = answers(exchange(server, get(target))[0])
    assert answer.status == 200
    assert answer.json()["url"] == answer.json()["path"]
    assert answer.json()["root"] == ""


def test_names_that_are_no_text():
    for call in (lambda: httpd.unregister_httpdcb(None), lambda: httpd.modparam("httpd", None, 1)):
        with pytest.raises(httpd.ConfigError, match="None"):
            call()
    with pytest.raises(TypeError):
        httpd.load_config(2)                    # open() would close stderr


def test_unregister(server):
    httpd.unregister_httpdcb(" echo ")
    assert answers(exchange(server, get())[0])[0].status == 404
    with pytest.raises(httpd.ConfigError, match='root path "echo" is not registered'):
        httpd.unregister_httpdcb("echo")


def test_a_root_registered_while_serving_is_there_at_once(server, caplog):
    assert answers(exchange(server, get(b"/new"))[0])[0].status == 404
    called = []
    httpd.register_httpdcb(
        "test", "new", lambda request, page: called.append("request") or 200, None, lambda: called.append("init")
    )
    httpd.register_httpdcb("test", "bad", echo, None, lambda: 1 / 0)
    assert answers(exchange(server, get(b"/new") * 2, due=2)[0])[0].status == 200
    assert called == ["init", "request", "request"]
    assert answers(exchange(server, get(b"/bad"))[0])[0].status == 200
    assert "an init_proc_cb failed" in caplog.text


def test_init_proc_cb_runs_once_before_the_first_request():
    calls = []
    httpd.register_httpdcb(
        "test", "x", lambda request, page: calls.append("request") or 200, None, lambda: calls.append("init")
    )
    for _ in range(2):
        with httpd.Server(**LOCAL) as server:
            with connect(server) as client:
                client.sendall(get(b"/x"))
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert calls == ["init", "request", "request"]


def test_a_failing_init_proc_cb_fails_the_start(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    httpd.register_httpdcb("test", "x", echo, init_proc_cb=lambda: 1 / 0)
    server = httpd.Server(**LOCAL)
    port = server.port
    with pytest.raises(RuntimeError, match="init_proc_cb"):
        server.start()
    assert_free(port)


def test_a_late_init_proc_cb_that_leaves(server, caplog):
    exchange(server, get())
    httpd.register_httpdcb("test", "late", echo, None, raising(SystemExit()))
    assert answers(exchange(server, get(b"/late"))[0])[0].status == 200 and "an init_proc_cb failed" in caplog.text


def test_services_run_once_and_end_with_their_server():
    """In the order of registration, and back; the next server takes over."""
    told = []

    def service(name):
        def start(server):
            told.append((name, server, threading.current_thread().name))
            return lambda: told.append((name, None, threading.current_thread().name))
        return start

    httpd.register_service("test", service("a"))
    httpd.register_service("test", service("b"))
    httpd.register_service("test", lambda server: None)
    first, second = httpd.Server(**LOCAL), httpd.Server(**LOCAL)
    with first:
        second.run_once(0)
        assert told == [("a", first, "httpd"), ("b", first, "httpd")]
        del told[:]
    assert told == [("b", None, "httpd"), ("a", None, "httpd")]
    second.run_once(0)
    assert told[2:] == [("a", second, "MainThread"), ("b", second, "MainThread")]
    second.stop(0)
    assert len(told) == 6


@table("start, message", [
    (raising(httpd.ConfigError("test: set x")), "^test: set x$", "what the operator has to do"),
    (lambda server: 1 / 0, "test: a service failed: ZeroDivisionError: .*test_httpd.py", "another exception"),
])
def test_a_failing_service_fails_the_start(start, message):
    ends = []
    httpd.register_service("test", lambda server: lambda: ends.append(1))
    httpd.register_service("test", start)
    server = httpd.Server(**LOCAL)
    with pytest.raises(httpd.ConfigError, match=message):
        server.run()
    assert ends == [1] and len(httpd.pending_services) == 2
    with pytest.raises(httpd.ConfigError, match="no function"):
        httpd.register_service("test", None)


def test_a_process_that_a_service_has_forked_ends(tmp_path):
    """It leaves the loop alone, and the service, which goes on in its parent."""
    forked = []

    def start(server):
        server.call_later(0, lambda: forked.append(os.fork()) or forked == [0] and sys.exit(7))
        return lambda: (tmp_path / "ended").write_text("%d" % os.getpid())

    httpd.register_service("test", start)
    server = httpd.Server(**LOCAL)
    me = os.getpid()
    try:
        for _ in range(3):
            server.run_once(0.05)
        server.stop(0)
    finally:
        if os.getpid() != me:
            os._exit(7 if isinstance(sys.exc_info()[1], SystemExit) else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(*forked, 0)[1]) == 7
    assert (tmp_path / "ended").read_text() == str(me)


def assert_free(port, host="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


METHOD_ROWS = [
    (b"GET", [200], "GET"),
    (b"HEAD", [200], "HEAD comes with GET"),
    (b"PUT", [200], "a listed one"),
    (b"DELETE", [405], "a known one, not listed"),
    (b"TRACE", [405], "TRACE is refused"),
    (b"OPTIONS", [204], "OPTIONS is the server's"),
    (b"POSTX", [501], "OPENSIPS, never 9: no prefix"),
    (b"get", [501], "case counts"),
    (b"BREW", [501], "unknown"),
    (b"PROPFIND", [501], "unknown to us"),
]


@table("method, statuses", METHOD_ROWS)
def test_methods(server, method, statuses):
    raw, end = exchange(server, get().replace(b"GET", method), methods=method.decode())
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
    head, = answers(exchange(server, get(b"/pot").replace(b"GET", b"HEAD"), methods="HEAD")[0], "HEAD")
    assert head.status == 405 and head.headers["Allow"] == "BREW, OPTIONS"


def test_options_of_the_server_as_a_whole(server):
    answer, = answers(exchange(server, get(b"*").replace(b"GET", b"OPTIONS"))[0])
    assert answer.status == 204 and "GET" in answer.headers["Allow"]


# ------------------------------------------------------------------------------------------------------------- Request

def ask(server, handler, raw=get(b"/h"), **options):
    """The answer of a handler to one request."""
    httpd.register_httpdcb("test", "h", handler, **options)
    try:
        method = raw.split(b" ")[0].decode()
        return answers(exchange(server, raw, methods=method)[0], method)[0]
    finally:
        httpd.unregister_httpdcb("h")


def test_what_a_request_says(server):
    seen = []
    raw = get(
        b"/h/a%20b?x=1&y=%C3%A4", b"X-A: 1", b"x-a:\t2 ", b"Cookie: a=1", b"Cookie: b=2", b"X-Latin: \xe4", b"X_Y: z"
    )
    ask(server, lambda request, page: seen.append(request) or 200, raw)
    request, = seen
    wait_for(lambda: request.closed, server)
    assert (request.method, request.version, request.scheme, request.root) == ("GET", "HTTP/1.1", "http", "h")
    assert (request.target, request.path, request.url, request.query) == (
        "/h/a%20b?x=1&y=%C3%A4",
        "/h/a b",
        "/a b",
        "x=1&y=%C3%A4",
    )
    assert dict(request.headers) == {
        "host": "example",
        "x-a": "1, 2",
        "cookie": "a=1; b=2",
        "x-latin": "\xe4",
        "x_y": "z",
    }
    assert request.client[0] == "127.0.0.1"
    assert request.body == b""
    assert request.state is None
    assert request.closed
    assert request.headers["X-A"] == request.headers.get("x-A") == "1, 2"
    assert "COOKIE" in request.headers and "Cookies" not in request.headers
    assert request.headers.get("None") is None and request.headers.get("None", "") == ""
    with pytest.raises(KeyError):
        request.headers["None"]
    with pytest.raises(TypeError):
        request.headers["x"] = "a head is shared by the requests that have it"
    with pytest.raises(AttributeError):
        request.method = "POST"


def test_server_and_client_address(server):
    def where(request, page):
        json.dump([request.client, request.server, request.closed], page)
        return 200

    assert ask(server, where).json()[1:] == [["127.0.0.1", server.port], False]


@table("kind, content, expected", [
    (b"application/json", b'{"a": [1, "\xc3\xa4"]}', {"a": [1, "ä"]}, "JSON"),
    (b"Application/JSON; charset=utf-8", b"1", 1, "any case, parameters"),
    (b"application/problem+json", b"null", None, "a type that says so at its end"),
    (b"application/json", b'{"a":1,}', b"400 the content is no JSON: ", "a comma too many"),
    (b"application/json", b'{"a":\n x}', b"line 2 column 2", "the place of the mistake"),
    (b"application/json", b"", b"400 ", "nothing"),
    (b"application/json", b"NaN", b"400 ", "NaN is no JSON"),
    (b"application/json", b"\xff", b"400 ", "no UTF-8"),
    (b"application/json", b"[" * 1000, b"400 ", "too deep"),
    (b"application/jsonfoo", b"1", b"415 ", "another type"),
    (b"text/plain", b"1", b"415 ", "text"),
    (b"", b"1", b"415 ", "no type"),
])
def test_json_of_a_request(server, kind, content, expected):
    def handler(request, page):
        json.dump([request.json()], page)

    answer = ask(server, handler, post(content, b"Content-Type: " + kind, path=b"/h"))
    if isinstance(expected, bytes):
        assert answer.status in (400, 415) and expected in answer.body
    else:
        assert answer.json() == [expected]


def test_a_form_does_not_print_its_files(server):
    file = httpd.FormFile("a.bin", "application/octet-stream", b"x" * 100000)
    assert repr([file]) == (
        "[FormFile(filename='a.bin', content_type='application/octet-stream', content=<100000 bytes>)]")


@table("raw, parameter", [
    (post(b"x" * 1025, b"Content-Type: application/x-www-form-urlencoded"), "post_buf_size", "a form"),
    (post(b"x" * 2049, b"Content-Type: application/json"), "receive_buf_size", "JSON"),
    (chunked(b"801\r\n"), "receive_buf_size", "in a chunk"),
    (post(b"x" * 4097, path=b"/limited"), 'upload_limit of root path "limited"', "a limit of the root's own"),
    (post(b"x" * 8193, path=b"/named"), "wsgi_body_size", "a limit that is a parameter"),
])
def test_a_413_names_the_parameter_and_the_log_too(raw, parameter, caplog):
    server = httpd.Server(**LOCAL, receive_buf_size=2048, wsgi_body_size=8192)
    httpd.register_httpdcb("test", "echo", echo, methods=("POST",))
    for root, limit in (("limited", 4096), ("named", "wsgi_body_size")):
        httpd.register_httpdcb("test", root, echo, methods=("POST",), upload_data_cb=print, upload_limit=limit)
    server.responses.begin_second()
    for _ in range(3):
        data, end = exchange(server, raw)
        assert data.startswith(b"HTTP/1.1 413 ") and parameter.encode() in data and end == "closed"
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 1 <= len(told) <= 3 and all(line.startswith("127.0.0.1: 413: ") for line in told)  # one a second
    assert all(line.endswith("see " + parameter) for line in told)
    server.responses.begin_second()
    exchange(server, raw)
    assert len(caplog.records) > len(told)
    server.stop(0)


FORM = b"application/x-www-form-urlencoded"
MULTIPART = (
    b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    b'--XX\r\ncontent-disposition: form-data; name="arg"\r\n\r\n\r\n'
    b'--XX\r\nContent-Disposition: form-data; name="f"; filename="a;\\"b.bin"\r\n'
    b'Content-Type: application/octet-stream\r\n\r\n\x00\r\n--X\xff\r\n--XX--\r\n'
)


LOOKUP_ROWS = [
    (get(b"/h?a=1"), "a", "1", "a query"),
    (get(b"/h?arg=1"), "a", None, "OPENSIPS, never 10: arg does not answer for a"),
    (get(b"/h?a=1"), "arg", None, "nor a for arg"),
    (get(b"/h?a=1&a=2"), "a", "1", "the first one"),
    (get(b"/h?a="), "a", "", "an empty one"),
    (get(b"/h?a"), "a", "", "one without ="),
    (get(b"/h?a=%26%3D+b"), "a", "&= b", "decoded"),
    (get(b"/h?%61=1"), "a", "1", "a decoded name"),
    (post(b"a=1&b=%C3%A4", b"Content-Type: " + FORM, path=b"/h"), "b", "\xe4", "an urlencoded body"),
    (post(b"a=2", b"Content-Type: " + FORM, path=b"/h?a=1"), "a", "1", "the query before the body"),
    (post(b"a=1", b"Content-Type: " + FORM.title() + b" ; charset=utf-8", path=b"/h"), "a", "1",
     "the type in any case, with parameters"),
    (post(b"a=1", b"Content-Type: text/plain", path=b"/h"), "a", None, "a body that is no form"),
    (post(b"a=" + b"x" * 1000, b"Content-Type: " + FORM, path=b"/h"), "a", "x" * 1000,
     "a large value (OPENSIPS, never 7)"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", "1", "multipart"),
    (post(MULTIPART, b'Content-Type: multipart/form-data; boundary="XX"', path=b"/h"), "arg", "",
     "multipart, empty, quoted boundary"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "f",
     ["a;\"b.bin", "application/octet-stream", "\x00\r\n--X\xff"], "a file"),
    (post(MULTIPART[:-4], b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", 400,
     "multipart without its end"),
    (post(MULTIPART, b"Content-Type: multipart/form-data", path=b"/h"), "a", 400, "no boundary"),
    (post(MULTIPART.replace(b'name="a"', b"x"), b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a",
     400, "a part without a name"),
    (post(b"", b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"), "a", 400, "empty multipart"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; " + b"boundary*=undefined''XX", path=b"/h"), "a", 400,
     "boundary, an unknown charset"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; " + b"boundary*=a%00b''XX", path=b"/h"), "a", 400,
     "boundary, a charset with NUL"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; " + b"boundary*=a; boundary*0=b", path=b"/h"), "a", 400,
     "boundary, continuations"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; " + b'boundary="XX', path=b"/h"), "a", 400,
     "boundary, open quotes"),
    (post(MULTIPART, b"Content-Type: multipart/form-data; " + b"boundary=XX; x", path=b"/h"), "a", 400,
     "boundary, a parameter without ="),
    (post(MULTIPART, b"Content-Type: multipart/form-data; " + b'boundary=XX;a="' + b";" * 2000, path=b"/h"), "a", 400,
     "boundary, 2,000 semicolons"),
    (post(MULTIPART.replace(b'filename="a', b'filename*=undefined\'\'x; y="a'),
          b"Content-Type: multipart/form-data; boundary=XX", path=b"/h"),
     "f", "\x00\r\n--X\ufffd", "RFC 7578, 4.2: no filename*"),
]


@table("raw, key, expected", LOOKUP_ROWS)
def test_lookup_arg(server, raw, key, expected):
    def lookup(request, page):
        found = request.lookup_arg(key)
        json.dump(
            found if not isinstance(found, httpd.FormFile) else [*found[:2], found.content.decode("latin-1")], page
        )
        return 200

    answer = ask(server, lookup, raw)
    assert answer.json() == expected if expected != 400 else answer.status == 400


def test_form_has_all_fields(server):
    def fields(request, page):
        json.dump(request.form, page)
        return 200

    raw = post(b"b=2&a=3&a=", b"Content-Type: " + FORM, path=b"/h?a=1")
    assert ask(server, fields, raw).json() == {"a": ["1", "3", ""], "b": ["2"]}


# ---------------------------------------------------------------------------------------------------------------- Page

def test_page_is_a_file(server):
    def handler(request, page):
        page.write("ä")
        page.write(bytearray(b"x"))
        assert page.write(memoryview(b"yz")) is None
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
    assert answer.headers.get_all("X-B") == ["3"]
    assert answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
    assert "X-A" not in answer.headers
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == "8"


@pytest.mark.parametrize(
    "name, value",
    [
        ("X", "a\r\nY: b"),
        ("X", "a\nb"),
        ("X", "a\0"),
        ("X\r\n", "a"),
        ("X Y", "a"),
        ("", "a"),
        ("X", "\u20ac"),
        ("Content-Length", "x"),
        ("Content-Length", "-3"),
        ("transfer-encoding", "chunked"),
        ("Connection", "close"),
        ("Date", "now"),
    ],
)
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
    (lambda request, page: (page.write("x"), 404)[1], 404, b"x", None, "a status of its own"),
    (lambda request, page: (page.write("x"), 299)[1], 299, b"x", None, "a status without a phrase"),
    (lambda request, page: (page.write("x"), 204)[1], 204, b"", None, "204 has no content"),
    (lambda request, page: (page.write("x"), 304)[1], 304, b"", None, "304 has no content"),
    (lambda request, page: page.write("x"), 200, b"x", None, "None is 200"),
    (lambda request, page: None, 200, b"", None, "None is 200, without content too"),
    (lambda request, page: page.write("x") and 404, 200, b"x", None, "write() returns None"),
    (lambda request, page: 200.0, 500, b"500 the handler failed", "returned 200.0, not a status", "no whole number"),
    (lambda request, page: True, 500, b"500 the handler failed", "returned True, not a status", "a truth value"),
    (lambda request, page: 5, 500, b"500 the handler failed", "return 200?", "what is likely meant"),
    (lambda request, page: sleepy(), 500, b"500 the handler failed", "Handlers are not async", "a coroutine"),
    (lambda request, page: 100, 500, b"500 the handler failed", "returned 100, not a status",
     "a status that is no answer"),
    (lambda request, page: "200", 500, b"500 the handler failed", "returned '200', not a status", "a status in text"),
    (lambda request, page: page.write("half") / 0, 500, b"500 the handler failed", "ZeroDivisionError",
     "an exception: nothing half-sent"),
    (lambda request, page: page.write(b"x" * 2 ** 21), 500, b"500 the handler failed", "raise buf_size",
     "OPENSIPS, never 4: a response that outgrows"),
]


@table("handler, status, body, logged", HANDLER_ROWS)
def test_what_handlers_return(server, caplog, handler, status, body, logged):
    answer = ask(server, handler)
    assert answer.status == status
    assert answer.body.startswith(body)
    assert b"half" not in answer.body
    assert logged is None or logged in caplog.text
    if status in (204, 304):
        assert "Content-Length" not in answer.headers
        assert "Transfer-Encoding" not in answer.headers
    assert answers(exchange(server, get())[0])[0].status == 200  # and it goes on


def test_http_error_from_a_handler(server):
    def handler(request, page):
        page.write("half")
        raise httpd.HTTPError(429, "slow down", {"Retry-After": "7"})

    answer = ask(server, handler)
    assert (answer.status, answer.body, answer.headers["Retry-After"]) == (429, b"429 slow down\n", "7")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("status, end", [(400, "closed"), (503, "closed"), (404, "open"), (500, "open")])
def test_which_errors_of_a_handler_end_the_connection(server, status, end):
    httpd.register_httpdcb("test", "h", raising(httpd.HTTPError(status, "no")))
    data, found = exchange(server, get(b"/h"))
    assert answers(data)[0].status == status and found == end


def test_a_page_of_exactly_buf_size(server):
    size = server.params.buf_size
    assert len(ask(server, lambda request, page: page.write(b"x" * size) and 200).body) == size
    assert ask(server, lambda request, page: page.write(b"x" * size) or page.write(b"y")).status == 500


def test_content_length_0_is_kept_by_a_page_without_content(server):
    """500, "has set Content-Length 0 and written nothing"."""

    def handler(request, page):
        page.set_header("Content-Length", 0)
        return 200

    answer = ask(server, handler)
    assert (answer.status, answer.headers["Content-Length"]) == (200, "0")


def test_head_may_say_a_length_without_writing(server):
    def handler(request, page):
        page.set_header("Content-Length", "1234")
        return 200

    assert ask(server, handler, get(b"/h").replace(b"GET", b"HEAD")).headers["Content-Length"] == "1234"
    assert ask(server, handler).status == 500  # GET has to keep the promise


@pytest.mark.parametrize(
    "raw, status",
    [
        (b"A" * 300 + b" / HTTP/1.1\r\nHost:a\r\n\r\n", 501),
        (get(b"/h"), 403),
        (get(b"/h?field"), 500),
        (get(b"/h?304"), 500),
    ],
)
def test_no_error_text_is_too_large_for_the_smallest_page(raw, status):
    def handler(request, page):
        if request.query == "304":
            raise httpd.HTTPError(304)
        raise httpd.HTTPError(403, "\u20ac" * 300, {"Location": "a\r\nb"} if request.query == "field" else None)

    httpd.register_httpdcb("test", "h", handler)
    server = httpd.Server(**LOCAL, buf_size=256)
    data, end = exchange(server, raw)
    assert answers(data)[0].status == status
    server.stop(0)


@pytest.mark.parametrize(
    "error, status, line",
    [
        (httpd.HTTPError(400, "no such key: \ud800"), 400, "400 no such key: \ufffd"),
        (httpd.HTTPError(404, "line\r\nends"), 404, "404 line\r\nends"),
        (httpd.HTTPError(200, "fine"), 500, None),
        (httpd.HTTPError(99), 500, None),
        (httpd.HTTPError(-32000, "MI"), 500, None),
    ],
)
def test_what_an_http_error_may_say(server, error, status, line):
    """The place that answers must not fail: json.loads() makes lone surrogates of what a client sends."""
    httpd.register_httpdcb("test", "handler", raising(error))
    httpd.register_httpdcb("test", "upload", lambda request, page: 200, upload_data_cb=raising(error))
    for raw in (get(b"/handler"), post(b"abc", path=b"/upload")):
        answer, = answers(exchange(server, raw)[0])
        assert answer.status == status
        assert line is None or answer.body.decode() == line + "\n"


def test_an_http_error_that_was_changed_after_it_was_made(server):
    error = httpd.HTTPError(400, "x")
    error.headers = {"X": "a\r\nY: b"}
    httpd.register_httpdcb("test", "upload", lambda request, page: 200, upload_data_cb=raising(error))
    assert answers(exchange(server, post(b"abc", path=b"/upload"))[0])[0].status == 500


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {"Date": "now"}, {"Content-Length": "x"}])
def test_fields_of_an_http_error_that_the_server_sets_itself(server, caplog, headers):
    """write_error() raises: from upload_data_cb the server ends, from a handler the client gets no answer."""

    def fail(*_):
        raise httpd.HTTPError(503, "later", headers)

    httpd.register_httpdcb("test", "h", fail)
    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=fail)
    assert answers(exchange(server, get(b"/h"))[0])[0].status == 500
    assert answers(exchange(server, post(b"abc", path=b"/u"))[0])[0].status == 500


# -------------------------------------------------------------------------------------------------------------- Parser

def rows(table):
    """Each row of a table, in the three cuts."""
    return [
        pytest.param(raw, expected, cut, id="%s, %s" % (why, cut)) for raw, expected, why in table for cut in CUTS
    ]


V = b" HTTP/1.1\r\n" + HOST + b"\r\n"
REQUEST_LINE_ROWS = [
    (b"GET /echo" + V, 200, "a plain one"),
    (b"\r\n\r\n\r\n\r\nGET /echo" + V, 200, "a few empty lines before it (RFC 9112, 2.2)"),
    (b"\r\n" * 5 + b"GET /echo" + V, 400, "more than a few"),
    (b"\nGET /echo" + V, 400, "an empty line of LF alone"),
    (b"GET /echo HTTP/1.1\n" + HOST + b"\r\n", 400, "LF alone ends it"),
    (b"GET /echo HTTP/1.1\rHost: a\r\n\r\n", 400, "a bare CR"),
    (b"GET /echo HTTP/1.1\r\r\n" + HOST + b"\r\n", 400, "CR CR LF"),
    (b"GET  /echo" + V, 400, "two blanks"),
    (b"GET\t/echo" + V, 400, "a tab"),
    (b" GET /echo" + V, 400, "a blank before it"),
    (b"GET /echo  HTTP/1.1\r\n" + HOST + b"\r\n", 400, "two blanks before the version"),
    (b"GET /echo HTTP/1.1 \r\n" + HOST + b"\r\n", 400, "a blank behind"),
    (b"GET /echo x" + V, 400, "four words"),
    (b"GET" + V, 400, "two words"),
    (b"GET /echo\x00" + V, 400, "NUL"),
    (b"GET /echo\x7f" + V, 400, "DEL"),
    (b"GET /echo\x0b" + V, 400, "a control character"),
    (b"GET /ech\xc3\xb6" + V, 400, "no ASCII"),
    (b"GET /echo#x" + V, 400, "a fragment"),
    (b"GET /echo?a#x" + V, 400, "a fragment behind the query"),
    (b"GET /echo%" + V, 400, "a broken escape"),
    (b"GET /echo%4" + V, 400, "half an escape"),
    (b"GET /echo%zz" + V, 400, "no hexadecimal escape"),
    (b"GET /echo?%4" + V, 200, "half an escape in the query, as browsers send it"),
    (b"GET /echo?q=100%" + V, 200, "a % in the query"),
    (b"GET /echo?q=%u20AC" + V, 200, "an escape of JavaScript in the query"),
    (b"GET /echo/%01" + V, 400, "an escaped control character in the path"),
    (b"GET /echo/%1f" + V, 400, "the last of them"),
    (b"GET /echo/%7F" + V, 400, "an escaped DEL in the path"),
    (b"GET /echo\\x" + V, 400, "a backslash in the path"),
    (b"GET /echo?\\x" + V, 400, "a backslash in the query"),
    (b"GET /echo%00" + V, 400, "an escaped NUL"),
    (b"GET /echo?%00" + V, 400, "and in the query"),
    (b"G@T /echo" + V, 400, "a method that is no token"),
    (b"GET echo" + V, 400, "no slash"),
    (b"GET ?x" + V, 400, "a query alone"),
    (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400, "* with GET"),
    (b"OPTIONS *" + V, 204, "* with OPTIONS"),
    (b"OPTIONS *x" + V, 400, "*x"),
    (b"OPTIONS http://example" + V, 204, "* in absolute-form"),
    (b"GET example:80" + V, 400, "authority-form with GET"),
    (b"CONNECT example:80" + V, 501, "CONNECT is refused"),
    (b"CONNECT /echo" + V, 400, "CONNECT with a path"),
    (b"CONNECT example" + V, 400, "CONNECT without a port"),
    (b"CONNECT [::1]:80" + V, 501, "CONNECT, IPv6"),
    (b"GET http://other/echo" + V, 200, "absolute-form"),
    (b"GET HTTP://other:80/echo" + V, 200, "absolute-form, a port, capitals"),
    (b"GET http://user@other/echo" + V, 400, "userinfo"),
    (b"GET http:///echo" + V, 400, "an empty host"),
    (b"GET http://a b/echo" + V, 400, "a blank"),
    (b"GET http://:80/echo" + V, 400, "a port alone"),
    (b"GET http://a:99999/echo" + V, 400, "a port out of range"),
    (b"GET https://other/echo" + V, 421, "another scheme"),
    (b"GET ftp://other/echo" + V, 421, "any other scheme"),
    (b"GET foo:/echo" + V, 400, "no //"),
    (b"GET //echo" + V, 404, "two slashes are a path"),
    (b"GET /nowhere" + V, 404, "an unknown root"),
    (b"GET http://other HTTP/1.1\r\n" + HOST + b"\r\n", 404, "absolute-form without a path is /"),
    (b"GET /echo HTTP/1.0\r\n\r\n", 200, "HTTP/1.0"),
    (b"GET /echo HTTP/1.2\r\n" + HOST + b"\r\n", 200, "HTTP/1.2"),
    (b"GET /echo HTTP/1.9\r\n" + HOST + b"\r\n", 200, "HTTP/1.9"),
    (b"GET /echo HTTP/1.10\r\n" + HOST + b"\r\n", 400, "HTTP/1.10 is none"),
    (b"GET /echo HTTP/2.0\r\n" + HOST + b"\r\n", 505, "HTTP/2.0"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "the HTTP/2 preface (RFC 9113, 3.4)"),
    (b"GET /echo HTTP/0.9\r\n\r\n", 505, "HTTP/0.9 by name"),
    (b"GET /echo HTTP/3.1\r\n" + HOST + b"\r\n", 505, "HTTP/3.1"),
    (b"GET /echo\r\n\r\n", 400, "no version"),
    (b"GET /echo http/1.1\r\n" + HOST + b"\r\n", 400, "small letters"),
    (b"GET /echo HTTP/11\r\n\r\n", 400, "no dot"),
    (b"GET /echo HTTP/1.1x\r\n\r\n", 400, "rubbish behind"),
    (b"GET /echo HTTPS/1.1\r\n\r\n", 400, "HTTPS"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "a TLS hello"),
    (b"\x00\x01\x02", 400, "binary"),
    (b"\xff\xfe", 400, "more binary"),
    (b"SSH-2.0-OpenSSH_9\r\n", 400, "SSH"),
    (b"GET /" + b"x" * 5000, 414, "a line without end"),
    (b"G" * 5000, 414, "a method without end"),
    (b"GET /" + b"x" * 5000 + V, 414, "too long a line"),
    (b"GET /echo?" + b"x" * 4000 + V, 200, "a line just short enough"),
]


B = b"GET /echo HTTP/1.1\r\n"
FIELD_ROWS = [
    (B + b"Host : a\r\n\r\n", 400, "a blank before the colon (RFC 9112, 5.1)"),
    (B + b" Host: a\r\n\r\n", 400, "a blank first line (RFC 9112, 2.2)"),
    (B + HOST + b"X: a\r\n b\r\n\r\n", 400, "obs-fold"),
    (B + HOST + b"X: a\r\n\tb\r\n\r\n", 400, "obs-fold with a tab"),
    (B + HOST + b"X(: a\r\n\r\n", 400, "a name that is no token"),
    (B + HOST + b": a\r\n\r\n", 400, "OPENSIPS, never 8: an empty name"),
    (B + HOST + b"X\r\n\r\n", 400, "no colon"),
    (B + HOST + b"X\xe4: a\r\n\r\n", 400, "a name that is no ASCII"),
    (B + HOST + b"X: a\x00\r\n\r\n", 400, "NUL"),
    (B + HOST + b"X: a\rb\r\n\r\n", 400, "a bare CR"),
    (B + HOST + b"X: a\nY: b\r\n\r\n", 400, "a bare LF"),
    (B + HOST + b"X: \x0b\r\n\r\n", 400, "control"),
    (B + HOST + b"X: \x7f\r\n\r\n", 400, "DEL"),
    (B + HOST + b"X:\ta\t b \t\r\n\r\n", 200, "tabs"),
    (B + HOST + b"X: \xe4\xff\r\n\r\n", 200, "latin-1"),
    (B + HOST + b"X:\r\n\r\n", 200, "an empty value"),
    (B + HOST + b"X: a\n\r\n\r\n", 400, "LF before CRLF"),
    (B + HOST + b"\n", 400, "LF ends the head"),
    (B + HOST + b"X: a\r\n\n", 400, "CRLF LF ends the head"),
    (B + b"\r\n", 400, "no Host in HTTP/1.1"),
    (B + HOST + HOST + b"\r\n", 400, "two Hosts"),
    (b"GET /echo HTTP/1.0\r\n" + HOST * 2 + b"\r\n", 400, "two, 1.0"),
    (b"GET /echo HTTP/1.0\r\nHost: a/b\r\n\r\n", 400, "a bad Host in HTTP/1.0"),
    (B + b"Host: a\r\n\r\n", 200, "Host, a name"),
    (B + b"Host: a:80\r\n\r\n", 200, "Host, a port"),
    (B + b"Host: a:\r\n\r\n", 200, "Host, an empty port (RFC 3986, 3.2.3)"),
    (B + b"Host: a.b-c_d\r\n\r\n", 200, "Host, unreserved characters"),
    (B + b"Host: 127.0.0.1\r\n\r\n", 200, "Host, IPv4"),
    (B + b"Host: [::1]\r\n\r\n", 200, "Host, IPv6"),
    (B + b"Host: [::1]:8888\r\n\r\n", 200, "Host, IPv6 and a port"),
    (B + b"Host: a%41\r\n\r\n", 200, "Host, an escape in a name (RFC 3986, 3.2.2)"),
    (B + b"Host: \ta \r\n\r\n", 200, "Host, blanks around it"),
    (B + b"Host: a,b\r\n\r\n", 200, "Host, a comma may stand in a name (RFC 3986, 3.2.2)"),
    (B + b"Host: [::ffff:1.2.3.4]\r\n\r\n", 200, "Host, IPv4 in IPv6"),
    (B + b"Host: \r\n\r\n", 400, "Host, empty"),
    (B + b"Host: :80\r\n\r\n", 400, "Host, a port alone"),
    (B + b"Host: u@a\r\n\r\n", 400, "Host, userinfo"),
    (B + b"Host: a/b\r\n\r\n", 400, "Host, a slash"),
    (B + b"Host: a b\r\n\r\n", 400, "Host, a blank"),
    (B + b"Host: a:99999\r\n\r\n", 400, "Host, a port out of range"),
    (B + b"Host: a:65536\r\n\r\n", 400, "Host, a port just out of range"),
    (B + b"Host: a:8x\r\n\r\n", 400, "Host, no number"),
    (B + b"Host: a:+8\r\n\r\n", 400, "Host, a sign"),
    (B + b"Host: a:-1\r\n\r\n", 400, "Host, a negative port"),
    (B + b"Host: [::g]\r\n\r\n", 400, "Host, no hexadecimal"),
    (B + b"Host: [::1\r\n\r\n", 400, "Host, an open bracket"),
    (B + b"Host: ::1\r\n\r\n", 400, "Host, IPv6 without brackets"),
    (B + b"Host: [1.2.3.4]\r\n\r\n", 400, "Host, IPv4 in brackets"),
    (B + b"Host: a%4\r\n\r\n", 400, "Host, half an escape"),
    (B + b"Host: http://a\r\n\r\n", 400, "Host, a URL"),
    (B + b"Host: a?b\r\n\r\n", 400, "Host, a query"),
    (B + b"Host: a#b\r\n\r\n", 400, "Host, a fragment"),
    (B + b"Host: a\\b\r\n\r\n", 400, "Host, a backslash"),
    (B + b"Host: [::1]x\r\n\r\n", 400, "Host, rubbish behind a bracket"),
    (B + b"Host: [v1.x]\r\n\r\n", 200, "Host, IPvFuture"),
    (B + b"Host: [fe80::1%25eth0]\r\n\r\n", 200, "Host, a zone (RFC 6874)"),
    (B + b"Host: [fe80::1%eth0]:80\r\n\r\n", 200, "Host, a zone as Node sends it"),
    (B + b"Host: [fe80::1%]\r\n\r\n", 400, "Host, a zone without a name"),
    (B + b"Host: a\xe4\r\n\r\n", 400, "Host, no ASCII"),
    (B + b"Host: a:80:80\r\n\r\n", 400, "Host, two ports"),
    (B + b'Host: "a"\r\n\r\n', 400, "Host, quotes"),
    (B + HOST + b"X: y\r\n" * 127 + b"\r\n", 200, "128 fields"),
    (B + HOST + b"X: y\r\n" * 128 + b"\r\n", 431, "129 fields"),
    (B + HOST + b"X: " + b"y" * 5000 + b"\r\n\r\n", 431, "too large a section"),
    (B + HOST + b"X: " + b"y" * 5000, 431, "a value without end"),
    (B + HOST + b"X" * 5000, 431, "a name without end"),
    (B + HOST + b"X: y\r\n" * 1000, 431, "a section without end"),
    (B + HOST + b"X: " + b"y" * 4000 + b"\r\n\r\n", 200, "a section just small enough"),
    (B + HOST + b"X: " + b"y" * 4054 + b"\r\n\r\n", 200, "exactly max_header_size"),
    (b"\r\n\r\n" + B + HOST + b"X: " + b"y" * 4054 + b"\r\n\r\n", 200, "and empty lines before it"),
    (B + HOST + b"X: " + b"y" * 4055 + b"\r\n\r\n", 431, "a byte more"),
    (b"\r\n\r\n" + B + HOST + b"X: " + b"y" * 4055 + b"\r\n\r\n", 431, "a byte more, and empty lines before it"),
]


P = b"POST /echo HTTP/1.1\r\n" + HOST
FRAMING_ROWS = [
    (P + b"Content-Length: +3\r\n\r\nabc", 400, "Content-Length, a sign"),
    (P + b"Content-Length: -3\r\n\r\nabc", 400, "Content-Length, negative"),
    (P + b"Content-Length: 3 3\r\n\r\nabc", 400, "Content-Length, two numbers"),
    (P + b"Content-Length: 0x3\r\n\r\nabc", 400, "Content-Length, hexadecimal"),
    (P + b"Content-Length: 3_0\r\n\r\nabc", 400, "Content-Length, int() would take the underscore"),
    (P + b"Content-Length: 3,3\r\n\r\nabc", 400, "Content-Length, a list"),
    (P + b"Content-Length: 3;\r\n\r\nabc", 400, "Content-Length, a semicolon"),
    (P + b"Content-Length:\r\n\r\nabc", 400, "Content-Length, nothing"),
    (P + b"Content-Length: \r\n\r\nabc", 400, "Content-Length, a blank"),
    (P + b"Content-Length: 3.0\r\n\r\nabc", 400, "Content-Length, no whole number"),
    (P + b"Content-Length: \xb3\r\n\r\nabc", 400, "Content-Length, a digit that is none"),
    (P + b"Content-Length: " + b"0" * 19 + b"\r\n\r\nabc", 400, "Content-Length, 19 zeros"),
    (P + b"Content-Length: 1" + b"0" * 18 + b"\r\n\r\nabc", 400, "Content-Length, 19 digits"),
    (P + b"Content-Length: 3a\r\n\r\nabc", 400, "Content-Length, rubbish behind it"),
    (P + b'Content-Length: "3"\r\n\r\nabc', 400, "Content-Length, quotes"),
    (P + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400, "OPENSIPS, never 8: two of them, though equal"),
    (P + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400, "two of them"),
    (P + b"content-length: 000000000000000003\r\n\r\nabc", 400, "leading zeros: octal to some"),
    (P + b"Content-Length: 00\r\n\r\n", 400, "two zeros"),
    (P + b"Content-Length: 0\r\n\r\n", "", "none"),
    (P + b"\r\n", "", "a POST without a length has no content (RFC 9112, 6.3)"),
    (P + b"Content-Length: 1024\r\n\r\n" + b"x" * 1024, "x" * 1024, "exactly post_buf_size"),
    (P + b"Content-Length: 1025\r\n\r\n", 413, "at once, before reading"),
    (P + b"Content-Length: 999999999999999999\r\n\r\n", 413, "18 nines"),
    (P + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
     "OPENSIPS, never 8: chunked with Content-Length"),
    (P + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "chunked twice"),
    (P + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400, "chunked twice in one line"),
    (P + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400, "chunked not last"),
    (P + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501, "gzip, chunked"),
    (P + b"Transfer-Encoding: gzip\r\n\r\n", 501, "gzip"),
    (P + b"Transfer-Encoding: identity\r\n\r\n", 501, "identity"),
    (P + b"Transfer-Encoding: xchunked\r\n\r\n", 501, "xchunked"),
    (P + b"Transfer-Encoding:\r\n\r\n", 400, "an empty one is not an absence"),
    (P + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n", 400, "a comma"),
    (P + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 400, "quotes"),
    (P + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400, "a control character"),
    (b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "chunked in HTTP/1.0"),
    (P + b"Transfer-Encoding: CHUNKED\t\r\n\r\n0\r\n\r\n", "", "any case"),
    (P + b"Expect: 100-continue\r\nContent-Length: 1025\r\n\r\n", 413, "no 100 before a refusal"),
    (P + b"Expect: x\r\n\r\n", 417, "another expectation"),
    (P + b"Expect:\r\n\r\n", 417, "an empty expectation"),
    (P + b"Expect: 100-continue, x\r\n\r\n", 417, "a list"),
    (b"GET /echo HTTP/1.1\r\n" + HOST + b"Expect: 100-Continue\r\n\r\n", "",
     "GET with Expect and no content must not hang"),
    (b"POST /echo HTTP/1.0\r\nExpect: x\r\n\r\n", "", "ignored in HTTP/1.0"),
    (P + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n", "", "Upgrade is ignored"),
]


CHUNK_ROWS = [
    (b"0\r\n\r\n", "", "empty"),
    (b"3\r\nabc\r\n0\r\n\r\n", "abc", "one chunk"),
    (b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", "abc", "two"),
    (b"A\r\n0123456789\r\n0\r\n\r\n", "0123456789", "hexadecimal"),
    (b"000000000000003\r\nabc\r\n000\r\n\r\n", "abc", "15 digits"),
    (b"0000000000000003\r\nabc\r\n0\r\n\r\n", 400, "16 digits"),
    (b"+3\r\nabc\r\n0\r\n\r\n", 400, "a sign"),
    (b"-3\r\n", 400, "a negative one"),
    (b"0x3\r\nabc\r\n0\r\n\r\n", 400, "0x"),
    (b" 3\r\nabc\r\n0\r\n\r\n", 400, "a blank before it"),
    (b"3 \r\nabc\r\n0\r\n\r\n", 400, "a blank behind it"),
    (b"\r\n", 400, "no size"),
    (b"g\r\n", 400, "no number"),
    (b"3\nabc\r\n0\r\n\r\n", 400, "LF behind the size"),
    (b"3\r\nabc\n0\r\n\r\n", 400, "LF behind the data"),
    (b"3\r\nabcd\r\n0\r\n\r\n", 400, "data longer than its size"),
    (b"3\r\nabc0\r\n\r\n", 400, "no CRLF behind the data"),
    (b"3\r\rabc", 400, "CR CR"),
    (b"3_0\r\n", 400, "an underscore"),
    (b"3\r\nabc\rX", 400, "CR X behind the data"),
    (b"3;a\r\nabc\r\n0\r\n\r\n", "abc", "an extension"),
    (b"3 ; a = b ;c=\"d;\\\"\r\"\r\nabc\r\n0\r\n\r\n", 400, "a CR in quotes"),
    (b"3 ; a = b\t;c=\"d;\\\"e\"\r\nabc\r\n0;x\r\n\r\n", "abc", "blanks around ; and =, quotes"),
    (b"3;\r\nabc\r\n0\r\n\r\n", 400, "an empty extension"),
    (b"3;a=\r\nabc\r\n0\r\n\r\n", 400, "an empty value"),
    (b"3;a b\r\nabc\r\n0\r\n\r\n", 400, "a blank inside"),
    (b"3;a=\"b\r\nabc\r\n0\r\n\r\n", 400, "open quotes"),
    (b"3;@\r\nabc\r\n0\r\n\r\n", 400, "no token"),
    (b"3;a\nb\r\nabc\r\n0\r\n\r\n", 400, "LF in an extension"),
    (b"3;a=\x00\r\n", 400, "NUL"),
    (b"1;a=" + b"b" * 3000 + b"\r\nx\r\n1;a=" + b"b" * 3000 + b"\r\n", 400, "too much in sum"),
    (b"1;" + b"a" * 5000, 400, "one without end"),
    (b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n", "x" * 1024, "exactly receive_buf_size"),
    (b"401\r\n", 413, "more, at once"),
    (b"400\r\n" + b"x" * 1024 + b"\r\n1\r\n", 413, "more in sum"),
    (b"fffffffffffffff\r\n", 413, "the largest size"),
    (b"0\r\nX: a\r\nY: b\r\n\r\n", "", "trailers are dropped"),
    (b"0\r\nX : a\r\n\r\n", 400, "a bad trailer"),
    (b"0\r\nX: a\r\n b\r\n\r\n", 400, "obs-fold"),
    (b"0\r\nContent-Length: 3\r\n\r\n", 400, "the trailer Content-Length (RFC 9110, 6.5.1)"),
    (b"0\r\nTransfer-Encoding: 3\r\n\r\n", 400, "the trailer Transfer-Encoding (RFC 9110, 6.5.1)"),
    (b"0\r\nHOST: 3\r\n\r\n", 400, "the trailer HOST (RFC 9110, 6.5.1)"),
    (b"0\r\nAuthorization: 3\r\n\r\n", 400, "the trailer Authorization (RFC 9110, 6.5.1)"),
    (b"0\r\nTrailer: 3\r\n\r\n", 400, "the trailer Trailer (RFC 9110, 6.5.1)"),
    (b"0\r\nExpect: 3\r\n\r\n", 400, "the trailer Expect (RFC 9110, 6.5.1)"),
    (b"0\r\nContent-Type: 3\r\n\r\n", 400, "the trailer Content-Type (RFC 9110, 6.5.1)"),
    (b"0\r\nConnection: 3\r\n\r\n", 400, "the trailer Connection (RFC 9110, 6.5.1)"),
    (b"0\r\nCookie: 3\r\n\r\n", 400, "the trailer Cookie (RFC 9110, 6.5.1)"),
    *((b"0\r\n%s: 3\r\n\r\n" % name, 400, "the trailer %s (RFC 9110, 6.5.1)" % name.decode())
      for name in (b"Cache-Control", b"Content-Encoding", b"Content-Range", b"Max-Forwards", b"Origin", b"Range", b"TE",
                   b"Upgrade")),
    (b"0\r\n" + b"X: y\r\n" * 129 + b"bad line\r\n\r\n", 400, "grammar before sizes"),
    (b"0\r\nX: " + b"y" * 4089 + b"\r\n\r\n", "", "just short enough"),
    (b"0\r\nX: " + b"y" * 4090 + b"\r\n\r\n", 431, "a byte too long"),
    (b"0\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 431, "too many trailers"),
    (b"0\r\n" + b"X: y\r\n" * 128 + b"\r\n", "", "128 trailers"),
    (b"0\r\n" + b"X: y\r\n" * 129 + b"\r\n", 431, "129 trailers"),
    (b"0\r\nX: " + b"y" * 5000, 431, "a trailer without end"),
    (b"0\r\n\n", 400, "LF at the end"),
    (b"0\r\nX: a\n\r\n", 400, "LF in a trailer"),
]


def thrice(raw, cut):
    """For a cold server and for a warm one; what is long is sent byte by byte where it begins and where it ends."""
    if cut == "bytes" and len(raw) > 1000:
        return [*CUTS[cut](raw[:500]), raw[500:-500], *CUTS[cut](raw[-500:])], [raw], CUTS["random"](raw)
    return CUTS[cut](raw), [raw], CUTS[cut](raw)


def expect(server, raw, expected, cut):
    """A refusal is answered at once, says close, and has a line of text; what is served keeps the connection.
    What has been seen before changes nothing: it is sent three times."""
    method = raw.lstrip(b"\r\n").split(b" ")[0].decode("latin-1")
    for pieces in thrice(raw, cut):
        data, end = exchange(server, *pieces, methods=method)
        answer, = answers(data, method)
        if isinstance(expected, str):
            assert (answer.status, answer.json()["body"]) == (200, expected)
            continue
        assert answer.status == expected
        if expected not in (200, 204):
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert answer.body.startswith(b"%d " % expected)
            assert answer.body.count(b"\n") == 1
        if expected not in (200, 204, 404):
            assert answer.headers["Connection"] == "close"
            assert end == "closed"


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
    assert answer.json()["headers"]["host"] == "Other:81"
    assert answer.json()["query"] == "x"


ORDER_ROWS = [
    (b"BREW / HTTP/2.0\r\nbad\r\n\r\n", 400, "grammar before version"),
    (b"BREW / HTTP/2.0\r\n" + b"X: y\r\n" * 129 + b"\r\n", 505, "version before sizes"),
    (b"BREW / HTTP/2.0\r\nX: " + b"y" * 5000, 505, "version before sizes, cut off"),
    (b"BREW / HTTP/1.1\r\n" + b"X: y\r\n" * 129 + b"\r\n", 431, "sizes before method"),
    (b"BREW / HTTP/1.1\r\n\r\n", 501, "method before Host"),
    (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "Host before framing"),
    (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "framing before root"),
    (b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 421, "host before root"),
    (b"DELETE /x HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 9999\r\n\r\n", 404, "root before method"),
    (b"DELETE /echo HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 9999\r\n\r\n", 405,
     "method before expectation"),
    (b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 9999\r\n\r\n", 417, "expectation before size"),
    (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n401\r\n", 404, "root before size, chunked"),
    (b"GET foo HTTP/1.1\r\nX: " + b"y" * 5000, 400, "grammar before sizes, the target"),
    (b"PRI * HTTP/2.0\r\nX: " + b"y" * 5000, 505, "version before the target"),
    (b"\r\n" * 5 + b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "no request yet"),
]


@pytest.mark.parametrize("raw, expected, cut", rows(ORDER_ROWS))
def test_order_of_checks(server, raw, expected, cut):
    for pieces in thrice(raw, cut):
        assert answers(exchange(server, *pieces)[0])[0].status == expected


REFUSED_AT_ONCE = [
    (b"\x16", "a TLS hello"),
    (b"GET /a\x00", "NUL"),
    (b"GET /a HTTP/2x", "a version"),
    (b"GET / HTTP/1.1\r\nHost: a\x00", "NUL in a value"),
    (b"GET / HTTP/1.1\r\nHost ", "a blank behind a name"),
    (b"GET / HTTP/1.1\r\n ", "a folded first line"),
    (b"GET / HTTP/1.1\n", "LF"),
    (b"GET / HTTP/1.1\r\nHost: a\n", "LF behind a field"),
    (b"G(", "no token"),
    (b"\r\n\rX", "no empty line"),
]


@table("raw", REFUSED_AT_ONCE)
def test_what_can_become_no_request_is_refused_at_once(server, raw):
    for _ in range(3):
        good, bad = exchange(server, raw[:-1], due=0), exchange(server, raw)
        assert good == (b"", "open")
        assert bad[0].startswith(b"HTTP/1.1 400 ")
        assert bad[1] == "closed"


def test_cutting_changes_nothing_and_no_input_gives_500(server):
    """Mutated requests: every cut of them gives the same answers, and never a 500."""
    chance = random.Random(20)
    seeds = [
        get(b"/echo?a=%41", b"X: y"),
        post(b"abc", b"Content-Type: text/plain"),
        chunked(b"3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n"),
        get() + post(b"x") + get(b"/no"),
        get(b"http://a:80/echo", b"Connection: close") + get(),
        b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2,
    ]
    for _ in range(150):
        raw = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(raw))
            raw[at:at + chance.randrange(3)] = chance.choice(
                [
                    b"",
                    b"\r\n",
                    b" ",
                    b"\x00",
                    b":",
                    b"0",
                    b"%",
                    b",",
                    b"chunked",
                    b"\n",
                    bytes([chance.randrange(256)]),
                ]
            )
        raw = bytes(raw) or b"x"
        results = {
            cut: [re.sub(rb"Date: .*", b"", exchange(server, *pieces(raw), half_close=True)[0])]
            for cut, pieces in CUTS.items()
        }
        assert results["whole"] == results["bytes"] == results["random"], raw
        assert b"HTTP/1.1 500" not in results["whole"][0], raw


@pytest.mark.parametrize(
    "value",
    [b"a" + b" " * 60000 + b"b", b"a" + b"\t," * 30000 + b"close", b"," * 60000, b" " * 60000],
    ids=["blanks", "blanks and commas", "commas", "nothing but blanks"],
)
def test_no_connection_field_costs_more_than_its_length(value):
    """RFC 9112, 9.3: a list. 60 kB of blanks in it took 3 s; now they take a millisecond."""
    httpd.register_httpdcb("test", "h", lambda request, page: 204)
    server = httpd.Server(**LOCAL, max_header_size=65536)
    before = time.process_time()
    with server, connect(server) as client:
        client.sendall(get(b"/h", b"Connection: " + value))
        assert read(client, 1)[:12] == b"HTTP/1.1 204"
    assert time.process_time() - before < 1


def test_what_has_been_found_good_of_a_head_is_not_looked_at_again():
    """A byte costs the same wherever it comes: in a name, a value, a target, a trailer."""
    for begin, byte in ((b"GET /", b"a"), (b"GE", b"T"), (B + b"X", b"y"), (B + b"X: ", b"z")):
        beginning, data = httpd.Beginning(httpd.IN_METHOD), begin
        for _ in range(300):
            data += byte
            beginning.check_head(data, 10000)
            assert len(data) - beginning.at <= 2, data[:40]


def test_multipart_of_any_bytes(server):
    chance = random.Random(7)
    content = bytes(chance.randrange(256) for _ in range(500)) + b"\r\n\r\n--\r\n"
    for kind in (b"message/rfc822", b"multipart/mixed; boundary=y", b"text/plain"):
        raw = (
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\nContent-Type: '
            + kind
            + b"\r\n\r\n"
            + content
            + b"\r\n--b--"
        )
        got = []
        ask(
            server,
            lambda request, page: got.append(request.lookup_arg("f")) or 200,
            post(raw, b"Content-Type: multipart/form-data; boundary=b", path=b"/h"),
        )
        assert got[0].content == content


# -------------------------------------------------------------------------------------------------------------- Access

def basic(text):
    return b"Authorization: Basic " + base64.b64encode(text.encode())


@pytest.fixture
def guarded():
    """A server with a password."""
    httpd.register_httpdcb("test", "echo", lambda request, page: page.write(request.user), methods=("GET", "POST"))
    server = httpd.Server(**LOCAL, auth_username="jürgen", auth_password="pa:ss wörd", auth_realm='a "b" \\c')
    yield server
    server.stop(0)


CREDENTIAL_ROWS = [
    (basic("jürgen:pa:ss wörd"), 200, "right, UTF-8, with a colon"),
    (basic("jürgen:pa:ss wörd").replace(b"Basic", b"bAsIC"), 200, "the scheme in any case (RFC 9110, 11.1)"),
    (basic("jürgen:pa:ss wörd").replace(b"Basic ", b"Basic  "), 200, "two blanks"),
    (b"X: y", 401, "none"),
    (b"Authorization:", 401, "an empty field"),
    (b"Authorization: Basic", 401, "no credentials"),
    (b"Authorization: Basic !!!!", 401, "no base64"),
    (b"Authorization: Basic \xff\xff", 401, "no ASCII"),
    (b"Authorization: Bearer " + base64.b64encode("jürgen:pa:ss wörd".encode()), 401, "another scheme"),
    (basic("jürgen:pa:ss word"), 401, "a wrong password"),
    (basic("jürgen:pa"), 401, "the beginning of it"),
    (basic("jürgen:pa:ss wörd "), 401, "more behind it"),
    (basic("jurgen:pa:ss wörd"), 401, "a wrong name"),
    (basic("jürgen"), 401, "no colon"),
    (basic(""), 401, "empty"),
    (basic("jürgen:pa:ss wörd") + b"\r\n" + basic("x:y"), 401, "two of them, joined by a comma"),
    (b"Proxy-" + basic("jürgen:pa:ss wörd"), 401, "another field"),
]


@table("field, status", CREDENTIAL_ROWS)
def test_basic_authentication(guarded, field, status):
    """Whatever has been remembered before: right and wrong ones in turns, with new and with known request lines."""
    right = basic("jürgen:pa:ss wörd")
    for path in (b"/echo", b"/echo", b"/echo?x", b"/echo"):
        for one, expected in ((field, status), (right, 200), (field, status), (b"A: b", 401)):
            answer, = answers(exchange(guarded, get(path, one))[0])
            assert answer.status == expected
            assert answer.headers["WWW-Authenticate"] == (
                'Basic realm="a \\"b\\" \\\\c"' if expected == 401 else None)
            assert expected == 401 or answer.body == "jürgen".encode()


@table("raw, status", [
    (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 401, "before 404 tells what there is"),
    (b"PUT /echo HTTP/1.1\r\nHost: x\r\n\r\n", 401, "before 405"),
    (b"OPTIONS /echo HTTP/1.1\r\nHost: x\r\n\r\n", 401, "OPTIONS too"),
    (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 401, "the server as a whole"),
    (b"GET http://x/echo HTTP/1.1\r\nHost: x\r\n\r\n", 401, "absolute-form"),
    (b"GET /echo HTTP/1.0\r\n\r\n", 401, "HTTP/1.0"),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 401, "before 413"),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n", 401, "no 100 before it"),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: x\r\n\r\n", 401, "before 417"),
    (b"BREW /echo HTTP/1.1\r\nHost: x\r\n\r\n", 501, "behind the grammar and the method"),
    (b"GET /echo HTTP/1.1\r\n\r\n", 400, "behind Host"),
])
def test_credentials_are_asked_for_in_their_turn(guarded, raw, status):
    for _ in range(2):
        assert answers(exchange(guarded, raw)[0])[0].status == status


def test_a_refused_head_keeps_nothing_alive(guarded):
    for _ in range(5):
        exchange(guarded, get(b"/echo"))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        assert exchange(guarded, get(b"/echo"))[0].startswith(b"HTTP/1.1 401 ")
    gc.collect()
    assert len(gc.get_objects()) - before < 50 and guarded.held == 0


def test_a_password_in_a_file(tmp_path, caplog):
    path = tmp_path / "password"
    path.write_text("first\n")
    path.chmod(0o640)
    httpd.register_httpdcb("test", "echo", echo)
    httpd.load_config(config(tmp_path, "[httpd]\nauth_username = u\nauth_password = file:password\n"))
    server = httpd.Server(**LOCAL)
    assert caplog.text == ""
    for _ in range(2):
        assert answers(exchange(server, get(b"/echo", basic("u:first")))[0])[0].status == 200
        assert answers(exchange(server, get(b"/echo", basic("u:second")))[0])[0].status == 401
    path.write_text("")
    assert server.reload() is False and "password is empty" in caplog.text
    assert answers(exchange(server, get(b"/echo", basic("u:first")))[0])[0].status == 200  # what was good still is
    path.write_text("second\r\n")
    path.chmod(0o644)
    assert server.reload() is True and "is open to everybody: chmod o=" in caplog.text
    for _ in range(2):
        assert answers(exchange(server, get(b"/echo", basic("u:first")))[0])[0].status == 401
        assert answers(exchange(server, get(b"/echo", basic("u:second")))[0])[0].status == 200
    server.stop(0)


@table("values, message", [
    (dict(auth_username="x"), "auth_username is set without auth_password: set both", "one half"),
    (dict(auth_password="x"), "auth_password is set without auth_username: set both", "the other half"),
    (dict(auth_username="a:b", auth_password="x"), "a name cannot have a colon", "RFC 7617, 2"),
    (dict(auth_username="a", auth_password="file:/nowhere"), "/nowhere cannot be read: No such file", "no file"),
    (dict(auth_username="a", auth_password="b", auth_realm="x\r\ny"), "auth_realm: ", "a line end in a field"),
    (dict(trusted_proxies="10.0.0.0/40"), "write an address, or a network such as 10.0.0.0/8", "no network"),
    (dict(trusted_proxies="10.0.0.1/8"), "has host bits set", "an address for a network"),
    (dict(trusted_proxies="proxy"), "write an address", "a name"),
])
def test_access_parameters_that_cannot_be(values, message):
    with pytest.raises(httpd.ConfigError, match=re.escape(message)):
        httpd.Server(**{**LOCAL, **values})


HOST_ROWS = [
    ("example.com, 10.0.0.5", b"example.com", 200, "listed"),
    ("example.com, 10.0.0.5", b"EXAMPLE.com:8000", 200, "any case, any port"),
    ("example.com, 10.0.0.5", b"example.com.", 200, "with the dot of the root"),
    ("example.com 10.0.0.5", b"10.0.0.5:80", 200, "an address"),
    ("::1", b"[::1]:80", 200, "IPv6"),
    ("[::1]", b"[::1]", 200, "IPv6 in brackets"),
    ("example.com", b"example.com.evil", 421, "a longer name"),
    ("example.com", b"www.example.com", 421, "a name below it"),
    ("example.com", b"evil", 421, "another name"),
    ("example.com", None, 200, "HTTP/1.0 without the field"),
    ("*", b"evil", 200, "any"),
]


@table("allowed, host, status", HOST_ROWS)
def test_allowed_hosts(allowed, host, status):
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(**{**LOCAL, "allowed_hosts": allowed})
    raw = b"GET /echo HTTP/1.0\r\n\r\n" if host is None else b"GET /echo HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
    for _ in range(3):
        assert answers(exchange(server, raw)[0])[0].status == status
    if host is not None:  # the target's host counts, not the field (RFC 9112, 3.2.2)
        raw = b"GET http://" + host + b"/echo HTTP/1.1\r\nHost: example.com\r\n\r\n"
        assert answers(exchange(server, raw)[0])[0].status == status
    server.stop(0)


@table("allowed, host, status", [
    ("", b"localhost:8888", 200, "localhost"),
    ("", b"LOCALHOST", 200, "any case"),
    ("", b"127.0.0.1", 200, "a loopback address"),
    ("", b"127.9.9.9:1", 200, "another"),
    ("", b"[::1]:8888", 200, "of IPv6"),
    ("", b"evil.example", 421, "DNS rebinding: a page's own name, with our address"),
    ("", b"127.0.0.1.evil.example", 421, "a name that begins like an address"),
    ("", b"localhost.evil.example", 421, "a name that begins like ours"),
    ("evil.example", b"evil.example", 200, "the operator has allowed it"),
    ("*", b"evil.example", 200, "any"),
])
def test_dns_rebinding_does_not_reach_the_management(allowed, host, status):
    httpd.loadmodule("mi_http")
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(**{**LOCAL, "allowed_hosts": allowed})
    call = b'{"jsonrpc":"2.0","method":"version","id":1}'
    raw = (b"POST /mi HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nOrigin: http://%s\r\n"
           b"Content-Length: %d\r\n\r\n%s" % (host, host, len(call), call))
    for _ in range(3):
        assert answers(exchange(server, raw)[0])[0].status == status
    assert answers(exchange(server, b"GET /echo HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")[0])[0].status == 200
    server.stop(0)


@table("field, status", [
    (b"Sec-Fetch-Site: same-origin", 200, "its own page"),
    (b"Sec-Fetch-Site: none", 200, "the user"),
    (b"Sec-Fetch-Site: same-site", 403, "a neighbour"),
    (b"Sec-Fetch-Site: cross-site", 403, "another site, even without Origin"),
])
def test_what_browsers_say_of_the_page_that_asks(mi, field, status):
    assert mi(b'{"jsonrpc":"2.0","method":"version","id":1}', b"application/json", field).status == status


PROXY_ROWS = [
    ([b"X-Forwarded-For: 1.2.3.4"], "1.2.3.4", "http", "example", "the client"),
    ([b"X-Forwarded-For: 6.6.6.6, 1.2.3.4"], "1.2.3.4", "http", "example", "what stands left is the client's text"),
    ([b"X-Forwarded-For: 6.6.6.6, 1.2.3.4, 10.1.1.1"], "1.2.3.4", "http", "example", "another proxy on the way"),
    ([b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-For: 1.2.3.4"], "1.2.3.4", "http", "example", "two fields"),
    ([b"X-Forwarded-For: 10.1.1.1"], "10.1.1.1", "http", "example", "only proxies"),
    ([b"X-Forwarded-For: 1.2.3.4:567"], "1.2.3.4", "http", "example", "with a port"),
    ([b"X-Forwarded-For: [2001:db8::1]:567"], "2001:db8::1", "http", "example", "IPv6 with a port"),
    ([b"X-Forwarded-For: 2001:db8::1"], "2001:db8::1", "http", "example", "IPv6"),
    ([b"X-Forwarded-For: 1.2.3.4, ::ffff:10.1.1.1"], "1.2.3.4", "http", "example", "IPv4 as IPv6 writes it"),
    ([b"X-Forwarded-For: unknown"], "127.0.0.1", "http", "example", "no address: the proxy itself"),
    ([b"X-Forwarded-For: 1.2.3.4, evil\""], "127.0.0.1", "http", "example", "rubbish from the right"),
    ([b"X-Forwarded-For: 1.2.3"], "127.0.0.1", "http", "example", "no whole address"),
    ([b"X-Forwarded-For:"], "127.0.0.1", "http", "example", "empty"),
    ([b"X-Forwarded-Proto: https"], "127.0.0.1", "https", "example", "TLS has ended before us"),
    ([b"X-Forwarded-Proto: javascript"], "127.0.0.1", "http", "example", "another scheme"),
    ([b"X-Forwarded-Host: public.example"], "127.0.0.1", "http", "public.example", "the host"),
]


@table("fields, client, scheme, host", PROXY_ROWS)
def test_trusted_proxies(fields, client, scheme, host):
    httpd.register_httpdcb("test", "h", lambda request, page: json.dump(
        [request.client[0], request.scheme, request.host], page))
    for proxies, expected in (
            ("127.0.0.0/8, 10.0.0.0/8", [client, scheme, host]), ("10.0.0.0/8", ["127.0.0.1", "http", "example"]),
            ("", ["127.0.0.1", "http", "example"])):
        server = httpd.Server(**LOCAL, trusted_proxies=proxies)
        for _ in range(2):
            assert answers(exchange(server, get(b"/h", *fields))[0])[0].json() == expected
        server.stop(0)


def test_the_origin_behind_a_trusted_proxy():
    httpd.loadmodule("mi_http")
    call = b'{"jsonrpc":"2.0","method":"version","id":1}'
    fields = (b"Content-Type: application/json", b"X-Forwarded-Host: public.example", b"Origin: https://public.example")
    for proxies, status in (("127.0.0.1", 200), ("", 403)):
        server = httpd.Server(**LOCAL, trusted_proxies=proxies)
        for proto in (b"X-Forwarded-Proto: https", b"X-Forwarded-Proto: http"):
            raw = post(call, *fields, proto, path=b"/mi")
            assert answers(exchange(server, raw)[0])[0].status == status
        server.stop(0)


def test_connections_of_one_address_are_limited():
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(**LOCAL, max_connections_per_ip=3)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            held = [stack.enter_context(connect(server)) for _ in range(3)]
            for client in held:
                client.sendall(get())
                assert pump(server, client)[0].startswith(b"HTTP/1.1 200 ")
            data, end = exchange(server, get())
            assert data.startswith(b"HTTP/1.1 503 ") and b"max_connections_per_ip" in data and end == "closed"
            for client in held:
                client.close()
            wait_for(lambda: not server.connections, server)
    assert server.access.connections == {}
    server.stop(0)
    server = httpd.Server(**LOCAL, max_connections_per_ip=1, trusted_proxies="127.0.0.1")
    with connect(server) as client:
        client.sendall(get())
        pump(server, client)
        assert exchange(server, get())[0].startswith(b"HTTP/1.1 200 ")  # a proxy speaks for many
    server.stop(0)


def test_a_network_of_ipv6_counts_as_one():
    access = httpd.Access(httpd.Limits(max_connections_per_ip=1))
    assert access.enter("2001:db8:1:2::1") and not access.enter("2001:db8:1:2:ffff::2%eth0")
    assert access.enter("2001:db8:1:3::1") and access.enter("1.2.3.4") and not access.enter("1.2.3.4")


def test_the_end_of_a_proxy_gives_its_neighbours_no_place():
    access = httpd.Access(httpd.Limits(max_connections_per_ip=1, trusted_proxies="2001:db8::1"))
    assert access.enter("2001:db8::2") and access.enter("2001:db8::1")
    access.leave("2001:db8::1")
    assert not access.enter("2001:db8::3")


@table("values, warned", [
    (dict(ip="0.0.0.0"), True, "open to everybody"),
    (dict(ip="127.0.0.1"), False, "loopback"),
    (dict(ip="unix:@httpd-test-%d" % os.getpid()), True, "anybody on the machine"),
    (dict(ip="0.0.0.0", auth_username="a", auth_password="b"), False, "a password"),
])
def test_an_open_management_interface_is_warned_of(values, warned, caplog):
    httpd.loadmodule("mi_http")
    server = httpd.Server(port=0, **values)
    assert server.url
    assert ("whoever reaches /mi may give orders: set ip = 127.0.0.1" in caplog.text) == warned
    server.stop(0)


def test_a_password_is_not_printed(tmp_path):
    path = config(tmp_path, "[httpd]\nauth_username = me\nauth_password = secret\n")
    with command("-t", path) as process:
        output, errors = process.communicate(timeout=20)
    assert "auth_username = me" in output and "# auth_password is set" in output and "secret" not in output + errors


# --------------------------------------------------------------------------------------------------------------- Heads

def test_a_flood_of_heads_neither_grows_the_memo_nor_pushes_out_what_is_used(server):
    often = get(b"/echo?often")
    for _ in range(3):  # its section, and then the whole, are remembered the second time
        exchange(server, often)
        assert server.heads.recall(often) is None
    exchange(server, often)
    kept = server.heads.whole.recall(often)
    for number in range(3000):
        for _ in range(number % 5):
            line, _, block = get(b"/echo?%d" % number, b"X-Unique: %d" % number).partition(b"\r\n")
            server.heads.read(line + b"\r\n" + block, line, block, None)
        if not number % 50:
            assert server.heads.whole.recall(often) is kept

    def weight(items):
        return sum(httpd.weight(key) + httpd.weight(value) + 100 for key, value in items)

    heads = server.heads
    for memo in (heads.whole, heads.sections):
        assert memo.old
        assert weight(memo.young.items()) + weight(memo.old.items()) <= memo.size * 2
        assert len(memo.once) <= 1024
    assert weight(heads.lines.items()) <= heads.lines.size
    assert heads.whole.size * 2 + heads.sections.size * 2 + heads.lines.size <= server.params.memo_size


@pytest.mark.parametrize(
    "line", [b"HEAD / HTTP/2.0", b"HEAD /a b HTTP/1.1", b"HEAD https://q/ HTTP/1.1", b"HEAD * HTTP/1.1"]
)
def test_no_error_to_head_has_content_whatever_was_seen(server, line):
    for count in range(5):  # the section is known from the second on, the whole from the third
        data, end = exchange(server, line + b"\r\n" + HOST + b"\r\n", methods="HEAD")
        assert data.endswith(b"\r\n\r\n") and end == "closed", count
        exchange(server, get())


def test_an_expectation_is_judged_every_time(server):
    for _ in range(4):
        assert answers(exchange(server, P + b"Expect: x\r\n\r\n")[0])[0].status == 417


def test_an_absolute_form_target_does_not_change_the_host_of_others(server):
    for _ in range(4):
        exchange(server, b"GET http://evil/echo" + V)
    assert answers(exchange(server, get())[0])[0].json()["headers"]["host"] == "example"


# --------------------------------------------------------------------------------------------------------------- Spool

PAGE = b"0123456789" * 90000


def numbered(request, page):
    """900 kB that nobody can mistake for another's."""
    page.write(request.query.encode() + b":" + PAGE)
    return 200


@pytest.fixture
def slow_reader(server, far_away):
    """A client that does not read until it is told to."""
    httpd.register_httpdcb("test", "n", numbered)
    with connect(server, takes=50000) as client:
        yield client
    wait_for(lambda: not server.connections, server)
    assert server.held == 0 and server.disk.used == 0


def pages(data, methods="GET"):
    return [answer.body.partition(b":")[0] for answer in answers(data, methods) if answer.body.endswith(PAGE)]


def numbers(*numbers):
    return b"".join(get(b"/n?%d" % number) for number in numbers)


def is_spooled(server):
    return server.disk.used > 0


SPOOL_ROWS = [
    (numbers(1), 1, "open", "one"),
    (numbers(1, 2, 3, 4, 5), 5, "open", "five pipelined"),
    (numbers(1) + get() + numbers(2), 3, "open", "a small one between them"),
    (numbers(1) + get(b"/n?2").replace(b"GET", b"HEAD") + numbers(3), 3, "open", "HEAD between them"),
    (b"GET /n?1 HTTP/1.0\r\n\r\n", 1, "closed", "HTTP/1.0"),
    (get(b"/n?1", b"Connection: close"), 1, "closed", "the last one"),
    (numbers(1) + b"\x00", 2, "closed", "rubbish behind it"),
]


@table("raw, count, end", SPOOL_ROWS)
def test_answers_that_the_client_does_not_take_at_once_wait_in_a_file(server, slow_reader, raw, count, end):
    slow_reader.sendall(raw)
    wait_for(lambda: is_spooled(server), server)
    assert server.held < 20000  # in memory there is next to nothing
    methods = ["HEAD" if b"HEAD" in part else "GET" for part in raw.split(b"\r\n\r\n")]
    data, found = pump(server, slow_reader, count if end == "open" else ended, methods, 30)
    assert found == end and len(answers(data, methods)) == count
    sent = [number for number in (b"1", b"2", b"3", b"4", b"5") if b"GET /n?" + number in raw]
    assert pages(data, methods) == sent
    if end == "open":
        slow_reader.sendall(get())  # the connection is kept
        assert answers(pump(server, slow_reader)[0])[0].status == 200


def test_a_half_closed_client_gets_all_that_waits_in_a_file(server, slow_reader):
    slow_reader.sendall(numbers(1, 2))
    slow_reader.shutdown(socket.SHUT_WR)
    wait_for(lambda: is_spooled(server), server)
    data, end = pump(server, slow_reader, ended, seconds=30)
    assert pages(data) == [b"1", b"2"] and end == "closed"


def test_stop_waits_for_what_waits_in_a_file(server, slow_reader):
    slow_reader.sendall(numbers(1))
    wait_for(lambda: is_spooled(server), server)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        data = pool.submit(read, slow_reader)
        server.stop(10)
        assert pages(data.result(30)) == [b"1"]


def test_clients_that_go_take_their_files_along(server, far_away):
    httpd.register_httpdcb("test", "n", numbered)
    exchange(server, get())
    before = descriptors()
    for _ in range(20):
        with connect(server) as client:
            client.sendall(numbers(1, 2, 3, 4, 5, 6))
            wait_for(lambda: is_spooled(server), server)
            client.reset()
        wait_for(lambda: not server.connections, server)
    assert server.held == 0 and server.disk.used == 0
    wait_for(lambda: descriptors() <= before, server)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_file_that_cannot_be_had(server, slow_reader, monkeypatch, caplog, number):
    """What memory has room for waits there; the log says once what is the matter."""
    def fail(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(httpd.Disk, "open", fail)
    slow_reader.sendall(numbers(1))
    wait_for(lambda: server.held > 100000, server)
    assert pages(pump(server, slow_reader, seconds=30)[0]) == [b"1"]
    assert caplog.text.count("no room for what clients do not read") == 1


def test_a_directory_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    server = httpd.Server(**LOCAL)
    assert "nowhere" in caplog.text and "set TMPDIR" in caplog.text and server.disk.size == 0
    assert exchange(server, get(b"/nothing"))[0].startswith(b"HTTP/1.1 404")
    server.stop(0)


@pytest.mark.parametrize("method, status", [("GET", 503), ("POST", 500)])
def test_an_answer_that_would_find_no_room_is_refused_before_its_first_byte(far_away, method, status):
    """GET and HEAD can be asked again; what a POST has done is done."""
    httpd.register_httpdcb("test", "n", numbered)
    server = httpd.Server(**LOCAL, spool_size=0, memory_budget=3000000, buf_size=1000000)
    server.port
    hogs = []
    for _ in range(2):
        hog = connect(server, takes=4096)
        hog.sendall(numbers(1, 2, 3, 4, 5, 6))
        hogs.append(hog)
    wait_for(lambda: server.held > 600000, server)
    raw = get(b"/n?1") if method == "GET" else post(b"", path=b"/n?1")
    answer, = answers(exchange(server, raw)[0])
    assert answer.status == status and ("Retry-After" in answer.headers) == (status == 503)
    assert answers(exchange(server, get(b"/nothing"))[0])[0].status == 404  # small ones always find room
    for hog in hogs:
        hog.close()
    wait_for(lambda: not server.connections, server)
    assert server.held == 0
    server.stop(0)


def test_what_finds_room_depends_on_what_is_held():
    """A page that an empty server has memory for, and a full one has not."""
    httpd.register_httpdcb("test", "h", lambda request, page: page.write(b"x" * 10000) and 200)
    server = httpd.Server(**LOCAL, spool_size=0)
    most = server.params.held_size - 5000
    for more, status in ((0, 200), (most, 503), (-most, 200)):
        server.room.hold(more)
        assert answers(exchange(server, get(b"/h"))[0])[0].status == status
    server.stop(0)


class FullDisk:
    """A file of which half of a piece can be written."""

    def __init__(self, real):
        self.real, self.calls = real, 0

    def __getattr__(self, name):
        return getattr(self.real, name)

    def write(self, data):
        self.calls += 1
        if self.calls > 1:
            raise OSError(errno.ENOSPC, "full")
        return self.real.write(data[:10])


def test_a_spool_moves_from_memory_to_a_file():
    disk = httpd.Disk(1000, lambda: 100, lambda error, asking: False)
    spool = httpd.Spool(disk, few=50)
    spool.write(b"a" * 50)
    assert (spool.in_memory, disk.used) == (50, 0) and spool.read(10, 5) == b"aaaaa"
    spool.write(b"b" * 51)
    assert (spool.in_memory, disk.used, spool.size) == (0, 101, 101)
    assert spool.read(49, 3) == b"abb"
    with pytest.raises(OSError, match="spool_size 1000 is used up"):
        spool.write(b"c" * 900)
    file, spool.file = spool.file, FullDisk(spool.file)
    with pytest.raises(OSError, match="full"):
        spool.write(b"d" * 20)
    spool.file = file
    spool.write(b"e")
    assert spool.read(99, 10) == b"bbe" and disk.used == 102
    assert spool.reader().read() == b"a" * 50 + b"b" * 51 + b"e"
    assert spool.size == 102 and disk.used == 102
    del spool, file
    assert disk.used == 0


def test_a_reader_who_takes_a_little_all_the_time_lives_and_one_who_takes_nothing_does_not(later):
    """500 bytes a second, by what the client's system has acknowledged; what ours has taken says nothing."""
    httpd.register_httpdcb("test", "endless", lambda request, page: 200, lambda request, pos, buf: len(buf))
    server = httpd.Server(**LOCAL, conn_timeout=1)
    with connect(server, takes=2048) as reading, connect(server, takes=2048) as silent:
        for client in (reading, silent):
            client.sendall(get(b"/endless"))
        wait_for(lambda: len(server.connections) == 2, server)
        for _ in range(40):
            taken = 0
            while taken < 1500:
                wait_for(lambda: select.select([reading], [], [], 0)[0], server)
                taken += len(reading.recv(1500))
            later(0.1)
            server.run_once(0)
        alive, = server.connections  # the silent one has gone
        assert alive.peer[:2] == reading.getsockname()
    server.stop(0)


# ---------------------------------------------------------------------------------------------------------- Connection

@contextlib.contextmanager
def counted_calls(*more):
    """The names of what is called meanwhile in this thread: functions of httpd.py, and system calls on sockets."""
    own, system = [], []
    names = ("poll", "recv", "send", "accept", "_accept", "register", "modify", "sendmsg", "close", *more)

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == httpd.__file__:
            own.append(frame.f_code.co_name)
        elif event == "c_call" and argument.__name__ in names:
            system.append(argument.__name__)

    sys.setprofile(profile)
    try:
        yield own, system
    finally:
        sys.setprofile(None)


def test_keep_alive_and_the_fields_that_answers_always_have(server):
    with connect(server) as client:
        for _ in range(3):
            client.sendall(get())
            data, end = pump(server, client)
            answer, = answers(data)
            assert end == "open"
            assert re.fullmatch(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["Date"])
            assert "Server" not in answer.headers
            assert "Connection" not in answer.headers
            assert "Transfer-Encoding" not in answer.headers


CONNECTION_ROWS = [
    (b"HTTP/1.1", b"", "open", None, "1.1 is kept"),
    (b"HTTP/1.1", b"Connection: close\r\n", "closed", "close", "close"),
    (b"HTTP/1.1", b"Connection: CLOSE\r\n", "closed", "close", "any case"),
    (b"HTTP/1.1", b"Connection: foo,\t close ,\r\n", "closed", "close", "a list"),
    (b"HTTP/1.1", b"Connection: foo\r\nConnection: close\r\n", "closed", "close", "several lines"),
    (b"HTTP/1.1", b"Connection: closed\r\n", "open", None, "closed"),
    (b"HTTP/1.1", b"Connection: keep-alive, close\r\n", "closed", "close", "close wins"),
    (b"HTTP/1.0", b"", "closed", "close", "1.0 is not kept"),
    (b"HTTP/1.0", b"Connection: Keep-Alive\r\n", "open", "keep-alive", "1.0 with keep-alive is, and told so"),
    (b"HTTP/1.0", b"Connection: keep-alive\r\nConnection: close\r\n", "closed", "close", "close wins in 1.0"),
    (b"HTTP/1.5", b"", "open", None, "1.5 is 1.1"),
]


@table("version, fields, end, said", CONNECTION_ROWS)
def test_connection_field(server, version, fields, end, said):
    data, ended = exchange(server, b"GET /echo " + version + b"\r\n" + HOST + fields + b"\r\n")
    answer, = answers(data)
    assert ended == end and answer.headers["Connection"] == said
    data, ended = exchange(
        server, (b"GET /echo " + version + b"\r\n" + HOST + fields + b"\r\n") * 2, due=2 if end == "open" else 1
    )
    assert len(answers(data)) == (2 if end == "open" else 1)  # after close nothing more is executed


def test_pipelined_requests_are_answered_in_order_in_one_send(server):
    methods = ["GET"] * 50 + ["HEAD", "POST", "POST"]
    raw = b"".join(get(b"/echo/%d" % number) for number in range(50))
    raw += get().replace(b"GET", b"HEAD") + post(b"abc") + chunked(b"1\r\nx\r\n0\r\n\r\n")
    for cut in CUTS:
        with counted_calls() as (_, system):
            data, end = exchange(server, *CUTS[cut](raw), due=53, methods=methods)
        found = answers(data, methods)
        assert [answer.json()["url"] for answer in found[:50]] == ["/%d" % number for number in range(50)]
        assert found[50].body == b""
        assert int(found[50].headers["Content-Length"]) > 0
        assert [found[51].json()["body"], found[52].json()["body"]] == ["abc", "x"]
        assert end == "open"
        assert cut != "whole" or system.count("send") + system.count("sendmsg") <= 4  # 16 in a turn


def test_a_good_request_is_answered_even_when_rubbish_follows(server):
    for rubbish, statuses in (
        (b"\x00", [200, 400]),
        (b"GET /x y\r\n", [200, 400]),
        (b"GET / HTTP/2.0\r\n\r\n", [200, 505]),
        (b"\x16\x03", [200, 400]),
    ):
        data, end = exchange(server, get() + rubbish, due=2)
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
    data, end = exchange(server, get().replace(b"GET", b"HEAD"), methods="HEAD")
    assert data.endswith(b"\r\n\r\n") and end == "open"
    head, = answers(data, "HEAD")
    assert int(head.headers["Content-Length"]) == len(whole.body) + 1  # it says HEAD in the content
    for raw in (
        b"HEAD /nowhere" + V,
        b"HEAD /echo HTTP/1.1\r\n\r\n",
        b"HEAD /echo HTTP/2.0\r\n\r\n",
        b"HEAD /echo HTTP/1.1\r\n" + HOST + b"Expect: x\r\n\r\n",
        b"HEAD /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 9999\r\n\r\n",
    ):
        assert exchange(server, raw, methods="HEAD")[0].endswith(b"\r\n\r\n")  # nor has an error


def test_expect_100_continue(server):
    head = P + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    with connect(server) as client:
        client.sendall(head)
        assert pump(server, client, CONTINUE) == (CONTINUE, "open")
        client.send(b"abc")
        assert answers(pump(server, client)[0])[0].json()["body"] == "abc"
        client.send(head + b"a")  # the content is on its way: no 100
        assert pump(server, client, 0) == (b"", "open")
        client.send(b"bc" + get() + head)  # pipelined: answers leave before the 100
        data, end = pump(server, client, lambda data: data.count(b"200 OK") == 2 and data.endswith(CONTINUE))
        assert data.count(b"HTTP/1.1 200") == 2 and data.endswith(CONTINUE)
        client.send(b"def")
        assert answers(pump(server, client)[0])[0].json()["body"] == "def"
    data, end = exchange(server, b"POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n", b"abc")
    assert data.startswith(b"HTTP/1.1 200")  # a 1.0 client never gets a 1xx
    httpd.register_httpdcb("test", "get_only", echo, methods=("GET",))
    for path, status in ((b"/nowhere", 404), (b"/get_only", 405)):
        data, end = exchange(server, head.replace(b"/echo", path))
        assert answers(data)[0].status == status and end == "closed"  # the refusal instead, at once


def test_what_follows_a_request_without_content_is_no_part_of_it(server):
    expecting = B + HOST + b"Expect: 100-continue\r\n\r\n"
    for first, second, content in (
        (expecting.replace(b"GET", b"HEAD"), b"GET /x y\r\n", True),
        (expecting, b"HEAD /x y\r\n", False),
    ):
        data, end = exchange(server, first + second, due=ended)
        assert data.endswith(b"line\n") == content and data.count(b"HTTP/1.1 ") == 2


def test_a_last_answer_is_whole_though_the_client_goes_on_sending(server):
    httpd.register_httpdcb("test", "large", large)
    for raw in (get(b"/large", b"Connection: close"), b"GET /large HTTP/1.0\r\n\r\n"):
        with connect(server) as client:
            client.send(raw)
            server.run_once(0.1)
            client.send(b"\r\n")
            data, end = pump(server, client)
            assert len(answers(data)[0].body) == 1000000 and end == "closed"


def test_a_refused_request_whose_content_is_short_keeps_the_connection(server):
    for raw in (post(b"x" * 1000, path=b"/nowhere"), post(b"abc").replace(b"POST", b"DELETE")):
        for cut in CUTS:
            data, end = exchange(server, *CUTS[cut](raw + get()), due=2)
            assert [answer.status for answer in answers(data)] in ([404, 200], [405, 200])
            assert end == "open"
    data, end = exchange(server, post(b"x" * 2000, path=b"/nowhere"))
    assert answers(data)[0].status == 404 and end == "closed"


def test_every_method_may_have_content(server):
    for method in (b"GET", b"PUT", b"OPTIONS", b"HEAD"):
        data, end = exchange(
            server,
            post(b"GET /x HTTP/1.1").replace(b"POST", method, 1) + get(),
            due=2,
            methods=[method.decode(), "GET"],
        )
        assert [answer.status for answer in answers(data, [method.decode(), "GET"])] == [
            200 if method != b"OPTIONS" else 204,
            200,
        ]


def test_the_wrong_method_is_never_executed(server):  # OPENSIPS, never 2
    """Content is whole, or it is a 413: no part of it is dropped, and nothing of it passes for a request."""
    seen = []
    httpd.register_httpdcb("test", "h", lambda request, page: seen.append(request.body) or 200)
    content = b"".join(b"%04d" % number for number in range(256))
    exchange(server, *cut_at_random(post(content, path=b"/h"), random.Random(3)))
    exchange(server, *CUTS["bytes"](post(content, path=b"/h")))
    data, _ = exchange(server, post(content + b"x" + get(b"/h"), path=b"/h"))
    assert seen == [content, content] and answers(data)[0].status == 413


def test_half_close(server):
    rows = [
        (get(), [200]),
        (get() * 3, [200] * 3),
        (post(b"abc"), [200]),
        (get()[:-1], [400]),
        (post(b"abc")[:-1], [400]),
        (b"", []),
        (chunked(b"0\r\n\r"), [400]),
        (get() + b"GET", [200, 400]),
        (b"\r\n", []),
    ]
    for raw, statuses in rows:
        data, end = exchange(server, raw, half_close=True)
        assert [answer.status for answer in answers(data)] == statuses, raw
        assert end == "closed", raw


def test_a_refused_client_reads_its_answer_though_it_is_still_sending(server):
    """RFC 9112, 9.6: only who reads on after the refusal avoids the reset that would destroy it."""
    with server, connect(server) as client:
        client.sendall(P + b"Content-Length: 3000000\r\n\r\n")
        for _ in range(300):
            client.sendall(b"x" * 10000)
        assert answers(read(client))[0].status == 413


@table("sent, seconds", [(b"", 8, "five without a byte"), (b"x", 32, "thirty in all")])
def test_lingering_is_bounded_by_time(server, later, sent, seconds):
    """Not by bytes, which take no memory: an upload that was refused can be read to its end."""
    passed = 0
    with connect(server) as client:
        client.sendall(b"\x00")
        assert b"400" in pump(server, client)[0]
        while server.connections:
            client.send(sent)
            server.run_once(0.02)
            later(4)
            server.run_once(0)
            passed += 4
    assert passed == seconds and server.held == 0


def test_a_refused_upload_of_any_size_reads_its_413(server):
    with server, connect(server) as client:
        client.sendall(P + b"Content-Length: 30000000\r\n\r\n")
        for _ in range(30):
            client.sendall(b"x" * 1000000)
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


def sees_input(connection):
    """Would what the client sends be noticed?"""
    return connection.interest == httpd.READ


def state(connection):
    return connection.state.__name__


def test_a_slow_reader_stops_what_is_read_from_it(server):
    """While output waits, nothing is read or executed; what waits is counted, and given back."""
    calls = []
    httpd.register_httpdcb("test", "large", lambda request, page: calls.append(1) or large(request, page))
    with connect(server) as client:
        client.sendall(get(b"/large") * 20)
        wait_for(lambda: server.held, server)
        for _ in range(5):
            server.run_once(0)
        assert len(calls) < 20
        assert 0 < server.held <= server.params.held_size
        connection, = server.connections
        assert not sees_input(connection)
        data, end = pump(server, client, lambda data: len(data) > 20000000 and is_due(data, 20))
        assert len(answers(data)) == 20
        assert end == "open"
        assert len(calls) == 20
        assert server.held == 0
        assert sees_input(connection)


def test_partial_requests_behind_answered_ones_are_counted(server):
    tails = [
        B + b"X: " + b"a" * 3000,
        P + b"Content-Length: 1000\r\n\r\n" + b"x" * 999,
        chunked(b"3e8\r\n" + b"x" * 999),
    ]
    clients = [connect(server) for _ in tails]
    for client, tail in zip(clients, tails):
        client.sendall(get() + tail)
        assert pump(server, client)[0].startswith(b"HTTP/1.1 200")
    wait_for(lambda: server.held >= len(tails[0]) + 2 * 999, server)
    assert len(tails[0]) + 2 * 999 <= server.held <= sum(map(len, tails)) + 4000  # and the heads under way
    for client in clients:
        client.close()
    wait_for(lambda: not server.connections, server)
    assert server.held == 0


def test_one_who_pipelines_without_end_does_not_keep_the_others_out(server):
    with connect(server) as greedy, connect(server) as other:
        other.send(get())
        assert pump(server, other)[0].startswith(b"HTTP/1.1 200")
        greedy.setblocking(False)
        greedy.send(get() * 2000)
        before = server.requests
        wait_for(lambda: server.requests > before, server)
        assert server.requests <= 16384 // len(get()) + 2


def test_greedy_ones_wait_their_turn(server):
    """Who pipelines hundreds of requests is answered 16 at a time, and others between them."""
    order = []
    httpd.register_httpdcb("test", "o", lambda request, page: order.append(request.query) or 204)
    with connect(server) as greedy, connect(server) as other:
        greedy.sendall(get(b"/o?greedy") * 200)
        other.sendall(get(b"/o?other"))
        wait_for(lambda: len(order) == 201, server)
        assert order.index("other") <= 32


@pytest.mark.parametrize("behind", [b"", get(b"/o?behind")], ids=["alone", "a request behind it"])
def test_who_sends_tiny_chunks_waits_his_turn(server, behind):
    """A recv() may bring thousands: a hundred of them are read, and others answered between them."""
    order = []
    httpd.register_httpdcb("test", "o", lambda request, page: order.append((request.query, request.body)) or 204,
                           methods=("GET", "POST"))
    with connect(server) as greedy, connect(server) as other:
        greedy.sendall(chunked(b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n", path=b"/o?greedy") + behind)
        other.sendall(get(b"/o?other"))
        wait_for(lambda: len(order) == 2 + bool(behind), server)
        assert order == [("other", b""), ("greedy", b"x" * 1000), ("behind", b"")][:len(order)]
        for _ in range(3):
            server.run_once(0)
        assert server.held == 0 and not server.loop.greedy


def test_tiny_chunks_earn_no_more_time_than_other_content(server, later):
    with connect(server) as client:
        client.sendall(chunked(b"1\r\nx\r\n" * 500))
        wait_for(lambda: [state(each) for each in server.connections] == ["receive_content"], server)
        later(server.params.request_timeout + 3000 / 500 + 0.1)
        assert answers(pump(server, client)[0])[0].status == 408


@table("rest, status", [
    (b"1\r\nxx\r\n", 400, "a chunk is not as long as it says"),
    (b"g\r\n", 400, "no size"),
    (b"fff\r\n", 413, "too much"),
    (b"0\r\nHost: b\r\n\r\n", 400, "a trailer that must not be"),
])
def test_what_is_wrong_behind_tiny_chunks_is_refused(server, rest, status):
    assert answers(exchange(server, get() + chunked(b"1\r\nx\r\n" * 500 + rest))[0])[1].status == status
    assert server.held == 0


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


@pytest.mark.parametrize(
    "error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError(), BaseException("odd"), MemoryError()], ids=repr
)
def test_no_exception_of_a_callback_ends_the_server(server, caplog, error):
    """Only KeyboardInterrupt leaves the loop: what a client can provoke must not end the service for the others."""
    fails = raising(error)
    httpd.register_httpdcb("test", "handler", fails)
    httpd.register_httpdcb("test", "flush", lambda request, page: 200, fails)
    httpd.register_httpdcb(
        "test", "later", lambda request, page: 200, lambda request, pos, buf: 1 if not pos else fails()
    )
    httpd.register_httpdcb("test", "upload", lambda request, page: 200, upload_data_cb=fails)
    httpd.register_wsgi("test", "wsgi", fails)
    httpd.register_wsgi("test", "pool", fails, threads=1)
    for path, statuses in ((b"/handler", [500]), (b"/flush", [500]), (b"/wsgi", [500]), (b"/pool", [500])):
        with connect(server) as client:
            client.send(get(path))
            assert [answer.status for answer in answers(pump(server, client)[0])] == statuses
    assert exchange(server, get(b"/later"), due=ended)[1] == "closed"
    assert b"HTTP/1.1 500" in exchange(server, post(b"abc", path=b"/upload"))[0]
    assert "failed" in caplog.text and repr(error)[:8] in caplog.text
    assert b"HTTP/1.1 200" in exchange(server, get())[0] and server.held == 0


def test_observers_are_told_once_of_every_response(server):
    told = []

    def observer(response):
        request = response.request
        told.append((request and request.target, response.status, response.size, response.whole))
        assert 0 <= response.seconds < 10 and response.server is server and response.client[0] == "127.0.0.1"
        assert response.garbage == (b"" if request else b"\x00")

    httpd.register_httpdcb("test", "page", lambda request, page: page.write(b"four") and 200)
    httpd.register_httpdcb("test", "stream", lambda request, page: 200, lambda request, pos, buf: httpd.END)
    httpd.register_httpdcb("test", "cut", lambda request, page: 200, lambda request, pos, buf: 1 if not pos else 1 / 0)
    httpd.observers.append(observer)
    try:
        exchange(server, get(b"/page") + get(b"/page").replace(b"GET", b"HEAD"), due=2, methods=["GET", "HEAD"])
        exchange(server, get(b"/page", b"Connection: close"))
        exchange(server, get(b"/nothing"))
        exchange(server, b"\x00")
        exchange(server, get(b"/stream"))
        exchange(server, get(b"/cut"), due=ended)
    finally:
        httpd.observers.remove(observer)
    pages = [("/page", 200, 4, True), ("/page", 200, 0, True), ("/page", 200, 4, True)]
    errors = [row for row in told if row[1] >= 400]
    assert told[:3] == pages and ("/stream", 200, 0, True) in told and ("/cut", 200, 1, False) in told
    assert [row[:2] for row in errors] == [("/nothing", 404), (None, 400)] and len(told) == 7


@table("raw", [
    (get(b"/s", b"Connection: close"), "Connection: close"),
    (b"GET /s HTTP/1.0\r\n\r\n", "HTTP/1.0"),
    (get(b"/s", b"Connection: close") + get(), "more behind it"),
])
def test_observers_are_told_once_of_a_stream_that_ends_its_connection(server, raw):
    told = []
    httpd.register_httpdcb(
        "test", "s", lambda request, page: 200,
        lambda request, pos, buf: httpd.END if pos else buf.__setitem__(slice(4), b"four") or 4
    )
    httpd.observers.append(lambda response: told.append((response.status, response.size, response.whole)))
    with connect(server) as client:
        client.sendall(raw)
        assert pump(server, client, ended)[1] == "closed"
    wait_for(lambda: not server.connections, server)
    assert told == [(200, 4, True)]


# Streams


CONTENT = bytes(range(256)) * 1000


def flush_content(request, pos, buf):
    """CONTENT, from where it is asked for, as much as there is room for."""
    part = CONTENT[pos:pos + len(buf)]
    buf[: len(part)] = part
    return len(part) or httpd.END


def ends(request, pos, buf):
    raise KeyError(pos)


STREAM_ROWS = [
    (get(b"/s"), "chunked", None, "HTTP/1.1: chunked"),
    (get(b"/s?length"), None, "256000", "a Content-Length of the handler's"),
    (b"GET /s HTTP/1.0\r\n\r\n", None, None, "HTTP/1.0: until the connection closes"),
    (b"GET /s?length HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", None, "256000", "HTTP/1.0 with a length is kept"),
    (get(b"/s", b"Connection: close"), "chunked", None, "chunked and close"),
    (get(b"/s?fields"), "chunked", None, "large fields of its own"),
]


@table("raw, coding, length", STREAM_ROWS)
def test_streams(server, raw, coding, length):
    def begin(request, page):
        if request.query == "length":
            page.set_header("Content-Length", len(CONTENT))
        if request.query == "fields":
            page.set_header("X", "y" * 2000)
        return 201

    httpd.register_httpdcb("test", "s", begin, flush_content, content_type="text/x")
    data, end = exchange(server, raw)
    answer, = answers(data)
    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (201, CONTENT, "text/x")
    assert (answer.headers["Transfer-Encoding"], answer.headers["Content-Length"]) == (coding, length)
    assert end == ("open" if b"1.1" in raw and b"close" not in raw or b"keep-alive" in raw else "closed")
    head, = answers(exchange(server, raw.replace(b"GET", b"HEAD"), methods="HEAD")[0], "HEAD")
    assert {**head.headers, "Date": ""} == {**answer.headers, "Date": ""}
    assert head.body == b""


def test_a_handler_that_writes_does_not_stream(server):
    httpd.register_httpdcb("test", "s", lambda request, page: page.write("written") and 200, ends)
    httpd.register_httpdcb("test", "n", lambda request, page: 204, ends)
    data, end = exchange(server, get(b"/s") + get(b"/n") + get(b"/s"), due=3)
    assert [(answer.status, answer.body) for answer in answers(data)] == [
        (200, b"written"),
        (204, b""),
        (200, b"written"),
    ]
    assert end == "open"


CUT_ROWS = [
    (lambda request, pos, buf: ends(request, pos, buf) if pos else 1, None, "an exception"),
    (lambda request, pos, buf: httpd.END if pos else 1, "5", "too few"),
    (lambda request, pos, buf: 3, "5", "too many"),
    (lambda request, pos, buf: len(buf) + 1 if pos else 1, None, "more than there was room for"),
    (lambda request, pos, buf: None if pos else 1, None, "no count"),
    (lambda request, pos, buf: -3 if pos else 1, None, "a negative count"),
    (lambda request, pos, buf: 1.0 if pos else 1, None, "no whole number"),
]


@table("flush, length", CUT_ROWS)
def test_a_broken_stream_is_cut(server, caplog, flush, length):
    def begin(request, page):
        if length:
            page.set_header("Content-Length", length)
        return 200

    httpd.register_httpdcb("test", "s", begin, flush)
    data, end = exchange(server, get(b"/s") + get(b"/echo"), due=ended)
    assert data.startswith(b"HTTP/1.1 200")
    assert not data.endswith(b"0\r\n\r\n")
    assert data.count(b"HTTP/1.1") == 1
    assert end == "closed"
    assert "a callback of root path 's' failed" in caplog.text and "Traceback" in caplog.text
    with pytest.raises((http.client.HTTPException, ValueError)):
        answers(data)


def test_a_broken_stream_to_http_1_0_is_no_whole_one(server, caplog):
    """a content that ends with the connection: FIN says that it is whole, only a reset says that it is not."""
    httpd.register_httpdcb(
        "test", "s", lambda request, page: 200, lambda request, pos, buf: ends(request, pos, buf) if pos else 1
    )
    data, end = exchange(server, b"GET /s HTTP/1.0\r\n\r\n", due=ended)
    assert end == "reset"


def test_an_exception_before_anything_is_sent_is_a_500(server):
    httpd.register_httpdcb("test", "s", lambda request, page: 200, ends)
    data, end = exchange(server, get() + get(b"/s") + get(), due=3)
    assert [answer.status for answer in answers(data)] == [200, 500, 200]


def test_streams_and_pages_pipelined(server):
    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush_content)
    raw = (
        get(b"/echo/1")
        + get(b"/s")
        + post(b"abc")
        + get(b"/s").replace(b"GET", b"HEAD")
        + get(b"/s")
        + get(b"/echo/2")
    )
    methods = ["GET", "GET", "POST", "HEAD", "GET", "GET"]
    for cut in CUTS:
        data, end = exchange(server, *CUTS[cut](raw), due=6, methods=methods)
        found = answers(data, methods)
        assert [len(answer.body) for answer in found[1::3]] == [len(CONTENT)] * 2
        assert found[1].body == CONTENT
        assert end == "open"
        assert found[0].json()["url"] == "/1"
        assert found[5].json()["url"] == "/2"
        assert found[2].json()["body"] == "abc"


def test_a_stream_waits_until_it_is_resumed(server):
    waiting, pieces = [], []

    def flush(request, pos, buf):
        if not pieces:
            waiting.append(request)
            return 0
        piece = pieces.pop(0)
        buf[: len(piece)] = piece
        return len(piece) or httpd.END

    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush)
    with connect(server) as client:
        client.send(get(b"/s"))
        data, end = pump(server, client, b"\r\n\r\n")
        assert data.endswith(b"\r\n\r\n")
        assert b"chunked" in data
        assert end == "open"
        assert len(waiting) == 1  # the head is there at once
        client.send(get())  # waits behind it
        assert pump(server, client, 0) == (b"", "open") and len(waiting) == 1
        pieces.append(b"abc")
        waiting[0].resume()
        waiting[0].resume()
        assert pump(server, client, b"abc\r\n") == (b"3\r\nabc\r\n", "open")
        assert len(waiting) == 2
        pieces.extend([b"d", b""])
        waiting[0].resume()
        data, end = pump(server, client, b"200 OK")
        assert data.startswith(b"1\r\nd\r\n0\r\n\r\nHTTP/1.1 200")
        assert end == "open"
        assert len(waiting) == 2


@pytest.mark.parametrize("flags", ["", "tls"])
def test_many_streams_share_the_page_and_never_mix(server, far_away, flags, pki):
    size = 500000 if flags else 1000000
    blocks = {number: bytes([number]) * 65536 for number in range(40)}

    def flush(request, pos, buf):
        count = min(len(buf), size - pos, 65536)
        buf[:count] = blocks[int(request.query)][:count]
        return count or httpd.END

    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush)
    params = dict(tls_cert_file=pki / "ec.pem", tls_key_file=pki / "ec.key", tls_ciphers=BOTH) if flags else {}
    with httpd.Server(**LOCAL, **params) as running:
        clients = [connect_tls(running, client_context()) if flags else connect(running) for _ in blocks]
        for number, client in enumerate(clients):
            client.say(get(b"/s?%d" % number))
        most = 0

        def check(number):
            answer, = answers(read(clients[number], lambda data: data.endswith(b"\r\n0\r\n\r\n")))
            assert len(answer.body) == size
            assert answer.body.count(bytes([number])) == size

        readers = [threading.Thread(target=check, args=(number,)) for number in blocks]
        wait_for(lambda: running.requests == len(blocks))
        for reader in readers:
            reader.start()
        while any(reader.is_alive() for reader in readers):
            most = max(most, running.held)
            readers[0].join(0.01)
            readers = readers[1:] + readers[:1]
        assert most <= running.params.held_size and running.requests == len(blocks)
        for client in clients:
            client.close()


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
        assert len(asked) == before  # backpressure: not called while the socket is full
        assert server.held <= server.params.held_size // 8 and asked == sorted(asked)
        other.send(get())
        assert pump(server, other)[0].startswith(b"HTTP/1.1 200")
        for _ in range(300):
            client.recv(1 << 16)
            server.run_once(0)
        assert len(asked) > before and server.held <= server.params.held_size // 8
    wait_for(lambda: not server.connections, server)
    assert server.held == 0 and not server.connections


def test_stalled_streams_do_not_use_up_the_memory_of_others():
    httpd.register_httpdcb("test", "s", lambda request, page: 200, lambda request, pos, buf: len(buf))
    httpd.register_httpdcb("test", "p", lambda request, page: page.write(b"x" * 500) and 200)
    server = httpd.Server(**LOCAL)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(connect(server)) for _ in range(100)]
        for client in stalled:
            client.send(get(b"/s"))
        for _ in range(600):
            server.run_once(0)
            assert server.held <= server.params.held_size
        assert len(server.connections) == 100  # nobody is closed for it
        assert answers(exchange(server, get(b"/p"))[0])[0].status == 200
    server.stop(0)


def test_contents_of_requests_with_streams_are_counted(server):
    waiting, over = [], []

    def flush(request, pos, buf):
        waiting.append(request)
        return httpd.END if over else 0

    httpd.register_httpdcb("test", "s", lambda request, page: 200, flush, methods=("POST",))
    with connect(server) as client:
        client.sendall(post(b"x" * 1000, path=b"/s"))
        assert pump(server, client, b"\r\n\r\n")[1] == "open"
        assert 1000 < server.held < 4000  # the content, and the head under way
        over.append(True)
        waiting[0].resume()
        assert pump(server, client, b"0\r\n\r\n") == (b"0\r\n\r\n", "open") and server.held == 0


def test_a_piece_that_is_kept_cannot_touch_what_others_get(server):
    """flush_data_cb keeps buf (mostly: a thread fills it and resumes): it writes into other clients' responses."""
    kept = []
    httpd.register_httpdcb(
        "test", "s", lambda request, page: 200, lambda request, pos, buf: kept.append(buf) or httpd.END
    )
    exchange(server, get(b"/s"))

    def handler(request, page):
        page.write("secret")
        with contextlib.suppress(ValueError):
            kept[0][:3] = b"bad"
        return 200

    assert ask(server, handler).body == b"secret"


# Suspended requests


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
        assert len(answers(data)) == 1 and len(seen) == 1  # the answer before it does not wait for it
        request = seen[0][0]
        assert not request.closed
        request.state = 7
        for _ in range(3):
            request.resume()
        found = answers(pump(server, client, 2)[0])
        assert found[0].body == b"7"
        assert found[0].headers.get_all("X") == ["1"]
        assert found[1].json()["root"] == "echo"
        request.resume()  # all is over
        assert pump(server, client, 0) == (b"", "open")
        assert [row[1:] for row in seen] == [(None, 0), (7, 0)]
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
    data = exchange(server, get() + get(b"/h") + get(b"/h") + get(), due=4)[0]
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
        assert pump(server, other)[0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "raw",
    [get(b"/park"), get(b"/park") + get() * 3, get(b"/park") + get() * 3000],
    ids=["alone", "requests behind it", "many behind it"],
)
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_is_noticed_while_suspended(parking, raw, how):
    with connect(parking) as client:
        client.sendall(raw)
        wait_for(lambda: parked, parking)
        assert not parked[0].closed
        if how == "reset":
            client.reset()
    wait_for(lambda: not parking.connections, parking)
    assert parked[0].closed and not parking.connections and parking.held == 0
    parked[0].state = 1
    parked[0].resume()
    parking.run_once(0.01)
    assert len(parked) == 1  # it is not called again


def test_who_has_only_finished_sending_gets_the_answer(parking):  # RFC 9112, 9.6
    with connect(parking) as client:
        client.send(get(b"/park"))
        client.shutdown(socket.SHUT_WR)
        assert pump(parking, client, CONTINUE) == (CONTINUE, "open") and not parked[0].closed
        parked[0].state = 1
        parked[0].resume()
        data, end = pump(parking, client, ended)
        assert answers(data)[0].body == b"1" and end == "closed"


def test_a_half_closed_http_1_0_client_gets_the_answer(parking):
    """HTTP/1.0 (of printf | nc) knows no 100 (Continue) that could ask whether it is still there."""
    with connect(parking) as client:
        client.send(b"GET /park HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert pump(parking, client, 0) == (b"", "open") and not parked[0].closed
        parked[0].state = 1
        parked[0].resume()
        data, end = pump(parking, client, ended)
        assert answers(data)[0].body == b"1" and end == "closed"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_half_closed_client_that_nothing_can_be_asked_is_given_up(server, later, version):
    httpd.register_httpdcb("test", "waits", lambda request, page: 200, lambda request, pos, buf: 0 if pos else 1)
    with connect(server) as client:
        client.send(b"GET /waits HTTP/%s\r\nHost: a\r\n\r\n" % version)
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: server.requests, server)
        for _ in range(3):  # of the request, of the answer, of the end
            later(server.params.conn_timeout + 1)
            server.run_once(0.02)
        assert not server.connections and server.held == 0


def fill_socket(connection):
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.sock.send(b"x" * 1000)


def turns_in(server, seconds):
    """How often it wakes up though there is nothing to do."""
    end, turns = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0:
        server.run_once(left)
        turns += 1
    return turns


def test_the_question_to_a_half_closed_client_whose_socket_is_full_waits(parking):
    with connect(parking) as client:
        client.send(get(b"/park"))
        wait_for(lambda: parked, parking)
        connection, = parking.connections
        fill_socket(connection)
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: state(connection) == "asked", parking)
        assert turns_in(parking, 0.2) < 5
        while connection.out:
            client.recv(100000)
            parking.run_once(0.01)
        parked[0].state = "later"
        parked[0].resume()
        assert pump(parking, client, ended)[0].endswith(b"later")


def test_a_suspended_request_has_all_the_time(parking, later):
    with connect(parking) as client:
        client.send(get(b"/park") + get(b"/park"))
        wait_for(lambda: parked, parking)
        for _ in range(2):
            later(2 * (parking.params.conn_timeout + parking.params.request_timeout))
            parking.run_once(0)
        for number in range(2):
            wait_for(lambda: len(parked) > 2 * number, parking)
            parked[-1].state = 200
            parked[-1].resume()
        assert [answer.status for answer in answers(pump(parking, client, 2)[0])] == [200, 200]


def test_suspended_requests_wait_without_a_poll_too_many(parking):
    with connect(parking) as client:
        client.sendall(get(b"/park") + get() * 1000)
        wait_for(lambda: parked, parking)
        for _ in range(10):
            parking.run_once(0)
        assert turns_in(parking, 0.2) < 5


def test_suspended_requests_get_a_grace_at_the_end(parking, later):
    parking.start()
    with connect(parking) as client, connect(parking) as never:
        client.send(get(b"/park"))
        never.send(get(b"/park"))
        wait_for(lambda: len(parked) == 2)
        first = next(request for request in parked if request.client == client.getsockname())
        stopper = threading.Thread(target=parking.stop, args=(60,))
        stopper.start()
        wait_for(lambda: parking.stopping)
        later(59)
        first.state = 202
        first.resume()
        answer, = answers(read(client))
        assert answer.body == b"202"
        assert answer.headers["Connection"] == "close"
        later(2)
        never.send(b"x")  # the server notices what time it is
        stopper.join(10)
        assert not stopper.is_alive()
        with contextlib.suppress(ConnectionResetError):
            assert never.recv(10) == b""


def test_thousands_of_suspended_requests_resumed_by_many_threads(parking):
    """Each gets its own answer, once."""
    count = min(2000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 200)
    parking.start()
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(count):
            clients.append(stack.enter_context(connect(parking)))
            clients[-1].send(get(b"/park?%d" % number))
        wait_for(lambda: len(parked) == count, seconds=20)
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


def test_a_resume_while_the_loop_wakes_up_is_not_lost(parking):
    """Between the reading of the byte that wakes the loop and the note that it has been read."""

    class Woken:
        def recv(self, size):
            data = real.recv(size)
            thread = threading.Thread(target=parking.loop.mailbox.ring)
            thread.start()
            thread.join()
            return data

        def close(self):
            real.close()

    assert parking.fileno() >= 0
    mailbox = parking.loop.mailbox
    real, mailbox.bell = mailbox.bell, Woken()
    parking.start()
    for _ in range(3):
        parked.clear()
        with connect(parking) as client:
            client.send(get(b"/park"))
            wait_for(lambda: parked)
            request, start = parked[-1], time.monotonic()
            time.sleep(0.02)
            request.state = 1
            request.resume()
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            assert time.monotonic() - start < 0.5
    parking.stop()


def test_what_ends_a_turn_does_not_hold_up_who_is_resumed(parking):
    """KeyboardInterrupt out of a turn skipped the wake-up for who was resumed in it: he waited for a second."""

    def leave(request, page):
        parked[0].state = 1
        parked[0].resume()
        raise KeyboardInterrupt

    httpd.register_httpdcb("test", "leave", leave)
    server = parking
    with connect(server) as client, connect(server) as other:
        client.send(get(b"/park"))
        wait_for(lambda: parked, server)
        other.send(get(b"/leave"))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                server.run_once(0.05)
        assert select.select([server.fileno()], [], [], 0.3)[0]


def test_contents_of_suspended_requests_are_counted(parking):
    """kept = 0 when the content is whole: any number of suspended requests may keep a body each."""
    small = httpd.Server(**LOCAL, memory_budget=2**20, receive_buf_size=100000, buf_size=4096)
    with contextlib.ExitStack() as stack:
        clients, said = [stack.enter_context(connect(small)) for _ in range(30)], b""
        for client in clients:
            client.sendall(post(b"x" * 100000, path=b"/park"))
            already = len(parked)
            said += pump(small, client, lambda data: data or len(parked) > already)[0]
        assert small.held <= small.params.held_size
        assert sum(len(request.body) for request in parked if not request.closed) <= 2**20
        assert b"503" in said and parked
        parked[0].state = 1
        parked[0].resume()
        assert answers(pump(small, clients[0])[0])[0].body == b"1"
    wait_for(lambda: not small.connections, small)
    assert small.held == 0
    small.stop(0)


@pytest.mark.parametrize("flush", [None, ends])
def test_503_for_want_of_memory_closes_though_a_request_suspends(flush):
    """count() inside the try of serve: answered by write_error as a handler's, and the connection is kept."""
    httpd.register_httpdcb("test", "park", lambda request, page: 200 if flush else httpd.SUSPEND, flush)
    server = httpd.Server(**LOCAL)
    with connect(server) as client:
        client.send(get(b"/park") + get(b"/park"))
        wait_for(lambda: server.connections, server)
        server.stop(0)
    server = httpd.Server(**LOCAL)
    with connect(server) as client:
        server.room.held = server.params.held_size
        client.send(get(b"/park") + get(b"/park"))
        data, end = pump(server, client, ended)
        assert data.startswith(b"HTTP/1.1 503")
        assert data.count(b"HTTP/1.1") == 1
        assert end == "closed"
    server.stop(0)


def accepts(server):
    try:
        connect(server).close()
        return True
    except OSError:
        return False


@pytest.mark.parametrize("how", ["close", "stop"])
def test_the_last_answer_to_who_was_suspended_is_not_lost_to_a_reset(parking, how):
    """What came behind it is still in the socket: close() would mean a reset, also at a graceful stop."""
    with connect(parking) as client:
        client.send(get(b"/park", b"Connection: " + (b"close" if how == "close" else b"keep-alive")))
        wait_for(lambda: parked, parking)
        client.send(get())
        assert pump(parking, client, 0) == (b"", "open")
        stopper = threading.Thread(target=parking.stop, args=(5,))
        if how == "stop":
            stopper.start()
            wait_for(lambda: not accepts(parking), parking)
        parked[0].state = 1
        parked[0].resume()
        data, end = pump(parking, client, ended)  # not "reset"
        assert answers(data)[0].headers["Connection"] == "close"
        assert end == "closed"
        if how == "stop":
            wait_for(lambda: parking.fileno() < 0, parking)
            stopper.join(10)


# Uploads


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
    return (
        b"".join(
            b"%x\r\n%b\r\n" % (len(part), part)
            for part in (content[i:i + size] for i in range(0, len(content), size))
        )
        + b"0\r\n\r\n"
    )


@pytest.mark.parametrize("cut", [*CUTS])
@pytest.mark.parametrize("coded", [False, True])
def test_uploads(server, cut, coded):
    upload_to(server)
    content = CONTENT[:3000]
    raw = (chunked(chunks(content, 700)) if coded else post(content)).replace(b"/echo", b"/u")
    data, end = exchange(server, *CUTS[cut](raw + get() + raw + post(b"", path=b"/u")), due=4)
    first, second, third, fourth = answers(data)
    assert first.json()[1:] == third.json()[1:] == [3000, sum(content), ""]
    assert second.json()["root"] == "echo"
    assert fourth.json() == [0, 0, 0, ""]
    assert end == "open"


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
    assert total == [60000000] and largest[0] <= httpd.CONTENT_SIZE


def test_an_upload_can_be_refused_early(server, caplog):
    def upload(request, data):
        if request.query == "fail":
            raise KeyError("x")
        raise httpd.HTTPError(409, "not now", {"Retry-After": "9"})

    httpd.register_httpdcb("test", "u", lambda request, page: 200, upload_data_cb=upload)
    upload_to(server, "limited", upload_limit=1000)
    rows = [
        (b"/u", 409, b""),
        (b"/u?fail", 500, b""),
        (b"/limited", 413, b""),
        (b"/limited", 413, b"Expect: 100-continue\r\n"),
        (b"/nowhere", 404, b""),
    ]
    with server:
        for path, status, field in rows:
            with connect(server) as client:
                client.sendall(b"POST " + path + b" HTTP/1.1\r\n" + HOST + field + b"Content-Length: 5000000\r\n\r\n")
                if not field:
                    for _ in range(40):
                        client.sendall(b"x" * 100000)  # whoever is still sending reads the answer
                answer, = answers(read(client))
                assert answer.status == status and answer.headers["Connection"] == "close"
    assert caplog.text.count("Traceback") == 1 and "KeyError" in caplog.text


def test_uploads_and_100_continue(server):
    upload_to(server)
    with connect(server) as client:
        client.send(b"POST /u HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert pump(server, client, CONTINUE) == (CONTINUE, "open")
        client.send(b"abc")
        assert answers(pump(server, client)[0])[0].json() == [1, 3, sum(b"abc"), ""]


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
        assert answers(read(client, 1))[0].body == CONTENT
        assert len(b"".join(got)) == 100000


def test_what_a_handler_says_it_keeps_is_counted(server):
    def upload(request, data):
        request.kept += 50000

    httpd.register_httpdcb("test", "u", lambda request, page: 204, upload_data_cb=upload)
    raw = post(b"abc", path=b"/u")
    with connect(server) as client:
        client.sendall(raw[:-1])
        wait_for(lambda: server.held > 50000, server)
        client.sendall(raw[-1:])
        assert answers(pump(server, client)[0])[0].status == 204
        assert server.held == 0


def test_upload_data_cb_is_not_for_what_its_handler_will_not_see(server):
    """OPTIONS is answered by the server, but its content goes to upload_data_cb."""
    got = []
    httpd.register_httpdcb(
        "test", "u", lambda request, page: 200, upload_data_cb=lambda request, data: got.append(data)
    )
    assert answers(exchange(server, post(b"abc", path=b"/u").replace(b"POST", b"OPTIONS"))[0])[0].status == 204
    assert got == []


# ----------------------------------------------------------------------------------------------------- Loop and Server

def threads():
    return {thread.name for thread in threading.enumerate()}


def test_life_in_a_thread():
    httpd.register_httpdcb("test", "echo", echo)
    before = descriptors()
    with httpd.Server(**LOCAL) as server:
        port = server.port
        assert server.url == "http://127.0.0.1:%d" % port
        assert raw_get(port) == 200
        assert "httpd" in threads()
    assert "httpd" not in threads() and descriptors() == before
    assert_free(port)
    server.stop()
    server.stop(0)
    server.run_once(0)
    server.run()
    assert server.port == port
    with pytest.raises(RuntimeError, match="starts only once"):
        server.start()


def test_stop_from_a_handler_and_from_any_thread():
    def stop(request, page):
        running.stop()
        running.stop()
        page.write("bye")
        return 200

    httpd.register_httpdcb("test", "stop", stop)
    for life in ("start", "run", "run_once"):
        running = httpd.Server(**LOCAL)
        port = running.port
        with connect(running) as client:
            client.sendall(get(b"/stop"))
            if life == "run_once":
                wait_for(lambda: running.fileno() < 0, running)
            else:
                getattr(running, life)()
            answer, = answers(client.recv(1000))
            assert answer.body == b"bye"
            running.stop()
        assert_free(port)
    running = httpd.Server(**LOCAL)
    running.start()
    stoppers = [threading.Thread(target=running.stop) for _ in range(8)]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(10)
    assert "httpd" not in threads()
    assert not any(stopper.is_alive() for stopper in stoppers)


def test_a_graceful_stop_lets_requests_finish(server, later):
    with connect(server) as client, connect(server) as idle, connect(server) as stuck:
        idle.send(get())
        client.sendall(post(b"abc")[:-1])
        stuck.sendall(b"G")
        wait_for(lambda: len(server.connections) == 3 and server.requests, server)
        server.start()
        stopper = threading.Thread(target=server.stop, args=(3,))
        stopper.start()
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")
        assert idle.recv(10) == b""
        with pytest.raises(OSError):
            connect(server)
        later(2)
        client.sendall(b"c")
        answer, = answers(read(client))
        assert answer.status == 200
        assert answer.headers["Connection"] == "close"
        later(2)
        stuck.sendall(b"E")  # the server notices what time it is
        stopper.join(10)
        assert not stopper.is_alive()
        with contextlib.suppress(ConnectionResetError):
            assert stuck.recv(10) == b""


def test_stop_does_not_wait_for_who_has_nothing_under_way(server):
    httpd.register_httpdcb("test", "large", large)
    with connect(server) as reader, connect(server) as refused:
        refused.send(b"\x00")
        reader.send(get(b"/large") * 8)
        wait_for(lambda: server.held and len(server.connections) == 2, server)
        server.start()
        start, stopper = time.monotonic(), threading.Thread(target=server.stop, args=(20,))
        stopper.start()
        read(reader)
        stopper.join(30)
        assert time.monotonic() - start < 10


def test_a_server_starts_once_and_can_be_stopped_before(server):
    with httpd.Server(**LOCAL) as running:
        for again in (running.start, running.run):
            with pytest.raises(RuntimeError):
                again()
        assert raw_get(running.port) == 200
    early = httpd.Server(**LOCAL)
    early.stop()
    early.run()
    early.run_once()
    assert early.timeout() is None
    assert early.fileno() == -1
    assert running.timeout() is None
    assert running.fileno() == -1
    httpd.register_httpdcb("test", "x", echo, None, lambda: pytest.fail("a server that does not serve"))
    idle = httpd.Server(**LOCAL)
    assert idle.port
    idle.stop()


def test_stop_from_another_thread_while_the_loop_is_somebody_elses(server):
    stopper = threading.Timer(0.1, server.stop, (5,))
    server.run_once(0)
    stopper.start()
    wait_for(lambda: server.fileno() < 0, server)
    stopper.join(10)
    assert not stopper.is_alive() and server.fileno() == -1


def test_a_handler_that_outlasts_a_stop_from_another_thread(server):
    """It was an AttributeError out of run_once(), into the foreign loop."""
    faults, begun = [], threading.Event()
    stopped = threading.Event()
    httpd.register_httpdcb("test", "begun", lambda request, page: begun.set() or stopped.wait(20) and 200)

    def loop():
        try:
            while server.fileno() >= 0:
                server.run_once(0.1)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=loop)
    assert server.port  # it listens, in this thread
    thread.start()
    with connect(server) as client:
        client.send(get(b"/echo"))  # so that the selector knows it
        assert client.recv(1000)
        client.send(get(b"/begun"))
        assert begun.wait(5)
        server.stop(0)
        stopped.set()
        thread.join(5)
    assert not thread.is_alive()
    assert faults == []


def test_a_stream_that_waits_is_called_once_more_at_stop():
    seen = []

    def flush(request, pos, buf):
        seen.append(request.stopping)
        if request.stopping:
            return httpd.END
        buf[:1] = b"x"
        return 0 if pos else 1

    httpd.register_httpdcb("test", "events", lambda request, page: 200, flush)
    httpd.register_httpdcb("test", "parked", lambda request, page: seen.append("parked") or httpd.SUSPEND)
    server = httpd.Server(**LOCAL)
    with connect(server) as client, connect(server) as parked:
        client.sendall(get(b"/events"))
        parked.sendall(get(b"/parked"))
        wait_for(lambda: len(seen) == 3, server)
        server.stop(30, wait=False)
        data, end = pump(server, client, ended)
        assert data.endswith(b"\r\n0\r\n\r\n") and end == "closed"
        assert seen.count("parked") == 1  # it waits for its resume(), as long as the grace lasts
        assert not server.run_once(0)
    server.stop(0)
    assert seen[-1] is True and server.run_once(0)


def test_stop_without_waiting():
    server = httpd.Server(**LOCAL)
    server.stop(wait=False)  # before it listens: it never will
    assert server.run_once(0)
    server = httpd.Server(**LOCAL)
    httpd.register_httpdcb("test", "h", lambda request, page: server.stop(wait=False))
    assert answers(exchange(server, get(b"/h"))[0])[0].status == 200
    wait_for(lambda: server.run_once(0))
    assert_free(server.port)


def test_a_loop_of_asyncio_ends_with_its_server():
    httpd.register_httpdcb("test", "h", lambda request, page: page.write("x"))
    server = httpd.Server(**LOCAL)

    async def serve():
        loop = asyncio.get_running_loop()
        loop.add_reader(server.fileno(), server.run_once, 0)
        descriptor = server.fileno()
        client = asyncio.ensure_future(loop.run_in_executor(None, raw_get, server.port, "127.0.0.1", get(b"/h")))
        client.add_done_callback(lambda done: server.stop(wait=False))
        while not server.run_once(0):
            await asyncio.sleep(0.01)
        loop.remove_reader(descriptor)
        return client.result()

    assert asyncio.run(asyncio.wait_for(serve(), 20)) == 200


def test_stop_answers_what_has_come_already():
    """While a handler runs, an idle client sends a request and a newcomer connects; then stop() is called."""
    begun = threading.Event()
    httpd.register_httpdcb("test", "slow", lambda request, page: begun.set() or time.sleep(0.3) or 204)
    httpd.register_httpdcb("test", "page", lambda request, page: 204)
    server = httpd.Server(**LOCAL)
    server.start()
    with connect(server) as first, connect(server) as idle:
        idle.sendall(get(b"/page"))
        assert idle.recv(1000).startswith(b"HTTP/1.1 204")
        first.sendall(get(b"/slow"))
        assert begun.wait(5)
        idle.sendall(get(b"/page"))
        with connect(server) as newcomer:
            newcomer.sendall(get(b"/page"))
            server.stop()
            for client in (first, idle, newcomer):
                assert client.recv(1000).startswith(b"HTTP/1.1 204")


def test_starts_and_stops_from_many_threads():
    for _ in range(30):
        server = httpd.Server(**LOCAL)
        server.port

        def start():
            with contextlib.suppress(RuntimeError):
                server.start()

        threads = [threading.Thread(target=call, daemon=True) for call in (start, start, server.stop, server.stop)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        server.stop(0)


def test_a_child_process_that_ends_leaves_its_parent_alone(tmp_path):
    """Both have the same epoll: what the child unregisters, the parent never hears again."""
    program = """
import os, sys, httpd
def handler(request, page):
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    page.write("parent")
    return 200
httpd.register_httpdcb("test", "h", handler)
with httpd.Server(ip="127.0.0.1", port=0) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        port = int(process.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            for _ in range(3):
                client.sendall(get(b"/h"))
                assert client.recv(1000).endswith(b"parent")
        process.stdin.close()
        assert process.wait(10) == 0


FORKS = """
import os, sys, threading, time, httpd
def answer(request, page):
    if os.fork() == 0:
        WHAT
    page.write("%d" % os.getpid())
httpd.register_httpdcb("test", "h", answer)
server = httpd.Server(ip="127.0.0.1", port=0)
print(server.port, os.getpid(), flush=True)
threading.Thread(target=lambda: sys.stdin.read() or server.stop(), daemon=True).start()
server.run()
"""


@table("what", [
    ("pass", "it answers too"),
    ("return httpd.SUSPEND", "it would be called again"),
    ("time.sleep(0.5)", "it lives longer than its parent"),
])
def test_a_child_of_a_handler_has_no_server(what):
    line = [sys.executable, "-c", FORKS.replace("WHAT", what)]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, cwd=HERE, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        port, parent = process.stdout.readline().split()
        with connect(port=int(port)) as client, connect(port=int(port)) as idle:
            idle.sendall(get(b"/none"))
            assert answers(read(idle, 1))[0].status == 404
            for _ in range(3):
                client.sendall(get(b"/h"))
                assert answers(read(client, 1))[0].body == parent
            process.stdin.close()
            assert read(idle) == b""  # nobody else holds it
            assert process.wait(10) == 0
        socket.create_server(("127.0.0.1", int(port))).close()
        errors = process.stderr.read().decode()
        assert errors.count("it must end by os._exit()") == 3, errors


def test_two_threads_that_are_the_first(server, monkeypatch):
    """Both would open a listener, and the port would not be the one that is served."""
    real, found = socket.socket.bind, []
    monkeypatch.setattr(socket.socket, "bind", lambda *address: time.sleep(0.1) or real(*address))
    both = [threading.Thread(target=lambda: found.append(server.port)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(5)
    assert found[0] == found[1]


def test_bind_errors_raise_in_the_caller(server):
    for start in (
        lambda server: server.start(),
        lambda server: server.run(),
        lambda server: server.port,
        lambda server: server.fileno(),
    ):
        with pytest.raises(
            OSError, match="cannot listen on 127.0.0.1 port %d: Address already in use" % server.port
        ) as error:
            start(httpd.Server(ip="127.0.0.1", port=server.port))
        assert error.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="cannot listen on 192.0.2.77 port"):
        httpd.Server(ip="192.0.2.77", port=0).start()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
@pytest.mark.parametrize("ip", ["", "*"])
def test_the_empty_ip_is_every_address_in_one_socket(server, ip):
    seen = []
    httpd.register_httpdcb(
        "test", "h", lambda request, page: seen.append((request.client[0], request.server[0])) or 200
    )
    with httpd.Server(ip=ip, port=0) as both:
        assert raw_get(both.port, "127.0.0.1", get(b"/h")) == 200
        assert raw_get(both.port, "::1", get(b"/h")) == 200
        assert both.url == "http://127.0.0.1:%d" % both.port
    assert seen == [("127.0.0.1", "127.0.0.1"), ("::1", "::1")]
    with httpd.Server(ip="::1", port=0) as one:
        assert one.url == "http://[::1]:%d" % one.port and raw_get(one.port, "::1") == 200


def test_no_name_is_ever_looked_up(server, monkeypatch):
    for name in ("getaddrinfo", "gethostbyaddr", "getnameinfo", "getfqdn", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, lambda *_: pytest.fail("a look-up"))
    assert exchange(server, get())[0].startswith(b"HTTP/1.1 200")


# Unix sockets


@pytest.fixture
def unix(tmp_path):
    """The path of a server's unix socket."""
    return str(tmp_path / "s")


def connect_unix(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(path)
    return client


def tell_peer(request, page):
    json.dump([request.client, request.server, request.peer_cred], page)


@table("values, client", [
    ({}, ["unix", 0], "no address, no port"),
    ({"max_connections_per_ip": 1}, ["unix", 0], "there is no address to count by"),
    ({"trusted_proxies": "unix:"}, ["192.0.2.7", 0], "a proxy on the machine speaks for others"),
    ({"trusted_proxies": "127.0.0.1"}, ["unix", 0], "another proxy is not this one"),
])
def test_who_is_at_the_other_end_of_a_unix_socket(unix, values, client):
    httpd.register_httpdcb("test", "h", tell_peer)
    with httpd.Server(**{**LOCAL, "ip": "unix:" + unix}, **values) as server:
        assert (server.url, server.port) == ("unix:" + unix, 0)
        with connect_unix(unix), connect_unix(unix) as second:
            second.sendall(get(b"/h", b"X-Forwarded-For: 192.0.2.7"))
            found = answers(read_some(second))[0].json()
        assert found == [client, ["unix", 0], [os.getpid(), os.getuid(), os.getgid()]]
        assert stat.S_IMODE(os.stat(unix).st_mode) == 0o660
    assert not os.path.exists(unix)


def read_some(client):
    data = b""
    while not is_due(data, 1):
        data += client.recv(1 << 20)
    return data


@table("path, version", [
    (b"/park", b"1.0", "HTTP/1.0 knows no 100 (Continue)"),
    (b"/waits", b"1.0", "nor in the middle of a stream"),
    (b"/waits", b"1.1", "there is no place for one"),
])
def test_a_client_of_a_unix_socket_that_has_gone_is_noticed(unix, path, version):
    """Its end is no error of the socket, and its epoll tells of it for ever."""
    httpd.register_httpdcb("test", "park", lambda request, page: httpd.SUSPEND)
    httpd.register_httpdcb("test", "waits", lambda request, page: 200, lambda request, pos, buf: 0)
    server = httpd.Server(ip="unix:" + unix)
    server.bind()
    with connect_unix(unix) as client:
        client.sendall(b"GET %s HTTP/%s\r\nHost: a\r\n\r\n" % (path, version))
        wait_for(lambda: [state(each) for each in server.connections] == ["suspended"], server)
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # what is not read would make its end a reset
            client.recv(1000)
    for _ in range(3):
        server.run_once(0.01)
    assert not server.connections and server.held == 0
    server.stop(0)


def test_tcp_has_no_peer_cred(server):
    httpd.register_httpdcb("test", "h", tell_peer)
    assert answers(exchange(server, get(b"/h"))[0])[0].json()[2] is None


def test_an_abstract_unix_socket_is_warned_of(caplog):
    name = "httpd-test-%d" % os.getpid()
    httpd.register_httpdcb("test", "echo", echo)
    with httpd.Server(port=0, ip="unix:@" + name) as server:
        assert server.url == "unix:@" + name
        assert "everybody on this machine may connect to unix:@" + name in caplog.text
        with connect_unix("\0" + name) as client:
            client.sendall(get())
            assert answers(read_some(client))[0].status == 200


def test_a_large_answer_to_a_unix_socket_at_the_readers_pace(unix):
    """What the reader takes earns time: nobody acknowledges bytes there. Many times the whole of conn_timeout."""
    httpd.register_httpdcb("test", "large", large)
    with httpd.Server(port=0, ip="unix:" + unix, conn_timeout=1) as server, connect_unix(unix) as client:
        client.sendall(get(b"/large"))
        size, limit = 0, time.monotonic() + 2.4
        while time.monotonic() < limit:
            time.sleep(0.02)
            size += len(client.recv(1000))
        client.shutdown(socket.SHUT_WR)
        while more := client.recv(1 << 20):
            size += len(more)
        assert size > 1000000
        assert server.counters.row[httpd.OUTPUT_TIMEOUTS] == 0


def test_a_silent_client_of_a_unix_socket_has_its_time(unix, later):
    """Nothing defers the accept there: its silence begins with it."""
    server = httpd.Server(port=0, ip="unix:" + unix, conn_timeout=1)
    assert server.url
    with connect_unix(unix) as client:
        wait_for(lambda: server.connections, server)
        later(0.9)
        server.run_once(0)
        client.sendall(get(b"/nothing"))
        assert pump(server, client)[0].startswith(b"HTTP/1.1 404 ")
    server.stop(0)


def leave_socket(path):
    """What a server leaves that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen(1)


def test_the_socket_of_a_dead_server_is_replaced_and_a_live_ones_refused(unix):
    leave_socket(unix)
    with httpd.Server(port=0, ip="unix:" + unix), pytest.raises(httpd.ConfigError, match="another program listens"):
        httpd.Server(port=0, ip="unix:" + unix).start()
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(unix)
        full.listen(0)
        with connect_unix(unix), pytest.raises(httpd.ConfigError, match="another program listens"):
            httpd.Server(port=0, ip="unix:" + unix).start()
        assert os.path.exists(unix)


def test_only_the_own_socket_is_removed_at_the_end(unix):
    with httpd.Server(port=0, ip="unix:" + unix):
        os.unlink(unix)
        leave_socket(unix)
    assert os.path.exists(unix)


@table("make, message", [
    (lambda path: open(path, "w").close(), "another program listens there, or it is no socket", "a file is kept"),
    (lambda path: os.mkdir(path), "another program listens there, or it is no socket", "a directory too"),
    (lambda path: os.rmdir(os.path.dirname(path)), "No such file or directory", "no directory"),
])
def test_what_is_no_place_for_a_unix_socket(tmp_path, make, message):
    (tmp_path / "d").mkdir()
    path = str(tmp_path / "d" / "s")
    make(path)
    before = os.path.exists(path)
    with pytest.raises(httpd.ConfigError, match="httpd: ip: cannot listen on unix:.*" + message):
        httpd.Server(port=0, ip="unix:" + path).start()
    assert os.path.exists(path) == before


def test_a_zone_that_is_none(server):
    with pytest.raises(httpd.ConfigError, match="httpd: ip: this machine has no interface nowhere0"):
        httpd.Server(port=0, ip="fe80::1%nowhere0").start()


# Deadlines


TIMEOUT_ROWS = [
    (b"", b"", "conn_timeout: an idle connection is closed silently"),
    (get(), b"HTTP/1.1 200", "conn_timeout: also after a request"),
    (b"GET /ec", b"HTTP/1.1 408", "request_timeout: the head"),
    (B + b"X: y\r\n", b"HTTP/1.1 408", "request_timeout: the fields"),
    (post(b"abc")[:-1], b"HTTP/1.1 408", "request_timeout: the content"),
    (chunked(b"3\r\nab"), b"HTTP/1.1 408", "request_timeout: chunks"),
    (b"\r\n", b"", "an empty line is no request"),
    (get() + b"GET", b"HTTP/1.1 200", "a request behind another"),
]


@table("raw, expected", TIMEOUT_ROWS)
def test_deadlines_hold_though_nothing_else_happens(later, raw, expected):  # OPENSIPS, never 6
    """timeout() says when the next turn is due, and that turn is enough."""
    httpd.register_httpdcb("test", "echo", echo, methods=("GET", "POST"))
    server = httpd.Server(**LOCAL, conn_timeout=20, request_timeout=20)
    with connect(server) as client:
        client.sendall(raw)
        wait_for(lambda: server.accepted, server)
        server.run_once(0.02)
        passed = 0
        while server.connections and passed < 30:
            passed += server.timeout()
            later(server.timeout())
            server.run_once(0)
        assert 10 < passed <= 26 and not server.connections
        data = read(client)
        assert data.startswith(expected)
        assert expected or not data
    server.stop(0)


def drip(server, later, *pieces):
    """Send a piece each second, until an answer comes."""
    with connect(server) as client:
        for piece in pieces:
            client.send(piece)
            data, _ = pump(server, client, 0)
            if data:
                return data
            later(1)


def test_a_head_that_drips_is_cut_off(server, later):
    assert drip(server, later, B + b"X: ", *[b"y"] * 100).startswith(b"HTTP/1.1 408")


def test_an_upload_that_drips_is_cut_off(server, later):
    httpd.register_httpdcb("test", "sink", lambda request, page: 200, upload_data_cb=lambda request, data: None)
    head = b"POST /sink HTTP/1.1\r\n" + HOST + b"Content-Length: 5000000\r\n\r\n"
    assert drip(server, later, head, *[b"x"] * 160).startswith(b"HTTP/1.1 408")


def test_a_408_is_followed_by_an_orderly_end(server, later):
    with connect(server) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        wait_for(lambda: server.connections, server)
        connection, = server.connections
        later(server.params.request_timeout + 1)
        wait_for(lambda: state(connection) != "receive_head", server)
        assert state(connection) == "linger"


def test_a_reader_that_takes_nothing_is_closed(server, later):
    httpd.register_httpdcb("test", "large", large)
    with connect(server) as client:
        client.sendall(get(b"/large") * 40)
        wait_for(lambda: server.held, server)
        while server.connections:
            later(server.params.conn_timeout)
            server.run_once(0.02)
        assert server.held == 0


def test_a_time_out_behind_answers_that_nobody_reads_ends_that_connection_only(server, later):
    httpd.register_httpdcb("test", "large", large)
    with connect(server) as client:
        client.sendall(get(b"/large") * 10 + post(b"x" * 900)[:-100])
        wait_for(lambda: server.held, server)
        while server.connections:
            later(server.params.conn_timeout)
            server.run_once(0.02)
        assert answers(exchange(server, get(b"/large"))[0])[0].status == 200


def test_content_that_comes_with_the_head_earns_time_too(server):
    with connect(server) as client:
        client.send(P + b"Content-Length: 1024\r\n\r\n" + b"x" * 1000)
        server.run_once(0.1)
        server.run_once(0.1)
        connection, = server.connections
        assert connection.deadline - server.now > server.params.request_timeout + 1000 / 500 - 1


def test_who_has_sent_in_time_is_served_though_a_handler_was_slow(server, later):
    httpd.register_httpdcb("test", "slow", lambda request, page: later(100) or 200)
    with connect(server) as slow, connect(server) as kept, connect(server) as half:
        kept.send(get())
        half.send(get()[:20])
        assert pump(server, kept)[0].startswith(b"HTTP/1.1 200")
        wait_for(lambda: len(server.connections) == 2, server)
        slow.send(get(b"/slow"))
        wait_for(lambda: server.requests == 2, server)
        kept.send(get())
        half.send(get()[20:])
        for client in (kept, half):
            assert pump(server, client)[0].startswith(b"HTTP/1.1 200")


def test_connections_that_are_late_together_are_closed_in_parts(server, later):
    with contextlib.ExitStack() as stack:
        for _ in range(250):
            client = stack.enter_context(connect(server))
            client.send(get())
        wait_for(lambda: server.requests == 250, server)
        later(server.params.conn_timeout + 1)
        wait_for(lambda: len(server.connections) <= 150, server)
        assert len(server.connections) == 150
        assert server.timeout() == 0
        wait_for(lambda: not server.connections, server)


def test_timeout_says_when_run_once_is_due(server):
    server.run_once(0)
    assert server.timeout() is None
    with connect(server) as client:
        client.send(b"G")
        server.run_once(0.1)
        assert 0 <= server.timeout() <= 1


def test_run_once_says_when_all_is_over(server):
    assert server.run_once(0) is False
    with connect(server) as client:
        client.sendall(get())
        assert answers(pump(server, client)[0])[0].status == 200
        server.call_later(0, lambda: server.stop(5))
        wait_for(lambda: server.run_once(0.01), None)
        assert client.recv(10) == b"" and server.run_once(0) is True


def test_run_once_in_a_handler_is_an_error(server):
    told = []

    def handler(request, page):
        with pytest.raises(RuntimeError, match="called by what it runs"):
            server.run_once(0)
        told.append(1)
        return 204

    httpd.register_httpdcb("test", "h", handler)
    assert answers(exchange(server, get(b"/h"))[0])[0].status == 204 and told == [1]


def test_what_the_loop_is_asked_to_call(server, caplog):
    """watch() and call_later(): once, in order, not after close(), and no exception ends anything."""
    called = []
    ours, theirs = socket.socketpair()
    watch = server.watch(ours, lambda: called.append(ours.recv(10)))
    with pytest.raises(ValueError, match="is watched already"):
        server.watch(ours, print)
    server.call_later(0.02, lambda: called.append("second"))
    server.call_later(0, lambda: called.append("first"))
    server.call_later(0.01, lambda: called.append("never")).close()
    server.call_later(0, raising(SystemExit()))
    server.call_later(40 * 86400, print)  # more than epoll can wait
    theirs.send(b"x")
    wait_for(lambda: len(called) == 3, server)
    assert called.index("first") < called.index("second") and b"x" in called and "SystemExit" in caplog.text
    watch.close()
    watch.close()
    theirs.send(b"y")
    server.run_once(0.01)
    assert len(called) == 3 and server.timeout() <= 86400
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError):
            server.call_later(wrong, print)
    for call in (lambda: server.call_later(1, None), lambda: server.watch(theirs, None)):
        with pytest.raises(TypeError):
            call()
    ours.close()
    theirs.close()


def test_a_watched_file_that_was_closed_harms_nobody(server, caplog):
    ours, theirs = socket.socketpair()
    server.watch(ours, print)
    ours.close()
    theirs.close()
    for _ in range(3):  # one of them gets the number
        assert answers(exchange(server, get())[0])[0].status == 200


# Room


def test_the_longest_idle_connection_makes_room():
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(**LOCAL, max_connections=3)
    clients = []
    for _ in range(3):
        clients.append(connect(server))
        clients[-1].send(get())
        assert pump(server, clients[-1])[1] == "open"
    clients[0].send(get())  # so the second is the one that has been idle longest
    pump(server, clients[0])
    clients.append(connect(server))
    clients[-1].send(get())
    assert pump(server, clients[-1])[0].startswith(b"HTTP/1.1 200")
    assert [pump(server, client, 0)[1] for client in clients] == ["open", "closed", "open", "open"]
    for client in clients:
        client.close()
    server.stop(0)


@pytest.mark.parametrize("raw", [b"", b"GET", post(b"abc")[:-1]], ids=["silent", "in the head", "in the content"])
def test_stuck_clients_do_not_keep_a_newcomer_out(raw, later):
    httpd.register_httpdcb("test", "echo", echo)
    server = httpd.Server(**LOCAL, max_connections=100)
    clients = [connect(server) for _ in range(100)]
    for client in clients:
        client.send(raw)
    wait_for(lambda: not raw or len(server.connections) == 100, server)
    assert len(server.connections) == (100 if raw else 0)  # the kernel keeps the silent ones for a while
    later(1.1)  # who is a second behind may have to go
    for _ in range(3):
        data, end = exchange(server, get())
        assert data.startswith(b"HTTP/1.1 200") and len(server.connections) <= 100
    for client in clients:
        client.close()
    server.stop(0)


def test_max_connections_is_never_exceeded(server):
    httpd.register_httpdcb("test", "park", lambda request, page: httpd.SUSPEND)
    small = httpd.Server(**LOCAL, max_connections=5)
    clients, statuses = [], []
    for _ in range(40):
        client = connect(small)
        client.sendall(get(b"/park"))
        clients.append(client)
        wait_for(lambda: small.accepted == len(clients), small)
        assert len(small.connections) <= 5 + httpd.TURNED_AWAY
    for client in clients:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            statuses.append(client.recv(1000)[9:12])
    assert statuses == [b"503"] * 35
    for client in clients:
        client.close()
    small.stop(0)


def test_out_of_descriptors_without_spinning(server, caplog):
    """EMFILE: idle connections make room; when there are none the server waits, without spinning, and then goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server.run_once(0)
    with connect(server) as client:
        client.send(get())
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            assert turns_in(server, 0.5) < 5
            assert "nobody is taken in for a second" in caplog.text
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wait_for(lambda: server.requests, server)


def test_memory_is_bounded_under_slow_readers_and_slow_senders():
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * page_size) and 200)
    server = httpd.Server(**LOCAL, memory_budget=2**21, buf_size=2**18, post_buf_size=2**17)
    page_size = server.params.buf_size
    clients = [connect(server) for _ in range(60)]
    statuses = set()
    for number, client in enumerate(clients):  # some read nothing, some do not finish their content, some their head
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(
            [get(b"/large") * 40, P + b"Content-Length: 131072\r\n\r\n" + b"x" * 131000, B + b"X: " + b"y" * 16000][
                number % 3
            ]
        )
    for _ in range(300):
        server.run_once(0)
        assert server.held <= server.params.held_size
    assert server.held > server.params.held_size // 2
    for client in clients:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            statuses.add(client.recv(100)[:12])
    assert b"HTTP/1.1 503" in statuses
    with connect(server) as newcomer:  # whoever needs no memory is served
        newcomer.sendall(get(b"/nowhere"))
        assert pump(server, newcomer)[0].startswith(b"HTTP/1.1 404")
    for client in clients:
        client.close()
    wait_for(lambda: not server.connections, server)
    assert server.held == 0
    server.stop(0)


def test_who_starves_makes_room_for_who_sends(later):
    """memory_budget full of contents that do not come: after a second they get 408, and others are served."""
    httpd.register_httpdcb("test", "echo", echo, methods=("POST",))
    server = httpd.Server(**LOCAL, memory_budget=2**17, receive_buf_size=1024)
    crowd = [connect(server) for _ in range(60)]
    for client in crowd:
        client.sendall(post(b"x" * 1000)[:-1])
    wait_for(lambda: server.accepted == len(crowd) and not server.room.spare() > 1500, server)
    later(3.2)  # 1000 bytes have earned two seconds
    raw = post(b"y" * 900)
    assert answers(exchange(server, raw[:-1], raw[-1:])[0])[0].status == 200
    for client in crowd:
        client.close()
    wait_for(lambda: not server.connections, server)
    assert server.held == 0
    server.stop(0)


def test_a_client_that_connects_and_closes_upsets_nothing(server):
    for _ in range(50):
        connect(server).close()
    server.run_once(0)
    data, end = exchange(server, get())
    assert data.startswith(b"HTTP/1.1 200")
    assert {state(connection) for connection in server.connections} <= {"idle"}


def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


LONE_ROWS = [
    (get(b"/empty"), 1, "an answer without content"),
    (get(b"/large"), 1, "16 kB and more"),
    (get() * 5, 5, "pipelined requests"),
    (get()[:20], 0, "the first of two segments"),
]


@table("raw, count", LONE_ROWS)
def test_a_lone_request_needs_nobody_else(server, raw, count):  # OPENSIPS, never 1
    httpd.register_httpdcb("test", "empty", lambda request, page: 200)
    httpd.register_httpdcb("test", "large", lambda request, page: page.write(b"x" * 500000) and 200)
    with server, connect(server) as client:
        client.sendall(raw)
        if not count:
            time.sleep(0.01)
            client.sendall(get()[20:])
            count = 1
        assert [answer.status for answer in answers(read(client, count))] == [200] * count


def test_floods_leave_memory_and_descriptors_where_they_were(server):  # OPENSIPS, never 3 and 6
    def flood(count):
        with connect(server) as client:
            for method in (b"HEAD", b"PUT", b"OPTIONS"):
                raw = get().replace(b"GET", method) * 25
                for _ in range(count // 75):
                    client.sendall(raw)
                    pump(server, client, lambda data: data.count(b"HTTP/1.1 ") == 25)
        for _ in range(count):
            connect(server).close()
            server.run_once(0)
        for _ in range(count // 1000):
            clients = [connect(server) for _ in range(100)]
            for number, client in enumerate(clients):
                client.send([b"GET /echo HT", B + b"X: y", post(b"abc")[:-1]][number % 3])
            wait_for(lambda: len(server.connections) == 100, server)
            for client in clients:
                client.close()
            wait_for(lambda: not server.connections, server)

    flood(1000)
    memory, open_files = resident(), descriptors()
    flood(4000)
    assert descriptors() == open_files
    assert not server.connections
    assert server.held == 0
    assert resident() - memory < 200000


# Costs


COST_ROWS = [
    (lambda number: get(b"/h"), 1, 7, "the same GET again"),
    (lambda number: get(b"/h?%d" % number), 1, 11, "a new URL"),
    (lambda number: get(b"/h", b"X-Unique: %d" % number), 1, 18, "a field never seen before"),
    (lambda number: get(b"/h") * 16, 16, 70, "16 pipelined ones"),
    (lambda number: post(b'{"jsonrpc":"2.0","method":"none","id":1}', b"Content-Type: application/json", path=b"/mi"),
     1, 31, "JSON-RPC"),
    (lambda number: post(b"x" * 400, path=b"/h"), 1, 14, "a POST"),
    (lambda number: get(b"/w"), 1, 41, "WSGI"),
]


@table("raw, count, calls", COST_ROWS)
def test_what_a_request_costs(server, raw, count, calls):
    """One poll, one recv, one send, and few calls of our own functions: a slow change is noticed here."""
    httpd.register_httpdcb("test", "h", lambda request, page: page.write(b"Hello, world!\n") and 200)
    httpd.register_wsgi("test", "w", lambda environ, start_response: start_response("200 OK", []) and [b"Hello"])
    httpd.register_mi("none", lambda: None)
    httpd.loadmodule("mi_http")
    with connect(server) as client:
        for number in range(4):
            client.sendall(raw(number))
            pump(server, client, count)
        with counted_calls() as (idle, _):
            server.run_once(0)
        client.sendall(raw(4))
        system = []
        while "recv" not in system:  # until the kernel has brought it
            with counted_calls() as (own, system):
                server.run_once(1)
        assert client.recv(65536).count(b"HTTP/1.1 200 OK") == count
    assert sorted(system) == ["poll", "recv", "send"]
    assert len(own) - len(idle) <= calls, own


def test_what_a_request_over_tls_costs(pki):
    httpd.register_httpdcb("test", "h", lambda request, page: page.write(b"Hello, world!\n") and 200)
    server = httpd.Server(**LOCAL, tls_cert_file=pki / "ec.pem", tls_key_file=pki / "ec.key")
    with connect_tls(server, client_context()) as client:
        pull = client.pull
        client.pull = lambda: server.run_once(0.05) or pull()
        for _ in range(4):
            assert client.ask(get(b"/h"))[0].status == 200
        with counted_calls() as (idle, _):
            server.run_once(0)
        client.say(get(b"/h"))
        system = []
        while "read" not in system:
            with counted_calls("read", "write") as (own, system):
                server.run_once(1)
    assert sorted(system) == ["poll", "read", "write"]
    assert len(own) - len(idle) <= 8, own
    server.stop(0)


# ----------------------------------------------------------------------------------------------------------------- TLS

SUFFIXES = {
    "G": "AES256-GCM-SHA384",
    "g": "AES128-GCM-SHA256",
    "P": "CHACHA20-POLY1305",
    "C": "AES256-CCM",
    "c": "AES128-CCM",
    "S": "AES256-SHA",
    "s": "AES128-SHA",
    "8": "AES256-CCM8",
    "3": "AES256-SHA384",
    "2": "AES256-SHA256",
    "1": "AES128-SHA256",
}


SUITES13 = {"G": "TLS_AES_256_GCM_SHA384", "P": "TLS_CHACHA20_POLY1305_SHA256", "g": "TLS_AES_128_GCM_SHA256"}
EXCHANGES = {"E": "ECDHE-ECDSA-", "R": "ECDHE-RSA-", "-": ""}


STRONG, ALL = "384 521 8192", "256 384 521 X25519 X448 2048 3072 4096 6144 8192"


MIXED = "384 521 8192 256 X25519 X448 2048 3072 4096 6144"


NORMAL, SECURE128 = "E:GPCSgcs R:GPSgs -:GCSgcs", "E:GPSCgsc R:GPSgs -:GSCgsc"


NOTHING, OPENSSL = (
    "leaves nothing of TLS 1.2 and 1.3",
    "if it is OpenSSL's language, write it in GnuTLS', for example NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2",
)


# What GnuTLS 3.7.9 makes of them (gnutls-cli -l --priority), less TLS 1.1, 1.0, DHE and the CCM of TLS 1.3:
# versions, suites of TLS 1.2 and of 1.3, groups; or the error.
PRIORITY_ROWS = [
    ("SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2", "2", "E:GPC R:GP -:GC", "", STRONG),
    ("SECURE256:-VERS-TLS-ALL:+VERS-TLS1.2", "2", "E:GPC R:GP -:GC", "", STRONG),
    ("SECURE256:+SECURE128", "23", SECURE128, "GPg", MIXED),
    ("SECURE256:+SECURE128:-VERS-TLS-ALL:+VERS-TLS1.2", "2", SECURE128, "", MIXED),
    ("SECURE128:-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1:-VERS-DTLS-ALL:-CIPHER-ALL:-MAC-ALL:-KX-ALL"
     ":+AEAD:+ECDHE-ECDSA:+ECDHE-RSA:+AES-128-GCM"
     ":+CHACHA20-POLY1305:+AES-256-GCM",
     "23", "E:gPG R:gPG", "gPG", ALL),
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
    ("NONE:-KX-ALL:NORMAL:+VERS-TLS1.2", "2", NORMAL, "", ALL),  # after NONE, a bare level adds
    ("+AES-128-CBC:SUITEB192", "2", "E:G", "", "384"),  # the first bare level replaces
    ("+SUITEB192:NORMAL:-VERS-TLS1.3", "2", NORMAL, "", ALL),  # also what a level with a sign had
    ("SUITEB192:NORMAL", "2", NORMAL, "", "384 256 521 X25519 X448 2048 3072 4096 6144 8192"),  # a later one adds
    ("SUITEB192:+AES-256-CCM-8:+AES-256-CBC:+SHA384:+SHA256:+RSA", "2", "E:G83 -:G82", "", "384"),
    ("SUITEB192: +AES-128-CBC: +SHA256", "2", "E:G1", "", "384"),  # blanks after a colon
    # no ECDHE without a curve
    ("NORMAL:-VERS-ALL:+VERS-TLS1.2:-GROUP-ALL:+GROUP-DH-ALL", "2", "-:GCSgcs", "", "2048 3072 4096 6144 8192"),
    ("NORMAL:-GROUP-ALL", "2", "-:GCSgcs", "", ""),  # no TLS 1.3 without a group
    ("NORMAL:-CURVE-ALL:+CURVE-X25519", "23", NORMAL, "GPg", "X25519"),
    ("NORMAL:-GROUP-EC-ALL:+GROUP-SECP521R1:!GROUP-DH-ALL", "23", NORMAL, "GPg", "521"),
    ("NORMAL:-KX-ALL", "3", "", "GPg", ALL),
    ("NORMAL:-MAC-ALL:+SHA1", "2", "E:Ss R:Ss -:Ss", "", ALL),  # TLS 1.3 is AEAD only
    ("NORMAL:%NO_EXTENSIONS", "2", NORMAL, "", ALL),
    ("SECURE256:+SECURE192:+PFS:-SHA1", "23", "E:GPCgc R:GPg -:GCgc", "GPg", MIXED),
    ("", 'tls_ciphers item 1, "": is empty'),
    # but blanks before it are part of the word
    ("NORMAL :-RSA", 'item 1, "NORMAL ": is unknown, did you mean "NORMAL"?'),
    ("NORMAL:-NORMAL", 'item 2, "-NORMAL": is unknown'),
    ("NORMAL:NONE", 'item 2, "NONE": needs + or -, or to be first'),
    ("NORMAL:+NONE", 'item 2, "+NONE": is unknown'),
    ("NORML", 'item 1, "NORML": is unknown, did you mean "NORMAL"?'),
    ("NORMAL:RSA", 'item 2, "RSA": needs + or -'),
    ("NORMAL:+ECDHE", 'item 2, "+ECDHE": is unknown'),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.4", 'item 3, "+VERS-TLS1.4": is unknown, did you mean "VERS-TLS1.3"?'),
    # GnuTLS compares but the beginning
    ("NORMAL:-VERS-ALLX", 'item 2, "-VERS-ALLX": is unknown, did you mean "VERS-ALL"?'),
    ("NORMAL:%server_precedence", 'item 2, "%server_precedence": is unknown'),
    ("NORMAL:%PROFILE_HIGH", 'item 2, "%PROFILE_HIGH": is unknown, or cannot be enforced'),
    ("NORMAL:%FORCE_ETM", "cannot be enforced with Python's ssl: leave it out"),
    ("@SYSTEM", 'item 1, "@SYSTEM": there is no system priority file here'),
    ("@SECLEVEL=2", OPENSSL),
    ("ALL", OPENSSL),
    ("kEECDH", OPENSSL),
    ("TLS_AES_256_GCM_SHA384", OPENSSL),
    ("EECDH+AESGCM", OPENSSL),
    ("NORMAL:!aNULL", 'item 2, "!aNULL": is unknown; ' + OPENSSL),
    ("NORMAL:@SECLEVEL=0", 'item 2, "@SECLEVEL=0": is unknown; ' + OPENSSL),
    ("NORMAL:+NULL", 'item 2, "+NULL": is refused'),
    ("NORMAL:+ANON-DH", 'item 2, "+ANON-DH": is refused'),
    ("NORMAL:+ANON-ECDH", 'item 2, "+ANON-ECDH": is refused'),
    ("NORMAL:+PSK", 'item 2, "+PSK": is refused'),
    ("NORMAL:+DHE-PSK", 'item 2, "+DHE-PSK": is refused'),
    ("NORMAL:+ECDHE-PSK", 'item 2, "+ECDHE-PSK": is refused'),
    ("NORMAL:+RSA-PSK", 'item 2, "+RSA-PSK": is refused'),
    ("NORMAL:+SRP", 'item 2, "+SRP": is refused'),
    ("NORMAL:+SRP-RSA", 'item 2, "+SRP-RSA": is refused'),
    ("NORMAL:+SRP-DSS", 'item 2, "+SRP-DSS": is refused'),
    ("NORMAL:+RSA-EXPORT", 'item 2, "+RSA-EXPORT": is refused'),
    ("NORMAL:+ARCFOUR-40", 'item 2, "+ARCFOUR-40": is refused'),
    ("NORMAL:-NULL", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-ANON-DH", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-PSK", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-SRP", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-RSA-EXPORT", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-ARCFOUR-128", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-3DES-CBC", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-MD5", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-VERS-SSL3.0", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-SIGN-RSA-MD5", "23", NORMAL, "GPg", ALL),
    ("NORMAL:-VERS-ALL:+VERS-DTLS1.2", NOTHING),
    ("NORMAL:-VERS-TLS1.3:-KX-ALL:+DHE-RSA", NOTHING),
    ("NORMAL:-CIPHER-ALL:+CAMELLIA-128-GCM", NOTHING),
    ("NORMAL:-SIGN-ALL", NOTHING),
    ("NORMAL:-AES-256-GCM",
     "cannot offer only TLS_CHACHA20_POLY1305_SHA256 and TLS_AES_128_GCM_SHA256 for TLS 1.3: enable"),
    ("NORMAL:-CHACHA20-POLY1305", "cannot offer only TLS_AES_256_GCM_SHA384 and TLS_AES_128_GCM_SHA256 for TLS 1.3"),
    ("SECURE128:-CIPHER-ALL:+AES-128-GCM", "cannot offer only TLS_AES_128_GCM_SHA256 for TLS 1.3"),
    ("SECURE128:-CIPHER-ALL:+AES-256-GCM", "23", "E:G R:G -:G", "G", ALL),
]


ACCEPTED = [row for row in PRIORITY_ROWS if len(row) == 5]


def group_name(text):
    if text.startswith("X"):
        return text
    return ("SECP%sR1" if len(text) == 3 else "FFDHE%s") % text


def expected_plan(versions, suites, suites13, groups):
    parts = [part.split(":") for part in suites.split()]
    return (
        tuple("TLSv1." + v for v in versions),
        tuple(EXCHANGES[exchange] + SUFFIXES[letter] for exchange, letters in parts for letter in letters),
        tuple(SUITES13[letter] for letter in suites13),
        tuple(map(group_name, groups.split())),
    )


@pytest.mark.parametrize(
    "text, expected", [(row[0], row[1:]) for row in PRIORITY_ROWS], ids=[repr(row[0])[:70] for row in PRIORITY_ROWS]
)
def test_priority(text, expected):
    if len(expected) == 1:
        with pytest.raises(httpd.ConfigError, match=re.escape(expected[0])):
            httpd.tls_priority(text)
    else:
        assert httpd.tls_priority(text)[:4] == expected_plan(*expected)


ONE_GROUP = "groups: before Python 3.15, which can set several, only "
SIGNATURES = "signatures: as OpenSSL likes, Python's ssl cannot restrict them"


BOTH, OLD = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2"


PLAN_ROWS = [
    ("NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2", False, True, [ONE_GROUP + "SECP256R1"],
     "the recommended string loses the other groups"),
    ("SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2", False, True, [SIGNATURES, ONE_GROUP + "SECP384R1"],
     "OpenSIPS' default"),
    ("NORMAL", False, True, ["TLS1.1: skipped, too old or no suite left", "TLS1.0: skipped, too old or no suite left",
                            ONE_GROUP + "SECP256R1"],
     "old protocols"),
    ("SECURE128:-VERS-TLS1.1:-VERS-TLS1.0:%SERVER_PRECEDENCE", True, True, [ONE_GROUP + "SECP256R1"],
     "server preference"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.3:-AES-128-GCM", True, True, [ONE_GROUP + "SECP256R1"],
     "two of three TLS 1.3 suites need server preference"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:%NO_TICKETS", False, False, [], "no tickets"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:%NO_TICKETS_TLS12", False, False, [], "no tickets for TLS 1.2: none at all"),
    ("PFS:-VERS-ALL:+VERS-TLS1.2", False, False, [], "forward secrecy: no tickets"),
    ("SECURE128:+PFS:-VERS-ALL:+VERS-TLS1.2", False, False, [], "wherever it stands"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:-CIPHER-AES-128-CBC", False, True,
     ['item 4, "-CIPHER-AES-128-CBC": ignored, as by GnuTLS, did you mean "AES-128-CBC"?'], "an ignored family"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:+3DES-CBC:+ARCFOUR-128:-MD5", False, True,
     ['item 4, "+3DES-CBC": skipped, Python\'s ssl has nothing of the kind',
      'item 5, "+ARCFOUR-128": skipped, Python\'s ssl has nothing of the kind'],
     "skipped ciphers"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:-SIGN-RSA-SHA1", False, True, [SIGNATURES], "signatures"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.2:-GROUP-DH-ALL", False, True, [], "FFDHE is no matter in TLS 1.2"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.3:-GROUP-DH-ALL", False, True, [ONE_GROUP + "SECP256R1"],
     "but in TLS 1.3, where OpenSSL's default has it"),
    ("SECURE128:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-GROUP-EC-ALL", False, True,
     ["TLS1.3: skipped, too old or no suite left"], "FFDHE alone"),
]


@table("text, preference, tickets, notes", PLAN_ROWS)
def test_plan(text, preference, tickets, notes):
    plan = httpd.tls_priority(text)
    assert (plan.server_preference, plan.tickets, list(plan.notes)) == (preference, tickets, notes)


def test_mutated_priority_strings():
    """A plan or ConfigError, whatever the text, in time that grows with its length."""
    chance = random.Random(7)
    for _ in range(1000):
        text = list(chance.choice(PRIORITY_ROWS)[0] + ":" + chance.choice(PRIORITY_ROWS)[0])
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(text) + 1)
            text[place:place + chance.randrange(3)] = chance.choice(
                [":", "+", "-", "!", "%", "@", " ", "\n", "\0", "A", "\u017f", "\u00df", "ALL", "::", ""]
            )
        try:
            plan = httpd.tls_priority("".join(text))
        except httpd.ConfigError as error:
            assert str(error).startswith("tls_ciphers")
        else:
            assert plan.versions and (plan.ciphers or plan.suites13)


def test_what_takes_long_to_import_is_imported_by_who_needs_it():
    """Plain HTTP does not pay for TLS, nor does reading a priority string."""
    slow = {"ssl", "inspect", "argparse", "subprocess", "tempfile", "hashlib"}
    code = "import sys, httpd; httpd.tls_priority('NORMAL'); print(*%r.intersection(sys.modules))" % slow
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=HERE, capture_output=True).stdout == b"\n"


# Files


def openssl(*words, cwd):
    quiet = subprocess.DEVNULL
    subprocess.run(["openssl", *words], cwd=cwd, check=True, stdin=quiet, stdout=quiet, stderr=quiet)


def context_of(pki, text, cert, key="", ca=""):
    name = cert.partition(".")[0]
    return httpd.tls_context(
        httpd.tls_priority(text), str(pki / cert), str(pki / (key or name + ".key")), ca and str(pki / ca)
    )


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    """A directory of certificates and keys, made by the openssl command."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    here = tmp_path_factory.mktemp("pki")
    run = functools.partial(openssl, cwd=here)
    elliptic = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]

    def make(name, kind):
        files = ["-keyout", name + ".key", "-out", name + ".pem"]
        run("req", "-x509", "-newkey", *kind, "-nodes", *files, "-subj", "/CN=" + name, "-days", "2")
        run("req", "-new", "-key", name + ".key", "-out", name + ".csr", "-subj", "/CN=" + name)

    kinds = {"rsa": ["rsa:2048"], "other": ["rsa:2048"], "weak": ["rsa:1024"], "ec": elliptic, "ca": elliptic}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(make, kinds, kinds.values()))
    run("x509", "-req", "-in", "ec.csr", "-signkey", "ec.key", "-days", "-1", "-out", "expired.pem")
    signer = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    run("x509", "-req", "-in", "other.csr", *signer, "-days", "2", "-out", "client.pem")
    secret = ["-aes128", "-passout", "pass:secret"]
    run("pkey", "-in", "rsa.key", *secret, "-out", "encrypted.key")
    run("rsa", "-in", "rsa.key", *secret, "-traditional", "-out", "traditional.key")
    run("x509", "-in", "rsa.pem", "-outform", "der", "-out", "der.pem")
    contents = {path.name: path.read_bytes() for path in here.iterdir()}
    (here / "both.pem").write_bytes(contents["rsa.pem"] + contents["rsa.key"])
    (here / "chain.pem").write_bytes(contents["client.pem"] + contents["ca.pem"])
    (here / "cut.pem").write_bytes(contents["rsa.pem"][:500])
    (here / "empty.pem").write_bytes(b"")
    for path in here.iterdir():
        path.chmod(0o600)
    shutil.copy(here / "rsa.key", here / "open.key")
    (here / "open.key").chmod(0o644)
    return here


FILE_ROWS = [
    (BOTH, "rsa.pem", "rsa.key", "", "", "", "RSA"),
    (BOTH, "ec.pem", "ec.key", "", "", "", "ECDSA"),
    (OLD, "ec.pem", "ec.key", "", "", "", "ECDSA of P-256, though the group is P-384"),
    (BOTH, "chain.pem", "other.key", "", "", "", "a chain"),
    (BOTH, "both.pem", "both.pem", "", "", "", "certificate and key in one file"),
    (BOTH, "rsa.pem", "rsa.key", "ca.pem", "", "", "client certificates"),
    (BOTH, "rsa.pem", "open.key", "", "", "tls_key_file: {}/open.key can be read by everybody: chmod o-r",
     "a key that everybody can read"),
    (BOTH, "expired.pem", "ec.key", "", "",
     "tls_cert_file: {}/expired.pem: clients will refuse it: certificate has expired", "an expired certificate"),
    (BOTH, "none.pem", "rsa.key", "", "tls_cert_file: {}/none.pem cannot be read: No such file or directory", "",
     "no certificate"),
    (BOTH, "rsa.pem", "none.key", "", "tls_key_file: {}/none.key cannot be read: No such file or directory", "",
     "no key"),
    (BOTH, "", "rsa.key", "", "tls_cert_file: {} cannot be read: Is a directory", "", "a directory"),
    (BOTH, "rsa.pem", "a\0b", "", "tls_key_file: {}/a\0b cannot be read: embedded null byte", "",
     "a name that no file has"),
    (BOTH, "der.pem", "rsa.key", "",
     "tls_cert_file: {}/der.pem has no BEGIN CERTIFICATE: is it the right file, in PEM?", "", "DER"),
    (BOTH, "rsa.pem", "rsa.pem", "",
     "tls_key_file: {}/rsa.pem has no BEGIN PRIVATE KEY: is it the right file, in PEM?", "", "a certificate as key"),
    (BOTH, "rsa.key", "rsa.key", "", "tls_cert_file: {}/rsa.key has no BEGIN CERTIFICATE", "", "a key as certificate"),
    (BOTH, "rsa.pem", "encrypted.key", "",
     "tls_key_file: {}/encrypted.key is encrypted: remove the password with `openssl pkey`", "", "an encrypted key"),
    (BOTH, "rsa.pem", "traditional.key", "", "tls_key_file: {}/traditional.key is encrypted", "",
     "encrypted the old way"),
    (BOTH, "rsa.pem", "other.key", "",
     "tls_cert_file {0}/rsa.pem with tls_key_file {0}/other.key: the key does not belong to the certificate", "",
     "another's key"),
    (BOTH, "rsa.pem", "ec.key", "", "the key does not belong to the certificate", "", "a key of another type"),
    (BOTH, "cut.pem", "rsa.key", "", "tls_cert_file {0}/cut.pem with tls_key_file {0}/rsa.key: damaged? OpenSSL says",
     "", "half a certificate"),
    (BOTH, "weak.pem", "weak.key", "", "the key is too weak: make one of RSA with 2048 bits", "", "1024 bits"),
    ("SUITEB128", "rsa.pem", "rsa.key", "",
     "no client could connect: tls_ciphers has no suite for the certificate's type of key", "",
     "suites for ECDSA, key for RSA"),
    ("NORMAL:-KX-ALL:+RSA:-VERS-TLS1.3", "ec.pem", "ec.key", "", "no client could connect", "",
     "suites for RSA, key for ECDSA"),
    ("SUITEB128:+VERS-TLS1.3:+GROUP-ALL:+CIPHER-ALL", "rsa.pem", "rsa.key", "", "", "", "which TLS 1.3 does not mind"),
    (BOTH, "rsa.pem", "rsa.key", "none.pem", "tls_ca_file: {}/none.pem cannot be read", "", "no CA"),
    (BOTH, "rsa.pem", "rsa.key", "empty.pem", "tls_ca_file: {}/empty.pem has no BEGIN CERTIFICATE", "",
     "an empty CA file"),
    (BOTH, "rsa.pem", "rsa.key", "cut.pem", "tls_ca_file {}/cut.pem: damaged? OpenSSL says", "", "half a CA"),
]


@table("text, cert, key, ca, error, warning", FILE_ROWS)
def test_files(pki, caplog, text, cert, key, ca, error, warning):
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
    config = "[ca] default_ca=d [d] database=index.txt new_certs_dir=. rand_serial=yes default_md=sha256 policy=p"
    config += " [p] commonName=supplied"
    (tmp_path / "ca.cnf").write_text(config.replace(" ", "\n"))
    subprocess.run(
        [
            "openssl",
            "ca",
            "-batch",
            "-notext",
            "-config",
            "ca.cnf",
            "-selfsign",
            "-keyfile",
            pki / "ec.key",
            "-in",
            pki / "ec.csr",
            "-out",
            "later.pem",
            "-startdate",
            "20900101000000Z",
            "-enddate",
            "20910101000000Z",
        ],
        cwd=tmp_path,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    httpd.tls_context(httpd.tls_priority(BOTH), str(tmp_path / "later.pem"), str(pki / "ec.key"))
    assert [record.getMessage() for record in caplog.records] == [
        "tls_cert_file: %s/later.pem: clients will refuse it: certificate is not yet valid" % tmp_path
    ]


# Handshakes


@functools.lru_cache(None)
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
    try:  # TLS 1.3: the client hears of tickets, and of its certificate's fate, by reading
        ends[0].read(1)
    except ssl.SSLWantReadError:
        pass
    return None if waiting else ends


def hello13(suites):
    """A ClientHello for TLS 1.3 that offers these suites; before Python 3.15, a client's context cannot choose them."""
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


OFFER_ROWS = list({row[1:]: row for row in reversed(ACCEPTED)}.values())  # one string for each plan
CURVES = {
    "SECP256R1": "prime256v1",
    "SECP384R1": "secp384r1",
    "SECP521R1": "secp521r1",
    "X25519": "X25519",
    "X448": "X448",
    "FFDHE2048": "ffdhe2048",
}


CLIENTS = functools.lru_cache(maxsize=None)(client_context)


@functools.lru_cache(maxsize=None)
def available_suites():
    """Every suite of TLS 1.2 for these certificates that this OpenSSL has; Camellia, ARIA and DHE are to be refused."""
    everything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    everything.set_ciphers("ALL:!PSK:!SRP:@SECLEVEL=0")
    return [suite["name"] for suite in everything.get_ciphers() if suite["protocol"] != "TLSv1.3"]


@pytest.mark.parametrize("row", OFFER_ROWS, ids=[row[0][:70] for row in OFFER_ROWS])
def test_offer(pki, row):
    """Clients that can do but one thing come through if, and only if, it is in the plan."""
    plan = httpd.tls_priority(row[0])
    if sys.version_info < (3, 11) and plan.groups[:1] == ("X25519",):
        with pytest.raises(httpd.ConfigError, match="tls_ciphers: Python before 3.11 cannot set X25519"):
            context_of(pki, row[0], "ec.pem")
        return
    fit = {
        key: any(("ECDSA" in suite) == (key == "ec") for suite in plan.ciphers) for key in ("rsa", "ec")
    }  # TLS 1.2, with this type of key
    servers = {key: context_of(pki, row[0], key + ".pem") for key in fit if fit[key] or plan.suites13}
    taken = {
        suite
        for suite in available_suites()
        for server in servers.values()
        if shake_hands(CLIENTS(suite, "TLSv1.2"), server)
    }
    hidden = set(plan.ciphers) - {suite["name"] for server in servers.values() for suite in server.get_ciphers()}
    assert taken == set(plan.ciphers) - hidden and all(
        "CCM8" in suite for suite in hidden
    )  # OpenSSL 3.2 puts it on security level 0
    for key, server in servers.items():
        for version in "TLSv1.2", "TLSv1.3":
            ends = shake_hands(client_context(version=version), server)
            assert bool(ends) == (fit[key] if version == "TLSv1.2" else bool(plan.suites13))
            assert not ends or (ends[1].version(), ends[1].selected_alpn_protocol()) == (version, "http/1.1")
        if "TLSv1.3" in plan.versions:
            letters = [letter for letter, name in SUITES13.items() if name in plan.suites13]
            assert [chosen13(server, letter) for letter in letters] == letters
            assert chosen13(server, "gPG") == (
                letters[0] if plan.server_preference else "g"
            )  # what the plan has is chosen before what it has not
        assert bool(server.options & ssl.OP_CIPHER_SERVER_PREFERENCE) == plan.server_preference
        assert server.options & ssl.OP_NO_COMPRESSION
        assert server.options & getattr(ssl, "OP_NO_RENEGOTIATION", 0) == getattr(ssl, "OP_NO_RENEGOTIATION", 0)


GROUP_ROWS = [
    (BOTH, "SECP256R1", "all: one curve, since TLS 1.3 has finite-field groups by default"),
    (OLD, "SECP384R1", "OpenSIPS' default"),
    ("NORMAL:-GROUP-ALL:+GROUP-SECP521R1", "SECP521R1", "one"),
    ("PFS:-GROUP-X448", "SECP256R1", "all but one: the first"),
    ("NORMAL:-GROUP-DH-ALL", "SECP256R1", "all but FFDHE, which OpenSSL's default has"),
    ("NORMAL:-GROUP-ALL:+GROUP-SECP384R1:+GROUP-SECP256R1", "SECP256R1", "P-256 wherever it stands"),
    ("NORMAL:-GROUP-ALL:+GROUP-SECP521R1:+GROUP-SECP384R1", "SECP521R1", "without P-256 the first"),
]


@table("text, offered", GROUP_ROWS)
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_groups(pki, text, offered, version):
    server = context_of(pki, text, "rsa.pem")
    if hasattr(server, "set_groups") and len(offered.split()) < 2:
        offered = " ".join(name for name in httpd.tls_priority(text).groups if name in CURVES)
    for name, curve in CURVES.items() if sys.version_info >= (3, 11) else list(CURVES.items())[:3]:
        ends = shake_hands(client_context("ECDHE+AESGCM", version, curve), server)
        possible = version in httpd.tls_priority(text).versions and (version, name) != ("TLSv1.2", "FFDHE2048")
        assert bool(ends) == (name in offered.split() and possible), name


def test_server_preference(pki):
    client = client_context("ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384", "TLSv1.2")
    chosen = [
        shake_hands(client, context_of(pki, text, "rsa.pem"))[0].cipher()[0]
        for text in ("NORMAL", "NORMAL:%SERVER_PRECEDENCE")
    ]
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


# Connections with TLS


@pytest.fixture
def https(pki):
    """Start a server with TLS, in a thread."""
    httpd.register_httpdcb("test", "echo", echo, content_type="application/json")
    httpd.register_httpdcb("test", "large", large)
    with contextlib.ExitStack() as stack:
        yield lambda name="rsa", **params: stack.enter_context(
            httpd.Server(
                **{
                    **LOCAL,
                    "tls_cert_file": pki / (name + ".pem"),
                    "tls_key_file": pki / (name + ".key"),
                    "tls_ciphers": BOTH,
                    **params,
                }
            )
        )


@pytest.mark.parametrize("name", ["rsa", "ec"])
@pytest.mark.parametrize("text, version", [(BOTH, "TLSv1.3"), (OLD, "TLSv1.2")])
def test_https(https, name, text, version):
    server = https(name, tls_ciphers=text)
    with connect_tls(server, client_context()) as client:
        client.handshake()
        assert client.tls.version() == version
        assert client.tls.selected_alpn_protocol() == "http/1.1"
        answer, = client.ask(get())
        assert answer.json()["scheme"] == "https" and server.url.startswith("https://")
        assert [len(answer.body) for answer in client.ask(get(b"/large") * 5, 5)] == [1000000] * 5
        assert client.ask(post(b"x" * 1000))[0].json()["body"] == "x" * 1000
        assert client.ask(get(b"/echo", b"Connection: close"))[0].status == 200
        assert client.read() == b""  # close_notify: an orderly end


@pytest.mark.parametrize(
    "cut", ["in two records", "every byte", "close_notify in the same segment", "pipelined in many records"]
)
def test_every_request_over_tls_is_answered(https, cut):  # OPENSIPS, never 1
    server, context = https("ec"), client_context()
    raw = get() * (5 if "pipelined" in cut else 1)
    records = {"in two records": [raw[:20], raw[20:]], "pipelined in many records": CUTS["bytes"](raw)}.get(
        cut, [raw]
    )
    segments = CUTS["bytes" if cut == "every byte" else "whole"]
    for _ in range(100 if cut == "in two records" else 20):
        with connect_tls(server, context) as client:
            client.handshake(segments)
            for piece in records:
                client.tls.write(piece)
            if "close_notify" in cut:
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.tls.unwrap()
            client.push(segments)
            count = raw.count(b"GET")
            assert [answer.status for answer in answers(read(client, count))] == [200] * count


@pytest.mark.parametrize("raw", [get(), b"POST / HTTP/1.0\r\n\r\n", b"\x00", b"SSH-2.0\r\n"])
def test_plain_http_on_the_tls_port(https, raw):  # OPENSIPS, never 7
    with connect(https()) as client:
        client.sendall(raw)
        answer, = answers(read(client))
        assert answer.status == 400
        assert answer.body == b"400 this is the HTTPS port, say https://\n"


def test_a_reset_behind_the_first_bytes_is_no_fault_of_the_server(pki, caplog):
    server = httpd.Server(**LOCAL, tls_cert_file=pki / "rsa.pem", tls_key_file=pki / "rsa.key")
    client = connect(server)
    client.sendall(b"\x16\x03\x01")
    client.reset()
    wait_for(lambda: server.accepted, server)
    assert not server.connections and not caplog.records
    server.stop(0)


def test_silent_and_half_way_clients_delay_nobody_and_are_dropped(prompt, https, later):
    server = https("ec")
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(connect_tls(server, client_context())) for _ in range(300)]
        for number, client in enumerate(stuck):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
            client.sendall([b"", b"\x16", client.outer.read()[:-1], client.outer.read()][number % 4])
        for _ in range(10):  # before anybody is dropped: no time passes
            with connect_tls(server, client_context()) as client:
                client.handshake()
                assert client.ask(get())[0].status == 200
        wait_for(lambda: server.accepted >= 310)
        later(server.params.conn_timeout + server.params.request_timeout + 1)
        connect(server).close()  # the server notices what time it is
        for client in stuck:
            with contextlib.suppress(ConnectionResetError):
                while client.recv(65536):
                    pass
    wait_for(lambda: not server.connections)


def test_what_is_no_handshake_after_all_upsets_nobody(https):
    server = https()
    chance = random.Random(5)
    with connect_tls(server, client_context()) as client:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        hello = client.outer.read()
    for _ in range(200):
        raw = bytearray(hello)
        for _ in range(chance.randrange(1, 4)):
            raw[chance.randrange(1, len(raw))] = chance.randrange(256)
        with connect(server) as client, contextlib.suppress(OSError):
            client.sendall(raw[: chance.randrange(1, len(raw) + 1)])
            client.shutdown(socket.SHUT_WR)
            client.recv(10000)
    with connect_tls(server, client_context()) as client:
        client.handshake()
        assert client.ask(get())[0].status == 200


def test_a_truncated_request_is_not_executed(https):
    calls = []
    httpd.register_httpdcb("test", "h", lambda request, page: calls.append(request) or 200)
    server = https()
    for raw in (post(b"abc", path=b"/h")[:-1], chunked(b"3\r\nabc\r\n", path=b"/h"), get(b"/h")[:-2]):
        with connect_tls(server, client_context()) as client:
            client.say(raw)
    with connect_tls(server, client_context()) as client:
        assert client.ask(get())[0].status == 200
        assert not calls


def test_a_slow_reader_over_tls(https):
    server = https()
    with connect_tls(server, client_context()) as client:
        client.handshake()
        client.tls.write(get(b"/large") * 20)
        client.push()
        wait_for(lambda: server.held)
        data = bytearray()
        while len(data) < 20000000 or not is_due(data, 20):
            data += client.read()
            assert server.held <= server.params.held_size
        assert len(answers(data)) == 20
        assert client.ask(get())[0].status == 200


# TLS takes a record of 16 KiB at a time of what waits: to copy the rest each time would be the square of its size.
def test_pipelined_large_answers_cost_no_more(https):
    size = 30_000_000
    large = bytes(size)
    httpd.register_httpdcb("test", "l", lambda request, page: page.write(large) and 200)
    server = https("ec", memory_budget=8 * size, buf_size=size)
    ident, = [thread.ident for thread in threading.enumerate() if thread.name == "httpd"]
    clock = time.pthread_getcpuclockid(ident)
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


@pytest.mark.parametrize("far_away", [4096], indirect=True)
def test_close_notify_comes_even_if_the_socket_is_full(https, far_away):
    """The last byte of the answer fills the socket: close_notify has to wait, or the answer would look cut off."""
    seen = []
    httpd.register_httpdcb(
        "test", "n", lambda request, page: seen.append(request.query) or page.write(b"y" * int(request.query)) and 200
    )
    server, context = https("ec"), client_context()

    def fetch_slowly(size):
        with connect_tls(server, context) as client:
            client.say(get(b"/n?%d" % size, b"Connection: close"))
            wait_for(lambda: str(size) in seen)
            time.sleep(0.01)
            return len(answers(read(client))[0].body)  # SSLEOFError

    sizes = range(17000, 60000, 997)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(fetch_slowly, sizes)) == list(sizes)


# A client without certificate that sends on at once (as curl -d does) got a reset, which overtook the alert.
def test_the_alert_comes_before_the_end(https, pki):
    server = https("ec", tls_ca_file=pki / "ca.pem")
    for _ in range(5):
        with connect_tls(server, client_context()) as client:
            while True:
                try:
                    client.tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.push()
                    client.pull()
            client.tls.write(post(b"x" * 5000))  # leaves with the Finished
            client.push()
            time.sleep(0.02)
            client.tls.write(b"y" * 100)
            client.push()  # BrokenPipeError, ConnectionResetError
            time.sleep(0.02)
            client.getpeername()  # what curl does next; OSError after a reset
            with pytest.raises(ssl.SSLError, match="(?i)certificate.required"):
                client.read()


def test_sessions_are_resumed_by_tickets_unless_the_string_forbids(https):
    for text, tickets in ((OLD, True), (BOTH, True), (OLD + ":%NO_TICKETS", False), (BOTH + ":%NO_TICKETS", False)):
        server = https(tls_ciphers=text)
        context = client_context()
        with connect_tls(server, context) as first:
            first.handshake()
            first.ask(get())
            assert (first.tls.session is not None and first.tls.session.has_ticket) == tickets
            with connect_tls(server, context, session=first.tls.session) as second:
                second.handshake()
                assert second.ask(get())[0].status == 200
                assert second.tls.session_reused or not tickets


def test_renegotiation_is_off(https):
    if not hasattr(ssl, "OP_NO_RENEGOTIATION") or not shutil.which("openssl"):
        pytest.skip("cannot be tried here")
    server = https(tls_ciphers=OLD)
    client = subprocess.run(
        ["openssl", "s_client", "-connect", "127.0.0.1:%d" % server.port, "-tls1_2"],
        input=b"R\n",
        capture_output=True,
        timeout=20,
    )
    assert b"no renegotiation" in client.stderr.lower() or b"NO_RENEGOTIATION" in client.stderr.upper()


def test_a_renewed_certificate_needs_no_restart(https, pki, tmp_path, caplog):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes((pki / "rsa.pem").read_bytes())
    key.write_bytes((pki / "rsa.key").read_bytes())
    key.chmod(0o600)
    server = https(tls_cert_file=cert, tls_key_file=key)
    with connect_tls(server, client_context()) as old:
        old.handshake()
        cert.write_bytes(b"half of it")
        assert server.reload() is False and "has no BEGIN CERTIFICATE" in caplog.text  # the old one stays
        cert.write_bytes((pki / "ec.pem").read_bytes())
        assert server.reload() is False  # the old key does not fit
        with connect_tls(server, client_context()) as client:
            client.handshake()
            assert client.tls.getpeercert(True) == old.tls.getpeercert(True)
        key.write_bytes((pki / "ec.key").read_bytes())
        assert server.reload() is True
        with connect_tls(server, client_context()) as client:
            client.handshake()
            assert client.tls.getpeercert(True) != old.tls.getpeercert(True)
            assert client.ask(get())[0].status == 200
        assert old.ask(get())[0].status == 200  # and old connections live on
    with httpd.Server(**LOCAL) as plain:
        assert plain.reload() is False


# SIGHUP while a file is being replaced: FileNotFoundError is no SSLError; out of the signal handler it ended run().
@pytest.mark.parametrize("gone", ["cert.pem", "key.pem", "ca.pem"])
def test_a_file_that_goes_during_reload(https, pki, tmp_path, monkeypatch, caplog, gone):
    for name, source in ("cert.pem", "ec.pem"), ("key.pem", "ec.key"), ("ca.pem", "ca.pem"):
        shutil.copy(pki / source, tmp_path / name)
    server = https(
        tls_cert_file=tmp_path / "cert.pem", tls_key_file=tmp_path / "key.pem", tls_ca_file=tmp_path / "ca.pem"
    )
    check = httpd.check_pem

    def check_and_remove(parameter, path, kind):
        check(parameter, path, kind)
        if path.endswith(gone):
            os.unlink(path)

    monkeypatch.setattr(httpd, "check_pem", check_and_remove)
    assert server.reload() is False
    assert "nothing is loaded anew" in caplog.text
    assert gone in caplog.text


def test_client_certificates(https, pki):
    httpd.register_httpdcb("test", "who", lambda request, page: page.write(json.dumps(request.client_cert)) and 200)
    server = https(tls_ca_file=pki / "ca.pem")
    for version in ("TLSv1.3", "TLSv1.2"):
        with connect_tls(server, client_context(version=version, cert=str(pki / "client"))) as client:
            client.handshake()
            subject, serial = client.ask(get(b"/who"))[0].json()
            assert subject == "CN=other" and re.fullmatch("[0-9A-F]+", serial)
        for cert in (None, str(pki / "ec")):  # none, or one of another CA
            context = client_context(version=version, cert=cert)
            with connect_tls(server, context) as client, pytest.raises((ssl.SSLError, OSError)):
                client.handshake()
                client.ask(get(b"/who"))
    with connect_tls(https(), client_context()) as client:
        client.handshake()
        assert client.ask(get(b"/who"))[0].json() is None


# The subject is put together without escapes: O="Ex, Inc" or CN="x,CN=admin" read as something else (RFC 4514, 2.4).
# tls_ca_file with an intermediate CA alone takes the start's checks, and then refuses everybody ("signed by one").
def test_an_intermediate_ca_and_a_comma_in_the_subject(https, tmp_path):
    run = functools.partial(openssl, cwd=tmp_path)
    run(
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        "root.key",
        "-out",
        "root.pem",
        "-subj",
        "/CN=root",
        "-days",
        "2",
    )
    (tmp_path / "ca.ext").write_text("basicConstraints=CA:TRUE\n")
    for name, signer, more in ("inter", "root", ("-extfile", "ca.ext")), ("bob", "inter", ()):
        run(
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            name + ".key",
            "-out",
            name + ".csr",
            "-subj",
            "/O=Ex, Inc/CN=%s,CN=admin" % name,
        )
        run(
            "x509",
            "-req",
            "-in",
            name + ".csr",
            "-CA",
            signer + ".pem",
            "-CAkey",
            signer + ".key",
            "-CAcreateserial",
            "-days",
            "2",
            "-out",
            name + ".pem",
            *more,
        )
    httpd.register_httpdcb("test", "who", lambda request, page: page.write(request.client_cert.subject) and 200)
    server = https("ec", tls_ca_file=tmp_path / "inter.pem")
    with connect_tls(server, client_context(cert=str(tmp_path / "bob"))) as client:
        client.handshake()
        assert client.ask(get(b"/who"))[0].body == rb"CN=bob\,CN=admin,O=Ex\, Inc"


def test_a_suite_that_cannot_be_switched_off_is_not_used(https, monkeypatch):
    """TLS 1.3 suites can be restricted only by closing what has got another."""
    server = https(tls_ciphers="SECURE256:-VERS-ALL:+VERS-TLS1.3")
    with connect_tls(server, client_context()) as client:
        client.handshake()
        assert client.tls.cipher()[0] == "TLS_AES_256_GCM_SHA384"
        assert client.ask(get())[0].status == 200
    transport = server.transport
    server.transport = transport._replace(plan=transport.plan._replace(suites13=("TLS_AES_128_GCM_SHA256",)))
    with connect_tls(server, client_context()) as client, pytest.raises((ssl.SSLError, OSError)):
        client.handshake()
        client.ask(get())


def test_too_many_connections_with_tls(https, caplog):
    server = https("ec", max_connections=1)
    with connect_tls(server, client_context()) as client:
        client.handshake()
        client.tls.write(get(b"/large") * 20)  # the only connection is sending: nobody can make room
        client.push()
        wait_for(lambda: server.held)
        with connect_tls(server, client_context()) as other, pytest.raises((ssl.SSLError, OSError)):
            other.handshake()
            other.ask(get())
    assert "fault" not in caplog.text


def test_plain_http_in_a_program_with_a_default_timeout(https):
    server = https("ec")
    socket.setdefaulttimeout(3)
    try:
        with connect(server) as plain:
            plain.sendall(get())
            assert plain.recv(1000)
            start = time.monotonic()
            with connect_tls(server, client_context()) as client:
                client.handshake()
                assert client.ask(get())[0].status == 200
            assert time.monotonic() - start < 2
    finally:
        socket.setdefaulttimeout(None)


def test_stop_does_not_wait_for_half_a_handshake(https):
    server = https("ec")
    with connect_tls(server, client_context()) as client:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        client.sendall(client.outer.read()[:-1])
        wait_for(lambda: server.connections)
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 5


# ------------------------------------------------------------------------------------------------------------- mi_http

@pytest.fixture
def mi(server):
    """Send a body to /mi; returns the answer."""
    httpd.loadmodule("mi_http")

    def send(body, kind=b"application/json", *fields):
        raw = post(
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            *([b"Content-Type: " + kind] if kind else []),
            *fields,
            path=b"/mi",
        )
        return answers(exchange(server, raw)[0])[0]

    return send


def fails(call):
    raise httpd.HTTPError(404, "no such dialog")


def error(code, message, ident="null", data=""):
    return b'{"jsonrpc":"2.0","error":{"code":%d,"message":"%s"%s},"id":%s}' % (
        code,
        message.encode(),
        b',"data":%s' % json.dumps(data).encode() if data else b"",
        ident.encode(),
    )


def ok(result, ident="1"):
    return b'{"jsonrpc":"2.0","result":%s,"id":%s}' % (result.encode(), ident.encode())


def invalid(reason, ident="null"):
    return error(-32600, "Invalid Request", ident, reason)


NO_OBJECT = invalid("a call must be an object")
NO_VERSION = invalid('jsonrpc must be "2.0"')
NO_METHOD = invalid("method must be text")
NO_PARAMS = invalid("params must be an array or an object")
NO_ID = invalid("id must be text, a number or null")
MI_ROWS = [
    (b'{"jsonrpc":"2.0","method":"httpd_list_root_path","id":1}',
     ok('[{"http_root":"mi","module":"mi_http"},{"http_root":"echo","module":"test"}]'), "newest first"),
    (b'{"jsonrpc":"2.0","method":"httpd:list_root_path","id":1}',
     ok('[{"http_root":"mi","module":"mi_http"},{"http_root":"echo","module":"test"}]'), "the newer name"),
    (b'{"jsonrpc":"2.0","method":"add","params":[1,2],"id":1}', ok("3"), "params by position"),
    (b'{"jsonrpc":"2.0","method":"add","params":{"a":1,"b":2},"id":1}', ok("3"), "params by name"),
    (b'{"jsonrpc":"2.0","method":"add","params":["1","2"],"id":1}', ok("3"), "numbers as text"),
    (b'{"jsonrpc":"2.0","method":"add","params":{"a":"-1","b":"2"},"id":1}', ok("1"), "numbers as text, by name"),
    (b'{"jsonrpc":"2.0","method":"add","params":[1.5,2],"id":1}', ok("3.5"), "no whole number"),
    (b'{"jsonrpc":"2.0","method":"none","id":1}', ok("null"), "no params: left out"),
    (b'{"jsonrpc":"2.0","method":"none","id":1,"params":[]}', ok("null"), "no params: an empty list"),
    (b'{"jsonrpc":"2.0","method":"none","id":1,"params":{}}', ok("null"), "no params: an empty object"),
    (b'{"jsonrpc":"2.0","method":"add","params":[1],"id":1}',
     error(-32602, "Invalid params", "1", "missing a required argument: 'b'"), "one too few"),
    (b'{"jsonrpc":"2.0","method":"add","params":[1,2,3],"id":1}',
     error(-32602, "Invalid params", "1", "too many positional arguments"), "one too many"),
    (b'{"jsonrpc":"2.0","method":"add","params":{"a":1,"b":2,"c":3},"id":1}',
     error(-32602, "Invalid params", "1", "got an unexpected keyword argument 'c'"), "unknown"),
    (b'{"jsonrpc":"2.0","method":"add","params":["x",2],"id":1}',
     error(-32602, "Invalid params", "1", "a must be a number, not 'x'"), "no number"),
    (b'{"jsonrpc":"2.0","method":"add","params":["1_0",2],"id":1}',
     error(-32602, "Invalid params", "1", "a must be a number, not '1_0'"), "int() would take it"),
    (b'{"jsonrpc":"2.0","method":"nothing","id":1}', error(-32601, "Method not found", "1"), "unknown method"),
    (b'{"jsonrpc":"2.0","method":"fails","params":[1],"id":1}', error(404, "no such dialog", "1"),
     "a command's own error"),
    (b'{"jsonrpc":"2.0","method":"breaks","id":1}',
     error(-32000, "Server error", "1", "the command failed, the log of the server says why"), "an exception"),
    (b'{"jsonrpc":"2.0","method":"odd","id":1}',
     error(-32000, "Server error", "1", "the command failed, the log of the server says why"),
     "a result that is no JSON"),
    (b"", error(-32700, "Parse error"), "no JSON: nothing"),
    (b"{", error(-32700, "Parse error"), "no JSON: half an object"),
    (b"x", error(-32700, "Parse error"), "no JSON: a word"),
    (b'{"jsonrpc":"2.0","method":"none","id":1}x', error(-32700, "Parse error"), "no JSON: rubbish behind it"),
    (b"\xff", error(-32700, "Parse error"), "no JSON: no UTF-8"),
    (b"[" * 1000, error(-32700, "Parse error"), "no JSON: deep"),
    (b'{"a":NaN}', error(-32700, "Parse error"), "no JSON: NaN"),
    (b"[Infinity]", error(-32700, "Parse error"), "no JSON: Infinity"),
    (b'\xef\xbb\xbf{}', error(-32700, "Parse error"), "no JSON: a byte order mark"),
    (b"'a'", error(-32700, "Parse error"), "no JSON: single quotes"),
    (b"1", NO_OBJECT, "no request: a number"),
    (b'"x"', NO_OBJECT, "no request: text"),
    (b"null", NO_OBJECT, "no request: null"),
    (b"true", NO_OBJECT, "no request: true"),
    (b"{}", NO_VERSION, "no request: an empty object"),
    (b"[]", NO_OBJECT, "no request: an empty batch"),
    (b'{"jsonrpc":"1.0","method":"none"}', NO_VERSION, "no request: version 1.0"),
    (b'{"jsonrpc":2.0,"method":"none"}', NO_VERSION, "no request: the version as a number"),
    (b'{"method":"none"}', NO_VERSION, "no request: no version"),
    (b'{"jsonrpc":"2.0","method":1}', NO_METHOD, "no request: a number as method"),
    (b'{"jsonrpc":"2.0"}', NO_METHOD, "no request: no method"),
    (b'{"jsonrpc":"2.0","method":"none","params":null}', NO_PARAMS, "no request: params are null"),
    (b'{"jsonrpc":"2.0","method":"none","params":1}', NO_PARAMS, "no request: params are a number"),
    (b'{"jsonrpc":"2.0","method":"none","params":"x"}', NO_PARAMS, "no request: params are text"),
    (b'{"jsonrpc":"2.0","method":"none","id":true}', NO_ID, "no request: an id that is true"),
    (b'{"jsonrpc":"2.0","method":"none","id":[]}', NO_ID, "no request: an id that is a list"),
    (b'{"jsonrpc":"2.0","method":"none","id":{}}', NO_ID, "no request: an id that is an object"),
    (b'{"jsonrpc":"2.0","method":"none","id":1e999}', NO_ID, "no request: an id without end"),
    (b'{"jsonrpc":"2.0","method":1,"id":7}', invalid("method must be text", "7"), "an invalid request with an id"),
    (b'{"jsonrpc":"2.0","method":"none","id":"x"}', ok("null", '"x"'), "the id text"),
    (b'{"jsonrpc":"2.0","method":"none","id":0}', ok("null", '0'), "the id 0"),
    (b'{"jsonrpc":"2.0","method":"none","id":-1}', ok("null", '-1'), "the id negative"),
    (b'{"jsonrpc":"2.0","method":"none","id":4294967297}', ok("null", '4294967297'),
     "the id 33 bits (OPENSIPS, never 14)"),
    (b'{"jsonrpc":"2.0","method":"none","id":123456789012345678901234567890}',
     ok("null", '123456789012345678901234567890'), "the id 30 digits"),
    (b'{"jsonrpc":"2.0","method":"none","id":"123456789012345678901234567890"}',
     ok("null", '"123456789012345678901234567890"'), "the id 30 digits as text"),
    (b'{"jsonrpc":"2.0","method":"none","id":null}', ok("null", 'null'), "the id null"),
    (b'{"jsonrpc":"2.0","method":"none","id":1.5}', ok("null", '1.5'), "the id 1.5"),
    (b'{"jsonrpc":"2.0","method":"none","id":"\\u00e4"}', ok("null", '"\\u00e4"'), "the id an escape"),
    (b'{"jsonrpc":"2.0","method":"none"}', b"", "a notification"),
    (b'{"jsonrpc":"2.0","method":"nothing"}', b"", "a notification of what there is not"),
    (b'[{"jsonrpc":"2.0","method":"none","id":1},{"jsonrpc":"2.0","method":"none"},1,'
     b'{"jsonrpc":"2.0","method":"none","id":"2"}]',
     b"[" + ok("null") + b"," + NO_OBJECT + b"," + ok("null", '"2"') + b"]", "a batch"),
    (b'[{"jsonrpc":"2.0","method":"none"},{"jsonrpc":"2.0","method":"none"}]', b"", "a batch of notifications"),
    (b"[1]", b"[" + NO_OBJECT + b"]", "a batch of one"),
    (b'[[]]', b"[" + NO_OBJECT + b"]", "a batch in a batch"),
]


@table("body, expected", MI_ROWS)
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


MI_REFUSED = [
    (None, (), 415, "no type (OPENSIPS, never 7)"),
    (b"text/plain", (), 415, "text/plain"),
    (FORM, (), 415, "a form"),
    (b"xapplication/json", (), 415, "x"),
    (b"Application/JSON; charset=utf-8", (), 200, "any case, parameters"),
    (b"text/xml", (), 200, "text/xml is tolerated"),
    (b"application/json-rpc", (), 415, "begins with it"),
    (b"application/jsonfoo", (), 415, "begins with it, by chance"),
    (b"text/xmlfoo", (), 415, "begins with the other"),
    (b"application/json;charset=utf-8", (), 200, "a parameter without a blank"),
    (b"application/json", (b"Origin: http://evil",), 403, "a foreign origin"),
    (b"application/json", (b"Origin: null",), 403, "the origin null"),
    (b"application/json", (b"Origin: http://EXAMPLE",), 200, "its own origin"),
    (b"application/json", (b"Origin: https://example",), 200, "a proxy has taken TLS off"),
    (b"application/json", (b"Origin: https://example:444",), 200, "a proxy on another port has"),
    (b"application/json", (b"Origin: http://example:80",), 200, "the default port"),
    (b"application/json", (b"Origin: http://example:81",), 403, "another port"),
    (b"application/json", (b"Origin: https://evil",), 403, "another host, with TLS"),
    (b"application/json", (b"Origin: ftp://example",), 403, "no web page"),
    (b"application/json", (b"Origin: http://example:x",), 403, "no port"),
    (b"application/json", (b"Origin: http://[",), 403, "no host"),
    (b"application/json", (b"Origin: http://example.evil",), 403, "a longer name"),
]


@table("kind, fields, status", MI_REFUSED)
def test_what_mi_takes(mi, kind, fields, status):
    assert mi(b'{"jsonrpc":"2.0","method":"version","id":1}', kind, *fields).status == status


def test_mi_is_post_only(mi, server):  # OPENSIPS, never 13
    answer, = answers(exchange(server, get(b"/mi"))[0])
    assert answer.status == 405 and answer.headers["Allow"] == "POST, OPTIONS"


def test_mi_commands_of_every_server(mi, server):
    def call(method, *params):
        return mi({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).json()
    assert {
        "which",
        "httpd_list_root_path",
        "httpd:list_root_path",
        "version",
        "uptime",
        "ps",
        "get_statistics",
    } <= set(call("which")["result"])
    assert call("which", "which")["result"] == [[], ["command"]]
    assert call("which", "get_statistics")["result"] == [["statistics"]]
    assert call("which", "x")["error"] == {"code": 404, "message": "unknown MI command"}
    assert call("version")["result"] == {"Server": "httpd.py " + httpd.__version__}
    assert set(call("uptime")["result"]) == {"Now", "Up since", "Up time"}
    assert call("ps")["result"]["Processes"][0]["PID"] == os.getpid()
    assert call("get_statistics", ["all"])["result"]["httpd:requests"] == server.requests - 1
    assert list(call("get_statistics", ["requests", "httpd:connections"])["result"]) == [
        "httpd:requests",
        "httpd:connections",
    ]
    assert list(call("get_statistics", "httpd:")["result"]) == ["httpd:" + name for name in httpd.CELLS]
    assert call("get_statistics", ["x:"])["error"]["code"] == 404


def test_register_mi_refuses_what_is_taken():
    httpd.register_mi("mine", fails)
    for name in ("mine", "which", "", "a b", None, ["a"]):
        with pytest.raises(httpd.ConfigError, match="MI command"):
            httpd.register_mi(name, fails)
    for function, message in ((None, "no function: None"), (sleepy, "is async: .* plain function$")):
        with pytest.raises(httpd.ConfigError, match=message):
            httpd.register_mi("another", function)


@pytest.mark.parametrize("threads", [False, True])
def test_answers_larger_than_the_page_lose_nothing(server, threads):
    httpd.register_mi("large", lambda: "x" * 100000, threads=threads)
    httpd.loadmodule("mi_http")
    calls = [{"jsonrpc": "2.0", "method": "large", "id": number} for number in range(12)]
    for _ in range(2):
        raw = post(json.dumps(calls).encode(), b"Content-Type: application/json", path=b"/mi")
        answer, = answers(exchange(server, raw)[0])
        assert answer.status == 200 and int(answer.headers["Content-Length"]) > server.params.buf_size
        assert [(one["id"], len(one["result"])) for one in answer.json()] == [(n, 100000) for n in range(12)]
    wait_for(lambda: server.held == 0 and server.disk.used == 0, server)


def test_an_answer_larger_than_the_page_and_the_disk(caplog):
    httpd.register_mi("large", lambda: "x" * 3000000)
    httpd.loadmodule("mi_http")
    server = httpd.Server(**LOCAL, spool_size=0)
    raw = post(b'{"jsonrpc":"2.0","method":"large","id":1}', b"Content-Type: application/json", path=b"/mi")
    answer, = answers(exchange(server, raw)[0])
    assert answer.status == 500 and b"done, but the answer cannot be sent" in answer.body
    server.stop(0)


@pytest.mark.parametrize("path", ["/mi", "/?data"])
def test_what_is_nested_too_deeply_to_be_set_out_is_sent_as_it_is(server, path, monkeypatch):
    """Python 3.12 reads a thousand levels, and sets out fewer."""
    httpd.modparam("mi_http", "pretty_printing", "1")
    httpd.loadmodule("mi_http")
    httpd.loadmodule("mi_html")
    call = post(b'{"jsonrpc":"2.0","method":"uptime","id":1}', b"Content-Type: application/json", path=b"/mi")
    raw = {"/mi": call, "/?data": order(b"command=uptime")}[path]
    monkeypatch.setattr(json, "dumps", lambda *_, **__: raising(RecursionError())())
    answer, = answers(exchange(server, raw)[0])
    assert answer.status == 200 and list(answer.json()) == ["jsonrpc", "result", "id"]


def test_pretty_printing(server):
    httpd.modparam("mi_http", "pretty_printing", "1")
    httpd.loadmodule("mi_http")
    raw = post(b'{"jsonrpc":"2.0","method":"version","id":"a"}', b"Content-Type: application/json", path=b"/mi")
    answer, = answers(exchange(server, raw)[0])
    assert b'{\n    "jsonrpc": "2.0",\n' in answer.body and answer.json()["id"] == "a"


@table("name, value, expected", [
    ("mi_http_root", "manage", "manage", "root"),
    ("trace_destination", "x", "mi", "tracing"),
    ("trace_bwlist", "b: ps", "mi", "what is traced"),
])
def test_parameters_of_opensips_own_mi_http(tmp_path, caplog, name, value, expected):
    httpd.load_config(config(tmp_path, 'loadmodule "mi_http.so"\nmodparam("mi_http", "%s", "%s")' % (name, value)))
    assert list(httpd.roots) == [expected]
    assert caplog.text.count("mi_http: %s has no effect here" % name) == (expected == "mi")


def test_batches_are_bounded(mi):
    call = {"jsonrpc": "2.0", "method": "x"}
    assert mi([call] * 26).status == 202  # as many as the smallest post_buf_size takes
    asker = types.SimpleNamespace(counters=httpd.Counters(), resume=print)
    told = httpd.Batch(httpd.read_calls(json.dumps([call] * 101).encode()), asker).text()
    assert json.loads(told)["error"] == {"code": -32600, "message": "Invalid Request", "data": "more than 100 calls"}


@pytest.mark.parametrize("threads", [False, True])
def test_a_command_whose_error_is_made_badly(mi, running, threads):
    class Bad(httpd.HTTPError):
        def __init__(self):
            pass

    def fail():
        raise Bad

    httpd.register_mi("bad", fail, threads=threads)
    raw = post(b'{"jsonrpc":"2.0","method":"bad","id":7}', b"Content-Type: application/json", path=b"/mi")
    with connect(running) as client:
        client.sendall(raw)
        answer, = answers(client.recv(1000))
        assert (answer.json()["error"]["code"], answer.json()["id"]) == (-32000, 7)


def test_commands_that_take_long_delay_nobody(mi, server):  # OPENSIPS, never 5
    gate = threading.Event()
    httpd.register_mi("slow", lambda number: [gate.wait(10), number][1], threads=True)
    httpd.register_mi("fails", fails, threads=True)
    httpd.register_mi("quick", lambda: "quick")
    server.start()

    def call(method, ident, *params):
        return {"jsonrpc": "2.0", "method": method, "params": params, "id": ident}

    def ask_mi(client, calls):
        body = json.dumps(calls).encode()
        client.send(post(body, b"Content-Type: application/json", path=b"/mi"))

    with connect(server) as slow, connect(server) as batch, connect(server) as quick:
        ask_mi(slow, call("slow", 1, "x"))
        ask_mi(
            batch,
            [
                call("quick", 1),
                call("slow", 2, "y"),
                call("fails", 3, 0),
                call("slow", 4),
                {"jsonrpc": "2.0", "method": "slow", "params": [1]},
            ],
        )
        ask_mi(quick, call("quick", 1))
        assert answers(quick.recv(1000))[0].json()["result"] == "quick"  # while the others wait
        gate.set()
        assert answers(slow.recv(1000))[0].json() == {"jsonrpc": "2.0", "result": "x", "id": 1}
        found = answers(batch.recv(1000))[0].json()
        assert [answer.get("result", answer.get("error", {}).get("code")) for answer in found] == [
            "quick",
            "y",
            404,
            -32602,
        ]


def fresh_mi_pool():
    httpd.mi_pool.cache_clear()
    return httpd.mi_pool()


def test_a_command_in_a_thread_that_leaves(mi, server, caplog):
    """SystemExit ends the thread of the pool, and the request waits for ever."""
    fresh_mi_pool()
    httpd.register_mi("leave", lambda: sys.exit(1), threads=True)
    server.start()
    for _ in range(5):
        with connect(server) as client:
            client.settimeout(2)
            client.send(
                post(b'{"jsonrpc":"2.0","method":"leave","id":1}', b"Content-Type: application/json", path=b"/mi")
            )
            assert answers(client.recv(1000))[0].json()["error"]["code"] == -32000
    fresh_mi_pool()


def test_commands_that_wait_for_a_thread_are_bounded(mi, server):
    """Who sends slow commands and goes away, again and again, would fill the memory with what waits for a thread."""
    jobs = fresh_mi_pool().jobs
    gate = threading.Event()
    httpd.register_mi("slow", lambda: gate.wait(30), threads=True)
    server.start()
    body = json.dumps([{"jsonrpc": "2.0", "method": "slow"}] * 20).encode()
    for _ in range(300):
        with connect(server) as client:
            client.send(post(body, b"Content-Type: application/json", path=b"/mi"))
    wait_for(lambda: server.accepted >= 300 and not server.connections)
    waiting = jobs.qsize()
    gate.set()
    fresh_mi_pool()
    assert waiting <= 1100


def test_a_half_closed_client_gets_the_answer_of_a_command_in_a_thread(mi, server):
    httpd.register_mi("slowly", lambda: time.sleep(0.1), threads=True)
    raw = post(b'{"jsonrpc":"2.0","method":"slowly","id":1}', b"Content-Type: application/json", path=b"/mi")
    with server, connect(server) as client:
        client.send(raw.replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.shutdown(socket.SHUT_WR)
        assert answers(read(client))[0].json()["result"] is None


# ------------------------------------------------------------------------------------------------------------- mi_fifo

class Fifo:
    """The server without a thread and a client of its FIFO, which has made the FIFOs a, b and z for answers."""

    def __init__(self, directory, **parameters):
        self.directory = directory
        self.path = directory / "fifo"
        self.got = collections.Counter()
        httpd.loadmodule("mi_fifo", fifo_name=self.path, reply_dir=directory)
        self.server = httpd.Server(**LOCAL, **parameters)
        self.server.run_once(0)
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        self.readers = {name: self.reply(name) for name in "abz"}

    def reply(self, name):
        os.mkfifo(self.directory / name)
        return os.open(self.directory / name, os.O_RDONLY | os.O_NONBLOCK)

    def say(self, raw):
        os.write(self.descriptor, raw)

    def read(self, name="a"):
        """What has come so far."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self.readers[name], 1 << 20)
        return b""

    def line(self, name="a", seconds=10):
        """An answer."""
        data = bytearray()
        wait_for(lambda: data.extend(self.read(name)) or data.endswith(b"\n"), self.server, seconds)
        return bytes(data[:-1])

    def is_idle(self):
        return not self.server.held and not self.server.loop.timers

    def close(self):
        self.server.stop(0)
        for descriptor in (self.descriptor, *self.readers.values()):
            os.close(descriptor)


@pytest.fixture
def fifo(request, tmp_path):
    fifo = Fifo(tmp_path, **getattr(request, "param", {}))
    httpd.register_mi("add", lambda a, b=0: a + b)
    yield fifo
    fifo.close()


impatient = pytest.mark.parametrize("fifo", [{"request_timeout": 0.3, "post_buf_size": 2**18}], indirect=True, ids=[""])
ADD = b'{"jsonrpc":"2.0","method":"add","params":[1,%d],"id":1}'
TELL = b'{"jsonrpc":"2.0","method":"add","params":[1]}'
TOO_LONG = invalid("more than 1024 bytes, see post_buf_size")
PARSE_ERROR = b'{"jsonrpc":"2.0","error":{"code":-32700,"message":"Parse error"},"id":null}'
FIFO_ROWS = [
    ([b":a:", ADD % 1, b"\n"], {"a": [ok("2")]}, "a line"),
    ([b":a:", ADD % 1, b"\r\n"], {"a": [ok("2")]}, "a line of another system"),
    ([b":a:", ADD % 1], {"a": [ok("2")]}, "opensips-cli writes no line end"),
    ([b":a: ", ADD % 1, b" \n"], {"a": [ok("2")]}, "blanks around it"),
    ([b":a:", ADD % 1, b":b:", ADD % 2], {"a": [ok("2")], "b": [ok("3")]}, "two that have come together"),
    ([b":a:", ADD % 1, b"\n:b:", ADD % 2, b"\n"], {"a": [ok("2")], "b": [ok("3")]}, "two lines"),
    ([b"\n\n:a:", ADD % 1, b"\n\n"], {"a": [ok("2")]}, "empty lines"),
    ([b":a:[", ADD % 1, b",", TELL, b",", ADD % 2, b"]\n"], {"a": [b"[%s,%s]" % (ok("2"), ok("3"))]}, "a batch"),
    ([b":a:", TELL, b"\n"], {}, "a notification"),
    ([b"::", ADD % 1, b"\n"], {}, "no answer is wanted"),
    ([b':a:{"jsonrpc":"2.0","method":"add","params":[":b:{}","}:"],"id":1}'], {"a": [ok('":b:{}}:"')]},
     "text that looks like a message"),
    ([b":a:{\n"], {"a": [PARSE_ERROR]}, "a line is whole whatever is in it"),
    ([b":a:7\n"], {"a": [invalid("a call must be an object")]}, "a number"),
    ([b":a:\n"], {"a": [PARSE_ERROR]}, "nothing in it"),
    ([b":a:", ADD % 1, b" x\n"], {"a": [PARSE_ERROR]}, "something behind the JSON"),
    ([b":a:", b"[" * 1000, b"\n"], {"a": [PARSE_ERROR]}, "deep"),
    ([b":a:\xff\n"], {"a": [PARSE_ERROR]}, "not UTF-8"),
    ([b":a:[", b" " * 2000, b"]\n"], {"a": [TOO_LONG]}, "a line over post_buf_size"),
    ([b":a:[", b" " * 2000, b"]:b:", ADD % 2], {"a": [TOO_LONG], "b": [ok("3")]}, "one over it, no line end"),
    ([b":a:[", b" " * 40000, b"]\n:b:", ADD % 2, b"\n"], {"a": [TOO_LONG], "b": [ok("3")]}, "one that is far over it"),
    ([b":a:[", b" " * 40000, b":b:", ADD % 2], {"a": [TOO_LONG], "b": [ok("3")]}, "far over it, without an end"),
    ([b"x\n:a:", ADD % 1, b"\n"], {"a": [ok("2")]}, "garbage before a line"),
    ([b"\0x:a:", ADD % 1], {"a": [ok("2")]}, "garbage before a message"),
    ([b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], {}, "another protocol"),
    ([b":../a:", ADD % 1, b"\n"], {}, "a name in another directory"),
    ([b":/tmp/a:", ADD % 1, b"\n"], {}, "an absolute name"),
    ([b":.a:", ADD % 1, b"\n"], {}, "a hidden name"),
    ([b":a\0:", ADD % 1, b"\n"], {}, "NUL in a name"),
    ([b":", b"a" * 256, b":", ADD % 1, b"\n"], {}, "a name that is too long"),
    ([b":"], {}, "nothing but the begin"),
    ([b":a"], {}, "half a name"),
    ([b":a:"], {}, "a name"),
    ([b':a:{"jsonrpc":"2'], {}, "half of the JSON: its writer is gone"),
    ([b":fifo:", ADD % 1, b"\n"], {}, "the answer into the FIFO of the commands"),
]


@table("pieces, expected", FIFO_ROWS)
@pytest.mark.parametrize("cut", CUTS)
def test_messages_in_the_fifo(fifo, pieces, expected, cut):
    """Whatever came before, the next command, written at once, is answered."""
    raw = b"".join(pieces)
    if cut != "whole" and (b":b:" in raw[1:] or len(raw) > 1100 or b" x" in raw or b"\0x" in raw):
        return  # where a message ends, that has no line end, depends on what is written together
    for piece in CUTS[cut](raw):
        fifo.say(piece)
        fifo.server.run_once(0)
    fifo.say(b":z:" + ADD % 9)
    assert fifo.line("z") == ok("10")
    found = {name: fifo.read(name).split(b"\n")[:-1] for name in "ab"}
    assert {name: lines for name, lines in found.items() if lines} == expected
    wait_for(lambda: not fifo.server.held, fifo.server)
    assert sorted(os.listdir(fifo.directory)) == ["a", "b", "fifo", "z"]


def test_whatever_is_written_the_next_command_is_answered(fifo):
    chance = random.Random(1)
    pieces = [b":a:", ADD % 1, b"\n", b"{", b"}", b":", b"x", b"\0", b"[" * 1200, b" ", b"\xff", b'"', TELL, b":../a:"]
    for _ in range(300):
        fifo.say(b"".join(chance.choice(pieces) for _ in range(chance.randrange(1, 9))))
        fifo.server.run_once(0)
        fifo.read("a")
    fifo.say(b"\n")
    wait_for(lambda: not fifo.read("a") and not fifo.server.held, fifo.server)
    fifo.say(b":z:" + ADD % 9)
    assert fifo.line("z") == ok("10")


def test_a_log_line_of_the_fifo_cannot_be_forged(fifo, caplog):
    fifo.say(b"x\r2026 ERROR root: the house burns\x1b[2J\n")
    wait_for(lambda: caplog.records, fifo.server)
    assert r"'x\r2026 ERROR root: the house burns\x1b[2J'" in caplog.text


@impatient
def test_half_a_message_has_its_time_from_its_first_byte_on(fifo, caplog):
    fifo.say(b":a:{")
    limit = time.monotonic() + 10
    while "half a message" not in caplog.text:
        assert time.monotonic() < limit
        fifo.say(b" ")
        fifo.server.run_once(0.02)
    fifo.say(b"\n")
    wait_for(fifo.is_idle, fifo.server)


def test_commands_in_threads(fifo):
    """The answers come as they are ready, in their order within a batch, and nobody waits meanwhile."""
    gate = threading.Event()
    httpd.register_mi("slow", lambda text: gate.wait(10) and text, threads=True)
    fifo.say(b':a:{"jsonrpc":"2.0","method":"slow","params":["x"],"id":1}\n')
    fifo.say(b':b:[{"jsonrpc":"2.0","method":"slow","params":["y"],"id":1},' + ADD % 1 + b"]\n:z:" + ADD % 2)
    assert fifo.line("z") == ok("3")
    gate.set()
    assert fifo.line("a") == ok('"x"')
    assert fifo.line("b") == b"[%s,%s]" % (ok('"y"'), ok("2"))
    wait_for(lambda: not fifo.server.held, fifo.server)


def test_a_command_in_a_thread_that_outlasts_the_server(tmp_path):
    gate, done = threading.Event(), threading.Event()
    httpd.register_mi("slow", lambda: gate.wait(10), threads=True)
    fifo = Fifo(tmp_path)
    fifo.say(b':a:{"jsonrpc":"2.0","method":"slow","id":1}\n')
    wait_for(lambda: fifo.server.held, fifo.server)
    fifo.close()
    httpd.mi_pool().submit(httpd.Job(lambda: gate, lambda gate: gate.set() or done.set()))
    assert done.wait(10) and not fifo.server.held


def test_a_command_that_leaves_does_not_end_the_fifo(fifo, monkeypatch, caplog):
    """Faults behind a command: the system has no thread for it."""
    httpd.register_mi("slow", lambda: None, threads=True)
    httpd.register_mi("leave", raising(SystemExit()))
    monkeypatch.setattr(httpd, "mi_pool", raising(RuntimeError("can't start new thread")))
    fifo.say(b':a:{"jsonrpc":"2.0","method":"slow","id":1}\n:b:{"jsonrpc":"2.0","method":"leave","id":1}\n')
    assert b"Server error" in fifo.line("b")
    assert "can't start new thread" in caplog.text
    fifo.say(b":z:" + ADD % 2)
    assert fifo.line("z") == ok("3")


def test_a_large_answer_into_the_fifo(fifo):
    """It is written as the pipe takes it, and waits in a file."""
    httpd.register_mi("large", lambda: "x" * 3000000)
    fifo.say(b':a:{"jsonrpc":"2.0","method":"large","id":1}\n:z:' + ADD % 2)
    assert fifo.line("z") == ok("3")
    assert fifo.server.disk.used > 2000000 and fifo.server.held < 1000
    assert fifo.line("a") == ok('"%s"' % ("x" * 3000000))
    wait_for(lambda: not fifo.server.disk.used, fifo.server)


@impatient
@table("make, logged", [
    (lambda path: None, "No such file", "nothing there"),
    (lambda path: path.write_text(""), "it is no FIFO of a client", "a file"),
    (lambda path: path.symlink_to("a"), "Too many levels of symbolic links", "a symbolic link to a FIFO"),
    (lambda path: path.mkdir(), "Is a directory", "a directory"),
    (os.mkfifo, "nobody reads it", "a reader that never comes"),
])
def test_where_no_answer_goes(fifo, caplog, make, logged):
    make(fifo.directory / "x")
    opened = descriptors()
    fifo.say(b":x:" + ADD % 1 + b":z:" + ADD % 2)
    assert fifo.line("z") == ok("3")
    wait_for(lambda: "'x' is dropped: " + logged in caplog.text, fifo.server)
    assert fifo.read("a") == b"" and not (fifo.directory / "x").is_file() or not (fifo.directory / "x").read_bytes()
    wait_for(lambda: not fifo.server.held, fifo.server)
    assert descriptors() == opened


@impatient
def test_readers_that_stall_or_leave(fifo, caplog):
    httpd.register_mi("large", lambda: "x" * 3000000)
    call = b'{"jsonrpc":"2.0","method":"large","id":1}\n'
    opened = descriptors()
    fifo.say(b":a:" + call + b":b:" + call)
    wait_for(lambda: fifo.read("b"), fifo.server)
    os.close(fifo.readers.pop("b"))
    wait_for(lambda: "'b' is dropped: Broken pipe" in caplog.text, fifo.server)
    wait_for(lambda: "'a' is dropped: nobody reads it" in caplog.text, fifo.server)
    assert not fifo.server.held and not fifo.server.disk.used
    assert descriptors() == opened - 1


def test_answers_that_have_no_room(tmp_path, caplog):
    httpd.register_mi("large", lambda: "x" * 3000000)
    fifo = Fifo(tmp_path, spool_size=0)
    fifo.say(b':a:{"jsonrpc":"2.0","method":"large","id":1}\n')
    wait_for(lambda: "'a' is dropped: no room is left, see spool_size" in caplog.text, fifo.server)
    assert not fifo.server.held
    fifo.close()


@impatient
def test_commands_under_way_are_bounded(fifo, caplog):
    """More wait in the FIFO, and are carried out later."""
    called = []
    httpd.register_mi("call", lambda: called.append(1))
    for number in range(40):
        os.mkfifo(fifo.directory / ("r%d" % number))
    most = descriptors() + httpd.FIFO_ANSWERS
    for number in range(40):
        fifo.say(b':r%d:{"jsonrpc":"2.0","method":"call","id":1}' % number)
    wait_for(lambda: len(called) >= httpd.FIFO_ANSWERS, fifo.server)
    fifo.server.run_once(0.05)
    assert len(called) == httpd.FIFO_ANSWERS and descriptors() <= most
    assert fifo.server.held < 20000
    wait_for(lambda: caplog.text.count("nobody reads it") == 40, fifo.server)
    fifo.say(b":z:" + ADD % 2)
    assert fifo.line("z") == ok("3") and len(called) == 40
    wait_for(fifo.is_idle, fifo.server)


def test_many_writers_at_once(fifo):
    """As opensips-cli does it: a FIFO of its own for each answer, opened when the command is written."""
    def client(number):
        for turn in range(25):
            path = fifo.directory / ("r%d_%d" % (number, turn))
            os.mkfifo(path)
            with open(fifo.path, "w") as file:
                file.write(":%s:%s" % (path.name, (ADD % (100 * number + turn)).decode()))
            with open(path) as file:
                assert file.readline().encode() == ok(str(1 + 100 * number + turn)) + b"\n"
            path.unlink()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        wait_for(lambda: all(client.done() for client in clients), fifo.server, 30)
    assert [client.result() for client in clients] == [None] * 8


def served_by_somebody(path):
    os.mkfifo(path)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def of_somebody_else(path):
    if os.geteuid():
        pytest.skip("only root can make it")
    os.mkfifo(path)
    os.chown(path, 65534, -1)


@table("make, message", [
    (lambda path: path.write_text("x"), "no FIFO of this user", "a file"),
    (lambda path: os.mkfifo(path.parent / "x") or path.symlink_to("x"), "no FIFO of this user", "a symbolic link"),
    (lambda path: path.mkdir(), "no FIFO of this user", "a directory"),
    (of_somebody_else, "no FIFO of this user", "somebody else's FIFO"),
    (served_by_somebody, "a program reads", "a FIFO that is read"),
])
def test_places_that_the_fifo_does_not_take(tmp_path, make, message):
    path = tmp_path / "fifo"
    reader = make(path)
    before, opened = path.lstat(), descriptors()
    httpd.loadmodule("mi_fifo", fifo_name=path, reply_dir=tmp_path)
    server = httpd.Server(**LOCAL)
    with pytest.raises(RuntimeError, match="mi_fifo: .*" + message):
        server.start()
    assert path.lstat() == before and descriptors() == opened
    if reader:
        os.close(reader)


@table("parameters, message", [
    ({"fifo_name": "/nowhere/fifo"}, "mi_fifo: /nowhere/fifo: No such file or directory: set fifo", "no directory"),
    ({"fifo_name": ""}, "mi_fifo: : No such file", "no name"),
    ({"fifo_name": "/x\0"}, "mi_fifo", "NUL"),
    ({"reply_dir": "/nowhere"}, "mi_fifo: /nowhere is no directory: set reply_dir", "no directory for answers"),
])
def test_parameters_of_the_fifo_that_cannot_be(tmp_path, parameters, message):
    httpd.loadmodule("mi_fifo", **{"fifo_name": str(tmp_path / "fifo"), **parameters})
    server = httpd.Server(**LOCAL)
    for _ in range(2):
        with pytest.raises(httpd.ConfigError, match=message):
            server.run_once(0)
    server.stop(0)
    assert os.listdir(tmp_path) == []


def test_the_fifo_is_made_and_removed(tmp_path):
    """Whatever the umask is; and a dead one is replaced."""
    os.mkfifo(tmp_path / "fifo", 0o666)
    before = os.umask(0o777)
    try:
        fifo = Fifo(tmp_path)
        assert (tmp_path / "fifo").stat().st_mode == 0o10660
    finally:
        os.umask(before)
        fifo.close()
    assert not (tmp_path / "fifo").exists()


def test_a_fifo_that_was_replaced_is_not_removed(tmp_path):
    fifo = Fifo(tmp_path)
    (tmp_path / "fifo").unlink()
    (tmp_path / "fifo").write_text("mine")
    fifo.close()
    assert (tmp_path / "fifo").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------- prometheus

@pytest.fixture
def scrape(server):
    """The samples at /metrics, as a dict of texts; also a server in another state."""
    httpd.loadmodule("prometheus")
    return functools.partial(samples_of, server)


def samples_of(server, *fields):
    return samples(answers(exchange(server, get(b"/metrics", *fields))[0])[0].body.decode())


def samples(text):
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    assert len({line.rpartition(" ")[0] for line in lines}) == len(lines), "a sample stands there twice"
    return {name: value for name, _, value in (line.rpartition(" ") for line in lines)}


@table("raw, labels", [
    (get(), 'root="echo",method="GET",code="200"', "a GET"),
    (get().replace(b"GET", b"HEAD"), 'root="echo",method="HEAD",code="200"', "a HEAD"),
    (get(b"/echo/secret?password"), 'root="echo",method="GET",code="200"', "a path is no label"),
    (get(b"/secret"), 'root="",method="GET",code="404"', "nor if there is no such root"),
    (get().replace(b"GET", b"DELETE"), 'root="echo",method="DELETE",code="405"', "a method that the root has not"),
    (get().replace(b"GET", b"SECRET"), 'root="",method="",code="501"', "a method that nobody has is no label"),
    (b"\x00", 'root="",method="",code="400"', "what was no request"),
    (get(b"/later"), 'root="later",method="GET",code="201"', "a stream"),
    (get(b"/breaks"), 'root="breaks",method="GET",code="500"', "a handler that fails"),
])
def test_requests_are_counted_by_root_method_and_code(server, scrape, raw, labels):
    httpd.register_httpdcb("test", "later", lambda request, page: 201, lambda request, pos, buf: httpd.END)
    httpd.register_httpdcb("test", "breaks", lambda request, page: 1 / 0)
    for _ in range(3):
        exchange(server, raw, methods=raw[:4].decode().strip())
    found = scrape()
    assert [name for name in found if name.startswith("httpd_requests_total")] == ["httpd_requests_total{%s}" % labels]
    assert found["httpd_requests_total{%s}" % labels] == "3" and not any("secret" in name.lower() for name in found)
    root = labels.partition(",")[0]
    assert found["httpd_request_duration_seconds_count{%s}" % root] == "3"
    assert found['httpd_request_duration_seconds_bucket{%s,le="+Inf"}' % root] == "3"
    assert float(found["httpd_request_duration_seconds_sum{%s}" % root]) > 0
    assert list(scrape())[1] == 'httpd_requests_total{root="metrics",method="GET",code="200"}'


def test_content_is_counted_and_buckets_add_up(server, scrape):
    httpd.register_httpdcb("test", "slow", lambda request, page: time.sleep(0.003) or page.write(b"four") and 200)
    exchange(server, get(b"/slow") * 2 + get(b"/slow").replace(b"GET", b"HEAD"), due=3, methods=["GET", "GET", "HEAD"])
    found = scrape()
    assert found['httpd_response_bytes_total{root="slow"}'] == "8"
    counts = [int(value) for name, value in found.items() if name.startswith('httpd_request_duration_seconds_bucket')]
    assert len(counts) == 14 and counts == sorted(counts) and counts[2] == 0 and counts[-1] == 3


@table("accept, kind", [
    (b"", "text/plain; version=0.0.4; charset=utf-8", "a browser's nothing"),
    (b"*/*", "text/plain; version=0.0.4; charset=utf-8", "curl"),
    (b"application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
     b"text/plain;version=0.0.4;q=0.3,*/*;q=0.2", httpd.OPENMETRICS, "Prometheus 2"),
    (b"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.5", httpd.OPENMETRICS,
     "Prometheus 3"),
    (b"application/openmetrics-text", httpd.OPENMETRICS, "no version"),
    (b"application/openmetrics-text; version=0.0.1", httpd.TEXT, "a version that we do not speak"),
    (b"application/openmetrics-text;q=0", httpd.TEXT, "it is refused"),
    (b"application/openmetrics-text;q=0.2, text/plain;q=0.3", httpd.TEXT, "text is wanted more"),
    (b"application/openmetrics-text;q=x", httpd.TEXT, "no number"),
])
def test_formats(server, scrape, accept, kind):
    answer, = answers(exchange(server, get(b"/metrics", b"Accept: " + accept))[0])
    text, openmetrics = answer.body.decode(), kind == httpd.OPENMETRICS
    assert answer.status == 200 and answer.headers["Content-Type"] == kind
    assert text.endswith("\n# EOF\n") == openmetrics
    types = re.findall("(?m)^# TYPE (.*) (.*)$", text)
    assert len(dict(types)) == len(types)
    for name, what in types:  # OpenMetrics names the family, 0.0.4 the samples
        assert name.endswith("_total") == (what == "counter" and not openmetrics), name


@table("sent, kind", [
    (b"", "idle", "nothing at all"),
    (get(), "idle", "nothing after an answer"),
    (get()[:20], "head", "half a head"),
    (post(b"x" * 100)[:-50], "content", "half of the content"),
    (get(b"/large") * 9, "output", "answers that are not read"),
])
def test_timeouts_by_kind(prompt, server, scrape, far_away, sent, kind):
    httpd.register_httpdcb("test", "large", large)
    with connect(server, takes=5000) as client:
        client.sendall(sent)
        wait_for(lambda: server.connections and not server.loop.greedy, server)
        for _ in range(5):
            server.run_once(0.02)
        connection, = server.connections
        connection.expire()
        found = scrape()
    kinds = {"idle": "0", "head": "0", "content": "0", "output": "0", kind: "1"}
    assert {name: found['httpd_timeouts_total{kind="%s"}' % name] for name in kinds} == kinds


def test_connections_by_state_and_what_becomes_of_them(scrape):
    httpd.register_httpdcb("test", "wait", lambda request, page: httpd.SUSPEND)
    server = httpd.Server(**LOCAL, max_connections=3)
    with connect(server) as waiting, connect(server) as receiving, connect(server) as idle:
        waiting.sendall(get(b"/wait"))
        receiving.sendall(b"GET")
        idle.sendall(get(b"/none"))
        wait_for(lambda: len(server.connections) == 3 and server.requests == 1, server)
        found = samples_of(server)  # for which the idle one goes
        names = ("idle", "receiving", "sending", "suspended", "closing")
        shown = [found['httpd_connections{state="%s"}' % name] for name in names]
        assert shown == ["1", "1", "0", "1", "0"]  # idle: who asks
        assert found["httpd_connections_evicted_total"] == "1" and found["httpd_connections_accepted_total"] == "4"
        assert found["httpd_memory_budget_bytes"] == "4194304" and int(found["httpd_memory_held_bytes"]) > 0
        others = [connect(server) for _ in range(3)]
        for other in others:
            other.sendall(get(b"/wait"))
        wait_for(lambda: server.counters.row[httpd.REFUSED_CONNECTIONS], server)
        for other in others:
            other.close()
    server.stop(0)


def test_what_is_larger_than_the_page_is_streamed(scrape):
    server = httpd.Server(**LOCAL, buf_size=256)
    answer, = answers(exchange(server, get(b"/metrics"))[0])
    assert int(answer.headers["Content-Length"]) > 256 and "process_open_fds" in samples(answer.body.decode())
    head, = answers(exchange(server, get(b"/metrics").replace(b"GET", b"HEAD"), methods="HEAD")[0], "HEAD")
    assert head.status == 200 and server.held == 0
    server.stop(0)


def test_process_metrics_are_those_of_the_client_libraries(scrape):
    found = {name: float(value) for name, value in scrape().items() if name.startswith("process_")}
    assert abs(found["process_open_fds"] - descriptors()) < 5
    assert found["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < found["process_cpu_seconds_total"] <= time.process_time()
    assert 0 < found["process_resident_memory_bytes"] < found["process_virtual_memory_bytes"]
    assert time.time() - 86400 < found["process_start_time_seconds"] < time.time()


@table("name, kind, function, labels, message", [
    ("a-b", "gauge", int, (), "a name is made of letters, digits, _ and :", "a bad name"),
    ("1a", "gauge", int, (), "a name is made of letters, digits, _ and :", "a digit first"),
    ("a\n", "gauge", int, (), "a name is made of letters, digits, _ and :", "a line end"),
    ("a", "histogram", int, (), 'the kind is "counter" or "gauge"', "another kind"),
    ("a", "counter", int, (), "the name of a counter ends in _total", "a counter without _total"),
    ("a_total", "gauge", int, (), "the name of a counter ends in _total", "a gauge with _total"),
    ("taken", "gauge", int, (), "the name is taken", "a name that is taken"),
    ("taken_total", "counter", int, (), "the name is taken", "a name that OpenMetrics takes for the same"),
    ("process_open_fds", "gauge", int, (), "the name is taken", "a name of ours"),
    ("httpd_x", "gauge", int, (), "the name is taken", "a name that may become ours"),
    ("a", "gauge", 5, (), "no function: 5", "no function"),
    ("a", "gauge", int, "queue", "labels must be a tuple of names", "labels that are a text"),
    ("a", "gauge", int, ("__a",), "labels must be a tuple of names", "a label of Prometheus' own"),
    ("a", "gauge", int, ("a:b",), "labels must be a tuple of names", "a colon in a label"),
])
def test_register_metric_refuses(name, kind, function, labels, message):
    httpd.register_metric("taken", "gauge", "A name.", int)
    for help in ("", None, b"bytes"):
        with pytest.raises(httpd.ConfigError, match="the help says nothing"):
            httpd.register_metric("a", "gauge", help, int)
    with pytest.raises(httpd.ConfigError, match='^metric "%s": %s' % (re.escape(name), re.escape(message))):
        httpd.register_metric(name, kind, "It says something.", function, labels=labels)


@table("kind, result, labels, expected", [
    ("gauge", 5, (), {"": "5"}, "a number"),
    ("gauge", -0.5, (), {"": "-0.5"}, "a negative one"),
    ("gauge", math.inf, (), {"": "+Inf"}, "infinity"),
    ("gauge", math.nan, (), {"": "NaN"}, "no number"),
    ("counter", 0, (), {"": "0"}, "a counter"),
    ("gauge", {"in": 1, "out": 2}, ("way",), {'{way="in"}': "1", '{way="out"}': "2"}, "a label"),
    ("gauge", {("in", 5): 1}, ("way", "port"), {'{way="in",port="5"}': "1"}, "two labels"),
    ("gauge", {'a"b\\c\nd': 1}, ("x",), {'{x="a\\"b\\\\c\\nd"}': "1"}, "what has to be escaped"),
    ("gauge", {"\ud800": 1}, ("x",), {'{x="\ufffd"}': "1"}, "text that cannot leave"),
    ("gauge", {}, ("x",), {}, "nothing yet"),
    ("counter", -1, (), None, "a negative count"),
    ("counter", math.nan, (), None, "a count that is no number"),
    ("gauge", True, (), None, "a bool"),
    ("gauge", "5", (), None, "text"),
    ("gauge", {"a": 1}, (), None, "a dict, and no labels"),
    ("gauge", 5, ("x",), None, "labels, and no dict"),
    ("gauge", {"a": 1}, ("x", "y"), None, "too few values"),
    ("gauge", 10 ** 5000, (), None, "a number of 5,000 digits"),
])
def test_register_metric(scrape, caplog, kind, result, labels, expected):
    name = "test_total" if kind == "counter" else "test"
    httpd.register_metric(name, kind, 'Text "with"\nlines \\.', lambda: result, labels=labels)
    found = scrape()
    assert "process_open_fds" in found
    mine = {key[len(name):]: value for key, value in found.items() if key.startswith(name)}
    assert mine == (expected or {})
    assert ("the metric %s failed" % name in caplog.text) == (expected is None)


def test_a_metric_that_fails_is_left_out(server, scrape, caplog):
    httpd.register_metric("test", "gauge", "It fails.", lambda: 1 / 0)
    assert "test" not in scrape() and "ZeroDivisionError" in caplog.text
    text = exchange(server, get(b"/metrics"))[0].decode()
    assert "# TYPE test " not in text and "# TYPE process_open_fds gauge\n" in text


def test_mi_commands_are_counted(mi, scrape):
    httpd.register_mi("later", lambda fail=False: 1 / 0 if fail else 1, threads=True)
    for method in ("version", "version", "secret", "later"):
        mi({"jsonrpc": "2.0", "method": method, "id": 1})
    mi([{"jsonrpc": "2.0", "method": "later", "params": [True]}, {"jsonrpc": "2.0", "method": "version"}, 5])
    found = {name[23:]: value for name, value in scrape().items() if name.startswith("httpd_mi_commands_total")}
    assert found == {
        '{command="version",outcome="ok"}': "3", '{command="later",outcome="ok"}': "1",
        '{command="",outcome="error"}': "2", '{command="later",outcome="error"}': "1"}


def test_statistics_of_mi_begin_again_and_metrics_do_not(mi, scrape):
    def call(method, *params):
        return mi({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).json().get("result")

    assert call("list_statistics")["httpd:accepted"] == "incremental"
    assert call("list_statistics")["httpd:connections"] == "non-incremental"
    assert list(call("list_statistics")) == list(call("get_statistics", "all"))
    assert call("get_statistics", [["requests"], [["httpd:accepted", "nothing"]]]) == {
        "httpd:requests": 4, "httpd:accepted": 5}
    assert call("reset_statistics", ["requests", "budget_bytes"]) == "OK"
    assert call("get_statistics", ["requests", "accepted", "budget_bytes"]) == {
        "httpd:requests": 1, "httpd:accepted": 7, "httpd:budget_bytes": 4194304}
    assert call("reset_statistics", ["nothing"]) is None and scrape()["httpd_connections_accepted_total"] == "9"


def test_counters_are_shared_by_processes():
    counters = httpd.Counters(3)
    counters.add("a", "x", "200")
    child = os.fork()
    if not child:
        counters.take(1)
        counters.row[httpd.REQUESTS] += 5
        counters.row[httpd.HELD_BYTES] += 7
        counters.add("b", "y")
        counters.add("a", "x", "200")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    counts = {series: numbers[0] for series, numbers in counters.series().items()}
    assert counts == {("a", "x", "200"): 2, ("b", "y"): 1}
    assert counters.totals()[httpd.REQUESTS] == 5 and counters.totals()[httpd.HELD_BYTES] == 7
    counters.take(1)  # a replacement: it goes on, and gauges begin anew
    counters.add("b", "y")
    counters.row[counters.slot(("a", "x", 200))] += 1
    assert {series: numbers[0] for series, numbers in counters.series().items()} == {
        ("a", "x", "200"): 3, ("b", "y"): 2}
    assert counters.totals()[httpd.REQUESTS] == 5 and counters.totals()[httpd.HELD_BYTES] == 0
    assert all(8 * len(row) % 64 == 0 for row in counters.rows)


def test_series_that_find_no_room_are_counted_as_other():
    counters = httpd.Counters()
    counters.add("a", "x" * 127, "y")
    for number in range(1000):
        counters.add("a", "root%d" % number, "GET")
        counters.add("b", "root%d" % number)
    found = {series: numbers[0] for series, numbers in counters.series().items()}
    assert sum(found.values()) == 2001 and len(counters.slots) == len(found) == httpd.SLOTS + 1
    assert found["a", "other", "other"] > 800 and found["b", "other"] > 800 and ("a", "root0", "GET") in found


def test_tls_is_counted(pki, scrape):
    files = dict(tls_cert_file=pki / "ec.pem", tls_key_file=pki / "ec.key", tls_ciphers=BOTH)
    server = httpd.Server(**LOCAL, **files)
    with server:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            with context.wrap_socket(connect(server)) as client:
                client.sendall(get(b"/metrics", b"Connection: close"))
                found = samples(Answer(client, "GET").body.decode())
        with connect(server) as client:
            client.sendall(b"\x16\x03\x01\x00\x05hello")
            read(client)
        wait_for(lambda: ("httpd_tls_handshake_failures_total", "none") in server.counters.slots)
    assert found['httpd_tls_handshakes_total{version="TLSv1.2"}'] == "1"
    assert found['httpd_tls_handshakes_total{version="TLSv1.3"}'] == "2"
    end = subprocess.run(["openssl", "x509", "-noout", "-enddate", "-in", str(pki / "ec.pem")],
                         capture_output=True, text=True).stdout.strip().partition("=")[2]
    assert float(found["httpd_tls_certificate_expiry_timestamp_seconds"]) == ssl.cert_time_to_seconds(end)


# ---------------------------------------------------------------------------------------------------------- Access log

@pytest.fixture
def logging_server(tmp_path, monkeypatch, request):
    """A server without a thread that logs, and what is in its log when it has ended."""
    monkeypatch.setattr(httpd, "COLLECT", 0.001)
    httpd.register_httpdcb("test", "echo", echo, content_type="application/json", methods=("GET", "POST"))
    server = httpd.Server(**LOCAL, access_log=tmp_path / "log", access_log_format=getattr(request, "param", "combined"))
    assert server.port  # from here on it listens, and logs

    def lines():
        server.stop(0)
        return (tmp_path / "log").read_text("ascii").splitlines()

    yield server, lines
    server.stop(0)


COMBINED = re.compile(  # what a strict reader takes
    r'([0-9.]+) - (\S+) \[(\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d \+0000)\] "([^"\\]|\\x[0-9A-F]{2})*" \d{3} \d+'
    r' "([^"\\]|\\x[0-9A-F]{2})+" "([^"\\]|\\x[0-9A-F]{2})+"')
LOG_ROWS = [
    (get(), '"GET /echo HTTP/1.1" 200 ', ("GET", "/echo", "", ""), "a request"),
    (get(b"/echo", b"Referer: http://a/", b"User-Agent: b c"), '"GET /echo HTTP/1.1" 200 ',
     ("GET", "/echo", "http://a/", "b c"), "referer and user agent"),
    (get(b"/nowhere"), '"GET /nowhere HTTP/1.1" 404 ', ("GET", "/nowhere", "", ""), "a refusal of the server"),
    (get().replace(b"GET", b"HEAD"), '"HEAD /echo HTTP/1.1" 200 0 ', ("HEAD", "/echo", "", ""), "HEAD has no content"),
    (b"\x16\x03\x01\x00\xff\r\n", r'"\x16\x03\x01\x00\xFF" 400 ', ("", "\x16\x03\x01\x00\xff", "", ""), "a TLS hello"),
    (b"\r\nGET / HTTP/1.1\r\nAuthorization: secret\r\nBad Field: 1\r\n\r\n", '"GET / HTTP/1.1" 400 ',
     ("", "GET / HTTP/1.1", "", ""), "the first line only: fields may hold a password"),
    (b'GET /" 200 0 "-" "-\x1b[2J\r\n\r\n', r'"GET /\x22 200 0 \x22-\x22 \x22-\x1B[2J" 400 ',
     ("", 'GET /" 200 0 "-" "-\x1b[2J', "", ""), "a forged field, and a terminal's escape"),
    (get(b'/echo?"', b'Referer: \\', b'User-Agent: a"\tb\\\xe4'), r'"GET /echo?\x22 HTTP/1.1" 200 ',
     ("GET", '/echo?"', "\\", 'a"\tb\\\xe4'), "what would end a field"),
]


@table("raw, text, fields", LOG_ROWS)
def test_lines_of_the_combined_log(logging_server, raw, text, fields):
    server, lines = logging_server
    exchange(server, raw, raw, methods=["HEAD"] * 2 if raw.startswith(b"HEAD") else "GET", due=b"\r\n\r\n")
    found = lines()
    assert found and all(COMBINED.fullmatch(line) and text in line for line in found)
    for value in filter(None, fields[2:]):
        assert '"%s"' % httpd.escape_bytes(value) in found[0]


@pytest.mark.parametrize("logging_server", ["json"], indirect=True)
@table("raw, text, fields", LOG_ROWS)
def test_lines_of_the_json_log(logging_server, raw, text, fields):
    server, lines = logging_server
    exchange(server, raw, methods=["HEAD"] if raw.startswith(b"HEAD") else "GET", due=b"\r\n\r\n")
    line, = map(json.loads, lines())
    assert (line["method"], line["target"], line["referer"], line["user_agent"]) == fields
    assert str(line["status"]) in text and line["client"] == "127.0.0.1" and line["whole"] is True
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"]) and 0 <= line["seconds"] < 10
    assert line["user"] == line["mi"] == ""


def test_a_user_is_one_field(monkeypatch, logging_server):
    server, lines = logging_server
    monkeypatch.setattr(httpd.Request, "user", "a b\n\u20ac\ud800")
    exchange(server, get())
    assert r" - a\x20b\x0A\xE2\x82\xAC\x5Cud800 [" in lines()[0]


@pytest.mark.parametrize("logging_server", ["json"], indirect=True)
@table("calls, said", [
    ({"method": "which"}, "which", "one"),
    ([{"method": "which"}, {"method": "uptime"}], "which,uptime", "several"),
    ([{"method": "which"}, {"method": "which,\nup"}, {"method": 5}], "which,which??up,5", "what is none"),
    ([{"method": "x" * 300}] * 2, "x" * 200, "bounded"),
])
def test_names_of_commands(logging_server, calls, said):
    server, lines = logging_server
    httpd.loadmodule("mi_http")
    for call in [calls] if isinstance(calls, dict) else calls:
        call.update(jsonrpc="2.0", id=1)
    exchange(server, post(json.dumps(calls).encode(), b"Content-Type: application/json", path=b"/mi"))
    assert [json.loads(line)["mi"] for line in lines()] == [said]


def test_what_is_cut_has_its_line_too(logging_server):
    server, lines = logging_server
    httpd.register_httpdcb("test", "cut", lambda request, page: 200, lambda request, pos, buf: 7 if not pos else 1 / 0)
    exchange(server, get(b"/cut"), due=ended)
    exchange(server, get())
    assert [line.split('"')[2].split()[0] for line in lines()] == ["200", "200"]


def test_only_the_servers_own_responses(logging_server, tmp_path):
    server, lines = logging_server
    with httpd.Server(**LOCAL) as other:
        assert raw_get(other.port) == 200
    exchange(server, get(b"/nowhere"))
    assert len(lines()) == 1 and not httpd.access_logs and not httpd.observers


def test_ever_new_heads_are_not_kept(logging_server):
    server, lines = logging_server
    log = httpd.access_logs
    for number in range(300):
        exchange(server, get(b"/nowhere?%d" % number))
    assert len(log[0].known) == 0
    for number in range(3):
        exchange(server, get(b"/nowhere"))
    assert len(log[0].known) == 1 and len(lines()) == 303


@table("fault, wrong", [
    (raising(OSError(errno.ENOSPC, "full")), "full", "a full disk"),
    (raising(BrokenPipeError(errno.EPIPE, "nobody reads")), "nobody reads", "a closed pipe"),
])
def test_a_log_that_cannot_be_written(logging_server, monkeypatch, caplog, fault, wrong):
    """Nothing is lost that there is room for; it is said once, and again when it is over."""
    server, lines = logging_server
    monkeypatch.setattr(httpd, "LOG_RETRY", 0.01)
    monkeypatch.setattr(httpd, "LOG_WAITING", 300)
    write = os.write
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(httpd.os, "write", fault)
    for _ in range(3):
        exchange(server, get(b"/nowhere"))
        wait_for(lambda: httpd.access_logs[0].rest)
    for _ in range(10):
        exchange(server, get(b"/nowhere"))
    assert caplog.text.count("lines are going to be lost: ") == 1 and wrong in caplog.text
    lost = httpd.access_logs[0].lost
    monkeypatch.setattr(httpd.os, "write", write)
    wait_for(lambda: "is written again, %d lines were lost" % lost in caplog.text)
    found = lines()
    assert lost > 0 and len(found) == 13 - lost and all(map(COMBINED.fullmatch, found))


@pytest.mark.parametrize("size", [1, 50, 100, 150])
def test_a_torn_line_is_ended_and_written_again(logging_server, monkeypatch, size):
    """Whoever writes to the file between the two halves joins nothing but the beginning, which is true."""
    server, lines = logging_server
    monkeypatch.setattr(httpd, "LOG_RETRY", 0.01)
    write, torn = os.write, []

    def short(fd, data):
        if torn:
            return write(fd, data)
        torn.append(data)
        return write(fd, data[:size])

    monkeypatch.setattr(httpd.os, "write", short)
    for _ in range(2):
        exchange(server, get(b"/nowhere"))
    found = lines()
    whole = [line for line in found if COMBINED.fullmatch(line)]
    assert len(whole) == 2 and all(whole[0].startswith(line) for line in found if line not in whole)
    assert "" not in found


def test_a_reader_that_does_not_read_delays_nobody(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(httpd, "LOG_WAITING", 100000)  # more than a pipe holds
    monkeypatch.setattr(httpd, "LOG_CLOSING", 0.1)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(httpd.ConfigError, match="access_log .*fifo cannot be opened"):
        httpd.Server(**LOCAL, access_log=tmp_path / "fifo").port  # nobody has it open: it must not wait either
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with httpd.Server(**LOCAL, access_log=tmp_path / "fifo") as server:
            with connect(server) as client:
                raw = get(b"/" + b"x" * 4000) * 10
                wait_for(lambda: client.say(raw) or client.read() and httpd.access_logs[0].lost)
        assert caplog.text.count("going to be lost: it takes too long") == 1
        assert "the end is lost" in caplog.text
    finally:
        os.close(reader)


def test_a_full_disk(monkeypatch, caplog):
    server = httpd.Server(**LOCAL, access_log="/dev/full")
    exchange(server, get(b"/nowhere"))
    wait_for(lambda: "No space left" in caplog.text)
    server.stop(0)
    assert "1 lines are lost" in caplog.text


def test_a_log_is_opened_again(logging_server, tmp_path):
    server, lines = logging_server
    log, = httpd.access_logs
    exchange(server, get(b"/nowhere"))
    wait_for(lambda: (tmp_path / "log").stat().st_size)
    (tmp_path / "log").rename(tmp_path / "old")
    log.reload()
    wait_for((tmp_path / "log").exists)
    (tmp_path / "log").rename(tmp_path / "older")
    (tmp_path / "log").mkdir()
    log.reload()
    wait_for(lambda: not log.reopening)
    exchange(server, get(b"/nowhere"))
    server.stop(0)
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("old", "older")] == [1, 1]
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640 & ~os.umask(os.umask(0o22))


def test_a_log_to_syslog(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(httpd, "SYSLOG", str(tmp_path / "socket"))
    monkeypatch.setattr(httpd, "LOG_RETRY", 0.01)
    server = httpd.Server(**LOCAL, access_log="syslog:")
    exchange(server, get(b"/nowhere"), get(b"/nowhere"), due=2)
    wait_for(lambda: "going to be lost" in caplog.text)     # it is not there yet
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as system:
        system.bind(str(tmp_path / "socket"))
        system.settimeout(10)
        for _ in range(2):
            assert re.fullmatch(rb'<30>httpd: 127.0.0.1 - - .* 404 .*"-" "-"\0?', system.recv(9999))
    server.stop(0)


def test_a_log_that_cannot_be(tmp_path):
    server = httpd.Server(**LOCAL, access_log=tmp_path / "nowhere" / "log")
    for _ in range(2):
        with pytest.raises(httpd.ConfigError, match="access_log .* cannot be opened: .*No such file"):
            server.start()
    with pytest.raises(httpd.ConfigError, match="access_log_format must be combined or json, not 'xml'"):
        httpd.Server(access_log_format="xml")


def test_a_log_to_stdout_and_sighup(tmp_path):
    text = "[httpd]\nip = 127.0.0.1\nport = 0\naccess_log = -\n[mi_http]\n"
    with command(config(tmp_path, text)) as process:
        port = int(re.search(r":(\d+)", process.stderr.readline())[1])
        assert process.stderr.readline() == "  /mi  mi_http\n" and raw_get(port) == 404
        assert COMBINED.fullmatch(process.stdout.readline()[:-1])
        process.send_signal(signal.SIGHUP)
        assert raw_get(port) == 404
        process.terminate()
        output, errors = process.communicate(timeout=20)
        assert COMBINED.fullmatch(output[:-1]) and errors == ""


def test_a_forked_child_writes_no_line(logging_server):
    server, lines = logging_server

    def forks(request, page):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return page.write("x") and 200

    httpd.register_httpdcb("test", "fork", forks)
    exchange(server, get(b"/fork"))
    assert len(lines()) == 1


# ------------------------------------------------------------------------------------------------------------- mi_html

HOSTILE = "<script>alert(1)</script>\"'&"
FROM_PAGE = b"Origin: http://example"
AS_FORM = b"Content-Type: application/x-www-form-urlencoded"


@pytest.fixture
def console(server):
    """Ask for the page; returns the answer."""
    httpd.loadmodule("mi_html")

    def ask(path=b"/", raw=b""):
        return answers(exchange(server, raw or get(path))[0])[0]

    return ask


def order(content, *fields, path=b"/?data"):
    """A command, as a form of the page sends it."""
    return post(content, *(fields or (FROM_PAGE, AS_FORM)), path=path)


@table("raw, status", [
    (get(b"/"), 200, "the page"),
    (get(b"/").replace(b"GET", b"HEAD"), 200, "its head"),
    (get(b"/?x"), 200, "a query that says nothing"),
    (get(b"/?data"), 200, "what moves"),
    (get(b"/index.html"), 404, "another path"),
    (get(b"//"), 404, "nearly the path"),
    (get(b"/favicon.ico"), 404, "what browsers ask for"),
    (order(b"command=version", path=b"/x"), 404, "a command to another path"),
    (get(b"/?command=version").replace(b"GET", b"PUT"), 405, "neither GET nor POST"),
    (order(b"command=version"), 200, "a command"),
    (order(b"command=version", AS_FORM), 403, "no Origin: this is no browser, or an old one"),
    (order(b"command=version", b"Origin: null", AS_FORM), 403, "the Origin of a sandbox"),
    (order(b"command=version", b"Origin: http://elsewhere", AS_FORM), 403, "of another site"),
    (order(b"command=version", b"Origin: http://example:81", AS_FORM), 403, "of another port"),
    (order(b"command=version", FROM_PAGE, b"Content-Type: text/plain"), 403, "not as the forms send it"),
    (order(b"command=version", FROM_PAGE), 403, "no type"),
])
def test_the_console_is_one_page_and_commands_come_from_it_only(server, console, raw, status):
    methods = raw[:4].decode().strip()
    answer = answers(exchange(server, raw, methods=methods)[0], methods)[0]
    assert answer.status == status


def test_what_the_console_sends_is_bound_to_itself(console):
    answer = console()
    policy = answer.headers["Content-Security-Policy"]
    for kind in ("style", "script"):
        (text,) = re.findall(b"<%s>(.*?)</%s>" % (kind.encode(), kind.encode()), answer.body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert "; %s-src 'sha256-%s'" % (kind, digest) in policy
    assert policy.startswith("default-src 'none'; ") and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert not re.search(rb" style=| on[a-z]+=|(?:src|href)=\"?(?:http|//)", answer.body)
    for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
                        ("X-Frame-Options", "DENY"), ("Referrer-Policy", "same-origin")):
        assert answer.headers[name] == value


def test_the_console_is_for_localhost(server):
    httpd.loadmodule("mi_html")
    with httpd.Server(**{**LOCAL, "allowed_hosts": ""}) as other:
        assert raw_get(other.port, raw=get(b"/")) == 421
        assert raw_get(other.port, raw=get(b"/").replace(HOST, b"Host: localhost\r\n")) == 200


def test_the_console_shows_what_is_in_force_and_no_secret(server, console, tmp_path, monkeypatch):
    monkeypatch.setattr(httpd, "places", {})
    (tmp_path / "spoken.py").write_text("def mod_init(params):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    httpd.load_config(config(tmp_path, '[httpd]\nauth_realm = "%s"\n[mi_http]\nthreads = 3\n[spoken]\nkey = xyzzy1'
                             % HOSTILE.replace('"', '\\"')))
    with httpd.Server(**LOCAL, auth_username="me", auth_password="xyzzy2") as other, connect(other) as client:
        client.say(get(b"/", b"Authorization: Basic " + base64.b64encode(b"me:xyzzy2")))
        page = answers(read(client, 1))[0].body.decode()
    assert "xyzzy" not in page and page.count("set, not shown") == 2
    assert "<td>%s</td><td>%s:2</td>" % (HOSTILE.translate(httpd.HTML_ESCAPES), tmp_path / "test.cfg") in page
    assert "<td>3</td><td>%s:4</td>" % (tmp_path / "test.cfg") in page
    assert "<td>me</td><td>the program</td>" in page
    assert "<td>10.0</td><td>default</td>" in page
    assert "none: plain HTTP" in page


def test_the_console_shows_the_days_of_the_certificate(pki):
    httpd.loadmodule("mi_html")
    server = httpd.Server(**LOCAL, tls_cert_file=str(pki / "rsa.pem"), tls_key_file=str(pki / "rsa.key"))
    days = (server.transport.expires - time.time()) / 86400
    server.port
    page = httpd.show_console(server, {})
    assert re.search(r'<dd id="certificate">\d{4}-\d\d-\d\d, %d days left</dd>' % days, page)
    server.stop(0)


def test_hostile_names_are_text(server, console):
    def command(number: int, text=HOSTILE, *, other=None):
        return [number, text]

    command.__doc__ = HOSTILE
    httpd.register_mi("hostile", command)
    httpd.register_mi("unreadable", dict)
    httpd.register_httpdcb(HOSTILE, "hostile", echo, methods=("GET", "X-'&"))
    page = console(raw=order(b"command=hostile&.number=%2D7&.other=", path=b"/")).body.decode()
    assert "<script>alert" not in page and page.count(HOSTILE.translate(httpd.HTML_ESCAPES)) == 3
    assert 'name=".number" placeholder="a number " required>' in page
    assert '<details id="c-hostile" open>' in page
    assert json.dumps([-7, HOSTILE], indent=2).translate(httpd.HTML_ESCAPES) + "</output>" in page
    assert "GET X-&#39;&amp; HEAD OPTIONS" in page
    httpd.register_mi("surrogate", lambda: "\ud800")
    assert console(raw=order(b"command=surrogate")).body.decode() == '"\ufffd"'


@table("form, expected", [
    (b"command=join&.first=a", b'["a","b",null]', "what is empty or missing has its default"),
    (b"command=join&.first=&.second=", b'["","b",null]', "but what has none is empty text"),
    (b"command=join&.first=%5B1,2%5D&.third=%7B%7D", b'[[1,2],"b",{}]', "JSON"),
    (b"command=join&.first=%5B1,2", b'["[1,2","b",null]', "what only begins like it"),
    (b"command=join&.first=" + b"%5B" * 100, b'["' + b"[" * 100 + b'","b",null]', "and deeply"),
    (b"command=half&.number=3", b"1.5", "a number"),
    (b"command=half&.number=three", b"Error -32602: Invalid params. number must be a number, not 'three'", "none"),
    (b"command=nothing", b"Error -32601: Method not found. ", "no such command"),
    (b"", b"Error -32601: Method not found. ", "no command"),
    (b"command=refuse", b"Error 404: no such dialog. ", "a command's own error"),
])
def test_commands_with_arguments(server, console, form, expected):
    def refuse():
        raise httpd.HTTPError(404, "no such dialog")

    httpd.register_mi("join", lambda first, second="b", third=None: [first, second, third])
    httpd.register_mi("half", lambda number: number / 2)
    httpd.mi_commands["half"].function.__annotations__["number"] = float
    httpd.register_mi("refuse", refuse)
    answer = console(raw=order(form))
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    said = answer.body
    if not said.startswith(b"Error"):
        said = json.dumps(json.loads(said), separators=(",", ":")).encode()
    assert said == expected


def test_a_long_command_keeps_nobody_waiting(server, console):
    go_on = threading.Event()
    httpd.register_mi("long", lambda: go_on.wait(10) and "x" * 2000000, threads=True)
    with connect(server) as client:
        client.say(order(b"command=long"))
        wait_for(lambda: any(connection.shown_as() == httpd.SUSPENDED for connection in server.connections), server)
        moving = console(b"/?data").json()
        assert moving["suspended"] == "1" and moving["line-rate"].startswith("M")
        go_on.set()
        answer = answers(pump(server, client)[0])[0]  # larger than the page: by way of a file
    assert answer.status == 200 and answer.json() == "x" * 2000000


def test_all_that_moves_has_its_place(server, console):
    page = console().body.decode()
    moving = console(b"/?data").json()
    for name, value in moving.items():
        assert page.count(' id="%s"' % name) == 1, name
    assert len(re.findall(r'<path class="k\d" id="line-\w+" d="M149,50L[0-9., ]+V50Z"/>', page)) == 10


@pytest.mark.parametrize("module", ["", "prometheus"])
def test_the_console_costs_nothing_when_nobody_looks(server, console, monkeypatch, module):
    if module:
        httpd.loadmodule(module)
    monkeypatch.setattr(httpd, "POINT_SECONDS", 0.01)
    server.port
    before = httpd.observers[:], server.loop.companions[:], len(server.loop.timers)
    for view in (1, 2):
        console()
        history = httpd.watched(server)
        assert history in server.loop.companions
        assert len(httpd.observers) == 1
        wait_for(lambda: len(history.points) > 3, server)
        assert len(server.loop.timers) == 1  # one, however often it is looked at
        history.seen -= httpd.UNWATCHED + 1
        wait_for(lambda: history not in server.loop.companions, server)
        assert (httpd.observers, server.loop.companions, len(server.loop.timers)) == before
    console()
    server.stop(0)  # while somebody looks
    assert httpd.observers == before[0]


def test_plots_tell_what_happens(server, console, monkeypatch):
    monkeypatch.setattr(httpd, "POINT_SECONDS", 0.01)
    console()
    history = httpd.watched(server)
    for path in (b"/echo", b"/nothing", b"/echo"):
        exchange(server, get(path))
    count = len(history.points)
    wait_for(lambda: len(history.points) > count + 1, server)
    assert max(point["rate"] for point in history.points) > 0
    assert max(point["errors"] for point in history.points) > 0
    assert 0 < max(point["median"] for point in history.points) <= max(point["p95"] for point in history.points)
    history.points.extend(list(history.points) * 200)
    assert len(history.points) == httpd.POINTS
    assert console(b"/?data").json()["line-rate"].startswith("M0,50L 0,")


@table("counts, share, milliseconds", [
    ([0] * 14, 0.5, 0, "nothing"),
    ([10] + [0] * 13, 0.5, 0.25, "the middle of a bucket"),
    ([5, 5] + [0] * 12, 0.5, 0.5, "its end"),
    ([0, 10] + [0] * 12, 0.5, 0.75, "between its bounds"),
    ([0] * 13 + [1], 0.95, 10000, "more than the last bound"),
])
def test_quantiles(counts, share, milliseconds):
    assert httpd.quantile(counts, share) == pytest.approx(milliseconds)


# ---------------------------------------------------------------------------------------------------------------- WSGI

def mount(app, threads=0, root="app"):
    httpd.register_wsgi("test", root, app, threads=threads)


def fetch(server, raw=None, method="GET", path="/app", fields=""):
    """All that comes of one request, and how it ended; the answer is taken apart if it is whole."""
    raw = raw or ("%s %s HTTP/1.1\r\nHost: example\r\nConnection: close\r\n%s\r\n" % (method, path, fields)).encode()
    with connect(server) as client:
        client.sendall(raw)
        data = read(client)
    try:
        answer, = answers(data, method)
    except http.client.IncompleteRead:
        return data, None
    return data, answer


def inspect(environ, start_response):
    """Says what it has been given."""
    told = {name: value for name, value in environ.items() if isinstance(value, str)}
    told["body"] = environ["wsgi.input"].read().decode("latin-1")
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]


BODY = b"Content-Length: 3\r\n\r\nabc"
ENVIRON_ROWS = [
    (b"GET /app", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "", "QUERY_STRING": "", "REQUEST_METHOD": "GET"},
     "the mount itself"),
    (b"GET /app/", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/"}, "with a slash"),
    (b"GET /app/a%20b%2Fc;d?x=1&y=%20", b"\r\n", {"PATH_INFO": "/a b/c;d", "QUERY_STRING": "x=1&y=%20"},
     "decoded once, the query not at all"),
    (b"GET /app/%25%32%46", b"\r\n", {"PATH_INFO": "/%2F"}, "once is not twice"),
    (b"GET /app/%FF%C3%A4", b"\r\n", {"PATH_INFO": "/\xff\xc3\xa4"}, "bytes that are no UTF-8 are kept, as latin-1"),
    (b"GET /%61pp/x", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/x"}, "an encoded root is the root"),
    (b"GET /app%2Fx", b"\r\n", {"SCRIPT_NAME": "/app", "PATH_INFO": "/x"}, "so is its slash"),
    (b"GET http://elsewhere/app/x?y", b"\r\n",
     {"SCRIPT_NAME": "/app", "PATH_INFO": "/x", "QUERY_STRING": "y", "HTTP_HOST": "elsewhere"}, "absolute-form"),
    (b"GET /appx/y", b"\r\n", {"SCRIPT_NAME": "", "PATH_INFO": "/appx/y"}, "mounted at the root"),
    (b"GET /", b"\r\n", {"SCRIPT_NAME": "", "PATH_INFO": "/"}, "the root itself"),
    (b"GET http://elsewhere", b"\r\n", {"SCRIPT_NAME": "", "PATH_INFO": "/"}, "absolute-form without a path"),
    (b"OPTIONS *", b"\r\n", {"PATH_INFO": "/", "REQUEST_METHOD": "OPTIONS"}, "PATH_INFO begins with a slash"),
    (b"GET /app", b"X_Real-IP: evil\r\nX-Real-IP: good\r\nX_A: b\r\n\r\n",
     {"HTTP_X_REAL_IP": "good", "HTTP_X_A": None}, "names with _ are left out"),
    (b"GET /app", b"X-A: b\r\nX-A: c\r\nCookie: d=e\r\nCookie: f=g\r\n\r\n",
     {"HTTP_X_A": "b, c", "HTTP_COOKIE": "d=e; f=g"}, "several of a name"),
    (b"GET /app", b"X-A: \xe4\r\n\r\n", {"HTTP_X_A": "\xe4"}, "a field is latin-1"),
    (b"GET /app", b"\r\n", {"CONTENT_LENGTH": None, "CONTENT_TYPE": None, "HTTP_CONTENT_LENGTH": None, "body": ""},
     "no content"),
    (b"POST /app", b"Content-Length: 0\r\n\r\n", {"CONTENT_LENGTH": "0", "body": ""}, "content of no bytes"),
    (b"POST /app", b"Content-Type: text/x\r\n" + BODY,
     {"CONTENT_LENGTH": "3", "CONTENT_TYPE": "text/x", "HTTP_CONTENT_TYPE": None, "HTTP_CONTENT_LENGTH": None,
      "body": "abc"},
     "content"),
    (b"POST /app", b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
     {"CONTENT_LENGTH": "3", "HTTP_TRANSFER_ENCODING": None, "body": "abc"}, "chunks"),
    (b"GET /app", BODY, {"REQUEST_METHOD": "GET", "body": "abc"}, "GET with content"),
    (b"PUT /app", BODY, {"REQUEST_METHOD": "PUT", "body": "abc"}, "PUT with content"),
    (b"PATCH /app", BODY, {"REQUEST_METHOD": "PATCH", "body": "abc"}, "PATCH with content"),
    (b"DELETE /app", BODY, {"REQUEST_METHOD": "DELETE", "body": "abc"}, "DELETE with content"),
    (b"OPTIONS /app", BODY, {"REQUEST_METHOD": "OPTIONS", "body": "abc"}, "OPTIONS with content"),
    *((method + b" /app/x", BODY, {"REQUEST_METHOD": method.decode(), "PATH_INFO": "/x", "body": "abc"},
       "every method: %s" % method.decode())
      for method in (b"PROPFIND", b"MKCOL", b"REPORT", b"QUERY", b"get", b"*", b"X-|~")),
    (b"PROPFIND /", b"\r\n", {"REQUEST_METHOD": "PROPFIND", "SCRIPT_NAME": ""}, "every method, mounted at the root"),
    (b"MKCOL http://elsewhere/app/x", b"\r\n", {"REQUEST_METHOD": "MKCOL"}, "every method, absolute-form"),
    (b"GET /app/a%2Fb?c=%20", b"\r\n", {"RAW_URI": "/app/a%2Fb?c=%20", "REQUEST_URI": "/app/a%2Fb?c=%20"},
     "the target as sent"),
]


@table("begin, rest, expected", ENVIRON_ROWS)
def test_environ(server, begin, rest, expected):
    mount(inspect)
    mount(inspect, root="")
    answer, = answers(exchange(server, begin + b" HTTP/1.1\r\n" + HOST + rest)[0])
    told = answer.json()
    assert answer.status == 200 and {name: told.get(name) for name in expected} == expected
    assert told["SERVER_PORT"] == str(server.port)
    assert told["SERVER_NAME"] == told["REMOTE_ADDR"] == "127.0.0.1"
    assert told["SERVER_PROTOCOL"] == "HTTP/1.1"


EVERY_METHOD_ROWS = [  # what comes, its answer, and what comes of it again: nothing depends on what has been seen
    (b"PROPFIND /app HTTP/1.1\r\nHost: a\r\n\r\n", 200, "a root that takes every method"),
    (b"PROPFIND /app HTTP/1.1\r\n\r\n", 400, "it is known there: the Host field is looked at"),
    (b"PROPFIND /app HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "and the framing"),
    (b"PROPFIND /echo HTTP/1.1\r\nHost: a\r\n\r\n", 501, "another root does not take it"),
    (b"PROPFIND /echo HTTP/1.1\r\n\r\n", 501, "method before Host"),
    (b"PROPFIND /none HTTP/1.1\r\nHost: a\r\n\r\n", 501, "nor does nobody: method before root"),
    (b"PROPFIND /app HTTP/2.0\r\nHost: a\r\n\r\n", 505, "version before method"),
    (b"PROPFIND /echo HTTP/1.1\r\nHost : a\r\n\r\n", 400, "grammar before method"),
    (b"PROPFIND /app HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n", 417, "an expectation"),
    (b"PROPFIND * HTTP/1.1\r\nHost: a\r\n\r\n", 400, "* is for OPTIONS only"),
    (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 501, "CONNECT is for nobody"),
    (b"CONNECT /app HTTP/1.1\r\nHost: a\r\n\r\n", 400, "nor in another form"),
    (b"TRACE /app HTTP/1.1\r\nHost: a\r\n\r\n", 405, "TRACE neither"),
]


@table("raw, status", EVERY_METHOD_ROWS)
def test_every_method(server, raw, status):
    mount(inspect)
    method = raw.partition(b" ")[0].decode()
    for _ in range(4):  # cold, and when the head might be remembered
        answer, = answers(exchange(server, raw)[0])
        assert answer.status == status
        if status == 405:
            assert answer.headers["Allow"] == "GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS"
        if status == 200:
            assert answer.json()["REQUEST_METHOD"] == method


def test_a_root_that_takes_every_method_may_go(server):
    """What was known because of it is not any more: neither the answer nor the end depends on what was seen."""
    mount(inspect)
    raw = b"PROPFIND /app HTTP/1.1\r\nHost: a\r\n\r\n"
    for _ in range(3):
        assert answers(exchange(server, raw)[0])[0].status == 200
    httpd.unregister_httpdcb("app")
    data, end = exchange(server, raw)
    assert (answers(data)[0].status, end) == (501, "closed")
    httpd.register_httpdcb("test", "app", echo)
    data, end = exchange(server, raw)
    assert (answers(data)[0].status, end) == (501, "closed")
    httpd.unregister_httpdcb("app")
    httpd.register_httpdcb("test", "app", echo, methods=None)  # not for WSGI alone
    told = answers(exchange(server, raw)[0])[0].json()
    assert told["method"] == "PROPFIND"
    assert answers(exchange(server, raw.replace(b"PROPFIND", b"OPTIONS"))[0])[0].json()["method"] == "OPTIONS"


def test_the_input_is_a_file_and_the_wrapper_a_class(running):
    """On every Python: io.TextIOWrapper asks a file more than PEP 3333 does."""
    def app(environ, start_response):
        content = environ["wsgi.input"]
        assert content.readable() and content.seekable() and not content.closed
        text = io.TextIOWrapper(content, "utf-8").read()
        wrapped = environ["wsgi.file_wrapper"](io.BytesIO(text.encode()), 2)
        assert isinstance(wrapped, environ["wsgi.file_wrapper"])
        assert not isinstance([], environ["wsgi.file_wrapper"])
        start_response("200 OK", [])
        return wrapped

    for root, threads in (("loop", 0), ("pool", 1)):
        mount(app, threads, root)
        for size in (0, 1, 300000):  # nothing, in memory, in a file
            raw = post(b"x" * size, b"Connection: close", path=b"/" + root.encode())
            assert fetch(running, raw)[1].body == b"x" * size


def test_names_of_a_server_on_ipv6():
    mount(inspect)
    with httpd.Server(ip="::1", port=0) as server, connect(server, "::1") as client:
        client.sendall(get(b"/app", b"Connection: close"))
        told = answers(read(client))[0].json()
    assert (told["SERVER_NAME"], told["REMOTE_ADDR"]) == ("[::1]", "::1")


UPLOADS = """
import gc, httpd, socket, sys, time
def app(environ, start_response):
    environ["wsgi.input"].read(5)
    start_response("200 OK", [])
    return [b"x"]
httpd.register_wsgi("test", "loop", app)
httpd.register_wsgi("test", "pool", app, threads=1)
with httpd.Server(ip="127.0.0.1", port=0) as server:
    for root in ("loop", "pool"):
        for sent in (0, 1000, 200000, 399999, 400000):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(b"POST /%s HTTP/1.1\\r\\nHost: x\\r\\n" % root.encode())
                client.sendall(b"Content-Length: 400000\\r\\n\\r\\n")
                client.sendall(b"x" * sent)
                if sent == 400000:
                    assert client.recv(1000)
                end = time.monotonic() + 10
                while server.accepted == 0 and time.monotonic() < end:
                    time.sleep(0.01)
            while server.connections and time.monotonic() < end:
                time.sleep(0.01)
            gc.collect()
"""


def test_uploads_that_are_given_up_make_python_complain_of_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", UPLOADS],
        cwd=tmp_path, env={"PYTHONPATH": str(HERE)}, timeout=30, capture_output=True, text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
        for fields in (
            "",
            "Content-Length: 25\r\n\r\n" + lines.decode(),
            "Transfer-Encoding: chunked\r\n\r\n19\r\n" + lines.decode() + "\r\n0\r\n",
        ):
            answer = fetch(running, method=method, path="/app/x?y=z", fields=fields)[1]
            assert answer.status == 200 and answer.headers["X-Method"] == method, answer.body
            content = lines if fields else b"nothing"
            assert answer.body == (b"" if method == "HEAD" else content)
    gc.collect()
    assert capfd.readouterr() == ("", "")


class Pieces:
    """An iterable that counts how often it is closed; an exception among the pieces is raised."""

    def __init__(self, *pieces):
        self.pieces = iter(pieces)
        self.closed = self.given = 0

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


def length_field(number):
    return [("Content-Length", str(number))]


RESPONSE_ROWS = [  # application; status, fields and content; how it is framed
    (says([b"abc"]), 200, {"Content-Length": "3"}, b"abc", "a list of one"),
    (says((b"a", b"", b"bc")), 200, {"Content-Length": "3"}, b"abc", "a tuple of three"),
    (says([]), 200, {"Content-Length": "0"}, b"", "an empty list"),
    (says(lambda environ: iter([])), 200, {"Transfer-Encoding": "chunked"}, b"", "an empty iterator"),
    (says(lambda environ: iter([b"a", b"", b"bc"])), 200, {"Transfer-Encoding": "chunked", "Content-Length": None},
     b"abc", "an iterator"),
    (says(lambda environ: iter([b"a", b"bc"]), headers=length_field(3)), 200,
     {"Transfer-Encoding": None, "Content-Length": "3"}, b"abc", "its own Content-Length"),
    (says([b"x" * 3000000]), 200, {"Content-Length": "3000000"}, b"x" * 3000000, "a list larger than the page"),
    (says([b"x" * 300000] * 3), 200, {"Content-Length": "900000"}, b"x" * 900000, "a list of large ones"),
    (says(from_file, headers=length_field(200000)), 200, {"Content-Length": "200000"}, b"x" * 200000,
     "wsgi.file_wrapper"),
    (late, 201, {"X-Late": "yes"}, b"late", "start_response() as late as the iteration"),
    (changes_its_mind, 503, {"X-First": None, "X-Second": "2", "Content-Length": "4"}, b"busy",
     "a second start_response() with exc_info"),
    (says([], written=[b"", b"ab", b"c"]), 200, {}, b"abc", "write()"),
    (says([b"c", b"d"], written=[b"a", b"b" * 200000]), 200, {}, b"a" + b"b" * 200000 + b"cd",
     "write() and more than memory holds"),
    (says(lambda environ: iter([b"c"]), written=[b"ab"]), 200, {"Transfer-Encoding": "chunked"}, b"abc",
     "write() and an iterator"),
    (says([b"abc"], "204 No Content"), 204, {"Content-Length": None, "Transfer-Encoding": None}, b"",
     "204 has no content"),
    (says(lambda environ: iter([b"abc"]), "304 Not Modified", [("ETag", '"x"')]), 304,
     {"ETag": '"x"', "Transfer-Encoding": None}, b"", "304 neither"),
    (says([b"abc"], "404 No idea", [("Content-Type", "x/y")]), 404, {"Content-Type": "x/y"}, b"abc", "a status"),
    (says([b"abc"], "299"), 299, {"Content-Type": None}, b"abc", "no reason, no type"),
    (says([b"abc"], headers=[("Vary", "a"), ("Set-Cookie", "a=b"), ("vary", "c"), ("Set-Cookie", "d=e")]), 200,
     {"Vary": "a, c"}, b"abc", "several of a name"),
    (says([b"abc"], headers=[("Connection", "x"), ("keep-alive", "x"), ("Date", "x"), ("Transfer-Encoding", "x"),
                           ("Upgrade", "x"), ("Server", "x")]),
     200, {"Connection": "close", "Transfer-Encoding": None, "Keep-Alive": None, "Upgrade": None, "Server": "x"},
     b"abc", "fields that are the server's"),
]


@pytest.mark.parametrize("threads", [0, 2])
@table("app, status, fields, content", RESPONSE_ROWS)
def test_responses(running, threads, app, status, fields, content):
    mount(app, threads)
    data, answer = fetch(running)
    assert answer.status == status
    assert answer.body == content
    assert {name: ", ".join(answer.headers.get_all(name, [])) or None for name in fields} == fields
    assert len(answer.headers.get_all("Date")) == 1
    assert answer.headers["Date"] != "x"
    assert data.count(b"Set-Cookie") in (0, 2)
    data, answer = fetch(running, method="HEAD")
    same = {name: value for name, value in fields.items() if name != "Transfer-Encoding"}
    assert answer.status == status
    assert data.endswith(b"\r\n\r\n")
    assert {name: ", ".join(answer.headers.get_all(name, [])) or None for name in same} == same


def test_head_keeps_the_length_that_the_application_says(running):
    for root, threads in (("loop", 0), ("pool", 1)):
        mount(says([], headers=length_field(12)), threads, root)
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


FAULT_ROWS = [  # application; the content that has left before the connection is cut, None: 500; what the log says
    (raises, None, "KeyError: 'before'", "an exception"),
    (says(lambda environ: Pieces(KeyError("first"))), None, "KeyError: 'first'",
     "an exception instead of the first piece"),
    (says(lambda environ: Pieces(b"", KeyError("first"))), None, "KeyError: 'first'",
     "an exception after an empty piece"),
    (lambda environ, start_response: [b"x"], None, "has not called start_response", "no start_response()"),
    (lambda environ, start_response: [], None, "has not called start_response",
     "no start_response(), and nothing else"),
    (lambda environ, start_response: None, None, "TypeError: 'NoneType'", "nothing returned"),
    (says(None), None, "TypeError: 'NoneType'", "nothing to iterate over"),
    (says("text"), None, "TypeError.*'str'", "str"),
    (says(["text"]), None, "TypeError.*'str'", "a list of str"),
    (says([None]), None, "TypeError", "a list of None"),
    (says([], written=["text"]), None, "TypeError.*'str'", "write(str)"),
    (twice, None, "has been called already", "start_response() twice"),
    (wrong(status="20 OK"), None, "no status", "a short status"),
    (wrong(status="100 Continue"), None, "no status", "1xx"),
    (wrong(status="200 O\nK"), None, "no status", "LF in the status"),
    (wrong(status=200), None, "TypeError", "a number as status"),
    (wrong(("A", "b\r\nC: d")), None, "may not stand", "CR LF in a value"),
    (wrong(("A:", "b")), None, "may not stand", "a name that is none"),
    (wrong(("A", "\u20ac")), None, "may not stand", "a value that is not latin-1"),
    (wrong(("A", 1)), None, "TypeError", "a number as value"),
    (wrong((b"A", "b")), None, "TypeError", "bytes as name"),
    (wrong(("Content-Length", "x")), None, "ValueError", "a Content-Length that is no number"),
    (wrong(("Content-Length", "0")), None, "more than its Content-Length of 0",
     "more than its Content-Length at once"),
    (wrong(("Content-Length", "2")), b"", "before the Content-Length", "less than its Content-Length"),
    (says(lambda environ: Pieces(b"ab", KeyError("second"))), b"ab", "KeyError: 'second'",
     "an exception in the middle"),
    (says(lambda environ: Pieces(b"ab", KeyError("second")), headers=length_field(9)), b"ab", "KeyError: 'second'",
     "the same in a known length"),
    (says(lambda environ: Pieces(b"ab", "text")), b"ab", "TypeError", "str in the middle"),
    (says(lambda environ: Pieces(b"ab", b"cd"), headers=length_field(3)), b"ab", "more than its Content-Length of 3",
     "too much in the end"),
    (too_late, b"x", "KeyError: 'too late'", "exc_info after the head: raised again"),
]


def raises_nothing(server):
    """The server is as good as before."""
    mount(says([b"well"]), root="well")
    return fetch(server, path="/well")[1].body == b"well"


@pytest.mark.parametrize("threads", [0, 1])
@table("app, sent, logged", FAULT_ROWS)
def test_faults_of_the_application(running, caplog, threads, app, sent, logged):
    mount(app, threads)
    data, answer = fetch(running)
    if sent is None or answer and answer.status == 500:  # a thread may fail before its first piece has left
        assert answer.status == 500 and b"the log of the server says why" in answer.body
    else:
        assert answer is None
        assert data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert sent in data
        assert not data.endswith(b"\r\n0\r\n\r\n")
    assert re.search(logged, caplog.text) and caplog.text.count("ERROR") == 1
    assert raises_nothing(running)


@pytest.mark.parametrize("threads", [0, 1])
def test_the_iterable_is_closed_once(running, threads, caplog):
    results = {
        "ended": Pieces(b"a", b"b"),
        "failed": Pieces(b"a", KeyError("x")),
        "failed_first": Pieces(KeyError("x")),
        "empty": Pieces(),
        "unknown_type": Pieces(b"a", "b"),
        "no_content": Pieces(b"a", b"b"),
        "short": Pieces(b"a"),
    }
    fields = {"short": length_field(9)}

    def app(environ, start_response):
        name = environ["PATH_INFO"][1:]
        start_response("204 No Content" if name == "no_content" else "200 OK", fields.get(name, []))
        return results[name]

    mount(app, threads)
    for name, result in results.items():
        fetch(running, path="/app/" + name)
        wait_for(lambda: result.closed)
        assert result.closed == 1, name
    results["head"] = Pieces(*[b"a"] * 5)
    assert fetch(running, method="HEAD", path="/app/head")[1].status == 200
    wait_for(lambda: results["head"].closed)
    assert results["head"].given == 1  # nobody wants the rest


class ClosingList(list):
    """A list that wants to be closed, as a framework's answer does."""

    def close(self):
        self.on_close()


class ClosingPieces(Pieces):
    def close(self):
        self.on_close()


CLOSING_ROWS = [  # what the application returns, its fields, what comes
    (lambda: ClosingList([b"abc"]), [], b"abc", "a list"),
    (lambda: ClosingPieces(b"abc"), length_field(3), b"abc", "the whole Content-Length in one piece"),
    (lambda: ClosingPieces(b"abc", b"def"), length_field(6), b"abcdef", "in two pieces"),
    (lambda: ClosingPieces(b"abc", b"def"), [], b"abcdef", "chunks"),
    (lambda: ClosingPieces(), [], b"", "nothing"),
    (lambda: ClosingPieces(b"x" * 300000), length_field(300000), b"x" * 300000, "a large piece"),
    (lambda: ClosingList([b"x" * 200000] * 8), [], b"x" * 1600000, "a list larger than the page"),
]


@pytest.mark.parametrize("threads", [0, 1])
@table("result, fields, content", CLOSING_ROWS)
def test_close_comes_behind_the_answer(running, caplog, threads, result, fields, content):
    """A close() that takes long delays nobody's answer, and one that fails cuts none."""
    read_all, closed = threading.Event(), []

    def on_close():
        closed.append(read_all.wait(5))
        raise KeyError("in close")

    def app(environ, start_response):
        start_response("200 OK", fields)
        made = result()
        made.on_close = on_close
        return made

    mount(app, threads)
    with connect(running) as client:
        for number in (1, 2):  # the connection is kept
            client.sendall(get(b"/app"))
            assert answers(read(client, 1))[0].body == content
            read_all.set()
            wait_for(lambda: len(closed) == number)
    assert closed == [True, True]
    wait_for(lambda: caplog.text.count("KeyError: 'in close'") == 2)
    assert "close() of what an application has returned failed" in caplog.text
    wait_for(lambda: not running.connections)
    assert httpd.observers == [] and running.held == 0


@pytest.mark.parametrize("threads", [0, 1])
def test_close_after_an_error_is_behind_it_too(running, caplog, threads):
    read_all, closed = threading.Event(), []

    def app(environ, start_response):
        made = ClosingPieces(KeyError("planned"))

        def note_close():
            closed.append(read_all.wait(5))

        made.on_close = note_close
        start_response("200 OK", [])
        return made

    mount(app, threads)
    with connect(running) as client:
        client.sendall(get(b"/app"))
        assert answers(read(client, 1))[0].status == 500
        read_all.set()
        wait_for(lambda: closed)
    assert closed == [True] and httpd.observers == []


@pytest.mark.parametrize("threads", [0, 1])
def test_what_clients_have_echoed_makes_no_memo_grow(running, threads):
    """Neither many small values nor large ones."""
    def app(environ, start_response):
        start_response("200 OK", [("X-Echo", environ["HTTP_X_ECHO"])])
        return [b"x"]

    mount(app, threads)
    with connect(running) as client:
        for number in range(600):
            value = b"%d" % number
            if number % 3 == 0:
                value += b"y" * 3000
            client.sendall(get(b"/app", b"X-Echo: " + value, b"X-%d: z" % number))
            assert answers(read(client, 1))[0].headers["X-Echo"] == value.decode()
    for memo in (httpd.starts, httpd.checked_fields, httpd.environ_names):
        assert len(memo) <= 128 and all(len(repr(key)) <= 512 for key in memo)
    assert all(len(head) <= 512 for head in running.responses.heads.values())


def test_set_headers(server):
    def handler(request, page):
        page.set_header("X-First", "1")
        page.set_headers([("X-A", "a"), ("Content-Type", "text/x"), ("X-A", "b")])
        for pairs in ([("X-A", "b\r\nc")], [("Connection", "x")], [("A b", "c")], [("Content-Length", "-1")]):
            with pytest.raises(ValueError):
                page.set_headers(pairs)
        with pytest.raises(TypeError):
            page.set_headers([("X-A", 1)])
        page.write("x")
        return 200

    httpd.register_httpdcb("test", "pairs", handler)
    for _ in range(2):
        answer, = answers(exchange(server, get(b"/pairs"))[0])
        assert (answer.status, answer.headers["Content-Type"], answer.headers["X-First"]) == (200, "text/x", "1")
        assert answer.headers.get_all("X-A") == ["a", "b"]


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
        wait_for(lambda: len(given) > 2)
        ahead = 0
        while len(given) > ahead:  # until it waits for the client
            ahead = len(given)
            assert ahead < 3000  # 16 MiB, in a file
            time.sleep(0.05)
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
        wait_for(lambda: calls)
        second.sendall(get(b"/app/2"))
        third.sendall(get(b"/app/3", b"Connection: close"))
        wait_for(lambda: len(running.connections) == 3)
        second.reset()
        wait_for(lambda: len(running.connections) == 2)
        go.set()
        assert answers(read(first))[0].body == answers(read(third))[0].body == b"done"
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
            path.reset(token)  # ValueError in another context

    mount(tells, threads)
    clients = [connect(running) for _ in range(3)]
    for number, client in enumerate(clients):
        client.sendall(get(b"/app/%d" % number, b"Connection: close"))
    clients.pop().close()
    for number, client in enumerate(clients):
        assert answers(read(client))[0].body == b"/%d" % number * 2000000
        client.close()
    wait_for(lambda: not running.connections)
    assert capfd.readouterr() == ("", "")  # where Python tells what fails in a finalizer


def test_a_slow_application_in_threads_delays_nobody(running):
    go = threading.Barrier(3)

    def slow(environ, start_response):
        go.wait(5)
        yield from says([b"slow"])(environ, start_response)

    mount(slow, 2)
    with connect(running) as first, connect(running) as second:
        first.sendall(get(b"/app", b"Connection: close"))
        second.sendall(get(b"/app", b"Connection: close"))
        wait_for(lambda: go.n_waiting == 2)
        begin = time.monotonic()
        assert raises_nothing(running) and time.monotonic() - begin < 1
        go.wait(5)
        assert answers(read(first))[0].body == answers(read(second))[0].body == b"slow"


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
            read(client, piece)
            go.release()


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
        assert answers(read(client))[0].body == b"piece 0 piece 1 piece 2 "


@pytest.mark.parametrize("threads", [0, 1])
def test_a_large_download_at_the_readers_pace(running, threads):
    given = []

    def download(environ, start_response):
        start_response("200 OK", [("Content-Length", str(40 << 20))])
        for number in range(640):
            given.append(number)
            yield bytes([number % 251]) * 65536

    mount(download, threads)
    with connect(running) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(get(b"/app", b"Connection: close"))
        wait_for(lambda: given)
        time.sleep(0.1)
        assert len(given) < 400
        data = read(client).partition(b"\r\n\r\n")[2]
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
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part)
        for part in (content[i:i + 99999] for i in range(0, len(content), 99999))
    )
    raw = (
        b"POST /app HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
        + HOST
        + b"\r\n"
        + chunks
        + b"0\r\n\r\n"
    )
    assert fetch(running, raw)[1].body == expected


def test_wsgi_body_size():
    server = httpd.Server(**LOCAL, wsgi_body_size=5000)
    mount(inspect)
    content = b"x" * 5000
    assert answers(exchange(server, post(content, path=b"/app"))[0])[0].status == 200
    for raw in (
        post(content + b"x", path=b"/app"),
        b"POST /app HTTP/1.1\r\nContent-Length: 5001\r\nExpect: 100-continue\r\n" + HOST + b"\r\n",
        b"POST /app HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + HOST + b"\r\n1388\r\n" + content + b"\r\n1\r\n",
    ):
        data, end = exchange(server, raw)
        assert data.startswith(b"HTTP/1.1 413 ")
        assert b"wsgi_body_size" in data
        assert end == "closed"
    data = exchange(
        server, b"POST /app HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n" + HOST + b"\r\n", b"abc"
    )[0]
    assert data.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert answers(data)[0].json()["body"] == "abc"


def test_an_upload_that_finds_no_room_may_come_again():
    mount(inspect)
    server = httpd.Server(**LOCAL, spool_size=0)
    data, end = exchange(server, post(b"x" * 200000, path=b"/app"))
    answer, = answers(data)
    assert (answer.status, answer.headers["Retry-After"], end) == (503, "1", "closed") and b"spool_size" in data
    server.stop(0)


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
        assert answers(read(client))[0].body == b"/%d" % number
        client.close()
    assert len(seen) <= 4


def test_more_requests_than_may_wait_for_a_thread(running, monkeypatch):
    gate, ran = threading.Event(), []
    monkeypatch.setattr(httpd.Pool.__init__, "__defaults__", (2,))

    def app(environ, start_response):
        ran.append(1)
        gate.wait(10)
        start_response("204 No Content", [])
        return []

    mount(app, threads=1)
    clients = [connect(running) for _ in range(6)]
    clients[0].sendall(get(b"/app"))
    wait_for(lambda: ran)
    for client in clients[1:]:
        client.sendall(get(b"/app"))
    refused = [client.recv(1000)[9:12] for client in clients[3:]]
    gate.set()
    assert refused == [b"503"] * 3 and [client.recv(1000)[9:12] for client in clients[:3]] == [b"204"] * 3
    for client in clients:
        client.close()


def test_who_uploads_is_not_his_own_victim(running, monkeypatch):
    """Descriptors are short, and he is the only one who is behind: 503, not an answer on a closed connection."""
    mount(inspect)

    def fail(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(httpd.Disk, "open", fail)
    monkeypatch.setattr(httpd, "behind", lambda connection: 9.0)
    with connect(running) as client:
        client.sendall(post(b"x" * 300000, path=b"/app"))
        assert client.recv(1000).startswith(b"HTTP/1.1 503")
    assert fetch(running)[1].status == 200


def test_greedy_requests_whose_answers_wait_in_a_file(server, slow_reader):
    """The 16th answer goes to a file: the others are not forgotten."""
    raw = get() * 15 + numbers(1) + get() * 5
    slow_reader.sendall(raw)
    wait_for(lambda: is_spooled(server), server)
    data, end = pump(server, slow_reader, 21, seconds=30)
    assert [answer.status for answer in answers(data)] == [200] * 21 and end == "open"


@pytest.mark.parametrize("framing", [b"Content-Length: 900000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nFFFFF\r\n"])
def test_uploads_that_are_given_up_leave_no_file_behind(running, framing):
    """Without the help of the garbage collector."""
    mount(inspect)
    gc.disable()
    try:
        for _ in range(5):
            with connect(running) as client:
                client.sendall(b"POST /app HTTP/1.1\r\n" + HOST + framing + b"x" * 400000)
                wait_for(lambda: running.disk.used > 300000)
            wait_for(lambda: not running.connections)
            wait_for(lambda: running.disk.used == 0)
    finally:
        gc.enable()


def test_the_disk_has_again_what_is_given_back():
    disk = httpd.Disk(10000, lambda: 0, lambda error, asking: False)
    free = disk.free
    spool = httpd.Spool(disk)
    spool.write(b"x" * 5000)
    assert (disk.free, disk.used) == (free - 5000, 5000)
    spool.close()
    assert (disk.free, disk.used) == (free, 0)


def test_a_thread_that_cannot_be_started_is_tried_again(server, monkeypatch):
    pool, ran = httpd.Pool(1), threading.Event()
    job = httpd.Job(lambda: ran, threading.Event.set)
    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
    with pytest.raises(RuntimeError):
        pool.submit(job, server)
    monkeypatch.setattr(threading.Thread, "start", real)
    pool.submit(job, server)
    server.run_once(0)
    assert ran.wait(5)


def test_a_large_piece_that_the_client_does_not_take_waits_in_a_file(running):
    """Not in memory, of which memory_budget would know nothing."""
    mount(says([b"z" * 5000000]))
    with connect(running, takes=4096) as client:
        client.sendall(get(b"/app"))
        wait_for(lambda: running.disk.used > 1000000)
        assert running.held < running.params.held_size
    wait_for(lambda: not running.connections)
    wait_for(lambda: running.held == 0 and running.disk.used == 0)


def test_jobs_of_clients_that_are_gone_go_with_them(running, monkeypatch):
    gate, ran = threading.Event(), []

    def app(environ, start_response):
        ran.append(1)
        gate.wait(10)
        start_response("204 No Content", [])
        return []

    mount(app, threads=1)
    with connect(running) as first:
        first.sendall(get(b"/app"))
        wait_for(lambda: ran)
        gone = [connect(running) for _ in range(30)]
        for client in gone:
            client.sendall(post(b"x" * 5000, path=b"/app"))
        wait_for(lambda: running.held > 30 * 5000)
        for client in gone:
            client.reset()
        wait_for(lambda: len(running.connections) == 1)
        gate.set()
        assert first.recv(1000).startswith(b"HTTP/1.1 204")
    with connect(running) as last:
        last.sendall(get(b"/app"))
        assert last.recv(1000).startswith(b"HTTP/1.1 204")
    assert len(ran) == 2  # not once for those who were gone


def test_a_response_leaves_its_thread_though_the_client_does_not_read(running):
    """Up to 16 MiB wait in a file: one thread serves others meanwhile."""
    mount(says([b"z" * 100000] * 60), threads=1)
    slow = connect(running, takes=4096)
    slow.sendall(get(b"/app"))
    wait_for(lambda: running.disk.used > 1000000)
    assert len(fetch(running)[1].body) == 6000000
    slow.settimeout(20)
    with slow:
        slow.shutdown(socket.SHUT_WR)
        assert len(answers(read(slow))[0].body) == 6000000
    wait_for(lambda: not running.connections)
    wait_for(lambda: running.disk.used == 0)


def test_a_client_that_goes_gives_its_file_back_at_once(running):
    """Not only when the collector of garbage comes by: nothing keeps itself alive."""
    mount(says(lambda environ: (b"x" * 65536 for _ in range(400))), 2)
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            with connect(running, takes=4096) as client:
                client.sendall(get(b"/app"))
                client.recv(100)
                wait_for(lambda: running.disk.used)
                client.reset()
            wait_for(lambda: not running.connections and running.disk.used == 0)
    finally:
        gc.enable()


def test_pipelined_requests_to_threads_are_answered_in_order(running):
    mount(inspect, 4)
    with connect(running) as client:
        client.sendall(
            b"".join(get(b"/app/%d" % number) for number in range(50)) + get(b"/app/50", b"Connection: close")
        )
        assert [answer.json()["PATH_INFO"] for answer in answers(read(client))] == [
            "/%d" % number for number in range(51)
        ]


STUCK = """
import httpd, socket, threading
started = threading.Event()
def app(environ, start_response):
    started.set()
    threading.Event().wait()
httpd.register_wsgi("test", "", app, threads=1)
with httpd.Server(ip="127.0.0.1", port=0) as server:
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    started.wait()
    server.stop(0)
print("ended")
"""


def test_a_stuck_application_does_not_keep_the_program_from_ending(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    done = subprocess.run(
        [sys.executable, "stuck.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(HERE)},
        timeout=20,
        capture_output=True,
        text=True,
    )
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
    mount(says(lambda environ: (b"x" * 50000 for _ in range(10)), headers=length_field(length)), 1)
    with connect(running) as client:
        for _ in range(3):
            client.sendall(get(b"/app"))
            data = client.recv(10000)
            assert data.startswith(b"HTTP/1.1 500 ")


# ----------------------------------------------------------------------------------------------------------- Processes

PROGRAM = """
import logging, os, threading, time, httpd
httpd.BEAT, httpd.LATE = TIMES
logging.basicConfig(level=logging.INFO)
def pid(request, page):
    page.write("%d" % os.getpid())
def wait(request, page):
    if request.state is None:
        request.state = threading.Timer(0.4, request.resume)
        request.state.start()
        return httpd.SUSPEND
    page.write("waited")
def stall(request, page):
    time.sleep(30)
def hang(request, page):
    print("hangs")
    return httpd.SUSPEND
httpd.register_httpdcb("test", "pid", pid, None, lambda: print("init %d\\n" % os.getpid(), end="", flush=True))
httpd.register_httpdcb("test", "wait", wait)
httpd.register_httpdcb("test", "stall", stall)
httpd.register_httpdcb("test", "hang", hang)
httpd.register_service("test", lambda server: print("service %d\\n" % os.getpid(), end="", flush=True))
def application(environ, start_response):
    start_response("200 OK", [])
    return [b"%r" % environ["wsgi.multiprocess"]]
httpd.register_wsgi("test", "wsgi", application)
httpd.loadmodule("mi_http")
httpd.loadmodule("prometheus")
httpd.loadmodule("mi_html")
httpd.run(**PARAMETERS)
"""


class Program:
    """A program with run(), in a process of its own, and those that it starts."""

    def __init__(self, tmp_path, environment=(), pass_fds=(), inside=(), times=(1, 3), **parameters):
        parameters = {"ip": "127.0.0.1", "port": 0, "grace_timeout": 5, **parameters}
        text = PROGRAM.replace("PARAMETERS", repr(parameters)).replace("TIMES", repr(times))
        (tmp_path / "program.py").write_text(text)
        paths = {**os.environ, "PYTHONPATH": str(HERE), **dict(environment)}
        self.output = open(tmp_path / "output", "a")
        self.process = subprocess.Popen([*inside, sys.executable, "program.py"], cwd=tmp_path, env=paths,
                                        stdout=self.output, stderr=self.output, pass_fds=pass_fds)
        wait_for(lambda: "listens on" in self.text() or self.process.poll() is not None, seconds=20)
        self.port = int(re.search(r":([0-9]+)\n", self.text() + ":0\n")[1])

    def text(self):
        with open(self.output.name) as file:
            return file.read()

    def send(self, number):
        self.process.send_signal(number)

    def ask(self, path=b"/pid"):
        with connect(None, port=self.port) as client:
            client.sendall(get(path, b"Connection: close").replace(b"example", b"localhost"))
            return answers(read(client))[0].body.decode()

    def workers(self):
        with connect(None, port=self.port) as client:
            call = b'{"jsonrpc":"2.0","method":"ps","id":1}'
            raw = post(call, b"Content-Type: application/json", b"Connection: close", path=b"/mi")
            client.sendall(raw.replace(b"Host: example", b"Host: localhost"))
            return [one["PID"] for one in answers(read(client))[0].json()["result"]["Processes"]]

    def end(self, number=signal.SIGTERM):
        """What it ends with, after a signal."""
        if self.process.poll() is None:
            self.send(number)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.output.close()


@pytest.fixture
def program(tmp_path):
    started = []

    def start(**options):
        started.append(Program(tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def is_gone(pid):
    with contextlib.suppress(FileNotFoundError):
        return open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[0] == "Z"
    return True


def test_workers_share_the_connections_and_the_counters(program):
    two = program(workers=2)
    workers = two.workers()
    assert len(workers) == 2 and two.process.pid not in workers
    assert sorted(re.findall("init ([0-9]+)", two.text())) == sorted(map(str, workers)), two.text()
    assert re.findall("service ([0-9]+)", two.text()) == [str(workers[0])]  # in one of them
    assert "%d %d</dd>" % tuple(workers) in two.ask(b"/")  # the console shows them
    asked = []

    def is_even():
        """Each of 64 kept connections asks twice; again, if the machine has let one worker wait."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(None, port=two.port)) for _ in range(64)]
            served = collections.Counter()
            for client in 2 * clients:
                client.sendall(get(b"/pid"))
                served[answers(read(client, 1))[0].body] += 1
        asked.append(len(clients) * 2)
        assert sum(served.values()) == 128
        return len(served) == 2 and max(served.values()) <= 2 * min(served.values())

    wait_for(is_even, seconds=20)
    told = 'root="pid",method="GET",code="200"} %d' % sum(asked)
    wait_for(lambda: told in two.ask(b"/metrics"))  # whichever answers
    assert two.ask(b"/wsgi") == "True"  # PEP 3333: other processes may call the application too
    limits = 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert "\nprocess_max_fds %d\n" % limits in two.ask(b"/metrics")  # so are the numbers of the processes
    assert two.end() == 0
    assert all(map(is_gone, workers))


def test_a_worker_that_dies_is_replaced(program):
    two = program(workers=2, times=(0.1, 3))
    before = two.workers()
    assert two.ask() and two.ask()
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: "killed by SIGKILL" in two.text())
    wait_for(lambda: len(set(two.workers()) - {before[0]}) == 2)
    assert "worker 0, process %d, has ended: killed by SIGKILL" % before[0] in two.text()
    assert two.ask(b"/metrics").count("process_start_time_seconds")
    wait_for(lambda: two.text().count("service ") == 2)  # the first one's are taken over
    assert two.end(signal.SIGINT) == 0


def test_workers_end_with_their_parent(program):
    """Those with a request under way in their time, and without spinning."""
    two = program(workers=2, grace_timeout=0.6)
    workers = two.workers()
    with connect(None, port=two.port) as client:
        client.sendall(get(b"/hang"))
        wait_for(lambda: 'state="suspended"} 1' in two.ask(b"/metrics"))
        before = max(map(cpu_time, workers))
        two.process.kill()
        wait_for(lambda: any(map(is_gone, workers)))
        busy, = (pid for pid in workers if not is_gone(pid))
        time.sleep(0.4)
        assert cpu_time(busy) - before < 20
        wait_for(lambda: is_gone(busy))


def test_a_stuck_worker_is_noticed_and_killed(program):
    two = program(workers=2, worker_timeout=1, times=(0.1, 0.5))
    with connect(None, port=two.port) as client:
        client.sendall(get(b"/stall"))
        wait_for(lambda: "is stuck: its loop has not turned" in two.text(), seconds=20)
        wait_for(lambda: "killed by SIGKILL" in two.text(), seconds=20)
        assert client.read() == b""
    assert two.ask() and two.end() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_lets_requests_finish(program, workers):
    """Also if all processes get it, as systemd does: for a worker this and its parent's word are no second signal."""
    one = program(workers=workers)
    with connect(None, port=one.port) as client:
        client.sendall(get(b"/wait"))
        time.sleep(0.1)
        pids = one.workers() if workers == 2 else []
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)  # else the two may be taken for one
        one.send(signal.SIGTERM)
        answer, = answers(read(client))
        assert answer.body == b"waited" and answer.headers["Connection"] == "close"
    assert one.process.wait(20) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_at_once(program, workers):
    """And what a handler has printed is written, though its process does not end as others do."""
    one = program(workers=workers, grace_timeout=60, environment={"PYTHONUNBUFFERED": ""})
    with connect(None, port=one.port) as client:
        client.sendall(get(b"/hang"))
        wait_for(lambda: 'state="suspended"} 1' in one.ask(b"/metrics"))
        one.send(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            one.process.wait(0.3)
        one.send(signal.SIGTERM)
        assert one.process.wait(10) == 0
    assert one.text().count("hangs") == 1


def cpu_time(pid):
    """In ticks, a hundredth of a second."""
    with open("/proc/%d/stat" % pid) as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_loses_nothing(program, workers):
    """Kept connections, new ones, and one under way, while a new process takes over."""
    old = program(workers=workers)
    with connect(None, port=old.port) as kept, connect(None, port=old.port) as waiting:
        kept.sendall(get(b"/pid"))
        first = answers(read(kept, 1))[0].body.decode()
        waiting.sendall(get(b"/wait"))
        old.send(signal.SIGUSR2)
        wait_for(lambda: old.ask() and "has taken over" in old.text(), seconds=20)
        kept.sendall(get(b"/pid"))
        last, = answers(read(kept))
        assert last.body.decode() == first  # the last one, or just before the worker was told so
        assert answers(read(waiting, 1))[0].body == b"waited"
    assert old.process.wait(20) == 0
    successor = int(re.search("process ([0-9]+) has taken over", old.text())[1])
    now = {old.ask() for _ in range(8)}
    assert first not in now and (workers == 2 or now == {str(successor)})
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: is_gone(successor))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_ends_a_restart(program, workers):
    """What has been started is not left alone; and there is no restart of what ends."""
    one = program(workers=workers)
    with connect(None, port=one.port) as client:
        client.sendall(get(b"/wait"))
        time.sleep(0.1)
        one.send(signal.SIGUSR2)
        children = "/proc/%d/task/%d/children" % (one.process.pid, one.process.pid)
        wait_for(lambda: len(open(children).read().split()) == (1 if workers == 1 else 3))
        one.send(signal.SIGTERM)
        time.sleep(0.1)
        one.send(signal.SIGUSR2)
        assert answers(read(client))[0].body == b"waited"
    assert one.process.wait(20) == 0
    assert re.search("no restart: (this process is ending|one is under way)", one.text())
    assert "Traceback" not in one.text()
    wait_for(lambda: is_free(one.port))


def is_free(port):
    with contextlib.suppress(OSError):
        socket.create_server(("127.0.0.1", port)).close()
        return True


def test_a_unix_socket_goes_with_the_last_of_its_processes(program, tmp_path):
    one = program(ip="unix:%s" % (tmp_path / "socket"))
    one.send(signal.SIGUSR2)
    assert one.process.wait(20) == 0 and (tmp_path / "socket").exists()
    os.kill(int(re.search("process ([0-9]+) has taken over", one.text())[1]), signal.SIGTERM)
    wait_for(lambda: not (tmp_path / "socket").exists())


def test_a_restart_that_fails_changes_nothing(program, tmp_path):
    one = program()
    (tmp_path / "program.py").write_text("raise SystemExit(7)")
    one.send(signal.SIGUSR2)
    wait_for(lambda: "the new process has ended with 7: this one goes on" in one.text(), seconds=20)
    assert one.ask() == str(one.process.pid)
    assert one.end() == 0


def test_hup_reloads_in_all_workers(program, tmp_path):
    (tmp_path / "password").write_text("one")
    two = program(workers=2, auth_username="u", auth_password="file:%s" % (tmp_path / "password"))
    (tmp_path / "password").write_text("two")
    two.send(signal.SIGHUP)

    def asked(password):
        raw = get(b"/pid", basic("u:" + password), b"Connection: close")
        return [raw_get(two.port, raw=raw) for _ in range(8)]

    wait_for(lambda: two.text().count("have been loaded anew") == 3)  # its parent first
    assert asked("two") == [200] * 8
    assert asked("one") == [401] * 8
    assert two.end() == 0


def test_a_worker_that_cannot_start(program, tmp_path):
    """An init_proc_cb that fails: nobody serves, and it is said why."""
    path = tmp_path / "site"
    path.mkdir()
    (path / "starts.py").write_text(
        "import httpd\nhttpd.register_httpdcb('starts', 'x', lambda request, page: 200, None, lambda: {}['y'])\n")
    with command(config(path, "[starts]\n[httpd]\nip = 127.0.0.1\nport = 0\nworkers = 2")) as process:
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and output == ""
    place = "%s:2" % (path / "starts.py")
    assert re.fullmatch(r"\S*test\.cfg: starts: an init_proc_cb failed: KeyError: 'y', raised at %s\n" % place, errors)


CONTAINER = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"] + ["--map-root-user"] * (os.geteuid() != 0)


@pytest.fixture
def container():
    """A command that has another one run as process 1."""
    if not shutil.which(CONTAINER[0]) or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("unshare is not allowed here")
    return CONTAINER


def first_process(program):
    """Of the container in which a program runs."""
    pid = program.process.pid
    return int(open("/proc/%d/task/%d/children" % (pid, pid)).read())


def test_a_restart_in_a_container_with_workers(program, container, tmp_path):
    """Process 1 runs the new program in its place, and its old workers serve until that is ready."""
    two = program(workers=2, inside=container)
    first, before = first_process(two), two.workers()
    text = (tmp_path / "program.py").read_text()
    (tmp_path / "program.py").write_text(text.replace("%d", "new %d"))
    with connect(None, port=two.port) as kept, connect(None, port=two.port) as waits:
        kept.sendall(get(b"/pid"))
        assert int(answers(read(kept, 1))[0].body) in before
        waits.sendall(get(b"/wait"))
        os.kill(first, signal.SIGUSR2)
        wait_for(lambda: two.ask().startswith("new"))
        kept.sendall(get(b"/pid"))
        last, = answers(read(kept))
        assert int(last.body) in before  # the last one, or just before the worker was told so
        assert answers(read(waits))[0].body == b"waited"
    assert not set(before) & set(two.workers())
    wait_for(lambda: len(set(two.workers())) == 2)
    children = "/proc/%d/task/%d/children" % (first, first)
    wait_for(lambda: len(open(children).read().split()) == 2)  # the old ones have ended, and nothing else runs
    (tmp_path / "program.py").write_text("{}['x']")
    os.kill(first, signal.SIGUSR2)
    wait_for(lambda: "no restart: the new process has ended with 1: this one goes on" in two.text())
    (tmp_path / "program.py").write_text(text.replace("'workers': 2", "'workers': 1"))
    os.kill(first, signal.SIGUSR2)
    wait_for(lambda: "process 1 of a container goes on with workers only" in two.text())
    assert two.ask().startswith("new")
    os.kill(first, signal.SIGTERM)
    assert two.process.wait(20) == 0


def test_a_restart_in_a_container_without_workers(program, container):
    one = program(inside=container)
    os.kill(first_process(one), signal.SIGUSR2)
    wait_for(lambda: "no restart: this is process 1 of a container" in one.text())
    assert one.ask() == "1"
    os.kill(first_process(one), signal.SIGTERM)
    assert one.process.wait(20) == 0


SYSTEMD = """
import os, socket, sys
kinds, listeners = sys.argv[1], []
if "tcp" in kinds:
    listeners.append(socket.create_server(("127.0.0.1", 0)))
if "unix" in kinds:
    listeners.append(socket.socket(socket.AF_UNIX))
    listeners[-1].bind("socket")
if "unix" in kinds and "deaf" not in kinds:
    listeners[-1].listen()
for number, descriptor in enumerate([os.dup(listener.fileno()) for listener in listeners], 3):
    os.dup2(descriptor, number)
pid = os.getpid() + ("wrong" in kinds)
os.environ.update(LISTEN_FDS=str(len(listeners)), LISTEN_PID=str(pid), LISTEN_FDNAMES="a:b")
os.execv(sys.executable, [sys.executable, "program.py"])
"""
MISTAKES = {"wrong": "start this one with exec", "deaf": "a socket that is handed over does not listen"}


@pytest.mark.parametrize("workers", [1, 2])
def test_several_sockets_of_systemd(program, tmp_path, workers):
    """All are served, and handed over at a restart."""
    (tmp_path / "systemd.py").write_text(SYSTEMD)
    both = program(workers=workers, inside=[sys.executable, "systemd.py", "tcp unix"])
    banner = "listens on http://127.0.0.1:[0-9]+ and unix:socket\n"
    both.port = int(re.search(r"127.0.0.1:([0-9]+) and unix:socket\n", both.text())[1])

    def asked():
        with connect_unix(str(tmp_path / "socket")) as client:
            client.sendall(get(b"/pid", b"Connection: close"))
            data = b"".join(iter(lambda: client.recv(1 << 20), b""))
            return answers(data)[0].body.decode(), both.ask()

    before = {*asked(), *asked()}
    both.send(signal.SIGUSR2)
    wait_for(lambda: len(re.findall(banner, both.text())) == 2)
    wait_for(lambda: not before & set(asked()))
    both.process.wait(20)
    successor = int(re.search("process ([0-9]+) has taken over", both.text())[1])
    os.kill(successor, signal.SIGTERM)
    wait_for(lambda: is_gone(successor))
    assert (tmp_path / "socket").exists()                       # it is systemd's


@pytest.mark.parametrize("kind", ["tcp", "unix", "tcp wrong", "tcp unix deaf"])
def test_sockets_of_systemd(tmp_path, kind):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        (tmp_path / "program.py").write_text(PROGRAM.replace("PARAMETERS", "{}").replace("TIMES", "1, 3"))
        (tmp_path / "systemd.py").write_text(SYSTEMD)
        environment = {**os.environ, "PYTHONPATH": str(HERE), "NOTIFY_SOCKET": str(tmp_path / "notify"),
                       "WATCHDOG_USEC": "200000"}
        line = [sys.executable, "systemd.py", kind]
        with subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as process:
            try:
                for mistake, line in MISTAKES.items():
                    if mistake in kind:
                        errors = process.communicate(timeout=20)[1]
                        assert line in errors and process.returncode == 1
                        return
                said = systemd.recv(1000).decode()
                if said == "WATCHDOG=1":
                    said = systemd.recv(1000).decode()
                assert said.startswith("READY=1\nMAINPID=%d\nSTATUS=" % process.pid)
                assert systemd.recv(1000) == b"WATCHDOG=1"
                url = said.rpartition("=")[2]
                if kind == "tcp":
                    assert raw_get(int(url.rpartition(":")[2]), raw=get(b"/pid")) == 200
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                while systemd.recv(1000) != b"STOPPING=1":
                    pass
                assert (tmp_path / "socket").exists() == (kind == "unix")  # it is systemd's
            finally:
                process.kill()


# ---------------------------------------------------------------------------------------------------------------- main

def command(*words, **options):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(HERE / "httpd.py"), *words], stdout=pipe, stderr=pipe, text=True, **options
    )


def test_the_command_line_serves_until_a_signal(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import httpd, __main__\n\ndef mod_init(params):\n    assert httpd is __main__\n"
        "    httpd.register_httpdcb('mine', 'mine', lambda request, page: page.write('mine') and 200)\n"
    )
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
    (["bad.cfg"], 1,
     r'bad\.cfg:2: httpd: unknown parameter "prot", did you mean "port"\?\nbad\.cfg:3: httpd: port must be .*\n',
     "two problems, two lines"),
    (["-t", "bad.cfg"], 1, r"bad\.cfg:2: .*\nbad\.cfg:3: .*\n", "-t says the same"),
    (["good.cfg", "-o", "port=1"], 1, r"-o port=1: httpd: port must be 0 or 1024 to 65535, not '1'\n",
     "-o is checked"),
    (["taken.cfg"], 1,
     r"taken\.cfg:3: httpd: cannot listen on 127\.0\.0\.1 port \d+: Address already in use: end the program .*\n",
     "a port in use"),
    (["away.cfg", "-o", "ip=unix:/nowhere/s"], 1,
     r"-o ip=unix:/nowhere/s: httpd: ip: cannot listen on unix:/nowhere/s: No such file or directory\n",
     "no directory for a unix socket"),
    (["away.cfg"], 1, r"away\.cfg: httpd: cannot listen on 192\.0\.2\.1 port .*: set ip to an address of .*\n",
     "an address of another machine"),
    (["good.cfg", "-o", "tls_ca_file"], 2, r"(?s)usage: .*-o tls_ca_file: write -o NAME=VALUE\n", "-o without ="),
    (["latin.cfg"], 1, r"latin\.cfg:2: httpd: is not UTF-8: save the file in that encoding\n", "no UTF-8"),
    (["big.cfg"], 1, r"big\.cfg:3: httpd: memory_budget 4194304 has no room .*: lower post_buf_size, or .*\n",
     "more than memory_budget"),
    (["raises.cfg"], 1,
     r"raises\.cfg:2: raises: cannot be loaded: KeyError: 'x', raised at \S*raises\.py:2\n", "a module that fails"),
    (["leaves.cfg"], 1,
     r"leaves\.cfg:2: leaves: cannot be loaded: SystemExit: 3, raised at \S*leaves\.py:2\n", "a module that exits"),
    (["runs.cfg"], 1, r"runs\.cfg:2: runs: calls httpd\.run\(\) while it is loaded: write that below .*\n",
     "a module that is a program"),
    (["starts.cfg"], 1, r"starts\.cfg: starts: an init_proc_cb failed: KeyError: 'y', raised at \S*starts\.py:3\n",
     "an init_proc_cb that fails"),
    (["half.cfg"], 1, r"half\.cfg:2: httpd: .*tls_cert_file.*\n", "OPENSIPS, never 11: one half of TLS"),
    (["-o", "port=1"], 1, r"-o port=1: httpd: port must be 0 or 1024 to 65535, not '1'\n", "-o without a file"),
    (["-o", "buf_size=9999999"], 1, r"-o buf_size=9999999: httpd: memory_budget .*\n", "found later, without a file"),
    (["--nonsense"], 2, r"(?s)usage: .*", "unknown option"),
    (["zone.cfg"], 1, r"zone\.cfg:2: httpd: ip must be an IPv4 or .*\n", "a NUL in the zone of an address"),
    (["none.cfg"], 1, r"none\.cfg:1: HTTPD: cannot be loaded: ModuleNotFoundError: "
     r"No module named 'HTTPD', did you mean \"httpd\"\?\n", "no such module: no place in the standard library"),
    (["good.cfg", "-o", "allowed_hosts=a, http://b/"], 1,
     r"-o allowed_hosts=.*: httpd: allowed_hosts: 'http://b/' is no host: .*\n", "a URL is no host"),
    (["good.cfg", "-o", "allowed_hosts=*.b"], 1, r".* allowed_hosts: '\*\.b' is no host: .*\n", "no patterns of hosts"),
    (["syslog.cfg"], 1,
     r"syslog\.cfg:4: httpd: access_log syslog:local0 cannot be opened: write syslog: and nothing .*\n",
     "syslog has one facility"),
]


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    """The commands of COMMAND_ROWS, started at the same time: what each says, it says into files."""
    here = tmp_path_factory.mktemp("mistakes")
    taken = socket.create_server(("127.0.0.1", 0))
    (here / "good.cfg").write_text("[mi_http]")
    (here / "bad.cfg").write_text("[httpd]\nprot = 1\nport = x")
    (here / "taken.cfg").write_text("[httpd]\nip = 127.0.0.1\nport = %d" % taken.getsockname()[1])
    (here / "half.cfg").write_text("[httpd]\ntls_key_file = x")
    (here / "away.cfg").write_text("[httpd]\nip = 192.0.2.1")
    (here / "latin.cfg").write_bytes(b"[httpd]\n# \xe4\n")
    (here / "big.cfg").write_text("[httpd]\nip = 127.0.0.1\npost_buf_size = 3000000")
    (here / "zone.cfg").write_text("[httpd]\nip = fe80::1%a\0b")
    (here / "none.cfg").write_text("[HTTPD]")
    (here / "syslog.cfg").write_text("[httpd]\nip = 127.0.0.1\nport = 0\naccess_log = syslog:local0")
    for module, code in (
            ("raises", "import httpd\n{}['x']"), ("leaves", "import sys\nsys.exit(3)"),
            ("runs", "import httpd\nhttpd.run()"),
            ("starts", "import httpd\ndef begin():\n    {}['y']\n"
                       "httpd.register_httpdcb('starts', 'x', lambda request, page: 200, None, begin)")):
        (here / (module + ".py")).write_text(code)
        (here / (module + ".cfg")).write_text("\n[%s]\n[httpd]\nip = 127.0.0.1\nport = 0" % module)
    started = {}
    with taken:
        for number, row in enumerate(COMMAND_ROWS):
            output, errors = here / ("output%d" % number), here / ("errors%d" % number)
            with open(output, "w") as stdout, open(errors, "w") as stderr:
                line = ["nice", "-n19", sys.executable, str(HERE / "httpd.py"), *row[0]]
                process = subprocess.Popen(line, cwd=here, stdout=stdout, stderr=stderr)
            started[row[3]] = process, output, errors
        yield started
        for process, _, _ in started.values():
            process.kill()
            process.wait()


@table("arguments, status, stderr, why", [(*row, row[3]) for row in COMMAND_ROWS])
def test_operators_mistakes_are_a_line_each(mistakes, arguments, status, stderr, why):
    process, output, errors = mistakes[why]
    assert process.wait(60) == status
    assert re.fullmatch(stderr, errors.read_text())
    assert output.read_text() == ""
    assert "Traceback" not in errors.read_text()


@table("set_up, arguments, status, stderr", [
    ("LISTEN_FDS=x exec", [], 1, "good.cfg: httpd: LISTEN_FDS=x in the environment is no number\n", "listener"),
    ("HTTPD_READY_FD=x exec", [], 1, "good.cfg: httpd: HTTPD_READY_FD=x in the .* no number\n", "successor"),
    ("WATCHDOG_USEC=x exec", [], 1, "good.cfg: httpd: WATCHDOG_USEC=x in the .* no number\n", "watchdog"),
    ("HTTPD_READY_FD=99 exec", [], 1, "good.cfg:2: httpd: what LISTEN_FDS or .*: Bad file descriptor\n", "no pipe"),
    ("export LISTEN_FDS=1 LISTEN_PID=$$; exec 3</dev/null; exec", [], 1,
     "good.cfg:2: httpd: what LISTEN_FDS or .*: Socket operation on non-socket\n", "no socket"),
    ("ulimit -n 8; exec", [], 1, "good.cfg: Too many open files: raise the limit, see ulimit -n\n", "ulimit"),
    ("ulimit -n 12; exec", ["-o", "workers=2"], 1,
     "good.cfg: httpd: worker [01] cannot serve: Too many open files\n", "ulimit of workers"),
    ("exec >/dev/full; exec", ["-t"], 1,
     "httpd.py: the output cannot be written: No space left .*\n", "-t to a full disk"),
    ("PYTHONIOENCODING=ascii exec", ["-t"], 0, "", "-t to who reads ASCII"),
])
def test_surroundings_that_cannot_be(tmp_path, set_up, arguments, status, stderr):
    path = tmp_path / "good.cfg"
    path.write_text("[httpd]\nip = 127.0.0.1\nport = 0\nauth_realm = \xe4\n[mi_http]", encoding="utf-8")
    line = [sys.executable, str(HERE / "httpd.py"), "good.cfg", *arguments]
    run = subprocess.run(["sh", "-c", set_up + ' "$@"', "sh", *line], cwd=tmp_path, timeout=20, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.returncode == status
    assert re.fullmatch(stderr, run.stderr)


def test_a_working_directory_that_is_gone_is_no_reason_not_to_serve(tmp_path):
    path = config(tmp_path, "[httpd]\nip = 127.0.0.1\nport = 0\n[mi_http]")
    line = [sys.executable, str(HERE / "httpd.py"), path]
    with subprocess.Popen(["sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh", *line], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "listens on" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


def test_a_banner_that_cannot_be_encoded(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    httpd.say("\xe4", to_stderr=False)
    sys.stdout.close()
    httpd.say("closed", to_stderr=False)


@pytest.mark.parametrize("reader", ["/dev/full", "a reader that has gone"])
def test_a_banner_that_cannot_be_printed_is_no_reason_not_to_serve(tmp_path, reader):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = config(tmp_path, "[httpd]\nip = 127.0.0.1\nport = %d\n[mi_http]" % port)
    hearing, speaking = os.pipe()
    os.close(hearing)
    if reader == "/dev/full":
        os.close(speaking)
        speaking = os.open(reader, os.O_WRONLY)
    line = [sys.executable, str(HERE / "httpd.py"), path]
    with subprocess.Popen(line, stdout=speaking, stderr=subprocess.PIPE, text=True) as process:
        os.close(speaking)
        wait_for(lambda: serves(port))
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


def serves(port):
    with contextlib.suppress(ConnectionRefusedError):
        return raw_get(port, raw=get(b"/nothing")) == 404


# README: "Every mistake is a line FILE:LINE: MODULE: what to do". What comes from the files has neither.
@pytest.mark.parametrize(
    "lines, expected",
    [
        (
            ["tls_cert_file = {}/none.pem", "tls_key_file = {}/rsa.key"],
            "test.cfg:2: httpd: tls_cert_file: {}/none.pem cannot be read: No such file or directory\n",
        ),
        (
            ["tls_cert_file = {}/rsa.pem", "tls_key_file = {}/encrypted.key"],
            "test.cfg:3: httpd: tls_key_file: {}/encrypted.key is encrypted: ",
        ),
        (
            ["tls_cert_file = {}/rsa.pem", "", "tls_key_file = {}/other.key"],
            "test.cfg:2: httpd: tls_cert_file {}/rsa.pem with tls_key_file",
        ),
        (["tls_key_file = {}/rsa.key"], "test.cfg:2: httpd: tls_key_file is set without tls_cert_file"),
        (
            ["tls_cert_file = {}/rsa.pem", "tls_key_file = {}/rsa.key", "tls_ca_file = {}/empty.pem"],
            "test.cfg:4: httpd: tls_ca_file: {}/empty.pem has no BEGIN CERT",
        ),
        (
            ["tls_cert_file = {}/rsa.pem", "tls_key_file = {}/rsa.key", "tls_ciphers = SUITEB128"],
            "no client could connect: tls_ciphers has no suite",
        ),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("option", [["-t"], []])
def test_mistakes_name_file_and_line(pki, tmp_path, monkeypatch, capsys, lines, expected, option):
    (tmp_path / "test.cfg").write_text(
        "\n".join(["[httpd]", *lines, "ip = 127.0.0.1", "port = 0"]).replace("{}", str(pki))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(httpd, "places", {})
    assert httpd.main([*option, "test.cfg"]) == 1
    output, errors = capsys.readouterr()
    last = errors.splitlines(True)[-1]
    assert output == "" and "Traceback" not in errors
    assert expected.replace("{}", str(pki)) in last and last.startswith("test.cfg:")


# SIGHUP for a server without TLS must not end it.
def test_sighup_without_tls_is_a_log_line(tmp_path):
    (tmp_path / "test.cfg").write_text("[httpd]\nip = 127.0.0.1\nport = 0\n")
    with subprocess.Popen(
        [sys.executable, os.path.join(HERE, "httpd.py"), "test.cfg"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        port = int(re.search(rb":([0-9]+)", process.stdout.readline())[1])
        process.send_signal(signal.SIGHUP)
        assert b"nothing to reload" in process.stderr.readline()
        assert raw_get(port, raw=get(b"/nowhere")) == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_without_a_file_it_shows_itself(tmp_path):
    with command("-o", "port=0", cwd=tmp_path) as process:
        first, *roots = [process.stdout.readline() for _ in range(4)]
        port = int(re.fullmatch(r"httpd\.py \S+ listens on http://127\.0\.0\.1:(\d+)\n", first)[1])
        assert roots == ["  /  mi_html\n", "  /mi  mi_http\n", "  /metrics  prometheus\n"]
        local = b"Host: localhost\r\n"
        assert raw_get(port, raw=get(b"/").replace(HOST, local)) == 200
        assert raw_get(port, raw=get(b"/metrics").replace(HOST, local)) == 200
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


def test_a_configuration_to_begin_with(tmp_path):
    with command("-t", "-o", "port=9999", cwd=tmp_path) as process:
        output = process.communicate(timeout=20)[0]
        assert process.returncode == 0
    assert "\nport = 9999\n" in output and "\n# buf_size = 0\n" in output
    httpd.load_config(config(tmp_path, output))
    assert list(httpd.roots) == ["", "mi", "metrics"]
    assert httpd.params["httpd"] == {"ip": "127.0.0.1", "port": 9999}  # the others are defaults


def test_check_version_and_help(tmp_path):
    with command("-t", config(tmp_path, "[httpd]\nport = 9999\n[mi_http]\nroot = other")) as process:
        output = process.communicate(timeout=20)[0]
        assert process.returncode == 0
        assert "port = 9999\n" in output
        assert "[mi_http]\nroot = other\n" in output
        assert "# /other  mi_http" in output
    again = config(tmp_path, output)
    httpd.load_config(again)  # what it prints is itself a configuration
    assert httpd.in_force("httpd")["port"] == 9999
    with command("--version") as process:
        assert process.communicate(timeout=20)[0] == "httpd.py %s\n" % httpd.__version__
    with command("--help") as process:
        output = process.communicate(timeout=20)[0]
    for rows_of_module in httpd.PARAMETERS.values():
        for row in rows_of_module:
            assert re.search(r"^  %s .*%s" % (row.name, re.escape(row.meaning)), output, re.MULTILINE)


# ------------------------------------------------------------------------------------------------ Tests that go looking
# Seeded random messages, faults of system calls, odd callbacks, mutated texts. HTTPD_FUZZ=20 makes twenty times as many
# cases. A finding names its case number: it makes the same case again.

FUZZ = float(os.environ.get("HTTPD_FUZZ", "1"))
HTTP_CASES = int(220 * FUZZ)            # streams of messages; each is sent five times
FAULT_RUNS = int(110 * FUZZ)            # of a server over plain TCP
TLS_FAULT_RUNS = int(20 * FUZZ)         # of one over TLS
CALLBACK_RUNS = int(300 * FUZZ)
PRIORITY_CASES = int(1200 * FUZZ)
CONFIG_CASES = int(300 * FUZZ)
JSON_CASES = int(400 * FUZZ)
SHOWN = 8                               # findings that a failing test prints


# -------------------------------------------------------------------------------------------------- Messages, a grammar

class Message(NamedTuple):
    """A request that RFC 9112 and HTTP.md take, and what the handler must say it was."""
    raw: bytes
    method: str
    target: str
    content: bytes
    closes: bool        # the connection ends with its answer


FIELD_POOL = (
    b"User-Agent: curl/8.0", b"Accept: */*", b"Accept:text/html;q=0.9,\t*/*", b"accept: a", b"Cookie: a=b; c=d",
    b"X-Empty:", b'X-Text: \xe4\xff "quoted" \\ \t', b"x_underscore: 1", b"Connection: keep-alive",
    b"Connection: foo,\t, bar", b"Upgrade: h2c", b"X-Long: " + b"l" * 300, b"TE: trailers",
    b"Content-Type: application/json", b"!#$%&'*+-.^_`|~: token", b"Via: 1.1 a, 1.0 b",
)
HOSTS = (
    b"example", b"EXAMPLE:80", b"127.0.0.1:8080", b"[::1]:8888", b"a-b.example.org", b"[fe80::1%25eth0]", b"x%41",
)
TARGETS = (
    b"/echo/%s", b"/echo/%s?", b"/echo/caf%%C3%%A9/%s", b"/echo?m=%s&x=100%%", b"/%%65cho/%s/",
    b"http://example/echo/%s", b"HTTP://[::1]:80/echo?%s", b"/echo/%s;a=b/../c", b"/echo/%s?a=/?:@!$&'()*+,;=",
    b"/echo//%s",
)
EXTENSIONS = (b"", b"", b"", b";a", b";a=b", b' ; a="b;\\"c" ;d=e', b";a\t=\tb")
TRAILERS = (b"", b"", b"", b"X-Trailer: 1\r\n", b"a:\r\nB: \xff\r\n")


def make_chunked(content, chance):
    """The content in the chunked coding, with what may stand in it."""
    raw = b""
    while content:
        size = chance.randrange(1, len(content) + 1)
        line = b"%s%x%s" % (b"0" * chance.choice((0, 0, 3)), size, chance.choice(EXTENSIONS))
        raw += (line.upper() if chance.random() < 0.3 else line) + b"\r\n" + content[:size] + b"\r\n"
        content = content[size:]
    last = b"0" * chance.choice((1, 1, 4)) + chance.choice(EXTENSIONS) + b"\r\n"
    return raw + last + chance.choice(TRAILERS) + b"\r\n"


def make_message(marker, chance):
    """A good request with the marker in its path, its query or its content."""
    marker = marker.encode()
    method = chance.choice(("GET", "GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE"))
    version = chance.choice((b"1.1",) * 8 + (b"1.0", b"1.2"))
    target, content = chance.choice(TARGETS) % marker, b""
    fields = [b"Host: " + chance.choice(HOSTS), *chance.sample(FIELD_POOL, chance.choice((0, 1, 2, 5)))]
    without = ("none", "none") if method in ("GET", "HEAD") else ()
    framing = chance.choice((*without, "length", "chunked"))
    if framing != "none":
        content = marker + bytes(chance.choices(b"\r\n\0 a\xff0;:", k=chance.choice((0, 0, 5, 60, 400))))
        if chance.random() < 0.2:
            target = b"/echo"
        if chance.random() < 0.2:
            fields.append(b"Expect: 100-continue")
    if framing == "chunked" and version != b"1.0":
        fields.append(b"Transfer-Encoding: " + chance.choice((b"chunked", b"Chunked", b"\tchunked ")))
        body = make_chunked(content, chance)
    else:
        if content:
            fields.append(b"Content-Length: %d" % len(content))
        body = content
    if chance.random() < 0.05:
        fields.append(b"Connection: " + chance.choice((b"close", b"Close", b"foo, close", b",\t,close,")))
    chance.shuffle(fields)
    options = b",".join(value for name, _, value in (field.lower().partition(b":") for field in fields)
                        if name == b"connection")
    closes = b"close" in options or version == b"1.0" and b"keep-alive" not in options
    line = b"%s %s HTTP/%s\r\n" % (method.encode(), target, version)
    raw = b"\r\n" * chance.choice((0, 0, 0, 1, 2)) + line + b"\r\n".join(fields) + b"\r\n\r\n" + body
    return Message(raw, method, target.decode(), content, closes)


TOKENS = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\x0b", b"\x1f", b"\x7f", b"\x85", b"\xa0", b"\xff", b",", b";",
    b'"', b"\\", b"#", b"%", b"%00", b"%7f", b"%zz", b"/", b"..", b"0", b"-1", b"+5", b"0x5", b"1_0", b"\r\n\r\n",
    b"\r\n ", b"\r\n\t", b" \r\n", b"\r\n:", b"0\r\n\r\n", b"Content-Length: 5\r\n", b"Content-Length: 05\r\n",
    b"Content-Length:\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding: \x0bchunked\r\n", b"Transfer-Encoding : chunked\r\n",
    b"Host: other\r\n", b"Host: a b\r\n", b"Host: a@b\r\n", b"Host:\r\n", b"Expect: 100-continue\r\n",
    b"Expect: other\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"HTTP/1.1", b"HTTP/1.0",
    b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"GET ", b"HEAD ", b"CONNECT ", b"OPTIONS ", b"TRACE ", b"PRI ", b"get ",
    b"*", b"https://", b"http://", b"http://u@h/", b"a: b\r\n" * 130, b"x" * 700, b"x" * 5000,
    b"X: " + b"y" * 3000 + b"\r\n", b"0" * 20, b";a=b" * 600, b"ffffffffffffffff\r\n", b"\x16\x03\x01",
)


def mutate(raw, chance, tokens=TOKENS):
    """A few small damages, most of them where a line begins or ends."""
    raw = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        edges = [match.start() for match in re.finditer(rb"\r\n|(?<=\n)|[: ;,={}\[\]\"]", raw)]
        place = chance.choice(edges) if edges and chance.random() < 0.6 else chance.randrange(len(raw) + 1)
        length = chance.choice((0, 1, 1, 2, 5, 30))
        piece = bytes(raw[place:place + length])
        what = chance.randrange(6)
        if what == 0:
            raw[place:place + length] = b""
        elif what == 1:
            raw[place:place] = piece * chance.choice((1, 2))
        elif what == 2:
            raw[place:place + length] = bytes([chance.randrange(256)])
        elif what == 3 and edges:
            other = chance.choice(edges)
            raw[other:other] = piece
        else:
            raw[place:place + chance.choice((0, 0, length))] = chance.choice(tokens)
    return bytes(raw)


def make_stream(number):
    """Good messages, in most cases a mutated one, then perhaps some more: (before, mutated, after)."""
    chance = random.Random("stream %d" % number)
    before = [make_message("m%d.%d" % (number, i), chance) for i in range(chance.choice((0, 0, 1, 2, 3)))]
    mutated = b""
    if chance.random() < 0.85 or not before:
        mutated = mutate(make_message("bad%d" % number, chance).raw, chance)
    after = [make_message("n%d.%d" % (number, i), chance) for i in range(chance.choice((0, 0, 1, 2)))]
    return before, mutated, after


def join(messages):
    return b"".join(message.raw for message in messages)


def cut_anywhere(raw, chance):
    """The same bytes in pieces: at a few places, around the ends of lines, or one by one."""
    how = chance.randrange(4)
    if how == 0:
        places = chance.sample(range(len(raw)), min(len(raw), chance.randrange(1, 6)))
    elif how == 1:
        ends = [match.start() + chance.randrange(4) for match in re.finditer(b"\r\n", raw)]
        places = chance.sample(ends, min(len(ends), 8))
    elif how == 2:
        start = chance.randrange(len(raw))
        places = range(start, start + 40)
    else:
        places = [chance.randrange(len(raw))]
    places = sorted({0, len(raw), *(place for place in places if place < len(raw))})
    return [raw[a:b] for a, b in zip(places, places[1:])]


# --------------------------------------------------------------------------------------------- Answers, a strict reader

class Reply(NamedTuple):
    status: int
    fields: dict
    content: bytes
    whole: bool


STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [ -~]*")
VISIBLE = rb"[!-~\x80-\xff]"
REPLY_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): (" + VISIBLE + rb"(?:[\t -~\x80-\xff]*" + VISIBLE
                         + rb")?)?")


def split_replies(data):
    """The answers in `data`, 1xx left out; only the last may not be whole. AssertionError if it is no HTTP.

    An answer to HEAD is known by the field X-To, which the handlers here set; an error, by what follows."""
    replies, at = [], 0
    while at < len(data):
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            replies.append(Reply(0, {}, data[at:], False))
            break
        line, *lines = data[at:end].split(b"\r\n")
        match = STATUS_LINE.fullmatch(line)
        assert match, ("no status line", line)
        status, fields = int(match[1]), {}
        for line in lines:
            match_field = REPLY_FIELD.fullmatch(line)
            assert match_field, ("no field line", line)
            name = match_field[1].decode().lower()
            assert name not in fields, ("twice", name)
            fields[name] = (match_field[2] or b"").decode("latin-1")
        at = end + 4
        if status == 100:
            assert not fields
            continue
        content, whole, at = read_content(data, at, status, fields)
        replies.append(Reply(status, fields, content, whole))
    return replies


def read_content(data, at, status, fields):
    """The content at `at` as its head frames it: (content, it is whole, where the next answer begins)."""
    assert "date" in fields, "no Date"
    framed = ("content-length" in fields) + ("transfer-encoding" in fields)
    if status in (204, 304):
        assert not framed, "framing in a %d" % status
        return b"", True, at
    if fields.get("x-to") == "HEAD":
        return b"", True, at
    assert framed <= 1, "framed twice"
    if "transfer-encoding" in fields:
        return read_chunks(data, at)
    if "content-length" not in fields:
        assert fields.get("connection") == "close", "neither framed nor closed"
        return data[at:], True, len(data)
    length = int(fields["content-length"])
    if status >= 400 and data[at:at + 9] in (b"", b"HTTP/1.1 "):    # an error's text begins differently
        return b"", True, at
    content = data[at:at + length]
    return content, len(content) == length, at + length


def read_chunks(data, at):
    content = b""
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return content, False, len(data)
        size = int(data[at:end], 16)
        at = end + 2
        content += data[at:at + size]
        if len(data) < at + size + 2:
            return content, False, len(data)
        assert data[at + size:at + size + 2] == b"\r\n", "a chunk is not as long as it says"
        at += size + 2
        if not size:
            return content, True, at


def finish(server, clock=None):
    """The clients have gone: no connection may be left, and nothing be held."""
    for _ in range(200):
        if not server.connections:
            break
        server.run_once(0.01)
        if clock:
            clock.ahead += 1
    assert not server.connections, "connections are left: %r" % server.connections
    assert server.held == 0, "%d bytes are held" % server.held


def converse(server, pieces):
    """Send each piece by itself and let the server work, then end the sending; returns all that comes."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            with contextlib.suppress(ConnectionError):      # what follows a refusal is not wanted
                client.sendall(piece)
            server.run_once(0)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 10
        client.setblocking(False)
        server.run_once(0)
        while True:
            try:
                more = client.recv(1 << 18)
            except BlockingIOError:
                assert time.monotonic() < end, "the connection does not end; came %r" % received[-300:]
                server.run_once(0.02)
                continue
            except ConnectionResetError:
                break
            if not more:
                break
            received += more
    finish(server)
    return received


def describe(request, page):
    """Says what it has understood, in the head as well, which HEAD gets."""
    page.set_header("X-To", request.method)
    page.set_header("X-Target", request.target)
    json.dump([request.method, request.target, request.body.decode("latin-1"),
               sorted(request.headers.items())], page)
    return 200


def is_answer_to(message, reply):
    said = reply.status, reply.fields.get("x-to"), reply.fields.get("x-target")
    if said != (200, message.method, message.target):
        return False
    if message.method == "HEAD":
        return reply.content == b""
    method, target, content, _ = json.loads(reply.content)
    return (method, target, content) == (message.method, message.target, message.content.decode("latin-1"))


def check_replies(before, after, mutated, raw):
    """What must hold of the answers to a stream, whatever the mutated message has become."""
    replies = split_replies(raw)
    for message in before:
        assert replies and is_answer_to(message, replies[0]), ("lost or mixed", message.raw, replies[:1])
        closed = replies[0].fields.get("connection") == "close"
        assert closed == message.closes, ("close", message.raw, replies[0])
        replies.pop(0)
        if message.closes:
            assert not replies, ("an answer behind close", message.raw, replies)
            return
    waiting = list(after)
    for number, reply in enumerate(replies):
        assert reply.whole, ("cut", reply)
        assert reply.status < 500 or reply.status in (501, 505), reply
        last = reply.fields.get("connection") == "close"
        assert last or reply.status != 400, ("a 400 that does not close", reply)
        assert not last or number == len(replies) - 1, ("an answer behind close", replies)
        if any(is_answer_to(message, reply) for message in after):
            while waiting and not is_answer_to(waiting[0], reply):
                waiting.pop(0)
            assert waiting, ("twice, or out of order", replies)
            waiting.pop(0)
    if not mutated:
        closing = next((number for number, message in enumerate(after, 1) if message.closes), len(after))
        assert len(replies) == closing, ("lost", replies)


def normal(raw):
    """Answers without what may differ: the time, and whether content was waited for."""
    return re.sub(rb"Date: [^\r]*\r\n", b"", raw.replace(CONTINUE, b""))


def small_server(**params):
    return httpd.Server(ip="127.0.0.1", port=0, memory_budget=2 ** 18, max_header_size=2048,
                        receive_buf_size=2048, **params)


def brief(problem):
    """An exception in a line, less what pytest adds to an assertion."""
    return "%s: %s" % (type(problem).__name__, " ".join(str(problem).split("\nassert")[0].split("\n"))[:700])


def fail_with(problems):
    """One finding does not hide the others."""
    if problems:
        pytest.fail("%d findings, such as:\n%s" % (len(problems), "\n".join(problems[:SHOWN])), pytrace=False)


def test_random_messages():
    """Whole or cut, to a server that is cold or has seen it all: the same answers, none lost or mixed."""
    httpd.register_httpdcb("test", "echo", describe, content_type="application/json",
                           methods=("GET", "POST", "PUT", "DELETE"))
    problems = []
    old = small_server()
    for number in range(HTTP_CASES):
        before, mutated, after = make_stream(number)
        raw = join(before) + mutated + join(after)
        if not raw:
            continue
        chance = random.Random("cuts %d" % number)
        ways = [[raw], [raw], cut_anywhere(raw, chance), cut_anywhere(raw, chance)]
        chance.shuffle(ways)
        young = small_server()
        try:
            came = [converse(young, pieces) for pieces in ways] + [converse(old, ways[0])]
            check_replies(before, after, mutated, came[0])
            found = [normal(data) for data in came]
            for pieces, other in zip(ways + ways[:1], found):
                assert other == found[0], ("differs", ways[0], found[0], pieces, other)
        except BaseException as problem:
            problems.append("case %d: %s\n    raw: %r" % (number, brief(problem), raw[:1500]))
            with contextlib.suppress(BaseException):
                old.stop(0)
            old = small_server()
        finally:
            young.stop(0)
    old.stop(0)
    fail_with(problems)


# ----------------------------------------------------------------------------------------------- Faults of system calls

class Clock:
    """time.monotonic() of the server under test, which can be put forward."""
    ahead = 0.0

    def monotonic(self):
        return time.monotonic() + self.ahead


RECEIVE_ERRORS = (
    errno.ECONNRESET, errno.EINTR, errno.ENOBUFS, errno.ENOMEM, errno.ETIMEDOUT, errno.EHOSTUNREACH,
)
SEND_ERRORS = (errno.ECONNRESET, errno.EPIPE, errno.EINTR, errno.ENOBUFS, errno.ENOMEM, errno.ETIMEDOUT)
ACCEPT_ERRORS = (
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR, errno.EPERM,
    errno.EPROTO,
)


class Faults:
    """What goes wrong, where, by a seeded chance; and who has been hit, by the address of the client."""

    def __init__(self):
        self.switch_off()

    def switch_on(self, chance, rate, hostile):
        self.chance, self.rate = chance, rate
        self.hostile, self.everybody = hostile, False
        self.hit, self.log = set(), []

    def switch_off(self):
        self.switch_on(random.Random(0), 0.0, False)

    def happens(self):
        return self.rate and self.chance.random() < self.rate

    def note(self, call, number, sock):
        """An error that ends a connection is about to be raised: its client may get less."""
        self.log.append("%s: %s" % (call, errno.errorcode.get(number, number)))
        try:
            self.hit.add(sock.getpeername()[1])
        except OSError:
            self.everybody = True       # the listener; or a connection whose client has gone
        return OSError(number, os.strerror(number))

    def shorten(self, call, sock, size, errors):
        """The size to take instead of `size`; or BlockingIOError; or, if it is hostile, another error."""
        if not self.happens():
            return size
        what = self.chance.randrange(4)
        if what == 0 and self.hostile:
            raise self.note(call, self.chance.choice(errors), sock)
        if what == 1:
            self.log.append(call + ": EAGAIN")
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return self.chance.randrange(1, max(size, 1) + 1) if size else size

    def fail(self, call, sock, errors, mild=()):
        """An error or nothing. `mild`: exceptions that only mean to come again."""
        if not self.happens():
            return
        if self.hostile and self.chance.random() < 0.5:
            raise self.note(call, self.chance.choice(errors), sock)
        if mild:
            self.log.append(call + ": again")
            raise self.chance.choice(mild)


faults = Faults()
clock = Clock()


class FaultyCalls:
    """The calls of a socket that can fail; over both the C type and socket.socket."""
    __slots__ = ()

    def recv(self, size, flags=0):
        size = faults.shorten("recv", self, size, RECEIVE_ERRORS)
        if not isinstance(self, FaultyCalls):       # below TLS
            return socket.SocketType.recv(self, size, flags)
        return super().recv(size, flags)

    def recv_into(self, buffer, size=0, flags=0):
        size = faults.shorten("recv", self, size or len(buffer), RECEIVE_ERRORS)
        return super().recv_into(buffer, size, flags)

    def send(self, data, flags=0):
        size = faults.shorten("send", self, len(data), SEND_ERRORS)
        return super().send(memoryview(data)[:size], flags)

    def sendmsg(self, buffers, *rest):
        return self.send(b"".join(buffers)) if not rest else super().sendmsg(buffers, *rest)

    def shutdown(self, how):
        faults.fail("shutdown", self, (errno.ENOTCONN,))
        return super().shutdown(how)

    def _accept(self):      # socket.accept() comes by here too
        faults.fail("accept", self, ACCEPT_ERRORS, (BlockingIOError(errno.EAGAIN, "again"),))
        return super()._accept()


class FaultySocketType(FaultyCalls, socket.SocketType):
    __slots__ = ()


class FaultySocket(FaultyCalls, socket.socket):
    __slots__ = ()

    def accept(self):
        sock, peer = super().accept()
        faulty = FaultySocket(sock.family, sock.type, sock.proto, sock.detach())
        faulty.setblocking(False)
        return faulty, peer


class FaultyEpoll:
    """select.epoll, which cannot be a base class."""

    def __init__(self, *arguments, real=None):
        self.real = real or select.epoll(*arguments)

    @classmethod
    def fromfd(cls, descriptor):
        return cls(real=select.epoll.fromfd(descriptor))

    def __getattr__(self, name):
        return getattr(self.real, name)

    def register(self, descriptor, *mask):
        fail_to_watch(descriptor)
        return self.real.register(descriptor, *mask)

    def modify(self, descriptor, mask):
        fail_to_watch(descriptor)
        return self.real.modify(descriptor, mask)


class FaultySelector(selectors.EpollSelector):
    def register(self, fileobj, events, data=None):
        fail_to_watch(fileobj)
        return super().register(fileobj, events, data)

    def modify(self, fileobj, events, data=None):
        fail_to_watch(fileobj)
        return super().modify(fileobj, events, data)

    def select(self, timeout=None):
        """Not all that is ready: the rest is so the next time."""
        ready = super().select(timeout)
        return [each for each in ready if not faults.happens()]


def fail_to_watch(fileobj):
    if not faults.rate or not faults.hostile:
        return
    sock = socket.socket(fileno=os.dup(fileobj if isinstance(fileobj, int) else fileobj.fileno()))
    with sock:
        faults.fail("epoll", sock, (errno.ENOSPC, errno.ENOMEM))


class FaultyTLS:
    """What ssl has inside a socket. No record is cut: the rest of it would be where epoll does not see it."""

    def __init__(self, real, sock):
        self.real, self.sock = real, sock

    def __getattr__(self, name):
        return getattr(self.real, name)

    def do_handshake(self):
        faults.fail("handshake", self.sock, RECEIVE_ERRORS,
                    (ssl.SSLWantReadError(2, "read"), ssl.SSLWantWriteError(3, "write")))
        return self.real.do_handshake()

    def read(self, *arguments):
        faults.fail("TLS read", self.sock, RECEIVE_ERRORS, (ssl.SSLWantReadError(2, "read"),))
        return self.real.read(*arguments)

    def write(self, data):
        faults.fail("TLS write", self.sock, SEND_ERRORS, (ssl.SSLWantWriteError(3, "write"),))
        return self.real.write(data)


class FaultyContext(ssl.SSLContext):
    def _wrap_socket(self, sock, *arguments, **keywords):
        return FaultyTLS(super()._wrap_socket(sock, *arguments, **keywords), sock)


def changed(module, **names):
    """A copy of a module in which some names are others."""
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update({**vars(module), **names})
    return copy


@pytest.fixture
def faulty(monkeypatch):
    """httpd.py once more, on sockets, epoll and TLS that fail as `faults` says. Its registry is its own."""
    for module, names in (
        (socket, {"socket": FaultySocket, "SocketType": FaultySocketType}),
        (select, {"epoll": FaultyEpoll}),
        (selectors, {"EpollSelector": FaultySelector, "DefaultSelector": FaultySelector}),
        (ssl, {"SSLContext": FaultyContext}),
        (time, {"monotonic": clock.monotonic}),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, changed(module, **names))
    spec = importlib.util.spec_from_file_location("httpd_under_faults", httpd.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    add_roots(module)
    logging.getLogger("httpd").setLevel(logging.CRITICAL)
    yield module
    logging.getLogger("httpd").setLevel(logging.NOTSET)
    faults.switch_off()
    clock.ahead = 0.0


PAGE_SIZES = {"page": 700, "large": 90000, "stream": 60000, "sized": 30000, "suspended": 900}


@functools.lru_cache(maxsize=32)
def content_of(marker, size):
    """Content by which a mistaken or shifted piece is seen."""
    unit = b"<%s:%%06d>" % marker.encode()
    return b"".join(unit % i for i in range(size // len(unit % 0) + 1))[:size]


def add_roots(module):
    """Every way to answer. The marker is in the query; who drives the server resumes what is suspended."""
    module.waiting = waiting = []

    def page(request, page):
        page.write(content_of(request.query, PAGE_SIZES[request.root]))
        return 200

    def post(request, page):
        page.write(request.body)
        return 200

    def begin(request, page):
        request.state = [0]
        if request.root == "sized":
            page.set_header("Content-Length", str(PAGE_SIZES["sized"]))
        return 200

    def flush(request, position, buffer):
        request.state[0] += 1
        if request.state[0] % 3 == 0:
            waiting.append(request)
            return 0
        content = content_of(request.query, PAGE_SIZES[request.root])
        piece = content[position:position + min(len(buffer), 7000)]
        buffer[:len(piece)] = piece
        return len(piece) or module.END

    def suspended(request, _page):
        if request.state is None:
            request.state = "suspended"
            waiting.append(request)
            return module.SUSPEND
        return page(request, _page)

    def upload(request, data):
        request.state = (request.state or b"") + data

    def uploaded(request, page):
        page.write(request.state or b"")
        return 200

    for name in ("page", "large"):
        module.register_httpdcb("test", name, page)
    for name in ("stream", "sized"):
        module.register_httpdcb("test", name, begin, flush)
    module.register_httpdcb("test", "post", post)
    module.register_httpdcb("test", "suspended", suspended)
    module.register_httpdcb("test", "upload", uploaded, upload_data_cb=upload)


class Script(NamedTuple):
    raw: bytes
    expected: list      # (content, it is an answer to HEAD)


def make_script(number, chance):
    """A conversation: requests of every kind, pipelined, the last with Connection: close."""
    raw, expected = b"", []
    count = chance.choice((1, 1, 2, 3, 6))
    for i in range(count):
        marker = "c%d.%d" % (number, i)
        root = chance.choice(("page", "page", "large", "stream", "sized", "suspended", "post", "upload"))
        fields = b"Host: example\r\n" + (b"Connection: close\r\n" if i == count - 1 else b"")
        if root in PAGE_SIZES:
            method = b"HEAD" if chance.random() < 0.15 else b"GET"
            raw += b"%s /%s?%s HTTP/1.1\r\n%s\r\n" % (method, root.encode(), marker.encode(), fields)
            content = b"" if method == b"HEAD" else content_of(marker, PAGE_SIZES[root])
            expected.append((content, method == b"HEAD"))
            continue
        content = content_of(marker, chance.choice((1, 200, 900) if root == "post" else (1, 900, 20000)))
        fields += b"Expect: 100-continue\r\n" if chance.random() < 0.3 else b""
        if chance.random() < 0.5:
            framing, body = b"Content-Length: %d\r\n" % len(content), content
        else:
            framing, body = b"Transfer-Encoding: chunked\r\n", make_chunked(content, chance)
        raw += b"POST /%s HTTP/1.1\r\n%s%s\r\n%s" % (root.encode(), fields, framing, body)
        expected.append((content, False))
    return Script(raw, expected)


class ScriptedClient:
    """One end of a conversation, which sends and reads a bit at a time; with `context` over TLS."""

    def __init__(self, server, script, context=None):
        self.script, self.unsent = script, script.raw
        self.received, self.ended = b"", False
        self.sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.port = self.sock.getsockname()[1]
        self.tls = None
        if context:
            self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = context.wrap_bio(self.incoming, self.outgoing)
            self.secret, self.shaken = b"", False

    def step(self, chance):
        """Send a bit, read a bit; returns whether anything has moved."""
        moved = False
        size = chance.choice((1, 40, 1000, 100000))
        with contextlib.suppress(BlockingIOError, ConnectionError):
            moved = bool(self._send(size))
        if chance.random() < 0.3:
            return moved
        try:
            data = self.sock.recv(chance.choice((100, 5000, 1 << 18)))
        except BlockingIOError:
            return moved
        except ConnectionError:
            data = b""
        if not data:
            self.ended = True
        if self.tls and data:
            self.incoming.write(data)
            self._shake_hands()
        else:
            self.received += data
        return True

    def _send(self, size):
        if not self.tls:
            sent = self.sock.send(self.unsent[:size]) if self.unsent else 0
            self.unsent = self.unsent[sent:]
            return sent
        self._shake_hands()
        if self.shaken and self.unsent:
            self.unsent = self.unsent[self.tls.write(self.unsent[:size]):]
        self.secret += self.outgoing.read()
        sent = self.sock.send(self.secret[:size]) if self.secret else 0
        self.secret = self.secret[sent:]
        return sent

    def _shake_hands(self):
        """What TLS has to say before and beside the content."""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            if not self.shaken:
                self.tls.do_handshake()
                self.shaken = True
            while more := self.tls.read(1 << 16):
                self.received += more

    def check(self, whole):
        """What came is what was to come, or, if not `whole`, its beginning and perhaps an error."""
        expected = list(self.script.expected)
        replies = split_scripted(self.received, [to_head for _, to_head in expected])
        for number, reply in enumerate(replies):
            assert number < len(expected), ("more answers than requests", reply)
            content = expected[number][0]
            if reply.whole and reply.status != 200 and not whole:
                assert reply.status in (400, 408, 413, 500, 503) and number == len(replies) - 1, reply
                return
            assert reply.status in (0, 200), reply
            both = number, content[:60], reply.content[:60], len(content), len(reply.content)
            assert reply.status == 0 or content.startswith(reply.content), ("mixed", *both)
            assert not reply.whole or content == reply.content, ("short", *both)
            assert reply.whole or number == len(replies) - 1
        if whole:
            assert len(replies) == len(expected) and all(reply.whole for reply in replies), (
                "lost or cut", len(replies), len(expected), [len(reply.content) for reply in replies])


def split_scripted(data, to_heads):
    """split_replies() for answers whose methods are known."""
    replies, heads = [], list(to_heads)
    while data:
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            return [*replies, Reply(0, {}, data, False)]
        if data.startswith(b"HTTP/1.1 100"):
            data = data[end:]
            continue
        if heads and heads.pop(0):
            head = data[:end].split(b"\r\n")
            replies.append(Reply(int(head[0][9:12]), {}, b"", True))
            data = data[end:]
            continue
        reply, rest = first_reply(data)
        replies.append(reply)
        data = rest
    return replies


def first_reply(data):
    """The first answer, and what is behind it."""
    line, *lines = data[:data.index(b"\r\n\r\n")].split(b"\r\n")
    fields = {}
    for field in lines:
        name, _, value = field.partition(b": ")
        fields[name.decode().lower()] = value.decode("latin-1")
    match = STATUS_LINE.fullmatch(line)
    assert match, ("no status line", line)
    content, whole, end = read_content(data, data.index(b"\r\n\r\n") + 4, int(match[1]), fields)
    return Reply(int(match[1]), fields, content, whole), data[end:]


def drive(module, server, clients, chance, whole):
    """Let clients and server work in turns until all have ended; puts the clock forward if all wait."""
    still, moved_on = 0, 0
    while not all(client.ended for client in clients):
        moved = [client.step(chance) for client in clients if not client.ended]
        server.run_once(0.0005 if still > 20 else 0)
        if module.waiting and (still > 3 or chance.random() < 0.3):
            module.waiting.pop(chance.randrange(len(module.waiting))).resume()
            still = 0
        still = 0 if any(moved) else still + 1
        if still > 40:
            still, moved_on = 20, moved_on + 1
            clock.ahead += 1.1
            for client in clients:
                assert moved_on < 150, ("never ends", client.script.raw[:200], client.received[-200:],
                                        client.unsent[:50])


def fault_run(module, number, context=None, **params):
    """Some conversations with faults, then one without: the server serves on and holds nothing."""
    chance = random.Random("faults %d %s" % (number, bool(context)))
    hostile = number % 3 > 0
    server = module.Server(ip="127.0.0.1", port=0, memory_budget=2 ** 21, receive_buf_size=2048, **params)
    clients = []
    try:
        assert server.port
        module.waiting.clear()
        scripts = [make_script(i, chance) for i in range(chance.choice((1, 2, 4)))]
        faults.switch_on(chance, chance.choice((0.01, 0.05, 0.3)), hostile)
        clients += [ScriptedClient(server, script, context) for script in scripts]
        drive(module, server, clients, chance, not hostile)
        for client in clients:
            try:
                client.check(whole=not faults.everybody and client.port not in faults.hit)
            except AssertionError as problem:
                hit = client.port in faults.hit
                raw = client.script.raw[:300]
                raise AssertionError("%s, hit: %s, raw: %r" % (brief(problem), hit, raw)) from None
        for client in clients:
            client.sock.close()
        faults.switch_off()
        clock.ahead += 2
        last = ScriptedClient(server, Script(b"GET /page?last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                                     [(content_of("last", 700), False)]), context)
        clients.append(last)
        drive(module, server, [last], chance, True)
        last.check(whole=True)
        last.sock.close()
        finish(server, clock)
    except BaseException:
        faults.rate = 0.0
        with contextlib.suppress(BaseException):        # it would hide what has happened
            server.stop(0)
        raise
    finally:
        for client in clients:
            client.sock.close()
    server.stop(0)


def run_with_faults(module, count, context=None, **params):
    problems = []
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(count):
        try:
            fault_run(module, number, context, **params)
        except BaseException as problem:
            log = faults.log[-12:]
            trace = problem.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            where = trace.tb_frame.f_code.co_name, trace.tb_lineno
            problems.append("run %d: %s, in %s line %d\n    faults: %s"
                            % (number, brief(problem), *where, log))
    if not problems and len(os.listdir("/proc/self/fd")) > descriptors + 2:
        problems.append("%d descriptors are left" % (len(os.listdir("/proc/self/fd")) - descriptors))
    fail_with(problems)


def test_faults_of_system_calls(faulty):
    """Short and interrupted calls change nothing; an error of a connection ends that one and no other."""
    run_with_faults(faulty, FAULT_RUNS)


def test_faults_of_system_calls_with_tls(faulty, pki):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    run_with_faults(faulty, TLS_FAULT_RUNS, context, tls_cert_file=str(pki / "ec.pem"),
                    tls_key_file=str(pki / "ec.key"),
                    tls_ciphers="NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2")


# --------------------------------------------------------------------------------------------- Callbacks that misbehave

class Unspeakable(Exception):
    """Not even its text can be had."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class UnspeakableObject:
    def __repr__(self):
        raise RuntimeError("no text")


class Home(BaseException):
    """Of a library's own, beside Exception."""


def spoilt(**attributes):
    """An HTTPError with an attribute that somebody has written into."""
    error = httpd.HTTPError(409, "spoilt")
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


RETURNED = (
    None, True, False, 0, 1, 99, 100, 101, 199, 200, 201, 204, 205, 299, 304, 404, 418, 503, 599, 600, 999, -1, -3,
    10 ** 30, -10 ** 30, 200.0, -2.0, -1.0, 0.0, math.nan, math.inf, "200", b"200", "", [], [200], (200, "OK"), {},
    object(), UnspeakableObject(), http.HTTPStatus.OK, http.HTTPStatus.NOT_FOUND, complex(200), range(3), print,
    Exception("returned"), "\ud800",
)
RAISED = {
    "HTTPError 400": lambda: httpd.HTTPError(400),
    "HTTPError 503": lambda: httpd.HTTPError(503, "busy", {"Retry-After": "1"}),
    "HTTPError with a surrogate": lambda: httpd.HTTPError(404, "no such key: \ud800"),
    "HTTPError with lines": lambda: httpd.HTTPError(404, "a\r\nSet-Cookie: b=c\r\n\r\nHTTP/1.1 200 OK\r\n"),
    "HTTPError with a long text": lambda: httpd.HTTPError(404, "\u20ac" * 100000),
    "HTTPError with NUL": lambda: httpd.HTTPError(404, "\0"),
    "HTTPError 100": lambda: httpd.HTTPError(100),
    "HTTPError 200": lambda: httpd.HTTPError(200, "fine"),
    "HTTPError 304": lambda: httpd.HTTPError(304),
    "HTTPError 999": lambda: httpd.HTTPError(999, "x"),
    "HTTPError -1": lambda: httpd.HTTPError(-1, "x"),
    "HTTPError 10**30": lambda: httpd.HTTPError(10 ** 30),
    "HTTPError text None": lambda: httpd.HTTPError(404, None),
    "HTTPError text 5": lambda: httpd.HTTPError(404, 5),
    "HTTPError text bytes": lambda: httpd.HTTPError(404, b"x"),
    "HTTPError status text": lambda: httpd.HTTPError("404", "x"),
    "HTTPError status None": lambda: httpd.HTTPError(None, "x"),
    "HTTPError bad field": lambda: httpd.HTTPError(404, "x", {"X": "a\r\nb"}),
    "HTTPError own field": lambda: httpd.HTTPError(404, "x", {"Connection": "x"}),
    "HTTPError int field": lambda: httpd.HTTPError(404, "x", {"X": 5}),
    "HTTPError field not latin-1": lambda: httpd.HTTPError(404, "x", {"X": "\u20ac"}),
    "HTTPError headers list": lambda: httpd.HTTPError(404, "x", [1]),
    "HTTPError length": lambda: httpd.HTTPError(404, "x", {"Content-Length": "5"}),
    "HTTPError type": lambda: httpd.HTTPError(404, "x", {"content-type": "a/b"}),
    "spoilt status": lambda: spoilt(status="x"),
    "spoilt status float": lambda: spoilt(status=404.5),
    "spoilt status None": lambda: spoilt(status=None),
    "spoilt reason": lambda: spoilt(reason=object()),
    "spoilt headers": lambda: spoilt(headers=None),
    "spoilt field": lambda: spoilt(headers={"X": "a\r\nb"}),
    "HTTPError 401": lambda: httpd.HTTPError(401, "x", {"WWW-Authenticate": "Basic"}),
    "KeyError": lambda: KeyError("x"),
    "KeyError surrogate": lambda: KeyError("\ud800"),
    "SystemExit": SystemExit,
    "SystemExit text": lambda: SystemExit("bye"),
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
    "BufferError": BufferError,
    "MemoryError": MemoryError,
    "StopIteration": lambda: StopIteration(5),
    "StopAsyncIteration": StopAsyncIteration,
    "RecursionError": RecursionError,
    "BlockingIOError": lambda: BlockingIOError(errno.EAGAIN, "x"),
    "InterruptedError": lambda: InterruptedError(errno.EINTR, "x"),
    "ConnectionResetError": lambda: ConnectionResetError(errno.ECONNRESET, "x"),
    "BrokenPipeError": BrokenPipeError,
    "TimeoutError": TimeoutError,
    "OSError": OSError,
    "EMFILE": lambda: OSError(errno.EMFILE, "x"),
    "SSLWantReadError": lambda: ssl.SSLWantReadError(2, "x"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    "ConfigError": lambda: httpd.ConfigError("x"),
    "AssertionError": AssertionError,
    "ImportError": ImportError,
    "Unspeakable": Unspeakable,
    "BaseException": BaseException,
    "Home": Home,
}
WRITTEN = (
    "", b"", "x", b"x" * 100, bytearray(b"y"), memoryview(b"z"), None, 5, 1.5, "\ud800", b"x" * 10 ** 6, ["a"],
    "\u20ac" * 10, object(), memoryview(b"abcdefgh").cast("I"),
)
HEADERS = (
    ("X-A", "b"), ("X-A", 5), ("X-A", None), ("X-A", "a\r\nb"), ("X A", "b"), ("", "b"), ("X-A", "\ud800"),
    ("X-A", "\u20ac"), ("X-A", b"b"), ("Content-Length", "5"), ("Content-Length", 5), ("Content-Length", "-5"),
    ("Content-Length", "5, 5"), ("content-length", "\u0665"), ("Date", "x"), ("Content-Length", "0"),
    ("Transfer-Encoding", "chunked"), ("Connection", "close"), ("Content-Type", "a\nb"), ("Content-Type", ""), (5, 5),
    (None, None), ("Set-Cookie", "a=b"), ("X-A", "y" * 2000), ("\u212a", "b"), ("Content-Length", "9" * 18),
    ("Content-Length", "9" * 30),
)


EVERYTHING = len(RAISED) + 2 * len(RETURNED)


def misbehave(what):
    """Return or raise what the plan says."""
    kind, value = what
    if kind == "raise":
        raise RAISED[value]()
    return value


class Plan(NamedTuple):
    """What the callbacks of one request do; None: as they should."""
    access: object = None       # ("return", value) or ("raise", name)
    again: object = None        # the same after resume()
    flush: object = None
    flush_turn: int = 0         # at which call of flush_data_cb
    upload: object = None
    write: tuple = ()
    headers: tuple = ()


def make_plan(number, chance):
    """At first everything once in the access handler, returned values in flush_data_cb too; then anything."""
    if number < len(RAISED):
        return Plan(access=("raise", list(RAISED)[number]))
    if number < len(RAISED) + len(RETURNED):
        return Plan(access=("return", RETURNED[number - len(RAISED)]), write=("fine",))
    if number < EVERYTHING:
        return Plan(flush=("return", RETURNED[number - len(RAISED) - len(RETURNED)]), flush_turn=1)
    what = "return", chance.choice(RETURNED)
    if chance.random() < 0.5:
        what = "raise", chance.choice(list(RAISED))
    where = chance.choice(("access", "again", "flush", "flush", "upload", "page"))
    if where == "flush":
        return Plan(flush=what, flush_turn=chance.choice((0, 1, 2)),
                    headers=(("Content-Length", "9000"),) * chance.choice((0, 1)))
    if where == "page":
        headers = tuple(chance.choices(HEADERS, k=chance.choice((0, 1, 2))))
        return Plan(write=tuple(chance.choices(WRITTEN, k=chance.choice((0, 1, 2)))), headers=headers)
    plan = Plan(**{where: what})
    return plan._replace(write=(chance.choice(WRITTEN),) if chance.random() < 0.2 else ())


def register_plan(plan, waiting):
    """Roots that do what the plan says: /plain, /stream with a flush_data_cb, /upload, and /good."""
    def access(request, page):
        if request.state == "suspended":
            return misbehave(plan.again)
        if plan.again:
            request.state = "suspended"
            waiting.append(request)
            return httpd.SUSPEND
        for name, value in plan.headers:
            page.set_header(name, value)
        for data in plan.write:
            page.write(data)
        if plan.access:
            return misbehave(plan.access)
        if not plan.write and request.root != "stream":
            page.write("fine")
        return 200

    turns = []

    def flush(request, position, buffer):
        turns.append(position)
        if plan.flush and len(turns) == plan.flush_turn + 1:
            if plan.flush == ("return", 0):                    # nothing yet: it is to be called again
                waiting.append(request)
            return misbehave(plan.flush)
        count = min(3000, 9000 - position)
        if count <= 0:
            return httpd.END
        buffer[:count] = b"f" * count
        return count

    def upload(request, data):
        if plan.upload:
            return misbehave(plan.upload)

    def good(request, page):
        page.set_header("X-Good", request.query)
        page.write("good " + request.query)
        return 200

    httpd.register_httpdcb("test", "plain", access)
    httpd.register_httpdcb("test", "stream", access, flush)
    httpd.register_httpdcb("test", "upload", access, upload_data_cb=upload)
    httpd.register_httpdcb("test", "good", good)


def is_status(value):
    """What an access handler may return: an int that is no bool, HTTPStatus included; None is 200."""
    return value is None or isinstance(value, int) and not isinstance(value, bool) and 200 <= value <= 599


def check_bad_answer(plan, method, root, reply, reset):
    """Of a request whose callbacks misbehave: 500, the HTTPError, or what is allowed; a stream is cut."""
    fault = plan.upload or plan.again or plan.access
    if root == "stream" and plan.flush and method != "HEAD":
        if plan.flush_turn == 0 and reply.status >= 400:       # nothing had been sent: it is answered
            return
        kind, value = plan.flush
        good = kind == "return" and (is_count(value) or value == httpd.END)
        # To HTTP/1.0 an orderly end is the whole: a reset is the sign.
        assert good or reset or not reply.whole, ("not cut", reply)
        return
    promised = root == "stream" and ("Content-Length", "999999999999999999") in plan.headers
    assert reply.whole or promised, ("cut", reply)
    assert 200 <= reply.status <= 599, reply
    plain = plan.write in ((), ("fine",)) and not plan.headers
    if fault and fault[0] == "return" and fault is not plan.upload and plain:
        wanted = (fault[1] or 200,) if is_status(fault[1]) else (500,)
        if fault[1] is None:        # without content: today's rule is 500
            wanted = (200, 500)
        assert reply.status in wanted, ("returned %s" % type(fault[1]), reply)
    if fault and fault[0] == "raise" and plain:
        error = None
        with contextlib.suppress(Exception):
            error = RAISED[fault[1]]()
        wanted = 500
        if isinstance(error, httpd.HTTPError) and isinstance(error.status,
                                                             int) and 400 <= error.status <= 599:
            wanted = error.status
        assert reply.status in (wanted, 500) or "spoilt" in fault[1], ("raised", fault[1], reply)


def is_count(value):
    """What flush_data_cb may return: the size of a piece."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def callback_run(number):
    chance = random.Random("callbacks %d" % number)
    plan, waiting = make_plan(number, chance), []
    root = "upload" if plan.upload else "stream"
    if not plan.upload and not plan.flush:
        root = chance.choice(("plain", "plain", "stream"))
    method = "POST" if plan.upload else chance.choice(("GET", "GET", "HEAD", "POST"))
    version = chance.choice(("1.1", "1.1", "1.0"))
    for name in ("plain", "stream", "upload", "good"):
        httpd.roots.pop(name, None)
    register_plan(plan, waiting)
    content = b"c" * chance.choice((10, 900))
    head = "%s /%s?%d HTTP/%s\r\nHost: x\r\nConnection: keep-alive\r\n" % (method, root, number, version)
    head += "Content-Length: %d\r\n" % len(content) if method == "POST" else ""
    good = b"GET /good?%d HTTP/1.1\r\nHost: x\r\n\r\n"
    raw = good % 1 + head.encode() + b"\r\n" + (content if method == "POST" else b"") + good % 2
    server = small_server()
    try:
        received, ended = bytearray(), False
        reset = False
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(raw)
            client.setblocking(False)
            quiet = 0
            while not ended and quiet < 3:
                assert len(received) < 1 << 20, "an endless answer"
                server.run_once(0.001 * quiet)
                if waiting:
                    waiting.pop().resume()
                try:
                    more = client.recv(1 << 20)
                except BlockingIOError:
                    quiet += 1
                    continue
                except ConnectionResetError:
                    more, reset = b"", True
                received += more
                ended, quiet = not more, 0
        received = bytes(received)
        finish(server)
        said = "%s /%s HTTP/%s" % (method, root, version)
        replies = split_scripted(received, [False, method == "HEAD", False])
        assert replies and replies[0].content == b"good 1", ("the one before is lost", said, received[:200])
        if not ended or len(replies) > 2:
            assert len(replies) == 3 and replies[2].content == b"good 2", ("the one behind is lost", said,
                                                                           received[-300:])
        assert len(replies) >= 2 or root == "stream", ("no answer", said, received[-200:])
        if len(replies) > 1 and replies[1].status:
            check_bad_answer(plan, method, root, replies[1], reset)
        fresh = split_replies(converse(server, [good % 3]))
        assert [reply.content for reply in fresh] == [b"good 3"], ("serves no more", said)
    finally:
        with contextlib.suppress(Exception):
            server.stop(0)


def test_callbacks_that_misbehave(caplog):
    """Whatever they do: an answer or a cut stream; others are answered, and the server lives."""
    caplog.set_level(logging.CRITICAL, "httpd")
    problems = []
    for number in range(max(CALLBACK_RUNS, EVERYTHING)):
        try:
            callback_run(number)
        except KeyboardInterrupt:
            raise
        except BaseException as problem:
            text = "Unspeakable" if isinstance(problem, Unspeakable) else brief(problem)
            plan = make_plan(number, random.Random("callbacks %d" % number))
            kinds = ("access", "again", "flush", "upload")
            where = next((kind for kind in kinds if getattr(plan, kind)), "write")
            what = getattr(plan, where) if where != "write" else plan.write + plan.headers
            said = "an object" if isinstance(what[-1], UnspeakableObject) else repr(what)
            problems.append("run %d: %s %s: %s" % (number, where, said[:200], text))
    fail_with(problems)


# -------------------------------------------------------------------------------------------------------- Mutated texts

PRIORITIES = (
    "NORMAL", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2", "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2",
    "PFS:%SERVER_PRECEDENCE:-CIPHER-ALL:+AES-128-GCM",
    "NONE:+VERS-TLS1.2:+AES-256-GCM:+ECDHE-RSA:+AEAD:+GROUP-X25519:+SIGN-ALL:+COMP-NULL", "SUITEB128",
    "PERFORMANCE:-GROUP-ALL:+GROUP-SECP256R1", "@SYSTEM", "NORMAL:-MAC-ALL:+SHA256:-KX-ALL:+ECDHE-ECDSA:+RSA",
    "NORMAL:%NO_TICKETS:%PROFILE_MEDIUM:!3DES-CBC", "LEGACY:-VERS-TLS-ALL:+VERS-TLS1.2:+CTYPE-X509",
)
PRIORITY_TOKENS = (
    b":", b"+", b"-", b"!", b"%", b"@", b"\0", b" ", b"\n", b"\xc5\xbf", b"\xc3\x9f", b"ALL", b"::", b"+VERS-",
    b"GROUP-", b"NONE", b"NORMAL", b"CIPHER-ALL", b"AES-256-GCM", b"TLS1.3", b"A" * 300,
)


def test_mutated_priorities():
    """A plan that can be used, or ConfigError of one line; in time that grows with the text."""
    problems = []
    for number in range(PRIORITY_CASES):
        chance = random.Random("priority %d" % number)
        text = ":".join(chance.sample(PRIORITIES, chance.choice((1, 1, 2)))).encode()
        text = mutate(text, chance, PRIORITY_TOKENS).decode("utf-8",
                                                            chance.choice(("replace", "surrogateescape")))
        try:
            plan = httpd.tls_priority(text)
            assert plan.versions and (plan.ciphers or plan.suites13)
        except httpd.ConfigError as error:
            if "\n" in str(error) or not str(error).startswith("tls_ciphers"):
                problems.append("case %d: %r: %r" % (number, text, str(error)))
        except Exception as problem:
            problems.append("case %d: %r: %r" % (number, text, problem))
    fail_with(problems)


CONFIGURATION = b"""# what an operator writes
[httpd]
ip = 127.0.0.1
port = 8000
max_connections = 100     ; at a time
conn_timeout = "2.5"
tls_ciphers = "NORMAL:-VERS-ALL:+VERS-TLS1.3"
tls_cert_file = "/tmp/a \\"b\\".pem"

loadmodule "/usr/lib/opensips/modules/mi_http.so"
modparam("mi_http", "root", "mi")
modparam( "httpd" , "post_buf_size", 4096 );
[a_module_that_nobody_has]
name = value
"""
CONFIGURATION_TOKENS = (
    b"[httpd]\n", b"[mi_http]\n", b"[http]\n", b"[no_such_module]\n", b"[.]\n", b"[..x]\n", b"[a.b.c]\n", b"[ ]\n",
    b"[]\n", b"[x", b"]", b'"', b"'", b"\\", b"=", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\x0b", b"\x85", b" ", b"\t", b"#", b";", b"port = 1\n", b"port = 99999999999999999999\n",
    b"port = 1e3\n", b"prot = 1\n", b"ip = ::1%lo\n", b"ip = \xd9\xa3\n", b"memory_budget = 999999999999999\n",
    b"memory_budget = 1\n", b"buf_size = 999999999999999\n", b"conn_timeout = nan\n", b"conn_timeout = inf\n",
    b"conn_timeout = -1\n", b"max_header_size = 0\n", b'modparam("httpd"', b'modparam("x", "y", "z")\n',
    b'loadmodule ""\n', b'loadmodule "httpd.so"\n', b'loadmodule "mi_http.so"\n', b"%s%d%(x)s{0}",
    b"tls_ciphers = NONE\n", b"tls_key_file = /dev/null\n", b"tls_ca_file = x\n", b"mi_http_root = \"mi\"\n",
    b"root = a/b\n", b"root = \n", b"threads = 0\n", b"x" * 3000,
)


def test_mutated_configurations(tmp_path, monkeypatch):
    """Only ConfigError, each line of which says where; what is taken makes a server, or ConfigError again."""
    problems = []
    path = str(tmp_path / "mutated.cfg")
    where = re.compile(re.escape(path) + r"(:[0-9]+)?: |-o [^\n]*: |httpd: ")
    for number in range(CONFIG_CASES):
        chance = random.Random("configuration %d" % number)
        for name in ("params", "roots", "places"):
            if hasattr(httpd, name):
                monkeypatch.setattr(httpd, name, {})
        monkeypatch.setattr(httpd, "loaded", [])
        text = CONFIGURATION
        if chance.random() < 0.7:
            text = text.replace(b"[a_module_that_nobody_has]\nname = value\n", b"")
        if number < len(CONFIGURATION_TOKENS):      # at first each token once, where it is read as a line
            text = b"[httpd]\nport = 0\n" + CONFIGURATION_TOKENS[number] + b"\n"
        else:
            text = mutate(text, chance, CONFIGURATION_TOKENS)
        text = text.replace(b"tls_cert_file", b"#") if chance.random() < 0.7 else text
        with open(path, "wb") as file:
            file.write(text)
        overrides = chance.choice(
            ([], [], ["port=0"], ["prot=1"], ["=1"], ["mi_http.root=\ud800"], ["a.b=c"], [".=", "x"])
        )
        loading = True
        if number < len(CONFIGURATION_TOKENS):
            overrides = []
        try:
            httpd.load_config(path, overrides)
            loading = False
            httpd.Server(port=0)
        except httpd.ConfigError as error:
            for line in str(error).split("\n"):
                match = where.match(line)
                if not match or loading and match[0] == "httpd: ":
                    problems.append("case %d: a line that does not say where: %r\n    %r" % (number, line, text))
        except BaseException as problem:
            problems.append("case %d: %r, %s\n    %r %r"
                            % (number, problem, "load_config" if loading else "Server", overrides, text))
    fail_with(problems)


CALLS = (
    b'{"jsonrpc":"2.0","method":"add","params":[1,2],"id":1}',
    b'{"jsonrpc":"2.0","method":"add","params":{"a":1,"b":"2"},"id":"x"}',
    b'{"jsonrpc": "2.0", "method": "same", "params": {"value": [null, "\\ud83d\\ude00", 1.5e3]}, "id": null}',
    b'{"jsonrpc":"2.0","method":"fails","id":-7}',
    b'{"jsonrpc":"2.0","method":"refuses","id":1.5}', b'{"jsonrpc":"2.0","method":"no_json","id":""}',
    b'{"jsonrpc":"2.0","method":"later","params":[3],"id":4}',
    b'{"jsonrpc":"2.0","method":"same","params":["notification"]}',
    b'{"jsonrpc":"2.0","method":"which","id":12345678901234567890}',
    b'{"jsonrpc":"2.0","method":"which","params":["add"],"id":8}',
    b'{"jsonrpc":"2.0","method":"get_statistics","params":{"statistics":["all"]},"id":9}',
    b'{"jsonrpc":"2.0","method":"nobody","id":10}', b'{"jsonrpc":"2.0","method":"exits","id":11}',
    b'{"jsonrpc":"2.0","method":"version","params":[],"id":12}',
)
JSON_TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"false", b"NaN", b"-Infinity", b"1e999",
    b"-1e999", b"1E400", b"0", b"-", b"01", b"1.", b"\xff", b"\xef\xbb\xbf", b"\0", b"\n", b"\\u0000", b"\\ud800",
    b'"id":true', b'"id":{}', b'"id":[]', b'"id":1e999', b',"id":2', b'"jsonrpc":"1.0",', b'"method":5,',
    b'"params":null,', b'"params":5,', b'"params":{"a":1,"a":2},', b'"params":{"self":1},', b'"params":{"a":[]},',
    b'"params":["\\ud800"],', b"[" * 3000, b"{\"a\":" * 3000, b"9" * 5000, b"[1]", b"{}", b"[]", b'"x"',
)


def is_ident(value):
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int)) and not isinstance(value, bool)


def expected_idents(body):
    """The ids that must come back, in order, and whether it is a batch, by the words of JSON-RPC."""
    def refuse(text):
        raise ValueError(text)

    try:
        calls = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return [None], False
    batch = isinstance(calls, list) and bool(calls)
    idents = []
    for call in calls if batch else [calls]:
        if not isinstance(call, dict):
            idents.append(None)
            continue
        named = isinstance(call.get("method"), str) and isinstance(call.get("params", []), (list, dict))
        good = named and call.get("jsonrpc") == "2.0"
        ident = call.get("id")
        if "id" in call or not good:
            idents.append(ident if is_ident(ident) else None)
    return idents, batch


def test_mutated_commands():
    """The answer is JSON, an empty 202 or a 4xx; and every id comes back, in the order of the calls."""
    def exits():
        raise SystemExit

    def refuses():
        raise httpd.HTTPError(404, "no such thing: \ud800")

    for name, function, threads in (
        ("add", lambda a, b=5: a + b, False), ("same", lambda value: value, False),
        ("fails", lambda: 1 / 0, False), ("exits", exits, False),
        ("no_json", lambda: {1, 2}, False), ("refuses", refuses, False), ("later", lambda value: value, True),
    ):
        httpd.register_mi(name, function, threads=threads)
    httpd.loadmodule("mi_http")
    logging.getLogger("httpd").setLevel(logging.CRITICAL)
    problems = []
    server = httpd.Server(ip="127.0.0.1", port=0, receive_buf_size=65536)
    for number in range(JSON_CASES):
        chance = random.Random("json %d" % number)
        calls = chance.sample(CALLS, chance.choice((1, 1, 2, 4)))
        body = b"[" + b",".join(calls) + b"]" if len(calls) > 1 or chance.random() < 0.2 else calls[0]
        if chance.random() < 0.9:
            body = mutate(body, chance, JSON_TOKENS)
        head = b"POST /mi HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        raw = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        try:
            reply, = split_replies(converse(server, [raw]))
            assert reply.whole
            check_command_reply(reply, *expected_idents(body))
        except BaseException as problem:
            problems.append("case %d: %s\n    %r" % (number, brief(problem), body[:600]))
            with contextlib.suppress(BaseException):
                server.stop(0)
            server = httpd.Server(ip="127.0.0.1", port=0, receive_buf_size=65536)
    server.stop(0)
    logging.getLogger("httpd").setLevel(logging.NOTSET)
    fail_with(problems)


def check_command_reply(reply, idents, batch):
    if 400 <= reply.status < 500:
        return
    if reply.status in (202, 204):
        assert reply.content == b"" and not idents, ("an id got no answer", idents)
        return
    assert reply.status == 200, reply
    answer = json.loads(reply.content)
    assert isinstance(answer, list) == batch, ("a batch is an array", reply.content[:200])
    answers = answer if batch else [answer]
    assert all(one["jsonrpc"] == "2.0" and ("result" in one) != ("error" in one) for one in answers), answer
    came = [one["id"] for one in answers]
    assert [json.dumps(ident) for ident in came] == [json.dumps(ident) for ident in idents], ("ids", came,
                                                                                              idents)


# ------------------------------------------------------------------------------------------------------------- Budgets

SOURCE = (HERE / "httpd.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")


def code_tokens(source, tree):
    """The tokens of each line that has code: comments and docstrings are none."""
    documented = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
            and ast.get_docstring(node, clean=False) is not None
        ):
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return collections.Counter(t.start[0] for t in tokens if t.type not in blank and t.start[0] not in documented)


def branches(tree):
    kinds = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension)
    nodes = list(ast.walk(tree))
    return sum(isinstance(n, kinds) for n in nodes) + sum(
        len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp)
    )


def is_folded(node):
    """An expression that has to be decoded."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # a boolean times a sequence
        return any(
            isinstance(side, (ast.Compare, ast.BoolOp))
            or isinstance(side, ast.UnaryOp)
            and isinstance(side.op, ast.Not)
            for side in (node.left, node.right)
        )
    if isinstance(node, ast.Expr):  # a condition as a statement
        return isinstance(node.value, (ast.IfExp, ast.BoolOp))
    if isinstance(node, ast.IfExp):  # a condition in a condition
        return sum(isinstance(child, ast.IfExp) for child in ast.walk(node)) > 1
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):  # three and more values at once
        return isinstance(node.targets[0], ast.Tuple) and len(node.value.elts) > 2
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)  # a lambda that has a name


def test_the_style_of_the_file():
    """As few ideas a line, and a function, as the files that are good to read."""
    tree, lines = ast.parse(SOURCE), SOURCE.split("\n")
    tokens, nodes = code_tokens(SOURCE, tree), list(ast.walk(tree))
    numbers = sorted(tokens)

    def size(node):
        return bisect.bisect(numbers, node.end_lineno) - bisect.bisect_left(numbers, node.lineno)

    assert len(lines) <= 8850
    assert max(map(len, lines)) <= 100
    assert sum(tokens.values()) <= 55300
    assert sum(tokens.values()) / len(tokens) <= 8.8
    assert sum(count > 25 for count in tokens.values()) / len(tokens) <= 0.005
    assert branches(tree) / len(tokens) <= 0.29
    assert sum(isinstance(node, ast.IfExp) for node in nodes) <= 45
    assert [node.lineno for node in nodes if is_folded(node)] == []
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            hot = node.name == "serve"
            assert size(node) <= (45 if hot else 40), node.name
            assert branches(node) <= (15 if hot else 12), node.name
        if isinstance(node, ast.ClassDef):
            assert size(node) <= 350, node.name


def test_only_the_standard_library_is_imported():
    for source in (SOURCE, (HERE / "test_httpd.py").read_text(encoding="utf-8")):
        nodes = list(ast.walk(ast.parse(source)))
        names = {name.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
        names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        if hasattr(sys, "stdlib_module_names"):
            assert names <= {*sys.stdlib_module_names, "pytest", "httpd"}


def test_layout_of_the_repository():
    git = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    if git.returncode == 0 and git.stdout:
        top = {name.split("/")[0] for name in git.stdout.split("\n") if name and not name.startswith(".")}
        assert top == {"httpd.py", "test_httpd.py", "example.cfg", "README.md", "LICENSE"}


def test_the_program_of_the_docstring_is_one():
    program = re.search(r"    import httpd\n.*?port=8000\)\n", httpd.__doc__, re.DOTALL)[0]
    tree = ast.parse(textwrap.dedent(program))
    assert [type(node).__name__ for node in tree.body] == ["Import", "FunctionDef", "Expr", "Expr"]


def test_readme_names_everything_public():
    for name in httpd.__all__:
        assert hasattr(httpd, name) and "`%s" % name in README, name
    for rows_of_module in httpd.PARAMETERS.values():
        for row in rows_of_module:
            assert (
                "| %s | %s | %s |" % (row.name, '""' if row.default == "" else "%s" % row.default, row.meaning)
                in README
            ), row.name


def test_example_cfg_works_as_it_is(tmp_path):
    httpd.load_config(str(HERE / "example.cfg"))
    values = httpd.in_force("httpd")
    assert values["ip"] == "127.0.0.1"
    assert values["port"] == 8888
    assert list(httpd.roots) == ["", "mi", "metrics"]
    assert list(httpd.BUILT_IN) == ["mi_http", "mi_fifo", "prometheus", "mi_html"]  # all but mi_fifo are there
    text = (HERE / "example.cfg").read_text(encoding="utf-8")
    assert httpd.pending_services == []  # only one program can own the FIFO
    for row in (*httpd.PARAMETERS["httpd"], *httpd.PARAMETERS["mi_fifo"]):
        assert re.search(r"^#? ?%s =" % row.name, text, re.MULTILINE), row.name
    uncommented = re.sub(r"(?m)^# ?([a-z_]+ =|\[[a-z_]+\]$)", r"\1", text)
    (tmp_path / "all.cfg").write_text(re.sub(r"(?m)^(ip|port) = .*$", "", uncommented))
    httpd.loaded.clear()
    httpd.roots.clear()
    httpd.params.clear()
    httpd.load_config(str(tmp_path / "all.cfg"))  # the values in the comments are the defaults
    for module, rows in httpd.PARAMETERS.items():
        assert {row.name: row.default for row in rows} == httpd.in_force(module)


BLOCKS = dict(enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)))


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Every block of the README, started at the same time."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with contextlib.ExitStack() as stack:
        started = {}
        for number, block in BLOCKS.items():
            here = tmp_path_factory.mktemp("block")
            (here / "block.py").write_text(block.replace("port=8000", "port=0"))
            line = ["nice", "-n19", sys.executable, "-u", "block.py"]
            process = subprocess.Popen(line, cwd=here, env=environment, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            started[number] = process
        yield started


def test_readme_blocks_run(programs):
    with contextlib.ExitStack() as stack:
        clients = {}
        for number, process in programs.items():
            port = int(re.search(r":(\d+)", process.stdout.readline())[1])
            clients[number] = stack.enter_context(connect(port=port))
            clients[number].sendall(get(b"/hello"))
        for number, client in clients.items():
            assert client.recv(12) == b"HTTP/1.1 200", number
    for process in programs.values():
        process.terminate()
    for number, process in programs.items():
        assert process.wait(20) in (0, -signal.SIGTERM), number


@pytest.mark.parametrize("block", BLOCKS.values(), ids=map(str, BLOCKS))
def test_readme_blocks_are_short(block):
    assert len([line for line in block.split("\n") if line.strip()]) < 20
