#!/usr/bin/env python3
"""An HTTP endpoint for any Linux program, in one file of standard-library Python.

Copy the file into a project and register what answers below a root path:

    import httpd

    def hello(request, page):
        page.write("Hello, %s!\\n" % request.lookup_arg("name", "world"))

    httpd.register_httpdcb("example", "hello", hello, content_type="text/plain; charset=utf-8")
    httpd.run(ip="127.0.0.1", port=8000)

or run it as a management server: `python httpd.py example.cfg`; without a file it shows itself.

How a GET travels through this file, a line for each hop:

    Server._turn               one poll; the clock is read once for all that is ready
    Connection.turn            sends what is due, and runs states until one has to wait
    idle (greet, with TLS)     one recv(); a head seen before costs a look-up, any other goes to
    next_request               which finds its end; Heads.read has parse_head make a Head of it
    route                      who answers, and who may: the Request is made with it
    Connection.serve           the hot path: the handler writes into the Page,
    Connection.finish          and the head is put right before the content, in the same buffer
    Connection.turn            one send(); settle() then watches for what is waited for

What takes more than a turn has an Exchange: content that is on its way (receive_content), a request
that waits for Request.resume() (suspended), a response that flush_data_cb makes piece by piece
(stream). The table STATES says what each state waits for, for how long, and what becomes of it.

The rule of the one buffer: a server has one Page, for one response at a time. What the socket does
not take of it is copied out before `turn` returns: to memory, or, if it is not small, to a Spool, a
temporary file, from where the state unspool sends it. Pipelined answers are gathered.

Everything that a client can make grow is counted in one place, Connection.count. When memory, the
spool or descriptors are short, whoever is furthest behind his time gives way (Room.make).

Who knows what: the parser knows bytes only. A Connection runs states, and `turn` alone knows "would
block" of a connection. The Loop knows the selector and the descriptors that are watched, the Server
the connections and the time. It lives in one thread; stop(), resume(), reload() are for any. Access
says who may; its verdict is a part of the remembered head.

What stands behind the section TLS is built on this, by what any program may use: handlers,
observers (they are told of every response), Server.watch and call_later. These are commands over
HTTP and over a FIFO (mi_http, mi_fifo), metrics, the access log, the console page and WSGI.
Processes has run(): workers, signals, restarts.
"""
from __future__ import annotations

import errno
import functools
import gc
import heapq
import io
import json
import logging
import math
import mmap
import operator
import os
import queue
import re
import resource
import select
import selectors
import signal
import socket
import stat
import sys
import threading
import time
import traceback
import weakref
from bisect import bisect_left
from collections import deque
from contextlib import contextmanager
from contextlib import redirect_stdout
from contextlib import suppress
from contextvars import copy_context
from email.utils import formatdate
from http import HTTPStatus
from importlib import import_module
from string import Template
from types import GeneratorType
from typing import TYPE_CHECKING
from typing import Any
from typing import Callable
from typing import Collection
from typing import Dict
from typing import ItemsView
from typing import Iterable
from typing import Iterator
from typing import Mapping
from typing import NamedTuple
from typing import Optional
from typing import Protocol
from typing import Sequence
from typing import Tuple
from typing import Union
from urllib.parse import parse_qsl
from urllib.parse import unquote
from urllib.parse import unquote_to_bytes
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import argparse
    import inspect
    import ssl
    import subprocess

__version__ = "0.1"
__all__ = [
    "register_httpdcb", "unregister_httpdcb", "register_wsgi", "register_mi", "register_metric",
    "register_service", "modparam", "loadmodule", "load_config",
    "Server", "run", "Request", "Page", "FormFile", "HTTPError", "ConfigError", "SUSPEND", "END",
    "tls_priority", "tls_context", "TLSPlan", "Spool", "observers", "Response"]
log = logging.getLogger("httpd")


# --------------------------------------------------------------------------------------- Parameters

class ConfigError(ValueError):
    """The operator's or programmer's mistake: a line for each problem, with what to do instead.

    `parameter`: of httpd, the one that has to be changed, or empty.
    """

    def __init__(self, text: str, parameter: str = "") -> None:
        super().__init__(text)
        self.parameter = parameter


# By the type of a number: what it looks like as text, and what it is called.
NUMBER_KINDS = {
    int: ("-?[0-9]{1,15}", "a whole number"),
    float: (r"-?[0-9]{1,15}(?:\.[0-9]{1,6})?", "a number of seconds"),
}


class Parameter(NamedTuple):
    """A row of the table. The type of the default is the parameter's type."""
    name: str
    default: Union[str, int, float]
    meaning: str
    low: float = 0
    high: float = math.inf
    zero: bool = False          # 0 is allowed though it is below `low`
    # Of a text: which of the `checks` it has to pass; a path, or "secret", stands for more.
    kind: str = "text"

    def bounds(self) -> str:
        """The allowed numbers, in words; empty for a text."""
        if isinstance(self.default, str):
            return ""
        words = "at least %g" % self.low
        if self.high < math.inf:
            words = "%d to %d" % (self.low, self.high)
        return "0 or " + words if self.zero else words

    def convert(self, value: Any) -> Union[str, int, float]:
        """The value in the parameter's type. ValueError says what it must be."""
        if isinstance(self.default, str):
            return self._convert_text(value)
        return self._convert_number(value)

    def _convert_text(self, value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError("must be text")
        text = os.fspath(value)
        checks[self.kind](text)
        return text

    def _convert_number(self, value: Any) -> Union[int, float]:
        """Numbers may come as text, in ASCII digits: int() would take more."""
        kind: Any = type(self.default)
        pattern, words = NUMBER_KINDS[kind]
        if isinstance(value, str) and re.fullmatch(pattern, value):
            value = kind(value)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ValueError("must be " + words)
        allowed_zero = self.zero and value == 0
        if not allowed_zero and not self.low <= value <= self.high:
            raise ValueError("must be " + self.bounds())
        number: Union[int, float] = kind(value)
        return number


def check_address(text: str) -> None:
    """Names are not looked up: that could stall the start, or differ the next time."""
    if text in ("", "*"):
        return
    if text.startswith("unix:"):
        check_socket_path(text[5:])
        return
    address, percent, zone = text.partition("%")
    family = socket.AF_INET
    if ":" in address:
        family = socket.AF_INET6
    try:
        if percent and (family == socket.AF_INET or not zone or "\0" in zone):
            raise ValueError(zone)
        socket.inet_pton(family, address)
    except (OSError, ValueError):
        raise ValueError("must be an IPv4 or IPv6 address, unix:/PATH, or empty or * for all "
                         "addresses") from None


def check_socket_path(path: str) -> None:
    """unix(7): sun_path has 108 bytes, with a NUL behind a path and before an abstract name."""
    if not path.startswith(("/", "@")) or len(path) < 2 or "\0" in path:
        raise ValueError("must be unix:/PATH, or unix:@NAME")
    if len(os.fsencode(path)) > 107:
        raise ValueError("must have at most 107 bytes behind unix:")


def check_root(text: str) -> None:
    """OpenSIPS' rule for root paths."""
    if not re.fullmatch("[A-Za-z0-9_]*", text):
        raise ValueError("must be one path segment of letters, digits and _")


# By Parameter.kind: raises ValueError, which says what a text must be. The section TLS adds
# "priority", Access log "log format".
checks: dict[str, Callable[[str], object]] = {
    "text": str, "path": str, "secret": str, "address": check_address, "root": check_root}

PARAMETERS: dict[str, tuple[Parameter, ...]] = {
    "httpd": (
        Parameter("ip", "",
                  "address to listen on, or unix:/PATH; empty or *: every address of the machine",
                  kind="address"),
        Parameter("port", 8888, "port to listen on; 0: any free one", 1024, 65535, zero=True),
        Parameter("memory_budget", 4 * 2**20,
                  "bytes of memory for all connections together", 2**17, 2**40),
        Parameter("buf_size", 0,
                  "bytes of the largest response that is not streamed; 0: a quarter of "
                  "memory_budget", 256, zero=True),
        Parameter("post_buf_size", 1024, "bytes of the largest form; larger: 413", 256),
        Parameter("receive_buf_size", 16384,
                  "bytes of the largest content that is not a form, such as JSON; 0: post_buf_size",
                  256, zero=True),
        Parameter("wsgi_body_size", 2**26,
                  "bytes of the largest content for a WSGI application; larger: 413", 256),
        Parameter("spool_size", 2**28,
                  "bytes of temporary files for unread responses and large content; 0: none",
                  2**16, zero=True),
        Parameter("tls_cert_file", "",
                  "file with the certificate and its chain, PEM; with tls_key_file: HTTPS only",
                  kind="path"),
        Parameter("tls_key_file", "",
                  "file with the private key of the certificate, PEM", kind="path"),
        Parameter("tls_ciphers", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2",
                  "TLS versions and ciphers, as a GnuTLS priority string", kind="priority"),
        Parameter("tls_ca_file", "",
                  "file with CA certificates, PEM; clients must present a certificate signed by "
                  "one", kind="path"),
        Parameter("conn_timeout", 30.0,
                  "seconds that an idle connection is kept, or one whose client reads less than "
                  "500 bytes a second; 0: for ever"),
        Parameter("request_timeout", 10.0,
                  "seconds in which the head of a request must arrive; content gets one "
                  "second more for every 500 bytes", 0.1),
        Parameter("max_connections", 0,
                  "connections at a time; 0: as many as RLIMIT_NOFILE allows", 1, zero=True),
        Parameter("max_connections_per_ip", 0,
                  "connections of one address at a time, of IPv6 of one /64; 0: no limit", 1,
                  zero=True),
        Parameter("max_header_size", 16384,
                  "bytes of request line and fields; larger: 414 or 431", 256, 2**16),
        Parameter("auth_realm", "OpenSIPS MI", "what the browser says the password is for"),
        Parameter("auth_username", "", "with auth_password: Basic authentication for every root"),
        Parameter("auth_password", "", "the password, or file:PATH of the file that has it",
                  kind="secret"),
        Parameter("allowed_hosts", "",
                  "host names that a request may be for, others: 421; empty or *: any"),
        Parameter("trusted_proxies", "",
                  "addresses and networks whose X-Forwarded-For, -Proto and -Host are believed"),
        Parameter("workers", 1,
                  "processes that share the address, by run(); 0: one for each core", 0, 64),
        Parameter("worker_timeout", 0.0,
                  "seconds after which a worker that is stuck is killed and replaced; 0: never", 1,
                  zero=True),
        Parameter("grace_timeout", 10.0,
                  "seconds that requests under way get to finish when the server is stopped"),
        Parameter("access_log", "",
                  "file for a line for each response; -: stdout; syslog:; empty: none",
                  kind="path"),
        Parameter("access_log_format", "combined",
                  "combined, as Apache and nginx have it, or json", kind="log format"),
    ),
    "mi_http": (
        Parameter("root", "mi", "first part of the path of the JSON-RPC interface", kind="root"),
        Parameter("threads", 4, "threads for commands that take long", 1, 100),
        Parameter("pretty_printing", 0, "1: answers with line ends and indentation", 0, 1),
    ),
    "mi_fifo": (
        Parameter("fifo_name", "/tmp/opensips_fifo", "FIFO that commands are written to",
                  kind="path"),
        Parameter("reply_dir", "/tmp", "directory of the FIFOs in which clients wait for answers",
                  kind="path"),
    ),
    "prometheus": (
        Parameter("root", "metrics", "root path of the metrics", kind="root"),
    ),
    "mi_html": (
        Parameter("root", "", "root path of the console page; empty: only /", kind="root"),
    ),
}
# The modules of this file: what loads each, with its parameters in force. Their sections put
# themselves in.
BUILT_IN: dict[str, Callable[[dict[str, Any]], object]] = {}

params: dict[str, dict[str, Any]] = {}      # module -> the parameters that have been set
loaded: list[str] = []                      # modules, in the order of loading
# module and parameter -> FILE:LINE, where it has been set there
places: dict[tuple[str, str], str] = {}


def nearest(name: str, names: Iterable[str]) -> str:
    """`, did you mean "port"?`, or nothing."""
    from difflib import get_close_matches       # 5 ms to import, and only mistakes need it
    matches = get_close_matches(name, list(names), 1)
    return ', did you mean "%s"?' % matches[0] if matches else ""


# What other servers call it.
SYNONYMS = {"host": "ip", "address": "ip", "bind": "ip", "listen": "ip"}


def convert(module: str, name: str, value: Any) -> Any:
    """The value as its row wants it. A user's own module judges its values in mod_init."""
    if module not in PARAMETERS:
        return value
    rows = {row.name: row for row in PARAMETERS[module]}
    if name not in rows:
        text = str(name).lower()
        meant = SYNONYMS.get(text, text)
        raise ConfigError('%s: unknown parameter "%s"%s' % (module, name, nearest(meant, rows)))
    try:
        return rows[name].convert(value)
    except ConfigError as error:
        raise ConfigError("%s: %s" % (module, error), name) from None
    except ValueError as error:
        raise ConfigError("%s: %s %s, not %r" % (module, name, error, value), name) from None


# Of OpenSIPS' mi_http: what it is called here; empty: there is nothing of the kind.
OPENSIPS_NAMES = {"mi_http_root": "root", "trace_destination": "", "trace_bwlist": ""}


def modparam(module: str, name: str, value: Any) -> None:
    """Set a parameter for what is made from now on, or ConfigError. Main thread, at start."""
    if module == "mi_http" and name in OPENSIPS_NAMES:
        old, name = name, OPENSIPS_NAMES[name]
        if not name:
            log.warning("mi_http: %s has no effect here", old)
            return
    params.setdefault(module, {})[name] = convert(module, name, value)


def in_force(module: str, **overrides: Any) -> dict[str, Any]:
    """A module's parameters: the defaults, over them modparam()'s, over these the keywords."""
    rows = PARAMETERS.get(module, ())
    values: dict[str, Any] = {row.name: row.default for row in rows}
    values.update(params.get(module, {}))
    for name, value in overrides.items():
        values[name] = convert(module, name, value)
    return values


FOR_EVER = 1e9              # seconds, 30 years
SPARE_DESCRIPTORS = 32      # for the rest of the program


class Limits:
    """The parameters of httpd in force, zeros resolved; ConfigError if they do not fit together."""
    ip: str
    port: int
    memory_budget: int
    buf_size: int
    post_buf_size: int
    receive_buf_size: int
    wsgi_body_size: int
    spool_size: int
    tls_cert_file: str
    tls_key_file: str
    tls_ciphers: str
    tls_ca_file: str
    conn_timeout: float
    request_timeout: float
    max_connections: int
    max_connections_per_ip: int
    max_header_size: int
    auth_realm: str
    auth_username: str
    auth_password: str
    allowed_hosts: str
    trusted_proxies: str
    workers: int
    worker_timeout: float
    grace_timeout: float
    access_log: str
    access_log_format: str
    other_content: str      # the parameter that limits content which is no form
    memo_size: int          # bytes for heads that have been parsed
    held_size: int          # bytes for what is under way
    keep_alive: float       # conn_timeout, which has no end if that is 0
    for_ever: float
    max_open: int           # max_connections, as many as there are descriptors for if that is 0

    def __init__(self, **overrides: Any) -> None:
        self.__dict__.update(in_force("httpd", **overrides))
        self._check_pairs()
        self.other_content = "receive_buf_size" if self.receive_buf_size else "post_buf_size"
        self.receive_buf_size = self.receive_buf_size or self.post_buf_size
        self._check_memory()
        self.buf_size = self.buf_size or self.memory_budget // 4
        self.memo_size = self.memory_budget // 4
        self.held_size = self.memory_budget - self.buf_size - self.memo_size
        self.keep_alive = self.conn_timeout or FOR_EVER
        self.for_ever = FOR_EVER
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_open = self.max_connections or max(16, descriptors - SPARE_DESCRIPTORS)

    def _check_pairs(self) -> None:
        for name, other, missing in (
                ("auth_username", "auth_password", "auth_password: set both"),
                ("auth_password", "auth_username", "auth_username: set both"),
                ("tls_cert_file", "tls_key_file", "tls_key_file: HTTPS wants both"),
                ("tls_key_file", "tls_cert_file", "tls_cert_file: HTTPS wants both"),
                ("tls_ca_file", "tls_cert_file",
                 "tls_cert_file and tls_key_file: HTTPS wants them")):
            if getattr(self, name) and not getattr(self, other):
                raise ConfigError("httpd: %s is set without %s" % (name, missing), name)

    def _check_memory(self) -> None:
        request = self.max_header_size + max(self.post_buf_size, self.receive_buf_size)
        least = max(2 * request, 4 * (self.buf_size + request) // 3) + 4
        if self.memory_budget < least:
            sizes = ("buf_size", "post_buf_size", "receive_buf_size", "max_header_size")
            largest = max(sizes, key=self.__dict__.__getitem__)
            raise ConfigError(
                "httpd: memory_budget %d has no room for buf_size and a whole request: lower %s, "
                "or set memory_budget to at least %d" % (self.memory_budget, largest, least),
                largest)


# Modules that are being loaded; run() is not for them.
loading: list[str] = []


def describe(error: BaseException) -> str:
    """What a program's own code has raised, and where: `KeyError: 'x', raised at FILE:LINE`."""
    text = "%s: %s" % (type(error).__name__, error)
    ways = (__file__, import_module.__code__.co_filename)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename not in ways and not frame.filename.startswith("<frozen")]
    if frames:
        text += ", raised at %s:%s" % (frames[-1].filename, frames[-1].lineno)
    return text


def loadmodule(name: str, **parameters: Any) -> None:
    """Load a module of this file, or a Python module, whose `mod_init(params)` gets a dict.

    `mi_http.so`, as OpenSIPS writes it, is taken too. ConfigError, also if it is loaded.
    """
    name = module_name(name)
    for key, value in parameters.items():
        modparam(name, key, value)
    if name in loaded:
        raise ConfigError("%s: is loaded already" % name)
    if name == "httpd":             # the transport itself is always there
        return
    loading.append(name)
    try:
        start_module(name)
    except (ConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:              # of sys.exit() too
        log.debug("%s: traceback", name, exc_info=True)
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = nearest(name.lower(), ["httpd", *BUILT_IN])
        raise ConfigError("%s: cannot be loaded: %s%s" % (name, describe(error), hint)) from error
    finally:
        loading.pop()
    loaded.append(name)


def module_name(text: str) -> str:
    """`mi_http`, of what OpenSIPS calls `/usr/lib/opensips/modules/mi_http.so`."""
    return re.sub(r"^.*/|\.so$", "", text)


# Where configurations lie: a user's module may lie beside one.
config_directories: list[str] = []


def find_module(name: str) -> Any:
    """A Python module: by its file beside a configuration if there is one, else by import."""
    for directory in config_directories:
        path = os.path.join(directory, name + ".py")
        found = sys.modules.get(name)
        if os.path.isfile(path) and getattr(found, "__file__", None) != path:
            from importlib.util import module_from_spec
            from importlib.util import spec_from_file_location
            spec: Any = spec_from_file_location(name, path)
            module = module_from_spec(spec)
            if found is None:           # else the standard library has one of that name
                sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                if found is None:
                    del sys.modules[name]
                raise
            return module
    return import_module(name)


def start_module(name: str) -> None:
    """Call a module's mod_init. Only parameters that have been set make one necessary."""
    if name in BUILT_IN:
        BUILT_IN[name](in_force(name))
        return
    mod_init = getattr(find_module(name), "mod_init", None)
    if mod_init is not None:
        mod_init(in_force(name))
    elif params.get(name):
        hint = (
            nearest(name, ["httpd", *BUILT_IN]) or ", or it takes no parameters: it has no mod_init"
        )
        raise ConfigError("%s: no such module%s" % (name, hint))


QUOTED_TEXT = r'"(?:[^"\\]|\\.)*"'
COMMENT = re.compile("(" + QUOTED_TEXT + r")|(?:^|(?<=\s))[#;].*")
SECTION_LINE = re.compile(r"\[\s*([^\]\s]+)\s*\]")
LOADMODULE_LINE = re.compile(r'loadmodule\s+"([^"]+)"\s*;?')
MODPARAM_LINE = re.compile(
    r'modparam\s*\(\s*"([^"]+)"\s*,\s*"([^"]+)"\s*,\s*(' + QUOTED_TEXT + r'|[^\s")]+)\s*\)\s*;?')
VALUE_LINE = re.compile(r"([^\s=]+)\s*=\s*(" + QUOTED_TEXT + r'|[^"\s].*|)')


class Setting(NamedTuple):
    """What a line of a configuration says."""
    place: str              # FILE:LINE
    module: str
    name: str = ""          # of the parameter; empty: the module is to be loaded
    value: str = ""


def unquoted(text: str) -> str:
    if text[:1] != '"':
        return text
    return re.sub(r'\\(["\\])', r"\1", text[1:-1])


# The configuration that is used without a file: what shows itself, on this machine only.
INSIDE = "[httpd]\nip = 127.0.0.1\n[mi_html]\n[mi_http]\n[prometheus]"


def read_lines(path: str) -> list[str]:
    """The lines of a text; without a path, of INSIDE. ConfigError if it cannot be read."""
    if not path:
        return INSIDE.split("\n")
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8-sig").split("\n")      # some editors begin with a mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "%s:%d: httpd: is not UTF-8: save the file in that encoding" % (path, line)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("%s: cannot be read: %s" % (path, reason)) from None


def read_config(path: str, problems: list[str]) -> list[Setting]:
    """The lines of a configuration. What cannot be read is added to `problems`."""
    lines = read_lines(path)
    settings: list[Setting] = []
    section = ""
    for number, raw in enumerate(lines, 1):
        place = "%s:%d" % (path or "inside", number)
        line = COMMENT.sub(r"\1", raw).strip()
        if not line:
            continue
        if match := SECTION_LINE.fullmatch(line):
            section = module_name(match[1])
            settings.append(Setting(place, section))
        elif match := LOADMODULE_LINE.fullmatch(line):
            settings.append(Setting(place, module_name(match[1])))
        elif match := MODPARAM_LINE.fullmatch(line):
            module, name, value = match.groups()
            settings.append(Setting(place, module, name, unquoted(value)))
        elif section and (match := VALUE_LINE.fullmatch(line)):
            settings.append(Setting(place, section, match[1], unquoted(match[2])))
        else:
            problems.append('%s: cannot read %r: write [module], below it name = value, or '
                            'modparam("module", "name", '
                            'value), and loadmodule "name.so"' % (place, line))
    return settings


def read_override(text: str) -> Setting:
    """What `-o name=value` or `-o module.name=value` says."""
    left, sign, value = text.partition("=")
    if not sign:
        raise ConfigError("-o %s: write -o NAME=VALUE" % text)
    module, _, name = left.rpartition(".")
    return Setting("-o " + text, module or "httpd", name, value)


def load_config(path: str, overrides: Sequence[str] = ()) -> None:
    """Read a configuration: set its parameters, then `overrides`, and load its modules. An empty
    path stands for the configuration inside this file: console, MI and metrics for this machine.

    ConfigError has all problems, each a line `FILE:LINE: MODULE: what is wrong`. Main thread.
    """
    problems: list[str] = []
    path = os.fspath(path)              # open() would take a number, and close that descriptor
    settings = read_config(path, problems)
    modules: dict[str, str] = {}        # to be loaded -> FILE:LINE of the first line that says so
    for setting in settings:
        if not setting.name:
            modules.setdefault(setting.module, setting.place)
    directory = os.path.dirname(path)
    named = [located(setting, directory) for setting in settings if setting.name]
    set_parameters(named, modules, problems)
    for text in overrides:              # the last one counts
        set_parameters([read_override(text)], modules, problems)
    if not problems:
        beside = os.path.abspath(directory)
        config_directories.insert(0, beside)
        sys.path.append(beside)         # for what such a module imports
        for module, place in modules.items():
            try:
                loadmodule(module)
            except ConfigError as error:
                problems.append("%s: %s" % (place, error))
    if problems:
        raise ConfigError("\n".join(problems))


def located(setting: Setting, directory: str) -> Setting:
    """A path in a configuration is relative to where the configuration lies."""
    kinds = {row.name: row.kind for row in PARAMETERS.get(setting.module, ())}
    kind, value = kinds.get(setting.name), setting.value
    if kind == "path" and value not in ("", "-") and not value.startswith("syslog:"):
        value = os.path.join(directory, value)
    elif kind == "secret" and value.startswith("file:"):
        value = "file:" + os.path.join(directory, value[5:])
    return setting._replace(value=value)


def set_parameters(settings: list[Setting], modules: Collection[str], problems: list[str]) -> None:
    """Set parameters of the modules that are going to be loaded, each once."""
    seen: dict[tuple[str, str], str] = {}       # module and name -> FILE:LINE
    for setting in settings:
        module, name = setting.module, setting.name
        place = seen.setdefault((module, name), setting.place)
        try:
            if module not in modules and module != "httpd":
                hint = ""
                if module not in BUILT_IN:
                    hint = nearest(module, ["httpd", *BUILT_IN, *modules])
                raise ConfigError('%s: is not loaded: write [%s], or loadmodule "%s.so"%s'
                                  % (module, module, module, hint))
            if place != setting.place:
                raise ConfigError("%s: %s is set already, at %s" % (module, name, place))
            modparam(module, name, setting.value)
        except ConfigError as error:
            problems.append("%s: %s" % (setting.place, error))
        places[module, name] = setting.place


# ----------------------------------------------------------------------------------------- Registry

REASONS = {status.value: status.phrase for status in HTTPStatus}
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                # RFC 9110, 5.6.2
TOKEN = re.compile(_TOKEN.decode())
FIELD_VALUE = re.compile("[\t -~\x80-\xff]*")    # RFC 9110, 5.5: no control character but the tab
DIGITS = re.compile("[0-9]{1,18}")
# Fields of a response that handlers may not set.
OWN_FIELDS = frozenset({"connection", "date", "keep-alive", "transfer-encoding", "upgrade"})


def check_field(name: str, value: str) -> None:
    """We send what we would accept: no CR LF of a client ends the head (RFC 9110, 5.5)."""
    key = name.lower()
    if not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
        raise ValueError("a character that may not stand in a header field: %r: %r" % (name, value))
    if key == "content-length" and not DIGITS.fullmatch(value):
        raise ValueError("Content-Length is no number of bytes: %r" % value)
    if key in OWN_FIELDS:
        raise ValueError("%s is set by the server" % name)


class HTTPError(Exception):
    """The client's fault, for handlers too: the answer's status, fields, and a line of text.

    From an MI command, status and reason are the code and the message of the JSON-RPC error.
    """

    def __init__(self, status: int, reason: str = "",
                 headers: Optional[Mapping[str, str]] = None) -> None:
        super().__init__(status, reason)
        self.status = int(status)
        self.reason = reason or REASONS.get(status, "")
        self.headers: Mapping[str, str] = headers or {}
        for name, value in self.headers.items():
            check_field(name, value)


class ContentTooLarge(HTTPError):
    """413. `parameter` is what the operator may raise; the log names it too."""

    def __init__(self, limit: float, parameter: str) -> None:
        super().__init__(413, "the content is larger than %.0f bytes, see %s" % (limit, parameter))
        self.parameter = parameter


OK = 200            # CPython has one object of it: what is another one is looked at closer
SUSPEND = -2        # what an access handler returns to be called again, after request.resume()
END = -1            # what flush_data_cb returns at the end of the content

AccessHandler = Callable[["Request", "Page"], Any]
FlushData = Callable[["Request", int, memoryview], int]
UploadData = Callable[["Request", bytes], Any]
Service = Tuple[str, Callable[["Server"], Any]]         # the module, and what starts it


class Refusal:
    """The handler of a request that nobody answers: `route` gives it where there is no other."""

    def __init__(self, status: int, reason: str, name: str = "", value: str = "") -> None:
        self.status = status
        self.reason = reason
        self.headers = {name: value} if name else {}

    def error(self) -> HTTPError:
        """A new one each time: an exception keeps the frames that it has passed."""
        return HTTPError(self.status, self.reason, self.headers)

    def __call__(self, request: Request, page: Page) -> int:
        raise self.error()


class Root(NamedTuple):
    """A root path and who answers there."""
    name: str
    module: str
    handlers: Mapping[str, AccessHandler]       # by method
    content_type: str
    flush: Optional[FlushData] = None
    upload: Optional[UploadData] = None
    upload_limit: Union[float, str] = 0         # bytes, or the parameter of httpd that says it
    management: bool = False
    others: Optional[AccessHandler] = None      # for methods that `handlers` does not list


roots: dict[str, Root] = {}                             # by root path, in the order of registration
# the init_proc_cb's that this process has not run yet
pending_inits: list[tuple[str, Callable[[], Any]]] = []     # and the modules they belong to
pending_services: list[Service] = []                    # that no server of this process runs
init_lock = threading.RLock()
NOT_FOR_HANDLERS = ("CONNECT", "TRACE")                 # RFC 9110, 9.3.6 and 9.3.8
# RFC 9110, 9.3 and RFC 5789. A root that takes every method says these in Allow.
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
# 405 where a root does not take them; what else nobody takes is 501. CONNECT is.
known_methods = {*METHODS, "TRACE"}


def register_httpdcb(module: str, root_path: str, access_handler_cb: AccessHandler,
                     flush_data_cb: Optional[FlushData] = None,
                     init_proc_cb: Optional[Callable[[], Any]] = None, *,
                     content_type: str = "text/html; charset=utf-8",
                     methods: Optional[Sequence[str]] = ("GET", "POST"),
                     upload_data_cb: Optional[UploadData] = None,
                     upload_limit: Union[float, str] = math.inf,
                     management: bool = False) -> None:
    """Have `access_handler_cb(request, page) -> status` answer what is at and below `/root_path`.

    module             who registers: for error texts and httpd_list_root_path
    root_path          one segment of letters, digits and _, blanks around it trimmed; "" takes
                       what no other root takes
    access_handler_cb  called in the server's thread when the request is complete. It writes the
                       content with page.write() and returns the status, 200 to 599; HTTPError is
                       answered as it says, another exception with 500 and a traceback in the log.
                       Nobody else is served meanwhile. Or it returns SUSPEND, and is called again
                       after request.resume(), with the same request and a clean page
    flush_data_cb      flush_data_cb(request, pos, buf) -> n makes the content when the handler has
                       written none: it fills the memoryview `buf` with what stands at `pos` of it,
                       and returns how many bytes; 0: nothing yet, call again after
                       request.resume(); END. It is called again when the socket has taken them.
                       Sent chunked, or with the Content-Length that the handler has set; a wrong
                       count cuts the connection, as an exception does: a broken end is the only
                       honest sign
    init_proc_cb       called once in every process that serves, in the server's thread, before the
                       first request
    content_type       of the response, unless the handler sets page.content_type
    methods            that the handler takes. HEAD comes with GET; the server answers OPTIONS
                       where it is not listed. None: every method but CONNECT and TRACE
    upload_data_cb     upload_data_cb(request, data) gets the content piece by piece as it arrives,
                       and then the handler is called with an empty request.body. HTTPError refuses
                       the rest of it
    upload_limit       bytes of the largest content for upload_data_cb, or the name of a parameter
                       of httpd that says so; larger: 413
    management         it is not for everybody: on a loopback address it answers to localhost only,
                       unless allowed_hosts is set, so that no web page reaches it by DNS rebinding;
                       and a warning if others can reach it without a password or certificate

    Raises ConfigError: a bad root path, or one that is taken; a function that is none; bad methods.
    Any thread.
    """
    name = checked_root_path(module, root_path)
    place = '%s: root path "%s"' % (module, name)
    check_callback(place, access_handler_cb, "request, page")
    for callback, arguments in (
            (flush_data_cb, "request, pos, buf"), (init_proc_cb, ""),
            (upload_data_cb, "request, data")):
        if callback is not None:
            check_callback(place, callback, arguments)
    check_upload_limit(place, upload_limit)
    others = None
    if methods is None:
        methods, others = METHODS, access_handler_cb
    check_methods(place, methods)
    check_field("Content-Type", content_type)
    handlers = dict.fromkeys(methods, access_handler_cb)
    if "GET" in handlers:
        handlers.setdefault("HEAD", access_handler_cb)
    handlers.setdefault("OPTIONS", answer_options)
    known_methods.update(handlers)
    if init_proc_cb is not None:
        pending_inits.append((module, init_proc_cb))
    roots[name] = Root(
        name, module, handlers, content_type, flush_data_cb, upload_data_cb, upload_limit,
        management, others)


def check_upload_limit(place: str, limit: Any) -> None:
    """Bytes, or the name of a parameter whose value is bytes."""
    if isinstance(limit, str):
        in_force("httpd", **{limit: 2**26})             # ConfigError if it is no parameter
    elif not isinstance(limit, (int, float)) or not limit >= 0:         # nor is NaN
        raise ConfigError("%s: upload_limit must be a number of bytes, or the name of a parameter "
                          "of httpd, not %r" % (place, limit))


def checked_root_path(module: str, root_path: str) -> str:
    """The name of a root that can be registered."""
    name = root_path.strip(" \t\r\n") if isinstance(root_path, str) else "?"
    try:
        check_root(name)
    except ValueError as error:
        raise ConfigError("%s: root path %s, not %r" % (module, error, root_path)) from None
    if name in roots:
        raise ConfigError('%s: root path "%s" is taken by %s' % (module, name, roots[name].module))
    return name


def check_function(place: str, function: Any, hint: str = "") -> None:
    """ConfigError, if it is none, or async."""
    import inspect                      # 10 ms
    if not callable(function):
        raise ConfigError("%s: no function: %r" % (place, function))
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            "%s: %r is async: it has to be a plain function%s" % (place, function, hint))


def check_callback(place: str, callback: Any, arguments: str) -> None:
    """ConfigError, if it is not to be called with these arguments."""
    import inspect                      # 10 ms
    check_function(place, callback, ", which may return SUSPEND")
    try:
        inspect.signature(callback).bind(*filter(None, arguments.split(", ")))
    except TypeError as error:
        raise ConfigError(
            "%s: %r is called with (%s): %s" % (place, callback, arguments, error)) from None
    except ValueError:                  # of C: it does not say what it takes
        pass


def check_methods(place: str, methods: Sequence[str]) -> None:
    """Tokens in capitals, but for the two that are not for a handler."""
    good = bool(methods) and not isinstance(methods, str)
    for method in methods:
        good = good and isinstance(method, str) and bool(TOKEN.fullmatch(method))
        good = good and method == method.upper() and method not in NOT_FOR_HANDLERS
    if not good:
        raise ConfigError(
            '%s: methods must be names in capitals, such as ("GET",), not CONNECT or TRACE: %r'
            % (place, methods))


def unregister_httpdcb(root_path: str) -> None:
    """Take a root path out again: 404 from now on. ConfigError if it is not there. Any thread."""
    root_path = str(root_path)
    if roots.pop(root_path.strip(" \t\r\n"), None) is None:
        raise ConfigError(
            'root path "%s" is not registered%s' % (root_path, nearest(root_path, roots)))


def is_known(method: str, name: str) -> bool:
    """Whether a method may be asked for below `/name`: 501 if not (RFC 9110, 15.6.2)."""
    root = roots.get(name) or roots.get("")
    every = root is not None and root.others is not None
    return method in known_methods or every and method not in NOT_FOR_HANDLERS


def answer_options(request: Request, page: Page) -> int:
    """OPTIONS, for every root (RFC 9110, 9.3.7)."""
    page.set_header("Allow", ", ".join(request._root.handlers))
    return 204


def call_safely(what: str, callback: Callable[..., Any], *arguments: Any) -> None:
    """Call what a program has given. Only a KeyboardInterrupt ends anything; others are logged."""
    try:
        callback(*arguments)
    except BaseException as error:
        survive(what, error)


def survive(what: str, error: BaseException) -> None:
    """The same for what has been raised. A process that was forked in there ends."""
    if isinstance(error, KeyboardInterrupt) or not all(server.is_ours() for server in servers):
        raise error
    log.error("%s failed", what, exc_info=error)


def register_service(module: str, start: Callable[[Server], Any]) -> None:
    """Have something live in the loop beside HTTP, by Server.watch() and call_later().

    `start(server)` is called in the server's thread, before its first request: of the first server
    of the process that serves. It may return a function without arguments that is called when that
    server ends; the next one to serve then takes over. ConfigError: no such function. Any thread,
    before the server serves.
    """
    check_callback("%s: service" % module, start, "server")
    pending_services.append((module, start))


def begin_services(server: Server) -> None:
    """Begin the services that nobody runs. ConfigError if one fails."""
    with init_lock:
        while pending_services:
            module, start = service = pending_services[0]
            try:
                end = start(server)
            except (ConfigError, KeyboardInterrupt):
                raise
            except BaseException as error:
                log.debug("%s: traceback", module, exc_info=True)
                raise ConfigError("%s: a service failed: %s" % (module, describe(error))) from error
            del pending_services[0]
            server.services.append((service, end))


def end_services(server: Server) -> None:
    """End those of a server, the last one first, and leave them to the next server."""
    while server.services:
        service, end = server.services.pop()
        if end is not None:
            call_safely("the end of a service", end)
        pending_services.insert(0, service)


def initialize(server: Server) -> None:
    """Run what has to be run before a server serves, and has not been. ConfigError if that fails.

    The init_proc_cb's, and the services.
    """
    with init_lock:
        while pending_inits:
            module, callback = pending_inits[0]
            try:
                callback()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                log.debug("%s: traceback", module, exc_info=True)
                raise ConfigError(
                    "%s: an init_proc_cb failed: %s" % (module, describe(error))) from error
            del pending_inits[0]
    begin_services(server)


def initialize_late() -> None:
    """The same while the server runs: one that fails is logged and dropped."""
    with init_lock:
        while pending_inits:
            call_safely("an init_proc_cb", pending_inits[0][1])
            del pending_inits[0]


# ------------------------------------------------------------------------------------------ Request

class FormFile(NamedTuple):
    """A file in a form."""
    filename: str           # the name that the client gives it: never use it as a path
    content_type: str       # its media type, in small letters, without parameters
    content: bytes

    def __repr__(self) -> str:
        return "FormFile(filename=%r, content_type=%r, content=<%d bytes>)" % (
            self.filename, self.content_type, len(self.content))


class PeerCred(NamedTuple):
    """Who was at the other end of a unix socket when it was connected."""
    pid: int
    uid: int
    gid: int


class ClientCert(NamedTuple):
    """Who the client is, by a certificate that tls_ca_file vouches for."""
    subject: str            # such as CN=alice,O=Example
    serial: str             # hexadecimal


FormValue = Union[str, FormFile]
URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
JSON = "application/json"
# NaN and Infinity are no JSON: int() raises ValueError
json_decoder = json.JSONDecoder(parse_constant=int)
# RFC 9110, 5.6.6: the parameters behind a media type or a disposition.
PARAMETER = re.compile(
    "[ \t]*;[ \t]*(" + TOKEN.pattern + ")=(" + TOKEN.pattern + "|" + QUOTED_TEXT + ")")
CERT_NAMES = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU",
              "countryName": "C"}


DEFAULT_PORTS = {"http": 80, "https": 443}


def require(condition: Any, status: int, reason: str) -> None:
    if not condition:
        raise HTTPError(status, reason)


def media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip(" \t").lower()


def parse_parameters(text: str) -> dict[str, str]:
    """The parameters behind a media type or disposition: `; name=value` (RFC 9110, 5.6.6)."""
    found: dict[str, str] = {}
    at = text.find(";")
    if at < 0:
        return found
    while match := PARAMETER.match(text, at):
        found.setdefault(match[1].lower(), unquoted(match[2]))
        at = match.end()
    require(not text[at:].strip(" \t;"), 400, "malformed parameter of a field")
    return found


def parse_part(part: bytes) -> tuple[str, FormValue]:
    """A part of a multipart form: its name, and a text, or a FormFile where there is a filename."""
    head, _, content = part.partition(b"\r\n\r\n")
    fields: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        fields[name.lower()] = value
    about = parse_parameters(fields.get("content-disposition", ""))
    require("name" in about, 400, "a part of the form has no name")
    if "filename" not in about:
        return about["name"], content.decode("utf-8", "replace")
    kind = media_type(fields.get("content-type", "text/plain"))
    return about["name"], FormFile(about["filename"], kind, content)


def parse_multipart(content_type: str, body: bytes) -> list[tuple[str, FormValue]]:
    """The parts of a multipart/form-data body (RFC 7578)."""
    boundary = parse_parameters(content_type).get("boundary", "").encode("latin-1")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    ended = parts and re.match(rb"--[ \t]*(\r\n|\Z)", parts.pop())
    require(0 < len(boundary) <= 70 and ended, 400, "the form does not end with its boundary")
    return [parse_part(part) for part in parts]


def parse_form(request: Request) -> dict[str, list[Any]]:
    """The fields of a query, then those of a body that is a form."""
    pairs: list[tuple[str, FormValue]] = list(parse_qsl(request.query, keep_blank_values=True))
    if request.media_type == URLENCODED:
        pairs += parse_qsl(request.body.decode("utf-8", "replace"), keep_blank_values=True)
    elif request.media_type == MULTIPART:
        pairs += parse_multipart(request.headers["content-type"], request.body)
    form: dict[str, list[Any]] = {}
    for name, value in pairs:
        form.setdefault(name, []).append(value)
    return form


# What stands for an address where there is none.
UNIX = "unix"


def plain_address(address: Any) -> tuple[str, int]:
    """Host and port. An IPv4 peer of an IPv6 socket is an IPv4 peer."""
    if not isinstance(address, tuple):          # of a unix socket: mostly empty
        return UNIX, 0
    host, port = address[:2]
    return re.sub(r"^::ffff:(?=.*\.)", "", host), port


def describe_subject(subject: Any) -> str:
    """A certificate's subject, as getpeercert() gives it, in one line (RFC 4514, 2)."""
    parts = []
    for attributes in reversed(subject):
        for name, value in attributes:
            escaped = re.sub(r'([\\,+"<>;])', r"\\\1", value)
            parts.append("%s=%s" % (CERT_NAMES.get(name, name), escaped))
    return ",".join(parts)


class Request:
    """What the client asks for. Only `state` is the handler's own. For the server's thread."""

    __slots__ = ("state", "body", "note", "_connection", "_head", "_root", "_handler", "_form",
                 "_resumed", "__weakref__")

    def __init__(self, connection: Connection, head: Head, root: Root, handler: AccessHandler,
                 body: bytes) -> None:
        self.state: Any = None
        self.body = body                # the content, transfer coding taken off
        self.note = ""                  # for the access log; mi_http puts the commands there
        self._connection = connection
        self._head = head
        self._root = root
        self._handler = handler         # what `route` has found: asked once
        self._form: Optional[dict[str, list[Any]]] = None
        self._resumed = False           # resume() has been called, and no callback because of it

    @property
    def headers(self) -> Headers:
        """The header fields, by name in any case; several of one name are joined by a comma."""
        return self._head.fields.headers

    @property
    def from_page(self) -> bool:
        """Whether a browser says, by Origin or Sec-Fetch-Site, which web page has sent it."""
        return self._head.fields.from_page

    @property
    def media_type(self) -> str:
        """What Content-Type says, in small letters, without its parameters; or empty."""
        return self._head.fields.media_type

    @property
    def method(self) -> str:
        """As sent, such as GET. For HEAD the content is not sent."""
        return self._head.method

    @property
    def target(self) -> str:
        """The request target as sent."""
        return self._head.target

    @property
    def version(self) -> str:
        """HTTP/1.1 or HTTP/1.0."""
        return self._head.version

    @property
    def path(self) -> str:
        """Percent-decoded once; bytes that are not UTF-8 are U+FFFD."""
        return self._head.path

    @property
    def query(self) -> str:
        """What stands behind the ?, as sent; see lookup_arg()."""
        return self._head.query

    @property
    def url(self) -> str:
        """The path below the root: "", "/" or "/x"; for the root "" the whole path."""
        return self._head.url if self._root.name else self._head.path

    @property
    def root(self) -> str:
        """The root path that has taken the request."""
        return self._root.name

    @property
    def scheme(self) -> str:
        """http or https: what the client speaks, if a trusted proxy says so."""
        spoken = self._connection.server.transport.scheme
        return self._forwarded("x-forwarded-proto", spoken)

    @property
    def host(self) -> str:
        """The Host field, or what a trusted proxy says that it was; empty without one."""
        return self._forwarded("x-forwarded-host", self._head.fields.host)

    @property
    def user(self) -> str:
        """Who has given the password that auth_password wants; empty without one."""
        if self._head.refusal is not None:
            return ""
        return self._connection.server.access.user

    @property
    def client(self) -> tuple[str, int]:
        """Address and port of the client. Behind a trusted proxy the port is 0: nobody says it."""
        peer = self._connection.client()
        access = self._connection.server.access
        if access.proxies and access.is_proxy(peer[0]):
            return access.forwarded_for(self.headers.get("x-forwarded-for", ""), peer)
        return peer

    @property
    def server(self) -> tuple[str, int]:
        """Address and port that the client is connected to."""
        return self._connection.local()

    def _forwarded(self, name: str, spoken: str) -> str:
        """What a field of a trusted proxy says, else what the connection says."""
        access = self._connection.server.access
        if not access.proxies or not access.is_proxy(self._connection.client()[0]):
            return spoken
        _, _, last = self.headers.get(name, "").rpartition(",")
        said = last.strip(" \t").lower()
        if name == "x-forwarded-proto" and said not in DEFAULT_PORTS:
            return spoken
        return said or spoken

    @property
    def client_cert(self) -> Optional[ClientCert]:
        """The certificate that the client has presented; None without tls_ca_file."""
        getpeercert = getattr(self._connection.sock, "getpeercert", None)
        if getpeercert is None:
            return None
        found = getpeercert()
        if not found:                       # it was not asked for
            return None
        return ClientCert(describe_subject(found["subject"]), found["serialNumber"])

    @property
    def peer_cred(self) -> Optional[PeerCred]:
        """The process that has connected, as the kernel says; None but on a unix socket."""
        sock = self._connection.sock
        if sock.family != socket.AF_UNIX:
            return None
        ids = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return PeerCred(*memoryview(ids).cast("i"))

    @property
    def closed(self) -> bool:
        """True once the client is gone."""
        return self._connection.is_closed()

    @property
    def stopping(self) -> bool:
        """True once the server is being stopped: then an endless stream should end."""
        return self._connection.server.stopping

    @property
    def disk(self) -> Disk:
        """Where a Spool keeps what memory has no room for."""
        return self._connection.server.disk

    @property
    def counters(self) -> Counters:
        """Where the server counts."""
        return self._connection.server.counters

    @property
    def kept(self) -> int:
        """Bytes that the handler keeps in memory for a request under way: they are counted."""
        exchange = self._connection.exchange
        if exchange is None:
            return 0
        return exchange.kept

    @kept.setter
    def kept(self, size: int) -> None:
        exchange = self._connection.exchange
        if exchange is not None and exchange.request is self:
            exchange.kept = size

    @property
    def form(self) -> dict[str, list[Any]]:
        """The fields of the query, then a form's in the body: name -> list of str or FormFile.

        HTTPError 400 if the body is not what its Content-Type says.
        """
        if self._form is None:
            self._form = parse_form(self)
        return self._form

    def lookup_arg(self, key: str, default: Any = None) -> Any:
        """The first value of the field of `form` that has exactly this name."""
        values = self.form.get(key)
        return values[0] if values else default

    def json(self) -> Any:
        """What the content says, which is JSON.

        HTTPError 415 if its media type is neither application/json nor some +json, 400 with the
        place of the mistake if it cannot be read.
        """
        if self.media_type != JSON and not self.media_type.endswith("+json"):
            raise HTTPError(415, "the Content-Type must be application/json")
        try:
            return json_decoder.decode(self.body.decode())
        except (ValueError, RecursionError) as error:
            raise HTTPError(400, "the content is no JSON: %s" % error) from None

    def resume(self) -> None:
        """Have the callback called again that has returned SUSPEND, or 0. Any thread.

        It may come before the callback has returned, repeatedly, and when all is over.
        """
        if not self._resumed:
            self._resumed = True
            self._connection.server.post(self)


# --------------------------------------------------------------------------------------------- Page

HEADROOM = 512      # bytes before the content, for a head of about 150
TAILROOM = 2        # and behind it, to end a chunk


class Small(Dict[Any, Any]):
    """What has been made of short keys: [] makes what is missing. What a client has echoed, and
    what comes only once, cannot make it grow."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Any) -> Any:
        value = self.make(key)
        if len(repr(key)) <= 512:
            if len(self) > 127:
                self.clear()
            self[key] = value
        return value


FieldPairs = Tuple[Tuple[str, str], ...]


def check_fields(pairs: FieldPairs) -> tuple[Optional[str], FieldPairs]:
    """The content type, if it is one of these header fields, and the others."""
    content_type = None
    others = []
    for name, value in pairs:
        check_field(name, value)
        if name.lower() == "content-type":
            content_type = value
        else:
            others.append((name, value))
    return content_type, tuple(others)


checked_fields = Small(check_fields)    # 3 us less than set_header() for each of three


class Page:
    """The response in the making, on the server's one buffer. Handlers get it clean."""
    __slots__ = ("buffer", "view", "end", "limit", "fields", "_content_type")

    def __init__(self, size: int) -> None:
        self.buffer = bytearray(HEADROOM + size + TAILROOM)
        self.view = memoryview(self.buffer)
        self.limit = HEADROOM + size
        self.end = HEADROOM                                 # of the content
        self.fields: FieldPairs = ()                        # that the handler has set
        self._content_type = ""

    @property
    def content_type(self) -> str:
        """The root's, until set."""
        return self._content_type

    @content_type.setter
    def content_type(self, value: str) -> None:
        check_field("Content-Type", value)
        self._content_type = value

    def clear(self) -> None:
        """Take back what has been written, and the fields."""
        self.end = HEADROOM
        self.fields = ()

    def write(self, data: Union[str, bytes, bytearray, memoryview]) -> None:
        """Add bytes, or a str as UTF-8, to the content: json.dump(x, page), print(x, file=page).

        BufferError when it does not fit into buf_size.
        """
        if isinstance(data, str):
            data = data.encode()
        end = self.end + len(data)
        if end > self.limit:
            size = self.limit - HEADROOM
            raise BufferError("the response does not fit into %d bytes: raise buf_size" % size)
        self.view[self.end:end] = data
        self.end = end

    def __len__(self) -> int:
        return self.end - HEADROOM

    def set_header(self, name: str, value: Union[str, int], add: bool = False) -> None:
        """Set a header field, in place of one of that name unless `add`, or Set-Cookie.

        Content-Length is for streams. ValueError for a character that may not stand there, such as
        CR, and for fields that the server sets.
        """
        text = str(value)
        check_field(name, text)
        key = name.lower()
        if key == "content-type":
            self._content_type = text
            return
        kept = self.fields
        if not add and key != "set-cookie":
            kept = tuple(field for field in kept if field[0].lower() != key)
        self.fields = (*kept, (name, text))

    def set_headers(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Add header fields, names and values of str, as set_header() does with `add`.

        What has been checked before costs a look-up.
        """
        content_type, others = checked_fields[tuple(pairs)]
        if content_type is not None:
            self._content_type = content_type
        self.fields += others

    def length(self) -> Optional[int]:
        """The Content-Length that the handler has set."""
        for name, value in self.fields:
            if name.lower() == "content-length":
                return int(value)
        return None


# ------------------------------------------------------------------------------------------- Parser
# Bytes in, immutable heads out. RFC 9110 and 9112, and where they leave a choice, the strict one: a
# doubt is a 400. The names of the patterns are those of the grammar; all are used with fullmatch,
# or match at a place. No two neighbouring parts of a pattern match the same character: each takes
# time in proportion to the text.

_VALUE = FIELD_VALUE.pattern.encode("latin-1")
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'         # RFC 9110, 5.6.4
# Visible ASCII (RFC 3986, 3.3). A \ is /, to some browsers; an escaped control character is one to
# what stands behind a handler. In a query browsers send a % that begins no escape.
_ESCAPED = "%(?![01]|7[Ff])[0-9A-Fa-f]{2}"
_PATH = r'/[!"$&->@-\[\]-~]*(?:' + _ESCAPED + r'[!"$&->@-\[\]-~]*)*'
_QUERY = r'[!"$&-\[\]-~]*(?:%(?!00)[!"$&-\[\]-~]*)*'
ORIGIN_FORM_LINE = re.compile(
    "(" + TOKEN.pattern + ") ((" + _PATH + r")(?:\?(" + _QUERY + r"))?) HTTP/1\.([0-9])")
REQUEST_LINE = re.compile(
    "(" + TOKEN.pattern + ") (" + _PATH + r"(?:\?" + _QUERY + ")?|(?!/)" + _QUERY
    + r") HTTP/([0-9])\.([0-9])")
ABSOLUTE_FORM = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?%]*(?:%[0-9A-Fa-f]{2}[^/?%]*)*)(" + _PATH + r")?(?:\?(.*))?")
AUTHORITY_FORM = re.compile(r"[^:]+:[0-9]{1,5}|\[.*\]:[0-9]{1,5}")
_REG_NAME = r"[A-Za-z0-9_.~!$&'()*+,;=-]*"                              # RFC 3986, 3.2.2
HOST = re.compile(r"(?!:|\Z)(?:\[(?:([0-9A-Fa-f:.]+)(?:%[A-Za-z0-9_.~%-]+)?"
                  r"|[vV][0-9A-Fa-f]+\.[A-Za-z0-9_.~!$&'()*+,;=:-]+)\]|"
                  + _REG_NAME + "(?:%[0-9A-Fa-f]{2}" + _REG_NAME + ")*)(?::([0-9]{0,5}))?")
# nearly every one: quickly found good
PLAIN_HOST = re.compile("[A-Za-z0-9.-]+(?::[0-9]{1,4})?")
FIELD_LINE = re.compile(_TOKEN + b":" + _VALUE)
CONTENT_LENGTH = re.compile("0|[1-9][0-9]{0,17}")               # a leading zero is octal to some
CODING = re.compile(TOKEN.pattern + "(?:[ \t]*;.*)?")
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[ \t]*" + _TOKEN
    + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*)\r\n")
# What may still become a chunk size line: bytes that cannot are refused at once.
CHUNK_LINE_BEGIN = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:\r?|[ \t]*(?:;" + _VALUE + rb"\r?)?))?")
CHUNK_LINE_REST = re.compile(_VALUE + rb"\r?")                  # once there is an extension
# RFC 9112, 2.2: some clients send too many.
EMPTY_LINES = re.compile(rb"(?:\r\n){0,4}")

CHUNKED = -1            # beside a Content-Length of 0 or more
UNTIL_CLOSE = -2        # the content ends with the connection: only for what goes out to HTTP/1.0
MAX_FIELDS = 128
BAD_SIZE = "malformed chunk size or extension, or too long"
# RFC 9110, 6.5.1: fields that frame, route or authenticate a message may not come behind it.
NO_TRAILERS = frozenset("""
    authorization cache-control connection content-encoding content-length content-range
    content-type cookie expect host max-forwards origin range te trailer transfer-encoding upgrade
""".split())
# What the answer says about the connection (RFC 9112, 9.3).
KEEP = ""
KEEP_1_0 = "Connection: keep-alive\r\n"
CLOSE = "Connection: close\r\n"
CONTINUE_EXPECTED = "100-continue"


Buffer = Union[bytes, bytearray]


class Headers(Mapping[str, str]):
    """Header fields, whose names answer in any case. Iteration gives them in small letters."""
    __slots__ = ("_fields",)

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        return self._fields[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    # Mapping has these, which cost five times as much.
    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name.lower(), default)

    def __contains__(self, name: object) -> bool:
        return str(name).lower() in self._fields

    def items(self) -> ItemsView[str, str]:
        return self._fields.items()

    def __repr__(self) -> str:
        return "Headers(%r)" % self._fields


class Fields(NamedTuple):
    """A header section that the parser has accepted; requests with the same bytes share it."""
    headers: Headers
    length: int                     # of the content in bytes, or CHUNKED
    connection_line: str            # what the answer says: KEEP, KEEP_1_0 or CLOSE
    expect: str                     # what is expected, in small letters; empty: nothing
    media_type: str                 # of the content, in small letters, without parameters
    host: str                       # the Host field; empty: there is none
    from_page: bool                 # a browser says which web page has sent it


class Head(NamedTuple):
    """A request line and header section that the parser has accepted."""
    method: str
    target: str
    version: str                    # HTTP/1.0 or HTTP/1.1
    path: str                       # percent-decoded
    query: str
    root: str                       # the first segment of the path
    url: str                        # the rest of the path
    scheme: str                     # of a target in absolute-form; empty for all others
    fields: Fields
    connection_line: str            # that of the fields
    waits: bool                     # there is content, or an expectation to see to
    refusal: Optional[Refusal] = None       # what Access says of the fields


class Target(NamedTuple):
    """What a request target says (RFC 9112, 3.2). All but the path may be empty."""
    scheme: str
    host: str
    path: str
    query: str


def parse_field_line(line: bytes) -> tuple[str, str]:
    """The name, in small letters, and the value of a field."""
    if FIELD_LINE.fullmatch(line) is None:
        raise HTTPError(400, "malformed header field")
    name, _, value = line.decode("latin-1").partition(":")
    return name.lower(), value.strip(" \t")


def match_request_line(line: Buffer) -> tuple[str, str, str, str]:
    """Method, target, major and minor version."""
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if match is None:
        raise HTTPError(400, "malformed request line")
    method, text, major, minor = match.groups()
    return method, text, major, minor


ParseLine = Callable[[bytes], Tuple[str, str]]
IsKnown = Callable[[str, str], bool]


def parse_head(line: bytes, section: bytes, fields: Optional[Fields], is_known: IsKnown,
               parse_line: ParseLine = parse_field_line) -> Head:
    """A request line, and the header section below it to its empty line.

    `fields`: that section, if it has been parsed before, for a HTTP/1.1 client. `is_known` says of
    a method and the first segment of a path whether somebody may take it. The order of checks:
    grammar, version, sizes, method, Host, framing.
    """
    match = ORIGIN_FORM_LINE.fullmatch(line.decode("latin-1"))
    if match is None or match[1] == "CONNECT":
        return parse_other_head(line, section, is_known, parse_line)
    method, target, path, query, minor = match.groups()
    if "%" in path:
        path = unquote(path)
    root, slash, rest = path[1:].partition("/")
    known = method in METHODS or is_known(method, root)
    if fields is None or minor == "0":
        pairs = list(map(parse_line, section.split(b"\r\n")[:-2]))
        fields = parse_section(pairs, minor == "0", known)
    elif not known:
        raise HTTPError(501, "this method is not known here")
    version = "HTTP/1.0" if minor == "0" else "HTTP/1.1"
    waits = fields.length != 0 or fields.expect != ""
    return Head._make((
        method, target, version, path, query or "", root, slash + rest, "", fields,
        fields.connection_line, waits, None))


def parse_other_head(
        line: bytes, section: bytes, is_known: IsKnown, parse_line: ParseLine) -> Head:
    """The same for a target that is not in origin-form, and for another version."""
    method, text, major, minor = match_request_line(line)
    pairs = list(map(parse_line, section.split(b"\r\n")[:-2]))
    target = parse_target(method, text, major)
    path = unquote(target.path)
    root, slash, rest = path[1:].partition("/")
    if path == "*":
        root = "*"
    fields = parse_section(pairs, minor == "0", is_known(method, root))
    if target.host:                 # RFC 9112, 3.2.2: it counts, not the Host field
        headers = Headers({**fields.headers, "host": target.host})
        fields = fields._replace(headers=headers, host=target.host)
    version = "HTTP/1.0" if minor == "0" else "HTTP/1.1"
    waits = fields.length != 0 or fields.expect != ""
    return Head(method, text, version, path, target.query, root, slash + rest, target.scheme,
                fields, fields.connection_line, waits)


def parse_target(method: str, text: str, major: str) -> Target:
    """A request target in another form (RFC 9112, 3.2.2 to 3.2.4), if the version allows it."""
    require(major == "1", 505, "this server speaks HTTP/1.1")
    if text == "*" and method == "OPTIONS":
        return Target("", "", "*", "")
    if method == "CONNECT":
        require(AUTHORITY_FORM.fullmatch(text), 400, "CONNECT wants host:port")
        check_host(text)
        return Target("", "", "/", "")
    match = ABSOLUTE_FORM.fullmatch(text)
    if match is None:
        raise HTTPError(400, "malformed request target")
    scheme, host, path, query = match.groups()
    check_host(host)
    if path is None:
        path = "*" if method == "OPTIONS" and query is None else "/"
    return Target(scheme.lower(), host, path, query or "")


def check_host(text: str) -> None:
    """The grammar of `host[:port]` (RFC 9110, 7.2). The host is not empty."""
    match = HOST.fullmatch(text)
    if match is None or int(match[2] or 0) > 65535:
        raise HTTPError(400, "the host is not host[:port]")
    if match[1]:
        try:
            socket.inet_pton(socket.AF_INET6, match[1])
        except OSError:
            raise HTTPError(400, "the host is no IPv6 address") from None


def parse_section(
        pairs: Sequence[tuple[str, str]], old: bool, known: bool) -> Fields:
    """What the fields of a section say together.

    `old`: a HTTP/1.0 client's. `known`: somebody may take the method.
    """
    if len(pairs) > MAX_FIELDS:
        raise HTTPError(431, "more than %d header fields" % MAX_FIELDS)
    if not known:
        raise HTTPError(501, "this method is not known here")
    headers = dict(pairs)
    repeated: Collection[str] = ()
    if len(headers) < len(pairs):
        headers, repeated = join_fields(pairs)
    check_host_field(headers, repeated, old)
    length = 0
    if "content-length" in headers or "transfer-encoding" in headers:
        length = content_length(headers, repeated, old)
    connection_line = KEEP
    if old or "connection" in headers:
        connection_line = what_becomes_of_connection(headers.get("connection", ""), old)
    expect = ""
    if "expect" in headers and not old:
        expect = parse_expect(headers["expect"])
    kind = ""
    if "content-type" in headers:
        kind = media_type(headers["content-type"])
    from_page = "origin" in headers or "sec-fetch-site" in headers
    host = headers.get("host", "")
    return Fields(
        Headers(headers), length, connection_line, expect, kind, host, from_page)


def join_fields(pairs: Iterable[tuple[str, str]]) -> tuple[dict[str, str], set[str]]:
    """Values of one name joined (RFC 9110, 5.3; RFC 6265, 5.4), and the names that repeat."""
    headers: dict[str, str] = {}
    repeated = set()
    for name, value in pairs:
        if name in headers:
            repeated.add(name)
            separator = "; " if name == "cookie" else ", "
            value = headers[name] + separator + value
        headers[name] = value
    return headers, repeated


def check_host_field(headers: Mapping[str, str], repeated: Collection[str], old: bool) -> None:
    """RFC 9112, 3.2: exactly one, but for HTTP/1.0, which may have none."""
    host = headers.get("host")
    if host is None and old:
        return
    if host is None or "host" in repeated:
        raise HTTPError(400, "HTTP/1.1 wants the Host field, once")
    if not PLAIN_HOST.fullmatch(host):
        check_host(host)


def content_length(headers: Mapping[str, str], repeated: Collection[str], old: bool) -> int:
    """How the content is framed (RFC 9112, 6). Nothing is guessed: doubts smuggle requests."""
    length = headers.get("content-length")
    if length is not None:
        once = "content-length" not in repeated
        require(once and CONTENT_LENGTH.fullmatch(length), 400,
                "Content-Length is not 1 to 18 digits, once")
    coding = headers.get("transfer-encoding")
    if coding is None:
        return int(length or 0)
    require(
        length is None and not old, 400, "Transfer-Encoding with Content-Length, or in HTTP/1.0")
    codings = list_members(coding)
    if codings != ["chunked"]:
        once = "transfer-encoding" not in repeated and "chunked" not in codings[:-1]
        require(once and all(map(CODING.fullmatch, codings)), 400,
                "Transfer-Encoding is not chunked, once")
        raise HTTPError(501, "no transfer coding but chunked is understood")
    return CHUNKED


def list_members(value: str) -> list[str]:
    """The members of a list in a field (RFC 9110, 5.6.1), in small letters."""
    return [member.strip(" \t") for member in value.lower().split(",")]


def what_becomes_of_connection(value: str, old: bool) -> str:
    """What the Connection field asks for (RFC 9112, 9.3): `close` wins."""
    options = list_members(value)
    if "close" in options:
        return CLOSE
    if not old:
        return KEEP
    if "keep-alive" in options:
        return KEEP_1_0
    return CLOSE


def parse_expect(value: str) -> str:
    """What is expected (RFC 9110, 10.1.1), once if the list says the same again."""
    members = [member for member in list_members(value) if member]
    if members and members.count(CONTINUE_EXPECTED) == len(members):
        return CONTINUE_EXPECTED
    return value.lower() or "nothing"


# The places where the beginning of a head may end; each has a pattern that what comes next must
# match. A group is a run of characters that need not be looked at again.
_NAME_RUN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]*"
_TARGET_RUN = rb'[!"$-\[\]-~]*'
_VERSION_BEGIN = rb"(?: (?:H|HT|HTT|HTTP|HTTP/(?:[0-9](?:\.(?:[0-9]\r?)?)?)?)?)?"
_LINES = rb"(?:" + _TOKEN + rb":" + _VALUE + rb"\r\n)*"
_LINES_BEGIN = _LINES + rb"(?:\r\n?|(" + _TOKEN + rb")(?::(" + _VALUE + rb")\r?)?)?"
_AFTER_VALUE = rb"(?:\r(?:\n" + _LINES_BEGIN + rb")?)?"
IN_METHOD, IN_TARGET, AT_LINE, IN_NAME, IN_VALUE = range(5)
BEGINNINGS = {      # place -> what may follow there; and where its groups end
    IN_METHOD: (rb"\r|(" + _NAME_RUN + rb")(?: (" + _TARGET_RUN + rb")" + _VERSION_BEGIN + rb")?",
                (IN_METHOD, IN_TARGET)),
    IN_TARGET: (rb"(" + _TARGET_RUN + rb")" + _VERSION_BEGIN, (IN_TARGET,)),
    AT_LINE: (_LINES_BEGIN, (IN_NAME, IN_VALUE)),
    IN_NAME: (rb"(" + _NAME_RUN + rb")(?::(" + _VALUE + rb")" + _AFTER_VALUE + rb")?",
              (IN_NAME, IN_VALUE, IN_NAME, IN_VALUE)),
    IN_VALUE: (rb"(" + _VALUE + rb")" + _AFTER_VALUE, (IN_VALUE, IN_NAME, IN_VALUE)),
}
BEGINNING_PATTERNS = {place: re.compile(row[0]) for place, row in BEGINNINGS.items()}


class Beginning:
    """The beginning of a head, or of a trailer section, that is not whole yet.

    A byte after which it can no longer become one is refused at once. What has been found good is
    not looked at again: a byte costs the same, wherever it comes.
    """
    __slots__ = ("place", "at", "searched")

    def __init__(self, place: int) -> None:
        self.place = place
        self.at = 0             # the offset from which the pattern of the place has to match
        self.searched = 0       # bytes that do not hold the end of the section

    def check_head(self, data: Buffer, limit: int) -> None:
        """HTTPError if `data` can become no head of at most `limit` bytes behind empty lines."""
        start = end_of_empty_lines(data)
        end = min(len(data), start + limit)
        if self.place in (IN_METHOD, IN_TARGET):
            at = max(start, self.at)
            line_end = data.find(b"\r\n", at, end)
            if line_end < 0:
                self._match(data, at, end, "malformed request line")
                require(len(data) == end, 414,
                        "the request line is longer than max_header_size, %d bytes" % limit)
                return
            match_request_line(data[start:line_end])
            self.place = AT_LINE
            self.at = line_end + 2
        self._match(data, self.at, end, "malformed header field")
        if len(data) > end:
            line_end = data.find(b"\r\n", start)
            check_target(data[start:line_end])  # another version is the graver fault
            raise HTTPError(
                431, "the header section is longer than max_header_size, %d bytes" % limit)

    def check_trailers(self, data: Buffer, limit: int) -> None:
        """The same for a trailer section."""
        self._match(data, self.at, min(len(data), limit), "malformed trailer field")
        require(len(data) <= limit, 431, "the trailer section is too long")

    def _match(self, data: Buffer, start: int, end: int, reason: str) -> None:
        _, ends = BEGINNINGS[self.place]
        match = BEGINNING_PATTERNS[self.place].fullmatch(data, start, end)
        if match is None:
            raise HTTPError(400, reason)
        if self.place >= AT_LINE and data.endswith(b"\r\n", start, end):
            self.place = AT_LINE
            self.at = end
        elif match.lastindex is not None:
            self.place = ends[match.lastindex - 1]
            self.at = match.end(match.lastindex)


def end_of_empty_lines(data: Buffer) -> int:
    """Where the request line begins."""
    match = EMPTY_LINES.match(data)
    return match.end() if match is not None else 0


def check_target(line: Buffer) -> None:
    """Refuse a request line for its version or the form of its target."""
    method, text, major, _ = match_request_line(line)
    if major != "1" or method == "CONNECT" or not text.startswith("/"):
        parse_target(method, text, major)


class SizedContent:
    """The content of a request that has a Content-Length: hands it to `write`, piece by piece."""
    __slots__ = ("left", "write", "held", "has_more")

    def __init__(self, length: int, write: Callable[[bytes], Any]) -> None:
        self.left = length      # bytes to come
        self.write = write
        self.held = 0           # bytes that are kept here: never any
        self.has_more = False

    def feed(self, data: bytes) -> Optional[bytes]:
        """Take received bytes. Returns what came behind the content; None: more is to come."""
        piece = data[:self.left]
        if piece:
            self.write(piece)
        self.left -= len(piece)
        return None if self.left else data[len(piece):]


class ChunkedContent:
    """The content of a request in chunks (RFC 9112, 7.1): takes the coding off, for `write`.

    `too_large` is raised as soon as it is over `limit` bytes. `overhead`: bytes that the chunk
    extensions, and the trailer section, may have. A step runs next: True to go on, False to wait.
    Of tiny chunks, which cost the most, feed() leaves some for the next time: `has_more`.
    """

    __slots__ = (
        "limit", "overhead", "write", "data", "step", "left", "good", "too_large", "trailers",
        "whole", "has_more")

    def __init__(self, limit: float, overhead: int, write: Callable[[bytes], Any],
                 too_large: HTTPError) -> None:
        self.limit = limit
        self.overhead = overhead
        self.write = write
        self.too_large = too_large
        self.data = bytearray()             # received, and not understood yet
        self.left = 0                       # bytes of this chunk to come
        self.good = 0                       # bytes of its size line that have been found good
        self.trailers = Beginning(AT_LINE)
        self.step: Callable[[ChunkedContent], bool] = ChunkedContent._read_size
        self.whole = False
        self.has_more = False

    @property
    def held(self) -> int:
        return len(self.data)

    def feed(self, data: bytes) -> Optional[bytes]:
        """As that of SizedContent."""
        self.data += data
        self.has_more = True
        for _ in range(CHUNK_STEPS):
            if not self.step(self):
                self.has_more = False
                break
        return bytes(self.data) if self.whole else None

    def _read_size(self) -> bool:
        end = self.data.find(b"\r\n", max(0, self.good - 1))
        if end < 0:
            start, pattern = 0, CHUNK_LINE_BEGIN
            if self.good >= 18:
                start, pattern = self.good - 1, CHUNK_LINE_REST
            begun = pattern.fullmatch(self.data, start)
            require(begun, 400, BAD_SIZE)
            self.good = len(self.data)
            require(len(self.data) <= self.overhead + 17, 400, BAD_SIZE)
            return False
        match = CHUNK_LINE.match(self.data)
        if match is None:
            raise HTTPError(400, BAD_SIZE)
        self.left = int(match[1], 16)
        self.overhead -= len(match[2])
        require(self.overhead >= 0, 400, BAD_SIZE)
        self.good = 0
        self.limit -= self.left
        if self.limit < 0:
            raise self.too_large
        del self.data[:end + 2]
        self.step = ChunkedContent._read_data
        if self.left == 0:
            self.step = ChunkedContent._read_trailers
        return True

    def _read_data(self) -> bool:
        piece = bytes(self.data[:self.left])
        if piece:
            self.write(piece)
            self.left -= len(piece)
            del self.data[:len(piece)]
        if self.left:
            return False
        self.step = ChunkedContent._read_end_of_data
        return True

    def _read_end_of_data(self) -> bool:
        require(b"\r\n".startswith(self.data[:2]), 400, "a chunk is not as long as it says")
        if len(self.data) < 2:
            return False
        del self.data[:2]
        self.step = ChunkedContent._read_size
        return True

    def _read_trailers(self) -> bool:
        """They keep to the rules of fields, and are dropped, never merged (RFC 9112, 7.1.2)."""
        end = 0
        if not self.data.startswith(b"\r\n"):
            end = self.data.find(b"\r\n\r\n", max(0, self.trailers.searched - 3)) + 2
            self.trailers.searched = len(self.data)
            if end < 2:
                self.trailers.check_trailers(self.data, self.overhead)
                return False
        section = self.data[:end + 2]
        self.trailers.check_trailers(section, self.overhead)
        require(
            section.count(b"\n") - 1 <= MAX_FIELDS, 431, "more than %d trailer fields" % MAX_FIELDS)
        lines = section.decode("latin-1").split("\r\n")
        names = {line.partition(":")[0].lower() for line in lines}
        require(
            NO_TRAILERS.isdisjoint(names), 400, "a field that may not stand in a trailer section")
        del self.data[:end + 2]
        self.whole = True
        return False


Content = Union[SizedContent, ChunkedContent]


def content_decoder(length: int, limit: float, parameter: str, overhead: int,
                    write: Callable[[bytes], Any]) -> Content:
    """What takes the framing off one request's content (RFC 9112, 6).

    ContentTooLarge over `limit` bytes, which is what `parameter` says.
    """
    if 0 <= length <= limit:
        return SizedContent(length, write)
    too_large = ContentTooLarge(limit, parameter)
    if length == CHUNKED:
        return ChunkedContent(limit, overhead, write, too_large)
    raise too_large


# ------------------------------------------------------------------------------------------- Access
# Who may: what is said of a header section is remembered with it. And whom a proxy speaks for.

LOCAL_HOST = re.compile(
    r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])\.?(?::[0-9]*)?", re.IGNORECASE)
# An address in X-Forwarded-For, which some proxies write with a port.
FORWARDED_ADDRESS = re.compile(r"\[?([0-9A-Fa-f]*:[0-9A-Fa-f:.]+)(?:\](?::[0-9]+)?)?"
                               r"|([0-9.]+)(?::[0-9]+)?")


# Whether a Host field does, or there is none.
names_localhost = Small(lambda host: host == "" or LOCAL_HOST.fullmatch(host) is not None)


def read_password(text: str) -> str:
    """The value of auth_password: what it says, or what the file holds, less its last line end."""
    if not text.startswith("file:"):
        return text
    path = text[5:]
    try:
        with open(path, encoding="utf-8") as file:
            password, mode = file.read(), os.fstat(file.fileno()).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("httpd: auth_password: %s cannot be read: %s" % (path, reason),
                          "auth_password") from None
    if mode & 0o007:
        log.warning("auth_password: %s is open to everybody: chmod o= %s", path, path)
    password = re.sub(r"\r?\n\Z", "", password)
    if not password:
        raise ConfigError("httpd: auth_password: %s is empty" % path, "auth_password")
    return password


def listed(text: str) -> list[str]:
    """The words of a parameter that is a list: blanks or commas between them."""
    return [word for word in re.split("[ \t,]+", text) if word]


def bare_host(text: str) -> str:
    """The name or address in a Host field, without its port."""
    name = re.sub(r"(?<=[^:]):[0-9]*\Z", "", text)
    if text.startswith("["):
        name = text[1:].partition("]")[0]
    return name.rstrip(".").lower()


def digest(text: bytes) -> bytes:
    """Texts of any length are compared by these, in the same time."""
    import hashlib                      # 4 ms, and only a password needs it
    return hashlib.sha256(text).digest()


def is_address(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
        return True
    except OSError:
        return False


def network_of(address: str) -> bytes:
    """Whose address it is: a host's, of IPv6 a /64, of which one client has many."""
    try:
        return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8]
    except OSError:
        return address.encode()


def networks(text: str) -> list[Any]:
    """The value of trusted_proxies: networks of ipaddress, and `unix:` as it is."""
    words = listed(text)
    if not words:
        return []
    import ipaddress                    # 5 ms
    try:
        known = {"unix:": "unix:"}
        return [known.get(word) or ipaddress.ip_network(word) for word in words]
    except ValueError as error:
        raise ConfigError("httpd: trusted_proxies: %s: write an address, or a network such as "
                          "10.0.0.0/8" % error, "trusted_proxies") from None


def served_hosts(text: str) -> set[str]:
    """The value of allowed_hosts; empty: any. ConfigError for what no Host field can say."""
    words = listed(text)
    for word in words:
        try:
            if word != "*" and not is_address(word):
                check_host(word)
                require("*" not in word, 400, "a * stands alone")
        except HTTPError:
            raise ConfigError(
                "httpd: allowed_hosts: %r is no host: write names as a client sends them, such as "
                "example.com, addresses, or * for any" % word, "allowed_hosts") from None
    if "*" in words:
        return set()
    return set(map(bare_host, words))


class Access:
    """The rules of a server about who may, and its counts of connections by address."""

    def __init__(self, params: Limits) -> None:
        self.hosts = served_hosts(params.allowed_hosts)
        self.names_all = not params.allowed_hosts       # not even a `*` was said
        self.user = params.auth_username
        self.wanted = b""
        if self.user:
            self._set_password(params)
        self.judges = bool(self.hosts or self.wanted)
        self.proxies = networks(params.trusted_proxies)
        self.known: dict[str, bool] = {}                # addresses: whether they are proxies
        self.most = params.max_connections_per_ip
        self.connections: dict[bytes, int] = {}         # by address

    def _set_password(self, params: Limits) -> None:
        if ":" in self.user:
            raise ConfigError("httpd: auth_username: a name cannot have a colon", "auth_username")
        password = read_password(params.auth_password)
        self.wanted = digest(("%s:%s" % (self.user, password)).encode())
        realm = re.sub(r'(["\\])', r"\\\1", params.auth_realm)
        self.challenge = Refusal(401, "user name and password are wanted",
                                 "WWW-Authenticate", 'Basic realm="%s"' % realm)
        try:
            self.challenge.error()
        except ValueError as error:
            raise ConfigError("httpd: auth_realm: %s" % error, "auth_realm") from None

    def refusal(self, fields: Fields) -> Optional[Refusal]:
        """What the fields of a request are refused with (RFC 9110, 7.4 and 11.6.2)."""
        if self.hosts and fields.host and bare_host(fields.host) not in self.hosts:
            return Refusal(421, "this host is not served here, see allowed_hosts")
        if self.wanted and not self._knows(fields.headers.get("authorization", "")):
            return self.challenge
        return None

    def _knows(self, authorization: str) -> bool:
        """Whether the credentials are those that are wanted (RFC 7617)."""
        from base64 import b64decode
        from hmac import compare_digest
        scheme, _, text = authorization.partition(" ")
        try:
            given = b64decode(text.strip(" "), validate=True)
        except ValueError:
            given = b""
        return compare_digest(digest(given), self.wanted) and scheme.lower() == "basic"

    def is_proxy(self, address: str) -> bool:
        """Whether what comes from an address is believed."""
        known = self.known.get(address)
        if known is None:
            if len(self.known) > 999:
                self.known.clear()
            known = self.known[address] = self._look_up(address)
        return known

    def _look_up(self, address: str) -> bool:
        if address == UNIX:
            return "unix:" in self.proxies
        import ipaddress
        found = ipaddress.ip_address(address.partition("%")[0])
        return any(network != "unix:" and found in network for network in self.proxies)

    def forwarded_for(self, field: str, peer: tuple[str, int]) -> tuple[str, int]:
        """The client that proxies speak for: the last address that is no proxy's, from the right.

        What stands left of it is the client's own text. Without an address it is the proxy itself.
        """
        client = peer
        for member in reversed(field.split(",")):
            match = FORWARDED_ADDRESS.fullmatch(member.strip(" \t"))
            if match is None or not is_address(match[1] or match[2]):
                break
            client = plain_address((match[1] or match[2], 0))
            if not self.is_proxy(client[0]):
                break
        return client

    def enter(self, address: str) -> bool:
        """Count a connection; False: there are too many of this address. A unix socket has none."""
        if address == UNIX or self.proxies and self.is_proxy(address):
            return True
        key = network_of(address)
        self.connections[key] = self.connections.get(key, 0) + 1
        return self.connections[key] <= self.most

    def leave(self, address: str) -> None:
        """A connection has ended that enter() was told of."""
        if self.proxies and self.is_proxy(address):     # it has not been counted, its /64 may be
            return
        key = network_of(address)
        left = self.connections.get(key, 0) - 1
        if left > 0:
            self.connections[key] = left
        else:
            self.connections.pop(key, None)


# -------------------------------------------------------------------------------------------- Heads
# What clients send, they send again: scrapes, health checks, browsers. What the parser has accepted
# is remembered by its bytes.

def weight(value: Any) -> int:
    """The bytes that something parsed takes, about."""
    size = sys.getsizeof(value, 100)        # PyPy does not know
    if isinstance(value, tuple):
        return size + sum(map(weight, value))
    if isinstance(value, Headers):
        return size + sum(map(weight, value.items()))
    return size


class Memo:
    """Values by bytes, in two generations, of at most `size` bytes together. None: not there.

    What comes for the second time is remembered. A full young generation becomes the old one, and
    what is asked for again comes back: what never comes again leaves only a hash.
    """

    def __init__(self, size: int) -> None:
        self.size = size // 2                   # of a generation
        self.room = self.size                   # bytes left in the young one
        self.young: dict[bytes, Any] = {}
        self.old: dict[bytes, Any] = {}
        self.stored: set[int] = set()           # the id() of each value
        self.once: set[int] = set()             # hashes of what has come once

    def recall(self, raw: bytes) -> Any:
        value = self.young.get(raw)
        if value is None and raw in self.old:
            value = self.old[raw]
            self._store(raw, value)
        return value

    def remember(self, raw: bytes, value: Any) -> None:
        """Keep what has been found good, if it is not for the first time."""
        key = hash(raw)
        if key in self.once:
            self._store(raw, value)
        elif len(self.once) > 1023:
            self.once.clear()
        self.once.add(key)

    def _store(self, raw: bytes, value: Any) -> None:
        cost = weight(raw) + weight(value) + 100
        if cost > self.room:
            self.old = self.young.copy()
            self.stored = set(map(id, self.old.values()))
            self.young.clear()    # the same dict: its look-up is bound on the hot path
            self.room = self.size
        if cost <= self.room:
            self.room -= cost
            self.young[raw] = value
            self.stored.add(id(value))


class FieldLines(Dict[bytes, Tuple[str, str]]):
    """Field lines that have been parsed: line -> (name, value). [] parses what is missing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.room = size                        # bytes left

    def __missing__(self, line: bytes) -> tuple[str, str]:
        pair = parse_field_line(line)
        cost = 3 * len(line) + 300
        if cost < self.size // 8:               # a long one would push out too many
            if cost > self.room:
                self.clear()
                self.room = self.size
            self.room -= cost
            self[line] = pair
        return pair


class Heads:
    """Heads that have been parsed, by their bytes; sections, below new request lines; and lines."""

    def __init__(self, size: int, scheme: str, access: Access) -> None:
        self.scheme = scheme                        # that the server speaks
        self.access = access
        self.whole = Memo(size // 2)
        self.sections = Memo(size // 4)
        self.lines = FieldLines(size // 4)
        # On the hot path look-ups, not calls. `read` brings back what is old.
        self.recall = self.whole.young.get
        self.recall_section = self.sections.young.get

    def weight_of(self, head: Head) -> int:
        """The bytes that a head under way takes, about; what is remembered is counted already."""
        if id(head) in self.whole.stored:
            return 300
        fields = head.fields
        size = 300 + len(head.target) + 2 * sys.getsizeof(head.path, 100)
        if id(fields) not in self.sections.stored:
            headers = fields.headers
            size += 400 + 130 * len(headers)
            size += sum(map(len, headers)) + sum(map(len, headers.values()))
        return size

    def read(self, raw: bytes, line: bytes, section: bytes, fields: Optional[Fields]) -> Head:
        """The Head of `raw`, which is `line` and `section`. `fields`: the section's, if known."""
        if raw in self.whole.old:
            remembered: Head = self.whole.recall(raw)
            return remembered
        if fields is None:
            fields = self.sections.recall(section)
        head = parse_head(line, section, fields, is_known, self.lines.__getitem__)
        if head.scheme not in ("", self.scheme):
            raise HTTPError(421, "%s is not served here" % head.scheme)
        if self.access.judges:
            head = head._replace(refusal=self.access.refusal(head.fields))
        # These are judged every time: whether a method is known may depend on who has the root.
        if head.fields.expect or head.method not in known_methods:
            return head
        if fields is None and head.scheme == "" and head.version == "HTTP/1.1":
            self.sections.remember(section, head.fields)
        else:                       # the fields are known, or are not what the section says
            self.whole.remember(raw, head)
        return head


# -------------------------------------------------------------------------------------------- Spool
# What memory has no room for, and is to be kept for a while, goes to unlinked temporary files.

SPOOL_PIECE = 2**18         # bytes that are read back at a time


def is_memory(directory: str) -> bool:
    """Whether a directory lies in a file system that is memory itself."""
    best, kind = "", ""
    with suppress(OSError), open("/proc/self/mounts", errors="replace") as mounts:
        for line in mounts:
            _, place, found, *_ = line.split(" ")
            inside = os.path.commonpath([place, directory]) == place
            if inside and len(place) >= len(best):
                best, kind = place, found
    return kind in ("tmpfs", "ramfs")


class Disk:
    """The temporary files of a server: `size` bytes together, and never more than is free."""

    def __init__(self, size: int, spare: Callable[[], int],
                 make_room: Callable[[OSError, Any], bool]) -> None:
        self.directory = os.path.realpath(os.environ.get("TMPDIR") or "/var/tmp")
        self.size = size
        self.spare = spare
        self.make_room = make_room
        self.used = 0               # bytes in files
        self.free = 0               # bytes that the disk has, as it was a second ago
        self.failing = False        # the log has been told
        self.lock = threading.Lock()        # WSGI's threads write too
        if size:
            self._try()

    def _try(self) -> None:
        """See whether it works, at the start, when somebody reads the log."""
        self.look()
        try:
            self.open().close()
        except OSError as error:
            self.size = 0
            log.warning("%s: %s: what clients do not read is held in memory only; set TMPDIR to a "
                        "directory that can be written", self.directory, error.strerror)
        if self.size and is_memory(self.directory):
            log.warning(
                "%s, for temporary files, is memory: set TMPDIR, or spool_size to what it may take",
                self.directory)

    def look(self) -> None:
        try:
            found = os.statvfs(self.directory)
            self.free = found.f_bavail * found.f_frsize
        except OSError:
            self.free = 0

    def open(self) -> io.FileIO:
        import tempfile             # 8 ms that a server need not pay which never needs it
        file: Any = tempfile.TemporaryFile(buffering=0, dir=self.directory)
        assert isinstance(file, io.FileIO)      # since there is no buffer
        return file

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.size and size <= self.free

    def reserve(self, size: int) -> None:
        """Take so many bytes. OSError: there is no room for them."""
        with self.lock:
            taken = self.has_room(size)
            if taken:
                self.used += size
                self.free -= size
        if not taken:
            text = "spool_size %d is used up, or the disk is full" % self.size
            raise OSError(errno.ENOSPC, text)

    def give_back(self, size: int) -> None:
        with self.lock:
            self.used -= size
            self.free += size

    def complain(self, error: OSError) -> None:
        if not self.failing:
            self.failing = True
            log.warning(
                "%s: no room for what clients do not read: %s", self.directory, error.strerror)


class Spool:
    """Bytes to be kept: in memory while they are few, else in a file that nobody else can open.

    `disk`: see Request.disk. OSError: no descriptor, no room, a disk that fails; what was there
    stays. It is closed with its last reference. One thread at a time.
    """

    def __init__(self, disk: Disk, few: int = 2**17) -> None:
        self.disk = disk
        self.few = few
        self.size = 0                       # bytes that have been written
        self.reserved = 0                   # of them in the file
        self.file: Union[io.BytesIO, io.FileIO] = io.BytesIO()
        self.buffered: Optional[io.BufferedReader] = None       # on the file: it is closed with us

    @property
    def in_memory(self) -> int:
        """Bytes that it takes of memory."""
        return self.size - self.reserved

    def write(self, data: Union[bytes, memoryview]) -> None:
        """Add bytes at the end, all of them or none."""
        most = min(self.few, self.disk.spare())
        if isinstance(self.file, io.BytesIO) and self.size + len(data) > most:
            self._leave_memory()
        if isinstance(self.file, io.BytesIO):
            self.file.write(data)
        else:
            self._append(self.file, memoryview(data))
        self.size += len(data)

    def _leave_memory(self) -> None:
        assert isinstance(self.file, io.BytesIO)
        file = self.disk.open()
        self._append(file, self.file.getbuffer())
        self.file = file

    def _append(self, file: io.FileIO, data: memoryview) -> None:
        self.disk.reserve(len(data))
        rest, before = data, file.tell()
        try:
            while rest:
                rest = rest[file.write(rest):]
        except OSError:                     # the disk is full after all: as if it had not begun
            file.truncate(before)
            file.seek(before)
            self.disk.give_back(len(data))
            raise
        self.reserved += len(data)

    def read(self, at: int, size: int) -> bytes:
        """At most so many bytes from this place on."""
        if isinstance(self.file, io.BytesIO):
            return bytes(self.file.getbuffer()[at:at + size])
        return os.pread(self.file.fileno(), min(size, SPOOL_PIECE), at)

    def reader(self) -> Union[io.BytesIO, io.BufferedReader]:
        """All of it as a binary file."""
        self.file.seek(0)
        if isinstance(self.file, io.BytesIO):
            return self.file
        self.buffered = io.BufferedReader(self.file)
        return self.buffered

    def close(self) -> None:
        self.file.close()
        if self.reserved:
            self.disk.give_back(self.reserved)
        self.size = self.reserved = 0

    def __del__(self) -> None:
        self.close()


# ----------------------------------------------------------------------------------------- Counters
# What is counted is kept in memory that processes can share: a row for each, which it alone writes.
# A row has a fixed list of cells; then slots for series that have labels, each a name and numbers.
# Who reads adds up the rows, slots by name: each process fills its own in the order of its needs.

# The cells of a row, as get_statistics calls them: requests that were answered; connections that
# were taken in, turned away since there was no place, closed since others needed the room; those
# whose time was over. From "connections" on gauges: they say how it is now.
CELLS = (
    "requests", "accepted", "refused", "evicted",
    "timeouts_idle", "timeouts_head", "timeouts_content", "timeouts_output",
    "connections", "connections_idle", "connections_receiving", "connections_sending",
    "connections_suspended", "connections_closing", "held_bytes", "budget_bytes")
(REQUESTS, ACCEPTED, REFUSED_CONNECTIONS, EVICTED,
 IDLE_TIMEOUTS, HEAD_TIMEOUTS, CONTENT_TIMEOUTS, OUTPUT_TIMEOUTS,
 CONNECTIONS, IDLE, RECEIVING, SENDING,
 SUSPENDED, CLOSING, HELD_BYTES, BUDGET_BYTES) = range(len(CELLS))
SLOTS_USED = len(CELLS)
# Then, of each process, for the others: its number, when it has turned its loop in milliseconds of
# time.monotonic(), and the connections that it has just now.
PROCESS, ALIVE, TAKEN = range(SLOTS_USED + 1, SLOTS_USED + 4)

# Upper bounds of a slot's buckets, in seconds; one more bucket takes the rest.
BUCKET_BOUNDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# The numbers of a slot: the buckets, whose sum is the count,
BUCKETS = len(BUCKET_BOUNDS) + 1
MICROSECONDS = BUCKETS                          # then sums
CONTENT_BYTES = BUCKETS + 1
SLOT_NUMBERS = BUCKETS + 2
# Sizes in cells of 8 bytes: the rows begin at multiples of 64 bytes.
NAME_CELLS = 16
SLOT_SIZE = NAME_CELLS + SLOT_NUMBERS
FIRST_SLOT = 24
SLOTS = 240                                     # and some for "other"
ROW_SIZE = FIRST_SLOT + (SLOTS + 15) * SLOT_SIZE

Series = Tuple[Any, ...]                        # the name of a metric, and the values of its labels


def named_slots(row: memoryview) -> Iterator[tuple[Series, int]]:
    """The series of a row, and where the numbers of each are."""
    for number in range(row[SLOTS_USED]):
        place = FIRST_SLOT + number * SLOT_SIZE
        name = bytes(row[place:place + NAME_CELLS]).rstrip(b"\0")
        yield tuple(name.decode().split("\0")), place + NAME_CELLS


class Counters:
    """A row of counters for each process, and one of what reset_statistics has taken off them.

    It is made before the processes; each says by take() which row is its own. A row is written in
    the thread that serves; add() and slot() are for others too.
    """

    def __init__(self, rows: int = 1) -> None:
        memory = mmap.mmap(-1, 8 * ROW_SIZE * (rows + 1))
        cells = memoryview(memory).cast("Q")
        starts = range(0, len(cells), ROW_SIZE)
        *self.rows, self.taken_off = [cells[start:start + ROW_SIZE] for start in starts]
        self._lock = threading.RLock()
        self.take(0)

    def take(self, number: int) -> None:
        """Go on in a row: the counters of a predecessor are kept, gauges begin anew."""
        self.row = self.rows[number]
        for cell in range(CONNECTIONS, SLOTS_USED):
            self.row[cell] = 0
        self.slots = dict(named_slots(self.row))

    def slot(self, series: Series) -> int:
        """Where the numbers of a series are, in the own row. With no room left: of "other"."""
        with self._lock:
            text = tuple(map(str, series))
            if text not in self.slots:
                name = "\0".join(text).encode()
                other = (text[0], *["other"] * (len(text) - 1))
                full = self.row[SLOTS_USED] >= SLOTS or len(name) > 8 * NAME_CELLS
                if full and text != other:
                    return self.slot(other)
                self._name_slot(text, name)
            self.slots[series] = self.slots[text]       # numbers in it need not be made text again
            return self.slots[series]

    def _name_slot(self, series: Series, name: bytes) -> None:
        place = FIRST_SLOT + self.row[SLOTS_USED] * SLOT_SIZE
        self.slots[series] = place + NAME_CELLS
        padded = name.ljust(8 * NAME_CELLS, b"\0")
        self.row[place:place + NAME_CELLS] = memoryview(padded).cast("Q")
        self.row[SLOTS_USED] += 1                       # now others may read it

    def add(self, *series: str) -> None:
        """Count one of a series."""
        with self._lock:
            self.row[self.slots.get(series) or self.slot(series)] += 1

    def totals(self) -> list[int]:
        """The sums over the processes of CELLS."""
        cells = range(SLOTS_USED)
        return [sum(row[cell] for row in self.rows) for cell in cells]

    def series(self) -> dict[Series, list[int]]:
        """The numbers of each series, summed over the processes."""
        found: dict[Series, list[int]] = {}
        for row in self.rows:
            for series, place in named_slots(row):
                numbers = found.setdefault(series, [0] * SLOT_NUMBERS)
                found[series] = list(map(operator.add, numbers, row[place:place + SLOT_NUMBERS]))
        return found


# --------------------------------------------------------------------------------------- Connection

# Bytes of one recv(), so of the pipelined requests that one turn takes. As much as a TLS record:
# nothing stays inside TLS then, where epoll does not see it.
RECEIVE_SIZE = 16384
# Of content. An upload of 64 KiB costs half as much as by 32 KiB a recv(); TLS gives its records.
CONTENT_SIZE = 4 * RECEIVE_SIZE
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NOTHING = memoryview(b"")
# What one connection gets in a turn of the loop, before others have theirs: requests answered, or
# pieces of a stream that have fewer than SMALL_PIECE bytes,
GREEDY = 16
SMALL_PIECE = 4096
CHUNK_STEPS = 300           # and steps of ChunkedContent, which takes three for a chunk.
LEAST_RATE = 500            # bytes a second that a client has to take, or send
LINGER_PAUSE = 5.0          # seconds without a byte that a client is read on after the last answer,
LINGER_TIME = 30.0          # and seconds in all
SHORT_REASON = 250          # bytes of an error text: the smallest page holds it
GARBAGE_SIZE = 200          # bytes that observers see of what is no request
# What a connection waits for: what selectors know, and what only epoll knows.
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
HANG_UP = 0x2000            # EPOLLRDHUP: the client has ended its side
RESET = 0x8                 # EPOLLERR: nothing but the end of the connection
# json.loads() makes them of "\\ud800": no text that can leave
SURROGATE = re.compile("[\ud800-\udfff]")

raw_recv = socket.SocketType.recv               # the bytes below TLS


class Transport(NamedTuple):
    """What differs between HTTP and HTTPS. Replaced whole when certificates are loaded anew."""
    scheme: str
    first_state: Callable[[Connection], bool]
    would_block: tuple[type[Exception], ...]    # What a socket raises that has to be waited for.
    # What to wait for then; without an entry: what the state waits for.
    wants: Mapping[type[Exception], int]
    send_size: int                          # Bytes that one send() is given of a file.
    context: Any = None                         # ssl.SSLContext
    plan: Any = None                            # TLSPlan
    expires: float = 0                          # when the certificate does, in seconds since 1970


class Responses:
    """What a server sends with: the page, and the heads of this second."""

    def __init__(self, size: int) -> None:
        self.page = Page(size)
        self.date = ""
        self.told: set[str] = set()     # parameters that the log has been told of in this second
        self.heads: dict[tuple[int, str, int, str, FieldPairs], bytes] = {}

    def write_error(self, refusal: HTTPError) -> None:
        """Put a line of text on the page that says what is wrong."""
        page = self.page
        page.clear()
        page.content_type = "text/plain; charset=utf-8"
        for name, value in refusal.headers.items():
            page.set_header(name, value)
        line = SURROGATE.sub("\ufffd", "%d %s" % (refusal.status, refusal.reason))
        page.write(line.encode()[:SHORT_REASON] + b"\n")

    def begin_second(self) -> None:
        self.date = formatdate(usegmt=True)
        self.heads.clear()
        self.told.clear()

    def log_limit(self, refusal: ContentTooLarge, client: tuple[str, int]) -> None:
        """Tell the operator which parameter refuses content, once a second for each."""
        if refusal.parameter not in self.told:
            self.told.add(refusal.parameter)
            log.warning("%s: 413: %s", client[0], refusal.reason)

    def head(self, status: int, content_type: str, size: int, connection_line: str,
             fields: FieldPairs) -> bytes:
        """Status line and fields, this second's. `size`: bytes, or CHUNKED, or UNTIL_CLOSE.

        `fields`: the handler's, of which Content-Length is left out: `size` says it.
        """
        lines = [
            "HTTP/1.1 %d %s\r\nDate: %s\r\n" % (status, REASONS.get(status, ""), self.date),
            connection_line]
        if status not in (204, 304):
            if content_type:
                lines.append("Content-Type: %s\r\n" % content_type)
            if size == CHUNKED:
                lines.append("Transfer-Encoding: chunked\r\n")
            elif size != UNTIL_CLOSE:
                lines.append("Content-Length: %d\r\n" % size)
        for name, value in fields:
            if name.lower() != "content-length":
                lines.append("%s: %s\r\n" % (name, value))
        lines.append("\r\n")
        head = "".join(lines).encode("latin-1")
        if len(self.heads) > 255:
            self.heads.clear()
        if len(head) <= HEADROOM:       # with the handler's fields: 1.9 us less where there are any
            self.heads[status, content_type, size, connection_line, fields] = head
        return head


NO_ROOT = Root("", "httpd", {}, "")


def bytes_acked(sock: socket.socket) -> int:
    """The bytes that the client's system has acknowledged; sent is not yet taken.

    Of a unix socket less those that its reader has not taken: it grows from one send() to the next.
    """
    if sock.family == socket.AF_UNIX:
        from fcntl import ioctl
        from termios import TIOCOUTQ
        unread = ioctl(sock.fileno(), TIOCOUTQ, b"\0\0\0\0")
        return -int.from_bytes(unread, sys.byteorder)
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int.from_bytes(info[120:128], sys.byteorder)    # tcpi_bytes_acked of linux/tcp.h
    except OSError:
        return 0


def is_for_localhost(head: Head, connection: Connection) -> bool:
    """False if a loopback address is asked by another name: a web page that has rebound its own.

    Behind a proxy, and where allowed_hosts is set, that says which names are good.
    """
    if names_localhost[head.fields.host] or not connection.server.access.names_all:
        return True
    address, _ = plain_address(connection.sock.getsockname())
    return not LOCAL_HOST.fullmatch("[%s]" % address if ":" in address else address)


def route(head: Head, connection: Connection, body: bytes = b"") -> Request:
    """The request for whoever answers it, and may: a root's handler, or a Refusal."""
    if pending_inits:
        initialize_late()
    if head.refusal is not None:
        return Request(connection, head, NO_ROOT, head.refusal, body)
    root = roots.get(head.root) or roots.get("")
    if root is None:
        return Request(connection, head, *route_nowhere(head), body)
    handler = root.handlers.get(head.method)
    if handler is None and head.method not in NOT_FOR_HANDLERS:
        handler = root.others
    if handler is None:
        allowed = ", ".join(root.handlers)
        handler = Refusal(405, "this method is not allowed here", "Allow", allowed)
    if root.management and not is_for_localhost(head, connection):
        handler = Refusal(421, "on a loopback address only localhost is answered, "
                               "see allowed_hosts")
    return Request(connection, head, root, handler, body)


def route_nowhere(head: Head) -> tuple[Root, AccessHandler]:
    """Who answers where no root is registered."""
    if head.path == "*":        # OPTIONS, the parser has seen to that: the server as a whole
        methods = sorted(known_methods - {"TRACE"})
        return Root("*", "httpd", dict.fromkeys(methods, answer_options), ""), answer_options
    return NO_ROOT, Refusal(404, "nothing is registered for this path")


def blame(error: BaseException, request: Request) -> HTTPError:
    """The answer to a callback's exception. All but a sound HTTPError is logged.

    SystemExit and CancelledError are answered too: no client may end the server. KeyboardInterrupt
    is raised again, and all in a process that the callback has forked.
    """
    if isinstance(error, KeyboardInterrupt) or not request._connection.server.is_ours():
        raise error
    head = request._head
    if isinstance(error, HTTPError):
        try:
            # it may have been changed
            sound = HTTPError(error.status, str(error.reason), dict(error.headers))
            if 400 <= sound.status <= 599:
                return sound
        except Exception as wrong:
            error = wrong
    log.error("%s %r: a callback of root path %r failed", head.method, head.target, head.root,
              exc_info=error)
    return HTTPError(500, "the handler failed, the log of the server says why")


def checked_status(status: Any) -> int:
    """What a handler has returned. TypeError, if that is no status, says what may be forgotten."""
    if status is None:
        return 200
    if isinstance(status, int) and not isinstance(status, bool) and 200 <= status <= 599:
        return int(status)
    text = "the handler returned %r, not a status of 200 to 599: return 200?" % (status,)
    if hasattr(status, "__await__"):
        status.close()
        text += " Handlers are not async: it is a coroutine, which nobody awaits"
    raise TypeError(text)


class Response:
    """What observers are told of a response. A class with slots: made, and read, for every request
    it costs 0.15 us less than tuples with names."""

    __slots__ = (
        "server", "request", "garbage", "status", "size", "begun", "seconds", "whole",
        "_connection")

    def __init__(self, connection: Connection, request: Optional[Request], status: int, size: int,
                 begun: float) -> None:
        self.server = connection.server
        self.request = request      # None: what came was no request,
        self.garbage = b""          # but began with these bytes
        self.status = status
        self.size = size            # bytes of content
        self.begun = begun          # when the head was there, on the clock of time.monotonic()
        # Set at its end: seconds from then to now, and whether all of it has left, or it is cut.
        self.seconds: float
        self.whole: bool
        self._connection = connection

    @property
    def client(self) -> tuple[str, int]:
        """Address and port."""
        if self.request is not None:
            return self.request.client
        return self._connection.client()


# Called once for each response, when its end is known, in the server's thread.
observers: list[Callable[[Response], Any]] = []


class Unsent:
    """Output in a temporary file, and the state that follows when it has left."""
    __slots__ = ("spool", "at", "then")

    def __init__(self, disk: Disk, output: memoryview, then: State) -> None:
        self.spool = Spool(disk, few=0)
        self.spool.write(output)
        self.at = 0                 # bytes that have left
        self.then = then


class Exchange:
    """A request that outlives its turn: it comes, it is suspended, or its response streams."""

    __slots__ = (
        "request", "begun", "weight", "kept", "decoder", "content", "stream", "status", "last")

    def __init__(self, request: Request, begun: float) -> None:
        self.request = request
        self.begun = begun                          # when its head was there
        self.weight = request._connection.server.heads.weight_of(request._head)
        self.kept = 0                               # bytes that the handler says it keeps
        self.decoder: Optional[Content] = None      # until the content is whole
        self.content = bytearray()    # what has come of it, unless upload_data_cb takes it
        self.stream: Optional[Stream] = None        # the response, once that has begun,
        self.status = 0                             # its status
        self.last = False                           # the connection ends with it

    def size(self) -> int:
        """The bytes that it keeps in memory."""
        size = self.weight + self.kept + len(self.request.body) + len(self.content)
        if self.decoder is not None:
            size += self.decoder.held
        return size

    def responses(self) -> list[Response]:
        """What observers are told when a stream has ended."""
        if not observers or self.stream is None:
            return []
        request = self.request
        return [Response(
            request._connection, request, self.status, self.stream.sent, self.begun)]

    def upload(self, data: bytes) -> None:
        """Hand a piece of the content to upload_data_cb. What that raises refuses the rest."""
        root = self.request._root
        try:
            if root.upload is not None:
                root.upload(self.request, data)
        except BaseException as error:
            raise blame(error, self.request) from None


class Stream:
    """A response whose content flush_data_cb makes in the page, piece by piece."""
    __slots__ = ("request", "head", "chunked", "left", "sent", "pieces", "waits", "ended")

    def __init__(self, request: Request, head: bytes, length: int) -> None:
        self.request = request
        self.head = head
        self.chunked = length == CHUNKED
        self.left = length if length >= 0 else math.inf     # bytes of content to come
        self.sent = 0                                       # bytes of content so far
        self.pieces = 0                                     # behind the first
        self.waits = False    # there was nothing but the head: the next piece waits for resume()
        self.ended = False

    def next_piece(self, page: Page, room: int) -> memoryview:
        """What is sent next: at most `room` bytes of content. Nothing: not yet, or it has ended."""
        flush = self.request._root.flush
        if self.ended or self.waits or flush is None:
            self.waits = False
            return NOTHING
        # who keeps it cannot touch what others get
        with page.view[HEADROOM:HEADROOM + room] as buf:
            count = flush(self.request, self.sent, buf)
        if count == END:
            return self._finish()
        most = min(room, self.left)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
            raise ValueError(
                "flush_data_cb returned %r where it could give %.0f bytes" % (count, most))
        head, self.head = self.head, b""
        if count == 0:
            self.waits = bool(head)
            return memoryview(head)
        self.sent += count
        self.left -= count
        return self._frame(page, head, count)

    def _frame(self, page: Page, head: bytes, count: int) -> memoryview:
        """Put what comes before and behind `count` bytes of content there, in the page."""
        view, end = page.view, HEADROOM + count
        if self.chunked:
            head += b"%x\r\n" % count
            view[end:end + TAILROOM] = b"\r\n"
            end += TAILROOM
        start = HEADROOM - len(head)
        if start < 0:                                       # a long head
            return memoryview(head + view[HEADROOM:end])
        view[start:HEADROOM] = head
        return view[start:end]

    def _finish(self) -> memoryview:
        if 0 < self.left < math.inf:
            raise ValueError("flush_data_cb ended %d bytes before the Content-Length" % self.left)
        self.ended = True
        last = self.head
        if self.chunked:
            last += b"0\r\n\r\n"
        return memoryview(last)


def say_goodbye(connection: Connection, patient: bool = False) -> None:
    """TLS: send close_notify (RFC 8446, 6.1). `patient`: raise, if the socket is full."""
    unwrap = getattr(connection.sock, "unwrap", None)
    if unwrap is None:
        return
    try:
        unwrap()
    except (OSError, ValueError) as error:      # mostly SSLWantReadError
        if patient and connection.server.transport.wants.get(type(error)) == WRITE:
            raise


def begin_stream(connection: Connection, request: Request, status: int) -> memoryview:
    """The content comes from flush_data_cb. Its first piece leaves with the head."""
    server = connection.server
    page, head = server.responses.page, request._head
    length = page.length()
    if length is None:
        length = CHUNKED if head.version == "HTTP/1.1" else UNTIL_CLOSE
    exchange = connection.exchange or Exchange(request, server.now)
    exchange.last = server.stopping or head.connection_line is CLOSE or length == UNTIL_CLOSE
    connection_line = CLOSE if exchange.last else head.connection_line
    key = (status, page._content_type, length, connection_line, page.fields)
    raw = server.responses.heads.get(key) or server.responses.head(*key)
    if head.method != "HEAD" and request._root.flush is None:
        raise ValueError("the handler has set Content-Length %d and written nothing" % length)
    exchange.stream = Stream(request, raw, length)
    exchange.status = status
    connection.exchange = exchange
    connection.count()
    if head.method == "HEAD":
        exchange.stream.ended = True
        first = memoryview(raw)
    else:
        # an exception is still answered
        first = exchange.stream.next_piece(page, server.room.piece_size())
    server.counters.row[REQUESTS] += 1
    connection.enter(stream)
    return first


def check_expectation(request: Request, limit: float) -> None:
    """Whether the content will be read; HTTPError is the final answer (RFC 9110, 10.1.1)."""
    fields, handler = request._head.fields, request._handler
    if isinstance(handler, Refusal):
        short = fields.length == 0 or not fields.expect and 0 < fields.length <= limit
        if not short:
            raise handler.error()
    elif fields.expect not in ("", CONTINUE_EXPECTED):
        raise HTTPError(417, "no expectation but 100-continue is understood")


def take_content(connection: Connection, data: bytes) -> Optional[Request]:
    """The request, if its content is whole with this; None: more comes, and has earned time."""
    exchange = connection.exchange
    assert exchange is not None and exchange.decoder is not None
    connection.received = b""
    rest = exchange.decoder.feed(data)
    if rest is None:
        params, now = connection.server.params, connection.server.now
        longest = max(params.keep_alive, params.request_timeout)
        deadline = min(connection.deadline + len(data) / LEAST_RATE, now + longest)
        if exchange.decoder.has_more:
            wait_for_others(connection)
        connection.deadline = deadline
        return None
    connection.received = rest
    request = exchange.request
    request.body = bytes(exchange.content)
    exchange.decoder = None
    exchange.content = bytearray()
    return request


def content_limit(params: Limits, root: Root, upload: bool, kind: str) -> tuple[float, str]:
    """Bytes of the largest content of a media type, and the parameter that says so."""
    parameter = params.other_content
    if kind in (URLENCODED, MULTIPART):
        parameter = "post_buf_size"
    if upload and not isinstance(root.upload_limit, str):
        return root.upload_limit, "upload_limit of root path \"%s\"" % root.name
    if upload:
        parameter = str(root.upload_limit)
    return getattr(params, parameter), parameter


def begin_content(connection: Connection, head: Head) -> Optional[Request]:
    """The request, if its content is here; None: it is on its way. HTTPError refuses it unread.

    What is refused but short is read all the same, and answered then, to keep the connection.
    """
    params, fields = connection.server.params, head.fields
    length = fields.length
    request = route(head, connection)
    root, handler = request._root, request._handler
    answers = type(handler) is not Refusal and handler is not answer_options
    upload = answers and root.upload is not None
    limit, parameter = content_limit(params, root, upload, fields.media_type)
    here = min(limit, len(connection.received))
    if not upload and not fields.expect and 0 < length <= here:
        request.body = connection.received[:length]
        connection.received = connection.received[length:]
        return request
    connection.exchange = exchange = Exchange(request, connection.server.now)
    check_expectation(request, limit)
    if length == 0:
        return request
    write: Callable[[bytes], Any] = exchange.content.extend
    if upload:
        write = exchange.upload
        if 0 < length <= min(limit, len(connection.received)):      # all is here: 5 us less
            data, connection.received = connection.received[:length], connection.received[length:]
            write(data)
            return request
    exchange.decoder = content_decoder(length, limit, parameter, params.max_header_size, write)
    if fields.expect and type(handler) is not Refusal and not connection.received:
        connection.out = memoryview(CONTINUE)
    connection.enter(receive_content)
    return take_content(connection, connection.received)


def find_head(connection: Connection, data: bytes) -> tuple[int, int]:
    """Where the next head begins and ends; 0: not whole. HTTPError: it cannot become one."""
    limit = connection.server.params.max_header_size
    start, searched = 0, 0
    if data.startswith(b"\r"):
        start = end_of_empty_lines(data)
    if connection.beginning is not None:
        searched = connection.beginning.searched - 3
    end = data.find(b"\r\n\r\n", max(start, searched)) + 4
    if end >= 4 and end - start <= limit:
        return start, end
    if connection.beginning is None:
        connection.beginning = Beginning(IN_METHOD)
        connection.enter(receive_head)
    connection.beginning.check_head(data, limit)
    connection.beginning.searched = len(data)
    return start, 0


def next_request(connection: Connection) -> Optional[Request]:
    """Take the next request out of what has been received; None: it is not whole."""
    data, heads = connection.received, connection.server.heads
    end, fields = len(data), None
    limit = connection.server.params.max_header_size
    if end <= limit and connection.beginning is None and data.endswith(b"\r\n\r\n"):
        line, _, section = data.partition(b"\r\n")
        fields = heads.recall_section(section)
    if fields is not None:              # one head, with a section that has been seen before
        head = heads.read(data, line, section, fields)
    else:
        start, end = 0, data.find(b"\r\n\r\n") + 4
        if end < 4 or connection.beginning is not None or data.startswith(b"\r") or end > limit:
            start, end = find_head(connection, data)       # it is not as simple as nearly always
            if end == 0:
                return None
        raw = data[start:end]
        known = heads.recall(raw)
        if known is None:
            line, _, section = raw.partition(b"\r\n")
            known = heads.read(raw, line, section, None)
        head = known
    connection.received = data[end:]    # not before: a refusal looks there whether it answers HEAD
    connection.beginning = None
    if head.waits:
        return begin_content(connection, head)
    return route(head, connection)


class Connection:
    """One socket and what is under way on it. `state` runs next: True to go on, False to wait.

        with TLS: greet > shake_hands ──> idle
        idle ──> receive_head ──> serve ──> idle       the next request is not here yet
                                   │ ^ ├──> proceed    more has been received
                 receive_content <─┘ │ ├──> end        the last response, nothing more is read
                        └────────────┘ ├──> shut ──> linger     refused: read on and discard
                                       ├──> stream     flush_data_cb has more
              suspended, overfull, <───┴─── stream
              half_closed, asked       until request.resume() is called

    Before a state runs, and before the connection waits, all of `out` is sent. A state may be run
    again from its start: nothing is changed before the recv() that may block.
    """

    __slots__ = (
        "server", "sock", "peer", "state", "interest", "deadline", "received", "beginning",
        "exchange", "out", "unsent", "acked", "held", "lingers_until", "unreported", "address",
        "own_address")

    def __init__(self, server: Server, sock: socket.socket, peer: Any) -> None:
        self.server = server
        self.sock = sock
        self.peer = peer                    # its address, as the socket says it,
        self.address: Optional[tuple[str, int]] = None      # and as others see it; and ours:
        self.own_address: Optional[tuple[str, int]] = None  # 4 us to ask for, once
        self.state: State = server.transport.first_state
        self.interest = 0    # what is watched for: READ, WRITE, HANG_UP, RESET; 0: nothing yet
        self.deadline = server.now + server.keep_alive
        self.received = b""                 # the next requests, or the beginning of one
        self.beginning: Optional[Beginning] = None      # of a head that is not whole
        self.exchange: Optional[Exchange] = None
        self.out = NOTHING    # what is to be sent; a view of the page only until `turn` returns
        self.unsent: Optional[Unsent] = None        # what is to be sent first, in a file
        self.acked = 0                      # bytes that the client's system had, a second ago
        self.held: int = 0                  # bytes counted against memory_budget
        self.lingers_until = math.inf
        self.unreported: list[Response] = []    # responses whose end observers do not know yet

    def enter(self, state: State) -> bool:
        """Go over into a state, which has its time from now on. False: most states wait then."""
        self.state = state
        server = self.server
        limit: float = getattr(server.params, STATES[state].limit)
        self.deadline = server.now + limit
        return False

    def count(self) -> None:
        """Count what is kept between turns; 503 if memory_budget has no room for it."""
        size = len(self.received)
        if self.out:
            whole: Any = self.out.obj               # a part of it keeps the whole
            size += len(whole)
        if self.exchange is not None:
            size += self.exchange.size()
        more = size - self.held
        if more > 0 and not self.server.room.has_memory(more, self):
            raise HTTPError(
                503, "no memory is left for this request, see memory_budget", {"Retry-After": "1"})
        if more:
            self.server.room.hold(more)
            self.held = size

    def report(self, whole: bool) -> None:
        """Tell the observers about responses that have left, or are cut."""
        if not self.unreported:
            return
        unreported, self.unreported = self.unreported, []
        now = time.monotonic()
        told = tuple(observers)                 # one may take itself out
        for response in unreported:
            response.seconds = now - response.begun
            response.whole = whole
            for observer in told:
                try:
                    observer(response)
                except BaseException as error:
                    survive("an observer", error)

    def close(self, cut: bool = False, reset: bool = False) -> bool:
        """Give all back at once. `cut`: without close_notify, so that TLS shows a broken end.

        `reset`: the kernel does not keep what it has not sent.
        """
        if self.state is closed:
            return False
        exchange, streams = self.exchange, False
        if exchange is not None:
            exchange.decoder = None             # they would keep each other alive
            streams = exchange.stream is not None
            self.unreported += exchange.responses()
            # To HTTP/1.0 an orderly end would be the content's.
            reset = reset or streams and exchange.request.version == "HTTP/1.0"
        if not cut and not reset and not streams:
            say_goodbye(self)
        if reset:
            with suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.report(False)
        self.received = b""
        self.beginning = None
        self.exchange = None
        self.unsent = None
        self.out = NOTHING
        self.count()
        self.state = closed
        self.server.forget(self)
        return False

    def is_closed(self) -> bool:
        return self.state is closed

    def client(self) -> tuple[str, int]:
        """Address and port of the peer."""
        if self.address is None:
            self.address = plain_address(self.peer)
        return self.address

    def local(self) -> tuple[str, int]:
        """Address and port that the client is connected to."""
        if self.own_address is None:
            self.own_address = plain_address(self.sock.getsockname())
        return self.own_address

    def is_sending(self) -> bool:
        """Whether the client has to take something before anything else happens."""
        return self.out is not NOTHING or STATES[self.state].waits_for == WRITE

    def expire(self) -> None:
        """The deadline has passed."""
        if self.is_sending():
            log.debug("%s: closed after a time-out, its output is not read", self.peer)
            self.server.counters.row[OUTPUT_TIMEOUTS] += 1
            self.close(cut=True, reset=True)
        else:
            row = STATES[self.state]
            self.server.counters.row[row.timeouts] += 1
            row.at_deadline(self)

    def shown_as(self) -> int:
        """The gauge that counts it."""
        if self.is_sending():
            return SENDING
        return STATES[self.state].shown_as

    def stop(self) -> None:
        """The server stops: nothing begins here but what has come already (the last recv()).

        A stream that waits is called once more: it may look at request.stopping, and end.
        """
        if self.exchange is not None and self.exchange.stream is not None:
            self.exchange.request.resume()
        if not self.out and STATES[self.state].at_stop is ENDS:
            self.turn()
        if not self.out and STATES[self.state].at_stop is ENDS:
            self.close()

    def go_on(self, request: Request) -> None:
        """request.resume() was called."""
        if self.exchange is not None and self.exchange.request is request:
            self.turn()

    def is_over(self) -> bool:
        return not self.out and STATES[self.state].at_stop is OVER

    def is_silent(self) -> bool:
        return not self.out and STATES[self.state].patience == 0

    def leave(self, size: int) -> None:
        """A response of `size` bytes is the last (RFC 9112, 9.6): what follows is ignored."""
        more = self.received or self.exchange is not None or size > RECEIVE_SIZE
        self.enter(shut if more else end)
        self.received = b""

    def finish(self, status: int, connection_line: str, with_content: bool,
               request: Optional[Request]) -> memoryview:
        """Put the head before the content, in the page, and choose the state that follows."""
        server = self.server
        responses = server.responses
        page = responses.page
        end = page.end
        if server.stopping:
            connection_line = CLOSE
        key = (status, page._content_type, end - HEADROOM, connection_line, page.fields)
        head = responses.heads.get(key) or responses.head(*key)
        if not with_content:
            end = HEADROOM
        server.counters.row[REQUESTS] += 1
        if observers:
            begun = server.now
            if self.exchange is not None:
                begun = self.exchange.begun
            response = Response(self, request, status, end - HEADROOM, begun)
            if request is None:
                response.garbage = self.received[:GARBAGE_SIZE]
            self.unreported.append(response)
        if connection_line is CLOSE:
            self.leave(end - HEADROOM)
        elif self.received:
            self.state = proceed
        else:
            self.state = idle
            self.deadline = server.now + server.keep_alive
        self.exchange = None
        start = HEADROOM - len(head)
        if start < 0:                                   # the handler has set long fields
            return memoryview(head + page.view[HEADROOM:end])
        page.view[start:HEADROOM] = head
        return page.view[start:end]

    def answer_error(self, error: BaseException, request: Request) -> memoryview:
        """A line of text for what a handler has raised, or `route`."""
        head = request._head
        refusal = blame(error, request)
        self.server.responses.write_error(refusal)
        connection_line = CLOSE if refusal.status in (400, 503) else head.connection_line
        return self.finish(refusal.status, connection_line, head.method != "HEAD", request)

    def refuse(self, refusal: HTTPError) -> None:
        """Answer what is no request, or is not read on, and close. Earlier answers come first."""
        log.debug("%s: refused: %s, %r", self.peer, refusal, self.received[:200])
        if isinstance(refusal, ContentTooLarge):
            self.server.responses.log_limit(refusal, self.client())
        request = None
        if self.exchange is not None:
            request = self.exchange.request
            self.exchange.decoder = None
            to_head = request.method == "HEAD"
        else:
            to_head = self.received.startswith(b"HEAD ", end_of_empty_lines(self.received))
        self.beginning = None
        self.server.responses.write_error(refusal)
        piece = self.finish(refusal.status, CLOSE, not to_head, request)
        self.out = memoryview(bytes(self.out) + bytes(piece)) if self.out else piece
        self.enter(shut)

    def suspend(self, request: Request) -> memoryview:
        """Wait for request.resume(), as long as that takes."""
        if self.exchange is None:
            self.exchange = Exchange(request, self.server.now)
        self.count()
        self.wait_for_resume(request)
        return NOTHING

    def wait_for_resume(self, request: Request) -> None:
        self.enter(suspended)
        if request._resumed:                    # it was too early for the loop to find it suspended
            self.server.post(request)

    def look_closer(self, request: Request, status: Any) -> memoryview:
        """What a handler has returned is not a page with the status 200."""
        page, head = self.server.responses.page, request._head
        if status == SUSPEND and isinstance(status, int):
            return self.suspend(request)
        if page.end > self.server.room.sure:
            find_room(self.server, page.end, request, self)
        status = checked_status(status)
        if status in (204, 205, 304):       # RFC 9110, 15.3.5, 15.3.6, 15.4.5: no content
            page.end = HEADROOM
        elif page.end == HEADROOM:
            length = page.length()
            if length or length is None and request._root.flush is not None:
                return begin_stream(self, request, status)
        return self.finish(status, head.connection_line, head.method != "HEAD", request)

    def serve(self, request: Optional[Request]) -> bool:
        """The hot path: answer request by request; the answers to pipelined ones leave together."""
        server, room = self.server, self.server.room
        page = server.responses.page
        left = GREEDY                               # requests that may be answered in this turn
        answers: Optional[bytearray] = None         # to pipelined requests
        try:
            while request is not None:
                head = request._head
                page.end = HEADROOM
                page.fields = ()
                page._content_type = request._root.content_type
                try:
                    status = request._handler(request, page)
                    if HEADROOM < page.end <= room.sure and (status is None or status is OK):
                        piece = self.finish(
                            200, head.connection_line, head.method != "HEAD", request)
                    else:
                        piece = self.look_closer(request, status)
                except BaseException as error:
                    piece = self.answer_error(error, request)
                if answers is None:
                    if not self.received:               # nearly always: out of the page, as it is
                        self.out = piece
                        break
                    answers = bytearray()
                answers += piece
                left -= 1
                if left == 0 and self.state is proceed:
                    wait_for_others(self)       # who sends many requests at once waits his turn
                if self.state is not proceed or len(answers) > min(RECEIVE_SIZE, room.sure):
                    break
                data = self.received
                end_of_head = data.find(b"\r\n\r\n") + 4
                # A short way for what has been seen before.
                known = server.heads.recall(data[:end_of_head])
                if known is not None and not known.waits:
                    self.received = data[end_of_head:]
                    request = route(known, self)
                else:
                    request = next_request(self)
        finally:
            if answers:
                answers += self.out                     # a 100 (Continue) for the next one
                self.out = memoryview(answers)
        return self.state is not idle and self.state in GOES_ON

    def turn(self) -> None:
        """Send what is due and run states, until one waits.

        The one place that knows "would block", and where refusals are answered.
        """
        wanted = None                           # what TLS waits for
        waiting = self.out                      # what a former turn could not send
        state = self.state
        going = True
        try:
            while True:
                out = self.out
                if out is not NOTHING:
                    sent = self.sock.send(out)
                    if sent < len(out):
                        self.out = out[sent:]
                        continue
                    self.out = NOTHING
                if not going:
                    break
                going = self.state(self)
        except self.server.transport.would_block as block:
            wanted = self.server.transport.wants.get(type(block))
            self.keep_output()
        except BaseException as error:
            self.recover(error)
            return
        resting = self.state is idle and self.interest == READ and self.held == 0
        if not resting or self.out is not NOTHING:
            waited = waiting is not NOTHING and self.state is state
            self.settle(wanted, waited)
        elif self.unreported:
            self.report(True)

    def recover(self, error: BaseException) -> None:
        """What becomes of a connection after an exception: a refusal is answered, else it ends."""
        if isinstance(error, HTTPError):
            self.refuse(error)
            self.turn()
            return
        if not self.server.is_ours():           # the sockets are closed there
            raise error
        self.close(cut=True)
        if isinstance(error, OSError):
            log.debug("%s: the connection is lost: %s", self.peer, error)
        elif isinstance(error, Exception):
            log.error("%s: a fault of the server itself", self.peer, exc_info=error)
        else:                                   # KeyboardInterrupt
            raise error

    def keep_output(self) -> None:
        """The socket takes no more: the rest leaves the page, for a file if it is not small."""
        if self.out is NOTHING:
            return
        server = self.server
        if self.sock.family == socket.AF_UNIX:      # it has taken some, or all this is new
            self.deadline = server.now + server.keep_alive
        if self.state is let_others:            # its turn comes when this has left
            self.state = after_others(self)
        if len(self.out) > server.room.spare():
            self.unsent = server.room.keep(self)
        if self.unsent is not None:
            self.out = NOTHING
            self.state = unspool
        elif self.out.obj is server.responses.page.buffer:
            self.out = memoryview(bytes(self.out))

    def settle(self, wanted: Optional[int], waited: bool) -> None:
        """At the end of a turn: report, count, and watch for what is waited for.

        `waited`: the state is the same as before, and has waited for output to leave.
        """
        if self.state is closed:
            return
        row = STATES[self.state]
        if not self.out and self.unsent is None:
            self.report(True)
            if waited:                      # it has left: the state has its time from now on
                self.enter(self.state)
            if self.server.stopping and row.at_stop is ENDS:
                self.close()
                return
        try:
            self.count()
        except HTTPError as refusal:
            self.find_no_room(refusal)
            return
        if wanted is None:
            wanted = WRITE if self.out else row.waits_for
        if wanted != self.interest:
            if wanted == WRITE and self.is_sending():    # its clock begins, and goes on over pieces
                self.acked = bytes_acked(self.sock)
                self.deadline = self.server.now + self.server.keep_alive
            self.watch(wanted)

    def find_no_room(self, refusal: HTTPError) -> None:
        """memory_budget is used up: 503, unless a response has begun."""
        streams = self.exchange is not None and self.exchange.stream is not None
        if self.out or streams or self.unsent is not None:
            log.warning(
                "%s: closed: memory_budget is used up, by responses that clients do not read",
                self.peer)
            self.close(cut=True, reset=True)
        else:
            self.refuse(refusal)
            self.turn()

    def watch(self, wanted: int) -> None:
        """Have the loop wait for something else."""
        try:
            self.server.loop.change(self.sock, self.interest, wanted, self.turn)
            self.interest = wanted
        except OSError as error:                        # the system's limit of watches
            log.error("%s: closed: %s", self.peer, error)
            self.close(cut=True)


# The states: functions of a connection. True: go on at once; False: wait for what the table says.

def greet(connection: Connection) -> bool:
    """TLS: who does not begin with a handshake gets an answer that he can read."""
    first = connection.sock.recv(1, socket.MSG_PEEK)
    if not first:
        return connection.close()
    if first != b"\x16":                    # a handshake's first byte (RFC 8446, 5.1)
        raise HTTPError(400, "this is the HTTPS port, say https://")
    context = connection.server.transport.context
    try:
        connection.sock = context.wrap_socket(
            connection.sock, server_side=True, do_handshake_on_connect=False,
            suppress_ragged_eofs=False)
    except ValueError as error:             # ssl reads, without TLS, what a reset has left
        raise ConnectionResetError(str(error)) from None
    connection.enter(shake_hands)
    return True


def shake_hands(connection: Connection) -> bool:
    """TLS: the handshake, as far as it goes."""
    transport = connection.server.transport
    sock: Any = connection.sock
    count = connection.server.counters.add
    try:
        sock.do_handshake()
    except transport.would_block:
        raise
    except OSError as error:
        log.debug("%s: no handshake: %s", connection.peer, error)
        count("httpd_tls_handshake_failures_total", sock.version() or "none")
        connection.state = shut             # a reset would overtake the alert that says why
        return True
    suite, version, _ = sock.cipher()
    if version == "TLSv1.3" and suite not in transport.plan.suites13:
        log.debug(
            "%s: closed: %s is not in tls_ciphers, which OpenSSL cannot be told", connection.peer,
            suite)
        count("httpd_tls_handshake_failures_total", version)
        return connection.close(cut=True)
    count("httpd_tls_handshakes_total", version)
    connection.enter(idle)
    return True


def idle(connection: Connection) -> bool:
    """Nothing of a request is here. A head that was seen before is not parsed."""
    data = connection.sock.recv(RECEIVE_SIZE)
    head = connection.server.heads.recall(data)
    if head is not None and not head.waits:
        return connection.serve(route(head, connection))
    if not data:
        return connection.close()
    connection.received = data
    return connection.serve(next_request(connection))


def proceed(connection: Connection) -> bool:
    """More has been received with what is answered now."""
    return connection.serve(next_request(connection))


def let_others(connection: Connection) -> bool:
    """There is more to be answered, read, or streamed: an event changes nothing."""
    return False


def wait_for_others(connection: Connection) -> bool:
    """Go on when others have had a turn."""
    connection.server.loop.greedy.append(connection)
    return connection.enter(let_others)


def after_others(connection: Connection) -> State:
    exchange = connection.exchange
    if exchange is None:
        return proceed
    return stream if exchange.decoder is None else receive_content


def have_turn(connection: Connection) -> None:
    if connection.state is let_others:
        connection.state = after_others(connection)
        connection.turn()


def receive(connection: Connection, size: int) -> bytes:
    """More of a request; b"" if it has ended before one has begun."""
    data = connection.sock.recv(size)
    begun = connection.exchange is not None or connection.received.strip(b"\r\n")
    if begun and not data:
        raise HTTPError(400, "the connection ended inside a request")
    return data


def receive_head(connection: Connection) -> bool:
    data = receive(connection, RECEIVE_SIZE)
    if not data:
        return connection.close()
    connection.received += data
    return connection.serve(next_request(connection))


def receive_content(connection: Connection) -> bool:
    exchange, data = connection.exchange, b""
    assert exchange is not None and exchange.decoder is not None
    decoder = exchange.decoder
    if not decoder.has_more:            # what may be many tiny chunks is kept: so not much of it
        data = receive(connection, min(CONTENT_SIZE, max(RECEIVE_SIZE, decoder.left)))
    request = take_content(connection, data)
    return request is not None and connection.serve(request)


def stream(connection: Connection) -> bool:
    """The socket has taken the last piece of the content: the next is due."""
    exchange, server = connection.exchange, connection.server
    assert exchange is not None and exchange.stream is not None
    try:
        piece = exchange.stream.next_piece(server.responses.page, server.room.piece_size())
    except BaseException as error:
        blame(error, exchange.request)
        return connection.close(cut=True)
    if piece:
        connection.out = piece
        connection.state = stream
        if connection.interest == WRITE:    # its clock has begun, and goes on
            return False
        # Small pieces at once, and no watch for WRITE before one has to wait: 10 us each.
        exchange.stream.pieces += 1
        if len(piece) < SMALL_PIECE and exchange.stream.pieces % GREEDY:
            return True
        return wait_for_others(connection)
    if exchange.stream.ended:
        return end_stream(connection, exchange)
    connection.wait_for_resume(exchange.request)
    return False


def unspool(connection: Connection) -> bool:
    """Output waits in a file: send what the socket takes of it, and keep nothing."""
    unsent = connection.unsent
    assert unsent is not None
    piece = unsent.spool.read(unsent.at, connection.server.transport.send_size)
    unsent.at += connection.sock.send(piece)
    if unsent.at < unsent.spool.size:
        return False                        # others have a turn
    connection.unsent = None
    connection.enter(unsent.then)
    return True


def end_stream(connection: Connection, exchange: Exchange) -> bool:
    """All of the response has left."""
    connection.unreported += exchange.responses()
    if exchange.last or connection.server.stopping:
        connection.leave(0)
        connection.exchange = None
        return True
    connection.exchange = None
    if connection.received:
        connection.enter(proceed)
        return True
    return connection.enter(idle)


def resumed(connection: Connection) -> bool:
    """Whether request.resume() was called; then its callback is due."""
    exchange = connection.exchange
    return exchange is not None and exchange.request._resumed


def go_on(connection: Connection) -> bool:
    """Call the callback again that waited."""
    exchange = connection.exchange
    assert exchange is not None
    exchange.request._resumed = False
    if exchange.stream is not None:
        return stream(connection)
    return connection.serve(exchange.request)


def suspended(connection: Connection) -> bool:
    """A callback waits for resume(). An event means that more has come, or the end."""
    if resumed(connection):
        return go_on(connection)
    if raw_recv(connection.sock, 1, socket.MSG_PEEK):
        return connection.enter(overfull)
    return ask(connection)


def overfull(connection: Connection) -> bool:
    """The same, and the client has sent more, which is not read yet. An event is the end."""
    if resumed(connection):
        return go_on(connection)
    return ask(connection)


def ask(connection: Connection) -> bool:
    """A client that has gone looks like one that has only finished sending (RFC 9112, 9.6).

    That one is to be answered. As long as nothing is sent, a 100 (Continue) tells: the system of
    one that has gone objects.
    """
    exchange = connection.exchange
    assert exchange is not None
    if exchange.stream is not None or exchange.request.version == "HTTP/1.0":
        return connection.enter(half_closed)
    connection.out = memoryview(CONTINUE)
    return connection.enter(asked)


def is_gone(sock: socket.socket) -> bool:
    """Whether nothing more can leave: after a reset, or when a unix socket has lost its peer."""
    look = select.poll()
    look.register(sock, 0)                      # what is told of all the same: EPOLLERR, EPOLLHUP
    return bool(look.poll(0))


def half_closed(connection: Connection) -> bool:
    """A callback waits, the client has ended its side and cannot be asked."""
    if resumed(connection):
        return go_on(connection)
    if is_gone(connection.sock):
        connection.close(cut=True)
    return False


def asked(connection: Connection) -> bool:
    """The same, and it has been asked."""
    return half_closed(connection)


def shut(connection: Connection) -> bool:
    """All is sent: say so, and wait until the client has read it."""
    connection.report(True)
    say_goodbye(connection, patient=True)
    connection.sock.shutdown(socket.SHUT_WR)
    connection.enter(linger)
    connection.lingers_until = connection.server.now + LINGER_TIME
    connection.deadline = connection.server.now + LINGER_PAUSE
    return True


def linger(connection: Connection) -> bool:
    """Read on and discard, for some time: a reset would overtake the answer (RFC 9112, 9.6)."""
    if not raw_recv(connection.sock, RECEIVE_SIZE):
        return connection.close()
    connection.deadline = min(connection.server.now + LINGER_PAUSE, connection.lingers_until)
    return False


def end(connection: Connection) -> bool:
    """All is sent, and nothing more is expected."""
    connection.report(True)
    return connection.close()


def closed(connection: Connection) -> bool:
    """The socket is gone; an event of the same poll may still come."""
    return False


# What becomes of a connection at its deadline.

def close_silently(connection: Connection) -> None:
    log.debug("%s: closed after a time-out", connection.peer)
    connection.close()


def refuse_late(connection: Connection) -> None:
    """A request has not come in time. Empty lines are none."""
    if connection.exchange is None and not connection.received.strip(b"\r\n"):
        close_silently(connection)
        return
    connection.refuse(HTTPError(408, "the request did not arrive in time, see request_timeout"))
    connection.turn()


State = Callable[[Connection], bool]
ENDS = "ends"                               # What stop() means for a connection.
FINISHES = "finishes"
OVER = "over"
# Seconds that a connection may be behind its time before it has to give way to others.
SLOW = 5.0                  # for whoever has to take output,
STAYS = math.inf            # and for whoever is not to go at all


class StateRow(NamedTuple):
    """What a state is. While `out` waits, the connection waits for WRITE, as in `unspool`."""
    waits_for: int                              # READ, WRITE, HANG_UP, RESET; 0: it never waits
    limit: str                                  # of the time it may take: a parameter, or for_ever
    at_deadline: Callable[[Connection], None]
    patience: float    # seconds behind its time: then it may have to give way
    at_stop: str
    shown_as: int               # the gauge that counts connections in it
    timeouts: int               # the counter of its deadlines that have passed


STATES: dict[State, StateRow] = {
    greet: StateRow(
        READ, "keep_alive", close_silently, 0, ENDS, IDLE, IDLE_TIMEOUTS),
    shake_hands: StateRow(
        READ, "request_timeout", close_silently, 1, ENDS, RECEIVING, HEAD_TIMEOUTS),
    idle: StateRow(
        READ, "keep_alive", close_silently, 0, ENDS, IDLE, IDLE_TIMEOUTS),
    receive_head: StateRow(
        READ, "request_timeout", refuse_late, 1, FINISHES, RECEIVING, HEAD_TIMEOUTS),
    receive_content: StateRow(
        READ, "request_timeout", refuse_late, 1, FINISHES, RECEIVING, CONTENT_TIMEOUTS),
    proceed: StateRow(
        0, "request_timeout", close_silently, STAYS, FINISHES, RECEIVING, HEAD_TIMEOUTS),
    let_others: StateRow(
        READ, "for_ever", close_silently, STAYS, FINISHES, RECEIVING, HEAD_TIMEOUTS),
    stream: StateRow(
        WRITE, "keep_alive", close_silently, SLOW, FINISHES, SENDING, OUTPUT_TIMEOUTS),
    unspool: StateRow(
        WRITE, "keep_alive", close_silently, SLOW, FINISHES, SENDING, OUTPUT_TIMEOUTS),
    suspended: StateRow(
        READ, "for_ever", close_silently, STAYS, FINISHES, SUSPENDED, OUTPUT_TIMEOUTS),
    overfull: StateRow(
        HANG_UP, "for_ever", close_silently, STAYS, FINISHES, SUSPENDED, OUTPUT_TIMEOUTS),
    half_closed: StateRow(
        RESET, "keep_alive", close_silently, STAYS, FINISHES, SUSPENDED, OUTPUT_TIMEOUTS),
    asked: StateRow(
        RESET, "for_ever", close_silently, STAYS, FINISHES, SUSPENDED, OUTPUT_TIMEOUTS),
    shut: StateRow(
        0, "request_timeout", close_silently, STAYS, FINISHES, CLOSING, OUTPUT_TIMEOUTS),
    end: StateRow(
        0, "request_timeout", close_silently, STAYS, FINISHES, CLOSING, OUTPUT_TIMEOUTS),
    # so these go first
    linger: StateRow(
        READ, "for_ever", close_silently, 1, OVER, CLOSING, OUTPUT_TIMEOUTS),
    closed: StateRow(
        0, "for_ever", close_silently, STAYS, OVER, CLOSING, OUTPUT_TIMEOUTS),
}
# States that run in the same turn, after what is to be sent.
GOES_ON = frozenset({proceed, shut, end, stream})


def credit(connection: Connection) -> None:
    """Once a second: what the client has acknowledged earns time, a second for each 500 bytes."""
    if connection.interest == WRITE and connection.is_sending():
        acked = bytes_acked(connection.sock)
        earned = max(0, acked - connection.acked) / LEAST_RATE
        connection.deadline = min(
            connection.deadline + earned, connection.server.now + connection.server.keep_alive)
        connection.acked = acked


def behind(connection: Connection) -> float:
    """Seconds that it is behind its time, when somebody has to go; negative: it stays."""
    row = STATES[connection.state]
    limit, patience = row.limit, row.patience
    if connection.out is not NOTHING:
        limit, patience = "keep_alive", SLOW
    allowed: float = getattr(connection.server.params, limit)
    late = allowed - (connection.deadline - connection.server.now)
    return late if late >= patience else -1.0


def give_way(connection: Connection, politely: bool) -> None:
    """Others need the room. `politely`: the page is free, for a line of text."""
    connection.server.counters.row[EVICTED] += 1
    row = STATES[connection.state]
    if politely and not connection.is_sending() and row.at_deadline is refuse_late:
        refuse_late(connection)
    else:
        connection.close(cut=True, reset=connection.is_sending())


PLAIN = Transport("http", idle, (BlockingIOError,), {}, SPOOL_PIECE)
# By scheme: what makes the transport out of the parameters. The section TLS puts itself in.
transports: dict[str, Callable[[Limits], Transport]] = {"http": lambda params: PLAIN}


# --------------------------------------------------------------------------------------------- Loop

ACCEPT_BATCH = 64           # connections taken in, before others get their turn,
A_DAY = 86400.0             # seconds; epoll takes no more than 24 of them
POLL_BATCH = 256            # events that one turn takes
CLOSE_BATCH = 100           # sockets that one turn closes
GREEDY_TIME = 0.005         # seconds a turn that are for who sends many requests at once
EXPIRE_BATCH = 100          # and closed as late
# seconds that the kernel waits for a request before it tells of a connection
DEFER = 1


class Mailbox:
    """Resumed requests, and what wakes the loop for them. post() and ring(): any thread."""

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.busy = False    # the loop looks at them at the end of its turn, without being woken
        self.ringing = False        # it has been woken
        self.bell, self.button = socket.socketpair()
        self.bell.setblocking(False)
        self.button.setblocking(False)

    def post(self, request: Request) -> None:
        self.requests.append(request)
        if not self.busy:
            self.ring()

    def hand_out(self) -> None:
        """Have those requests called again that have been resumed."""
        for _ in range(len(self.requests)):
            request = self.requests.popleft()
            if request._resumed:
                request._connection.go_on(request)

    def ring(self) -> None:
        """Have the loop come back from its poll, this one or another program's."""
        if not self.ringing:
            self.ringing = True
            with suppress(OSError):             # it has ended
                self.button.send(b"!")

    def answer(self) -> None:
        with suppress(BlockingIOError):
            self.bell.recv(64)
        self.ringing = False                    # before what was noted meanwhile is looked at


LISTEN_HINTS = {
    errno.EADDRINUSE: ": end the program that has it, or choose another port",
    errno.EADDRNOTAVAIL: ": set ip to an address of this machine",
}


def listen_tcp(ip: str, port: int) -> socket.socket:
    """A listening socket; for the empty ip one for IPv6 and IPv4. OSError names the address."""
    every = ip in ("", "*")
    family = socket.AF_INET
    if ":" in ip or every and socket.has_ipv6:
        family = socket.AF_INET6
    address: tuple[Any, ...] = ("" if every else ip, port)
    if "%" in ip:                       # given as a text it would be looked up
        address = (ip.partition("%")[0], port, 0, index_of_zone(ip))
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if every and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return listen_tcp("0.0.0.0", port)      # a kernel without IPv6
        hint = LISTEN_HINTS.get(error.errno or 0, "")
        raise OSError(
            error.errno,
            "cannot listen on %s port %d: %s%s" % (ip or "*", port, error.strerror, hint)
        ) from None
    return listener


def index_of_zone(ip: str) -> int:
    zone = ip.partition("%")[2]
    try:
        return socket.if_nametoindex(zone)
    except OSError:
        raise ConfigError("httpd: ip: this machine has no interface %s" % zone, "ip") from None


def has_died(path: str) -> bool:
    """Whether nobody listens on the socket of this path any more. OSError: it is something else."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)        # a full queue is a sign of life, too
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return stat.S_ISSOCK(os.lstat(path).st_mode)    # any file refuses
        except BlockingIOError:
            pass
        return False


def listen_unix(path: str) -> socket.socket:
    """The socket of a path, or of an abstract name, which begins with an @. ConfigError."""
    address = path
    if path.startswith("@"):
        address = "\0" + path[1:]
        log.warning("everybody on this machine may connect to unix:%s: it has no permissions", path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.lexists(address) and has_died(address):
            os.unlink(address)
        listener.bind(address)
        if address is path:             # before listen() nobody can connect
            os.chmod(path, 0o660)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        text = error.strerror
        if error.errno == errno.EADDRINUSE:
            text = "another program listens there, or it is no socket: choose another path"
        raise ConfigError(
            "httpd: ip: cannot listen on unix:%s: %s" % (path, text), "ip") from None
    return listener


def identity(path: str) -> Optional[tuple[int, int]]:
    """Which file a path means."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Listener:
    """A listening socket. Processes may share it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.address: tuple[str, int] = ("", 0)
        self.path = ""                          # what is to be removed when this process closes it
        self.pid = os.getpid()
        self.defer = 0      # seconds that the kernel waits for a request before it tells
        if sock.family == socket.AF_UNIX:
            name: Any = sock.getsockname()
            self.address = ("unix:" + os.fsdecode(name).replace("\0", "@", 1), 0)
            if not self.address[0].startswith("unix:@"):
                self.path = self.address[0][5:]
            self.identity = identity(self.path)
        else:
            self.address = sock.getsockname()[:2]
            # the accepted sockets inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.defer = DEFER
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER)
        # What accept() does, without its layer of Python: 2 us of 24 that a connection costs.
        # Private: if it is not there, accept() does.
        self._accept = getattr(self.sock, "_accept", None)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next client. OSError, mostly BlockingIOError: there is none."""
        sock: Any
        if self._accept is None:
            sock, peer = self.sock.accept()
        else:
            descriptor, peer = self._accept()
            family, kind = int(self.sock.family), int(socket.SOCK_STREAM)
            sock = socket.SocketType(family, kind, 0, descriptor)
        sock.setblocking(False)
        return sock, peer or UNIX

    def close(self) -> None:
        """The file of a unix socket goes too, if it is still ours."""
        self.sock.close()
        if self.path and self.pid == os.getpid() and identity(self.path) == self.identity:
            with suppress(OSError):
                os.unlink(self.path)
        self.path = ""


def listen(ip: str, port: int) -> Listener:
    """Listen on an address, with its port, or on a unix socket. OSError or ConfigError."""
    if ip.startswith("unix:"):
        return Listener(listen_unix(ip[5:]))
    return Listener(listen_tcp(ip, port))


def descriptor_of(file: Any) -> int:
    return int(file if isinstance(file, int) else file.fileno())


def check_callable(callback: Any) -> None:
    if not callable(callback):
        raise TypeError("no function: %r" % (callback,))


class Watch:
    """What Server.watch() returns."""

    def __init__(self, loop: Loop, file: Any, callback: Callable[[], Any]) -> None:
        self._loop = loop
        check_callable(callback)
        self._descriptor = descriptor_of(file)
        self._callback: Optional[Callable[[], Any]] = callback

    def __call__(self) -> None:
        if self._callback is not None:
            call_safely("a callback of watch()", self._callback)

    def close(self) -> None:
        """End it. Before the file is closed; it may be repeated."""
        self._callback = None
        watched: Any = self._loop.callbacks.get(self._descriptor)
        if watched is self:                     # else the number is somebody else's by now
            self._loop.remove(self._descriptor)


class Timer:
    """What Server.call_later() returns."""

    def __init__(self, due: float, callback: Callable[[], Any]) -> None:
        check_callable(callback)
        self.due = due
        self._callback: Optional[Callable[[], Any]] = callback

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def __call__(self) -> None:
        if self._callback is not None:
            call_safely("a callback of call_later()", self._callback)

    def close(self) -> None:
        """Do not call any more. It may be repeated."""
        self._callback = None


class Companion(Protocol):
    """What lives as long as a server listens, such as its access log."""

    def reload(self) -> None:
        """Take what is in files anew."""

    def close(self) -> None:
        """The server has ended."""


# Each is called when a server begins to listen. The section Access log puts itself in.
companions: list[Callable[[Server], Optional[Companion]]] = []


class Sharing(Protocol):
    """How a process takes its part of the connections to listeners that others have too."""

    def wait_last(self, loop: Loop) -> None:
        """They are watched from now on: who waits already comes first."""

    def look(self) -> None:
        """Connections have been taken in, or have ended."""


class Loop:
    """What a server waits with: made when it listens, dropped whole. It crosses no fork."""

    def __init__(self, listeners: Sequence[Listener], accept: Callable[[Listener], None]) -> None:
        if not hasattr(select, "epoll"):
            raise RuntimeError(
                "select.epoll is missing: gevent's monkey.patch_all() takes it away, unless it "
                "is called with select=False; and httpd.py needs Linux")
        self.listeners = list(listeners)
        self.accept = accept                    # what to do when one of them is ready
        self.accepting = False                  # they are watched
        self.mailbox = Mailbox()
        self.pid = os.getpid()
        self.selector = selectors.EpollSelector()
        # The same epoll, asked for at most POLL_BATCH events: what one turn takes is bounded, and a
        # request costs 2 % less than by select().
        self.poll = select.epoll.fromfd(os.dup(self.selector.fileno()))
        self.callbacks: dict[int, Callable[[], Any]] = {}              # by descriptor
        self.hang_ups = select.epoll()    # For what selectors do not know; it is watched itself.
        self.waiting_for_end: dict[int, Callable[[], None]] = {}       # descriptor -> whom to tell
        self.timers: list[Timer] = []           # a heap
        self.greedy: deque[Connection] = deque()        # who has more to be answered, others first
        self.closing: deque[socket.socket] = deque()    # what is closed in parts
        self.owner: Optional[int] = None        # the thread that turns it
        self.turning = False                    # it is being turned just now
        self.ready = False                      # the init_proc_cb's have run,
        self.failure: Optional[BaseException] = None        # or one has failed
        self.companions: list[Companion] = []
        self.sharing: Optional[Sharing] = None      # with other processes
        self.add(self.mailbox.bell, READ, self.mailbox.answer)
        self.add(self.hang_ups.fileno(), READ, self._tell_of_ends)

    def is_ours(self) -> bool:
        """Not a copy in a forked process: that must leave the epoll, and the peers, alone."""
        return self.pid == os.getpid()

    def check_ours(self) -> None:
        """RuntimeError in a forked process, where all files are closed."""
        if not self.is_ours():
            raise RuntimeError("this process was forked by what a server has called: it must end "
                               "by os._exit(), the server is its parent's")

    def add(self, file: Any, events: int, callback: Callable[[], Any]) -> None:
        """Call the callback when the file is ready. OSError: the system has no more watches."""
        descriptor = descriptor_of(file)
        if descriptor in self.callbacks:        # of a file that was closed: the number is ours now
            log.warning("descriptor %d was closed before its Watch", descriptor)
            self.remove(descriptor)
        self.selector.register(file, events)
        self.callbacks[descriptor] = callback

    def remove(self, file: Any) -> None:
        with suppress(KeyError):            # a change that failed has taken it out already
            key = self.selector.unregister(file)
            self.callbacks.pop(key.fd, None)

    def close_some(self) -> None:
        """Close sockets, which takes the kernel 10 us each: thousands at once would be a pause."""
        for _ in range(min(CLOSE_BATCH, len(self.closing))):
            self.closing.popleft().close()

    def _tell_of_ends(self) -> None:
        for descriptor, _ in self.hang_ups.poll(0, 64):
            callback = self.waiting_for_end.get(descriptor)
            if callback is not None:
                callback()

    def change(self, sock: socket.socket, before: int, wanted: int,
               callback: Callable[[], None]) -> None:
        """Watch a connection for READ, WRITE, HANG_UP, RESET instead; 0: for nothing. OSError."""
        if before in (READ, WRITE) and wanted in (READ, WRITE):
            self.selector.modify(sock, wanted)
            return
        self.forget(sock, before)
        if wanted in (READ, WRITE):
            self.add(sock, wanted, callback)
        elif wanted:
            self.hang_ups.register(sock.fileno(), wanted)
            self.waiting_for_end[sock.fileno()] = callback

    def forget(self, sock: socket.socket, before: int) -> None:
        """Watch a connection no more."""
        if before in (READ, WRITE):
            self.remove(sock)
        elif before:
            self.waiting_for_end.pop(sock.fileno(), None)
            with suppress(OSError):
                self.hang_ups.unregister(sock.fileno())

    def set_accepting(self, wanted: bool) -> None:
        """Watch the listeners, or leave them alone for a while."""
        if wanted == self.accepting:
            return
        self.accepting = wanted
        try:
            for listener in self.listeners:
                if wanted:
                    self.add(listener.sock, READ, functools.partial(self.accept, listener))
                else:
                    self.remove(listener.sock)
        except OSError as error:                # the system's limit of watches: again in a second
            log.error("nobody is taken in for a second: %s", error)
            self.set_accepting(False)
        if self.accepting and self.sharing is not None:
            self.sharing.wait_last(self)

    def stop_listening(self) -> None:
        self.set_accepting(False)
        while self.listeners:
            self.listeners.pop().close()

    def serve_greedy(self) -> None:
        """Answer more to those who have sent much, for a while."""
        end = time.monotonic() + GREEDY_TIME
        while self.greedy and time.monotonic() < end:
            have_turn(self.greedy.popleft())

    def call_due_timers(self, now: float) -> None:
        due = []
        while self.timers and self.timers[0].due <= now:
            due.append(heapq.heappop(self.timers))
        for timer in due:
            timer()

    def close(self) -> None:
        for companion in self.companions:
            call_safely("the end of what accompanies a server", companion.close)
        self.stop_listening()
        self.close_files()

    def close_files(self) -> None:
        mailbox = self.mailbox
        file: Any
        for file in (*self.closing, mailbox.bell, mailbox.button, self.hang_ups, self.poll,
                     self.selector):
            file.close()


# ------------------------------------------------------------------------------------------- Server

servers: set[Server] = set()    # those that listen


def leave_to_parent() -> None:
    """In a process that a program has forked. It may live long, and hold no port and no client."""
    for server in servers:
        for connection in server.connections:
            connection.sock.close()
        for listener in server.loop.listeners:
            listener.sock.close()
        server.loop.close_files()


os.register_at_fork(after_in_child=leave_to_parent)


def measure(server: Server) -> None:
    """Bring the gauges of this process's row up to date. Any thread."""
    gauges = [0] * SLOTS_USED
    for connection in tuple(server.connections):
        gauges[connection.shown_as()] += 1
        gauges[CONNECTIONS] += 1
    gauges[HELD_BYTES] = server.held
    gauges[BUDGET_BYTES] = server.params.memory_budget
    for cell in range(CONNECTIONS, SLOTS_USED):
        server.counters.row[cell] = gauges[cell]


TURNED_AWAY = 16                # connections over the limit, which are being told so
# What can be short: whether a connection would give some of it back.
HOLDERS: dict[str, Callable[[Connection], Any]] = {
    "descriptors": lambda connection: True,
    "memory": lambda connection: connection.held,
    "spool": lambda connection: connection.unsent or connection.exchange,
    "output": lambda connection: connection.held and connection.is_sending(),
}


def find_room(server: Server, size: int, request: Request, asking: Connection) -> None:
    """HTTPError, if a socket that takes nothing of the answer would leave it without room."""
    room = server.room
    while not server.disk.has_room(size) and room.held + size > server.params.held_size:
        if not room.make("spool", asking) and not room.make("output", asking):
            break
    else:
        return
    if request.method in ("GET", "HEAD"):
        raise HTTPError(
            503, "no room is left for the answer, see spool_size", {"Retry-After": "1"})
    raise HTTPError(500, "done, but the answer cannot be sent: no room is left, see spool_size")


class Candidates:
    """Who has to give way when one thing is short: whoever is furthest behind his time."""

    def __init__(self, holds: Callable[[Connection], Any]) -> None:
        self.holds = holds
        self.found: list[Connection] = []       # the last one first
        self.idle_until = 0.0    # nobody was behind: then it is worth while to look again

    def furthest(self, connections: Iterable[Connection], now: float,
                 asking: Optional[Connection]) -> Optional[Connection]:
        for looked in (False, True):
            while self.found:
                connection = self.found.pop()
                if connection is not asking and behind(connection) >= 0 and self.holds(connection):
                    return connection
            if looked or now < self.idle_until:
                break
            ranked = []
            for connection in connections:
                late = behind(connection)
                if late >= 0 and self.holds(connection):
                    ranked.append((late, id(connection), connection))
            self.found = [connection for _, _, connection in sorted(ranked)[-64:]]
        if not self.found:
            self.idle_until = now + 0.25
        return None


class Room:
    """What a server has to give: memory, files, descriptors. Who is behind gives way to others."""
    __slots__ = ("server", "params", "held", "sure", "shortages", "evicting")

    def __init__(self, server: Server, params: Limits) -> None:
        self.server = server
        self.params = params
        self.held: int = 0                      # bytes that connections keep between their turns
        self.sure = HEADROOM + self.spare()     # an answer that ends before there finds room
        self.shortages = {kind: Candidates(holds) for kind, holds in HOLDERS.items()}
        self.evicting = False                   # somebody is giving way just now

    def hold(self, more: int) -> None:
        """Take so many bytes of memory_budget, or give them back."""
        self.held += more
        self.sure = HEADROOM + self.spare()

    def spare(self) -> int:
        """Bytes that one answer may take of memory: small ones always find room."""
        return max(0, self.params.held_size - self.held) // 8

    def has_memory(self, more: int, asking: Connection) -> bool:
        """Whether so many bytes can be had, after everybody who is behind has gone."""
        while self.held + more > self.params.held_size:
            if not self.make("memory", asking):
                return False
        return True

    def keep(self, connection: Connection) -> Optional[Unsent]:
        """Put what a connection has to send into a file; None: there is no room."""
        while True:
            try:
                return Unsent(self.server.disk, connection.out, connection.state)
            except OSError as error:
                if not self.make_for(error, connection):
                    self.server.disk.complain(error)
                    return None

    def make_for(self, error: OSError, asking: Optional[Connection] = None) -> bool:
        """Close somebody who holds what an error says is short. False: there is nobody."""
        kind = "descriptors" if error.errno in (errno.EMFILE, errno.ENFILE) else "spool"
        if kind == "descriptors" and self.server.loop.closing:
            self.server.loop.close_some()
            return True
        return self.make(kind, asking)

    def make(self, kind: str, asking: Optional[Connection] = None) -> bool:
        """Have whoever is furthest behind his time give way, of those who hold what is short."""
        if self.evicting:                       # by somebody who gives way himself
            return False
        victim = self.shortages[kind].furthest(self.server.connections, self.server.now, asking)
        if victim is None:
            return False
        log.debug("%s: closed, %s is short", victim.peer, kind)
        self.evicting = True
        try:
            give_way(victim, politely=kind == "memory")
        finally:
            self.evicting = False
        return True

    def has_place(self) -> bool:
        """Whether one more connection may be taken in."""
        loop = self.server.loop
        while len(self.server.connections) + len(loop.closing) >= self.params.max_open:
            if loop.closing:
                loop.close_some()
            elif not self.make("descriptors"):
                return False
        return True

    def piece_size(self) -> int:
        """Bytes for a piece of a stream: fewer if clients do not read, never less than 512."""
        return min(self.params.buf_size, max(512, self.spare()))


def url_of(scheme: str, host: str, port: int) -> str:
    """How a client on this machine reaches a listener."""
    if host.startswith("unix:"):
        return host
    if host in ("::", "0.0.0.0"):
        host = "127.0.0.1"
    elif ":" in host:
        host = "[%s]" % host.replace("%", "%25")            # RFC 6874, 2
    return "%s://%s:%d" % (scheme, host, port)


def is_public(listener: Listener) -> bool:
    """Whether more can connect than the programs of this machine; for unix:@NAME all of these."""
    host = listener.address[0]
    return not (host == "::1" or host.startswith("unix:/") or LOCAL_HOST.fullmatch(host))


def warn_of_open_roots(params: Limits, listeners: Iterable[Listener]) -> None:
    """Tell the operator what everybody may do."""
    open_roots = ["/" + root.name for root in roots.values() if root.management]
    guarded = params.auth_username or params.tls_ca_file
    if open_roots and not guarded and any(map(is_public, listeners)):
        log.warning("whoever reaches %s may give orders: set ip = 127.0.0.1, or auth_username and "
                    "auth_password, or tls_ca_file", " ".join(open_roots))


def find_full(connection: Connection) -> str:
    """The parameter that leaves no place for one more connection; empty: there is one."""
    server = connection.server
    if server.access.most and not server.access.enter(connection.client()[0]):
        return "max_connections_per_ip"
    if not server.room.has_place():
        return "max_connections"
    return ""


def turn_away(connection: Connection, full: str) -> None:
    """No room for this client: say so, or just close where only a handshake could say it."""
    server = connection.server
    server.counters.row[REFUSED_CONNECTIONS] += 1
    server.turned_away.append(connection)
    if len(server.turned_away) > TURNED_AWAY:
        server.turned_away.popleft().close()
    if server.transport.context is not None:
        connection.close()
        return
    connection.refuse(
        HTTPError(503, "too many connections, see %s" % full, {"Retry-After": "1"}))
    connection.turn()


def listen_with(server: Server) -> Loop:
    """A loop for the server, and what accompanies it. OSError or ConfigError: it cannot be."""
    loop = Loop(server.bind(), server._accept)
    loop.sharing = server.sharing
    try:
        for begin in companions:
            companion = begin(server)
            if companion is not None:
                loop.companions.append(companion)
    except BaseException:
        loop.close()
        raise
    servers.add(server)
    return loop


class Server:
    """A server with the parameters in force, keywords before what modparam() has set; ConfigError
    if they are wrong.

        server.run()                     serves in this thread until stop() is called
        with server: ...                 start() and stop(): serves in a thread of its own
        server.fileno(), run_once(0)     serves in another program's loop: when the descriptor is
                                         readable, and after timeout() seconds

    It listens from the first call of one of these, of port or url: OSError if it cannot. stop() and
    reload() are for any thread.
    """
    __slots__ = (
        "params", "transport", "access", "heads", "responses", "connections", "room", "counters",
        "disk", "turned_away", "keep_alive", "now", "stopping", "services", "sharing", "_loop",
        "_listeners", "_address", "_thread", "_life", "_ended", "_stop_at", "_kept", "_next_tick")

    # Of this process: bytes held, requests answered, connections accepted.
    held = property(lambda self: self.room.held)
    requests = property(lambda self: self.counters.row[REQUESTS])
    accepted = property(lambda self: self.counters.row[ACCEPTED])

    def __init__(self, **parameters: Any) -> None:
        self.params = params = Limits(**parameters)
        scheme = "https" if params.tls_cert_file else "http"
        self.transport = transports[scheme](params)
        self.access = Access(params)
        self.heads = Heads(params.memo_size, scheme, self.access)
        try:
            self.responses = Responses(params.buf_size)
        except MemoryError:
            raise ConfigError("httpd: memory_budget %d: there is no room for its buffer"
                              % params.memory_budget, "memory_budget") from None
        self.connections: set[Connection] = set()
        self.counters = Counters()
        self.room = Room(self, params)
        self.disk = Disk(params.spool_size, self.room.spare, self.room.make_for)
        self.now = time.monotonic()             # when this turn began
        self.turned_away: deque[Connection] = deque()   # the last ones that there was no place for
        self.keep_alive = params.keep_alive     # seconds: on the hot path
        self.stopping = False                   # every answer closes its connection
        self.services: list[tuple[Service, Any]] = []       # that it runs, and what ends each
        self._loop: Optional[Loop] = None       # while it listens
        self._listeners: list[Listener] = []
        self._address: Optional[tuple[str, int]] = None     # of the first one
        self._thread: Optional[threading.Thread] = None     # that start() has made
        self._life = threading.RLock()          # who claims the loop, and when it ends
        self._ended = threading.Event()
        self.sharing: Optional[Sharing] = None  # of the listeners, with other processes
        self._stop_at = math.inf                # when the grace of stop() ends
        self._kept = 0.0                        # seconds that kept connections get in it
        self._next_tick = 0.0                   # when to look at deadlines

    @property
    def loop(self) -> Loop:
        """What it waits with. RuntimeError if it does not listen."""
        if self._loop is None:
            raise RuntimeError("the server does not listen: it has ended, or not begun")
        return self._loop

    def post(self, request: Request) -> None:
        """A request's resume() was called. Any thread."""
        if (loop := self._loop) is not None:
            loop.mailbox.post(request)

    def is_ours(self) -> bool:
        """Not a copy in a process that a handler has forked."""
        return self._loop is None or self._loop.is_ours()

    def forget(self, connection: Connection) -> None:
        """A connection has ended. Its socket is closed at the end of the turn."""
        self.connections.discard(connection)
        if self.access.most:
            self.access.leave(connection.client()[0])
        loop = self._loop
        if loop is None:                        # a handler has outlasted it
            connection.sock.close()
            return
        loop.forget(connection.sock, connection.interest)
        loop.set_accepting(not self.stopping)
        loop.closing.append(connection.sock)

    def run(self) -> None:
        """Serve in this thread until stop() is called."""
        loop = self._open()
        if loop is None:
            return
        if not self._claim(loop):
            raise RuntimeError("the server runs already")
        self._serve(loop, threading.Event())

    def start(self) -> None:
        """Serve in a thread of its own, once. Returns when it is ready, or RuntimeError."""
        started = threading.Event()
        with self._life:
            loop = None if self._thread is not None else self._open()
            if loop is None or not self._claim(loop):
                raise RuntimeError("a server starts only once: make a new one")
            thread = threading.Thread(target=self._serve, args=(loop, started), name="httpd")
            thread.daemon = True
            self._thread = thread
            thread.start()
        started.wait()
        if not loop.ready:
            raise RuntimeError("the start failed: %s" % loop.failure) from loop.failure

    def stop(self, grace: Optional[float] = None, wait: bool = True, kept: float = 0.0) -> None:
        """Stop listening, let requests finish for at most `grace` seconds (grace_timeout), close.

        It returns when that is done; from a handler, or without `wait`, at once: then whoever runs
        the server goes on until it is. It may be repeated; the shortest grace counts. `kept`:
        seconds that idle connections get for one more request, since another process has the
        listener.
        """
        seconds = self.params.grace_timeout if grace is None else grace
        me = threading.get_ident()
        with self._life:
            self._stop_at = min(self._stop_at, time.monotonic() + seconds + kept)
            self._kept = kept
            loop, thread = self._loop, self._thread
            if loop is None:                                # it never has listened, or it has ended
                self._ended.set()
            if loop is None or not loop.is_ours():
                return
            mine = wait and loop.owner in (None, me) and self._claim(loop)
        loop.mailbox.ring()
        if not wait:
            return
        if mine:
            self._serve(loop, threading.Event())
        elif thread is not None and thread.ident != me:
            thread.join()
        elif loop.owner != me and not self._ended.wait(seconds + 1):
            self._close()               # another thread's loop has not ended in its time

    def _claim(self, loop: Loop) -> bool:
        """Whether the loop is this thread's to turn, from now on."""
        with self._life:
            if loop.turning:
                return False
            loop.turning = True
            loop.owner = threading.get_ident()
            return True

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run_once(self, timeout: Optional[float] = None) -> bool:
        """Wait for something to do, or `timeout` seconds, and do it. True once all is over."""
        loop = self._open()
        if loop is None:
            return True
        if not self._claim(loop):
            raise RuntimeError(
                "run_once() was called by what it runs: a handler must return; it is called "
                "again after SUSPEND and resume()")
        limits = (timeout, self.timeout(), A_DAY)
        try:
            if pending_services and not self.stopping:
                begin_services(self)
            self._turn(loop, min(limit for limit in limits if limit is not None))
        except (OSError, ValueError):
            loop.check_ours()
            raise
        finally:
            loop.turning = False
        if self._drained():
            self._close()
        return self._ended.is_set()

    def fileno(self) -> int:
        """The descriptor for another loop to watch for reading; -1 after stop()."""
        loop = self._open()
        return loop.selector.fileno() if loop is not None else -1

    def timeout(self) -> Optional[float]:
        """Seconds until run_once() has something to do by itself; None: never."""
        loop = self._loop
        if self._ended.is_set():
            return None
        if loop is not None and (loop.greedy or loop.closing):
            return 0.0
        due = math.inf
        if loop is None or self.connections or not loop.accepting:
            due = self._next_tick
        if loop is not None and loop.timers:
            due = min(due, loop.timers[0].due)
        if due == math.inf:
            return None
        return min(A_DAY, max(0.0, due - time.monotonic()))

    @property
    def port(self) -> int:
        """The port that it listens on. RuntimeError if it has ended before."""
        return self._where()[1]

    @property
    def url(self) -> str:
        """Where a client on this machine finds it, such as http://127.0.0.1:8888."""
        return url_of(self.transport.scheme, *self._where())

    def bind(self, inherited: Sequence[Listener] = ()) -> list[Listener]:
        """Have the address, or take over listeners, and open nothing else yet.

        OSError or ConfigError.
        """
        with self._life:
            if not self._listeners:
                self._listeners += inherited or [listen(self.params.ip, self.params.port)]
                self._address = self._listeners[0].address
                warn_of_open_roots(self.params, self._listeners)
            return self._listeners

    def _where(self) -> tuple[str, int]:
        if self._address is None:
            self._open()
        if self._address is None:
            raise RuntimeError("the server was stopped before it has listened: it has no address")
        return self._address

    def watch(self, file: Any, callback: Callable[[], Any], events: int = READ) -> Watch:
        """Call `callback` when `file` is ready for READ or WRITE, until close() of the result.

        For the server's thread, or before it serves.
        """
        self._open()
        watch = Watch(self.loop, file, callback)
        if watch._descriptor in self.loop.callbacks:
            raise ValueError("%r is watched already" % (file,))
        self.loop.add(file, events, watch)
        return watch

    def call_later(self, seconds: float, callback: Callable[[], Any]) -> Timer:
        """Call `callback` after so many seconds, once; close() of the result prevents it.

        For the server's thread, or before it serves.
        """
        if not seconds >= 0:                    # nor is NaN
            raise ValueError("call_later() wants seconds from now on, not %r" % seconds)
        self._open()
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self.loop.timers, timer)
        return timer

    def reload(self) -> bool:
        """Use the certificate, key, CA and password that are in the files now from here on, and
        open the access log again. False if that cannot be: the log says why, and the old ones are
        used on. Any thread.
        """
        params = self.params
        if self._loop is not None:
            for companion in self._loop.companions:
                companion.reload()
        if not params.tls_cert_file and not params.auth_password.startswith("file:"):
            if not params.access_log:
                log.warning("there is nothing to reload: no certificate, password file or log")
            return params.access_log != ""
        try:
            transport = transports[self.transport.scheme](params)
            access = Access(params)
        except ConfigError as error:
            log.error("nothing is loaded anew: %s", error)
            return False
        access.connections = self.access.connections
        self.transport, self.access = transport, access
        self.heads = Heads(params.memo_size, transport.scheme, access)      # what they were told
        log.info("certificate and password have been loaded anew")
        return True

    def _open(self) -> Optional[Loop]:
        """Listen, if it does not yet. None: it has ended."""
        with self._life:                        # the first call may come from two threads
            if self._loop is None and not self._ended.is_set():
                self._loop = loop = listen_with(self)
                loop.set_accepting(True)
            return self._loop

    def _serve(self, loop: Loop, started: threading.Event) -> None:
        loop.owner = threading.get_ident()
        try:
            if self._stop_at == math.inf:
                initialize(self)
            loop.ready = True
            started.set()
            while not self._drained():
                self._turn(loop, self.timeout())
        except BaseException as failure:
            loop.failure = failure
            if isinstance(failure, (OSError, ValueError)):
                loop.check_ours()
            if self._thread is None or loop.ready:
                raise                           # else start() raises it
        finally:
            self._close()
            started.set()

    def _turn(self, loop: Loop, timeout: Optional[float]) -> None:
        """One poll, and a turn for all that is ready."""
        if loop.greedy or loop.closing:
            timeout = 0
        ready = loop.poll.poll(timeout, POLL_BATCH)
        self.now = time.monotonic()
        if self.now >= self._next_tick:
            self.responses.begin_second()
        mailbox = loop.mailbox
        mailbox.busy = True
        try:
            for descriptor, _ in ready:
                callback = loop.callbacks.get(descriptor)
                if callback is not None:                    # else it has ended in this turn
                    callback()
            if self._stop_at < math.inf and not self.stopping:
                self._begin_stop(loop)
            if mailbox.requests:
                mailbox.hand_out()
            if loop.greedy:
                loop.serve_greedy()
            if loop.timers:
                loop.call_due_timers(time.monotonic())
            if self.now >= self._next_tick:     # after them: who has sent something is not late
                self._tick(loop)
        finally:
            mailbox.busy = False
            loop.close_some()
            if mailbox.requests:                            # meanwhile; the next turn is theirs
                mailbox.ring()

    def _tick(self, loop: Loop) -> None:
        """Once a second: an end to what is over its deadline."""
        self._next_tick = min(self.now + 1, max(self._stop_at, self.now + 0.01))
        for connection in self.connections:
            credit(connection)
        late = [connection for connection in self.connections if connection.deadline <= self.now]
        for connection in late[:EXPIRE_BATCH]:
            connection.expire()
        if len(late) > EXPIRE_BATCH:            # a pause of 1 ms, then others have a turn
            self._next_tick = self.now
        self.disk.look()
        loop.set_accepting(not self.stopping)

    def _accept(self, listener: Listener) -> None:
        """Take in those who wait, and answer at once who has sent a request already."""
        loop = self.loop
        for _ in range(ACCEPT_BATCH):
            try:
                sock, peer = listener.accept()
            # mostly BlockingIOError: nobody waits any more
            except OSError as error:
                short = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
                if short and not self.room.make("descriptors"):
                    log.error("nobody is taken in for a second: %s", error)
                    # the listener would be readable all the time
                    loop.set_accepting(False)
                break
            self.counters.row[ACCEPTED] += 1
            connection, before = Connection(self, sock, peer), self.requests
            full = find_full(connection)
            self.connections.add(connection)
            if full:
                turn_away(connection, full)
                continue
            connection.turn()
            if self.requests == before and connection.is_silent():
                connection.deadline -= listener.defer      # it has been silent so long already
        if loop.sharing is not None:
            loop.sharing.look()

    def _begin_stop(self, loop: Loop) -> None:
        """What stop() asks for, in the thread that serves."""
        self.stopping = True
        self._next_tick = self.now
        before = -1
        while before < self.accepted:           # who waits to be taken in may have sent a request
            before = self.accepted
            for listener in loop.listeners:
                self._accept(listener)
        loop.stop_listening()
        if self._kept:
            self.call_later(self._kept, self._stop_connections)
        else:
            self._stop_connections()

    def _stop_connections(self) -> None:
        for connection in list(self.connections):
            connection.stop()

    def _drained(self) -> bool:
        """stop() has been called; nothing is under way any more, or the grace is over."""
        if not self.stopping:
            return False
        if time.monotonic() >= self._stop_at:
            return True
        return all(connection.is_over() for connection in self.connections)

    def _close(self) -> None:
        self.stopping = True                                # nobody is taken in for those that go
        loop = self._loop
        if loop is None or not loop.is_ours():
            return
        loop.stop_listening()
        for connection in list(self.connections):
            connection.close()
        end_services(self)
        self._loop = None
        loop.close()
        servers.discard(self)
        self._ended.set()


# ---------------------------------------------------------------------------------------------- TLS

class TLSPlan(NamedTuple):
    """What a priority string comes to on Python's ssl."""
    versions: tuple[str, ...]       # of TLSv1.2 and TLSv1.3
    ciphers: tuple[str, ...]        # suites of TLS 1.2 by OpenSSL's names, the best first
    suites13: tuple[str, ...]       # suites of TLS 1.3 by IANA's names
    groups: tuple[str, ...]         # by GnuTLS' names, without GROUP-
    server_preference: bool
    tickets: bool
    notes: tuple[str, ...]          # what is not as written, and why


# The ordered sets that a priority string works on, as the level NORMAL has them.
NORMAL = {
    "VERS": "TLS1.3 TLS1.2 TLS1.1 TLS1.0",
    "MAC": "SHA1 AEAD",
    "KX": "ECDHE-ECDSA ECDHE-RSA RSA DHE-RSA",
    "CIPHER": "AES-256-GCM CHACHA20-POLY1305 AES-256-CCM AES-256-CBC "
              "AES-128-GCM AES-128-CCM AES-128-CBC",
    "SIGN": "RSA-SHA256 RSA-PSS-SHA256 RSA-PSS-RSAE-SHA256 ECDSA-SHA256 ECDSA-SECP256R1-SHA256 "
            "EDDSA-ED25519 RSA-SHA384 RSA-PSS-SHA384 RSA-PSS-RSAE-SHA384 ECDSA-SHA384 "
            "ECDSA-SECP384R1-SHA384 EDDSA-ED448 RSA-SHA512 RSA-PSS-SHA512 RSA-PSS-RSAE-SHA512 "
            "ECDSA-SHA512 ECDSA-SECP521R1-SHA512 RSA-SHA1 ECDSA-SHA1",
    "GROUP": "SECP256R1 SECP384R1 SECP521R1 X25519 X448 "
             "FFDHE2048 FFDHE3072 FFDHE4096 FFDHE6144 FFDHE8192",
}
SECURE = {
    "CIPHER": "AES-256-GCM CHACHA20-POLY1305 AES-256-CBC AES-256-CCM "
              "AES-128-GCM AES-128-CBC AES-128-CCM",
}
SECURE256 = {"CIPHER": "AES-256-GCM CHACHA20-POLY1305 AES-256-CBC AES-256-CCM", "MAC": "AEAD",
             "GROUP": "SECP384R1 SECP521R1 FFDHE8192"}
SUITEB192 = {"VERS": "TLS1.2", "CIPHER": "AES-256-GCM", "MAC": "AEAD", "KX": "ECDHE-ECDSA",
             "GROUP": "SECP384R1"}
# What each level has instead, but for the signatures: Python's ssl cannot set them.
LEVELS: dict[str, dict[str, str]] = {
    "NORMAL": {}, "LEGACY": {},
    "PFS": {"KX": "ECDHE-ECDSA ECDHE-RSA DHE-RSA"},
    "PERFORMANCE": {
        "KX": "RSA ECDHE-ECDSA ECDHE-RSA DHE-RSA",
        "CIPHER": "AES-128-GCM AES-256-GCM CHACHA20-POLY1305 AES-128-CCM AES-256-CCM "
                  "AES-128-CBC AES-256-CBC",
    },
    "SECURE": SECURE, "SECURE128": SECURE,
    "SECURE192": SECURE256, "SECURE256": SECURE256,
    "SUITEB192": SUITEB192,
    "SUITEB128": {**SUITEB192, "CIPHER": "AES-256-GCM AES-128-GCM", "GROUP": "SECP256R1 SECP384R1"},
}
# Key exchange unless RSA, cipher, MAC: OpenSSL's name, if there is such a suite.
SUITES = (
    (r"(ECDHE-.+-|)AES-256-GCM AEAD", r"\1AES256-GCM-SHA384"),
    (r"(ECDHE-.+-|)AES-128-GCM AEAD", r"\1AES128-GCM-SHA256"),
    (r"(ECDHE-.+-)CHACHA20-POLY1305 AEAD", r"\1CHACHA20-POLY1305"),
    (r"(ECDHE-ECDSA-|)AES-(128|256)-CCM-?(8?) AEAD", r"\1AES\2-CCM\3"),
    (r"(ECDHE-.+-|)AES-(128|256)-CBC SHA1", r"\1AES\2-SHA"),
    (r"(ECDHE-.+-(?=AES-128)|)AES-(128|256)-CBC SHA256", r"\1AES\2-SHA256"),
    (r"(ECDHE-.+-)AES-256-CBC SHA384", r"\1AES256-SHA384"),
)
SUITES13 = {                            # in OpenSSL's order
    "AES-256-GCM": "TLS_AES_256_GCM_SHA384",
    "CHACHA20-POLY1305": "TLS_CHACHA20_POLY1305_SHA256",
    "AES-128-GCM": "TLS_AES_128_GCM_SHA256",
}
# GnuTLS' name: OpenSSL's.
CURVES = {"SECP256R1": "prime256v1", "SECP384R1": "secp384r1", "SECP521R1": "secp521r1",
          "X25519": "X25519", "X448": "X448"}


def keywords() -> dict[str, tuple[str, list[str]]]:
    """Keyword: the set that it changes, and what it adds or removes there."""
    found: dict[str, tuple[str, list[str]]] = {}
    for kind, names in (
        *NORMAL.items(), ("CIPHER", "AES-256-CCM-8 AES-128-CCM-8"), ("MAC", "SHA256 SHA384")):
        for name in names.split():
            bare = kind in ("CIPHER", "MAC", "KX")
            found[name if bare else kind + "-" + name] = kind, [name]
    for kind, names in NORMAL.items():
        found[kind + "-ALL"] = kind, names.split()
    found["VERS-TLS-ALL"] = "VERS", NORMAL["VERS"].split()
    found["GROUP-EC-ALL"] = "GROUP", list(CURVES)
    found["GROUP-DH-ALL"] = "GROUP", NORMAL["GROUP"].split()[len(CURVES):]
    return found


KEYWORDS = keywords()
REFUSED = "NULL|RSA-EXPORT|ARCFOUR-40|RC2-40|((EC)?DHE-|RSA-)?PSK|SRP(-RSA|-DSS)?|ANON-(EC)?DH"
SKIPPED = REFUSED + r"""
    | VERS-(SSL3\.0|DTLS(0\.9|1\.[02]|-ALL)) | DHE-DSS | MD5 | SHA(224|512) | ARCFOUR-128
    | (3DES|DES|AES-192|CAMELLIA-(128|192|256))-CBC | (AES-192|CAMELLIA-(128|256))-GCM
    | GROUP-(SECP(192|224)R1|GC.+)
    | SIGN-((RSA|DSA|ECDSA)-SHA(3-)?(1|224|256|384|512) | RSA-(RAW|RMD160|MD[25])) | .*GOST.*
    | COMP-.* | CTYPE-((CLI-|SRV-)?(ALL|X\.?509|RAWPK) | OPENPGP)"""
# None asks for more than PROFILE_MEDIUM, which is OpenSSL's security level 2.
OPTIONS = (
    "SERVER_PRECEDENCE|NO_(TICKETS(_TLS12)?|EXTENSIONS|ETM|SESSION_HASH)|"
    "((UN|DISABLE_)?SAFE|PARTIAL)_RENEGOTIATION|COMPAT|NEW_PADDING|STATELESS_COMPRESSION|"
    "(LATEST|SSL3)_RECORD_VERSION|ALLOW_SMALL_RECORDS|FALLBACK_SCSV|DUMBFW|"
    "DISABLE_(WILDCARDS|TLS13_COMPAT_MODE)|DEBUG_ALLOW_KEY_USAGE_VIOLATIONS|"
    "PROFILE_(VERY_WEAK|LOW|LEGACY|MEDIUM)|"
    "VERIFY_(ALLOW_(BROKEN|SIGN_RSA_MD5|SIGN_WITH_SHA1|X509_V1_CA_CRT)|DISABLE_CRL_CHECKS)")
EXAMPLE = "for example NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"


class Priority:
    """A priority string under way through GnuTLS' rules: ordered sets by kind."""

    def __init__(self, none: bool) -> None:
        self.sets: dict[str, dict[str, None]] = {}      # dicts for their order
        for kind, names in NORMAL.items():
            starts_full = kind in ("VERS", "SIGN", "GROUP") and not none
            self.sets[kind] = dict.fromkeys(names.split() if starts_full else ())
        self.replace = not none         # the first level without a sign replaces what is there
        self.words: set[str] = set()
        self.notes: list[str] = []

    def read(self, sign: str, word: str) -> str:
        """Have an item change the sets. Returns what there is to note, or ConfigError."""
        self.words.add(word)
        if sign in ("", "+") and word in LEVELS:
            self.apply_level(sign, word)
        elif sign in ("+", "-") and word in KEYWORDS:
            self.apply_keyword(sign, word)
        elif sign == "%":
            if not re.fullmatch(OPTIONS, word):
                raise ConfigError(
                    "is unknown, or cannot be enforced with Python's ssl: leave it out")
        elif sign in ("+", "-"):
            return read_unsupported(sign, word)
        else:
            refuse_item(sign, word)
        return ""

    def apply_level(self, sign: str, word: str) -> None:
        for kind, names in {**NORMAL, "VERS": "", **LEVELS[word]}.items():
            added = dict.fromkeys(names.split())
            if self.replace and names and not sign:
                self.sets[kind] = added
            else:
                self.sets[kind] = {**self.sets[kind], **added}
        if not sign:
            self.replace = False

    def apply_keyword(self, sign: str, word: str) -> None:
        kind, names = KEYWORDS[word]
        if sign == "+":
            self.sets[kind] = {**self.sets[kind], **dict.fromkeys(names)}
        elif word == kind + "-ALL":
            self.sets[kind] = {}
        else:
            kept = [name for name in self.sets[kind] if name not in names]
            self.sets[kind] = dict.fromkeys(kept)


def read_unsupported(sign: str, word: str) -> str:
    """A keyword that Python's ssl has nothing for: what there is to note."""
    if sign == "+" and re.fullmatch(REFUSED, word):
        raise ConfigError("is refused: connections need encryption and a certificate")
    if re.fullmatch(SKIPPED, word, re.VERBOSE):
        noted = sign == "+" and not word.startswith(("COMP-", "CTYPE-"))
        if noted:
            return "skipped, Python's ssl has nothing of the kind"
        return ""
    if word.startswith(("CIPHER-", "MAC-", "KX-")):
        return "ignored, as by GnuTLS" + nearest(word.partition("-")[2], KEYWORDS)
    refuse_item(sign, word)
    return ""


def refuse_item(sign: str, word: str) -> None:
    """ConfigError for what is no item of a priority string."""
    if sign == "@" and not word.startswith(("SECLEVEL", "STRENGTH")):
        raise ConfigError(
            "there is no system priority file here: write the string itself, " + EXAMPLE)
    if not sign and not word:
        raise ConfigError('is empty: fill it in or take out a ":"')
    if not sign and (word in KEYWORDS or word == "NONE"):
        raise ConfigError("needs + or -, or to be first")
    hint = nearest(word, KEYWORDS if sign else LEVELS)
    raise ConfigError(
        "is unknown" + (hint or "; if it is OpenSSL's language, write it in GnuTLS', " + EXAMPLE))


def read_priority(text: str) -> Priority:
    """The sets as GnuTLS reads the string."""
    items = [item.lstrip(" ") for item in text.lstrip().split(":")]
    none = items[0].upper() == "NONE"
    priority = Priority(none)
    for number, item in enumerate(items, 1):
        if none and number == 1:
            continue
        shown = repr(item)[1:-1]            # a line end in it would forge a line
        sign, word = "", item
        if item.startswith(tuple("-+!%@")):
            sign, word = item[0], item[1:]
        if sign != "%":
            word = re.sub("^CURVE-", "GROUP-", word.upper())
        try:
            note = priority.read(sign.replace("!", "-"), word)
        except ConfigError as error:
            raise ConfigError(
                'tls_ciphers item %d, "%s": %s' % (number, shown, error), "tls_ciphers") from None
        if note:
            priority.notes.append('item %d, "%s": %s' % (number, shown, note))
    return priority


def protocols_of(priority: Priority) -> list[str]:
    """The protocols that GnuTLS would offer."""
    sets = priority.sets
    protocols = [name for name in sets["VERS"] if sets["SIGN"] or name < "TLS1.2"]
    gap = "TLS1.2" not in protocols and ("TLS1.1" in protocols or "TLS1.0" in protocols)
    if gap or not sets["GROUP"] or "NO_EXTENSIONS" in priority.words:
        protocols = [name for name in protocols if name != "TLS1.3"]
    return protocols


def suites_of(priority: Priority, protocols: Collection[str]) -> dict[str, list[str]]:
    """The suites of TLS 1.2 (OpenSSL's names, no finite-field DHE) and 1.3 that Python has."""
    sets = priority.sets
    suites: list[str] = []
    if "TLS1.2" in protocols:
        for exchange in sets["KX"]:
            prefix = "" if exchange == "RSA" else exchange + "-"
            for cipher in sets["CIPHER"]:
                for mac in sets["MAC"]:
                    suites += suites_named("%s%s %s" % (prefix, cipher, mac))
    suites13: list[str] = []
    if "TLS1.3" in protocols and "AEAD" in sets["MAC"]:
        suites13 = [SUITES13[name] for name in sets["CIPHER"] if name in SUITES13]
    if not any(name in CURVES for name in sets["GROUP"]):
        suites = [name for name in suites if not name.startswith("ECDHE-")]
        suites13 = []
    return {"TLSv1.2": suites, "TLSv1.3": suites13}


def suites_named(triple: str) -> list[str]:
    """OpenSSL's name for key exchange, cipher and MAC, if it has them."""
    for pattern, name in SUITES:
        if re.fullmatch(pattern, triple):
            return [re.sub(pattern, name, triple)]
    return []


def curves_to_set(versions: Collection[str], groups: Collection[str], several: bool) -> list[str]:
    """OpenSSL's names of the groups to set, one unless `several`; none: its default is right."""
    # With TLS 1.3 the default has finite-field groups: a replayed ClientHello that asks for
    # ffdhe8192 costs 120 ms and its sender nothing (D(HE)at, CVE-2002-20001). So one curve is set
    # then, P-256 if it is enabled, since every client has it.
    curves = [CURVES[name] for name in groups if name in CURVES]
    if several:
        return curves
    if "TLSv1.3" in versions:
        curves.sort(key="prime256v1".__ne__)        # it comes first
    elif len(curves) == len(CURVES):
        return []
    return curves[:1]


def check_suites13(suites: list[str]) -> bool:
    """Whether the server's preference must enforce a part of TLS 1.3's suites; ConfigError."""
    best = list(SUITES13.values())[:len(suites)]
    if set(suites) != set(best):
        raise ConfigError("tls_ciphers: Python's ssl cannot offer only %s for TLS 1.3: enable %s, "
                          "or write -VERS-TLS1.3"
                          % (" and ".join(suites), ", ".join(SUITES13)),
                          "tls_ciphers")
    return 0 < len(suites) < len(SUITES13)


def tls_priority(text: str) -> TLSPlan:
    """Read a GnuTLS priority string as gnutls-cli 3.7.9 does; without finite-field DHE.

    ConfigError: a mistake, nothing left, or a restriction that Python's ssl cannot enforce.
    """
    priority = read_priority(text)
    words, notes = priority.words, priority.notes
    groups = tuple(priority.sets["GROUP"])
    protocols = protocols_of(priority)
    suites = suites_of(priority, protocols)
    versions = tuple(version for version in suites if suites[version])
    if not versions:
        raise ConfigError(
            "tls_ciphers: leaves nothing of TLS 1.2 and 1.3 that Python's ssl could offer, "
            + EXAMPLE,
            "tls_ciphers")
    partial = check_suites13(suites["TLSv1.3"])
    for name in protocols:
        if "TLSv" + name[3:] not in versions:
            notes.append("%s: skipped, too old or no suite left" % name)
    if re.search(r"\b(SIGN-(?!ALL)|SECURE192|SECURE256|SUITEB)", " ".join(words)):
        notes.append("signatures: as OpenSSL likes, Python's ssl cannot restrict them")
    curves = [name for name in groups if name in CURVES]
    one = curves_to_set(versions, groups, several=False)
    if one and len(curves) > 1:
        first = next(name for name in curves if CURVES[name] == one[0])
        notes.append("groups: before Python 3.15, which can set several, only %s" % first)
    tickets = words.isdisjoint(("PFS", "NO_TICKETS", "NO_TICKETS_TLS12"))
    return TLSPlan(versions, tuple(suites["TLSv1.2"]), tuple(suites["TLSv1.3"]), groups,
                   partial or "SERVER_PRECEDENCE" in words, tickets, tuple(notes))


# ssl.VERIFY_X509_PARTIAL_CHAIN, which has a name from Python 3.10 on
PARTIAL_CHAIN = 0x80000
_MISMATCH = "the key does not belong to the certificate"
HINTS = {  # OpenSSL's reason: what it means here
    "KEY_VALUES_MISMATCH": _MISMATCH,
    "NO_CERTIFICATE_ASSIGNED": _MISMATCH,
    "EE_KEY_TOO_SMALL": "the key is too weak: make one of RSA with 2048 bits, or of "
                         "ECDSA with P-256",
    "NO_SHARED_CIPHER": "no client could connect: tls_ciphers has no suite for the "
                        "certificate's type of key",
    "UNKNOWN_GROUP": "Python before 3.11 cannot set X25519 and X448: put another group first",
}


def tls_context(plan: TLSPlan, cert_file: str, key_file: str, ca_file: str = "") -> ssl.SSLContext:
    """An ssl.SSLContext for the plan, less what OpenSSL's security level hides; `ca_file`: clients
    need certificates.

    ConfigError: a file that will not do, or no client could connect. Warns of an open key, an
    expired certificate.
    """
    import ssl                          # 8 ms that plain HTTP need not pay
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion[plan.versions[0].replace(".", "_")]
    context.maximum_version = ssl.TLSVersion[plan.versions[-1].replace(".", "_")]
    context.options |= ssl.OP_NO_COMPRESSION | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if not plan.server_preference:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if not plan.tickets:    # with OP_NO_TICKET alone, TLS 1.3 sends handles of state that it keeps
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    with explained("tls_ciphers", "tls_ciphers"):
        set_algorithms(context, plan)
    check_pem("tls_cert_file", cert_file, b"CERTIFICATE")
    check_pem("tls_key_file", key_file, b"PRIVATE KEY")
    with explained(
        "tls_cert_file", "tls_cert_file %s with tls_key_file %s" % (cert_file, key_file)):
        # without one, OpenSSL would ask the terminal
        context.load_cert_chain(cert_file, key_file, password="")
        try_handshake(context, cert_file)
    if ca_file:
        check_pem("tls_ca_file", ca_file, b"CERTIFICATE")
        with explained("tls_ca_file", "tls_ca_file %s" % ca_file):
            context.load_verify_locations(ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= PARTIAL_CHAIN           # an intermediate CA will do
    return context


@contextmanager
def explained(parameter: str, subject: str) -> Iterator[None]:
    """What OpenSSL says, as a ConfigError that says what to do."""
    try:
        yield
    # SSLError, or a file has gone since check_pem()
    except OSError as error:
        reason = getattr(error, "reason", None) or ""
        hint = HINTS.get(reason, "damaged? OpenSSL says %s" % error)
        raise ConfigError("%s: %s" % (subject, hint), parameter) from None


def set_algorithms(context: ssl.SSLContext, plan: TLSPlan) -> None:
    set_groups = getattr(context, "set_groups", None)   # from Python 3.15 on
    curves = curves_to_set(plan.versions, plan.groups, several=set_groups is not None)
    if plan.ciphers:
        # names, never a string that OpenSSL would interpret
        context.set_ciphers(":".join(plan.ciphers))
    if set_groups is not None:
        set_groups(":".join(curves))
    elif curves:
        context.set_ecdh_curve(curves[0])


def check_pem(parameter: str, path: str, kind: bytes) -> None:
    """load_cert_chain() does not say which file it dislikes."""
    try:
        with open(path, "rb") as file:
            content, mode = file.read(), os.fstat(file.fileno()).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            "%s: %s cannot be read: %s" % (parameter, path, reason), parameter) from None
    if not re.search(b"-----BEGIN [A-Z0-9 ]*%s-----" % kind, content):
        raise ConfigError("%s: %s has no BEGIN %s: is it the right file, in PEM?"
                          % (parameter, path, kind.decode()),
                          parameter)
    if kind == b"PRIVATE KEY":
        if re.search(b"BEGIN ENCRYPTED|Proc-Type: 4,ENCRYPTED", content):
            raise ConfigError(
                "%s: %s is encrypted: remove the password with `openssl pkey`" % (parameter, path),
                parameter)
        if mode & 0o004:
            log.warning("%s: %s can be read by everybody: chmod o-r", parameter, path)


def try_handshake(context: ssl.SSLContext, cert_file: str) -> None:
    """Handshake with a client that takes all suites, until it has checked the certificate."""
    import ssl
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= PARTIAL_CHAIN
    client.load_verify_locations(cert_file)
    client.set_ciphers("ALL:@SECLEVEL=0")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(down, up)
    answering = context.wrap_bio(up, down, server_side=True)
    try:
        for side in (asking, answering, asking, answering, asking):     # it may be asked to retry
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        log.warning(
            "tls_cert_file: %s: clients will refuse it: %s", cert_file, error.verify_message)


# The two times of a certificate's validity, as they follow each other in DER (RFC 5280, 4.1.2.5).
VALIDITY = re.compile(rb"[\x17\x18].[0-9]+Z[\x17\x18].([0-9]+)Z")


def certificate_end(cert_file: str) -> float:
    """When the first certificate of a file expires, in seconds since 1970; 0: it does not say."""
    import calendar
    import ssl
    with open(cert_file, encoding="latin-1") as file:
        pem = re.search("-----BEGIN CERT.*?-----END CERTIFICATE-----", file.read(), re.DOTALL)
    found = pem and VALIDITY.search(ssl.PEM_cert_to_DER_cert(pem[0]))
    if not found:
        return 0
    digits = found[1].decode()
    if len(digits) == 12:                               # RFC 5280, 4.1.2.5.1: two of the year
        digits = ("20" if digits < "50" else "19") + digits
    return calendar.timegm(time.strptime(digits, "%Y%m%d%H%M%S"))


def tls_transport(params: Limits) -> Transport:
    """HTTPS, with the certificate, key and CA that are in the files now; ConfigError."""
    import ssl
    plan = tls_priority(params.tls_ciphers)
    if plan.notes:
        skipped = any("skipped" in note for note in plan.notes)
        say = log.warning if skipped else log.info
        say("tls_ciphers: %s", "; ".join(plan.notes))
    context = tls_context(plan, params.tls_cert_file, params.tls_key_file, params.tls_ca_file)

    class RecordSocket(ssl.SSLSocket):
        """Sends 16 KiB at a time: ssl does not tell how much of a larger piece has left."""
        recv = ssl.SSLSocket.read  # type: ignore[assignment]  # a layer of Python less

        def send(self, data: Any, flags: int = 0) -> int:
            return self.write(data[:RECEIVE_SIZE])

    context.sslsocket_class = RecordSocket
    would_block = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    wants: dict[type[Exception], int] = {ssl.SSLWantReadError: READ, ssl.SSLWantWriteError: WRITE}
    return Transport("https", greet, would_block, wants, RECEIVE_SIZE, context, plan,
                     certificate_end(params.tls_cert_file))


checks["priority"] = tls_priority
transports["https"] = tls_transport


# ------------------------------------------------------------------------------------------ mi_http
# OpenSIPS' management interface: JSON-RPC 2.0 by POST, and the commands that every server has.

POOL_WAITING = 1000         # jobs that wait for a thread: more are refused


class Job:
    """What a thread does. `owner` gives for whom, or None: he is gone, and nobody wants it."""

    def __init__(self, owner: Callable[[], Any], work: Callable[[Any], None]) -> None:
        self.owner = owner
        self.work = work

    def is_wanted(self) -> bool:
        return self.owner() is not None

    def __call__(self) -> None:
        owner = self.owner()
        if owner is not None:
            self.work(owner)


class Pool:
    """A few threads for what takes long, and a queue of at most `waiting` jobs before them.

    They start when there is work, again in a forked process, and keep no program from ending.
    """

    def __init__(self, size: int, waiting: int = POOL_WAITING) -> None:
        self.size = size
        self.waiting = waiting
        self._begin()

    def _begin(self) -> None:
        self.pid = os.getpid()
        self.started = 0
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.new: list[Job] = []                # of this turn of the loop, and not in the queue yet
        self.lock = threading.Lock()            # two servers may share a pool

    def is_full(self) -> bool:
        if self.jobs.qsize() >= self.waiting:
            self._forget_unwanted()
        return self.jobs.qsize() + len(self.new) >= self.waiting

    def _forget_unwanted(self) -> None:
        with suppress(queue.Empty):             # a thread has been faster
            for _ in range(self.jobs.qsize()):
                job = self.jobs.get_nowait()
                if job.is_wanted():
                    self.jobs.put(job)

    def submit(self, job: Job, server: Optional[Server] = None) -> None:
        """Have a thread do it, after this turn of a server's loop. It sees to its own exceptions.

        In the middle of a turn each recv() and send() would let a thread have the interpreter, and
        wait to get it back: 7 us a request.
        """
        if self.pid != os.getpid():             # a fork copies no threads
            self._begin()
        with self.lock:
            if self.started < self.size:
                self._start_thread()
            self.new.append(job)
            first = len(self.new) == 1
        if server is None:
            self._put()
        elif first:
            server.call_later(0, self._put)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, args=(self.jobs,), name="httpd-pool")
        thread.daemon = True
        thread.start()
        self.started += 1

    def _put(self) -> None:
        with self.lock:
            new, self.new = self.new, []
        for job in new:
            self.jobs.put(job)

    def _work(self, jobs: queue.SimpleQueue[Job]) -> None:
        while True:
            call_safely("a job of a thread", jobs.get())


class Command(NamedTuple):
    """An MI command."""
    function: Callable[..., Any]
    threads: bool = False               # it wants a thread of the pool


class Asker(Protocol):
    """Who has sent calls: a Request, or a line of the FIFO."""

    @property
    def counters(self) -> Counters:
        """Where the commands are counted."""

    def resume(self) -> None:
        """Called from any thread when a thread has brought an answer."""


class Call(NamedTuple):
    """One JSON-RPC request, as far as it is one."""
    fault: str                          # why it is none; empty: it is one
    method: str
    command: Optional[Command]
    params: Any                         # a list or a dict
    ident: str                          # for the answer, as JSON
    answered: bool                      # it is no notification


class Calls(NamedTuple):
    """What one text asks for."""
    members: list[Call]
    alone: bool                         # it is no batch, but a call by itself


class MIError(Exception):
    """A JSON-RPC error."""

    def __init__(self, code: int, message: str, data: str = "") -> None:
        super().__init__(code, message, data)
        self.code = code
        self.message = message
        self.data = data


mi_commands: dict[str, Command] = {}
encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_INT = "-?(0|[1-9][0-9]{0,17})"
_FLOAT = _INT + "([.][0-9]{1,17})?"
# by annotation, which may be text
NUMBERS = {int: _INT, "int": _INT, float: _FLOAT, "float": _FLOAT}
STARTED = time.time()
MI_BATCH = 100                          # calls in one batch
PARSE_ERROR = "Parse error"
MI_TYPES = (JSON, "text/xml")           # the second for old clients
NOTE_SIZE = 200                         # characters of their names that the access log is told
ODD = re.compile("[^A-Za-z0-9_.:-]")    # in the name of a command


def register_mi(name: str, function: Callable[..., Any], *, threads: bool = False) -> None:
    """Add an MI command, a function that returns what JSON can say; its signature counts.

    Text for a parameter annotated int or float becomes a number. HTTPError(404, "no such dialog")
    is the command's own error. With threads=True it runs in one of mi_http's threads, else nobody
    else is served meanwhile. ConfigError: the name is taken, or it is no function. Any thread.
    """
    named = isinstance(name, str) and re.fullmatch("[A-Za-z0-9_.:-]+", name)
    if not named or name in mi_commands:
        raise ConfigError('MI command "%s": the name is taken, or not made of letters, digits and '
                          '_.:-' % (name,))
    check_function('MI command "%s"' % name, function)
    mi_commands[name] = Command(function, threads)


@functools.lru_cache(maxsize=None)
def mi_pool() -> Pool:
    """The threads for commands that want one. They are made when the first one comes."""
    return Pool(in_force("mi_http")["threads"])


@functools.lru_cache(maxsize=None)
def mi_signature(function: Callable[..., Any]) -> inspect.Signature:
    import inspect                      # 10 ms
    return inspect.signature(function)


@functools.lru_cache(maxsize=None)
def needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether it can be called without an argument."""
    parameters = mi_signature(function).parameters.values()
    return all(parameter.default is not parameter.empty for parameter in parameters)


def call_command(function: Callable[..., Any], given: Any) -> Any:
    """What a command returns. MIError if the parameters are not what its signature says."""
    if not given and needs_nothing(function):
        return function()
    signature = mi_signature(function)
    try:
        if isinstance(given, list):
            bound = signature.bind(*given)
        else:
            bound = signature.bind(**given)
        for name, value in bound.arguments.items():
            bound.arguments[name] = convert_argument(
                name, value, signature.parameters[name].annotation)
    except TypeError as error:
        raise MIError(-32602, "Invalid params", str(error)) from None
    return function(*bound.args, **bound.kwargs)


def convert_argument(name: str, value: Any, annotation: Any) -> Any:
    """opensips-cli sends every value as text: a number, where the command wants one."""
    pattern = NUMBERS.get(annotation) if isinstance(value, str) else None
    if pattern is None:
        return value
    if not re.fullmatch(pattern, value):
        raise TypeError("%s must be a number, not %r" % (name, value))
    return json.loads(value)


def find_fault(value: Any) -> str:
    """Why a member of a batch, or what is no batch, is no call; empty: it is one."""
    if not isinstance(value, dict):
        return "a call must be an object"
    if value.get("jsonrpc") != "2.0":
        return 'jsonrpc must be "2.0"'
    if not isinstance(value.get("method"), str):
        return "method must be text"
    if not isinstance(value.get("params", {}), (dict, list)):
        return "params must be an array or an object"
    ident = value.get("id")
    if type(ident) is not int and not is_ident(ident):
        return "id must be text, a number or null"
    return ""


def is_ident(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)             # 1e999 is not
    return not isinstance(value, (bool, dict, list))


def no_call(fault: str) -> Call:
    return Call(fault, "", None, {}, "null", True)


def read_call(value: Any) -> Call:
    """One member of a batch, or what is no batch."""
    fault = find_fault(value)
    if not isinstance(value, dict):
        return no_call(fault)
    ident, method = value.get("id"), value.get("method")
    text = "null"
    if type(ident) is int:
        text = str(ident)               # a third of the price
    elif is_ident(ident):
        text = encode_json(ident)
    command = None
    if not fault:
        command = mi_commands.get(str(method))
    given = value.get("params", {})
    return Call(fault, str(method), command, given, text, "id" in value or fault != "")


def read_calls(content: bytes) -> Calls:
    """What a text asks for; what cannot be read is a call with a fault."""
    try:
        text = content.decode()
        end = 0
        if text.startswith("{"):    # nearly always: without blanks around it for half the price
            value, end = json_decoder.raw_decode(text)
        if end < len(text) or not text:
            value = json_decoder.decode(text)
    except (ValueError, RecursionError):
        return Calls([no_call(PARSE_ERROR)], True)
    if not isinstance(value, list) or not value:
        return Calls([read_call(value)], True)
    if len(value) > MI_BATCH:
        return Calls([no_call("more than %d calls" % MI_BATCH)], True)
    return Calls([read_call(member) for member in value], False)


def names_for_log(calls: Calls) -> str:
    """The commands. What is none must look like neither another name nor several."""
    names = []
    for call in calls.members:
        name = call.method
        if call.command is None:
            name = ODD.sub("?", name[:NOTE_SIZE])
        names.append(name)
    return ",".join(names)[:NOTE_SIZE]


def perform(call: Call, asker: Asker, in_thread: bool = False) -> str:
    """Carry a call out. Returns the response; empty for a notification."""
    try:
        if call.fault == PARSE_ERROR:
            raise MIError(-32700, PARSE_ERROR)
        if call.fault:
            raise MIError(-32600, "Invalid Request", call.fault)
        if call.command is None:
            raise MIError(-32601, "Method not found")
        result = encode_json(call_command(call.command.function, call.params))
        asker.counters.add("httpd_mi_commands_total", call.method, "ok")
        if not call.answered:
            return ""
        return '{"jsonrpc":"2.0","result":%s,"id":%s}' % (result, call.ident)
    except BaseException as error:
        forked = not all(server.is_ours() for server in servers)
        if forked or isinstance(error, KeyboardInterrupt) and not in_thread:
            raise
        return refuse_call(call, asker, describe_fault(call, error))


def refuse_call(call: Call, asker: Asker, fault: dict[str, Any]) -> str:
    name = ""
    if call.command is not None:
        name = call.method
    asker.counters.add("httpd_mi_commands_total", name, "error")
    if not call.answered:
        return ""
    return '{"jsonrpc":"2.0","error":%s,"id":%s}' % (encode_json(fault), call.ident)


def describe_fault(call: Call, error: BaseException) -> dict[str, Any]:
    """The error object of JSON-RPC for what a command has raised."""
    if isinstance(error, HTTPError):
        with suppress(Exception):               # it may be made badly: then it is a fault itself
            error = MIError(int(error.status), str(error.reason))
    if not isinstance(error, MIError):
        log.error("the MI command %s failed", call.method, exc_info=error)
        error = MIError(
            -32000, "Server error", "the command failed, the log of the server says why")
    described = {"code": error.code, "message": error.message}
    if error.data:
        described["data"] = error.data
    return described


class Batch:
    """Calls that are carried out, and their answers, of which threads bring some."""

    def __init__(self, calls: Calls, asker: Asker) -> None:
        self.asker = asker
        self.calls = calls
        self.answers = [self.begin(call) for call in calls.members]     # None: it is not there yet
        if None in self.answers:
            self.submit(list(self.answers))         # a copy: threads are going to be at work

    def submit(self, answers: list[Optional[str]]) -> None:
        """Have threads bring the answers that are not there."""
        for number, answer in enumerate(answers):
            if answer is None:
                mi_pool().submit(Job(lambda: self, functools.partial(Batch.bring, number=number)))

    def begin(self, call: Call) -> Optional[str]:
        """The answer; None if it wants a thread."""
        if call.command is None or not call.command.threads:
            return perform(call, self.asker)
        if not mi_pool().is_full():
            return None
        fault = {"code": -32000, "message": "Too many commands wait for a thread"}
        return refuse_call(call, self.asker, fault)

    def bring(self, number: int) -> None:
        """In a thread: carry out one of the calls."""
        try:
            self.answers[number] = perform(self.calls.members[number], self.asker, in_thread=True)
        finally:
            self.asker.resume()

    def text(self) -> Optional[str]:
        """What is sent; None: it is not complete."""
        if self.calls.alone:
            return self.answers[0]
        answers = list(self.answers)
        if None in answers:
            return None
        members = [answer for answer in answers if answer]
        if not members:
            return ""
        return "[%s]" % ",".join(members)


def is_from_own_page(request: Request) -> bool:
    """Whether the page that sends a request comes from this server (RFC 6454, 4).

    A proxy may have taken TLS off: https of the same host name is this server too.
    """
    headers = request.headers
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    if "origin" not in headers:
        return True
    try:
        origin = urlsplit(headers["origin"])
        own = urlsplit("//" + request.host)
        theirs, ours = DEFAULT_PORTS[origin.scheme], DEFAULT_PORTS[request.scheme]
        same_port = (origin.port or theirs) == (own.port or ours)
    except (KeyError, ValueError):
        return False
    if origin.hostname is None or origin.hostname != own.hostname:
        return False
    return same_port or origin.scheme == "https" and request.scheme == "http"


def check_mi_request(request: Request) -> None:
    """The type, and the page, keep other web sites from posting commands."""
    if request.media_type not in MI_TYPES:
        raise HTTPError(415, "the Content-Type must be application/json")
    if request.from_page and not is_from_own_page(request):
        raise HTTPError(403, "pages of another origin may not send commands")


def spool_answer(answer: bytes, request: Request, page: Page) -> None:
    """Keep an answer that is larger than the page, for flush_spool()."""
    request.state = Spool(request.disk)
    try:
        request.state.write(answer)
    except OSError as error:
        request.disk.complain(error)
        raise HTTPError(500, "done, but the answer cannot be sent: no room is left, "
                             "see spool_size") from None
    page.set_header("Content-Length", len(answer))


def flush_spool(request: Request, pos: int, buf: memoryview) -> int:
    """The flush_data_cb, for an answer that was larger than the page."""
    spool: Spool = request.state
    request.kept = spool.in_memory
    piece = spool.read(pos, len(buf))
    buf[:len(piece)] = piece
    return len(piece) or END


class MIRoot:
    """The callbacks of mi_http. JSON-RPC errors travel on 200."""

    def __init__(self, pretty: bool) -> None:
        self.pretty = pretty

    def answer(self, request: Request, page: Page) -> int:
        """The access handler."""
        answer: Optional[Batch] = request.state
        if answer is None:
            check_mi_request(request)
            calls = read_calls(request.body)
            if observers:               # nobody else reads it
                request.note = names_for_log(calls)
            answer = Batch(calls, request)
        text = answer.text()
        if text is None:
            request.state = answer
            return SUSPEND
        if not text:
            page.set_header("Content-Length", 0)
            return 202
        if self.pretty:
            with suppress(RecursionError):      # nested too deeply for that: as it is
                text = json.dumps(json.loads(text), indent=4)
        try:
            page.write(text)
        except BufferError:
            spool_answer(text.encode(), request, page)
        return 200


def mi_which(command: Optional[str] = None) -> list[Any]:
    """All commands; or one command's possible parameter lists, for opensips-cli's completion."""
    if command is None:
        return sorted(mi_commands)
    if not isinstance(command, str) or command not in mi_commands:
        raise HTTPError(404, "unknown MI command")
    parameters = mi_signature(mi_commands[command].function).parameters.values()
    names = [parameter.name for parameter in parameters]
    required = sum(parameter.default is parameter.empty for parameter in parameters)
    return [names[:count] for count in range(required, len(names) + 1)]


def chosen_cells(statistics: Any) -> list[int]:
    """Those that are asked for, as `all`, `httpd:` or `name`, also in lists of lists."""
    wanted, left = set(), [statistics]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        else:
            wanted.add(str(value))
    found = []
    for cell, name in enumerate(CELLS):
        if not wanted.isdisjoint(("all", "httpd:", "httpd:" + name, name)):
            found.append(cell)
    if not found:
        raise HTTPError(404, "Statistics Not Found")
    return found


def mi_get_statistics(statistics: Any) -> dict[str, int]:
    """Values by `group:name`, of all servers of this program, since the last reset."""
    values = dict.fromkeys(chosen_cells(statistics), 0)
    for server in tuple(servers):
        measure(server)
        totals, taken_off = server.counters.totals(), server.counters.taken_off
        for cell in values:
            values[cell] += totals[cell] - taken_off[cell]
    return {"httpd:" + CELLS[cell]: value for cell, value in values.items()}


def mi_list_statistics(statistics: Any = "all") -> dict[str, str]:
    """Which there are, and whether they are counters, in OpenSIPS' words."""
    found = {}
    for cell in chosen_cells(statistics):
        kind = "incremental"
        if cell >= CONNECTIONS:
            kind = "non-incremental"
        found["httpd:" + CELLS[cell]] = kind
    return found


def mi_reset_statistics(statistics: Any) -> str:
    """Counters begin at 0 again, but only for MI."""
    for cell in chosen_cells(statistics):
        for server in tuple(servers):
            if cell < CONNECTIONS:
                server.counters.taken_off[cell] = server.counters.totals()[cell]
    return "OK"


def mi_list_root_path() -> list[dict[str, str]]:
    """All roots, the newest first."""
    newest_first = reversed(list(roots.values()))
    return [{"http_root": root.name, "module": root.module} for root in newest_first]


def mi_uptime() -> dict[str, str]:
    passed = time.time() - STARTED
    return {"Now": time.ctime(), "Up since": time.ctime(STARTED), "Up time": "%d [sec]" % passed}


def process_ids(server: Server) -> list[int]:
    """Of the processes that share its address."""
    found = [row[PROCESS] for row in server.counters.rows if row[PROCESS]]
    return found or [os.getpid()]


def mi_ps() -> dict[str, list[dict[str, Any]]]:
    processes: list[dict[str, Any]] = []
    for server in servers:
        for pid in process_ids(server):
            process = {"ID": len(processes), "PID": pid, "Type": "HTTPD " + server.url}
            processes.append(process)
    return {"Processes": processes}


def load_mi_http(parameters: dict[str, Any]) -> None:
    mi_root = MIRoot(parameters["pretty_printing"] == 1)
    register_httpdcb("mi_http", parameters["root"], mi_root.answer, flush_spool,
                     methods=("POST",), content_type=JSON, management=True)


BUILT_IN["mi_http"] = load_mi_http
# register_mi() would import inspect, 4 ms of every program's start.
mi_commands.update({
    "httpd_list_root_path": Command(mi_list_root_path),
    "httpd:list_root_path": Command(mi_list_root_path),
    "which": Command(mi_which),
    "get_statistics": Command(mi_get_statistics),
    "list_statistics": Command(mi_list_statistics),
    "reset_statistics": Command(mi_reset_statistics),
    "version": Command(lambda: {"Server": "httpd.py " + __version__}),
    "uptime": Command(mi_uptime),
    "ps": Command(mi_ps)})


# ------------------------------------------------------------------------------------------ mi_fifo
# MI as opensips-cli speaks it without options: `:reply_name:JSON` is written into one FIFO, and the
# answer is read from the FIFO of that name in reply_dir, which the client has made. A command has
# at most post_buf_size bytes, and request_timeout to be whole, and its client as long to read on.

FIFO_ANSWERS = 32           # commands under way: more wait in the FIFO, and their writers with them
FIFO_PAUSE = 0.01           # seconds until it is looked at again then
FIFO_PIECE = 2**16          # bytes of an answer that are written at a time
REPLY_PAUSE = 0.001         # seconds between two looks for its reader: twice as long each time,
REPLY_PAUSE_MOST = 0.1      # up to this
# A reply name cannot leave its directory; the empty one wants no answer.
_REPLY_NAME = "((?:[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254})?)"
FIFO_HEAD = re.compile(":" + _REPLY_NAME + r"(:|\Z)")
_BEGIN = ":" + _REPLY_NAME + r":(?=[\[{])"
FIFO_BEGIN = re.compile(_BEGIN)
FIFO_NEXT = re.compile("\n|" + _BEGIN)
AFTER_JSON = re.compile(r"[ \t\r]*(?=[:\n]|\Z)")


class FIFOMessage(NamedTuple):
    """What was written into the FIFO, in latin-1."""
    end: int                    # where it ends in the text
    content: str
    name: Optional[str]         # of the FIFO for the answer; None: it is garbage


def end_of_json(text: str, begin: int, line_end: int) -> int:
    """Where a message ends; -1: that has not come. opensips-cli writes no line end: its JSON ends.

    What is written with one write() of at most PIPE_BUF bytes stays together.
    """
    if text.startswith(("{", "["), begin):
        with suppress(ValueError, RecursionError):
            _, end = json_decoder.raw_decode(text, begin)
            after = AFTER_JSON.match(text, end)
            if after is not None and not 0 <= line_end < end:
                return after.end()
    return line_end


def next_message(text: str, limit: int) -> Optional[FIFOMessage]:
    """The first message; None: not all of it is there, and it is not larger than the limit yet."""
    if not text:
        return None
    head = FIFO_HEAD.match(text)
    if head is None:
        following = FIFO_NEXT.search(text, 1)
        end = following.start() if following is not None else len(text)
        return FIFOMessage(end, text[:end], None)
    begin = head.end()
    end = end_of_json(text, begin, text.find("\n"))
    if end < 0 and len(text) - begin <= limit:
        return None
    if end < 0:
        end = len(text)
    return FIFOMessage(end, text[begin:end], head[1])


def is_own_fifo(status: os.stat_result) -> bool:
    return stat.S_ISFIFO(status.st_mode) and status.st_uid == os.geteuid()


def clear_place(path: str) -> None:
    """Remove a FIFO of this user that nobody reads. ConfigError: something else is there."""
    try:
        if not is_own_fifo(os.lstat(path)):
            raise ConfigError("mi_fifo: %s is there, and no FIFO of this user: remove it, or set "
                              "fifo_name" % path)
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        os.unlink(path)
        return
    raise ConfigError("mi_fifo: a program reads %s already: end it, or set fifo_name" % path)


def make_fifo(path: str) -> int:
    """The descriptor of a new FIFO for this user and group. ConfigError: it cannot be."""
    try:
        clear_place(path)
        os.mkfifo(path, 0o600)
        # For writing too: else it would be at its end, and readable, whenever a writer has gone.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigError("mi_fifo: %s: %s: set fifo_name" % (path, error.strerror)) from None
    if not is_own_fifo(os.fstat(descriptor)):
        os.close(descriptor)
        raise ConfigError("mi_fifo: somebody has replaced %s: set fifo_name" % path)
    os.fchmod(descriptor, 0o660)                # whatever the umask says
    return descriptor


class FIFOReply:
    """The answer to one command, until it is written or given up.

    What is kept for it counts, as memory_budget and spool_size say.
    """

    def __init__(self, fifo: MIFIFO, message: FIFOMessage, answer: Batch) -> None:
        self.fifo = fifo
        self.server = fifo.server
        self.name = message.name
        self.answer: Optional[Batch] = answer       # None: it is on its way
        self.spool = Spool(self.server.disk)
        self.written = 0                # bytes
        self.descriptor = -1            # of the client's FIFO, once it is open
        self.pause = REPLY_PAUSE
        self.expiry: Optional[Timer] = None         # when it is given up
        self.awaited: Union[Watch, Timer, None] = None      # to open, or to write
        self.kept = 0                   # bytes in memory
        self.keep(len(message.content))

    def keep(self, size: int) -> None:
        self.server.room.hold(size - self.kept)
        self.kept = size

    def begin(self) -> None:
        """Send the answer, once it is complete."""
        if self.answer is None:
            return
        text = self.answer.text()
        if text is None:
            return
        if not text or not self.name:
            self.close()
            return
        self.answer = None
        try:
            self.spool.write(text.encode() + b"\n")
        except OSError as error:
            self.server.disk.complain(error)
            self.give_up("no room is left, see spool_size")
            return
        self.keep(self.spool.in_memory)
        self.renew_expiry()
        self.open()

    def renew_expiry(self) -> None:
        """The client has its time again."""
        if self.expiry is not None:
            self.expiry.close()
        self.expiry = self.server.call_later(
            self.server.params.request_timeout, functools.partial(self.give_up, "nobody reads it"))

    def open(self) -> None:
        """Never wait for the client, and follow nothing that it has put there."""
        path = os.path.join(self.fifo.reply_dir, str(self.name))
        try:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.ENXIO:
                self.give_up(error.strerror)
                return
            self.awaited = self.server.call_later(self.pause, self.open)   # nobody reads it yet
            self.pause = min(2 * self.pause, REPLY_PAUSE_MOST)
            return
        status = os.fstat(self.descriptor)
        if not stat.S_ISFIFO(status.st_mode) or os.path.samestat(status, self.fifo.status):
            self.give_up("it is no FIFO of a client")
            return
        self.awaited = self.server.watch(self.descriptor, self.write, WRITE)

    def write(self) -> None:
        """As much as the pipe takes."""
        piece = self.spool.read(self.written, FIFO_PIECE)
        try:
            self.written += os.write(self.descriptor, piece)
        except BlockingIOError:
            return
        except OSError as error:
            self.give_up(error.strerror)
            return
        if self.written == self.spool.size:
            self.close()
        else:
            self.renew_expiry()

    def give_up(self, reason: Optional[str]) -> None:
        log.warning("mi_fifo: the answer for %r is dropped: %s", self.name, reason)
        self.close()

    def close(self) -> None:
        for wait in (self.expiry, self.awaited):
            if wait is not None:
                wait.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.spool.close()
        self.keep(0)
        self.fifo.replies.discard(self)


class MIFIFO:
    """The FIFO that commands come by: it is watched, or looked at again after a pause."""

    def __init__(self, server: Server, path: str, reply_dir: str) -> None:
        self.server = server
        self.path = path
        self.reply_dir = reply_dir
        self.limit = server.params.post_buf_size
        self.text = ""                          # what has been read and not been carried out
        self.replies: set[FIFOReply] = set()    # the commands under way
        self.descriptor = make_fifo(path)
        self.status = os.fstat(self.descriptor)
        # by which threads say that they have brought an answer
        self.bell, self.button = socket.socketpair()
        self.bell.setblocking(False)
        self.button.setblocking(False)
        self.listening = server.watch(self.bell, self.hear)
        self.awaited: Union[Watch, Timer] = server.watch(self.descriptor, self.read)
        self.expiry: Optional[Timer] = None     # of half a message

    @property
    def counters(self) -> Counters:
        return self.server.counters

    def resume(self) -> None:
        """Any thread. The bell rings already, or the server has ended, if this fails."""
        with suppress(OSError):
            self.button.send(b"!")

    def hear(self) -> None:
        with suppress(BlockingIOError):
            self.bell.recv(RECEIVE_SIZE)
        for reply in list(self.replies):
            reply.begin()

    def keep(self, text: str) -> None:
        self.server.room.hold(len(text) - len(self.text))
        self.text = text

    def read(self) -> None:
        """More has come. What begins like a message is no rest of the one before it."""
        with suppress(BlockingIOError):
            piece = os.read(self.descriptor, RECEIVE_SIZE).decode("latin-1")
            if self.text and FIFO_BEGIN.match(piece):
                self.drop()
            self.keep(self.text + piece)
            self.look()

    def look(self) -> None:
        """Carry out what is there, as far as there is room for answers."""
        self.wait(self.server.call_later(FIFO_PAUSE, self.look))    # also if something fails here
        for _ in range(FIFO_ANSWERS - len(self.replies)):
            self.keep(self.text.lstrip(" \t\r\n"))
            message = next_message(self.text, self.limit)
            if message is None:
                self.wait(self.server.watch(self.descriptor, self.read))
                self.set_expiry(self.text != "")
                return
            self.keep(self.text[message.end:])
            self.set_expiry(False)
            self.carry_out(message)

    def wait(self, awaited: Union[Watch, Timer]) -> None:
        """For this, and no more for what was waited for."""
        self.awaited.close()
        self.awaited = awaited

    def set_expiry(self, wanted: bool) -> None:
        """Half a message has its time from its first byte on."""
        if self.expiry is not None and not wanted:
            self.expiry.close()
            self.expiry = None
        elif self.expiry is None and wanted:
            self.expiry = self.server.call_later(self.server.params.request_timeout, self.drop)

    def drop(self) -> None:
        """The rest of a message has not come."""
        log.warning("mi_fifo: half a message is dropped: %r", self.text[:GARBAGE_SIZE])
        self.keep("")
        self.set_expiry(False)

    def carry_out(self, message: FIFOMessage) -> None:
        if message.name is None:
            log.warning("mi_fifo: dropped, write :reply_name:JSON and a line end: %r",
                        message.content[:GARBAGE_SIZE])
            return
        if len(message.content) > self.limit:
            fault = "more than %d bytes, see post_buf_size" % self.limit
            log.warning("mi_fifo: a command has %s", fault)
            calls = Calls([no_call(fault)], True)
        else:
            calls = read_calls(message.content.encode("latin-1"))
        reply = FIFOReply(self, message, Batch(calls, self))
        self.replies.add(reply)
        reply.begin()

    def close(self) -> None:
        """The end of the service. The FIFO goes, if it is still the one that was made."""
        for reply in list(self.replies):
            reply.close()
        self.keep("")
        self.set_expiry(False)
        self.awaited.close()
        self.listening.close()
        self.bell.close()
        self.button.close()
        with suppress(OSError):
            if os.path.samestat(os.lstat(self.path), self.status):
                os.unlink(self.path)
        os.close(self.descriptor)


def load_mi_fifo(parameters: dict[str, Any]) -> None:
    path, reply_dir = parameters["fifo_name"], parameters["reply_dir"]

    def start(server: Server) -> Callable[[], None]:
        if not os.path.isdir(reply_dir):
            raise ConfigError("mi_fifo: %s is no directory: set reply_dir" % reply_dir)
        return MIFIFO(server, path, reply_dir).close

    register_service("mi_fifo", start)


BUILT_IN["mi_fifo"] = load_mi_fifo


# --------------------------------------------------------------------------------------- prometheus
# What happens in a server, as text for Prometheus (0.0.4) or OpenMetrics (1.0). Of what clients
# send only methods that are known are labels: nobody can make series without end.

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
METRIC_NAME = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile("(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
QUALITY = re.compile(r"[01](?:\.[0-9]{0,3})?")
ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r'\"'})
HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})        # of 0.0.4


class Snapshot(NamedTuple):
    """What one scrape is made of."""
    server: Server
    cells: list[int]
    series: dict[Series, list[int]]


class Metric(NamedTuple):
    kind: str                                           # counter, gauge or histogram
    help: str
    lines: Callable[[Snapshot], Iterable[str]]          # its samples


metrics: dict[str, Metric] = {}                         # by name, in the order of registration


def sample(
        name: str, labels: Sequence[str], values: Sequence[Any], number: float) -> str:
    """A line of the text. TypeError, if it is no number."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError("%r is no number" % (number,))
    if len(labels) != len(values):
        raise ValueError("%d values for %d labels" % (len(values), len(labels)))
    text = repr(number)
    if not math.isfinite(number):
        text = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}[text]
    if not labels:
        return "%s %s" % (name, text)
    pairs = []
    for label, value in zip(labels, values):
        pairs.append('%s="%s"' % (label, str(value).translate(ESCAPES)))
    return "%s{%s} %s" % (name, ",".join(pairs), text)


def register_metric(
        name: str, kind: str, help: str, function: Callable[[], Any],
        *, labels: Sequence[str] = ()) -> None:
    """Show a number of the program's own where the module prometheus answers.

    name      as Prometheus wants it, such as mail_queue_bytes; that of a counter ends in _total
    kind      "counter", which only grows, or "gauge"
    help      what it says, in a line
    function  called for every scrape in the server's thread: returns the number; with `labels` a
              dict of their values to numbers, {"in": 3}, or {("in", "a"): 3} if there are several.
              If it fails, this is logged and the metric left out
    labels    the names of the labels

    ConfigError: a name that will not do, or is taken; no function. Any thread.
    """
    check_metric(name, kind, help, function, labels)

    def lines(snapshot: Snapshot) -> Iterable[str]:
        found = function()
        if not labels:
            found = {(): found}
        for values, number in found.items():
            if not isinstance(values, tuple):
                values = (values,)
            if kind == "counter" and not 0 <= number < math.inf:
                raise ValueError("%r is no count" % (number,))
            yield sample(name, labels, values, number)

    metrics[name] = Metric(kind, help, lines)


def check_metric(name: str, kind: str, help: Any, function: Any, labels: Any) -> None:
    problem = ""
    families = [re.sub("_total$", "", taken) for taken in metrics]
    if not METRIC_NAME.fullmatch(name):
        problem = "a name is made of letters, digits, _ and :"
    elif kind not in ("counter", "gauge"):
        problem = 'the kind is "counter" or "gauge", not %r' % (kind,)
    elif name.endswith("_total") != (kind == "counter"):
        problem = "the name of a counter ends in _total, and that of no gauge"
    elif name.startswith("httpd_") or re.sub("_total$", "", name) in families:
        problem = "the name is taken"
    elif not isinstance(help, str) or not help:
        problem = "the help says nothing"
    elif not callable(function):
        problem = "no function: %r" % (function,)
    elif isinstance(labels, str) or not all(map(LABEL_NAME.fullmatch, labels)):
        problem = "labels must be a tuple of names, made of letters, digits and _"
    if problem:
        raise ConfigError('metric "%s": %s' % (name, problem))


def show_cells(
        name: str, kind: str, help: str,
        label: str, cells: Mapping[str, int]) -> None:
    """A metric of cells, by the value of its label; if that is empty there is one cell only."""
    def lines(snapshot: Snapshot) -> Iterable[str]:
        for value, cell in cells.items():
            if label:
                yield sample(name, (label,), (value,), snapshot.cells[cell])
            else:
                yield sample(name, (), (), snapshot.cells[cell])

    metrics[name] = Metric(kind, help, lines)


def show_series(name: str, help: str, *labels: str) -> None:
    """A counter of the series of this name."""
    def lines(snapshot: Snapshot) -> Iterable[str]:
        for series, numbers in snapshot.series.items():
            if series[0] == name:
                yield sample(name, labels, series[1:], sum(numbers[:BUCKETS]))

    metrics[name] = Metric("counter", help, lines)


def requests_by_root(snapshot: Snapshot) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for series, numbers in snapshot.series.items():
        if series[0] == "httpd_requests_total":
            before = found.get(series[1], [0] * SLOT_NUMBERS)
            found[series[1]] = list(map(operator.add, before, numbers))
    return found


def duration_lines(snapshot: Snapshot) -> Iterable[str]:
    name, labels = "httpd_request_duration_seconds", ("root", "le")
    for root, numbers in requests_by_root(snapshot).items():
        count = 0
        for bound, number in zip((*BUCKET_BOUNDS, "+Inf"), numbers):
            count += number
            yield sample(name + "_bucket", labels, (root, bound), count)
        yield sample(name + "_sum", labels[:1], (root,), numbers[MICROSECONDS] / 1e6)
        yield sample(name + "_count", labels[:1], (root,), count)


def content_lines(snapshot: Snapshot) -> Iterable[str]:
    for root, numbers in requests_by_root(snapshot).items():
        yield sample("httpd_response_bytes_total", ("root",), (root,), numbers[CONTENT_BYTES])


def certificate_lines(snapshot: Snapshot) -> Iterable[str]:
    expires = snapshot.server.transport.expires
    if expires:
        yield sample("httpd_tls_certificate_expiry_timestamp_seconds", (), (), expires)


show_series("httpd_requests_total", "Responses; those to what was no request have no method.",
            "root", "method", "code")
metrics["httpd_request_duration_seconds"] = Metric(
    "histogram", "Seconds from the head of a request to the end of the response.", duration_lines)
metrics["httpd_response_bytes_total"] = Metric(
    "counter", "Bytes of content of the responses.", content_lines)
show_cells("httpd_connections", "gauge", "Connections by what they do.", "state", {
    "idle": IDLE, "receiving": RECEIVING, "sending": SENDING, "suspended": SUSPENDED,
    "closing": CLOSING})
show_cells("httpd_connections_accepted_total", "counter", "Connections taken in.", "",
           {"": ACCEPTED})
show_cells("httpd_connections_refused_total", "counter",
           "Connections turned away because there was no place.", "", {"": REFUSED_CONNECTIONS})
show_cells("httpd_connections_evicted_total", "counter",
           "Connections closed because others needed the room.", "", {"": EVICTED})
show_cells("httpd_timeouts_total", "counter", "Connections whose time was over.", "kind", {
    "idle": IDLE_TIMEOUTS, "head": HEAD_TIMEOUTS, "content": CONTENT_TIMEOUTS,
    "output": OUTPUT_TIMEOUTS})
show_cells("httpd_memory_held_bytes", "gauge", "Memory that connections hold between their turns.",
           "", {"": HELD_BYTES})
show_cells("httpd_memory_budget_bytes", "gauge", "The parameter memory_budget.", "",
           {"": BUDGET_BYTES})
show_series("httpd_tls_handshakes_total", "TLS handshakes that have succeeded.", "version")
show_series("httpd_tls_handshake_failures_total", "TLS handshakes that have failed.", "version")
metrics["httpd_tls_certificate_expiry_timestamp_seconds"] = Metric(
    "gauge", "When the certificate expires, in seconds since 1970.", certificate_lines)
show_series("httpd_mi_commands_total", "MI commands; those that there are not have no name.",
            "command", "outcome")


def count_response(response: Response) -> None:
    """The observer. On the hot path: no property, and nothing is made text."""
    request, seconds = response.request, response.seconds
    counters = response.server.counters
    series: Series = ("httpd_requests_total", "", "", response.status)
    if request is not None:
        series = (
            "httpd_requests_total", request._root.name, request._head.method, response.status)
    place = counters.slots.get(series) or counters.slot(series)
    row = counters.row
    bucket = place
    if seconds > BUCKET_BOUNDS[0]:                      # seldom: saves 0.1 us
        bucket += bisect_left(BUCKET_BOUNDS, seconds)
    row[bucket] += 1
    row[place + MICROSECONDS] += int(seconds * 1e6)
    row[place + CONTENT_BYTES] += response.size


def exposition(snapshot: Snapshot, openmetrics: bool) -> str:
    """The text. A metric that fails is logged and left out."""
    text = []
    escapes = HELP_ESCAPES
    if openmetrics:
        escapes = ESCAPES
    for name, metric in tuple(metrics.items()):
        try:
            lines = list(metric.lines(snapshot))
        except BaseException as error:
            survive("the metric %s" % name, error)
            continue
        family = name
        if openmetrics:
            family = re.sub("_total$", "", name)
        text.append("# HELP %s %s" % (family, metric.help.translate(escapes)))
        text.append("# TYPE %s %s" % (family, metric.kind))
        text += lines
    if openmetrics:
        text.append("# EOF")
    return SURROGATE.sub("\ufffd", "\n".join(text) + "\n")


def quality(accept: str, kind: str, version: str) -> float:
    """How much a client wants a media type (RFC 9110, 12.5.1)."""
    best = 0.0
    for member in list_members(accept):
        parameters = parse_parameters(member)
        asked = QUALITY.fullmatch(parameters.get("q", "1"))
        if media_type(member) == kind and parameters.get("version", version) == version and asked:
            best = max(best, float(asked[0]))
    return best


def answer_metrics(request: Request, page: Page) -> int:
    """The access handler of prometheus."""
    server = request._connection.server
    measure(server)
    accept = request.headers.get("accept", "")
    wanted = quality(accept, "application/openmetrics-text", "1.0.0")
    openmetrics = wanted > 0 and wanted >= quality(accept, "text/plain", "0.0.4")
    if openmetrics:
        page.content_type = OPENMETRICS
    snapshot = Snapshot(server, server.counters.totals(), server.counters.series())
    text = exposition(snapshot, openmetrics)
    try:
        page.write(text)
    except BufferError:
        spool_answer(text.encode(), request, page)
    return 200


def read_proc(name: str) -> str:
    """A file of the kernel, of a line or more."""
    with open("/proc/" + name, encoding="latin-1") as file:
        return file.read()


def cpu_seconds(pid: int) -> float:
    fields = read_proc("%d/stat" % pid).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_time(pid: int) -> float:
    """Seconds since 1970."""
    ticks = int(read_proc("%d/stat" % pid).rpartition(")")[2].split()[19])
    booted = int(read_proc("stat").partition("btime ")[2].split()[0])
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def memory_bytes(place: int, pid: int) -> int:
    """A number of statm, which counts pages."""
    return int(read_proc("%d/statm" % pid).split()[place]) * resource.getpagesize()


def show_processes(name: str, kind: str, help: str, read: Callable[[int], float],
                   join: Callable[[Iterable[float]], float] = sum) -> None:
    """A number of the process. Of workers the sum: which of them answers makes no difference."""
    def lines(snapshot: Snapshot) -> Iterable[str]:
        numbers = []
        for pid in process_ids(snapshot.server):
            with suppress(OSError):             # it has just ended
                numbers.append(read(pid))
        yield sample(name, (), (), join(numbers))

    metrics[name] = Metric(kind, help, lines)


# As the client libraries call them.
show_processes("process_cpu_seconds_total", "counter", "User and system CPU time.", cpu_seconds)
show_processes("process_open_fds", "gauge", "Open file descriptors.",
               lambda pid: len(os.listdir("/proc/%d/fd" % pid)))
show_processes("process_max_fds", "gauge", "The limit of open file descriptors.",
               lambda pid: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
show_processes("process_virtual_memory_bytes", "gauge", "Virtual memory.",
               functools.partial(memory_bytes, 0))
show_processes("process_resident_memory_bytes", "gauge", "Resident memory.",
               functools.partial(memory_bytes, 1))
show_processes("process_start_time_seconds", "gauge", "Start, in seconds since 1970.",
               start_time, min)


def load_prometheus(parameters: dict[str, Any]) -> None:
    register_httpdcb("prometheus", parameters["root"], answer_metrics, flush_spool,
                     content_type=TEXT, methods=("GET",))
    observers.append(count_response)


BUILT_IN["prometheus"] = load_prometheus
# --------------------------------------------------------------------------------------- Access log
# A line for each response. The observer makes it, a thread of its own writes it: no disk stops the
# service.

COLLECT = 0.05              # seconds that lines wait for others: to be woken costs more than lines
# Characters that wait for a slow disk, a quarter of a second of a busy server. The thread may have
# as many in its hands.
LOG_WAITING = 2**21
LOG_RETRY = 1.0             # seconds until what could not be written is tried again
LOG_CLOSING = 2.0           # seconds that the end of a server waits for its log
SYSLOG = "/dev/log"
UNSAFE = re.compile(r"[^ !#-\[\]-~]")
# Heads whose texts are kept, if they are remembered and not large: half the price of a line. Of so
# many bytes, together 1 MiB.
KNOWN_HEADS = 256
KNOWN_WEIGHT = 4096


def escape_bytes(text: str) -> str:
    r"""As nginx does: a quotation mark is \x22, since \" ends a field to many who read it."""
    return UNSAFE.sub(lambda match: r"\x%02X" % ord(match[0]), text)


def escape_json(text: str) -> str:
    """What stands between the quotation marks, in ASCII."""
    return encode_json(SURROGATE.sub("\ufffd", text))[1:-1]


def first_line(garbage: bytes) -> str:
    """Of what is no request. Others are fields, and may hold a password."""
    line, _, _ = garbage.lstrip(b"\r\n").partition(b"\n")
    return line.rstrip(b"\r").decode("latin-1")


class Wire(NamedTuple):
    """What a client has said, as it stands in a line."""
    request: str
    fields: str


def combined_wire(words: Sequence[str], referer: str, agent: str) -> Wire:
    """`words`: method, target and version, or the one line of what was no request."""
    request = escape_bytes(" ".join(words)) or "-"
    return Wire(request, '"%s" "%s"' % (escape_bytes(referer) or "-", escape_bytes(agent) or "-"))


def combined_line(
        response: Response, wire: Wire, client: str, user: str, now: str) -> str:
    """As Apache and nginx write it, and goaccess, awstats and fail2ban read it."""
    if user:                            # a blank would end the field
        octets = user.encode(errors="backslashreplace").decode("latin-1")
        user = escape_bytes(octets).replace(" ", r"\x20")
    return '%s - %s [%s] "%s" %s %s %s\n' % (
        client or "-", user or "-", now, wire.request, response.status, response.size,
        wire.fields)


JSON_TRUTH = ("false", "true")


def json_wire(words: Sequence[str], referer: str, agent: str) -> Wire:
    """The one line of what was no request is called a target without a method."""
    method, target = "", words[0]
    if len(words) > 1:
        method, target, _ = words
    request = '"method":"%s","target":"%s"' % (method, escape_json(target))
    fields = '"referer":"%s","user_agent":"%s"' % (escape_json(referer), escape_json(agent))
    return Wire(request, fields)


def json_line(
        response: Response, wire: Wire, client: str, user: str, now: str) -> str:
    """An object."""
    note = ""
    if response.request is not None and response.request.note:
        note = escape_json(response.request.note)
    if user:
        user = escape_json(user)
    whole = JSON_TRUTH[response.whole]
    # 0.2 us less than by %
    return (
        f'{{"time":"{now}","client":"{client}","user":"{user}",{wire.request},'
        f'"status":{response.status},"bytes":{response.size},"seconds":{response.seconds:.6f},'
        f'{wire.fields},"whole":{whole},"mi":"{note}"}}\n')


def combined_time(now: float) -> str:
    """26/Nov/2026:05:41:28 +0000, in English whatever the locale."""
    _, day, month, year, clock, _ = formatdate(now, usegmt=True).split()
    return "%s/%s/%s:%s +0000" % (day, month, year, clock)


def json_time(now: float) -> str:
    """RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


class LogFormat(NamedTuple):
    """What makes a line: of what a client has said, of all, of the time."""
    wire: Callable[[Sequence[str], str, str], Wire]
    line: Callable[[Response, Wire, str, str, str], str]
    time: Callable[[float], str]


LOG_FORMATS = {
    "combined": LogFormat(combined_wire, combined_line, combined_time),
    "json": LogFormat(json_wire, json_line, json_time),
}


def check_log_format(text: str) -> None:
    if text not in LOG_FORMATS:
        raise ValueError("must be %s" % " or ".join(LOG_FORMATS))


class LogFile:
    """Where lines go: a file that grows at its end, or stdout."""

    def __init__(self, path: str) -> None:
        if path == "-":
            self.descriptor = os.dup(1)
            return
        # O_NONBLOCK: a FIFO that nobody reads is an error, not a wait. To write may take its time.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
        self.descriptor = os.open(path, flags, 0o640)
        os.set_blocking(self.descriptor, True)

    def write(self, data: bytes) -> int:
        """The bytes that it has taken. OSError: none."""
        return os.write(self.descriptor, data)

    def close(self) -> None:
        os.close(self.descriptor)


class SystemLog:
    """The same for syslog:, which need not be there yet."""

    def __init__(self) -> None:
        from logging.handlers import SysLogHandler      # 10 ms to import

        def raise_again(record: logging.LogRecord) -> None:
            raise

        self.handler = SysLogHandler(SYSLOG, SysLogHandler.LOG_DAEMON)
        self.handler.ident = "httpd: "
        self.handler.handleError = raise_again  # type: ignore[method-assign]  # else: to stderr

    def write(self, data: bytes) -> int:
        done = 0
        for line in data.splitlines():
            record = logging.makeLogRecord({"msg": line.decode(), "levelname": "INFO"})
            try:
                self.handler.emit(record)
            except OSError:
                if done == 0:
                    raise
                break
            done += len(line) + 1
        return done

    def close(self) -> None:
        self.handler.close()


def open_log(path: str) -> Union[LogFile, SystemLog]:
    if path == "syslog:":
        return SystemLog()
    if path.startswith("syslog:"):
        raise ValueError("write syslog: and nothing behind it: the facility is daemon")
    return LogFile(path)


class AccessLog:
    """The log of one server. OSError or ValueError: it cannot be opened.

    tell() is for the server's thread; reload() for any, and for a signal handler: so the bell is a
    SimpleQueue, and no Event. What begins with an underscore is for the thread that writes.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.path: str = server.params.access_log
        self.format = LOG_FORMATS[server.params.access_log_format]
        self.file = open_log(self.path)
        self.make_line = self.format.line
        self.time = ""                          # of the lines of a second
        self.next_second = 0.0                  # when it ends, on the clock of time.monotonic()
        self.known: dict[int, tuple[Head, Wire]] = {}   # by the id() of a head, which lives here
        self.lines: deque[str] = deque()
        self.handed = 0     # characters that tell() has put there,
        self.taken = 0      # and the thread has taken out: each counter has one who writes it
        self.lost = 0                           # lines that there was no room for,
        self.reported = 0                       # and those that have been spoken of
        self.failing = False                    # which has been said
        self.rest = b""                         # what has been taken, and is not written
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.awake = False                      # the thread is going to look
        self.reopening = False
        self.closing = False
        self.thread = threading.Thread(target=self._work, name="httpd-log", daemon=True)
        self.thread.start()

    def tell(self, response: Response) -> None:
        """The observer."""
        if response.server is not self.server:
            return
        if self.server.now >= self.next_second:     # the server's clock costs nothing
            self.next_second = self.server.now + 1
            self.time = self.format.time(time.time())
        request = response.request
        if request is None:
            wire = self.format.wire((first_line(response.garbage),), "", "")
            line = self.make_line(response, wire, response.client[0], "", self.time)
        else:
            try:
                _, wire = self.known[id(request._head)]
            except KeyError:
                wire = self._learn(request._head)
            line = self.make_line(response, wire, request.client[0], request.user, self.time)
        if self.handed - self.taken > LOG_WAITING:
            self.lost += 1
            self._complain("it takes too long")
            return
        self.handed += len(line)
        self.lines.append(line)
        if not self.awake:
            self.awake = True
            self.bell.put(None)

    def _learn(self, head: Head) -> Wire:
        get = head.fields.headers.get
        words = (head.method, head.target, head.version)
        wire = self.format.wire(words, get("referer", ""), get("user-agent", ""))
        if id(head) in self.server.heads.whole.stored and weight(head) < KNOWN_WEIGHT:
            if len(self.known) >= KNOWN_HEADS:
                self.known.clear()
            self.known[id(head)] = (head, wire)
        return wire

    def reload(self) -> None:
        """Go over to the file that has the name now: the old one has been moved away."""
        self.reopening = True
        self.bell.put(None)

    def close(self) -> None:
        """Write what waits, for at most LOG_CLOSING seconds."""
        with suppress(ValueError):              # the program may have emptied the list
            observers.remove(self.tell)
        access_logs.remove(self)
        self.closing = True
        self.bell.put(None)
        self.thread.join(LOG_CLOSING)
        if self.thread.is_alive():
            log.error("access_log %s: the end is lost, it takes too long", self.path)

    def _complain(self, reason: object) -> None:
        if not self.failing:
            self.failing = True
            log.error("access_log %s: lines are going to be lost: %s", self.path, reason)

    def _work(self) -> None:
        while not self.closing:
            call_safely("the access log", self._wait_and_write)
        while self._write():
            pass
        if self.rest or self.lost > self.reported:
            lost = self.rest.count(b"\n") + len(self.lines) + self.lost - self.reported
            log.error("access_log %s: %d lines are lost", self.path, lost)
        self.file.close()

    def _wait_and_write(self) -> None:
        timeout = None
        if self.rest or self.lines:
            timeout = LOG_RETRY
        with suppress(queue.Empty):
            self.bell.get(timeout=timeout)
        if not self.closing:
            time.sleep(COLLECT)
        self.awake = False              # before the lines are taken: who comes later rings again
        if self.reopening:
            self.reopening = False
            self._open_again()
        self._write()

    def _open_again(self) -> None:
        try:
            file = open_log(self.path)
        except OSError as error:
            log.error("access_log %s is not opened again, the old file is used: %s",
                      self.path, error)
            return
        self.file.close()
        self.file = file
        self.rest = self.rest.lstrip(b"\n")

    def _write(self) -> bool:
        """Write, at once, all that waits. False: there was nothing, or it is not possible."""
        if not self.rest:
            count = len(self.lines)             # others may come meanwhile
            text = "".join([self.lines.popleft() for _ in range(count)])
            self.taken += len(text)
            self.rest = text.encode("ascii", "replace")
        if not self.rest:
            return False
        data, lost = self.rest, self.lost
        try:
            done = self.file.write(data)
        except OSError as error:
            self._complain(error)
            return False
        self.rest = b""
        if done < len(data):
            # A torn line is ended, and comes again as a whole: others may write to the file, or it
            # is another one by then, and a rest by itself could begin with a client's words.
            start = data.rfind(b"\n", 0, done) + 1
            self.rest = data[start:]
            if start < done:
                self.rest = b"\n" + self.rest
        elif self.failing and self.lost == lost:
            log.warning("access_log %s is written again, %d lines were lost",
                        self.path, lost - self.reported)
            self.failing = False
            self.reported = lost
        return True


# those that are open
access_logs: list[AccessLog] = []


def begin_access_log(server: Server) -> Optional[AccessLog]:
    path = server.params.access_log
    if not path:
        return None
    try:
        access_log = AccessLog(server)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "httpd: access_log %s cannot be opened: %s" % (path, error), "access_log") from None
    observers.append(access_log.tell)
    access_logs.append(access_log)
    return access_log


checks["log format"] = check_log_format
companions.append(begin_access_log)


# ------------------------------------------------------------------------------------------ mi_html
# The console: a page with what a server does, and a form for each MI command. It is read without
# JavaScript too; with it the figures move. Whatever stands in it has gone through html() or escape.

POINT_SECONDS = 2.0
POINTS = 150                            # of a plot: five minutes
UNWATCHED = 60.0                        # seconds after the last view that the history ends
HTML_ESCAPES = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})
SHOWN_STATES = ("idle", "receiving", "sending", "suspended", "closing")


Point = Dict[str, float]                # what the plots show of a time, by the name of the line


class Reading(NamedTuple):
    """What the counters say at a time."""
    at: float
    answered: int
    errors: int                         # of them with a status from 400 up
    buckets: list[int]


class Plot(NamedTuple):
    """A picture of the last minutes. Its lines have the names of what they show."""
    title: str
    lines: tuple[str, ...]
    stacked: bool = False               # each line begins where the one before it ends
    full: str = ""                      # what its height stands for; empty: the highest value


PLOTS = (
    Plot("Requests/s", ("rate",)),
    Plot("Errors/s", ("errors",)),
    Plot("Latency, ms", ("median", "p95")),
    Plot("KiB held", ("held",), full="budget"),
    Plot("Connections", SHOWN_STATES, stacked=True),
)


def html(pattern: str, *values: Any) -> str:
    """The pattern with the values in it, escaped."""
    return pattern % tuple(str(value).translate(HTML_ESCAPES) for value in values)


def take_reading(server: Server) -> Reading:
    buckets, errors = [0] * BUCKETS, 0
    for series, numbers in server.counters.series().items():
        if series[0] == "httpd_requests_total":
            buckets = list(map(operator.add, buckets, numbers))
            if series[3][0] in "45":
                errors += sum(numbers[:BUCKETS])
    return Reading(server.now, server.counters.totals()[REQUESTS], errors, buckets)


def quantile(counts: Sequence[int], share: float) -> float:
    """Milliseconds that this share of the requests took at most, as if even within a bucket."""
    left, low = share * sum(counts), 0.0
    for bound, count in zip((*BUCKET_BOUNDS, BUCKET_BOUNDS[-1]), counts):
        if count and left <= count:
            return 1000 * (low + (bound - low) * left / count)
        left, low = left - count, bound
    return 0.0


class History:
    """What the plots show. It lives beside a server from the first view to a minute after the last:
    when nobody looks, nothing is counted for it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen = server.now
        self.points: deque[Point] = deque(maxlen=POINTS)
        self.counts = count_response not in observers       # without the module prometheus
        if self.counts:
            observers.append(self.count)
        server.loop.companions.append(self)
        self.before = take_reading(server)
        self.tick()

    def count(self, response: Response) -> None:
        if response.server is self.server:
            count_response(response)

    def tick(self) -> None:
        if self.server.now - self.seen > UNWATCHED:
            self.server.loop.companions.remove(self)
            self.close()
            return
        self.timer = self.server.call_later(POINT_SECONDS, self.tick)
        before, self.before = self.before, take_reading(self.server)
        self.points.append(self.point(before, self.before))

    def point(self, before: Reading, now: Reading) -> Point:
        measure(self.server)
        cells = self.server.counters.totals()
        seconds = max(now.at - before.at, 0.001)
        buckets = list(map(operator.sub, now.buckets, before.buckets))
        point: Point = dict(zip(SHOWN_STATES, cells[IDLE:]))
        point["rate"] = (now.answered - before.answered) / seconds
        point["errors"] = (now.errors - before.errors) / seconds
        point["median"] = quantile(buckets, 0.5)
        point["p95"] = quantile(buckets, 0.95)
        point["held"] = cells[HELD_BYTES] / 1024
        point["budget"] = cells[BUDGET_BYTES] / 1024
        return point

    def reload(self) -> None:
        """Nothing of it is in files."""

    def close(self) -> None:
        self.timer.close()
        if self.counts:
            observers.remove(self.count)


def watched(server: Server) -> History:
    """The history of a server, now that somebody looks at it."""
    for companion in server.loop.companions:
        if isinstance(companion, History):
            companion.seen = server.now
            return companion
    return History(server)


def short(number: float) -> str:
    if number and number < 100 and number != int(number):
        return "%.2g" % number
    return format(number, ",.0f")


def draw(values: Sequence[float], top: float) -> str:
    """An area, the newest value on the right. Of its edge only the upper side is in the picture."""
    begin = POINTS - len(values)
    steps = ["M%d,50L" % begin]
    for x, value in enumerate([*values, values[-1]], begin):
        steps.append("%d,%.1f" % (x, 40 - 38 * value / top))
    return " ".join(steps) + "V50Z"


def draw_plot(plot: Plot, points: Collection[Point]) -> dict[str, str]:
    """The texts and the shapes of a plot, by the id of the element that shows them."""
    found, columns = {}, {}
    heights = [0.0] * len(points)
    for name in plot.lines:
        column = [point[name] for point in points]
        found[name] = short(column[-1])
        if plot.stacked:
            column = heights = list(map(operator.add, heights, column))
        columns[name] = column
    columns[""] = [point.get(plot.full, 1.0) for point in points]
    top = max(map(max, columns.values()))
    found["top-" + plot.lines[0]] = short(top)
    for name in plot.lines:
        found["line-" + name] = draw(columns[name], top)
    return found


def figures(server: Server) -> dict[str, str]:
    """All that moves, by the id of the element that shows it."""
    points = watched(server).points
    found = {}
    for name, total in zip(CELLS[:CONNECTIONS], server.counters.totals()):
        found[name] = short(total)
    for plot in PLOTS:
        found.update(draw_plot(plot, points))
    return found


def show_plots(found: dict[str, str]) -> str:
    text = ""
    for plot in PLOTS:
        keys, shapes = "", ""
        for number, name in enumerate(plot.lines):
            keys += html('<span><i class="k%s"></i>%s <b id="%s">%s</b></span>',
                         number, name, name, found[name])
            # in a stack, the lower ones stand before the higher ones
            shapes = html('<path class="k%s" id="line-%s" d="%s"/>',
                          number, name, found["line-" + name]) + shapes
        top = "top-" + plot.lines[0]
        text += html('<figure><figcaption>%s</figcaption><small>max <span id="%s">%s</span></small>'
                     '<svg viewBox="0 0 149 40" preserveAspectRatio="none" role="img" '
                     'aria-label="%s, the last five minutes">',
                     plot.title, top, found[top], plot.title)
        text += "%s</svg><div>%s</div></figure>" % (shapes, keys)
    return text


def show_facts(server: Server, found: dict[str, str]) -> str:
    """What is known of the server, in pairs."""
    expires = server.transport.expires
    certificate = "none: plain HTTP"
    if expires:
        days = (expires - time.time()) / 86400
        certificate = time.strftime("%Y-%m-%d", time.gmtime(expires)) + ", %d days left" % days
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(STARTED))
    processes = " ".join(map(str, process_ids(server)))
    facts = [("up since", "up", since), ("processes", "processes", processes),
             ("certificate until", "certificate", certificate)]
    for name in CELLS[:CONNECTIONS]:
        facts.append((name.replace("_", ", "), name, found[name]))
    return "".join(html('<div><dt>%s</dt><dd id="%s">%s</dd></div>', *fact) for fact in facts)


def show_roots() -> str:
    text = ""
    for root in tuple(roots.values()):
        path = html("/%s", root.name)
        if "GET" in root.handlers:
            path = html('<a href="/%s">/%s</a>', root.name, root.name)
        text += "<tr><th scope=row>" + path
        text += html("</th><td>%s</td><td>%s</td></tr>", root.module, " ".join(root.handlers))
    return text


def show_parameters(server: Server) -> str:
    """Those in force, and where they were set. What other modules are told may be secret."""
    text = ""
    for module in ["httpd", *loaded]:
        rows = {row.name: row for row in PARAMETERS.get(module, ())}
        for name, value in in_force(module).items():
            row = rows.get(name, Parameter(name, "", "", kind="secret"))
            place = places.get((module, name), "default")
            if module == "httpd":
                value = getattr(server.params, name)            # zeros resolved
            if place == "default" and row.default not in (0, value):
                place = "the program"
            if row.kind == "secret" and value:
                value = "set, not shown"
            text += html(
                "<tr><th scope=row>%s.%s<small>%s</small></th><td>%s</td><td>%s</td></tr>",
                module, name, row.meaning, value, place)
    return text


def command_parameters(name: str) -> list[inspect.Parameter]:
    """None, if there is no such command or nobody knows its signature."""
    try:
        return list(mi_signature(mi_commands[name].function).parameters.values())
    except (KeyError, TypeError, ValueError):
        return []


def show_command(name: str, answer: Optional[str]) -> str:
    """A form; with the answer, if it has just been run."""
    fields, names = "", []
    for parameter in command_parameters(name):
        names.append(parameter.name)
        hint, required = "", " required"
        if parameter.annotation in NUMBERS:
            hint = "a number "
        if parameter.default is not parameter.empty:
            hint, required = hint + "(default %s)" % parameter.default, ""
        fields += html('<label>%s <input name=".%s" placeholder="%s"%s></label>',
                       parameter.name, parameter.name, hint, required)
    is_open = ""
    if answer is not None:
        is_open = " open"
    told, _, _ = (mi_commands[name].function.__doc__ or "").partition("\n")
    head = html('<details id="c-%s"%s><summary>%s <small>%s</small></summary><p>%s</p>'
                '<form method="post" action="#c-%s" autocomplete="off">'
                '<input type="hidden" name="command" value="%s">',
                name, is_open, name, " ".join(names), told, name, name)
    return head + fields + html(
        '<button aria-label="Run %s">Run</button><output>%s</output></form></details>',
        name, answer or "")


def show_console(server: Server, answers: dict[str, str]) -> str:
    """The page, with the answers to commands that were run."""
    found = figures(server)
    commands = [show_command(name, answers.get(name)) for name in sorted(mi_commands)]
    return CONSOLE.substitute(
        version=html("%s", __version__), url=html("%s", server.url),
        clock=time.strftime("%H:%M:%S"), plots=show_plots(found), facts=show_facts(server, found),
        roots=show_roots(), commands="".join(commands), parameters=show_parameters(server))


def called(request: Request) -> Batch:
    """What a form of the page asks for, begun. A browser says of each form whose page has it."""
    told = request.media_type == URLENCODED and "origin" in request.headers
    if not told or not is_from_own_page(request):
        raise HTTPError(403, "only the forms of this page may send commands here")
    name = request.lookup_arg("command", "")
    given = {}
    for parameter in command_parameters(name):
        value = request.lookup_arg("." + parameter.name, "")
        if value or parameter.default is parameter.empty:
            given[parameter.name] = value
            if value[:1] in ("[", "{"):
                with suppress(ValueError, RecursionError):      # else it is text
                    given[parameter.name] = json_decoder.decode(value)
    call = Call("", name, mi_commands.get(name), given, "1", True)
    calls = Calls([call], alone=True)
    request.note = names_for_log(calls)
    return Batch(calls, request)


def readable(answer: str) -> str:
    """A JSON-RPC response for people."""
    said = json.loads(answer)
    if "result" in said:
        return json.dumps(said["result"], indent=2, ensure_ascii=False)
    fault = said["error"]
    return "Error %d: %s. %s" % (fault["code"], fault["message"], fault.get("data", ""))


CONSOLE = Template("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>httpd.py at $url</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --text: #1c2126; --quiet: #58626e; --line: #dfe3e8;
  --back: #f5f6f8; --card: #fff; --accent: #0b6a88; }
@media (prefers-color-scheme: dark) { :root { --text: #e2e6ea; --quiet: #98a3af;
  --line: #2c333b; --back: #111417; --card: #191d22; --accent: #5cbad6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 75rem; color: var(--text);
  background: var(--back); font: 14px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: baseline;
  padding: 1rem 0 .6rem; }
h1 { margin: 0; font-size: 1.3rem; }
h2 { margin: 1.8rem 0 .5rem; font-size: 1rem; }
nav { margin-left: auto; display: flex; gap: 1rem; }
a { color: var(--accent); }
small, dt, thead th, figcaption, header span { color: var(--quiet); font-weight: 400;
  font-size: .86rem; }
.card, figure, dl, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; }
#plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.9rem, 1fr)); gap: .6rem; }
figure { margin: 0; padding: .5rem .7rem; display: grid; grid-template-columns: 1fr auto;
  align-content: start; }
figure:last-child { grid-column: span 2; }
figure > svg, figure > div { grid-column: 1 / 3; }
svg { width: 100%; height: 4.5rem; margin: .3rem 0; border-bottom: 1px solid var(--line); }
path { vector-effect: non-scaling-stroke; stroke: var(--accent); stroke-width: 1.5; }
figure span { white-space: nowrap; }
figure div span { margin-right: .7rem; }
i { display: inline-block; width: .6rem; height: .6rem; margin-right: .3rem;
  border: 1px solid var(--accent); border-radius: 2px; }
path { fill: color-mix(in srgb, var(--accent) var(--part), var(--card)); }
i { background: color-mix(in srgb, var(--accent) var(--part), var(--card)); }
.k0 { --part: 15%; } .k1 { --part: 35%; } .k2 { --part: 55%; } .k3 { --part: 75%; }
.k4 { --part: 100%; }
b, dd { font-variant-numeric: tabular-nums; font-weight: 600; }
dl { margin: .6rem 0 0; padding: .5rem .7rem; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
dd { margin: 0; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
#set th { width: 48%; }
#set td:last-child { width: 22%; }
dt::first-letter { text-transform: uppercase; }
tbody > tr > * { border-top: 1px solid var(--line); }
th, summary, output, td, input { font-family: ui-monospace, monospace; font-size: .86rem; }
thead th, summary small { font-family: system-ui, sans-serif; }
th small { display: block; font-family: system-ui, sans-serif; }
details { margin-bottom: .3rem; }
summary { padding: .4rem .7rem; cursor: pointer; }
details p, form { margin: 0; padding: 0 .7rem .6rem; }
form { display: flex; flex-wrap: wrap; gap: .5rem; align-items: end; }
label { flex: 1 1 12rem; max-width: 24rem; }
input { display: block; width: 100%; padding: .35rem .5rem; color: inherit;
  background: var(--back); border: 1px solid var(--quiet); border-radius: 4px; }
::placeholder { color: var(--quiet); opacity: 1; }
button { padding: .35rem 1rem; font: inherit; color: var(--card); background: var(--accent);
  border: 1px solid var(--accent); border-radius: 4px; cursor: pointer; }
[aria-busy=true] button { color: var(--accent); background: none; }
output { flex: 1 0 100%; white-space: pre-wrap; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (prefers-reduced-motion: no-preference) {
  [aria-busy=true] button { animation: wait 1s infinite alternate; }
  @keyframes wait { to { opacity: .5; } } }
@media (max-width: 40rem) { nav { margin: 0; } th, td { padding: .3rem .4rem; } }
</style>
<header><h1>httpd.py</h1><span>$version at $url</span><span id="state" role="status">as of
$clock</span><nav aria-label="Sections"><a href="#served">Served</a><a href="#commands">Commands</a>
<a href="#parameters">Parameters</a></nav></header>
<main>
<section id="plots" aria-label="The last five minutes">$plots</section>
<dl>$facts</dl>
<section aria-labelledby="served"><h2 id="served">Served</h2><div class="card"><table>
<thead><tr><th scope="col">Root<th scope="col">Module<th scope="col">Methods</thead>
<tbody>$roots</tbody></table></div></section>
<section aria-labelledby="commands"><h2 id="commands">Commands</h2>
<noscript><p>Without JavaScript a command's answer comes with a new page, and the figures stand
still.</p></noscript>$commands</section>
<section aria-labelledby="parameters"><h2 id="parameters">Parameters in force</h2>
<div class="card"><table><thead><tr><th scope="col">Name<th scope="col">Value
<th scope="col">Set at</thead><tbody id="set">$parameters</tbody></table></div></section>
</main>
<script>
"use strict";
const byId = id => document.getElementById(id);
async function look() {
  let state = "live";
  try {
    if (!document.hidden) {
      const answer = await fetch("?data", {signal: AbortSignal.timeout(9000)});
      for (const [id, text] of Object.entries(await answer.json())) {
        const element = byId(id);
        if (element instanceof SVGElement) element.setAttribute("d", text);
        else if (element) element.textContent = text;
      }
    }
  } catch { state = "no answer from the server"; }
  if (byId("state").textContent != state) byId("state").textContent = state;
  setTimeout(look, 2000);
}
document.addEventListener("submit", async event => {
  event.preventDefault();
  const form = event.target, button = form.querySelector("button"), begun = Date.now();
  const output = form.querySelector("output");
  if (form.ariaBusy == "true") return;
  const clock = setInterval(() => {
    button.textContent = "Running, " + Math.round((Date.now() - begun) / 1000) + " s";
  }, 1000);
  form.ariaBusy = "true";
  output.textContent = "Running";
  try {
    const body = new URLSearchParams(new FormData(form));
    output.textContent = await (await fetch("?data", {method: "POST", body})).text();
  } catch { output.textContent = "No answer from the server."; }
  clearInterval(clock);
  form.ariaBusy = "false";
  button.textContent = "Run";
});
look();
</script>
</html>
""")


@functools.lru_cache(maxsize=None)
def console_headers() -> FieldPairs:
    """Nothing but what stands in the page may run, style or be asked for."""
    from base64 import b64encode
    policy = ("default-src 'none'; connect-src 'self'; form-action 'self'; img-src data:; "
              "base-uri 'none'; frame-ancestors 'none'")
    for kind, text in re.findall("<(style|script)>(.*?)</", CONSOLE.template, re.DOTALL):
        policy += "; %s-src 'sha256-%s'" % (kind, b64encode(digest(text.encode())).decode())
    return (
        ("Content-Security-Policy", policy), ("X-Frame-Options", "DENY"),
        ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"),
        # no-referrer would take the Origin from the forms too
        ("Referrer-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"))


def answer_console(request: Request, page: Page) -> int:
    """The access handler of mi_html."""
    if request.url not in ("", "/"):
        raise HTTPError(404, "nothing is registered for this path")
    page.set_headers(console_headers())
    server = request._connection.server
    answers = {}
    if request.method == "POST":
        batch: Batch = request.state or called(request)
        text = batch.text()
        if text is None:
            request.state = batch
            return SUSPEND
        with suppress(RecursionError):          # nested too deeply for that: as it is
            text = readable(text)
        answers[batch.calls.members[0].method] = text
    if request.query != "data":
        text = show_console(server, answers)
    elif answers:
        page.content_type, text = "text/plain; charset=utf-8", "".join(answers.values())
    else:
        page.content_type, text = JSON, encode_json(figures(server))
    text = SURROGATE.sub("\ufffd", text)
    try:
        page.write(text)
    except BufferError:
        spool_answer(text.encode(), request, page)
    return 200


def load_mi_html(parameters: dict[str, Any]) -> None:
    register_httpdcb("mi_html", parameters["root"], answer_console, flush_spool, management=True)


BUILT_IN["mi_html"] = load_mi_html


# --------------------------------------------------------------------------------------------- WSGI
# PEP 3333 on the public callbacks. An answer that is all there goes on the page; any other is
# pieces, for flush_data_cb. Figures are us of CPU that a request costs without the kernel.

AHEAD_SIZE = 2**16          # bytes of a response that wait for the client in memory,
AHEAD_MOST = 2**24          # and in all: then its thread waits too
NO_CONTENT = (204, 205, 304)            # RFC 9110, 15.3.5, 15.3.6 and 15.4.5

Application = Callable[[Dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class FileWrapper:
    """wsgi.file_wrapper: a file as pieces of the size that suits us."""

    def __init__(self, file: Any, size: int = AHEAD_SIZE) -> None:
        self.file = file
        self.read = functools.partial(file.read, AHEAD_SIZE)
        if hasattr(file, "close"):
            self.close = file.close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")


def environ_name(name: str) -> str:
    """The key of a header field. Empty: it is left out; one with _ could pass for one with -."""
    if "_" in name or name == "transfer-encoding":
        return ""
    key = name.upper().replace("-", "_")
    if key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        return key
    return "HTTP_" + key


environ_names = Small(environ_name)     # 0.7 to 2.1


def wsgi_path(target: str) -> str:
    """The decoded path: bytes as latin-1."""
    absolute = ABSOLUTE_FORM.fullmatch(target)
    encoded = target.partition("?")[0]
    if absolute is not None:
        encoded = absolute[3] or ""
    path = unquote_to_bytes(encoded).decode("latin-1")
    if path.startswith("/"):
        return path
    return "/"                                              # of http://host, and of *


def wsgi_environ(request: Request, content: Optional[Spool], threads: int) -> dict[str, Any]:
    """PEP 3333's dictionary."""
    target, path = request.target, request.path
    if "%" in target or target[0] != "/":       # else it is the same
        path = wsgi_path(target)
    script = request.root
    if script:
        script = "/" + script
    server, port = request.server
    client, client_port = request.client
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": script,
        "PATH_INFO": path[len(script):],
        "QUERY_STRING": request.query,
        "RAW_URI": target,                      # as gunicorn calls it,
        "REQUEST_URI": target,                  # and uWSGI
        "SERVER_PROTOCOL": request.version,
        "SERVER_NAME": "[%s]" % server if ":" in server else server,
        "SERVER_PORT": str(port),
        "REMOTE_ADDR": client,
        "REMOTE_PORT": str(client_port),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": request.scheme,
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": threads > 1,
        "wsgi.multiprocess": len(request.counters.rows) > 1,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
    }
    for name, value in request.headers.items():
        environ[environ_names[name]] = value
    environ.pop("", None)
    if content is None:
        environ["wsgi.input"] = io.BytesIO()
    else:
        environ["CONTENT_LENGTH"] = str(content.size)       # known even if it came in chunks
        environ["wsgi.input"] = content.reader()
    return environ


class Start(NamedTuple):
    """What start_response() has been told."""
    status: int
    fields: FieldPairs                      # but for Content-Length, and what the server sets
    length: Optional[int]                   # bytes of all the content, as Content-Length says


def check_start(key: tuple[str, FieldPairs]) -> Start:
    """The reason phrase is lost."""
    status, headers = key
    if not re.fullmatch("[2-5][0-9]{2}( [\t -~\x80-\xff]*)?", status):
        raise ValueError("no status from 200 to 599: %r" % status)
    fields = []
    length = None
    for name, value in headers:
        kind = name.lower()
        if kind in OWN_FIELDS:
            continue
        check_field(name, value)
        if kind == "content-length":
            length = int(value)
        else:
            fields.append((name, value))
    return Start(int(status[:3]), tuple(fields), length)


starts = Small(check_start)             # 3.3


class WSGIResponse:
    """What an application says by start_response() and write(). It does not know the iterable."""
    __slots__ = ("to_head", "put", "disk", "written", "said", "size", "count")

    def __init__(
            self, request: Request, put: Optional[Callable[[bytes], Any]]) -> None:
        self.to_head = request.method == "HEAD"
        self.put = put                              # who takes what is written; None: we keep it
        self.disk = request.disk
        self.written: Optional[Spool] = None        # 3.0 to make it for those who do not write
        self.said: Optional[Start] = None
        self.size: Optional[int] = None             # bytes of all the content, as a list has them
        self.count = 0    # bytes so far; after the first, the head is on its way

    def start(self, status: str, headers: list[tuple[str, str]],
              exc_info: Any = None) -> Callable[[bytes], None]:
        """start_response()."""
        if exc_info and self.count:
            raise exc_info[1].with_traceback(exc_info[2])
        if self.said and not exc_info:
            raise RuntimeError("start_response() has been called already")
        self.said = starts[status, tuple(map(tuple, headers))]
        return self.write

    def write(self, data: bytes) -> None:
        if not self.wants(data):
            return
        if self.put is not None:
            self.put(data)
            return
        if self.written is None:
            self.written = Spool(self.disk)
        self.written.write(data)

    def wants(self, piece: bytes) -> bool:
        """Count a piece, and say whether it is to be sent."""
        if not isinstance(piece, bytes):
            raise TypeError("the application has made %r, not bytes" % type(piece))
        if not piece:
            return False
        self.count += len(piece)
        said = self.said or self.check()
        if said.length is not None and self.count > said.length:
            raise RuntimeError(
                "the application has made more than its Content-Length of %d" % said.length)
        return not self.to_head and said.status not in NO_CONTENT

    def check(self) -> Start:
        if self.said is None:
            raise RuntimeError("the application has not called start_response()")
        return self.said

    def length(self) -> Optional[int]:
        """Bytes of all the content, if that is known."""
        if self.said is None or self.said.length is None:
            return self.size
        return self.said.length


class Pieces:
    """What an application has returned, piece by piece. It runs with context variables of its own:
    Flask keeps there who is asking."""
    __slots__ = ("response", "run", "iterable", "closes", "next", "at", "is_whole")

    def __init__(self, app: Application, environ: dict[str, Any], response: WSGIResponse) -> None:
        self.response = response
        self.run = run = copy_context().run
        self.closes: Any = None                 # its close(), until that is called
        pieces: Any = run(app, environ, response.start)
        self.iterable = pieces
        self.closes = getattr(pieces, "close", None)
        self.at = 0                             # bytes given of what write() has said
        self.is_whole = False                   # all that was announced is there: PEP 3333 stops
        self.next: Callable[[], bytes]
        if isinstance(pieces, (list, tuple)):
            size = sum(map(len, pieces))
            response.size = response.count + size
            if len(pieces) > 1 and size <= AHEAD_SIZE:
                pieces = [b"".join(pieces)]
            self.next = iter(pieces).__next__
        else:
            self.next = functools.partial(run, next, run(iter, pieces))

    def next_piece(self) -> Optional[bytes]:
        """What is to be sent next; None: nothing more."""
        response = self.response
        written = response.written
        if written is not None and self.at < written.size:
            piece = written.read(self.at, AHEAD_SIZE)
            self.at += len(piece)
            return piece
        try:
            while not self.is_whole:
                piece = self.next()
                if response.wants(piece):
                    self.is_whole = response.count == response.length()
                    return piece
                self.is_whole = len(piece) > 0              # nobody wants the rest
        except StopIteration:
            self.is_whole = True
            if type(self.iterable) is GeneratorType:
                self.closes = None                  # it has closed itself
        response.check()
        return None

    def close(self) -> None:
        """Once, however it ends. What that raises cuts no answer."""
        close, self.closes = self.closes, None
        if close is not None:
            call_safely("close() of what an application has returned", self.run, close)

    def __del__(self) -> None:
        self.close()


class Handover:
    """Content that another thread makes: b"" while the next piece is not there.

    What the client has not taken waits in memory if it is little, else in a file.
    """

    def __init__(self, app: Application, request: Request) -> None:
        self.app = app
        self.environ: dict[str, Any] = {}
        self.request: Optional[Request] = None      # while the application runs
        self.disk = request.disk
        self.pid = os.getpid()
        # Only the thread adds, only the loop takes away: without a lock.
        self.queue: deque[bytes] = deque()
        self.made = self.taken = 0                  # bytes that have gone into it, and out of it
        self.lock = threading.Lock()                # of the file:
        self.spool: Optional[Spool] = None          # what comes behind the queue,
        self.at = 0                                 # and how much of it has been taken
        self.room: Optional[threading.Event] = None         # once the thread waits
        self.is_whole = False                       # nothing more is made,
        self.end: Optional[HTTPError] = None        # because of this

    def fill(self, request: Request, response: WSGIResponse) -> None:
        """In a thread: run the application, and hand over all that it makes."""
        self.request = request
        pieces = None
        try:
            if not request.closed:
                pieces = Pieces(self.app, self.environ, response)
                self._take_all(pieces)
        except BaseException as error:
            if self.pid != os.getpid():             # the application has forked: that process ends
                raise
            if isinstance(error, KeyboardInterrupt):    # of a thread: that is no Ctrl-C
                error = RuntimeError("KeyboardInterrupt in an application's thread")
            # Told here: an exception that is handed over would keep this frame alive, and it that.
            if not request.closed or not isinstance(error, BrokenPipeError):
                self.end = blame(error, request)
        self.request = None                         # they would keep each other alive
        self.environ = {}
        self.is_whole = True
        request.resume()
        if pieces is not None:
            pieces.close()                          # behind the answer, however long that takes

    def _take_all(self, pieces: Pieces) -> None:
        while (piece := pieces.next_piece()) is not None:
            if pieces.is_whole and self.made == 0:         # it leaves at once, with the head
                self.made = len(piece)
                self.queue.append(piece)
            else:
                self.put(piece)

    def put(self, piece: bytes) -> None:
        """Wait if the client has much to take yet. BrokenPipeError if it is gone."""
        request = self.request
        if request is None:
            raise RuntimeError("write() was called after the application had ended")
        while not self._take_in(piece) and not request.closed:
            if self.room is None:
                self.room = threading.Event()
                continue                            # there may be room since
            self.room.wait(1)                       # nobody tells when the client goes
            self.room.clear()
        if request.closed:
            raise BrokenPipeError("the client is gone")
        request.resume()

    def _take_in(self, piece: bytes) -> bool:
        """Keep a piece, if there is room for it."""
        most = min(AHEAD_SIZE, self.disk.spare())
        if self.spool is None and self.in_memory() <= most:
            self.made += len(piece)
            self.queue.append(piece)
            return True
        try:
            with self.lock:
                if self.spool is None:
                    self.spool = Spool(self.disk, few=0)
                    self.at = 0
                if self.spool.size + len(piece) > AHEAD_MOST:
                    return False
                self.spool.write(piece)
        except OSError as error:                    # there is no room: it waits
            self.disk.complain(error)
            return False
        return True

    def in_memory(self) -> int:
        return self.made - self.taken

    def next_piece(self) -> Optional[bytes]:
        """In the loop: all of the queue, else a part of the file; None at the end."""
        is_whole = self.is_whole                    # what is there by now is all then
        count = len(self.queue)
        piece = b"".join([self.queue.popleft() for _ in range(count)])
        self.taken += len(piece)
        if not piece and self.spool is not None:
            piece = self._read_spool()
        if self.room is not None:
            self.room.set()
        if piece or not is_whole:
            return piece
        end = self.end
        if end is not None:                         # a new one, which nobody keeps
            raise HTTPError(end.status, end.reason, end.headers)
        return None

    def _read_spool(self) -> bytes:
        with self.lock:
            assert self.spool is not None
            piece = self.spool.read(self.at, max(4096, self.disk.spare()))
            self.at += len(piece)
            if self.at == self.spool.size:
                self.spool = None
        return piece


class Running:
    """A request.state: the application runs, or has run."""
    __slots__ = ("upload", "response", "source", "rest", "spool", "at")

    def __init__(self, upload: Optional[Spool], response: WSGIResponse,
                 source: Union[Pieces, Handover]) -> None:
        self.upload = upload
        self.response = response
        self.source = source
        self.rest = NOTHING                         # of the piece that is being sent,
        self.spool: Optional[Spool] = None          # what of it is too large for memory,
        self.at = 0                                 # and how much of that has been taken

    def in_memory(self) -> int:
        size = len(self.rest)
        if self.upload is not None:
            size += self.upload.in_memory
        if isinstance(self.source, Handover):
            size += self.source.in_memory()
        return size

    def begin(self, page: Page, piece: Optional[bytes]) -> int:
        """Put the fields on the page, and the content if this is all of it; the status."""
        response = self.response
        said, length = response.check(), response.length()
        page.set_headers(said.fields)
        if piece and self.source.is_whole and len(piece) == length:
            try:
                page.write(piece)                   # 2.0 less than as a stream
                self.close_later()
                return said.status
            except BufferError:
                pass
        if length is not None:
            page.set_header("Content-Length", length)
        self.rest = memoryview(piece or b"")
        return said.status

    def next_piece(self, size: int) -> Optional[bytes]:
        """What is sent next, at most `size` bytes of what is in a file; None at the end."""
        if self.spool is not None:
            piece: Optional[bytes] = self.spool.read(self.at, size)
            self.at += len(piece or b"")
            if self.at == self.spool.size:
                self.spool = None
            return piece
        piece = None
        try:
            piece = self.source.next_piece()
        finally:
            if piece is None:
                self.close_later()
        return piece

    def spool_rest(self, disk: Disk) -> None:
        """Put what is left of a piece into a file; where there is no room, memory has to do."""
        with suppress(OSError):
            spool = Spool(disk, few=0)
            spool.write(self.rest)
            self.spool = spool
            self.at = 0
            self.rest = NOTHING

    def close_later(self) -> None:
        """All is made: the iterable is closed when it has left. A thread sees to that itself."""
        source = self.source
        closes = isinstance(source, Pieces) and source.closes is not None
        if closes and self.close_now not in observers:
            observers.append(self.close_now)

    def close_now(self, response: Response) -> None:
        """An observer, until the end of our own response is known."""
        if response.request is not None and response.request.state is self:
            observers.remove(self.close_now)
            assert isinstance(self.source, Pieces)
            self.source.close()


def flush_wsgi(request: Request, pos: int, buf: memoryview) -> int:
    """The flush_data_cb: as much of a piece as there is room for."""
    running: Running = request.state
    if not running.rest:
        piece = running.next_piece(len(buf))
        if piece is None:
            return END
        running.rest = memoryview(piece)
    size = min(len(running.rest), len(buf))
    buf[:size] = running.rest[:size]
    running.rest = running.rest[size:]
    if len(running.rest) > request.disk.spare():
        running.spool_rest(request.disk)
    request.kept = running.in_memory()
    return size


def run_in_thread(request: Request) -> None:
    """The work of a Job."""
    running: Running = request.state
    assert isinstance(running.source, Handover)
    running.source.fill(request, running.response)


class Mount:
    """A WSGI application at its root: the callbacks."""

    def __init__(self, app: Application, threads: int) -> None:
        self.app = app
        self.threads = threads
        self.pool = Pool(threads)

    def upload(self, request: Request, data: bytes) -> None:
        """The upload_data_cb. Until the application runs, request.state is the content."""
        if request.state is None:
            request.state = Spool(request.disk)
        while True:
            try:
                request.state.write(data)
                break
            except OSError as error:
                if not request.disk.make_room(error, request._connection):
                    raise HTTPError(
                        503, "no room is left for the content, see spool_size", {"Retry-After": "1"}
                    ) from None
        request.kept = request.state.in_memory

    def answer(self, request: Request, page: Page) -> int:
        """The access handler."""
        running = request.state
        if not isinstance(running, Running):
            if self.threads:
                return self.begin(request, running)
            response = WSGIResponse(request, None)
            environ = wsgi_environ(request, running, 0)
            pieces = Pieces(self.app, environ, response)
            running = request.state = Running(running, response, pieces)
        piece = running.next_piece(0)
        if piece == b"":
            request.kept = running.in_memory()
            return SUSPEND
        return running.begin(page, piece)

    def begin(self, request: Request, upload: Optional[Spool]) -> int:
        """Have the application run in a thread."""
        if self.pool.is_full():
            raise HTTPError(503, "too many requests wait for a thread", {"Retry-After": "1"})
        handover = Handover(self.app, request)
        handover.environ = wsgi_environ(request, upload, self.threads)
        request.state = Running(upload, WSGIResponse(request, handover.put), handover)
        self.pool.submit(Job(weakref.ref(request), run_in_thread), request._connection.server)
        return SUSPEND


def register_wsgi(module: str, root_path: str, app: Application, *, threads: int = 0) -> None:
    """Mount a WSGI application (PEP 3333): SCRIPT_NAME is `/root_path`; "" mounts it at / for what
    no other root takes. Every method but CONNECT and TRACE goes to it.

    threads   0: it runs in the server's thread, nobody else is served meanwhile, and its iterable
              is read as the client takes it. Else in so many threads; up to 16 MiB of a response
              leave its thread at once. One that streams events keeps a thread. When its client
              goes, write() raises BrokenPipeError, and where it yields there is GeneratorExit

    Request content is limited by wsgi_body_size. ConfigError as from register_httpdcb(). Any
    thread.
    """
    if not callable(app) or not isinstance(threads, int) or threads < 0:
        raise ConfigError(
            "%s: no application, or no number of threads: %r, %r" % (module, app, threads))
    mount = Mount(app, threads)
    register_httpdcb(
        module, root_path, mount.answer, flush_wsgi, content_type="", upload_data_cb=mount.upload,
        methods=None, upload_limit="wsgi_body_size")


# ---------------------------------------------------------------------------------------- Processes
# Only here is forked, are signals handled, and is said to others that all is ready; only run() does
# it. A parent that has workers serves nothing itself.

LISTEN_FD = 3           # where a socket is handed over, sd_listen_fds(3)
KEPT_TIME = 3.0         # seconds that kept connections get after a restart, for one more request
BEAT = 1.0              # seconds between two signs of life of a worker,
LATE = 3.0              # and without one until it is spoken of
LEAST_PART = 4          # connections that a worker may always have
ASIDE = 0.001           # seconds that it leaves new ones to others, if it has more than its part


def say(text: str, to_stderr: bool) -> None:
    """Print, if anybody reads it: that is no reason not to serve."""
    try:
        if to_stderr:
            print(text, file=sys.stderr, flush=True)
        else:
            print(text, flush=True)
    except ValueError:                  # closed by the program, or an encoding that lacks a letter
        return
    except OSError:                     # the interpreter would fail at its end too
        if not to_stderr:
            sys.stdout = open(os.devnull, "w")


# The program of a new process, before it becomes ours: it has the number that LISTEN_PID wants.
HAND_OVER = """
import os, sys
for number, text in enumerate(sys.argv[1].split(","), 3):
    os.dup2(int(text), number)
    os.close(int(text))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Environment(NamedTuple):
    """What this process is told, and those that it starts are not."""
    notify: str             # the address of systemd's socket; empty: nobody listens
    watchdog: float         # seconds in which it wants a sign of life; 0: none
    sockets: list[socket.socket]        # that are handed over
    ready: int              # descriptor, for the process that this one replaces; -1: none
    file: str               # of the unix socket that it is to remove; empty: that is another's
    only_check: bool        # it is to say there whether it could serve, and to end
    before: str             # the lifeline, and the workers, of the program that it was before


def take_number(name: str, default: int) -> int:
    """What the environment says, once. ConfigError if it is no number."""
    text = os.environ.pop(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError("httpd: %s=%s in the environment is no number" % (name, text)) from None


def take_listeners() -> list[socket.socket]:
    """The sockets that systemd, or a process that this one replaces, hands over."""
    count, pid = take_number("LISTEN_FDS", 0), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", "")
    if count and pid != str(os.getpid()):
        raise ConfigError("httpd: the socket that is handed over is for process %s: start this "
                          "one with exec" % pid, "ip")
    sockets = []
    for descriptor in range(LISTEN_FD, LISTEN_FD + count):
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError("httpd: a socket that is handed over does not listen", "ip")
        sockets.append(sock)
    return sockets


def take_environment() -> Environment:
    """ConfigError if what is handed over are no listeners."""
    take = functools.partial(os.environ.pop)
    try:
        sockets = take_listeners()
        ready = take_number("HTTPD_READY_FD", -1)
        if ready >= 0:
            os.set_inheritable(ready, False)
    except OSError as error:
        raise ConfigError("httpd: what LISTEN_FDS or HTTPD_READY_FD of the environment hand over "
                          "is no socket or pipe: %s" % error.strerror, "ip") from None
    watchdog = take_number("WATCHDOG_USEC", 0) / 1e6
    return Environment(take("NOTIFY_SOCKET", ""), watchdog, sockets, ready, take("HTTPD_FILE", ""),
                       take("HTTPD_ONLY_CHECK", "") != "", take("HTTPD_BEFORE", ""))


def notify(address: str, text: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(text.encode(), re.sub("^@", "\0", address))


class Part:
    """A worker's part of the connections.

    Of those that wait for a connection EPOLLEXCLUSIVE wakes the first one, so each goes to the end
    after it has taken some in. Who has more than an eighth over his part leaves them to others for
    a moment; never before he has taken one: nobody else would be woken for that.
    """

    def __init__(self, server: Server) -> None:
        self.server = server

    def wait_last(self, loop: Loop) -> None:
        for listener in loop.listeners:
            descriptor = listener.sock.fileno()
            loop.poll.unregister(descriptor)
            loop.poll.register(descriptor, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def look(self) -> None:
        server = self.server
        counters, loop = server.counters, server.loop
        mine = counters.row[TAKEN] = len(server.connections)
        if not loop.accepting:
            return
        late = int((time.monotonic() - 1.5 * BEAT) * 1000)     # who is stuck takes no part
        others = [row[TAKEN] for row in counters.rows if row[ALIVE] > late]
        if mine > LEAST_PART and (mine - 1) * len(others) > 1.125 * sum(others):
            loop.set_accepting(False)
            server.call_later(ASIDE, functools.partial(loop.set_accepting, True))
        else:
            self.wait_last(loop)


class Worker:
    """A process that serves, as its parent sees it."""

    def __init__(self, number: int) -> None:
        self.number = number            # of its row
        self.pid = 0                    # 0: it does not run
        self.ready = False
        self.started = -math.inf        # on the clock of time.monotonic()
        self.looks = 0                  # that have found it late, one after the other


class Signals:
    """Signals that have come, for a loop that watches `bell`: it does what they want, not the
    handler, which may come in the middle of anything."""

    def __init__(self) -> None:
        self.numbers: deque[int] = deque()
        self.bell, self.button = socket.socketpair()
        self.bell.setblocking(False)
        self.button.setblocking(False)

    def note(self, number: int, frame: Any) -> None:
        """The handler."""
        self.numbers.append(number)
        with suppress(OSError):             # enough have rung, or all is over
            self.button.send(b"!")

    def take(self) -> Iterator[int]:
        with suppress(BlockingIOError):
            self.bell.recv(4096)
        while self.numbers:
            yield self.numbers.popleft()


class Process:
    """What run() does: a server with its signals, its supervisor and its successor."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.environment = environment = take_environment()
        self.directory = "."
        with suppress(OSError):         # it may have been removed, and only a restart needs it
            self.directory = os.getcwd()
        self.signals = Signals()
        self.stops = 0                  # signals to stop so far
        self.successor: Optional[subprocess.Popen[bytes]] = None
        inherited = [Listener(sock) for sock in environment.sockets]
        for listener in inherited:
            if listener.path != environment.file:
                listener.path = ""
        server.bind(inherited)

    def say_ready(self) -> None:
        """To people, to systemd, and to the process that this one replaces."""
        server = self.server
        addresses = [listener.address for listener in server.bind()]
        urls = " and ".join(url_of(server.transport.scheme, *address) for address in addresses)
        banner = "httpd.py %s listens on %s" % (__version__, urls)
        if addresses[0][0] in ("::", "0.0.0.0"):
            banner += " and every other address"
        for root in roots.values():
            banner += "\n  /%s  %s" % (root.name, root.module)
        # lines of the log, and nothing else, go to stdout
        say(banner, to_stderr=server.params.access_log == "-")
        self.notify("READY=1\nMAINPID=%d\nSTATUS=%s" % (os.getpid(), urls))
        self.answer_predecessor()

    def answer_predecessor(self) -> None:
        if self.environment.ready >= 0:
            with suppress(OSError):
                os.write(self.environment.ready, b"1")
                os.close(self.environment.ready)

    def notify(self, text: str) -> None:
        notify(self.environment.notify, text)

    def reload(self) -> bool:
        now = time.monotonic() * 1e6
        self.notify("RELOADING=1\nMONOTONIC_USEC=%d" % now)
        done = self.server.reload()
        self.notify("READY=1")
        return done

    def successors_line(self, sockets: Iterable[int]) -> list[str]:
        """The command that starts the program anew, as this process was started."""
        with open("/proc/self/cmdline", "rb") as file:
            arguments = map(os.fsdecode, file.read().split(b"\0")[1:-1])
        return [sys.executable, "-c", HAND_OVER, ",".join(map(str, sockets)), *arguments]

    def successors_environment(self, **more: str) -> dict[str, str]:
        listeners, watchdog = self.server.bind(), int(self.environment.watchdog * 1e6)
        return {**os.environ, "NOTIFY_SOCKET": self.environment.notify,
                "WATCHDOG_USEC": str(watchdog), "LISTEN_FDS": str(len(listeners)),
                "HTTPD_FILE": listeners[0].path, **more}

    def copies(self, descriptor: int) -> list[int]:
        """Of a descriptor and the sockets, with numbers that HAND_OVER leaves alone."""
        import fcntl
        sockets = [listener.sock.fileno() for listener in self.server.bind()]
        least = LISTEN_FD + len(sockets)
        return [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, least) for one in (descriptor, *sockets)]

    def start_successor(self, **more: str) -> int:
        """Start the program anew, with the listeners. The descriptor that tells when it is ready;
        -1: it cannot be. `more`: of its environment."""
        if self.successor is not None:
            log.error("no restart: one is under way")
            return -1
        if self.stops or self.server.bind()[0].sock.fileno() < 0:
            log.error("no restart: this process is ending")
            return -1
        import subprocess                       # 9 ms, and only a restart needs it
        reading, writing = os.pipe()
        ready, *sockets = copies = self.copies(writing)
        environment = self.successors_environment(HTTPD_READY_FD=str(ready), **more)
        try:
            self.successor = subprocess.Popen(
                self.successors_line(sockets), env=environment, cwd=self.directory, pass_fds=copies)
        except OSError as error:
            log.error("no restart: %s", error)
            os.close(reading)
            return -1
        finally:
            for descriptor in (writing, *copies):
                os.close(descriptor)
        return reading

    def has_come_up(self, reading: int) -> bool:
        """What the successor says, once it has: ready, or nothing, since it has ended."""
        said = os.read(reading, 1)
        os.close(reading)
        if not said:
            status = self.end_of_successor().wait()
            if not self.stops:
                log.error("no restart: the new process has ended with %d: this one goes on", status)
        return bool(said)

    def begin_stop(self) -> None:
        """A signal wants that all ends: a restart that is under way too."""
        self.notify("STOPPING=1")
        self.stops += 1
        if self.successor is not None:
            self.successor.terminate()

    def end_of_successor(self) -> subprocess.Popen[bytes]:
        """It has ended, or is no longer this one's."""
        successor, self.successor = self.successor, None
        assert successor is not None
        return successor

    def make_way(self) -> None:
        """The successor serves."""
        successor = self.end_of_successor()
        self.notify("MAINPID=%d" % successor.pid)
        for listener in self.server.bind():
            listener.path = ""                  # its file is the successor's
        log.info("process %d has taken over", successor.pid)
        successor.returncode = 0                # it is to outlive this one


def beat(process: Process) -> None:
    """A sign of life: of a worker to its parent, of a process without workers to systemd."""
    server = process.server
    row = server.counters.row
    row[PROCESS] = os.getpid()
    row[ALIVE] = int(time.monotonic() * 1000)
    row[TAKEN] = len(server.connections)
    measure(server)
    server.call_later(BEAT, functools.partial(beat, process))


def keep_watchdog(process: Process) -> None:
    """Tell systemd that this process does its work."""
    process.notify("WATCHDOG=1")
    seconds = process.environment.watchdog / 2
    process.server.call_later(seconds, functools.partial(keep_watchdog, process))


class Alone(Process):
    """A process that serves by itself."""

    def run(self) -> None:
        server = self.server
        server.watch(self.signals.bell, self.obey)
        initialize(server)              # before anybody is told that it serves
        if self.environment.watchdog:
            keep_watchdog(self)
        self.say_ready()
        freeze_collector()
        server.run()

    def check(self) -> None:
        raise ConfigError("httpd: process 1 of a container goes on with workers only: set 2 or "
                          "more, or start the container anew", "workers")

    def obey(self) -> None:
        """What signals want."""
        for number in self.signals.take():
            if number == signal.SIGHUP:
                self.reload()
            elif number == signal.SIGUSR2:
                self.restart()
            else:
                self.server.stop(0 if self.stops else None, wait=False)
                self.begin_stop()

    def restart(self) -> None:
        if os.getpid() == 1:
            log.error("no restart: this is process 1 of a container, and all would end with it; "
                      "with workers = 2 it can be")
            return
        reading = self.start_successor()
        if reading >= 0:
            watch: Watch = self.server.watch(reading, lambda: self.end_restart(watch, reading))

    def end_restart(self, watch: Watch, reading: int) -> None:
        watch.close()
        if self.has_come_up(reading) and not self.stops:
            self.make_way()
            self.server.stop(wait=False, kept=KEPT_TIME)


# Signals that workers have handlers for. The last one is the parent's: end at once.
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGQUIT)


def flush_output() -> None:
    """os._exit() does not, and what is not written before a fork would be written twice."""
    for file in (sys.stdout, sys.stderr):
        with suppress(Exception):               # nobody reads it
            file.flush()


class Parent(Process):
    """A process that has workers, and sees to it that there are as many as are wanted."""

    def __init__(self, server: Server, count: int) -> None:
        super().__init__(server)
        server.counters = Counters(count)
        server.sharing = Part(server)
        self.workers = [Worker(number) for number in range(count)]
        # The end of the first lifeline is this process' end. Another is of the workers of the
        # program that this process was before: they serve until the new ones are ready.
        self.lifeline, lifeline = os.pipe()
        self.lifelines = [lifeline]
        self.before: list[int] = []
        if self.environment.before:
            lifeline, *self.before = map(int, self.environment.before.split())
            os.set_inheritable(lifeline, False)
            self.lifelines.append(lifeline)
        self.kill_before_at = math.inf          # when their grace is over
        self.pipes: dict[int, Worker] = {}      # by which workers say that they are ready
        self.restarting = -1                    # the same of a successor
        self.begun = False                      # all have been ready once
        self.to_reload: list[Worker] = []       # one after the other
        self.kill_at = math.inf                 # when the grace of stop() is over

    def run(self) -> None:
        freeze_collector()
        try:
            while self.kill_at == math.inf or self.pids():
                self.turn()
        finally:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def check(self) -> None:
        """Nothing is wrong with parameters and modules."""
        self.answer_predecessor()

    def pids(self) -> list[int]:
        """Of the workers that live, those of the program before too."""
        return [*self.before, *(worker.pid for worker in self.workers if worker.pid)]

    def turn(self) -> None:
        """Wait for something, at most a moment, and see to all."""
        now = time.monotonic()
        for worker in self.workers:
            if not worker.pid and self.kill_at == math.inf and now >= worker.started + BEAT:
                self.start(worker)
        files: list[Any] = [self.signals.bell, *self.pipes]
        if self.restarting >= 0:
            files.append(self.restarting)
        ready, _, _ = select.select(files, [], [], BEAT / 2)
        for number in self.signals.take():
            self.obey(number)
        for file in ready:
            if file in self.pipes:
                self.hear(file, self.pipes.pop(file))
            elif file == self.restarting:
                self.end_restart()
        for worker in self.workers:
            self.look_at(worker)
        self.look_at_those_before()
        self.reload_one()
        if self.environment.watchdog:
            self.notify("WATCHDOG=1")

    def reload_one(self) -> None:
        """Have one more worker reload, after the others have."""
        if self.to_reload:
            worker = self.to_reload.pop()
            if worker.pid:
                os.kill(worker.pid, signal.SIGHUP)

    def start(self, worker: Worker) -> None:
        reading, writing = os.pipe()
        worker.started = time.monotonic()
        worker.ready = False
        worker.looks = 0
        flush_output()
        # What comes before the worker has handlers of its own would be lost.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        worker.pid = os.fork()
        if worker.pid == 0:
            status = self.be_worker(worker, writing, mask)
            flush_output()
            os._exit(status)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writing)
        self.pipes[reading] = worker

    def be_worker(self, worker: Worker, writing: int, mask: Iterable[int]) -> int:
        """In the new process: serve. The status that it ends with."""
        server = self.server
        try:
            self.signals = Signals()            # of its own
            for number in HANDLED:
                signal.signal(number, self.signals.note)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for descriptor in (*self.lifelines, *self.pipes):
                os.close(descriptor)
            server.counters.take(worker.number)
            if worker.number:
                pending_services.clear()        # they are for the first one
            server.watch(self.signals.bell, self.obey_as_worker)
            self.watch = server.watch(self.lifeline, self.end_with_parent)
            beat(self)
            initialize(server)
            os.write(writing, b"1")
            os.close(writing)
            server.run()
            return 0
        except ConfigError as error:
            reason = "%s:%s" % (error.parameter, error)
            os.write(writing, reason.encode(errors="replace")[:select.PIPE_BUF])
        except OSError as error:
            reason = ":httpd: worker %d cannot serve: %s" % (worker.number, error.strerror)
            with suppress(OSError):             # that it has been ready is known there
                os.write(writing, reason.encode())
        except BaseException:
            log.exception("worker %d has failed", worker.number)
        return 1

    def end_with_parent(self) -> None:
        """In a worker: the parent stops, or has died. No signal: systemd sends SIGTERM to all of a
        service, and a second one would end requests at once."""
        self.watch.close()                  # it would be ready for ever
        self.server.stop(wait=False)

    def obey_as_worker(self) -> None:
        """In a worker: what its parent wants. Ctrl-C is for the parent only."""
        for number in self.signals.take():
            if number == signal.SIGHUP:
                self.server.reload()
            elif number == signal.SIGUSR2:
                self.server.stop(wait=False, kept=KEPT_TIME)
            elif number == signal.SIGQUIT:
                self.server.stop(0, wait=False)
            elif number == signal.SIGTERM:
                self.server.stop(0 if self.stops else None, wait=False)
                self.stops += 1

    def tell(self, number: int) -> None:
        """Send a signal to every worker."""
        for pid in self.pids():
            os.kill(pid, number)

    def obey(self, number: int) -> None:
        """What a signal wants."""
        if number in (signal.SIGTERM, signal.SIGINT):
            self.end()
            self.begin_stop()
        elif number == signal.SIGHUP and self.reload():     # a mistake is for nobody else
            self.to_reload = self.workers[:]
        elif number == signal.SIGUSR2 and os.getpid() == 1:
            self.restarting = self.start_successor(HTTPD_ONLY_CHECK="1", HTTPD_FILE="")
        elif number == signal.SIGUSR2:
            self.restarting = self.start_successor()

    def end(self, replaced: bool = False) -> None:
        """Have the workers end. `replaced`: a successor serves."""
        seconds = self.server.params.grace_timeout + 2
        if replaced:
            seconds += KEPT_TIME
            self.tell(signal.SIGUSR2)
        elif self.stops:
            seconds = 1
            self.tell(signal.SIGQUIT)
        else:
            while self.lifelines:
                os.close(self.lifelines.pop())
        self.kill_at = min(self.kill_at, time.monotonic() + seconds)
        for listener in self.server.bind():
            listener.close()

    def end_restart(self) -> None:
        reading, self.restarting = self.restarting, -1
        if not self.has_come_up(reading) or self.stops:
            return
        if os.getpid() == 1:
            self.become_successor()
        else:
            self.make_way()
            self.end(replaced=True)

    def become_successor(self) -> None:
        """Process 1 of a container, with which all would end: run the new program in it. There is
        no way back, so that has been checked."""
        self.end_of_successor().wait()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)    # until it has handlers
        lifeline, *sockets = copies = self.copies(self.lifelines[0])
        for descriptor in copies:
            os.set_inheritable(descriptor, True)
        before = " ".join(map(str, (lifeline, *self.pids())))
        flush_output()
        try:
            os.chdir(self.directory)
            os.execve(sys.executable, self.successors_line(sockets),
                      self.successors_environment(HTTPD_BEFORE=before))
        except OSError as error:
            log.error("no restart: %s", error)
        for descriptor in copies:
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def hear(self, pipe: int, worker: Worker) -> None:
        """A worker is ready, or has ended before."""
        said = os.read(pipe, select.PIPE_BUF)
        os.close(pipe)
        worker.ready = said == b"1"
        if not worker.ready:
            self.complain(worker, said.decode(errors="replace"))
        if not self.begun and all(one.ready for one in self.workers):
            self.begun = True
            self.say_ready()
            for pid in self.before:
                os.kill(pid, signal.SIGUSR2)
            grace = self.server.params.grace_timeout + KEPT_TIME + 2
            self.kill_before_at = time.monotonic() + grace

    def complain(self, worker: Worker, reason: str) -> None:
        """A worker has not become ready. At the start this is the end; else it is tried again."""
        parameter, _, text = reason.partition(":")
        if not text:
            text = "httpd: worker %d has ended before it was ready" % worker.number
        if not self.begun:
            raise ConfigError(text, parameter)
        log.error("%s", text)

    def look_at(self, worker: Worker) -> None:
        """Whether a worker lives, and turns its loop."""
        if not worker.pid:
            return
        ended, status = os.waitpid(worker.pid, os.WNOHANG)
        row = self.server.counters.rows[worker.number]
        if ended:
            worker.pid = row[PROCESS] = row[TAKEN] = 0
            if status or self.kill_at == math.inf:
                log.error("worker %d, process %d, has ended: %s", worker.number, ended,
                          describe_status(status))
            return
        now = time.monotonic()
        silent = now - row[ALIVE] / 1000
        if now >= self.kill_at:
            os.kill(worker.pid, signal.SIGKILL)
        elif not worker.ready or silent < LATE:
            worker.looks = 0
        else:
            worker.looks += 1
            if worker.looks == 2:               # one late look may be a pause of the machine
                log.error("worker %d, process %d, is stuck: its loop has not turned for %.0f s",
                          worker.number, worker.pid, silent)
            if 0 < self.server.params.worker_timeout < silent and worker.looks > 1:
                os.kill(worker.pid, signal.SIGKILL)

    def look_at_those_before(self) -> None:
        """Whether the workers of the program that this process was before have ended."""
        for pid in tuple(self.before):
            if time.monotonic() >= min(self.kill_at, self.kill_before_at):
                os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.before.remove(pid)
        if not self.before and len(self.lifelines) > 1:
            os.close(self.lifelines.pop())


def describe_status(status: int) -> str:
    if os.WIFSIGNALED(status):
        return "killed by %s" % signal.Signals(os.WTERMSIG(status)).name
    return "exit status %d" % os.WEXITSTATUS(status)


def freeze_collector() -> None:
    """Full collections need not look at what was loaded: 3 ms. PyPy has none of it."""
    freeze = getattr(gc, "freeze", None)
    if freeze is not None:
        freeze()


def run(**parameters: Any) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the grace. SIGHUP: reload(). SIGUSR2: a new
    process of the same program takes over, and nothing is lost.

    With the parameter workers in so many processes. Main thread. ConfigError, or OSError if it
    cannot listen.
    """
    if loading:
        raise ConfigError("%s: calls httpd.run() while it is loaded: write that below "
                          'if __name__ == "__main__":' % loading[-1])
    server = Server(**parameters)
    count = server.params.workers or len(os.sched_getaffinity(0))
    process: Union[Alone, Parent]
    if count == 1:
        process = Alone(server)
    else:
        process = Parent(server, count)
    wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2]
    if isinstance(process, Parent):
        wanted.append(signal.SIGCHLD)
    previous = {}
    try:
        for number in wanted:
            previous[number] = signal.signal(number, process.signals.note)
        if process.environment.before:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        if process.environment.only_check:
            process.check()
        else:
            process.run()
    finally:
        server.stop(0)
        for listener in server.bind():
            listener.close()
        for number, before in previous.items():
            signal.signal(number, before)
        process.signals.bell.close()
        process.signals.button.close()


# --------------------------------------------------------------------------------------------- main

def describe_parameters() -> str:
    """The table of parameters, for --help."""
    lines = ["parameters, for the file or -o (those of other modules as -o module.name=value):"]
    for module, rows in PARAMETERS.items():
        lines += ["", "[%s]" % module]
        for row in rows:
            notes = ["default %s" % (row.default if row.default != "" else "empty")]
            if row.bounds():
                notes.append(row.bounds())
            lines.append("  %-17s %s" % (row.name, row.meaning))
            lines.append("%20s(%s)" % ("", ", ".join(notes)))
    return "\n".join(lines)


def print_in_force() -> None:
    """What -t shows: the parameters, in the form of a configuration, and what is served."""
    server = Server()
    secrets = {row.name for row in PARAMETERS["httpd"] if row.kind == "secret"}
    for module in ["httpd", *loaded]:
        print("[%s]" % module)
        for name, value in in_force(module).items():
            if module == "httpd":
                value = getattr(server.params, name)        # zeros resolved
            if name in secrets and value:
                print("# %s is set" % name)
            else:
                print("%s = %s" % (name, value))
        print()
    plan = server.transport.plan
    if plan is not None:
        for name, value in plan._asdict().items():
            if isinstance(value, tuple):
                value = " ".join(value)
            if name != "notes":
                print("# TLS %s: %s" % (name, value))
        for note in plan.notes:
            print("# TLS notes: %s" % note)
    for root in roots.values():
        print("# /%s  %s" % (root.name, root.module))


def print_beginning() -> None:
    """What -t shows without a file: a configuration to begin with."""
    Server()                            # ConfigError, if they do not fit together
    for module in ["httpd", *loaded]:
        print("[%s]" % module)
        for row in PARAMETERS[module]:
            value, sign = in_force(module)[row.name], "# "
            if value != row.default:
                sign = ""
            print("# %s\n%s%s = %s" % (row.meaning, sign, row.name, value))
        print()


def check(path: str) -> int:
    """What -t does: the status."""
    output = io.StringIO()
    with redirect_stdout(output):
        if path:
            print_in_force()
        else:
            print_beginning()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = output.getvalue().encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, end="", flush=True)
    except OSError as error:
        print("httpd.py: the output cannot be written: %s" % error.strerror, file=sys.stderr)
        sys.stdout = open(os.devnull, "w")      # the interpreter would fail at its end too
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    import argparse                     # 6 ms, and only the command line needs it
    parser = argparse.ArgumentParser(
        prog="httpd.py", description="A management server over HTTP.", epilog=describe_parameters(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", default="",
        help="the configuration; without: the console page, /mi and /metrics for this machine")
    add("-t", action="store_true", help="check the file, print what would be in force")
    add("-o", metavar="NAME=VALUE", action="append", default=[],
        help="set a parameter over the file")
    add("-v", action="store_true", help="log what is refused and why connections end")
    add("--version", action="version", version="httpd.py " + __version__)
    return parser


def complain(path: str, text: str, parameter: str) -> int:
    """Say what has turned out to be wrong only now, with the line that has set the parameter."""
    if parameter:
        text = "httpd: " + re.sub("^httpd: ", "", text)
    place = places.get(("httpd", parameter), path)
    print("%s: %s" % (place, text), file=sys.stderr)
    return 1


def main(arguments: Optional[list[str]] = None) -> int:
    """The command line: 0, 1 for a bad configuration or a failed start, 2 for bad usage."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for text in options.o:
        if "=" not in text:
            parser.error("-o %s: write -o NAME=VALUE" % text)
    level = logging.DEBUG if options.v else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        load_config(options.file, options.o)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        if options.t:
            return check(options.file)
        run()
    except ConfigError as error:
        return complain(options.file or "inside", str(error), error.parameter)
    except OSError as error:
        hint, parameter = "", "port"
        if error.errno == errno.EMFILE:
            hint, parameter = ": raise the limit, see ulimit -n", ""
        return complain(options.file or "inside", "%s%s" % (error.strerror, hint), parameter)
    return 0


if __name__ == "__main__":
    sys.modules["httpd"] = sys.modules["__main__"]      # for what the configuration loads
    sys.exit(main())
