#!/usr/bin/env python3
"""An HTTP endpoint for any Linux program, in one file of standard-library Python.

Copy the file into a project and register what answers below a root path:

    import httpd

    def hello(request, page):
        page.write("Hello, %s!\\n" % request.lookup_arg("name", "world"))
        return 200

    httpd.register_httpdcb("example", "hello", hello)
    httpd.run(port=8000)

or run it as a management server: `python httpd.py example.cfg`.

How a GET travels through this file:

    Server._turn                      one poll; the clock is read once for all that is ready
      Connection.turn                 runs states until one has to wait; with TLS, greet and shake_hands are the first
        Connection.idle               one recv()
        Connection.serve              a head seen before costs a dict look-up, any other comes by
          Connection.next_head        where does it end?
            Server.admit              has it parsed and checked, and remembers it
              parse_head              bytes in, an immutable Head out, or HTTPError; it remembers lines
          Connection.begin_content    only if the request has content: receive_content until it is whole
          a Request for the root's handler, which writes into the Page; find_root says why there is none
          Connection.respond          puts the head right before the content, in the same buffer
        Connection.flush              one send(); then idle again, or serve, or the end

A handler that has written nothing leaves the content to flush_data_cb: begin_stream instead of respond, then stream and
flush in turn. One that returns SUSPEND is called again by serve, after Request.resume() and Server._continue.

The rule of the one buffer: a server has one Page. What the socket does not take of it, and the answers to pipelined
requests, which leave together, are copied out and counted against memory_budget: it is free again when `turn` returns.

The parser knows bytes only. A Connection runs states, and `turn` alone knows "would block". The Server alone knows the
selector, the time and the set of connections. A server lives in one thread; stop, resume and reload_tls are for any.
"""
from __future__ import annotations

import errno, gc, io, json, logging, math, os, queue, re
import resource, select, selectors, signal, socket, sys, threading, time
from collections import deque, namedtuple
from contextlib import closing, suppress
from contextvars import copy_context
from email.utils import formatdate
from functools import cache, partial
from http import HTTPStatus
from importlib import import_module
from operator import attrgetter
from types import MappingProxyType, SimpleNamespace
from typing import Any, Callable, Generator, Mapping, NamedTuple, Optional, Sequence
from urllib.parse import parse_qsl, unquote, unquote_to_bytes

__version__ = "0.1"
__all__ = ["register_httpdcb", "unregister_httpdcb", "register_mi", "modparam", "loadmodule", "load_config", "Server",
           "run", "Request", "Page", "FormFile", "HTTPError", "ConfigError", "SUSPEND", "END", "register_wsgi",
           "tls_priority", "tls_context", "TLSPlan"]
log = logging.getLogger("httpd")


# ---------------------------------------------------------------------------------------------------------- Parameters
class ConfigError(ValueError):
    """The operator's or the programmer's mistake: a line for each problem, which says what to do instead."""


class Parameter(NamedTuple):
    """A row of the table: the type of the default is the parameter's type."""
    name: str
    default: Any
    meaning: str
    low: float = 0
    high: float = math.inf
    zero: bool = False                              # 0 is allowed though it is below `low`
    check: Callable[[str], Any] = str               # raises ValueError that says what a text must be

    def bounds(self) -> str:
        """The allowed numbers, in words."""
        words = "at least %g" % self.low if self.high == math.inf else "%d to %d" % (self.low, self.high)
        return "" if isinstance(self.default, str) else "0 or " * self.zero + words

    def convert(self, value: Any) -> Any:
        """The value in the parameter's type; ValueError says what it must be. Numbers may come as ASCII digits."""
        kind = type(self.default)
        if kind is str and isinstance(value, (str, os.PathLike)):
            self.check(os.fspath(value))
            return os.fspath(value)
        if isinstance(value, str) and re.fullmatch("-?[0-9]{1,15}" + r"(\.[0-9]{1,6})?" * (kind is float), value):
            value = kind(value)
        if kind is str or isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ValueError("must be " + {str: "text", int: "a whole number", float: "a number of seconds"}[kind])
        if not (self.low <= value <= self.high or self.zero and value == 0):
            raise ValueError("must be " + self.bounds())
        return kind(value)


def check_address(text: str) -> None:
    """Names are not looked up: that could stall the start, or turn out differently the next time."""
    try:
        if text not in ("", "*"):
            socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise ValueError("must be an IPv4 or IPv6 address, or empty or * for all of them") from None


def check_root(text: str) -> None:
    """OpenSIPS' rule for root paths."""
    if not re.fullmatch("[A-Za-z0-9_]*", text):
        raise ValueError("must be one path segment of letters, digits and _")


PARAMETERS = {
    "httpd": (
        Parameter("ip", "", "address to bind; empty or *: all, IPv4 and IPv6 in one socket", check=check_address),
        Parameter("port", 8888, "port to listen on; 0: any free one", 1024, 65535, zero=True),
        Parameter("memory_budget", 4 * 2**20, "bytes that a process may hold for all connections together", 2**16),
        Parameter("buf_size", 0, "bytes of the response buffer; 0: a quarter of memory_budget", 256, zero=True),
        Parameter("post_buf_size", 1024, "bytes of the largest request content held in memory; larger: 413", 256),
        Parameter("receive_buf_size", 0, "the same for content that is no form; 0: post_buf_size", 256, zero=True),
        Parameter("wsgi_body_size", 2**26, "bytes of the largest content for a WSGI application; larger: 413", 256),
        Parameter("tls_cert_file", "", "certificate chain, PEM; with tls_key_file: HTTPS only"),
        Parameter("tls_key_file", "", "its private key, PEM"),
        Parameter("tls_ciphers", "SECURE256:+SECURE192:-VERS-ALL:+VERS-TLS1.2", "GnuTLS priority string",
                  check=lambda text: tls_priority(text)),
        Parameter("tls_ca_file", "", "CA certificates, PEM; clients must present a certificate signed by one"),
        Parameter("conn_timeout", 30.0, "seconds an idle connection, or one that takes no bytes, is kept; 0: for ever"),
        Parameter("request_timeout", 10.0, "seconds for a head from its first byte; content: 1 s more per 500 B", 0.1),
        Parameter("max_connections", 0, "connections at a time; 0: what RLIMIT_NOFILE allows", 1, zero=True),
        Parameter("max_header_size", 16384, "bytes of request line and fields; larger: 414 or 431", 256, 2**16),
        Parameter("grace_timeout", 10.0, "seconds that requests in flight get at shutdown"),
    ),
    "mi_http": (
        Parameter("root", "mi", "root path of JSON-RPC", check=check_root),
        Parameter("threads", 4, "threads for commands that take long", 1, 100),
    ),
}
params: dict[str, dict[str, Any]] = {}      # module -> the parameters that have been set
loaded: list[str] = []                      # modules, in the order of loading
places: dict[str, str] = {}                 # parameter of httpd -> FILE:LINE, where it has been set there


def nearest(name: str, names) -> str:
    """`, did you mean "port"?`, or nothing."""
    from difflib import get_close_matches
    return "".join(', did you mean "%s"?' % match for match in get_close_matches(name, list(names), 1))


def convert(module: str, name: str, value: Any) -> Any:
    """The value as the parameter's row wants it. What a module of the user's own is given, its mod_init judges."""
    rows = {row.name: row for row in PARAMETERS.get(module, ())}
    if rows and name not in rows:
        raise ConfigError('%s: unknown parameter "%s"%s' % (module, name, nearest(name, rows)))
    try:
        return rows[name].convert(value) if rows else value
    except ConfigError as error:
        raise ConfigError("%s: %s" % (module, error)) from None
    except ValueError as error:
        raise ConfigError("%s: %s %s, not %r" % (module, name, error, value)) from None


def modparam(module: str, name: str, value: Any) -> None:
    """Set a parameter for the servers and modules that come now, or ConfigError. Main thread, at start."""
    params.setdefault(module, {})[name] = convert(module, name, value)


def in_force(module: str, **overrides: Any) -> dict[str, Any]:
    """All parameters of a module: the defaults, over them what modparam() has set, over that the keywords."""
    values = {row.name: row.default for row in PARAMETERS.get(module, ())}
    values.update(params.get(module, {}))
    values.update((name, convert(module, name, value)) for name, value in overrides.items())
    return values


