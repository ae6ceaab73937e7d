#!/usr/bin/env python3
"""An HTTP endpoint for any Linux program, in one file of standard-library Python.

Copy the file into a project and register what answers below a root path:

    import httpd

    def hello(request, page):
        page.write("Hello, %s!\\n" % request.lookup_arg("name", "world"))
        return 200

    httpd.register_httpdcb("example", "hello", hello)
    httpd.run(ip="127.0.0.1", port=8000)

or run it as a management server: `python httpd.py example.cfg`.

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
spool or descriptors are short, whoever is furthest behind his time gives way (Server._make_room).

Who knows what: the parser knows bytes only. A Connection runs states, and `turn` alone knows "would
block" of a connection. The Loop knows the selector and the descriptors that are watched, the Server
the connections and the time. It lives in one thread; stop(), resume(), reload_tls() are for any.
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
from collections import deque
from contextlib import closing
from contextlib import contextmanager
from contextlib import suppress
from contextvars import copy_context
from email.utils import formatdate
from http import HTTPStatus
from importlib import import_module
from typing import TYPE_CHECKING
from typing import Any
from typing import Callable
from typing import Collection
from typing import Dict
from typing import Generator
from typing import Iterable
from typing import Iterator
from typing import Mapping
from typing import NamedTuple
from typing import Optional
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

__version__ = "0.1"
__all__ = [
    "register_httpdcb", "unregister_httpdcb", "register_wsgi", "register_mi",
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
    kind: str = "text"          # of a text: which of the `checks` it has to pass

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
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise ValueError("must be an IPv4 or IPv6 address, or empty or * for all of them") from None


def check_root(text: str) -> None:
    """OpenSIPS' rule for root paths."""
    if not re.fullmatch("[A-Za-z0-9_]*", text):
        raise ValueError("must be one path segment of letters, digits and _")


# By Parameter.kind: raises ValueError, which says what a text must be. The section TLS adds
# "priority".
checks: dict[str, Callable[[str], object]] = {
    "text": str, "path": str, "address": check_address, "root": check_root}

PARAMETERS: dict[str, tuple[Parameter, ...]] = {
    "httpd": (
        Parameter("ip", "",
                  "address to listen on; empty or *: every address of the machine", kind="address"),
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
        Parameter("max_header_size", 16384,
                  "bytes of request line and fields; larger: 414 or 431", 256, 2**16),
        Parameter("grace_timeout", 10.0,
                  "seconds that requests under way get to finish when the server is stopped"),
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
}
# The modules of this file: what loads each, with its parameters in force. Their sections put
# themselves in.
BUILT_IN: dict[str, Callable[[dict[str, Any]], object]] = {}

params: dict[str, dict[str, Any]] = {}      # module -> the parameters that have been set
loaded: list[str] = []                      # modules, in the order of loading
# parameter of httpd -> FILE:LINE, where it has been set there
places: dict[str, str] = {}


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
        meant = SYNONYMS.get(name.lower(), name.lower())
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
    max_header_size: int
    grace_timeout: float
    other_content: str      # the parameter that limits content which is no form
    memo_size: int          # bytes for heads that have been parsed
    held_size: int          # bytes for what is under way
    keep_alive: float       # conn_timeout, which has no end if that is 0
    for_ever: float
    max_open: int           # max_connections, as many as there are descriptors for if that is 0

    def __init__(self, **overrides: Any) -> None:
        self.__dict__.update(in_force("httpd", **overrides))
        self._check_tls()
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

    def _check_tls(self) -> None:
        for name, other, missing in (
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
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
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
            hint = nearest(name, ["httpd", *BUILT_IN])
        raise ConfigError("%s: cannot be loaded: %s%s" % (name, describe(error), hint)) from error
    finally:
        loading.pop()
    loaded.append(name)


def module_name(text: str) -> str:
    """`mi_http`, of what OpenSIPS calls `/usr/lib/opensips/modules/mi_http.so`."""
    return re.sub(r"^.*/|\.so$", "", text)


def start_module(name: str) -> None:
    """Call a module's mod_init. Only parameters that have been set make one necessary."""
    if name in BUILT_IN:
        BUILT_IN[name](in_force(name))
        return
    mod_init = getattr(import_module(name), "mod_init", None)
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


def read_lines(path: str) -> list[str]:
    """The lines of a text. ConfigError if it cannot be read."""
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
        place = "%s:%d" % (path, number)
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
    """Read a configuration: set its parameters, then `overrides`, and load its modules.

    ConfigError has all problems, each a line `FILE:LINE: MODULE: what is wrong`. Main thread.
    """
    problems: list[str] = []
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
        # a user's module may lie beside it
        sys.path.append(os.path.dirname(os.path.abspath(path)))
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
    if not setting.value or kinds.get(setting.name) != "path":
        return setting
    return setting._replace(value=os.path.join(directory, setting.value))


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
        if module == "httpd":
            places[name] = setting.place


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


OK = 200            # CPython has one object of it: what is another one is looked at closer
class ContentTooLarge(HTTPError):
    """413. `parameter` is what the operator may raise; the log names it too."""

    def __init__(self, limit: float, parameter: str) -> None:
        super().__init__(413, "the content is larger than %.0f bytes, see %s" % (limit, parameter))
        self.parameter = parameter


SUSPEND = -2        # what an access handler returns to be called again, after request.resume()
END = -1            # what flush_data_cb returns at the end of the content

AccessHandler = Callable[["Request", "Page"], Any]
FlushData = Callable[["Request", int, memoryview], int]
UploadData = Callable[["Request", bytes], Any]
Service = Tuple[str, Callable[["Server"], Any]]         # the module, and what starts it


class Root(NamedTuple):
    """A root path and who answers there."""
    name: str
    module: str
    handlers: Mapping[str, AccessHandler]       # by method
    content_type: str
    flush: Optional[FlushData] = None
    upload: Optional[UploadData] = None
    upload_limit: Union[float, str] = 0         # bytes, or the parameter of httpd that says it


roots: dict[str, Root] = {}                             # by root path, in the order of registration
# the init_proc_cb's that this process has not run yet
pending_inits: list[tuple[str, Callable[[], Any]]] = []     # and the modules they belong to
pending_services: list[Service] = []                    # that no server of this process runs
init_lock = threading.RLock()
# RFC 9110, 9.3 and RFC 5789: 405 where a root does not list them; what else nobody lists is 501.
# CONNECT is for proxies.
known_methods = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"}


def register_httpdcb(module: str, root_path: str, access_handler_cb: AccessHandler,
                     flush_data_cb: Optional[FlushData] = None,
                     init_proc_cb: Optional[Callable[[], Any]] = None, *,
                     content_type: str = "text/html; charset=utf-8",
                     methods: Sequence[str] = ("GET", "POST"),
                     upload_data_cb: Optional[UploadData] = None,
                     upload_limit: Union[float, str] = math.inf) -> None:
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
    upload_data_cb     upload_data_cb(request, data) gets the content piece by piece as it arrives,
                       and then the handler is called with an empty request.body. HTTPError refuses
                       the rest of it
    upload_limit       bytes of the largest content for upload_data_cb, or the name of a parameter
                       of httpd that says so; larger: 413

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
    if isinstance(upload_limit, str):
        in_force("httpd", **{upload_limit: 2**26})      # ConfigError if it is no parameter
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
        name, module, handlers, content_type, flush_data_cb, upload_data_cb, upload_limit)


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


def check_callback(place: str, callback: Any, arguments: str) -> None:
    """ConfigError, if it is not to be called with these arguments."""
    import inspect                      # 10 ms
    if not callable(callback):
        raise ConfigError("%s: no function: %r" % (place, callback))
    if inspect.iscoroutinefunction(callback):
        raise ConfigError("%s: %r is async: it has to be a plain function, which may return SUSPEND"
                          % (place, callback))
    try:
        inspect.signature(callback).bind(*filter(None, arguments.split(", ")))
    except TypeError as error:
        raise ConfigError(
            "%s: %r is called with (%s): %s" % (place, callback, arguments, error)) from None
    except ValueError:                  # of C: it does not say what it takes
        pass


def check_methods(place: str, methods: Sequence[str]) -> None:
    """Tokens in capitals, but for the two that are not for a handler (RFC 9110, 9.3.6, 9.3.8)."""
    good = bool(methods) and not isinstance(methods, str)
    for method in methods:
        good = good and isinstance(method, str) and bool(TOKEN.fullmatch(method))
        good = good and method == method.upper() and method not in ("CONNECT", "TRACE")
    if not good:
        raise ConfigError(
            '%s: methods must be names in capitals, such as ("GET",), not CONNECT or TRACE: %r'
            % (place, methods))


def unregister_httpdcb(root_path: str) -> None:
    """Take a root path out again: 404 from now on. ConfigError if it is not there. Any thread."""
    if roots.pop(root_path.strip(" \t\r\n"), None) is None:
        raise ConfigError(
            'root path "%s" is not registered%s' % (root_path, nearest(root_path, roots)))


def answer_options(request: Request, page: Page) -> int:
    """OPTIONS, for every root (RFC 9110, 9.3.7)."""
    page.set_header("Allow", ", ".join(request._root.handlers))
    return 204


def call_safely(what: str, callback: Callable[..., Any], *arguments: Any) -> None:
    """Call what a program has given. Only a KeyboardInterrupt ends anything; others are logged."""
    try:
        callback(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException:
        if not all(server.is_ours() for server in servers):
            raise                       # a process that was forked in there ends
        log.exception("%s failed", what)


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


def plain_address(address: Any) -> tuple[str, int]:
    """Host and port. An IPv4 peer of an IPv6 socket is an IPv4 peer."""
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

    __slots__ = ("state", "body", "_connection", "_head", "_root", "_handler", "_form", "_resumed",
                 "__weakref__")

    def __init__(self, connection: Connection, head: Head, root: Root, handler: AccessHandler,
                 body: bytes) -> None:
        self.state: Any = None
        self.body = body                # the content, transfer coding taken off
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
        """http or https."""
        return self._connection.server.transport.scheme

    @property
    def client(self) -> tuple[str, int]:
        """Address and port of the peer."""
        return self._connection.client()

    @property
    def server(self) -> tuple[str, int]:
        """Address and port that the client is connected to."""
        return plain_address(self._connection.sock.getsockname())

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


class Page:
    """The response in the making, on the server's one buffer. Handlers get it clean."""
    __slots__ = ("buffer", "view", "end", "limit", "fields", "_content_type")

    def __init__(self, size: int) -> None:
        self.buffer = bytearray(HEADROOM + size + TAILROOM)
        self.view = memoryview(self.buffer)
        self.limit = HEADROOM + size
        self.end = HEADROOM                                 # of the content
        self.fields: tuple[tuple[str, str], ...] = ()       # that the handler has set
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

    def length(self) -> Optional[int]:
        """The Content-Length that the handler has set."""
        for name, value in self.fields:
            if name.lower() == "content-length":
                return int(value)
        return None

    def with_fields(self, head: bytes) -> bytes:
        """A response head with the handler's fields at its end, but Content-Length: it is there."""
        lines = [head[:-2]]
        for name, value in self.fields:
            if name.lower() != "content-length":
                lines.append(("%s: %s\r\n" % (name, value)).encode("latin-1"))
        lines.append(b"\r\n")
        return b"".join(lines)


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
REQUEST_LINE = re.compile("("
                          + TOKEN.pattern
                          + ") ("
                          + _PATH
                          + r"(?:\?"
                          + _QUERY
                          + ")?|(?!/)"
                          + _QUERY
                          + r") HTTP/([0-9])\.([0-9])")
ABSOLUTE_FORM = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?%]*(?:%[0-9A-Fa-f]{2}[^/?%]*)*)(" + _PATH + r")?(?:\?(.*))?")
AUTHORITY_FORM = re.compile(r"[^:]+:[0-9]{1,5}|\[.*\]:[0-9]{1,5}")
_REG_NAME = r"[A-Za-z0-9_.~!$&'()*+,;=-]*"                              # RFC 3986, 3.2.2
HOST = re.compile(r"(?!:|\Z)(?:\[(?:([0-9A-Fa-f:.]+)(?:%[A-Za-z0-9_.~%-]+)?"
                  r"|[vV][0-9A-Fa-f]+\.[A-Za-z0-9_.~!$&'()*+,;=:-]+)\]|"
                  + _REG_NAME
                  + "(?:%[0-9A-Fa-f]{2}"
                  + _REG_NAME
                  + ")*)(?::([0-9]{0,5}))?")
# nearly every one: quickly found good
PLAIN_HOST = re.compile("[A-Za-z0-9.-]+(?::[0-9]{1,4})?")
FIELD_LINE = re.compile(_TOKEN + b":" + _VALUE)
CONTENT_LENGTH = re.compile("0|[1-9][0-9]{0,17}")               # a leading zero is octal to some
CODING = re.compile(TOKEN.pattern + "(?:[ \t]*;.*)?")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[ \t]*"
                        + _TOKEN
                        + rb"(?:[ \t]*=[ \t]*(?:"
                        + _TOKEN
                        + rb"|"
                        + _QUOTED
                        + rb"))?)*)\r\n")
# What may still become a chunk size line: bytes that cannot are refused at once.
CHUNK_LINE_BEGIN = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:\r?|[ \t]*(?:;" + _VALUE + rb"\r?)?))?")
# RFC 9112, 2.2: clients that send too many
CHUNK_LINE_REST = re.compile(_VALUE + rb"\r?")                  # once there is an extension
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

    def __repr__(self) -> str:
        return "Headers(%r)" % self._fields


class Fields(NamedTuple):
    """A header section that the parser has accepted; requests with the same bytes share it."""
    headers: Headers
    length: int                     # of the content in bytes, or CHUNKED
    connection_line: str            # what the answer says: KEEP, KEEP_1_0 or CLOSE
    expect: str                     # what is expected, in small letters; empty: nothing
    media_type: str                 # of the content, in small letters, without parameters


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


def parse_head(line: bytes, section: bytes, fields: Optional[Fields], methods: Collection[str],
               parse_line: ParseLine = parse_field_line) -> Head:
    """A request line, and the header section below it to its empty line.

    `fields`: that section, if it has been parsed before, for a HTTP/1.1 client. `methods` are
    known. The order of checks: grammar, version, sizes, method, Host, framing.
    """
    match = ORIGIN_FORM_LINE.fullmatch(line.decode("latin-1"))
    if match is None or match[1] == "CONNECT":
        return parse_other_head(line, section, methods, parse_line)
    method, target, path, query, minor = match.groups()
    if fields is None or minor == "0":
        pairs = list(map(parse_line, section.split(b"\r\n")[:-2]))
        fields = parse_section(pairs, minor == "0", method, methods)
    elif method not in methods:
        raise HTTPError(501, "this method is not known here")
    if "%" in path:
        path = unquote(path)
    version = "HTTP/1.0" if minor == "0" else "HTTP/1.1"
    root, slash, rest = path[1:].partition("/")
    waits = fields.length != 0 or fields.expect != ""
    return Head._make((
        method, target, version, path, query or "", root, slash + rest, "", fields,
        fields.connection_line, waits))


def parse_other_head(
        line: bytes, section: bytes, methods: Collection[str], parse_line: ParseLine) -> Head:
    """The same for a target that is not in origin-form, and for another version."""
    method, text, major, minor = match_request_line(line)
    pairs = list(map(parse_line, section.split(b"\r\n")[:-2]))
    target = parse_target(method, text, major)
    fields = parse_section(pairs, minor == "0", method, methods)
    if target.host:                 # RFC 9112, 3.2.2: it counts, not the Host field
        fields = fields._replace(headers=Headers({**fields.headers, "host": target.host}))
    path = unquote(target.path)
    version = "HTTP/1.0" if minor == "0" else "HTTP/1.1"
    root, slash, rest = path[1:].partition("/")
    if path == "*":
        root = "*"
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