def httpd_in_force(**overrides: Any) -> SimpleNamespace:
    """The parameters of httpd itself, zeros resolved; ConfigError if they do not go together."""
    values = SimpleNamespace(**in_force("httpd", **overrides))
    values.tls = bool(values.tls_cert_file)
    if values.tls != bool(values.tls_key_file):
        given, missing = ("cert", "key") if values.tls else ("key", "cert")
        raise ConfigError("httpd: tls_%s_file is set without tls_%s_file: HTTPS wants both" % (given, missing))
    if values.tls_ca_file and not values.tls:
        raise ConfigError("httpd: tls_ca_file is set without tls_cert_file and tls_key_file: HTTPS wants them")
    values.receive_buf_size = values.receive_buf_size or values.post_buf_size
    request = values.max_header_size + max(values.post_buf_size, values.receive_buf_size)
    least = max(2 * request, 4 * (values.buf_size + request) // 3) + 4
    if values.memory_budget < least:
        raise ConfigError("httpd: memory_budget %d has no room for buf_size and a whole request: set it to at least %d"
                          % (values.memory_budget, least))
    values.buf_size = values.buf_size or values.memory_budget // 4
    values.memo_size = values.memory_budget // 4            # for heads that have been parsed,
    values.held_size = values.memory_budget - values.buf_size - values.memo_size    # and for what is under way
    return values


def loadmodule(name: str, **parameters: Any) -> None:
    """Load a module of this file (`mi_http`), or a Python module, whose `mod_init(params)` gets its parameters, a dict.
    `mi_http.so`, as OpenSIPS writes it, is taken too. ConfigError, also if it is loaded. Main thread, at start."""
    name = re.sub(r"^.*/|\.so$", "", name)
    for key, value in parameters.items():
        modparam(name, key, value)
    if name in loaded:
        raise ConfigError("%s: is loaded already" % name)
    try:
        if name != "httpd":                 # the transport itself is always there
            mod_init = BUILT_IN.get(name) or getattr(import_module(name), "mod_init", None)
            if mod_init is None and params.get(name):
                hint = nearest(name, ["httpd", *BUILT_IN])
                hint = hint or ", or it takes no parameters: it has no mod_init"
                raise ConfigError("%s: no such module%s" % (name, hint))
            if mod_init is not None:
                mod_init(in_force(name))
            loaded.append(name)
    except ConfigError:
        raise
    except Exception as error:
        log.debug("%s: traceback", name, exc_info=True)
        hint = nearest(name, ["httpd", *BUILT_IN]) if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError("%s: cannot be loaded: %s: %s%s" % (name, type(error).__name__, error, hint)) from error


_TEXT = r'"(?:[^"\\]|\\.)*"'
COMMENT = re.compile("(" + _TEXT + r")|(?:^|(?<=\s))[#;].*")
LOAD_LINE = re.compile(r'\[\s*([^\]\s]+)\s*\]|loadmodule\s+"([^"]+)"\s*;?')
MODPARAM_LINE = re.compile(r'modparam\s*\(\s*"([^"]+)"\s*,\s*"([^"]+)"\s*,\s*(' + _TEXT + r'|[^\s")]+)\s*\)\s*;?')
VALUE_LINE = re.compile(r"([^\s=]+)\s*=\s*(" + _TEXT + r'|[^"\s].*|)')


def unquoted(text: str) -> str:
    return re.sub(r'\\(["\\])', r"\1", text[1:-1]) if text[:1] == '"' else text


def read_config(path: str, problems: list[str]) -> list[tuple[str, str, str, str]]:
    """The lines of a configuration as (FILE:LINE, module, name, value); without a name the module is to be loaded."""
    try:
        with open(path, encoding="utf-8-sig") as file:      # some editors begin with a mark
            lines = file.read().split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError("%s: cannot be read: %s" % (path, getattr(error, "strerror", None) or error)) from None
    found, section = [], ""
    for number, line in enumerate(lines, 1):
        where, line = "%s:%d" % (path, number), COMMENT.sub(r"\1", line).strip()
        if match := LOAD_LINE.fullmatch(line):
            found.append((where, re.sub(r"^.*/|\.so$", "", match[1] or match[2]), "", ""))
            section = match[1] or section
        elif match := MODPARAM_LINE.fullmatch(line):
            found.append((where, match[1], match[2], unquoted(match[3])))
        elif section and (match := VALUE_LINE.fullmatch(line)):
            found.append((where, section, match[1], unquoted(match[2])))
        elif line:
            problems.append('%s: cannot read %r: write [module], below it name = value, or modparam("module", "name", '
                            'value), and loadmodule "name.so"' % (where, line))
    return found


def load_config(path: str, overrides: Sequence[str] = ()) -> None:
    """Read a configuration: set its parameters, then `overrides` (name=value, module.name=value), load its modules.
    ConfigError has all problems, each a line `FILE:LINE: MODULE: what is wrong`. Main thread, at start."""
    problems: list[str] = []
    lines = read_config(path, problems)
    modules: dict[str, str] = {}
    for where, module, name, _ in lines:
        if not name:
            modules.setdefault(module, where)
    seen: dict[tuple[str, str], str] = {}
    for text in overrides:
        left, _, value = text.partition("=")
        module, _, name = left.rpartition(".")
        lines.append(("-o " + text, module or "httpd", name, value))
    for where, module, name, value in lines:
        try:
            if name and module not in modules and module != "httpd":
                hint = nearest(module, ["httpd", *modules])
                raise ConfigError('%s: is not loaded: write loadmodule "%s.so"%s' % (module, module, hint))
            if name and seen.setdefault((module, name), where) != where and not where.startswith("-o "):
                raise ConfigError("%s: %s is set already, at %s" % (module, name, seen[module, name]))
            if name:
                modparam(module, name, value)
                places.update({name: where} if module == "httpd" else {})
        except ConfigError as error:
            problems.append("%s: %s" % (where, error))
    if not problems:
        sys.path.append(os.path.dirname(os.path.abspath(path)))     # a user's module may lie beside it
    for module in modules if not problems else ():
        try:
            loadmodule(module)
        except ConfigError as error:
            problems.append("%s: %s" % (modules[module], error))
    if problems:
        raise ConfigError("\n".join(problems))


# ------------------------------------------------------------------------------------------------------------ Registry
REASONS = {status.value: status.phrase for status in HTTPStatus}


class HTTPError(Exception):
    """The client's fault, for handlers too: answered with this status, these fields and the reason as a line of text.
    From an MI command, status and reason are the code and the message of the JSON-RPC error."""
    def __init__(self, status: int, reason: str = "", headers: Optional[Mapping[str, str]] = None):
        super().__init__(status, reason)
        self.status, self.reason, self.headers = int(status), reason or REASONS.get(status, ""), headers or {}
        for name, value in self.headers.items():
            check_field(name, value)


SUSPEND, END = -2, -1       # what an access handler returns to be called again; what flush_data_cb returns at the end


# A root path and who answers there; the handlers by method.
Root = namedtuple("Root", "name module handlers content_type flush upload upload_limit", defaults=(None, None, 0))


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                # RFC 9110, 5.6.2
TOKEN = re.compile(_TOKEN.decode())
FIELD_VALUE = re.compile("[\t -~\x80-\xff]*")           # RFC 9110, 5.5: no control character but the tab
DIGITS = re.compile("[0-9]{1,18}")

roots: dict[str, Root] = {}                             # by root path, in the order of registration
pending_inits: list[Callable[[], None]] = []            # the init_proc_cb's that this process has not run yet
# RFC 9110, 9.3 and RFC 5789: 405 where a root does not list them. CONNECT is for proxies: 501, as what nobody knows.
init_lock = threading.RLock()
known_methods = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"}


def register_httpdcb(module: str, root_path: str, access_handler_cb: Callable[[Request, Page], int],
                     flush_data_cb: Optional[Callable[[Request, int, memoryview], int]] = None,
                     init_proc_cb: Optional[Callable[[], None]] = None, *,
                     content_type: str = "text/html; charset=utf-8", methods: tuple = ("GET", "POST"),
                     upload_data_cb: Optional[Callable[[Request, bytes], Any]] = None,
                     upload_limit: float = math.inf) -> None:
    """Have `access_handler_cb(request, page) -> status` answer every request at and below `/root_path`.

    module             who registers: for error texts and httpd_list_root_path
    root_path          one segment of letters, digits and _, blanks around it trimmed; "" takes what no other root takes
    access_handler_cb  called in the server's thread when the request is complete. It writes the content with
                       page.write() and returns the status, 200 to 599; HTTPError is answered as it says, another
                       exception with 500 and a traceback in the log. Nobody else is served meanwhile. Or it returns
                       SUSPEND, and is called again after request.resume(), with the same request and a clean page
    flush_data_cb      flush_data_cb(request, pos, buf) -> n makes the content when the handler has written none: it
                       fills the memoryview `buf` with what stands at `pos` of it, and returns how many bytes; 0:
                       nothing yet, call again after request.resume(); END. It is called again when the socket has
                       taken them. Sent chunked, or with the Content-Length that the handler has set; a wrong count
                       cuts the connection, as an exception does: a broken end is the only honest sign
    init_proc_cb       called once in every process that serves, in the server's thread, before the first request
    content_type       of the response, unless the handler sets page.content_type
    methods            that the handler takes. HEAD comes with GET; OPTIONS is answered by the server
    upload_data_cb     upload_data_cb(request, data) gets the content piece by piece as it arrives, and then the handler
                       is called with an empty request.body. HTTPError refuses the rest of it
    upload_limit       bytes of the largest content for upload_data_cb; larger: 413

    Raises ConfigError: a bad root path, or one that is taken. Any thread.
    """
    name = root_path.strip(" \t\r\n") if isinstance(root_path, str) else "?"
    try:
        check_root(name)
    except ValueError as error:
        raise ConfigError("%s: root path %s, not %r" % (module, error, root_path)) from None
    if name in roots:
        raise ConfigError('%s: root path "%s" is taken by %s' % (module, name, roots[name].module))
    for function in (access_handler_cb, *filter(None, (flush_data_cb, init_proc_cb, upload_data_cb))):
        if not callable(function):
            raise ConfigError('%s: root path "%s": no function: %r' % (module, name, function))
    words = [method for method in methods if isinstance(method, str) and TOKEN.fullmatch(method)]
    if isinstance(methods, str) or len(words) < len(methods) or not {"CONNECT", "TRACE"}.isdisjoint(methods):
        raise ConfigError('%s: root path "%s": methods must be a tuple of names, not CONNECT or TRACE' % (module, name))
    check_field("Content-Type", content_type)
    handlers = dict.fromkeys(methods, access_handler_cb)
    if "GET" in handlers:
        handlers.setdefault("HEAD", access_handler_cb)
    handlers.setdefault("OPTIONS", answer_options)
    known_methods.update(handlers)
    if init_proc_cb:
        pending_inits.append(init_proc_cb)
    roots[name] = Root(name, module, handlers, content_type, flush_data_cb, upload_data_cb, upload_limit)


def unregister_httpdcb(root_path: str) -> None:
    """Take a root path out again: 404 from now on. ConfigError if it is not there. Any thread."""
    if roots.pop(root_path.strip(" \t\r\n"), None) is None:
        raise ConfigError('root path "%s" is not registered%s' % (root_path, nearest(root_path, roots)))


def initialize(late: bool = True) -> None:
    """Run the init_proc_cb's that have not run in this process. One that fails ends the start of a server."""
    with init_lock:
        while pending_inits:
            try:
                pending_inits[0]()
            except Exception:
                if not late:
                    raise
                log.exception("an init_proc_cb failed")
            del pending_inits[0]


def find_root(head: Head) -> tuple[Root, Callable]:
    """The root that a request goes to, and the handler of its method there."""
    if pending_inits:
        initialize()
    root = roots.get(head.root) or roots.get("")
    if root is None:
        if head.path == "*":                            # OPTIONS, the parser has seen to that: the server as a whole
            return Root("*", "httpd", dict.fromkeys(sorted(known_methods - {"TRACE"})), ""), answer_options
        raise HTTPError(404, "nothing is registered for this path")
    handler = root.handlers.get(head.method)
    if handler is None:
        raise HTTPError(405, "this method is not allowed here", {"Allow": ", ".join(root.handlers)})
    return root, handler


def answer_options(request: Request, page: Page) -> int:
    """OPTIONS, for every root (RFC 9110, 9.3.7)."""
    page.set_header("Allow", ", ".join(request._root.handlers))
    return 204


# ---------------------------------------------------------------------------------------------------- Request and Page
# A file in a form: the name that the client gives it (never use it as a path), its media type, its bytes.
FormFile = namedtuple("FormFile", "filename content_type content")
# Who the client is, by a certificate that tls_ca_file vouches for: such as CN=alice,O=Example; and a hexadecimal.
ClientCert = namedtuple("ClientCert", "subject serial")
plain_address = lambda host, port, *_: (re.sub(r"^::ffff:(?=.*\.)", "", host), port)      # IPv4 peers of IPv6 sockets
CERT_NAMES = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C"}


class Request:
    """What the client asks for. To be read, but for `state`, which is the handler's own. For the server's thread."""
    __slots__ = ("state", "body", "_head", "_root", "_connection", "_form", "_resumed")

    def __init__(self, connection: Connection, head: Head, body: bytes):
        self._connection = connection
        self._head = head
        self._root = None           # until it is found
        self._form = None
        self._resumed = False       # resume() has been called, and no callback because of it
        self.body = body            # the content, transfer coding taken off
        self.state = None

    method = property(attrgetter("_head.method"), doc="as sent, such as GET. For HEAD the content is not sent")
    target = property(attrgetter("_head.target"), doc="the request target as sent")
    version = property(attrgetter("_head.version"), doc="HTTP/1.1 or HTTP/1.0")
    path = property(attrgetter("_head.path"), doc="percent-decoded once; bytes that are not UTF-8 are U+FFFD")
    query = property(attrgetter("_head.query"), doc="what stands behind the ?, as sent; see lookup_arg")
    headers = property(attrgetter("_head.fields.headers"), doc="lower-case name -> value, several joined by a comma")
    scheme = property(attrgetter("_connection.server.scheme"), doc="http or https")
    root = property(attrgetter("_root.name"), doc="the root path that has taken the request")
    client = property(lambda self: plain_address(*self._connection.peer), doc="address and port of the peer")
    server = property(lambda self: plain_address(*self._connection.sock.getsockname()), doc="those it is connected to")
    closed = property(lambda self: self._connection.sock.fileno() < 0, doc="True once the client is gone")

    @property
    def url(self) -> str:
        """The path below the root: "", "/" or "/x"; for the root "" the whole path."""
        return self._head.url if self._root.name else self._head.path

    @property
    def client_cert(self) -> Optional[ClientCert]:
        """The certificate that the client has presented; None without tls_ca_file."""
        found = self._connection.server.params.tls_ca_file and self._connection.sock.tls.getpeercert()
        if not found:
            return None
        names = [(CERT_NAMES.get(name, name), re.sub(r'([\\,+"<>;])', r"\\\1", value))      # RFC 4514, 2.4
                 for part in found["subject"][::-1] for name, value in part]
        return ClientCert(",".join(map("=".join, names)), found["serialNumber"])

    @property
    def form(self) -> dict[str, list]:
        """The fields of the query, then those of a form in the body: name -> values, each a str or a FormFile.
        HTTPError 400 if the body is not what its Content-Type says."""
        if self._form is None:
            self._form = parse_form(self._head.query, self.headers.get("content-type", ""), self.body)
        return self._form

    def lookup_arg(self, key: str, default: Any = None) -> Any:
        """The first value of the field of `form` that has exactly this name."""
        return self.form.get(key, (default,))[0]

    def _upload(self, data: bytes) -> None:
        """Hand a piece of the content to upload_data_cb."""
        try:
            self._root.upload(self, data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise blame(error, self._head) from None

    def resume(self) -> None:
        """Have the callback called again that has returned SUSPEND, or 0 from flush_data_cb. Any thread. It may come
        before the callback has returned, repeatedly, and when all is over."""
        if not self._resumed:
            self._resumed = True
            self._connection.server._resume(self)


def check_field(name: str, value: str) -> None:
    """We send what we would accept: a client's CR LF in a value must not end the head (RFC 9110, 5.5)."""
    rule = FIELD_VALUE if name.lower() != "content-length" else DIGITS
    if not TOKEN.fullmatch(name) or not rule.fullmatch(value):
        raise ValueError("a character that may not stand in a header field: %r: %r" % (name, value))
    if name.lower() in OWN_FIELDS:
        raise ValueError("%s is set by the server" % name)


HEADROOM, TAILROOM = 512, 2         # bytes before the content, for a head of about 150; and behind it, to end a chunk
OWN_FIELDS = {"connection", "date", "keep-alive", "transfer-encoding", "upgrade"}


class Page:
    """The response in the making, on the one buffer of the server; the access handler gets it clean."""
    __slots__ = ("_content_type", "_view", "_size", "_end", "_fields")

    def __init__(self, size: int):
        self._view = memoryview(bytearray(HEADROOM + size + TAILROOM))
        self._size = HEADROOM + size
        self._content_type = ""
        self.clear()

    def _set_content_type(self, value: str) -> None:
        check_field("Content-Type", value)
        self._content_type = value

    content_type = property(attrgetter("_content_type"), _set_content_type, doc="the root's, until set")

    def clear(self) -> None:
        self._end, self._fields = HEADROOM, ()

    def write(self, data) -> int:
        """Add bytes, or a str as UTF-8, to the content. As with a file: json.dump(x, page), print(x, file=page).
        BufferError when it does not fit into buf_size."""
        if type(data) is str:
            data = data.encode()
        end = self._end + len(data)
        if end > self._size:
            raise BufferError("the response does not fit into %d bytes: raise buf_size" % (self._size - HEADROOM))
        self._view[self._end:end] = data
        self._end = end
        return len(data)

    def __len__(self) -> int:
        return self._end - HEADROOM

    @property
    def length(self) -> Optional[int]:
        """The Content-Length that the handler has set."""
        return next((int(value) for name, value in self._fields if name.lower() == "content-length"), None)

    def with_fields(self, head: bytes) -> bytes:
        """A head, and the handler's own fields."""
        own = ("%s: %s\r\n" % field for field in self._fields if field[0].lower() != "content-length")
        return head[:-2] + "".join(own).encode("latin-1") + b"\r\n"

    def set_header(self, name: str, value: str, add: bool = False) -> None:
        """Set a header field; one of that name is replaced, unless `add`, or Set-Cookie. Content-Length is for streams.
        ValueError for CR, LF, NUL and what else may not stand there, and for fields that the server sets."""
        key, value = name.lower(), str(value)
        check_field(name, value)
        if key == "content-type":
            self._content_type = value
        else:
            kept = (field for field in self._fields if add or key == "set-cookie" or field[0].lower() != key)
            self._fields = (*kept, (name, value))


# -------------------------------------------------------------------------------------------------------------- Parser
# Bytes in, immutable heads out. RFC 9110 and 9112, and where they leave a choice, the strict one: a doubt is a 400.

_ESCAPED = "%(?!00)[0-9A-Fa-f]{2}"
_PATH = '/[!"$&->@-~]*(?:' + _ESCAPED + '[!"$&->@-~]*)*'                # RFC 3986, 3.3: visible ASCII but # and ?
_QUERY = '[!"$&-~]*(?:' + _ESCAPED + '[!"$&-~]*)*'
_VALUE = FIELD_VALUE.pattern.encode("latin-1")
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'         # RFC 9110, 5.6.4
_LINES = rb"(?:" + _TOKEN + rb":" + _VALUE + rb"\r\n)*"
EMPTY_LINES = re.compile(rb"(?:\r\n){0,4}")                             # RFC 9112, 2.2: clients that send too many
REQUEST_LINE = re.compile("(" + TOKEN.pattern + ") ((" + _PATH + r")(?:\?(" + _QUERY + "))?|(?!/)" + _QUERY
                          + r") HTTP/([0-9]\.[0-9])")
FIELD_LINE = re.compile(_TOKEN + rb":" + _VALUE)
ABSOLUTE_FORM = re.compile("([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)([^?]*)(?:\\?(.*))?")
_NAME = r"[\w.~!$&'()*+,;=-]*"                                          # RFC 3986, 3.2.2
HOST = re.compile(r"(?!:|\Z)(?:\[([0-9A-Fa-f:.]+)\]|" + _NAME + "(?:%[0-9A-Fa-f]{2}" + _NAME + ")*)(?::([0-9]{0,5}))?",
                  re.ASCII)
PLAIN_HOST = re.compile("[A-Za-z0-9.-]+(?::[0-9]{1,4})?")               # what nearly every Host is: quickly found good
CODING = re.compile(_TOKEN.decode() + "(?:[ \t]*;.*)?")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})((?:[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|"
                        + _QUOTED + rb"))?)*)\r\n")
PARAMETER = re.compile("[ \t]*;[ \t]*(" + TOKEN.pattern + ")=(" + TOKEN.pattern + "|" + _TEXT + ")")
# What may still become one of these: bytes that cannot are refused at once, not when their line ends.
REQUEST_LINE_BEGIN = re.compile(rb"(?:\r|" + _TOKEN + rb'(?: (?:[!"$-~]+(?: (?:H|HT|HTT|HTTP|'
                                rb"HTTP/(?:[0-9](?:\.(?:[0-9]\r?)?)?)?)?)?)?)?)?")
FIELD_LINES_BEGIN = re.compile(_LINES + rb"(?:\r\n?|" + _TOKEN + rb"(?::" + _VALUE + rb"\r?)?)?")
CHUNK_LINE_BEGIN = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:\r?|[ \t]*(?:;" + _VALUE + rb"\r?)?))?")

CHUNKED, UNTIL_CLOSE = -1, -2       # beside a Content-Length of 0 or more; the second is for what goes out to HTTP/1.0
MAX_FIELDS = 128
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")
# RFC 9110, 6.5.1: fields that frame, route or authenticate a message may not come behind it.
NO_TRAILERS = frozenset("authorization cache-control connection content-encoding content-length content-range "
                        "content-type cookie expect host max-forwards origin range te trailer transfer-encoding "
                        "upgrade".split())