def parse_section(pairs: Sequence[tuple[str, str]], old: bool, method: str,
                  methods: Collection[str]) -> Fields:
    """What the fields of a section say together. `old`: a HTTP/1.0 client's."""
    if len(pairs) > MAX_FIELDS:
        raise HTTPError(431, "more than %d header fields" % MAX_FIELDS)
    if method not in methods:
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
    return Fields(Headers(headers), length, connection_line, expect, kind)


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
    __slots__ = ("left", "write", "held")

    def __init__(self, length: int, write: Callable[[bytes], Any]) -> None:
        self.left = length      # bytes to come
        self.write = write
        self.held = 0           # bytes that are kept here: never any

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
    """

    __slots__ = (
        "limit", "overhead", "write", "data", "step", "left", "good", "too_large", "trailers",
        "whole")

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

    @property
    def held(self) -> int:
        return len(self.data)

    def feed(self, data: bytes) -> Optional[bytes]:
        """As that of SizedContent."""
        self.data += data
        while self.step(self):
            pass
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
    too_large = ContentTooLarge(limit, parameter)
    if length == CHUNKED:
        return ChunkedContent(limit, overhead, write, too_large)
    if length > limit:
        raise too_large
    return SizedContent(length, write)


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

    def __init__(self, size: int, scheme: str) -> None:
        self.scheme = scheme                        # that the server speaks
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
        head = parse_head(line, section, fields, known_methods, self.lines.__getitem__)
        if head.scheme not in ("", self.scheme):
            raise HTTPError(421, "%s is not served here" % head.scheme)
        if head.fields.expect:                      # it is judged every time
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
        return io.BufferedReader(self.file)

    def close(self) -> None:
        self.file.close()
        self.disk.give_back(self.reserved)
        self.size = self.reserved = 0

    def __del__(self) -> None:
        self.close()


# --------------------------------------------------------------------------------------- Connection

# Bytes of one recv(), so of the pipelined requests that one turn takes. As much as a TLS record:
# nothing stays inside TLS then, where epoll does not see it.
RECEIVE_SIZE = 16384
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NOTHING = memoryview(b"")
GREEDY = 16                 # requests that a connection has answered in one turn
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


class Responses:
    """What a server sends with: the page, and the heads of this second."""

    def __init__(self, size: int) -> None:
        self.page = Page(size)
        self.date = ""
        self.told: set[str] = set()     # parameters that the log has been told of in this second
        self.heads: dict[tuple[int, str, int, str], bytes] = {}

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

    def head(self, status: int, content_type: str, size: int, connection_line: str) -> bytes:
        """Status line and fields, this second's. `size`: bytes, or CHUNKED, or UNTIL_CLOSE."""
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
        lines.append("\r\n")
        head = "".join(lines).encode("latin-1")
        if len(self.heads) > 255:
            self.heads.clear()
        self.heads[status, content_type, size, connection_line] = head
        return head


class Refusal:
    """The handler of a request that nobody answers: `route` gives it where there is no other."""

    def __init__(self, error: HTTPError) -> None:
        self.error = error

    def __call__(self, request: Request, page: Page) -> int:
        raise self.error


NO_ROOT = Root("", "httpd", {}, "")


def bytes_acked(sock: socket.socket) -> int:
    """The bytes that the client's system has acknowledged; sent is not yet taken."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int.from_bytes(info[120:128], sys.byteorder)    # tcpi_bytes_acked of linux/tcp.h
    except OSError:
        return 0


def route(head: Head, connection: Connection, body: bytes = b"") -> Request:
    """The request for whoever answers it, and may: a root's handler, or a Refusal."""
    if pending_inits:
        initialize_late()
    root = roots.get(head.root) or roots.get("")
    if root is None:
        return Request(connection, head, *route_nowhere(head), body)
    handler = root.handlers.get(head.method)
    if handler is None:
        allowed = {"Allow": ", ".join(root.handlers)}
        handler = Refusal(HTTPError(405, "this method is not allowed here", allowed))
    return Request(connection, head, root, handler, body)


def route_nowhere(head: Head) -> tuple[Root, AccessHandler]:
    """Who answers where no root is registered."""
    if head.path == "*":        # OPTIONS, the parser has seen to that: the server as a whole
        methods = sorted(known_methods - {"TRACE"})
        return Root("*", "httpd", dict.fromkeys(methods, answer_options), ""), answer_options
    return NO_ROOT, Refusal(HTTPError(404, "nothing is registered for this path"))


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


class Response(NamedTuple):
    """What observers are told of a response."""
    server: Server
    request: Optional[Request]      # None: what came was no request,
    garbage: bytes                  # but began with these bytes
    client: tuple[str, int]         # address and port
    status: int
    size: int                       # bytes of content
    seconds: float                  # since the head of the request was there
    whole: bool                     # all of it has left; False: it is cut


class Ended(NamedTuple):
    """A response that is made, and may not have left yet."""
    request: Optional[Request]
    garbage: bytes
    status: int
    size: int
    begun: float                    # seconds, on the clock of time.monotonic()


# Called once for each response, when its end is known, in the server's thread.
observers: list[Callable[[Response], Any]] = []


def tell_observers(connection: Connection, responses: list[Ended], whole: bool) -> None:
    now = time.monotonic()
    for request, garbage, status, size, begun in responses:
        client = connection.client()
        if request is not None:
            client = request.client
        response = Response(
            connection.server, request, garbage, client, status, size, now - begun, whole)
        for observer in tuple(observers):           # one may take itself out
            call_safely("an observer", observer, response)


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

    def responses(self) -> list[Ended]:
        """What observers are told when a stream has ended."""
        if not observers or self.stream is None:
            return []
        return [Ended(self.request, b"", self.status, self.stream.sent, self.begun)]

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
    __slots__ = ("request", "head", "chunked", "left", "sent", "waits", "ended")

    def __init__(self, request: Request, head: bytes, length: int) -> None:
        self.request = request
        self.head = head
        self.chunked = length == CHUNKED
        self.left = length if length >= 0 else math.inf     # bytes of content to come
        self.sent = 0                                       # bytes of content so far
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
    raw = page.with_fields(
        server.responses.head(status, page._content_type, length, connection_line))
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
        first = exchange.stream.next_piece(page, server.room())    # an exception is still answered
    server.requests += 1
    connection.enter(stream)
    return first


def check_expectation(request: Request, limit: float) -> None:
    """Whether the content will be read; HTTPError is the final answer (RFC 9110, 10.1.1)."""
    fields, handler = request._head.fields, request._handler
    if isinstance(handler, Refusal):
        short = fields.length == 0 or not fields.expect and 0 < fields.length <= limit
        if not short:
            raise handler.error
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
        connection.deadline = min(connection.deadline + len(data) / LEAST_RATE, now + longest)
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
        "exchange", "out", "unsent", "acked", "held", "lingers_until", "unreported", "address")

    def __init__(self, server: Server, sock: socket.socket, peer: Any) -> None:
        self.server = server
        self.sock = sock
        self.peer = peer                    # its address, as the socket says it,
        self.address: Optional[tuple[str, int]] = None      # and as others see it
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
        self.unreported: list[Ended] = []   # responses whose end observers do not know yet

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
        if more > 0 and not self.server.has_memory(more, self):
            raise HTTPError(
                503, "no memory is left for this request, see memory_budget", {"Retry-After": "1"})
        self.server.hold(more)
        self.held = size

    def report(self, whole: bool) -> None:
        """Tell the observers about responses that have left, or are cut."""
        if self.unreported:
            unreported, self.unreported = self.unreported, []
            tell_observers(self, unreported, whole)

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

    def is_sending(self) -> bool:
        """Whether the client has to take something before anything else happens."""
        return self.out is not NOTHING or STATES[self.state].waits_for == WRITE

    def expire(self) -> None:
        """The deadline has passed."""
        if self.is_sending():
            log.debug("%s: closed after a time-out, its output is not read", self.peer)
            self.close(cut=True, reset=True)
        else:
            STATES[self.state].at_deadline(self)

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
        key = (status, page._content_type, end - HEADROOM, connection_line)
        head = responses.heads.get(key) or responses.head(*key)
        if page.fields:
            head = page.with_fields(head)
        if not with_content:
            end = HEADROOM
        server.requests += 1
        if observers:
            begun = server.now
            if self.exchange is not None:
                begun = self.exchange.begun
            garbage = b""
            if request is None:
                garbage = self.received[:GARBAGE_SIZE]
            self.unreported.append(Ended(request, garbage, status, end - HEADROOM, begun))
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
        if page.end > self.server.sure:
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
        server = self.server
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
                    if HEADROOM < page.end <= server.sure and (status is None or status is OK):
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
                    self.state = let_others     # who sends many requests at once waits his turn
                    server.loop.greedy.append(self)
                if self.state is not proceed or len(answers) > min(RECEIVE_SIZE, server.sure):
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
        return self.state is not idle and STATES[self.state].waits_for == 0

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
        if not self.server.is_ours():           # a forked process ends: it leaves the peer alone
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
        if self.state is let_others:            # its turn comes when this has left
            self.state = proceed
        if len(self.out) > server.spare():
            self.unsent = server.keep(self)
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
    connection.sock = context.wrap_socket(
        connection.sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
    )
    connection.enter(shake_hands)
    return True


def shake_hands(connection: Connection) -> bool:
    """TLS: the handshake, as far as it goes."""
    transport = connection.server.transport
    sock: Any = connection.sock
    try:
        sock.do_handshake()
    except transport.would_block:
        raise
    except OSError as error:
        log.debug("%s: no handshake: %s", connection.peer, error)
        connection.state = shut             # a reset would overtake the alert that says why
        return True
    suite, version, _ = sock.cipher()
    if version == "TLSv1.3" and suite not in transport.plan.suites13:
        log.debug(
            "%s: closed: %s is not in tls_ciphers, which OpenSSL cannot be told", connection.peer,
            suite)
        return connection.close(cut=True)
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
    """More has been received, and much has been answered: an event changes nothing."""
    return False


def have_turn(connection: Connection) -> None:
    if connection.state is let_others:
        connection.state = proceed
        connection.turn()


def receive(connection: Connection) -> bytes:
    """More of a request; b"" if it has ended before one has begun."""
    data = connection.sock.recv(RECEIVE_SIZE)
    begun = connection.exchange is not None or connection.received.strip(b"\r\n")
    if begun and not data:
        raise HTTPError(400, "the connection ended inside a request")
    return data


def receive_head(connection: Connection) -> bool:
    data = receive(connection)
    if not data:
        return connection.close()
    connection.received += data
    return connection.serve(next_request(connection))


def receive_content(connection: Connection) -> bool:
    data = receive(connection)
    request = take_content(connection, data)
    return request is not None and connection.serve(request)


def stream(connection: Connection) -> bool:
    """The socket has taken the last piece of the content: the next is due."""
    exchange, server = connection.exchange, connection.server
    assert exchange is not None and exchange.stream is not None
    try:
        piece = exchange.stream.next_piece(server.responses.page, server.room())
    except BaseException as error:
        blame(error, exchange.request)
        return connection.close(cut=True)
    if piece:
        connection.out = piece
        connection.state = stream
        return False                        # it goes on when others have had their turn
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


def half_closed(connection: Connection) -> bool:
    """A callback waits, the client has ended its side and cannot be asked."""
    if resumed(connection):
        return go_on(connection)
    if connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
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


STATES: dict[State, StateRow] = {
    greet: StateRow(READ, "keep_alive", close_silently, 0, ENDS),
    shake_hands: StateRow(READ, "request_timeout", close_silently, 1, ENDS),
    idle: StateRow(READ, "keep_alive", close_silently, 0, ENDS),
    receive_head: StateRow(READ, "request_timeout", refuse_late, 1, FINISHES),
    receive_content: StateRow(READ, "request_timeout", refuse_late, 1, FINISHES),
    proceed: StateRow(0, "request_timeout", close_silently, STAYS, FINISHES),
    let_others: StateRow(READ, "request_timeout", close_silently, STAYS, FINISHES),
    stream: StateRow(WRITE, "keep_alive", close_silently, SLOW, FINISHES),
    unspool: StateRow(WRITE, "keep_alive", close_silently, SLOW, FINISHES),
    suspended: StateRow(READ, "for_ever", close_silently, STAYS, FINISHES),
    overfull: StateRow(HANG_UP, "for_ever", close_silently, STAYS, FINISHES),
    half_closed: StateRow(RESET, "keep_alive", close_silently, STAYS, FINISHES),
    asked: StateRow(RESET, "for_ever", close_silently, STAYS, FINISHES),
    shut: StateRow(0, "request_timeout", close_silently, STAYS, FINISHES),
    end: StateRow(0, "request_timeout", close_silently, STAYS, FINISHES),
    linger: StateRow(READ, "for_ever", close_silently, 1, OVER),        # so these go first
    closed: StateRow(0, "for_ever", close_silently, STAYS, OVER),
}

def credit(connection: Connection) -> None:
    """Once a second: what the client has acknowledged earns time, a second for each 500 bytes."""
    if connection.interest == WRITE and connection.is_sending():
        acked = bytes_acked(connection.sock)
        earned = (acked - connection.acked) / LEAST_RATE
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
    row = STATES[connection.state]
    if politely and not connection.is_sending() and row.at_deadline is refuse_late:
        refuse_late(connection)
    else:
        connection.close(cut=True, reset=connection.is_sending())


def turn_away(connection: Connection) -> None:
    """No room for this client: say so, or just close where only a handshake could say it."""
    if connection.server.transport.context is not None:
        connection.close()
        return
    connection.refuse(
        HTTPError(503, "too many connections, see max_connections", {"Retry-After": "1"}))
    connection.turn()


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