# What the answer says about the connection (RFC 9112, 9.3).
KEPT, KEPT_1_0, CLOSED = "", "Connection: keep-alive\r\n", "Connection: close\r\n"


# A header section, which requests that bring the same bytes share: name -> value; the length of the content or CHUNKED;
# what to answer: KEPT, KEPT_1_0 or CLOSED; what is expected, in small letters, or None; the content is a form.
Fields = namedtuple("Fields", "headers length connection expect form")
# A request line and header section that the parser has accepted. The path is percent-decoded, `root` its first segment,
# `url` the rest; `scheme` that of an absolute-form target; it `waits` if there is content, or an expectation to see to.
Head = namedtuple("Head", "method target version path query root url scheme connection fields waits")


def require(condition: Any, status: int, reason: str) -> None:
    if not condition:
        raise HTTPError(status, reason)


def parse_head(line: bytes, block: bytes, fields: Optional[Fields], lines: FieldLines, methods: set) -> Head:
    """A request line and the header section below it, to its empty line; `fields` if that has been parsed before.
    `lines` remembers field lines. The order of checks: grammar, version, sizes, method, Host, framing."""
    match = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if match is None:
        raise HTTPError(400, "malformed request line")
    method, target, path, query, version = match.groups()
    old = version == "1.0"
    if fields is None or old:                               # remembered as a HTTP/1.1 client's
        fields, pairs = None, list(map(lines.__getitem__, block.split(b"\r\n")[:-2]))
    scheme, host = "", ""
    if path is None or method == "CONNECT" or version[0] != "1":
        scheme, host, path, query = parse_target(method, target, version)
    if fields is None and len(pairs) > MAX_FIELDS:
        raise HTTPError(431, "more than %d header fields" % MAX_FIELDS)
    if method not in methods:
        raise HTTPError(501, "this method is not known here")
    if fields is None:
        fields = parse_fields(pairs, old)
    if host:                                                # RFC 9112, 3.2.2: the target's host counts
        fields = fields._replace(headers=MappingProxyType({**fields.headers, "host": host}))
    if "%" in path:
        path = unquote(path)
    root, slash, rest = path[1:].partition("/") if path != "*" else ("*", "", "")
    waits = fields.length != 0 or fields.expect is not None
    return tuple.__new__(Head, (method, target, "HTTP/1.0" if old else "HTTP/1.1", path, query or "", root,
                                slash + rest, scheme, fields.connection, fields, waits))   # half the price of Head()


def parse_target(method: str, target: str, version: str) -> tuple[str, str, str, str]:
    """Scheme, host, path and query of a target that is not in origin-form (RFC 9112, 3.2), if the version allows it."""
    require(version[0] == "1", 505, "this server speaks HTTP/1.1")
    if target == "*" and method == "OPTIONS":
        return "", "", "*", ""
    if method == "CONNECT":
        require(re.fullmatch(r"[^:]+:[0-9]{1,5}|\[.*\]:[0-9]{1,5}", target), 400, "CONNECT wants host:port")
        check_host(target)
        return "", "", "/", ""
    match = ABSOLUTE_FORM.fullmatch(target)
    require(match, 400, "malformed request target")
    scheme, host, path, query = match.groups()
    check_host(host)
    return scheme.lower(), host, path or ("*" if method == "OPTIONS" and query is None else "/"), query or ""


def check_host(text: str) -> None:
    """The grammar of `host[:port]` (RFC 9110, 7.2). The host is not empty."""
    match = HOST.fullmatch(text)
    require(match and int(match[2] or 0) <= 65535, 400, "the host is not host[:port]")
    if match[1]:
        try:
            socket.inet_pton(socket.AF_INET6, match[1])
        except OSError:
            raise HTTPError(400, "the host is no IPv6 address") from None


def parse_fields(pairs: list[tuple[str, str]], old: bool) -> Fields:
    """What the fields say together. `old`: a HTTP/1.0 client's."""
    headers, twice = dict(pairs), ()
    if len(headers) < len(pairs):
        headers, twice = join_fields(pairs)
    if "host" not in headers or "host" in twice:
        require(old and "host" not in twice, 400, "HTTP/1.1 wants the Host field, once")
    elif not PLAIN_HOST.fullmatch(headers["host"]):
        check_host(headers["host"])
    framed = "content-length" in headers or "transfer-encoding" in headers
    length = content_length(headers, twice, old) if framed else 0
    options = [option.strip(" \t") for option in headers.get("connection", "").lower().split(",")]
    kept = "close" not in options and ("keep-alive" in options or not old)
    expect = headers["expect"].lower() if "expect" in headers and not old else None
    form = "content-type" in headers and media_type(headers["content-type"]) in FORM_TYPES
    connection = CLOSED if not kept else KEPT_1_0 if old else KEPT
    return tuple.__new__(Fields, (MappingProxyType(headers), length, connection, expect, form))


def join_fields(pairs: list[tuple[str, str]]) -> tuple[dict[str, str], set[str]]:
    """Values of the same name become a list (RFC 9110, 5.3; RFC 6265, 5.4); also the names that come more than once."""
    headers: dict[str, str] = {}
    twice = set()
    for name, value in pairs:
        if name in headers:
            twice.add(name)
            value = headers[name] + ("; " if name == "cookie" else ", ") + value
        headers[name] = value
    return headers, twice


def content_length(headers: Mapping[str, str], twice: Any, old: bool) -> int:
    """How the content is framed (RFC 9112, 6). Nothing is guessed: requests are smuggled through doubts."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if length is not None:
        once = "content-length" not in twice
        require(once and DIGITS.fullmatch(length), 400, "Content-Length is not 1 to 18 digits, once")
    if coding is None:
        return int(length or 0)
    require(length is None and not old, 400, "Transfer-Encoding with Content-Length, or in HTTP/1.0")
    codings = [coding.strip(" \t") for coding in coding.lower().split(",")]
    if codings != ["chunked"]:
        once = "transfer-encoding" not in twice and "chunked" not in codings[:-1]
        require(once and all(map(CODING.fullmatch, codings)), 400, "Transfer-Encoding is not chunked, once")
        raise HTTPError(501, "no transfer coding but chunked is understood")
    return CHUNKED


def check_begin(data: bytes, start: int, limit: int) -> int:
    """Refuse the beginning of a head if no further byte can mend it, or if it is over the limit: 414, 431. Lines before
    `start` have been found good; returns the next `start`. The limit counts from the request line."""
    empty = EMPTY_LINES.match(data).end()
    begin = data[:empty + limit]
    line, found, _ = begin[empty:].partition(b"\r\n")
    match = REQUEST_LINE.fullmatch(line.decode("latin-1")) if found else None
    if found and not start:
        require(match, 400, "malformed request line")
        start = empty + len(line) + 2
    if start:
        require(FIELD_LINES_BEGIN.fullmatch(begin, start), 400, "malformed header field")
    else:
        require(REQUEST_LINE_BEGIN.fullmatch(begin, empty), 400, "malformed request line")
    if len(data) > len(begin):
        require(start, 414, "the request line is longer than max_header_size, %d bytes" % limit)
        method, target, path, _, version = match.groups()
        if path is None or method == "CONNECT" or version[0] != "1":
            parse_target(method, target, version)
        raise HTTPError(431, "the header section is longer than max_header_size, %d bytes" % limit)
    return start and begin.rfind(b"\r\n") + 2


def decode_content(length: int, limit: float, overhead: int, write: Callable) -> Generator[int, bytes, bytes]:
    """Take the framing off the content of one request (RFC 9112, 6 and 7) and hand it to `write`, piece by piece.
    send() it what is received; it yields how many bytes it holds, and returns what came behind the content. 413 as soon
    as that is over `limit`. `overhead`: bytes that chunk extensions and trailers may have."""
    too_large = "the content is larger than %.0f bytes, see post_buf_size, receive_buf_size, wsgi_body_size" % limit
    require(length <= limit, 413, too_large)
    data = bytearray()
    if length != CHUNKED:
        return (yield from pass_on(length, data, write))
    while length:
        while b"\r\n" not in data:
            require(CHUNK_LINE_BEGIN.fullmatch(data), 400, "malformed chunk size or extension")
            require(len(data) <= overhead + 17, 400, "the chunk extensions are too long")
            data += yield len(data)
        match = CHUNK_LINE.match(data)
        require(match, 400, "malformed chunk size or extension")
        length, overhead = int(match[1], 16), overhead - len(match[2])
        require(overhead >= 0, 400, "the chunk extensions are too long")
        limit -= length
        require(limit >= 0, 413, too_large)
        del data[:match.end()]
        if length:
            data = bytearray((yield from pass_on(length, data, write)))
            while not data.startswith(b"\r\n"):
                require(b"\r\n".startswith(data[:2]), 400, "a chunk is not as long as it says")
                data += yield len(data)
            del data[:2]
    while not data.startswith(b"\r\n") and b"\r\n\r\n" not in data:
        check_trailers(data, overhead)
        data += yield len(data)
    end = 0 if data.startswith(b"\r\n") else data.index(b"\r\n\r\n") + 2
    check_trailers(data[:end + 2], overhead)
    require(data.count(b"\n", 0, end) <= MAX_FIELDS, 431, "more than %d trailer fields" % MAX_FIELDS)
    names = {line.partition(b":")[0].decode().lower() for line in data[:end].split(b"\r\n")}
    require(NO_TRAILERS.isdisjoint(names), 400, "a field that may not stand in a trailer section")
    return bytes(data[end + 2:])


def pass_on(length: int, data: bytes, write: Callable) -> Generator[int, bytes, bytes]:
    """Hand `length` bytes to `write`, `data` first; returns what came behind them."""
    while True:
        piece, data = bytes(data[:length]), bytes(data[length:])
        if piece:
            write(piece)
        length -= len(piece)
        if not length:
            return data
        data = yield 0


def check_trailers(data: bytes, limit: int) -> None:
    """Trailers keep to the rules of fields, finished or not; they are dropped, never merged (RFC 9112, 7.1.2)."""
    require(FIELD_LINES_BEGIN.fullmatch(data[:limit]), 400, "malformed trailer field")
    require(len(data) <= limit, 431, "the trailer section is too long")


def parse_form(query: str, content_type: str, body: bytes) -> dict[str, list]:
    """The fields of a query, then those of a body that is a form."""
    form: dict[str, list] = {}
    pairs: list[tuple] = parse_qsl(query, keep_blank_values=True)
    kind = media_type(content_type)
    if kind == FORM_TYPES[0]:
        pairs += parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)
    for name, value in pairs + (parse_multipart(content_type, body) if kind == FORM_TYPES[1] else []):
        form.setdefault(name, []).append(value)
    return form


def parse_multipart(content_type: str, body: bytes) -> list[tuple[str, Any]]:
    """The parts of a multipart/form-data body (RFC 7578): a str, or a FormFile where there is a filename."""
    boundary = parse_parameters(content_type).get("boundary", "").encode("latin-1")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    ended = parts and re.match(rb"--[ \t]*(\r\n|\Z)", parts.pop())
    require(0 < len(boundary) <= 70 and ended, 400, "the form does not end with its boundary")
    pairs: list[tuple[str, Any]] = []
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        lines = (line.partition(":") for line in head.decode("utf-8", "replace").split("\r\n"))
        fields = {name.lower(): value for name, _, value in lines}
        about = parse_parameters(fields.get("content-disposition", ""))
        require("name" in about, 400, "a part of the form has no name")
        value = content.decode("utf-8", "replace") if "filename" not in about else FormFile(
            about["filename"], media_type(fields.get("content-type", "text/plain")), content)
        pairs.append((about["name"], value))
    return pairs


def parse_parameters(text: str) -> dict[str, str]:
    """The parameters behind a media type or disposition: `; name=value` (RFC 9110, 5.6.6)."""
    found: dict[str, str] = {}
    at = text.find(";")
    while match := PARAMETER.match(text, at) if at >= 0 else None:
        found.setdefault(match[1].lower(), unquoted(match[2]))
        at = match.end()
    require(at < 0 or not text[at:].strip(" \t;"), 400, "malformed parameter of a field")
    return found


def media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip(" \t").lower()


class Memo(dict):
    """What has been parsed, by its bytes, in two generations: this dict is the young one, `old` the one before. What
    comes for the second time is remembered. A full young generation becomes the old one, and what is asked for again
    comes back from there: heads that never come again leave only a hash, and cannot push out those that do."""
    def __init__(self, size: int):
        self.old: dict[bytes, Any] = {}
        self.size = self.room = size // 2       # bytes of a generation, and those left
        self.once: set[int] = set()             # hashes of what has come once

    def __missing__(self, raw: bytes):
        value = self.old.get(raw)
        if value is not None:
            self.remember(raw, value)
        return value

    def keep(self, raw: bytes, value: Any) -> None:
        """Remember what has been found good, if it is not for the first time."""
        key = hash(raw)
        if key in self.once:
            self.remember(raw, value)
        elif len(self.once) > 1023:
            self.once.clear()
        self.once.add(key)

    def remember(self, raw: bytes, value: Any) -> None:
        cost = weight(raw) + weight(value) + 100
        if cost > self.room:
            self.old = self.copy()
            self.clear()
            self.room = self.size
        if cost <= self.room:
            self.room -= cost
            self[raw] = value


class FieldLines(dict):
    """Field lines that have been parsed, line -> (name, value): most of what a client sends, it has sent before."""
    def __init__(self, size: int):
        self.size = self.room = size            # bytes, and those left

    def __missing__(self, line: bytes) -> tuple[str, str]:
        if FIELD_LINE.fullmatch(line) is None:
            raise HTTPError(400, "malformed header field")
        name, _, value = line.decode("latin-1").partition(":")
        pair = name.lower(), value.strip(" \t")
        cost = 3 * len(line) + 300
        if cost < self.size // 8:               # a long one would push out too many
            if cost > self.room:
                self.clear()
                self.room = self.size
            self.room -= cost
            self[line] = pair
        return pair


def weight(value: Any) -> int:
    """The bytes that something parsed takes, about."""
    parts = value if isinstance(value, tuple) else value.items() if isinstance(value, MappingProxyType) else ()
    return sys.getsizeof(value) + sum(map(weight, parts))


# ---------------------------------------------------------------------------------------------------------- Connection
def content_pieces(request: Request, page: Page, head: bytes, length: int, room: int) -> Generator[Any, int, None]:
    """A response whose content flush_data_cb makes in the page. send() it the `room` for the next piece; it yields what
    is to be sent, or None when there is nothing yet."""
    view, flush, pos, left = page._view, request._root.flush, 0, math.inf if length < 0 else length
    while True:
        with view[HEADROOM:HEADROOM + room] as buf:         # who keeps it cannot touch what others get
            count = flush(request, pos, buf)
        if count == END:
            break
        if not isinstance(count, int) or not 0 <= count <= min(room, left):
            raise ValueError("flush_data_cb returned %r where it could give %.0f bytes" % (count, min(room, left)))
        if not count and head:
            yield head
        if not count:
            head, room = b"", (yield None)
            continue
        end = HEADROOM + count
        if length == CHUNKED:
            head += b"%x\r\n" % count
            view[end:end + TAILROOM] = b"\r\n"
            end += TAILROOM
        start = HEADROOM - len(head)
        pos, left = pos + count, left - count
        if start < 0:
            room = yield head + view[HEADROOM:end]
        else:
            view[start:HEADROOM] = head
            room = yield view[start:end]
        head = b""
    if 0 < left < math.inf:
        raise ValueError("flush_data_cb ended %d bytes before the Content-Length" % left)
    if head or length == CHUNKED:
        yield head + b"0\r\n\r\n" * (length == CHUNKED)


RECEIVE_SIZE = 16384        # bytes of one recv(): the pipelined requests that one turn takes; as much as a TLS record,
                            # so that nothing stays inside TLS, where epoll does not see it
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
LINGER_PAUSE, LINGER_TIME = 5, 30       # seconds without a byte, and in all, that a refused client is read on
HANGUP, RESET = 4, 8        # what a suspended request waits for: see Connection.suspended
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
TLS_HANDSHAKE = b"\x16"     # its first byte (RFC 8446, 5.1)
TLS_WANTS = {"SSLWantReadError": READ, "SSLWantWriteError": WRITE}      # what to wait for, whatever the state
raw_recv = socket.SocketType.recv       # the bytes below TLS


class TLSSocket(socket.SocketType):
    """A socket that can begin TLS, by what ssl.SSLSocket has inside: making that takes 2.7 us more a connection."""
    __slots__ = ("recv", "send", "tls", "__weakref__")

    def begin_tls(self, context: Any) -> None:
        self.tls = context._wrap_socket(self, True)         # private, and the same in Python 3.9 to 3.13
        self.recv, self.send = self.tls.read, self.tls.write        # which takes a record of 16 KiB at a time


class Connection:
    """One socket and what is under way on it. `state` is the function that runs next: True to go on, False to wait.

        with TLS: greet > shake_hands ──> idle
        idle ──> serve ──────> flush ──> idle
                 │ ^ ^ pipelined  ├────> serve            more has been received
                 v │ └────────────┤
        receive_head              ├────> shut > linger    what came was refused
        receive_content           ├────> close
                                  ├────> stream           flush_data_cb has more
        serve, stream ────────────└────> suspended ──> serve or stream    request.resume() was called

    A state may be run again from its start: nothing is changed before the recv() or send() that may block.
    """
    __slots__ = ("server", "sock", "peer", "state", "then", "interest", "deadline", "received", "checked",
                 "request", "content", "kept", "pieces", "closing", "out", "held", "lingers_until")

    def __init__(self, server: Server, sock: socket.socket, peer: Any):
        self.server, self.sock, self.peer = server, sock, peer
        self.state = Connection.greet if server.tls else Connection.idle
        self.then = Connection.idle         # the state after flush; means nothing in another
        self.interest = 0                   # what the selector watches: READ, WRITE, or 0 before the first wait
        self.deadline = server.now + server.conn_timeout
        self.received, self.checked = b"", 0        # the next requests, or the beginning of one, checked so far
        self.request = self.content = self.pieces = None    # under way; decode_content() and content_pieces() of it
        self.kept = 0                       # bytes that decode_content() holds
        self.closing = False                # the connection ends with its response
        self.out = b""                      # what is to be sent; a view of the page only until `turn` returns
        self.held = 0                       # bytes counted against memory_budget
        self.lingers_until = math.inf       # then reading on after a refusal ends

    def turn(self) -> None:
        """Run states until one waits: the one place that knows "would block", and where refusals are answered."""
        wanted = None
        while True:
            try:
                while self.state(self):
                    pass
            except self.server.would_block as block:
                wanted = TLS_WANTS.get(type(block).__name__)
                self.keep_output()
            except HTTPError as refusal:
                self.refuse(refusal)
                continue
            except OSError as error:
                log.debug("%s: the connection is lost: %s", self.peer, error)
                if self.state is Connection.shake_hands:    # a reset would overtake the alert that says why
                    self.state = Connection.shut
                    continue
                self.close(cut=True)
            except BaseException as fault:
                self.close(cut=True)
                if not isinstance(fault, Exception):        # SystemExit or KeyboardInterrupt
                    raise
                log.exception("%s: a fault of the server itself", self.peer)
            break
        if self.interest != READ or self.state is not Connection.idle:
            self.wait_for(wanted)

    def wait_for(self, wanted: Optional[int]) -> None:
        """Have the selector watch for what the state waits for, unless TLS wants something else."""
        if wanted is None:
            wanted = WRITE if self.state is Connection.flush or self.state is Connection.stream else READ
        if self.interest != wanted and (self.interest < HANGUP or self.state is not Connection.suspended):
            self.server.watch(self, wanted)

    def greet(self) -> bool:
        """TLS: who does not begin with a handshake gets an answer that he can read."""
        first = raw_recv(self.sock, 1, socket.MSG_PEEK)
        if not first:
            return self.close()
        if first != TLS_HANDSHAKE:
            self.sock = socket.SocketType(self.sock.family, 1, 0, self.sock.detach())   # which sends in the clear
            self.sock.setblocking(False)
            raise HTTPError(400, "this is the HTTPS port, say https://")
        self.sock.begin_tls(self.server.tls)
        self.deadline = self.server.now + self.server.params.request_timeout
        self.state = Connection.shake_hands
        return True

    def shake_hands(self) -> bool:
        """TLS: the handshake, as far as it goes."""
        self.sock.tls.do_handshake()
        suite, version, _ = self.sock.tls.cipher()
        if version == "TLSv1.3" and suite not in self.server.plan.suites13:
            log.debug("%s: closed: %s is not in tls_ciphers, which OpenSSL cannot be told", self.peer, suite)
            return self.close(cut=True)
        self.deadline = self.server.now + self.server.conn_timeout
        self.state = Connection.idle
        return True

    def idle(self) -> bool:
        """Nothing of a request is here yet. If all that comes is a head that has been seen before, it is not parsed."""
        data = self.sock.recv(RECEIVE_SIZE)
        head = self.server.heads.get(data)
        if head is not None:
            return self.serve(head, None if head.waits else Request(self, head, b""))
        self.received = data
        return self.serve() if data else self.close()

    def receive_head(self) -> bool:
        data = self.receive()
        self.received += data
        return self.serve() if data else self.close()

    def receive(self) -> bytes:
        data = self.sock.recv(RECEIVE_SIZE)
        if not data and (self.content or self.received.strip(b"\r\n")):
            raise HTTPError(400, "the connection ended inside a request")
        return data

    def serve(self, head: Optional[Head] = None, request: Optional[Request] = None) -> bool:
        """The hot path: answer what has been received, request by request; answers to pipelined ones leave together.
        `head`: that of the first; `request`: the first, whose content has come."""
        page = self.server.page
        while True:
            if request is None:
                head = head or self.next_head()
                if head is None:
                    return self.wait_in(Connection.receive_head)
                request = self.begin_content(head) if head.waits else Request(self, head, b"")
                if request is None:
                    return self.state is Connection.flush
            connection = head.connection
            page._end, page._fields = HEADROOM, ()
            try:
                root = roots.get(head.root) or roots.get("")
                handler = root and root.handlers.get(head.method)
                if handler is None or pending_inits:
                    root, handler = find_root(head)
                request._root = root
                page._content_type = root.content_type
                status = handler(request, page)
                if status != 200 or page._end == HEADROOM:
                    if status == SUSPEND:
                        return self.suspend(request)
                    status = checked_status(status, page)
                    if page._end == HEADROOM and (root.flush or page.length) and status not in (204, 304):
                        return self.begin_stream(request, status)
            except KeyboardInterrupt:
                raise
            except BaseException as error:                  # SystemExit and CancelledError too: a client must not end it
                status, self.request = self.write_error(error, head), None
                if status in (400, 503):
                    connection = CLOSED
            self.respond(status, connection, head.method != "HEAD")
            if self.then is not Connection.serve or len(self.out) > RECEIVE_SIZE:
                return True
            data, request = self.received, None
            end = data.find(b"\r\n\r\n") + 4               # a pipelined one that has been seen before takes a short way
            head = self.server.heads.get(data[:end])
            if head is not None:
                self.received = data[end:]

    def next_head(self) -> Optional[Head]:
        """Take the next head out of what has been received; None: it is not whole."""
        data, server = self.received, self.server
        limit = server.params.max_header_size
        fresh = self.state is Connection.idle and data[-4:] == b"\r\n\r\n" and len(data) <= limit
        if fresh:       # if this is one head with a header section that has been seen before, its end is known
            line, _, block = data.partition(b"\r\n")
            fields = server.sections[block]
            if fields is not None:
                head = server.admit(data, line, block, fields)
                self.received = b""                         # not before: a refusal looks whether it answers HEAD
                return head
        start = EMPTY_LINES.match(data).end() if data[0] == 13 else 0
        end = data.find(b"\r\n\r\n", self.checked - 2 if self.checked else start) + 4
        if end < 4 or end - start > limit:
            self.checked = check_begin(data, self.checked, limit)
            return None
        raw = data[start:end]
        head = server.heads.get(raw)
        if head is None:
            if not fresh or len(raw) < len(data):
                line, _, block = raw.partition(b"\r\n")
                fields = server.sections[block]
            head = server.admit(raw, line, block, fields)
        self.received, self.checked = data[end:], 0
        return head

    def begin_content(self, head: Head) -> Optional[Request]:
        """The request with its content, if that is here; None: it is on its way. HTTPError refuses it before it is
        read; a short one is read in any case, to keep the connection."""
        server, (_, length, _, expect, form) = self.server, head.fields
        limit = server.params.post_buf_size if form else server.params.receive_buf_size
        root = roots.get(head.root) or roots.get("")
        upload = root and root.upload
        data = self.received
        if 0 < length <= len(data) and length <= limit and expect is None and not upload:
            self.received = data[length:]
            return Request(self, head, data[:length])
        self.request = request = Request(self, head, b"")
        try:
            request._root, handler = find_root(head)
            wanted, upload = expect is not None, handler is not answer_options and upload
        except HTTPError:
            if length and (expect is not None or not 0 < length <= limit):
                raise
            wanted, upload = False, None
        if wanted and expect != "100-continue":
            raise HTTPError(417, "no expectation but 100-continue is understood")
        if not length:
            self.request = None
            return request
        body = request.body = b"" if upload else bytearray()
        limit, write = (root.upload_limit, request._upload) if upload else (limit, body.extend)
        self.content = decode_content(length, limit, server.params.max_header_size, write)
        next(self.content)
        if wanted and not self.received:                    # RFC 9110, 10.1.1
            self.out = self.out or bytearray()
            self.out += CONTINUE
        return self.take_content(self.received)

    def receive_content(self) -> bool:
        request = self.take_content(self.receive())
        return self.state is Connection.flush if request is None else self.serve(request._head, request)

    def take_content(self, data: bytes) -> Optional[Request]:
        """The request, if its content is whole with this; None: more is to come. A second more for every 500 bytes."""
        server, request = self.server, self.request
        try:
            self.received = b""
            self.kept = self.content.send(data)
            self.wait_in(Connection.receive_content)
            longest = max(server.conn_timeout, server.params.request_timeout)
            self.deadline = min(self.deadline + len(data) / 500, server.now + longest)
            return None
        except StopIteration as end:
            self.received = end.value
        self.request, self.content, self.kept = None, None, 0
        request.body = bytes(request.body)
        return request

    def wait_in(self, state: Callable[[Connection], bool]) -> bool:
        """Wait for more of a request, but first send the answers to those before it."""
        self.count()
        if self.out:
            self.state, self.then = Connection.flush, state
            return True
        if self.state is not Connection.receive_head and self.state is not state:
            self.deadline = self.server.now + self.server.params.request_timeout
        self.state = state
        return False

    def respond(self, status: int, connection: str, with_content: bool) -> None:
        """Put the head before the content. The answers to pipelined requests are gathered."""
        server, page = self.server, self.server.page
        end = page._end
        if server.stopping:
            connection = CLOSED
        key = (status, page._content_type, end - HEADROOM, connection)
        head = server.response_heads.get(key) or server.response_head(*key)
        if page._fields:
            head = page.with_fields(head)
        if not with_content:
            end = HEADROOM
        start = HEADROOM - len(head)
        if self.received or self.out or start < 0:
            self.out = out = self.out or bytearray()        # it is one: what the socket did not take is gone before
            out += head
            out += page._view[HEADROOM:end]
        else:
            page._view[start:HEADROOM] = head
            self.out = page._view[start:end]
        server.requests += 1
        self.then = Connection.serve if self.received else Connection.idle
        if connection is CLOSED:                            # RFC 9112, 9.6: what follows is not processed
            more = self.received or self.state is Connection.suspended or len(self.out) > RECEIVE_SIZE
            self.then, self.received = Connection.shut if more else Connection.close, b""
        self.state = Connection.flush

    def begin_stream(self, request: Request, status: int) -> bool:
        """The content comes from flush_data_cb. Its first piece leaves with the head."""
        server, page, head, length = self.server, self.server.page, request._head, self.server.page.length
        if length is None:
            length = CHUNKED if head.version == "HTTP/1.1" else UNTIL_CLOSE
        self.closing = server.stopping or head.connection is CLOSED or length == UNTIL_CLOSE
        raw = server.response_head(status, page._content_type, length, CLOSED if self.closing else head.connection)
        raw = page.with_fields(raw)
        if head.method == "HEAD":
            pieces = (piece for piece in [raw])
        elif request._root.flush is None:
            raise ValueError("the handler has set Content-Length %d and written nothing" % length)
        else:
            pieces = content_pieces(request, page, raw, length, server.room())
        self.request = request
        self.count()
        first = next(pieces)                                # an exception is still answered, nothing has been sent
        self.out = self.out + first if self.out else first
        self.pieces = pieces
        self.state, self.then = Connection.flush, Connection.stream
        server.requests += 1
        return True

    def stream(self) -> bool:
        """The socket has taken the last piece of the content: the next is due."""
        try:
            piece = self.pieces.send(self.server.room())
        except StopIteration:
            self.request = self.pieces = None
            self.count()
            if self.closing or self.server.stopping:
                self.received, self.state = b"", Connection.shut
                return True
            self.deadline = self.server.now + self.server.conn_timeout
            self.state = Connection.serve if self.received else Connection.idle
            return self.state is Connection.serve
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            blame(error, self.request._head)
            self.close(cut=True)
            return False
        if piece is None:
            return self.suspend(self.request)
        self.out, self.state, self.then = piece, Connection.flush, Connection.stream
        return True

    def suspend(self, request: Request) -> bool:
        """Wait for request.resume(), as long as that takes; the answers to requests before it leave first."""
        self.request = request
        self.count()
        if self.out:
            self.state, self.then = Connection.flush, Connection.suspended
            return True
        self.state, self.deadline = Connection.suspended, math.inf
        if request._resumed:                                # it was too early for the loop to find it suspended
            self.server._resume(request)
        return False

    def suspended(self) -> bool:
        """A callback waits for resume(). An event of the socket means that more has come, which waits; or the end. A
        client that has gone looks like one that has only finished sending (RFC 9112, 9.6) and is to be answered. As
        long as nothing is sent, a 100 (Continue) tells, since the system of one that has gone objects."""
        request, interest = self.request, self.interest
        if request._resumed:
            request._resumed = False
            if self.pieces:
                self.state = Connection.stream
                return True
            self.request = None
            return self.serve(request._head, request)
        if interest == READ and raw_recv(self.sock, 1, socket.MSG_PEEK):
            self.server.watch(self, HANGUP)
        elif interest == RESET:
            self.close(cut=True)
        elif self.pieces or request._head.version == "HTTP/1.0":        # which nothing can be asked
            self.deadline = self.server.now + self.server.conn_timeout
            self.server.watch(self, RESET)
        else:
            self.out, self.state, self.then = CONTINUE, Connection.flush, Connection.suspended
            self.server.watch(self, RESET)
        return self.state is Connection.flush

    def write_error(self, error: Exception, head: Optional[Head]) -> int:
        """Put a line of text on the page for what a handler, or the way to it, has raised; returns the status."""
        page, error = self.server.page, blame(error, head)
        page.clear()
        page.content_type = "text/plain; charset=utf-8"
        for name, value in error.headers.items():
            page.set_header(name, value)
        line = SURROGATE.sub("\ufffd", "%d %s" % (error.status, error.reason))
        page.write(line.encode()[:255] + b"\n")             # the smallest buf_size holds it
        return error.status

    def refuse(self, refusal: HTTPError) -> None:
        """Answer what is no request, or one whose content is not read, and close; answers before it leave first."""
        log.debug("%s: refused: %s, %r", self.peer, refusal, self.received[:200])
        to_head = self.request.method == "HEAD" if self.request else re.match(rb"(?:\r\n){0,4}HEAD ", self.received)
        self.received, self.request, self.content, self.kept = b"", None, None, 0
        self.respond(self.write_error(refusal, None), CLOSED, not to_head)
        self.then = Connection.shut

    def flush(self) -> bool:
        """Send. Nothing is read or executed before all of it is gone."""
        server, out = self.server, self.out
        sent = self.sock.send(out)
        if sent < len(out):
            self.out = memoryview(out)[sent:]
            return True
        self.out = b""
        if self.held:
            self.count()
        self.state = then = self.then
        if then is Connection.idle or then is Connection.stream:
            self.deadline = server.now + server.conn_timeout
            return False                                    # a stream goes on when others have had their turn
        if then is Connection.suspended:
            return self.suspend(self.request)
        self.deadline = server.now + server.params.request_timeout
        return then is not Connection.receive_head and then is not Connection.receive_content

    def keep_output(self) -> None:
        """The socket takes no more: copy what is left out of the page, and count it."""
        try:
            if self.state is Connection.flush:
                if type(getattr(self.out, "obj", None)) is not bytes:
                    self.out = memoryview(bytes(self.out))
                self.deadline = self.server.now + self.server.conn_timeout
                self.count()
        except HTTPError:
            log.warning("%s: closed: memory_budget is used up, by responses that clients do not read", self.peer)
            self.close(cut=True)

    def count(self) -> None:
        """Count what this connection keeps between its turns; 503 if memory_budget has no room for it."""
        server, size = self.server, len(self.received) + self.kept + len(getattr(self.out, "obj", self.out))
        size += len(self.request.body) if self.request else 0
        more = size - self.held
        if more > 0 and server.held + more > server.params.held_size:
            raise HTTPError(503, "no memory is left for this request, see memory_budget", {"Retry-After": "1"})
        server.held += more
        self.held = size

    def say_goodbye(self) -> None:
        """TLS: send close_notify; an end without it might be an attacker's (RFC 8446, 6.1)."""
        tls = getattr(self.sock, "tls", None)
        try:
            tls and tls.shutdown()
        except (OSError, ValueError) as error:              # mostly SSLWantReadError; or the connection is lost
            if self.state is Connection.shut and TLS_WANTS.get(type(error).__name__) == WRITE:
                raise                                       # the socket is full: run `shut` again

    def shut(self) -> bool:
        """All is sent: say so, and wait until the client has read it."""
        self.say_goodbye()
        self.sock.shutdown(socket.SHUT_WR)
        self.lingers_until = self.server.now + LINGER_TIME
        self.deadline = self.server.now + LINGER_PAUSE
        self.state = Connection.linger
        return True

    def linger(self) -> bool:
        """Read on and discard, for some time: a reset would overtake the answer (RFC 9112, 9.6)."""
        if not raw_recv(self.sock, RECEIVE_SIZE):
            self.close()
        self.deadline = min(self.server.now + LINGER_PAUSE, self.lingers_until)
        return False

    def close(self, cut: bool = False) -> bool:
        """Give everything back at once. `cut`: in TLS, do not say that this is the end of what there is to send."""
        if self.state is not Connection.closed:
            if not cut:
                self.say_goodbye()
            if self.pieces and self.request._head.version == "HTTP/1.0":    # to which an orderly end is the whole
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")      # on, 0 s: a reset
            self.received, self.out, self.content, self.kept = b"", b"", None, 0
            self.request = self.pieces = None
            self.count()
            self.server.forget(self)
            self.sock.close()
            self.state = Connection.closed
        return False

    def closed(self) -> bool:
        """The socket is gone; an event of the same poll may still come."""
        return False

    def expire(self) -> None:
        """The deadline has passed: an idle connection is closed silently, an unfinished request is answered."""
        begun = self.state is Connection.receive_head and self.received.strip(b"\r\n")
        if begun or self.state is Connection.receive_content:
            self.refuse(HTTPError(408, "the request did not arrive in time, see request_timeout"))
        unsent, streaming = len(self.out), self.state is Connection.stream
        if streaming or self.state is Connection.flush:     # epoll is silent until a third of the buffer is free: try
            self.turn()
        if self.deadline <= self.server.now or len(self.out) == unsent and not streaming:
            log.debug("%s: closed after a time-out", self.peer)
            self.close(cut=bool(unsent))