def listen(ip: str, port: int) -> socket.socket:
    """A listening socket; for the empty ip one for IPv6 and IPv4. OSError names the address."""
    every = ip in ("", "*")
    family = socket.AF_INET
    if ":" in ip or every and socket.has_ipv6:
        family = socket.AF_INET6
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # the accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
        listener.bind(("" if every else ip, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if every and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return listen("0.0.0.0", port)  # a kernel without IPv6
        hint = LISTEN_HINTS.get(error.errno or 0, "")
        raise OSError(
            error.errno,
            "cannot listen on %s port %d: %s%s" % (ip or "*", port, error.strerror, hint)
        ) from None
    listener.setblocking(False)
    return listener


class Listener:
    """The listening socket, and whether it is watched."""

    def __init__(self, ip: str, port: int) -> None:
        self.sock = listen(ip, port)
        self.address: tuple[str, int] = self.sock.getsockname()[:2]
        self.watched = False
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
        return sock, peer


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


class Loop:
    """What a server waits with: made when it listens, dropped whole. It crosses no fork."""

    def __init__(self, ip: str, port: int) -> None:
        if not hasattr(select, "epoll"):
            raise RuntimeError(
                "select.epoll is missing: gevent's monkey.patch_all() takes it away, unless it "
                "is called with select=False; and httpd.py needs Linux")
        self.listener = Listener(ip, port)
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
        self.add(self.mailbox.bell, READ, self.mailbox.answer)
        self.add(self.hang_ups.fileno(), READ, self._tell_of_ends)

    def is_ours(self) -> bool:
        """Not a copy in a forked process: that must leave the epoll, and the peers, alone."""
        return self.pid == os.getpid()

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

    def set_accepting(self, wanted: bool, callback: Callable[[], None]) -> None:
        """Watch the listener, or leave it alone for a while."""
        listener = self.listener
        if wanted == listener.watched or listener.sock.fileno() < 0:
            return
        if wanted:
            try:
                self.add(listener.sock, READ, callback)
            except OSError as error:            # the system's limit of watches: again in a second
                log.error("nobody is taken in for a second: %s", error)
                return
        else:
            self.remove(listener.sock)
        listener.watched = wanted

    def stop_listening(self, callback: Callable[[], None]) -> None:
        self.set_accepting(False, callback)
        self.listener.sock.close()

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
        for sock in self.closing:
            sock.close()
        mailbox = self.mailbox
        for file in (self.listener.sock, mailbox.bell, mailbox.button, self.hang_ups, self.poll,
                     self.selector):
            file.close()


# ------------------------------------------------------------------------------------------- Server

servers: set[Server] = set()    # those that listen
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
    while not server.disk.has_room(size) and server.held + size > server.params.held_size:
        if not server._make_room("spool", asking) and not server._make_room("output", asking):
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


class Server:
    """A server with the parameters in force, keywords before what modparam() has set; ConfigError
    if they are wrong.

        server.run()                     serves in this thread until stop() is called
        with server: ...                 start() and stop(): serves in a thread of its own
        server.fileno(), run_once(0)     serves in another program's loop: when the descriptor is
                                         readable, and after timeout() seconds

    It listens from the first call of one of these, of port or url: OSError if it cannot. stop() and
    reload_tls() are for any thread.
    """
    __slots__ = (
        "params", "transport", "heads", "responses", "connections", "held", "requests", "accepted",
        "disk", "sure", "shortages", "evicting", "turned_away", "keep_alive", "now", "stopping",
        "services", "_loop", "_address", "_thread", "_life", "_ended", "_stop_at", "_next_tick")

    def __init__(self, **parameters: Any) -> None:
        self.params = params = Limits(**parameters)
        scheme = "https" if params.tls_cert_file else "http"
        self.transport = transports[scheme](params)
        self.heads = Heads(params.memo_size, scheme)
        try:
            self.responses = Responses(params.buf_size)
        except MemoryError:
            raise ConfigError("httpd: memory_budget %d: there is no room for its buffer"
                              % params.memory_budget, "memory_budget") from None
        self.connections: set[Connection] = set()
        self.held: int = 0                      # bytes that connections keep between their turns
        self.requests = 0                       # answered so far
        self.accepted = 0                       # connections so far
        self.disk = Disk(params.spool_size, self.spare, self._make_room_for)
        self.sure = HEADROOM + self.spare()  # an answer that ends before there finds room
        self.shortages = {kind: Candidates(holds) for kind, holds in HOLDERS.items()}
        self.now = time.monotonic()             # when this turn began
        self.evicting = False                   # somebody is giving way just now
        self.turned_away: deque[Connection] = deque()   # the last ones that there was no place for
        self.keep_alive = params.keep_alive     # seconds: on the hot path
        self.stopping = False                   # every answer closes its connection
        self.services: list[tuple[Service, Any]] = []       # that it runs, and what ends each
        self._loop: Optional[Loop] = None       # while it listens
        self._address: Optional[tuple[str, int]] = None
        self._thread: Optional[threading.Thread] = None     # that start() has made
        self._life = threading.RLock()          # who claims the loop, and when it ends
        self._ended = threading.Event()
        self._stop_at = math.inf                # when the grace of stop() ends
        self._next_tick = 0.0                   # when to look at deadlines

    @property
    def loop(self) -> Loop:
        """What it waits with. RuntimeError if it does not listen."""
        if self._loop is None:
            raise RuntimeError("the server does not listen: it has ended, or not begun")
        return self._loop

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
            if not self._make_room("memory", asking):
                return False
        return True

    def keep(self, connection: Connection) -> Optional[Unsent]:
        """Put what a connection has to send into a file; None: there is no room."""
        while True:
            try:
                return Unsent(self.disk, connection.out, connection.state)
            except OSError as error:
                if not self._make_room_for(error, connection):
                    self.disk.complain(error)
                    return None

    def _make_room_for(self, error: OSError, asking: Optional[Connection] = None) -> bool:
        """Close somebody who holds what an error says is short. False: there is nobody."""
        kind = "descriptors" if error.errno in (errno.EMFILE, errno.ENFILE) else "spool"
        if kind == "descriptors" and self.loop.closing:
            self.loop.close_some()
            return True
        return self._make_room(kind, asking)

    def _make_room(self, kind: str, asking: Optional[Connection] = None) -> bool:
        """Have whoever is furthest behind his time give way, of those who hold what is short."""
        if self.evicting:                       # by somebody who gives way himself
            return False
        victim = self.shortages[kind].furthest(self.connections, self.now, asking)
        if victim is None:
            return False
        log.debug("%s: closed, %s is short", victim.peer, kind)
        self.evicting = True
        try:
            give_way(victim, politely=kind == "memory")
        finally:
            self.evicting = False
        return True

    def _has_place(self) -> bool:
        """Whether one more connection may be taken in."""
        loop = self.loop
        while len(self.connections) + len(loop.closing) >= self.params.max_open:
            if loop.closing:
                loop.close_some()
            elif not self._make_room("descriptors"):
                return False
        return True

    def room(self) -> int:
        """Bytes for a piece of a stream: fewer if clients do not read, never less than 512."""
        return min(self.params.buf_size, max(512, self.spare()))

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
        loop = self._loop
        if loop is None:                        # a handler has outlasted it
            connection.sock.close()
            return
        loop.forget(connection.sock, connection.interest)
        loop.set_accepting(not self.stopping, self._accept)
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

    def stop(self, grace: Optional[float] = None, wait: bool = True) -> None:
        """Stop listening, let requests finish for at most `grace` seconds (grace_timeout), close.

        It returns when that is done; from a handler, or without `wait`, at once: then whoever runs
        the server goes on until it is. It may be repeated; the shortest grace counts.
        """
        seconds = self.params.grace_timeout if grace is None else grace
        me = threading.get_ident()
        with self._life:
            self._stop_at = min(self._stop_at, time.monotonic() + seconds)
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
        if loop is None or self.connections or not loop.listener.watched:
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
        host, port = self._where()
        if host in ("::", "0.0.0.0"):
            host = "127.0.0.1"
        elif ":" in host:
            host = "[%s]" % host
        return "%s://%s:%d" % (self.transport.scheme, host, port)

    def _where(self) -> tuple[str, int]:
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

    def reload_tls(self) -> bool:
        """Use the certificate, key and CA that are in the files now from here on. Any thread.

        False if that cannot be: the log says why, and the old ones are used on.
        """
        if self.transport.context is None:
            log.warning("there is nothing to reload: tls_cert_file and tls_key_file are not set")
            return False
        try:
            self.transport = transports[self.transport.scheme](self.params)
        except ConfigError as error:
            log.error("the certificate is not loaded anew: %s", error)
            return False
        log.info("%s has been loaded anew", self.params.tls_cert_file)
        return True

    def _open(self) -> Optional[Loop]:
        """Listen, if it does not yet. None: it has ended."""
        with self._life:                        # the first call may come from two threads
            if self._loop is None and not self._ended.is_set():
                self._loop = loop = Loop(self.params.ip, self.params.port)
                self._address = loop.listener.address
                loop.set_accepting(True, self._accept)
                servers.add(self)
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
                loop.call_due_timers(self.now)
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
        loop.set_accepting(not self.stopping, self._accept)

    def _accept(self) -> None:
        """Take in those who wait, and answer at once who has sent a request already."""
        loop = self.loop
        for _ in range(ACCEPT_BATCH):
            try:
                sock, peer = loop.listener.accept()
            # mostly BlockingIOError: nobody waits any more
            except OSError as error:
                short = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
                if short and not self._make_room("descriptors"):
                    log.error("nobody is taken in for a second: %s", error)
                    # the listener would be readable all the time
                    loop.set_accepting(False, self._accept)
                return
            self.accepted += 1
            connection, before = Connection(self, sock, peer), self.requests
            room = self._has_place()
            self.connections.add(connection)
            if not room:
                self.turned_away.append(connection)
                if len(self.turned_away) > TURNED_AWAY:
                    self.turned_away.popleft().close()
                turn_away(connection)
                continue
            connection.turn()
            if self.requests == before and connection.is_silent():
                connection.deadline -= DEFER                # it has been silent for so long already

    def _begin_stop(self, loop: Loop) -> None:
        """What stop() asks for, in the thread that serves."""
        self.stopping = True
        self._next_tick = self.now
        before = -1
        while before < self.accepted:           # who waits to be taken in may have sent a request
            before = self.accepted
            self._accept()
        loop.stop_listening(self._accept)
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
        loop.stop_listening(self._accept)
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
    return Transport("https", greet, would_block, wants, RECEIVE_SIZE, context, plan)


checks["priority"] = tls_priority
transports["https"] = tls_transport


# ------------------------------------------------------------------------------------------ mi_http
# OpenSIPS' management interface: JSON-RPC 2.0 by POST, and the commands that every server has.

POOL_WAITING = 1000         # jobs that wait for a thread: more are refused


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
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def is_full(self) -> bool:
        with suppress(queue.Empty):             # a thread has been faster
            for _ in range(self.jobs.qsize() if self.jobs.qsize() >= self.waiting else 0):
                job = self.jobs.get_nowait()
                if getattr(job, "request", bool)() is not None:     # else its client is gone
                    self.jobs.put(job)
        return self.jobs.qsize() >= self.waiting

    def submit(self, job: Callable[[], None]) -> None:
        """Have a thread do it. It sees to its own exceptions."""
        if self.pid != os.getpid():             # a fork copies no threads
            self._begin()
        if self.started < self.size:
            thread = threading.Thread(target=self._work, args=(self.jobs,), name="httpd-pool")
            thread.daemon = True
            thread.start()
            self.started += 1
        self.jobs.put(job)

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            call_safely("a job of a thread", jobs.get())


class Command(NamedTuple):
    """An MI command."""
    function: Callable[..., Any]
    threads: bool                       # it wants a thread of the pool


class Call(NamedTuple):
    """One JSON-RPC request, as far as it is one."""
    fault: str                          # why it is none; empty: it is one
    method: str
    command: Optional[Command]
    params: Any                         # a list or a dict
    ident: str                          # for the answer, as JSON
    answered: bool                      # it is no notification


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
PARSE_ERROR = '{"jsonrpc":"2.0","error":{"code":-32700,"message":"Parse error"},"id":null}'


def register_mi(name: str, function: Callable[..., Any], *, threads: bool = False) -> None:
    """Add an MI command, a function that returns what JSON can say; its signature counts.

    Text for a parameter annotated int or float becomes a number. HTTPError(404, "no such dialog")
    is the command's own error. With threads=True it runs in one of mi_http's threads, else nobody
    else is served meanwhile. ConfigError: the name is taken. Any thread.
    """
    if name in mi_commands or not re.fullmatch("[A-Za-z0-9_.:-]+", name):
        raise ConfigError(
            'MI command "%s": the name is taken, or not made of letters, digits and _.:-' % name)
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


def read_call(value: Any) -> Call:
    """One member of a batch, or what is no batch."""
    fault = find_fault(value)
    if not isinstance(value, dict):
        return Call(fault, "", None, {}, "null", True)
    ident, method = value.get("id"), value.get("method")
    text = "null"
    if type(ident) is int:
        text = str(ident)               # a third of the price
    elif is_ident(ident):
        text = encode_json(ident)
    command = None
    if not fault:
        command = mi_commands.get(str(method))
    answered = "id" in value or fault != ""
    return Call(fault, str(method), command, value.get("params", {}), text, answered)


def perform(call: Call, in_thread: bool = False) -> str:
    """Carry a call out. Returns the response; empty for a notification."""
    try:
        if call.fault:
            raise MIError(-32600, "Invalid Request", call.fault)
        if call.command is None:
            raise MIError(-32601, "Method not found")
        result = encode_json(call_command(call.command.function, call.params))
        if not call.answered:
            return ""
        return '{"jsonrpc":"2.0","result":%s,"id":%s}' % (result, call.ident)
    except BaseException as error:
        forked = not all(server.is_ours() for server in servers)
        if forked or isinstance(error, KeyboardInterrupt) and not in_thread:
            raise
        return refuse_call(call, describe_fault(call, error))


def refuse_call(call: Call, fault: dict[str, Any]) -> str:
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
    """The calls of one request and their answers, of which threads bring some."""

    def __init__(self, resume: Callable[[], None], calls: list[Call], alone: bool) -> None:
        self.resume = resume            # to be called when a thread has brought an answer
        self.calls = calls
        self.alone = alone              # it is no batch, but a call by itself
        self.answers = [self.begin(call) for call in calls]     # None: it is not there yet
        for number, answer in enumerate(list(self.answers)):    # a copy: threads are at work
            if answer is None:
                mi_pool().submit(functools.partial(self.bring, number))

    def begin(self, call: Call) -> Optional[str]:
        """The answer; None if it wants a thread."""
        if call.command is None or not call.command.threads:
            return perform(call)
        if not mi_pool().is_full():
            return None
        return refuse_call(call, {"code": -32000, "message": "Too many commands wait for a thread"})

    def bring(self, number: int) -> None:
        """In a thread: carry out one of the calls."""
        try:
            self.answers[number] = perform(self.calls[number], in_thread=True)
        finally:
            self.resume()

    def text(self) -> Optional[str]:
        """What is sent; None: it is not complete."""
        answers = list(self.answers)
        if None in answers:
            return None
        if self.alone:
            return answers[0]
        members = [answer for answer in answers if answer]
        if not members:
            return ""
        return "[%s]" % ",".join(members)


DEFAULT_PORTS = {"http": 80, "https": 443}


def is_own_origin(request: Request) -> bool:
    """Whether the page that sends a request comes from this server (RFC 6454, 4).

    A proxy may have taken TLS off: https of the same host name is this server too.
    """
    try:
        origin = urlsplit(request.headers["origin"])
        own = urlsplit("//" + request.headers.get("host", ""))
        theirs, ours = DEFAULT_PORTS[origin.scheme], DEFAULT_PORTS[request.scheme]
        same_port = (origin.port or theirs) == (own.port or ours)
    except (KeyError, ValueError):
        return False
    if origin.hostname is None or origin.hostname != own.hostname:
        return False
    return same_port or origin.scheme == "https" and request.scheme == "http"


def begin_mi(content: bytes, resume: Callable[[], None]) -> Union[str, Batch]:
    """Read what is asked for, and carry it out, unless threads have to: then `resume` is called."""
    try:
        text = content.decode()
        end = 0
        if text.startswith("{"):    # nearly always: without blanks around it for half the price
            value, end = json_decoder.raw_decode(text)
        if end < len(text) or not text:
            value = json_decoder.decode(text)
    except (ValueError, RecursionError):
        return PARSE_ERROR
    if isinstance(value, list) and len(value) > MI_BATCH:
        fault = "more than %d calls" % MI_BATCH
        return perform(Call(fault, "", None, {}, "null", True))
    if isinstance(value, list) and value:
        return Batch(resume, [read_call(member) for member in value], False)
    call = read_call(value)
    if call.command is not None and call.command.threads:
        return Batch(resume, [call], True)
    return perform(call)


def check_mi_request(request: Request) -> None:
    """Two fields keep the pages of other web sites from posting commands."""
    if request.media_type not in (JSON, "text/xml"):
        raise HTTPError(415, "the Content-Type must be application/json")
    if "origin" in request.headers and not is_own_origin(request):
        raise HTTPError(403, "pages of another origin may not send commands")


class MIRoot:
    """The callbacks of mi_http. JSON-RPC errors travel on 200."""

    def __init__(self, pretty: bool) -> None:
        self.pretty = pretty

    def answer(self, request: Request, page: Page) -> int:
        """The access handler."""
        answer: Union[str, Batch, None] = request.state
        if answer is None:
            check_mi_request(request)
            answer = begin_mi(request.body, request.resume)
        if isinstance(answer, Batch):
            request.state = answer
            answer = answer.text()
            if answer is None:
                return SUSPEND
        if not answer:
            page.set_header("Content-Length", 0)
            return 202
        if self.pretty:
            answer = json.dumps(json.loads(answer), indent=4)
        try:
            page.write(answer)
        except BufferError:
            self.spool(answer.encode(), request, page)
        return 200

    def spool(self, answer: bytes, request: Request, page: Page) -> None:
        """Keep an answer that is larger than the page."""
        request.state = Spool(request.disk)
        try:
            request.state.write(answer)
        except OSError as error:
            request.disk.complain(error)
            raise HTTPError(500, "done, but the answer cannot be sent: no room is left, "
                                 "see spool_size") from None
        page.set_header("Content-Length", len(answer))

    def flush(self, request: Request, pos: int, buf: memoryview) -> int:
        """The flush_data_cb, for an answer that was larger than the page."""
        spool: Spool = request.state
        request.kept = spool.in_memory
        piece = spool.read(pos, len(buf))
        buf[:len(piece)] = piece
        return len(piece) or END


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


def mi_get_statistics(statistics: Any) -> dict[str, int]:
    """Values by `group:name`; asked for are `all`, `group:` or `name`."""
    values = {
        "httpd:requests": sum(server.requests for server in servers),
        "httpd:accepted": sum(server.accepted for server in servers),
        "httpd:connections": sum(len(server.connections) for server in servers),
        "httpd:held_bytes": sum(server.held for server in servers),
    }
    asked = statistics if isinstance(statistics, list) else [statistics]
    wanted = set(map(str, asked))
    found = {}
    for name, value in values.items():
        if not wanted.isdisjoint(("all", "httpd:", name, name.partition(":")[2])):
            found[name] = value
    if not found:
        raise HTTPError(404, "Statistics Not Found")
    return found


def mi_list_root_path() -> list[dict[str, str]]:
    """All roots, the newest first."""
    newest_first = reversed(list(roots.values()))
    return [{"http_root": root.name, "module": root.module} for root in newest_first]


def mi_uptime() -> dict[str, str]:
    passed = time.time() - STARTED
    return {"Now": time.ctime(), "Up since": time.ctime(STARTED), "Up time": "%d [sec]" % passed}


def mi_ps() -> dict[str, list[dict[str, Any]]]:
    urls = " ".join(server.url for server in servers)
    process = {"ID": 0, "PID": os.getpid(), "Type": "HTTPD " + urls}
    return {"Processes": [process]}


def load_mi_http(parameters: dict[str, Any]) -> None:
    mi_root = MIRoot(parameters["pretty_printing"] == 1)
    register_httpdcb("mi_http", parameters["root"], mi_root.answer, mi_root.flush,
                     methods=("POST",), content_type=JSON)


BUILT_IN["mi_http"] = load_mi_http
register_mi("httpd_list_root_path", mi_list_root_path)
register_mi("httpd:list_root_path", mi_list_root_path)
register_mi("which", mi_which)
register_mi("get_statistics", mi_get_statistics)
register_mi("version", lambda: {"Server": "httpd.py " + __version__})
register_mi("uptime", mi_uptime)
register_mi("ps", mi_ps)


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

    def __init__(self, fifo: MIFIFO, message: FIFOMessage, answer: Union[str, Batch]) -> None:
        self.fifo = fifo
        self.server = fifo.server
        self.name = message.name
        self.answer: Union[str, Batch, None] = answer       # None: it is on its way
        self.spool = Spool(self.server.disk)
        self.written = 0                # bytes
        self.descriptor = -1            # of the client's FIFO, once it is open
        self.pause = REPLY_PAUSE
        self.expiry: Optional[Timer] = None         # when it is given up
        self.awaited: Union[Watch, Timer, None] = None      # to open, or to write
        self.kept = 0                   # bytes in memory
        self.keep(len(message.content))

    def keep(self, size: int) -> None:
        self.server.hold(size - self.kept)
        self.kept = size

    def begin(self) -> None:
        """Send the answer, once it is complete."""
        answer = self.answer
        if isinstance(answer, Batch):
            answer = answer.text()
        if answer is None:
            return
        if not answer or not self.name:
            self.close()
            return
        self.answer = None
        try:
            self.spool.write(answer.encode() + b"\n")
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

    def ring(self) -> None:
        """Any thread. The bell rings already, or the server has ended, if this fails."""
        with suppress(OSError):
            self.button.send(b"!")

    def hear(self) -> None:
        with suppress(BlockingIOError):
            self.bell.recv(RECEIVE_SIZE)
        for reply in list(self.replies):
            reply.begin()

    def keep(self, text: str) -> None:
        self.server.hold(len(text) - len(self.text))
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
        answer: Union[str, Batch]
        if message.name is None:
            log.warning("mi_fifo: dropped, write :reply_name:JSON and a line end: %r",
                        message.content[:GARBAGE_SIZE])
            return
        if len(message.content) > self.limit:
            fault = "more than %d bytes, see post_buf_size" % self.limit
            log.warning("mi_fifo: a command has %s", fault)
            answer = perform(Call(fault, "", None, {}, "null", True))
        else:
            answer = begin_mi(message.content.encode("latin-1"), self.ring)
        reply = FIFOReply(self, message, answer)
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


# --------------------------------------------------------------------------------------------- WSGI
# PEP 3333 on the public callbacks: a response is an iterator of pieces, for flush_data_cb.

AHEAD_SIZE = 2**16          # bytes of a response that wait for the client in memory,
AHEAD_MOST = 2**24          # and in all: then its thread waits too
WSGI_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")

Application = Callable[[Dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def wsgi_paths(request: Request) -> tuple[str, str]:
    """SCRIPT_NAME and PATH_INFO: bytes as latin-1."""
    absolute = ABSOLUTE_FORM.fullmatch(request.target)
    encoded = request.target.partition("?")[0]
    if absolute is not None:
        encoded = absolute[3] or ""
    path = unquote_to_bytes(encoded).decode("latin-1")
    if not path.startswith("/"):                            # of http://host, and of *
        path = "/"
    script = "/" + request.root if request.root else ""
    return script, path[len(script):]


def wsgi_environ(request: Request, content: Optional[Spool], threads: int) -> dict[str, Any]:
    """PEP 3333's dictionary. A field name with _ could pass for the one with -, and is left out."""
    from wsgiref.util import FileWrapper
    environ: dict[str, Any] = {}
    for name, value in request.headers.items():
        if "_" not in name and name != "transfer-encoding":
            environ["HTTP_" + name.upper().replace("-", "_")] = value
    for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        if "HTTP_" + name in environ:
            environ[name] = environ.pop("HTTP_" + name)
    body: Any = io.BytesIO()
    if content is not None:
        environ["CONTENT_LENGTH"] = str(content.size)       # known even if it came in chunks
        body = content.reader()
    script, path = wsgi_paths(request)
    server, port = request.server
    client, client_port = request.client
    environ.update({
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": script,
        "PATH_INFO": path,
        "QUERY_STRING": request.query,
        "SERVER_PROTOCOL": request.version,
        "SERVER_NAME": server,
        "SERVER_PORT": str(port),
        "REMOTE_ADDR": client,
        "REMOTE_PORT": str(client_port),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": request.scheme,
        "wsgi.input": body,
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": threads > 1,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": lambda file, size=0: FileWrapper(file, AHEAD_SIZE),
    })
    return environ


class WSGIResponse:
    """What an application says by start_response(), write() and its iterable."""

    def __init__(self, to_head: bool, put: Callable[[bytes], Any]) -> None:
        self.to_head = to_head
        self.put = put
        self.status = 0                             # until start_response() is called
        self.headers: list[tuple[str, str]] = []
        self.length: Optional[int] = None   # bytes of all the content, as Content-Length says
        self.size: Optional[int] = None             # the same, as a list has them
        self.count = 0    # bytes so far; after the first, the head is on its way

    def start(self, status: str, headers: list[tuple[str, str]],
              exc_info: Any = None) -> Callable[[bytes], None]:
        """start_response(). The reason phrase is lost, and the fields that the server sets."""
        if exc_info and self.count:
            raise exc_info[1].with_traceback(exc_info[2])
        if self.status and not exc_info:
            raise RuntimeError("start_response() has been called already")
        if not re.fullmatch("[2-5][0-9]{2}( [\t -~\x80-\xff]*)?", status):
            raise ValueError("no status from 200 to 599: %r" % status)
        kept = []
        length = None
        for name, value in headers:
            if name.lower() in OWN_FIELDS:
                continue
            check_field(name, value)
            if name.lower() == "content-length":
                length = int(value)
            kept.append((name, value))
        self.headers = kept
        self.length = length
        self.status = int(status[:3])
        return self.write

    def write(self, data: bytes) -> None:
        if self.wants(data):
            self.put(data)

    def wants(self, piece: bytes) -> bool:
        """Count a piece, and say whether it is to be sent."""
        if not isinstance(piece, bytes):
            raise TypeError("the application has made %r, not bytes" % type(piece))
        if piece and not self.status:
            raise RuntimeError("the application has not called start_response()")
        self.count += len(piece)
        if self.length is not None and self.count > self.length:
            raise RuntimeError(
                "the application has made more than its Content-Length of %d" % self.length)
        return bool(piece) and not self.to_head and self.status not in (204, 304)

    def pieces(self, app: Application, environ: dict[str, Any], content: Optional[Spool],
               written: Optional[Spool]) -> Generator[bytes, None, None]:
        """Run the application, with context variables of its own: Flask keeps there who is asking.

        `written`: what write() was given. The iterable is closed however this ends.
        """
        run = copy_context().run
        result = None
        try:
            result = run(app, environ, self.start)
            if isinstance(result, (list, tuple)):
                self.size = self.count + sum(map(len, result))
            at = 0
            while written is not None and at < written.size:
                piece = written.read(at, AHEAD_SIZE)
                at += len(piece)
                yield piece
            iterator = run(iter, result)
            for piece in iter(functools.partial(run, next, iterator, None), None):
                if self.wants(piece):
                    yield piece
                elif piece:
                    break                                   # nobody wants the rest
            if not self.status:
                raise RuntimeError("the application has not called start_response()")
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                run(close)
            if content is not None:
                content.close()

    def begin(self, page: Page, piece: memoryview) -> int:
        """Put the fields on the page, and the first piece if it is the only one; the status."""
        for name, value in self.headers:
            page.set_header(name, value, add=name.lower() != "content-length")
        length = self.size if self.length is None else self.length
        if length is not None:
            page.set_header("Content-Length", length)
        if length == self.size == len(piece):
            with suppress(BufferError):
                page.write(piece)
        return self.status


class Handover:
    """Pieces that another thread makes, as an iterator: b"" while the next is not there.

    What the client has not taken waits in memory if it is little, else in a file.
    """

    def __init__(self, disk: Disk) -> None:
        self.request: Optional[Request] = None      # while the application runs
        self.disk = disk
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.queue: list[bytes] = []
        self.size = 0                               # bytes in it
        self.spool: Optional[Spool] = None          # what comes behind the queue,
        self.at = 0                                 # and how much of it has been taken
        self.end: Optional[BaseException] = None    # how the application has ended

    def fill(self, pieces: Generator[bytes, None, None], request: Request) -> None:
        """In the application's thread: hand over all pieces."""
        self.request = request
        end: BaseException = StopIteration()
        try:
            with closing(pieces):
                if not request.closed:
                    for piece in pieces:
                        self.put(piece)
        except BaseException as error:
            if self.pid != os.getpid():             # the application has forked: that process ends
                raise
            end = error
            if isinstance(error, KeyboardInterrupt):    # of a thread: that is no Ctrl-C
                end = RuntimeError("KeyboardInterrupt in an application's thread")
            if request.closed and not isinstance(error, BrokenPipeError):
                log.exception("an application failed, whose client is gone")
        self.request = None                         # they would keep each other alive
        self.end = end
        request.resume()

    def put(self, piece: bytes) -> None:
        """Wait if the client has much to take yet. BrokenPipeError if it is gone."""
        request = self.request
        if request is None:
            raise RuntimeError("write() was called after the application had ended")
        with self.changed:
            while not self._take_in(piece) and not request.closed:
                self.changed.wait(1)                # nobody tells when the client goes
            if request.closed:
                raise BrokenPipeError("the client is gone")
        request.resume()

    def _take_in(self, piece: bytes) -> bool:
        """Keep a piece, if there is room for it."""
        if self.spool is None and self.size <= min(AHEAD_SIZE, self.disk.spare()):
            self.queue.append(piece)
            self.size += len(piece)
            return True
        try:
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

    def _give_out(self) -> bytes:
        """What comes next: all of the queue, else a part of the file."""
        piece = b"".join(self.queue)
        self.queue.clear()
        self.size = 0
        if not piece and self.spool is not None:
            piece = self.spool.read(self.at, max(4096, self.disk.spare()))
            self.at += len(piece)
            if self.at == self.spool.size:
                self.spool = None
        return piece

    def __iter__(self) -> Handover:
        return self

    def __next__(self) -> bytes:
        with self.changed:
            end, piece = self.end, self._give_out()
            self.changed.notify()
        if end is not None and not piece:
            raise end
        return piece


class Running:
    """A request.state: the application runs, or has run."""

    def __init__(self, response: WSGIResponse, pieces: Iterator[bytes],
                 content: Optional[Spool]) -> None:
        self.content = content
        self.response = response
        self.pieces = pieces
        self.rest = memoryview(b"")                 # of the piece that is being sent,
        self.spool: Optional[Spool] = None          # what of it is too large for memory,
        self.at = 0                                 # and how much of that has been taken
        self.begin: Optional[Callable[[Request], None]] = None     # until a thread has begun

    def in_memory(self) -> int:
        waiting: int = getattr(self.pieces, "size", 0)      # of a Handover
        if self.content is not None:
            waiting += self.content.in_memory
        return len(self.rest) + waiting

    def next_piece(self, size: int) -> Optional[bytes]:
        if self.spool is None:
            return next(self.pieces, None)
        piece = self.spool.read(self.at, size)
        self.at += len(piece)
        if self.at == self.spool.size:
            self.spool = None
        return piece

    def spool_rest(self, disk: Disk) -> None:
        """Put what is left of a piece into a file; where there is no room, memory has to do."""
        with suppress(OSError):
            spool = Spool(disk, few=0)
            spool.write(self.rest)
            self.spool = spool
            self.at = 0
            self.rest = memoryview(b"")


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


class Job:
    """An application that waits for a thread. A client that goes takes along what waits for it."""

    def __init__(self, request: Request) -> None:
        self.request = weakref.ref(request)

    def __call__(self) -> None:
        request = self.request()
        if request is not None and request.state.begin is not None:
            begin, request.state.begin = request.state.begin, None
            begin(request)


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
        if not isinstance(request.state, Running):
            request.state = self.begin(request, request.state)
        running = request.state
        piece = next(running.pieces, None)
        request.kept = running.in_memory()
        if piece == b"":
            return SUSPEND
        running.rest = memoryview(piece or b"")
        return running.response.begin(page, running.rest)

    def begin(self, request: Request, content: Optional[Spool]) -> Running:
        """Have the application run, here or in a thread."""
        if self.threads and self.pool.is_full():
            raise HTTPError(503, "too many requests wait for a thread", {"Retry-After": "1"})
        environ = wsgi_environ(request, content, self.threads)
        to_head = request.method == "HEAD"
        if not self.threads:
            written = Spool(request.disk)
            response = WSGIResponse(to_head, written.write)
            pieces = response.pieces(self.app, environ, content, written)
            return Running(response, pieces, content)
        handover = Handover(request.disk)
        response = WSGIResponse(to_head, handover.put)
        running = Running(response, handover, content)
        pieces = response.pieces(self.app, environ, content, None)
        running.begin = functools.partial(handover.fill, pieces)
        self.pool.submit(Job(request))
        return running


def register_wsgi(module: str, root_path: str, app: Application, *, threads: int = 0) -> None:
    """Mount a WSGI application (PEP 3333): SCRIPT_NAME is `/root_path`; "" mounts it at / for what
    no other root takes.

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
        methods=WSGI_METHODS, upload_limit="wsgi_body_size")


# --------------------------------------------------------------------------------------------- main

def say(text: str) -> None:
    """Print, if anybody reads it: that is no reason not to serve."""
    try:
        print(text, flush=True)
    except OSError:                     # the interpreter would fail at its end too
        sys.stdout = open(os.devnull, "w")


def run(**parameters: Any) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends the grace. SIGHUP: reload_tls().

    Main thread. ConfigError, or OSError if it cannot listen.
    """
    if loading:
        raise ConfigError("%s: calls httpd.run() while it is loaded: write that below "
                          'if __name__ == "__main__":' % loading[-1])
    server = Server(**parameters)
    banner = "httpd.py %s listens on %s" % (__version__, server.url)       # OSError comes from here
    if server.params.ip in ("", "*"):
        banner += " and every other address"
    stopped: list[int] = []

    def stop(number: int, frame: Any) -> None:
        server.stop(0 if stopped else None)
        stopped.append(number)

    def renew(number: int, frame: Any) -> None:
        server.reload_tls()

    wanted = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: renew}
    previous = {}
    try:
        for number, handler in wanted.items():
            previous[number] = signal.signal(number, handler)
        initialize(server)              # before anybody is told that it serves
        for root in roots.values():
            banner += "\n  /%s  %s" % (root.name, root.module)
        say(banner)
        # full collections need not look at what was loaded: 3 ms
        freeze = getattr(gc, "freeze", None)
        if freeze is not None:
            freeze()
        server.run()
    finally:
        server.stop(0)
        for number, before in previous.items():
            signal.signal(number, before)


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
    for module in ["httpd", *loaded]:
        print("[%s]" % module)
        for name, value in in_force(module).items():
            if module == "httpd":
                value = getattr(server.params, name)        # zeros resolved
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


def make_parser() -> argparse.ArgumentParser:
    import argparse                     # 6 ms, and only the command line needs it
    parser = argparse.ArgumentParser(
        prog="httpd.py", description="A management server over HTTP.", epilog=describe_parameters(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", help="the configuration")
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
    print("%s: %s" % (places.get(parameter, path), text), file=sys.stderr)
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
            print_in_force()
        else:
            run()
    except ConfigError as error:
        return complain(options.file, str(error), error.parameter)
    except OSError as error:
        return complain(options.file, str(error.strerror), "port")
    return 0


if __name__ == "__main__":
    sys.modules["httpd"] = sys.modules["__main__"]      # for what the configuration loads
    sys.exit(main())