SURROGATE = re.compile("[\ud800-\udfff]")               # such as json.loads() makes of "\\ud800": no text that can leave


def blame(error: BaseException, head: Optional[Head]) -> HTTPError:
    """What answers an exception of a callback: if it is no HTTPError that can be sent, the log has the traceback."""
    if isinstance(error, HTTPError):
        try:
            sound = HTTPError(error.status, str(error.reason), dict(error.headers))     # they may have been changed
            if 400 <= sound.status <= 599:
                return sound
        except (TypeError, ValueError) as wrong:
            error = wrong
    log.error("%s %r: a callback of root path %r failed", head.method, head.target, head.root, exc_info=error)
    return HTTPError(500, "the handler failed, the log of the server says why")


def checked_status(status: Any, page: Page) -> int:
    """What a handler has returned; where there may be no content, none is sent (RFC 9110, 15.3.5 and 15.4.5)."""
    if not isinstance(status, int) or not 200 <= status <= 599:
        raise TypeError("the handler returned %r, not a status of 200 to 599" % (status,))
    if status in (204, 304):
        page._end = HEADROOM
    return int(status)


# -------------------------------------------------------------------------------------------------------------- Server
ACCEPT_BATCH, EXPIRE_BATCH = 64, 100    # connections taken in, or closed as late, before others get their turn
SPARE_DESCRIPTORS, DEFER = 32, 1        # for the rest of the program; seconds that the kernel waits for a request
servers: set[Server] = set()    # those that listen


def listen(ip: str, port: int) -> socket.socket:
    """A listening socket; for the empty ip one for IPv6 and IPv4. OSError says which address it is about."""
    every = ip in ("", "*")
    family = socket.AF_INET6 if ":" in ip or every and socket.has_ipv6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)      # the accepted sockets inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
        listener.bind(("" if every else ip, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if every and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return listen("0.0.0.0", port)                  # a kernel without IPv6
        raise OSError(error.errno, "cannot listen on %s port %d: %s" % (ip or "*", port, error.strerror)) from None
    listener.setblocking(False)
    return listener


class Server:
    """A server with the parameters in force, keywords before what modparam() has set; ConfigError if they are wrong.

        server.run()                     serves in this thread until stop() is called
        with server: ...                 start() and stop(): serves in a thread of its own
        server.fileno(), run_once(0)     serves in another program's loop: when readable, and after timeout() seconds

    It listens from the first call of one of these, of port or url: OSError if it cannot. stop() and reload_tls() are
    for any thread.
    """
    __slots__ = ("params", "scheme", "socket_type", "would_block", "plan", "tls", "conn_timeout", "date",
                 "max_connections", "page", "heads", "sections", "lines", "response_heads", "connections", "held",
                 "requests", "accepted", "now", "stopping", "_stop_at", "_next_tick", "_evictable", "_selector",
                 "_poll", "_accepting", "_owner", "_serving", "_thread", "_initialized", "_ended", "_resumed", "_busy",
                 "_waking", "_woken", "_wake", "_listener", "_address")

    def __init__(self, **parameters: Any):
        self.params = values = httpd_in_force(**parameters)
        self.scheme, self.socket_type, self.plan, self.tls = "http", socket.SocketType, None, None
        self.would_block: tuple = (BlockingIOError,)        # what a socket raises that has to be waited for
        if values.tls:
            self._set_up_tls()
        self.conn_timeout = values.conn_timeout or 1e9      # for ever: 30 years
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_connections = values.max_connections or max(16, descriptors - SPARE_DESCRIPTORS)
        self.page = Page(values.buf_size)
        self.heads = Memo(values.memo_size // 2)            # whole heads; and where only the request line is new,
        self.sections = Memo(values.memo_size // 4)         # the header section below it; and where a field is new,
        self.lines = FieldLines(values.memo_size // 4)      # the others
        self.response_heads: dict[tuple, bytes] = {}        # of this second
        self.connections: set[Connection] = set()
        self.held = self.requests = self.accepted = 0       # bytes that connections keep between their turns; so far
        self.now = time.monotonic()                         # when this turn began
        self.stopping = False                               # every answer closes its connection
        self._stop_at, self._next_tick = math.inf, 0.0      # when the grace of stop() ends; when to look at deadlines
        self._evictable: list[tuple[float, Connection]] = []
        self._selector = self._poll = None                  # while it listens
        self._accepting = False                             # the selector watches the listener
        self._owner = self._serving = None                  # the thread that calls run(); the same while it is in there
        self._thread, self._initialized, self._ended = None, False, threading.Event()
        self._resumed: deque[Request] = deque()             # requests whose resume() has been called
        self._busy = self._waking = False                   # it will look at them without being woken; it has been

    def run(self) -> None:
        """Serve in this thread until stop() is called."""
        if self._serving is not None:
            raise RuntimeError("the server runs already")
        if not self._ended.is_set():
            self._open()
            self._serve(threading.Event())

    def start(self) -> None:
        """Serve in a thread of its own. Returns when the init_proc_cb's have run; RuntimeError if one has failed."""
        if self._serving is not None or self._thread or self._ended.is_set():
            raise RuntimeError("a server starts only once: make a new one")
        self._open()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="httpd", daemon=True)
        self._thread.start()
        ready.wait()
        if not self._initialized:
            raise RuntimeError("an init_proc_cb failed, see the traceback")

    def stop(self, grace: Optional[float] = None) -> None:
        """Stop listening, let requests under way finish for at most `grace` seconds (None: grace_timeout), close. From
        a handler it returns at once, else when that is done. It may be repeated; the shortest grace counts."""
        grace = self.params.grace_timeout if grace is None else grace
        self._stop_at = min(self._stop_at, time.monotonic() + grace)
        me, listening = threading.get_ident(), self._selector and not self._wake_up()
        if not listening:                                   # it never has, or it has ended
            self._ended.set()
        elif self._thread and self._thread.ident != me:
            self._thread.join()
        elif self._owner not in (None, me):                 # the loop is another thread's: it has until the grace ends
            if not self._ended.wait(grace + 1):
                self._close()
        elif self._serving is None:
            self._serve(threading.Event())

    def _set_up_tls(self) -> None:
        import ssl                                          # 8 ms that a plain server need not pay
        plan = tls_priority(self.params.tls_ciphers)
        if not self.tls and plan.notes:
            skipped = any("skipped" in note for note in plan.notes)
            log.log(logging.WARNING if skipped else logging.INFO, "tls_ciphers: %s", "; ".join(plan.notes))
        self.plan = plan
        self.tls = tls_context(plan, self.params.tls_cert_file, self.params.tls_key_file, self.params.tls_ca_file)
        self.scheme, self.socket_type = "https", TLSSocket
        self.would_block = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

    def reload_tls(self) -> bool:
        """Have connections from now on use the certificate, key and CA that are in the files now. Any thread. False if
        that cannot be: the log says why, and what was in use stays in use."""
        try:
            if not self.tls:
                log.warning("there is nothing to reload: tls_cert_file and tls_key_file are not set")
                return False
            self._set_up_tls()
            log.info("%s has been loaded anew", self.params.tls_cert_file)
            return True
        except ConfigError as error:
            log.error("the certificate is not loaded anew: %s", error)
            return False

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def run_once(self, timeout: Optional[float] = None) -> None:
        """Wait until there is something to do, or `timeout` seconds, and do it. After stop() it does nothing."""
        if self._ended.is_set():
            return
        self._open()
        self._owner = self._serving = threading.get_ident()
        due = self.timeout()
        try:
            self._turn(due if timeout is None else timeout if due is None else min(timeout, due))
        finally:
            self._serving = None
        if self._drained():
            self._close()

    def fileno(self) -> int:
        """The descriptor for another loop to watch for reading; -1 after stop()."""
        self._open()
        return self._selector.fileno() if self._selector else -1

    def timeout(self) -> Optional[float]:
        """Seconds until run_once() has something to do even if nothing is readable; None: there is no such time."""
        if self._ended.is_set() or self._accepting and not self.connections:
            return None
        return max(0.0, self._next_tick - time.monotonic())

    @property
    def port(self) -> int:
        self._open()
        return self._address[1]

    @property
    def url(self) -> str:
        """Where a client on this machine finds it: http://127.0.0.1:8888, without a slash at the end."""
        self._open()
        host, port = self._address
        host = "127.0.0.1" if host in ("::", "0.0.0.0") else "[%s]" % host if ":" in host else host
        return "%s://%s:%d" % (self.scheme, host, port)

    def _open(self) -> None:
        with init_lock:                                     # the first call may come from two threads
            if self._selector or self._ended.is_set():
                return
            self._woken, self._wake = socket.socketpair()
            self._wake.setblocking(False)
            selector = selectors.EpollSelector()
            selector.register(self._woken, READ, self._woken_up)
            self._listener = listen(self.params.ip, self.params.port)
            self._address = self._listener.getsockname()[:2]
            self._selector, self._poll = selector, select.epoll.fromfd(os.dup(selector.fileno()))
            self._set_accepting(True)
            servers.add(self)

    def _serve(self, ready: threading.Event) -> None:
        self._owner = self._serving = threading.get_ident()
        try:
            if self._stop_at == math.inf:
                initialize(late=False)
            self._initialized = True
            ready.set()
            while not self._drained():
                self._turn(self.timeout())
        finally:
            self._close()
            ready.set()

    def _turn(self, timeout: Optional[float]) -> None:
        """One poll, and a turn for all that is ready."""
        ready = self._selector.select(timeout)
        self.now = time.monotonic()
        if self.now >= self._next_tick:
            self.date = formatdate(usegmt=True)
            self.response_heads.clear()
        self._busy = True
        try:
            for key, _ in ready:
                key.data()
            if self._resumed:
                self._continue()
            if self.now >= self._next_tick:                 # after them: who has sent something is not late
                self._tick()
        finally:
            self._busy = False
            if self._resumed:                               # meanwhile; the next turn is theirs
                self._wake_up()

    def _resume(self, request: Request) -> None:
        self._resumed.append(request)
        if not self._busy:
            self._wake_up()

    def _continue(self) -> None:
        for _ in range(len(self._resumed)):
            request = self._resumed.popleft()
            connection = request._connection
            if request._resumed and connection.request is request and connection.state is Connection.suspended:
                connection.turn()

    def _wake_up(self) -> None:
        """Have the loop come back from its poll, this one or another program's. Any thread."""
        if not self._waking:
            self._waking = True
            with suppress(OSError):                         # it has ended
                self._wake.send(b"!")

    def _woken_up(self) -> None:
        self._woken.recv(64)
        self._waking = False                                # before what was noted meanwhile is looked at
        if self._stop_at < math.inf and not self.stopping:
            self._begin_stop()

    def _tick(self) -> None:
        """Once a second: an end to what is over its deadline."""
        self._next_tick = min(self.now + 1, max(self._stop_at, self.now + 0.01))
        late = [connection for connection in self.connections if connection.deadline <= self.now]
        for connection in late[:EXPIRE_BATCH]:
            connection.expire()
        if len(late) > EXPIRE_BATCH:                        # a pause of 1 ms, then others have a turn
            self._next_tick = self.now
        self._set_accepting(not self.stopping)

    def _set_accepting(self, wanted: bool) -> None:
        """Watch the listener, or leave it alone for a while."""
        if wanted != self._accepting:
            self._accepting = wanted
            if wanted:
                self._selector.register(self._listener, READ, self._accept)
            else:
                self._selector.unregister(self._listener)

    def _accept(self) -> None:
        """Take in those who wait, and answer at once who has sent a request already."""
        family = int(self._listener.family)
        for _ in range(ACCEPT_BATCH):
            try:                                            # what accept() does, without its layer of Python
                descriptor, peer = self._listener._accept()
                sock = self.socket_type(family, 1, 0, descriptor)
            except OSError as error:                        # mostly BlockingIOError: nobody waits any more
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM) and not self._make_room():
                    log.error("nobody is taken in for a second: %s", error)
                    self._set_accepting(False)              # the listener would be readable all the time
                return
            sock.setblocking(False)
            self.accepted += 1
            connection, before = Connection(self, sock, peer), self.requests
            room = len(self.connections) < self.max_connections or self._make_room()
            self.connections.add(connection)
            if not room and not self.tls:
                connection.refuse(HTTPError(503, "too many connections, see max_connections", {"Retry-After": "1"}))
            connection.turn() if room or not self.tls else connection.close()
            if self.requests == before and connection.state in (Connection.idle, Connection.greet):
                connection.deadline -= DEFER                # it has been silent for so long already

    def _make_room(self) -> bool:
        """Close the connection that has been idle longest, or else the one that has been sending a request longest."""
        rank = {Connection.linger: 0, Connection.greet: 1, Connection.idle: 1, Connection.shake_hands: 2,
                Connection.receive_head: 2, Connection.receive_content: 2}
        for looked in (False, True):
            while self._evictable:
                deadline, connection = self._evictable.pop()
                if connection.deadline == deadline and connection.state in rank:
                    connection.close()
                    return True
            if not looked:                                  # one look at all of them serves for the next 64
                found = sorted((rank[c.state], c.deadline, id(c), c) for c in self.connections if c.state in rank)
                self._evictable = [(deadline, connection) for _, deadline, _, connection in found[63::-1]]
        return False

    def _begin_stop(self) -> None:
        """What stop() asks for, in the thread that serves."""
        self.stopping, self._next_tick = True, self.now
        self._set_accepting(False)
        self._listener.close()
        for connection in list(self.connections):
            if connection.state in (Connection.idle, Connection.greet, Connection.shake_hands):
                connection.close()
            elif connection.then is Connection.idle:        # the response is on its way
                connection.then = Connection.close

    def _drained(self) -> bool:
        """stop() has been called; nothing is under way any more, or the grace is over."""
        return self.stopping and (time.monotonic() >= self._stop_at
                                  or all(connection.state is Connection.linger for connection in self.connections))

    def _close(self) -> None:
        self.stopping = True                                # nobody is taken in for those that go
        self._set_accepting(False)
        if self._selector is None:
            return
        for connection in list(self.connections):
            connection.close()
        for closable in (self._listener, self._woken, self._wake, self._selector, self._poll):
            closable.close()
        self._selector = self._serving = None
        servers.discard(self)
        self._ended.set()

    def admit(self, raw: bytes, line: bytes, block: bytes, fields: Optional[Fields]) -> Head:
        """Have a head parsed, that comes whole and in two parts; `fields` if the second is known. It is remembered."""
        if raw in self.heads.old:
            return self.heads[raw]
        head = parse_head(line, block, fields, self.lines, known_methods)
        if head.scheme not in ("", self.scheme):
            raise HTTPError(421, "%s is not served here" % head.scheme)
        if head.fields.expect is None:
            if fields is None and head.version != "HTTP/1.0":
                self.sections.keep(block, head.fields)
            else:
                self.heads.keep(raw, head)
        return head

    def response_head(self, status: int, content_type: str, size: int, connection: str) -> bytes:
        """Status line and fields; the same for the rest of this second. `size`: or CHUNKED, UNTIL_CLOSE."""
        fields = "Date: %s\r\n%s" % (self.date, connection)
        if status not in (204, 304):
            framing = {CHUNKED: "Transfer-Encoding: chunked\r\n", UNTIL_CLOSE: ""}
            fields += "Content-Type: %s\r\n" % content_type if content_type else ""
            fields += framing.get(size, "Content-Length: %d\r\n" % size)
        head = ("HTTP/1.1 %d %s\r\n%s\r\n" % (status, REASONS.get(status, ""), fields)).encode("latin-1")
        if len(self.response_heads) > 255:
            self.response_heads.clear()
        self.response_heads[status, content_type, size, connection] = head
        return head

    def room(self) -> int:
        """For a piece of a stream: less if clients do not read much; at least what a writable socket takes whole."""
        return min(self.params.buf_size, max(512, (self.params.held_size - self.held) // 8))

    def watch(self, connection: Connection, wanted: int) -> None:
        """Have the selector wait for what the connection waits for."""
        if connection.state is not Connection.closed:
            if wanted < HANGUP <= connection.interest:
                self._selector.unregister(connection.sock)
                connection.interest = 0
            change = self._selector.modify if connection.interest else self._selector.register
            try:
                if wanted >= HANGUP:                        # which selectors do not know
                    self._poll.modify(connection.sock.fileno(), select.EPOLLRDHUP if wanted == HANGUP else 0)
                else:
                    change(connection.sock, wanted, connection.turn)
                connection.interest = wanted
            except OSError as error:                        # the system's limit of watches
                log.error("%s: closed: %s", connection.peer, error)
                connection.close()

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if connection.interest and self._selector:          # else _close() has been faster
            self._selector.unregister(connection.sock)
        self._set_accepting(not self.stopping)


# ----------------------------------------------------------------------------------------------------------------- TLS
# What a priority string comes to on Python's ssl: of "TLSv1.2" and "TLSv1.3"; TLS 1.2 suites, the best first, by
# OpenSSL's names; TLS 1.3 suites, by IANA's; groups, by GnuTLS', without GROUP-; two bools; what is not as written.
TLSPlan = namedtuple("TLSPlan", "versions ciphers suites13 groups server_preference tickets notes")


NORMAL = {                              # the ordered sets that a priority string works on, as the level NORMAL has them
    "VERS": "TLS1.3 TLS1.2 TLS1.1 TLS1.0", "MAC": "SHA1 AEAD", "KX": "ECDHE-ECDSA ECDHE-RSA RSA DHE-RSA",
    "CIPHER": "AES-256-GCM CHACHA20-POLY1305 AES-256-CCM AES-256-CBC AES-128-GCM AES-128-CCM AES-128-CBC",
    "SIGN": "RSA-SHA256 RSA-PSS-SHA256 RSA-PSS-RSAE-SHA256 ECDSA-SHA256 ECDSA-SECP256R1-SHA256 EDDSA-ED25519 "
            "RSA-SHA384 RSA-PSS-SHA384 RSA-PSS-RSAE-SHA384 ECDSA-SHA384 ECDSA-SECP384R1-SHA384 EDDSA-ED448 "
            "RSA-SHA512 RSA-PSS-SHA512 RSA-PSS-RSAE-SHA512 ECDSA-SHA512 ECDSA-SECP521R1-SHA512 RSA-SHA1 ECDSA-SHA1",
    "GROUP": "SECP256R1 SECP384R1 SECP521R1 X25519 X448 FFDHE2048 FFDHE3072 FFDHE4096 FFDHE6144 FFDHE8192",
}
LEVELS = {                              # what each has instead, but for the signatures: Python's ssl cannot set them
    "NORMAL": {}, "LEGACY": {}, "PFS": {"KX": "ECDHE-ECDSA ECDHE-RSA DHE-RSA"}, "PERFORMANCE": {
        "KX": "RSA ECDHE-ECDSA ECDHE-RSA DHE-RSA",
        "CIPHER": "AES-128-GCM AES-256-GCM CHACHA20-POLY1305 AES-128-CCM AES-256-CCM AES-128-CBC AES-256-CBC"},
    "SECURE": {"CIPHER": "AES-256-GCM CHACHA20-POLY1305 AES-256-CBC AES-256-CCM AES-128-GCM AES-128-CBC AES-128-CCM"},
    "SECURE192": {"CIPHER": "AES-256-GCM CHACHA20-POLY1305 AES-256-CBC AES-256-CCM", "MAC": "AEAD",
                  "GROUP": "SECP384R1 SECP521R1 FFDHE8192"},
    "SUITEB192": {"VERS": "TLS1.2", "CIPHER": "AES-256-GCM", "MAC": "AEAD", "KX": "ECDHE-ECDSA", "GROUP": "SECP384R1"},
}
LEVELS.update(SECURE128=LEVELS["SECURE"], SECURE256=LEVELS["SECURE192"], SUITEB128={
    **LEVELS["SUITEB192"], "CIPHER": "AES-256-GCM AES-128-GCM", "GROUP": "SECP256R1 SECP384R1"})
SUITES = (                              # key exchange unless RSA, cipher, MAC: OpenSSL's name, if there is such a suite
    (r"(ECDHE-.+-|)AES-256-GCM AEAD", r"\1AES256-GCM-SHA384"),
    (r"(ECDHE-.+-|)AES-128-GCM AEAD", r"\1AES128-GCM-SHA256"),
    (r"(ECDHE-.+-)CHACHA20-POLY1305 AEAD", r"\1CHACHA20-POLY1305"),
    (r"(ECDHE-ECDSA-|)AES-(128|256)-CCM-?(8?) AEAD", r"\1AES\2-CCM\3"),
    (r"(ECDHE-.+-|)AES-(128|256)-CBC SHA1", r"\1AES\2-SHA"),
    (r"(ECDHE-.+-(?=AES-128)|)AES-(128|256)-CBC SHA256", r"\1AES\2-SHA256"),
    (r"(ECDHE-.+-)AES-256-CBC SHA384", r"\1AES256-SHA384"),
)
SUITES13 = {"AES-256-GCM": "TLS_AES_256_GCM_SHA384", "CHACHA20-POLY1305": "TLS_CHACHA20_POLY1305_SHA256",
            "AES-128-GCM": "TLS_AES_128_GCM_SHA256"}    # in OpenSSL's order
CURVES = dict(SECP256R1="prime256v1", SECP384R1="secp384r1", SECP521R1="secp521r1", X25519="X25519", X448="X448")
KEYWORDS = {                            # keyword: the set that it changes, and what it adds or removes there
    **{kind + "-ALL": (kind, names.split()) for kind, names in NORMAL.items()},
    **{name if kind in ("CIPHER", "MAC", "KX") else kind + "-" + name: (kind, [name])
       for kind, names in (*NORMAL.items(), ("CIPHER", "AES-256-CCM-8 AES-128-CCM-8"), ("MAC", "SHA256 SHA384"))
       for name in names.split()},
    "VERS-TLS-ALL": ("VERS", NORMAL["VERS"].split()), "GROUP-EC-ALL": ("GROUP", list(CURVES)),
    "GROUP-DH-ALL": ("GROUP", NORMAL["GROUP"].split()[len(CURVES):])}
REFUSED = "NULL|RSA-EXPORT|ARCFOUR-40|RC2-40|((EC)?DHE-|RSA-)?PSK|SRP(-RSA|-DSS)?|ANON-(EC)?DH"
SKIPPED = REFUSED + r"""| VERS-(SSL3\.0|DTLS(0\.9|1\.[02]|-ALL)) | DHE-DSS | MD5 | SHA(224|512)
    | (3DES|DES|AES-192|CAMELLIA-(128|192|256))-CBC | (AES-192|CAMELLIA-(128|256))-GCM | GROUP-(SECP(192|224)R1|GC.+)
    | ARCFOUR-128 | SIGN-((RSA|DSA|ECDSA)-SHA(3-)?(1|224|256|384|512) | RSA-(RAW|RMD160|MD[25])) | .*GOST.*
    | COMP-.* | CTYPE-((CLI-|SRV-)?(ALL|X\.?509|RAWPK) | OPENPGP)"""
OPTIONS = (                             # none for more than PROFILE_MEDIUM, which is OpenSSL's security level 2
    "SERVER_PRECEDENCE|NO_(TICKETS(_TLS12)?|EXTENSIONS|ETM|SESSION_HASH)|((UN|DISABLE_)?SAFE|PARTIAL)_RENEGOTIATION|"
    "COMPAT|NEW_PADDING|STATELESS_COMPRESSION|(LATEST|SSL3)_RECORD_VERSION|ALLOW_SMALL_RECORDS|FALLBACK_SCSV|DUMBFW|"
    "DISABLE_(WILDCARDS|TLS13_COMPAT_MODE)|DEBUG_ALLOW_KEY_USAGE_VIOLATIONS|PROFILE_(VERY_WEAK|LOW|LEGACY|MEDIUM)|"
    "VERIFY_(ALLOW_(BROKEN|SIGN_RSA_MD5|SIGN_WITH_SHA1|X509_V1_CA_CRT)|DISABLE_CRL_CHECKS)")
EXAMPLE = "for example NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"


def _read_item(sets, sign, word, replace):
    """Have an item change the sets. Returns what there is to note; ConfigError says what is wrong."""
    if sign in ("", "+") and word in LEVELS:
        for kind, names in {**NORMAL, "VERS": "", **LEVELS[word]}.items():
            kept = {} if replace and names and not sign else sets[kind]
            sets[kind] = {**kept, **dict.fromkeys(names.split())}
    elif sign in ("+", "-") and word in KEYWORDS:
        kind, names = KEYWORDS[word]
        others = {} if word == kind + "-ALL" else {name: None for name in sets[kind] if name not in names}
        sets[kind] = {**sets[kind], **dict.fromkeys(names)} if sign == "+" else others
    elif sign == "%":
        if not re.fullmatch(OPTIONS, word):
            raise ConfigError("is unknown, or cannot be enforced with Python's ssl: leave it out")
    elif sign == "+" and re.fullmatch(REFUSED, word):
        raise ConfigError("is refused: connections need encryption and a certificate")
    elif sign in ("+", "-") and re.fullmatch(SKIPPED, word, re.VERBOSE):
        noted = sign == "+" and not word.startswith(("COMP-", "CTYPE-"))
        return "skipped, Python's ssl has nothing of the kind" if noted else ""
    elif sign in ("+", "-") and word.startswith(("CIPHER-", "MAC-", "KX-")):
        return "ignored, as by GnuTLS" + nearest(word.partition("-")[2], KEYWORDS)
    elif sign == "@" and not word.startswith(("SECLEVEL", "STRENGTH")):
        raise ConfigError("there is no system priority file here: write the string itself, " + EXAMPLE)
    elif not sign and (not word or word in KEYWORDS or word == "NONE"):
        raise ConfigError("needs + or -, or to be first" if word else 'is empty: fill it in or take out a ":"')
    else:
        hint = nearest(word, KEYWORDS if sign else LEVELS)
        raise ConfigError("is unknown" + (hint or "; if it is OpenSSL's language, write it in GnuTLS', " + EXAMPLE))
    return ""


def _read_priority(text):
    """The sets, in dicts for the order, as GnuTLS reads the string; all words; the notes."""
    items = [item.lstrip(" ") for item in text.lstrip().split(":")]
    none = items[0].upper() == "NONE"
    sets = {kind: dict.fromkeys(names.split() if kind in ("VERS", "SIGN", "GROUP") and not none else ())
            for kind, names in NORMAL.items()}
    replace, words, notes = not none, set(), []
    for number, item in enumerate(items, 1):
        sign, word = re.fullmatch("([-+!%@]?)(.*)", item, re.DOTALL).groups()
        sign, word = sign.replace("!", "-"), word if sign == "%" else re.sub("^CURVE-", "GROUP-", word.upper())
        try:
            note = _read_item(sets, sign, word, replace) if number > 1 or not none else ""
        except ConfigError as error:
            raise ConfigError('tls_ciphers item %d, "%s": %s' % (number, item, error)) from None
        replace = replace and (bool(sign) or word not in LEVELS)        # only the first level without a sign does
        words.add(word)
        notes += ['item %d, "%s": %s' % (number, item, note)] if note else []
    return sets, words, notes


def _resolve(sets, words):
    """GnuTLS' rules: the protocols, and the suites of TLS 1.2 (OpenSSL's names, no DHE) and 1.3 that Python has."""
    protocols = [name for name in sets["VERS"] if sets["SIGN"] or name < "TLS1.2"]
    gap = "TLS1.2" not in protocols and ("TLS1.1" in protocols or "TLS1.0" in protocols)
    if gap or not sets["GROUP"] or "NO_EXTENSIONS" in words:
        protocols = [name for name in protocols if name != "TLS1.3"]
    triples = ["%s%s %s" % ((exchange + "-") * (exchange != "RSA"), cipher, mac)
               for exchange in sets["KX"] for cipher in sets["CIPHER"] for mac in sets["MAC"]]
    suites = [re.sub(pattern, name, triple) for triple in triples
              for pattern, name in SUITES if re.fullmatch(pattern, triple)]
    suites13 = [SUITES13[name] for name in sets["CIPHER"] if name in SUITES13 and "AEAD" in sets["MAC"]]
    return protocols, {"TLSv1.2": suites * ("TLS1.2" in protocols), "TLSv1.3": suites13 * ("TLS1.3" in protocols)}


def _curves(versions, groups):
    """The groups to be set, by OpenSSL's names; none if its default is right, where FFDHE is for TLS 1.3 only."""
    default = {name for name in NORMAL["GROUP"].split() if name in CURVES or "TLSv1.3" in versions}
    return [] if default <= set(groups) else [CURVES[name] for name in groups if name in CURVES]


def tls_priority(text: str) -> TLSPlan:
    """Read a GnuTLS priority string as `gnutls-cli -l --priority` 3.7.9 does; finite-field DHE is never offered.
    ConfigError: a mistake, nothing left, or a restriction that Python's ssl cannot enforce."""
    sets, words, notes = _read_priority(text)
    protocols, suites = _resolve(sets, words)
    curves = [name for name in sets["GROUP"] if name in CURVES]
    if not curves:
        suites = {"TLSv1.2": [name for name in suites["TLSv1.2"] if not name.startswith("ECDHE-")], "TLSv1.3": []}
    versions = [version for version in suites if suites[version]]
    if not versions:
        raise ConfigError("tls_ciphers: leaves nothing of TLS 1.2 and 1.3 that Python's ssl could offer, " + EXAMPLE)
    partial = 0 < len(suites["TLSv1.3"]) < len(SUITES13)        # is enforceable, if it is what OpenSSL would prefer:
    if set(suites["TLSv1.3"]) != set(list(SUITES13.values())[:len(suites["TLSv1.3"])]):
        raise ConfigError("tls_ciphers: Python's ssl cannot offer only %s for TLS 1.3: enable %s, or write -VERS-TLS1.3"
                          % (" and ".join(suites["TLSv1.3"]), ", ".join(SUITES13)))
    notes += ["%s: skipped, too old or no suite left" % name for name in protocols if "TLSv" + name[3:] not in versions]
    if re.search(r"\b(SIGN-(?!ALL)|SECURE192|SECURE256|SUITEB)", " ".join(words)):
        notes.append("signatures: as OpenSSL likes, Python's ssl cannot restrict them")
    if len(_curves(versions, sets["GROUP"])) > 1:
        notes.append("groups: before Python 3.15, which can set several, only %s" % curves[0])
    return TLSPlan(tuple(versions), tuple(suites["TLSv1.2"]), tuple(suites["TLSv1.3"]), tuple(sets["GROUP"]),
                   partial or "SERVER_PRECEDENCE" in words, not words & {"PFS", "NO_TICKETS", "NO_TICKETS_TLS12"},
                   tuple(notes))


PARTIAL_CHAIN = 0x80000                 # ssl.VERIFY_X509_PARTIAL_CHAIN, which has a name from Python 3.10 on
HINTS = {                               # OpenSSL's reason: what it means here
    **dict.fromkeys(("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"), "the key does not belong to the certificate"),
    "EE_KEY_TOO_SMALL": "the key is too weak: make one of RSA with 2048 bits, or of ECDSA with P-256",
    "NO_SHARED_CIPHER": "no client could connect: tls_ciphers has no suite for the certificate's type of key",
    "UNKNOWN_GROUP": "Python before 3.11 cannot set X25519 and X448: put another group first",
}


def tls_context(plan: TLSPlan, cert_file: str, key_file: str, ca_file: str = "") -> Any:
    """An ssl.SSLContext for the plan, less what OpenSSL's security level hides; `ca_file`: clients need certificates.
    ConfigError: a file that will not do, or no client could connect. Warns of an open key, an expired certificate."""
    import ssl                              # here, since plain HTTP shall not pay for it
    subject, context = "tls_ciphers", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion[plan.versions[0].replace(".", "_")]
    context.maximum_version = ssl.TLSVersion[plan.versions[-1].replace(".", "_")]
    context.options |= ssl.OP_NO_COMPRESSION | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if not plan.server_preference:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if not plan.tickets:                    # with OP_NO_TICKET alone, TLS 1.3 sends handles of state that it keeps
        context.options, context.num_tickets = context.options | ssl.OP_NO_TICKET, 0
    context.set_alpn_protocols(["http/1.1"])
    curves = _curves(plan.versions, plan.groups)
    try:
        if plan.ciphers:
            context.set_ciphers(":".join(plan.ciphers))     # names, never a string that OpenSSL would interpret
        if len(curves) > 1 and hasattr(context, "set_groups"):
            context.set_groups(":".join(curves))
        elif curves:
            context.set_ecdh_curve(curves[0])
        _check_pem("tls_cert_file", cert_file, b"CERTIFICATE")
        _check_pem("tls_key_file", key_file, b"PRIVATE KEY")
        subject = "tls_cert_file %s with tls_key_file %s" % (cert_file, key_file)
        context.load_cert_chain(cert_file, key_file, password="")       # without one, OpenSSL would ask the terminal
        _try_handshake(context, cert_file)
        if ca_file:
            subject = "tls_ca_file %s" % ca_file
            _check_pem("tls_ca_file", ca_file, b"CERTIFICATE")
            context.load_verify_locations(ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= PARTIAL_CHAIN           # an intermediate CA will do
    except OSError as error:                                # SSLError, or a file has gone since _check_pem()
        hint = HINTS.get(getattr(error, "reason", None), "damaged? OpenSSL says %s" % error)
        raise ConfigError("%s: %s" % (subject, hint)) from None
    return context


def _check_pem(parameter, path, kind):
    """load_cert_chain() does not say which file it dislikes."""
    try:
        with open(path, "rb") as file:
            content, mode = file.read(), os.fstat(file.fileno()).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("%s: %s cannot be read: %s" % (parameter, path, reason)) from None
    if not re.search(b"-----BEGIN [A-Z0-9 ]*%s-----" % kind, content):
        raise ConfigError("%s: %s has no BEGIN %s: is it the right file, in PEM?" % (parameter, path, kind.decode()))
    if kind == b"PRIVATE KEY" and re.search(b"BEGIN ENCRYPTED|Proc-Type: 4,ENCRYPTED", content):
        raise ConfigError("%s: %s is encrypted: remove the password with `openssl pkey`" % (parameter, path))
    if kind == b"PRIVATE KEY" and mode & 0o004:
        log.warning("%s: %s can be read by everybody: chmod o-r", parameter, path)


def _try_handshake(context, cert_file):
    """Have a client that takes all suites begin a handshake, until it has checked the certificate."""
    import ssl
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= PARTIAL_CHAIN
    client.load_verify_locations(cert_file)
    client.set_ciphers("ALL:@SECLEVEL=0")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking, answering = client.wrap_bio(down, up), context.wrap_bio(up, down, server_side=True)
    try:
        for end in asking, answering, asking:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        log.warning("tls_cert_file: %s: clients will refuse it: %s", cert_file, error.verify_message)


# ------------------------------------------------------------------------------------------------------------- mi_http
# OpenSIPS' management interface: JSON-RPC 2.0 by POST, and the commands that every server has.

class Pool:
    """A few threads for what takes long. They start when there is work, and do not keep the program from ending."""
    def __init__(self, size: int):
        self.size, self.started, self.jobs = size, 0, queue.SimpleQueue()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a thread do it. It sees to its own exceptions."""
        self.jobs.put(job)
        if self.started < self.size:
            self.started += 1
            threading.Thread(target=self._work, name="httpd-pool", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.jobs.get()()


PENDING, MI_WAITING = object(), 1000        # the place of an answer that a thread is to bring; so many of them wait
mi_commands: dict[str, tuple[Callable, bool]] = {}          # name -> the function; it wants a thread
encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
json_decoder = json.JSONDecoder(parse_constant=int)         # NaN and Infinity are no JSON: int() raises ValueError
_INT = "-?(0|[1-9][0-9]{0,17})"
NUMBERS = {**dict.fromkeys((int, "int"), _INT), **dict.fromkeys((float, "float"), _INT + "([.][0-9]{1,17})?")}
STARTED = time.time()


def decode_json(text: str) -> Any:
    """One value and nothing else; ValueError. Most clients send no blanks around it: that is half the price."""
    if text[:1] == "{" and text[-1:] == "}":
        value, end = json_decoder.raw_decode(text)
        if end == len(text):
            return value
    return json_decoder.decode(text)


def register_mi(name: str, function: Callable, *, threads: bool = False) -> None:
    """Add an MI command: a function that returns what JSON can say. Its signature is the command's parameter list; text
    for a parameter annotated int or float becomes a number. HTTPError(404, "no such dialog") is an error of its own.
    With threads=True it runs in one of the few threads of mi_http, else in the server's, and nobody else is served
    meanwhile. ConfigError: the name is taken. Any thread."""
    if name in mi_commands or not re.fullmatch("[A-Za-z0-9_.:-]+", name):
        raise ConfigError('MI command "%s": the name is taken, or not made of letters, digits and _.:-' % name)
    mi_commands[name] = function, threads


mi_pool = cache(lambda: Pool(in_force("mi_http")["threads"]))
mi_signature = cache(lambda function: import_module("inspect").signature(function))     # which takes 10 ms to import
needs_nothing = cache(lambda call: all(p.default is not p.empty for p in mi_signature(call).parameters.values()))


def bind_parameters(function: Callable, given: Any) -> Callable[[], Any]:
    """The command with its parameters; TypeError if they are not what its signature says."""
    if not given and needs_nothing(function):
        return function
    bound = mi_signature(function).bind(*given) if isinstance(given, list) else mi_signature(function).bind(**given)
    for name, value in bound.arguments.items():
        pattern = NUMBERS.get(bound.signature.parameters[name].annotation)
        if pattern and isinstance(value, str):
            if not re.fullmatch(pattern, value):
                raise TypeError("%s must be a number, not %r" % (name, value))
            bound.arguments[name] = json.loads(value)
    return lambda: function(*bound.args, **bound.kwargs)


def call_mi(call: Any, in_thread: bool = False) -> Any:
    """Carry out one JSON-RPC request. Returns the response; None for a notification; PENDING if it wants a thread."""
    call = call if isinstance(call, dict) else {"id": None}
    ident, method, given, data = call.get("id"), call.get("method"), call.get("params", {}), None
    if ident in (math.inf, -math.inf) or isinstance(ident, (bool, dict, list)):
        ident = call["jsonrpc"] = None
    try:
        if call.get("jsonrpc") != "2.0" or not isinstance(method, str) or not isinstance(given, (dict, list)):
            call["id"] = ident                              # answered even if it has none
            raise HTTPError(-32600, "Invalid Request")
        if method not in mi_commands:
            raise HTTPError(-32601, "Method not found")
        function, threads = mi_commands[method]
        if threads and not in_thread:
            require(mi_pool().jobs.qsize() < MI_WAITING, -32000, "Too many commands wait for a thread")
            return PENDING
        try:
            bound = bind_parameters(function, given)
        except TypeError as error:
            data = str(error)
            raise HTTPError(-32602, "Invalid params") from None
        member, value = "result", encode_json(bound())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not in_thread:
            raise
        if not isinstance(error, HTTPError):
            log.error("the MI command %s failed", method, exc_info=error)
            error, data = HTTPError(-32000, "Server error"), "the command failed, the log of the server says why"
        told = {"code": error.status, "message": error.reason}
        member, value = "error", encode_json({**told, "data": data} if data else told)
    if "id" not in call:
        return None
    return '{"jsonrpc":"2.0","%s":%s,"id":%s}' % (member, value, ident if type(ident) is int else encode_json(ident))


def answer_mi(request: Request, page: Page) -> int:
    """JSON-RPC errors travel on 200."""
    batch, answers = request.state or begin_mi(request)
    if PENDING in answers:
        return SUSPEND
    answer = answers[0] or "" if not batch else ",".join(filter(None, answers))
    try:
        page.write("[%s]" % answer if batch and answer else answer)
    except BufferError as error:
        told = encode_json({"code": -32000, "message": "Server error", "data": str(error)})
        page.write('{"jsonrpc":"2.0","error":%s,"id":null}' % told)
    return 200 if answer else 202


def begin_mi(request: Request) -> tuple[bool, list]:
    """Whether it is a batch; and the answers. Threads bring those which take long, and resume the request."""
    headers = request.headers                               # two of them keep foreign web pages from posting commands
    if not headers.get("content-type", "").lower().startswith(("application/json", "text/xml")):
        raise HTTPError(415, "the Content-Type must be application/json")
    if "origin" in headers:
        own = "%s://%s" % (request.scheme, headers.get("host", ""))
        require(headers["origin"].lower() == own.lower(), 403, "pages of another origin may not send commands")
    try:
        calls = decode_json(request.body.decode())
    except (ValueError, RecursionError):
        return False, ['{"jsonrpc":"2.0","error":{"code":-32700,"message":"Parse error"},"id":null}']
    batch = isinstance(calls, list) and calls != []
    calls = calls if batch else [calls]
    answers = [call_mi(call) for call in calls]
    if PENDING in answers:
        request.state = batch, answers
        for number, answer in enumerate(list(answers)):     # a copy: threads are at work
            if answer is PENDING:
                mi_pool().submit(partial(finish_mi, request, answers, number, calls[number]))
    return batch, answers


def finish_mi(request: Request, answers: list, number: int, call: Any) -> None:
    answers[number] = call_mi(call, in_thread=True)
    request.resume()


def mi_which(command: Optional[str] = None) -> list:
    """All commands; or the parameter lists that one command takes, as opensips-cli wants them for its completion."""
    if command is None:
        return sorted(mi_commands)
    if not isinstance(command, str) or command not in mi_commands:
        raise HTTPError(404, "unknown MI command")
    parameters = mi_signature(mi_commands[command][0]).parameters.values()
    names = [parameter.name for parameter in parameters]
    return [names[:count] for count in range(sum(p.default is p.empty for p in parameters), len(names) + 1)]


def mi_get_statistics(statistics) -> dict:
    """Values by `group:name`; asked for are `all`, `group:` or `name`."""
    counted = {"requests": attrgetter("requests"), "accepted": attrgetter("accepted"),
               "connections": lambda server: len(server.connections), "held_bytes": attrgetter("held")}
    values = {"httpd:" + name: sum(map(count, servers)) for name, count in counted.items()}
    wanted = {*map(str, statistics if isinstance(statistics, list) else [statistics])}
    found = {name: value for name, value in values.items() if not wanted.isdisjoint(("all", name, "httpd:", name[6:]))}
    if not found:
        raise HTTPError(404, "Statistics Not Found")
    return found


list_roots = lambda: [{"http_root": root.name, "module": root.module} for root in reversed(roots.values())]
BUILT_IN = {"mi_http": lambda params: register_httpdcb("mi_http", params["root"], answer_mi, methods=("POST",),
                                                       content_type="application/json")}
for name, function in {
        "httpd_list_root_path": list_roots, "httpd:list_root_path": list_roots, "which": mi_which,
        "get_statistics": mi_get_statistics, "version": lambda: {"Server": "httpd.py " + __version__},
        "uptime": lambda: {"Now": time.ctime(), "Up since": time.ctime(STARTED),
                           "Up time": "%d [sec]" % (time.time() - STARTED)},
        "ps": lambda: {"Processes": [{"ID": 0, "PID": os.getpid(),
                                      "Type": "HTTPD " + " ".join(server.url for server in servers)}]}}.items():
    register_mi(name, function)


# ---------------------------------------------------------------------------------------------------------------- WSGI
# PEP 3333 on the public callbacks: a response is an iterator of pieces of content, which flush_data_cb hands out.

SPOOL_SIZE = 2**13          # bytes of content that are held in memory before a temporary file takes them
AHEAD_SIZE = 2**16          # bytes that an application's thread may be ahead of the client


def wsgi_environ(request: Request, content: Any, threads: int) -> dict[str, Any]:
    """PEP 3333's dictionary, bytes as latin-1. A field name with _ could pass for the one with -, and is left out."""
    from wsgiref.util import FileWrapper
    script, absolute = "/" + request.root if request.root else "", ABSOLUTE_FORM.fullmatch(request.target)
    path = unquote_to_bytes(absolute[3] if absolute else request.target.partition("?")[0]).decode("latin-1")
    path = path if path[:1] == "/" else "/"                 # of http://host, and of *
    (server, port), (client, client_port) = request.server, request.client
    environ = {"HTTP_" + name.upper().replace("-", "_"): value for name, value in request.headers.items()
               if "_" not in name and name != "transfer-encoding"}
    for name in environ.keys() & {"HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"}:
        environ[name[5:]] = environ.pop(name)
    if content:
        environ["CONTENT_LENGTH"] = str(content.tell())     # known even if it came in chunks
        content.seek(0)
    environ.update({
        "REQUEST_METHOD": request.method, "SCRIPT_NAME": script, "PATH_INFO": path[len(script):],
        "QUERY_STRING": request.query, "SERVER_PROTOCOL": request.version, "SERVER_NAME": server,
        "SERVER_PORT": str(port), "REMOTE_ADDR": client, "REMOTE_PORT": str(client_port), "wsgi.version": (1, 0),
        "wsgi.url_scheme": request.scheme, "wsgi.input": content or io.BytesIO(), "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr, "wsgi.multithread": threads > 1, "wsgi.multiprocess": False, "wsgi.run_once": False,
        "wsgi.file_wrapper": lambda file, size=0: FileWrapper(file, AHEAD_SIZE)})
    return environ


class WSGIResponse:
    """What an application says by start_response(), write(), which hands on to `put`, and its iterable."""
    def __init__(self, to_head: bool, put: Callable[[bytes], Any]):
        self.to_head, self.put, self.status, self.headers = to_head, put, 0, []
        self.length = self.size = None      # bytes of all the content: as Content-Length says; as a list has them
        self.count = 0                      # bytes so far; after the first, the head is on its way

    def start(self, status: str, headers: list, exc_info: Any = None) -> Callable[[bytes], None]:
        """start_response(). The reason phrase is lost, the server has its own; so are fields that the server sets."""
        if exc_info and self.count:
            raise exc_info[1].with_traceback(exc_info[2])
        if self.status and not exc_info:
            raise RuntimeError("start_response() has been called already")
        if not re.fullmatch("[2-5][0-9]{2}( [\t -~\x80-\xff]*)?", status):
            raise ValueError("no status from 200 to 599: %r" % status)
        self.headers = [(name, value) for name, value in headers if name.lower() not in OWN_FIELDS]
        for name, value in self.headers:
            check_field(name, value)
        self.length = next((int(value) for name, value in headers if name.lower() == "content-length"), None)
        self.status = int(status[:3])
        return self.write

    def write(self, data: bytes) -> None:
        if self.wants(data):
            self.put(data)

    def wants(self, piece: bytes) -> bool:
        if not isinstance(piece, bytes):
            raise TypeError("the application has made %r, not bytes" % type(piece))
        if piece and not self.status:
            raise RuntimeError("the application has not called start_response()")
        self.count += len(piece)
        if self.length is not None and self.count > self.length:
            raise RuntimeError("the application has made more than its Content-Length of %d" % self.length)
        return piece != b"" and not self.to_head and self.status not in (204, 304)

    def pieces(self, app: Callable, environ: dict[str, Any], written: Any) -> Generator[bytes, None, None]:
        """Run the application, with context variables of its own: Flask keeps there who is asking, and others have a
        turn between the pieces. The iterable is closed however this ends, be it with its last reference."""
        run = copy_context().run
        with environ["wsgi.input"], written:
            result = run(app, environ, self.start)
            try:
                if isinstance(result, (list, tuple)):
                    self.size = self.count + sum(map(len, result))
                written.seek(0)
                yield from iter(lambda: written.read(RECEIVE_SIZE), b"")
                for piece in iter(partial(run, next, run(iter, result), self), self):
                    if self.wants(piece):
                        yield piece
                    elif piece:
                        break                               # nobody wants the rest
                if not self.status:
                    raise RuntimeError("the application has not called start_response()")
            finally:
                run(getattr(result, "close", int))

    def begin(self, page: Page, piece: memoryview) -> int:
        """Put the fields on the page, and the first piece if it is the only one. Returns the status."""
        for name, value in self.headers:
            page.set_header(name, value, add=name.lower() != "content-length")
        length = self.size if self.length is None else self.length
        if length is not None:
            page.set_header("Content-Length", str(length))
        if length == self.size == len(piece):
            with suppress(BufferError):
                page.write(piece)
        return self.status


class Handover:
    """An iterator of pieces that another thread makes. As long as the next one is not there, it gives b""."""

    def __init__(self, request: Request):
        self.request, self.changed = request, threading.Condition()
        self.queue, self.size = [], 0       # pieces, and the bytes in them
        self.end: Optional[BaseException] = None

    def fill(self, pieces: Generator[bytes, None, None]) -> None:
        request, end = self.request, StopIteration()
        try:
            with closing(pieces):
                for piece in () if request.closed else pieces:
                    self.put(piece)
        except BaseException as error:
            end = error
            if request.closed and not isinstance(error, BrokenPipeError):
                log.exception("an application failed, whose client is gone")
        self.request, self.end = None, end                  # a cycle less
        request.resume()

    def put(self, piece: bytes) -> None:
        """Wait until the client has taken what is here, if it is much. BrokenPipeError if the client is gone."""
        with self.changed:
            while self.size > AHEAD_SIZE and not self.request.closed:
                self.changed.wait(1)                        # nobody tells when the client goes
            if self.request.closed:
                raise BrokenPipeError("the client is gone")
            self.queue.append(piece)
            self.size += len(piece)
        self.request.resume()

    def __next__(self) -> bytes:
        with self.changed:
            end, piece = self.end, b"".join(self.queue)
            self.queue, self.size = [], 0
            self.changed.notify()
        if end and not piece:
            raise end
        return piece


def flush_wsgi(request: Request, pos: int, buf: memoryview) -> int:
    """The flush_data_cb: as much of a piece as there is room for."""
    state = request.state
    if not state.rest:
        piece = next(state.pieces, None)
        if piece is None:
            return END
        state.rest = memoryview(piece)
    size = min(len(state.rest), len(buf))
    buf[:size], state.rest = state.rest[:size], state.rest[size:]
    return size


def register_wsgi(module: str, root_path: str, app: Callable, *, threads: int = 0) -> None:
    """Mount a WSGI application (PEP 3333): SCRIPT_NAME is `/root_path`; "" mounts it at / for what no other root takes.
    threads   0: it runs in the server's thread, and nobody else is served meanwhile; its iterable is read as the client
              takes it. Else it runs in so many threads, 64 KiB ahead of the client, and further requests wait:
              one that streams events keeps a thread. When its client goes, write() raises BrokenPipeError, and where it
              yields there is GeneratorExit
    Request content is limited by wsgi_body_size as it is now. ConfigError as from register_httpdcb(). Any thread.
    """
    from tempfile import SpooledTemporaryFile
    if not callable(app) or not isinstance(threads, int) or threads < 0:
        raise ConfigError("%s: no application, or no number of threads: %r, %r" % (module, app, threads))
    pool = Pool(threads)

    def upload(request: Request, data: bytes) -> None:
        request.state = request.state or SpooledTemporaryFile(SPOOL_SIZE)
        request.state.write(data)

    def answer(request: Request, page: Page) -> int:
        if not isinstance(request.state, SimpleNamespace):  # it is the content, or None
            handover, written = Handover(request) if threads else None, SpooledTemporaryFile(SPOOL_SIZE)
            response = WSGIResponse(request.method == "HEAD", handover.put if handover else written.write)
            pieces = response.pieces(app, wsgi_environ(request, request.state, threads), written)
            request.state = SimpleNamespace(response=response, pieces=handover or pieces, rest=b"")
            if handover:
                pool.submit(partial(handover.fill, pieces))
        piece = next(request.state.pieces, None)
        if piece == b"":
            return SUSPEND
        request.state.rest = memoryview(piece or b"")
        return request.state.response.begin(page, request.state.rest)

    register_httpdcb(module, root_path, answer, flush_wsgi, content_type="", upload_data_cb=upload,
                     methods=("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"),
                     upload_limit=in_force("httpd")["wsgi_body_size"])


# ---------------------------------------------------------------------------------------------------------------- main
def run(**parameters: Any) -> None:
    """What the command line does: serve until SIGTERM or SIGINT; a second one ends the grace. Main thread."""
    server = Server(**parameters)
    every = " and every other address" if server.params.ip in ("", "*") else ""
    found = "httpd.py %s listens on %s%s" % (__version__, server.url, every)        # OSError comes from here
    stop = lambda *_: server.stop(0 if server._stop_at < math.inf else None)
    wanted = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: lambda *_: server.reload_tls()}
    previous = {}
    try:
        previous.update((number, signal.signal(number, handler)) for number, handler in wanted.items())
        print(found, *("  /%s  %s" % (root.name, root.module) for root in roots.values()), sep="\n", flush=True)
        gc.freeze()                                         # full collections need not look at what was loaded: 3 ms
        server.run()
    finally:
        server.stop(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_parameters() -> str:
    """The table of parameters, for --help."""
    lines = ["parameters, for the file or -o (those of other modules as -o module.name=value):"]
    for module, rows in PARAMETERS.items():
        lines += ["", "[%s]" % module]
        for row in rows:
            notes = ["default %s" % (row.default if row.default != "" else "empty"), row.bounds()]
            lines.append("  %-17s %s\n%20s(%s)" % (row.name, row.meaning, "", ", ".join(filter(None, notes))))
    return "\n".join(lines)


def print_in_force() -> None:
    """What -t shows: the parameters, in the form of a configuration, and what is served."""
    server = Server()
    for module in ["httpd", *loaded]:
        values = {name: getattr(server.params, name, value) if module == "httpd" else value
                  for name, value in in_force(module).items()}
        print("[%s]" % module, *("%s = %s" % item for item in values.items()), "", sep="\n")
    for name, value in server.plan._asdict().items() if server.plan else ():
        values = value if name == "notes" else [" ".join(value) if isinstance(value, tuple) else value]
        print(*("# TLS %s: %s" % (name, text) for text in values), sep="\n")
    print(*("# /%s  %s" % (root.name, root.module) for root in roots.values()), sep="\n")


def main(arguments: Optional[list[str]] = None) -> int:
    """The command line: 0, 1 for a bad configuration or a failed start, 2 for bad usage."""
    from argparse import ArgumentParser, RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="httpd.py", description="A management server over HTTP.", epilog=describe_parameters(),
                            formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the configuration")
    parser.add_argument("-t", action="store_true", help="check the file, print what would be in force")
    parser.add_argument("-o", metavar="NAME=VALUE", action="append", default=[], help="set a parameter over the file")
    parser.add_argument("-v", action="store_true", help="log what is refused and why connections end")
    parser.add_argument("--version", action="version", version="httpd.py " + __version__)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=10 if options.v else 20, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        load_config(options.file, options.o)
        print_in_force() if options.t else run()
        return 0
    except (ConfigError, OSError) as error:
        name = re.match(r"(?:httpd: )?(\w*)", str(error))[1]       # a parameter that has turned out to be wrong now
        text = "%s: httpd: %s" % (places[name], re.sub("^httpd: ", "", str(error))) if name in places else error
        print(text, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.modules["httpd"] = sys.modules["__main__"]          # for what the configuration loads
    sys.exit(main())
