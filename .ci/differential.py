#!/usr/bin/env python3
"""Where httpd.py takes what h11 and llhttp both refuse, or refuses what both take, and no table says why.

    python .ci/differential.py [CASES] [FIRST]

The messages are those of the fuzzer among the tests. llhttp is asked by Node, else by httptools.
h11, httptools and pytest, which the tests import, go into a temporary environment. Exit 1: a finding.
"""
import collections
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "MKCOL", "REPORT", "LOCK",
           "SEARCH")
SHOWN = 5       # examples of each kind

# What httpd.py refuses and the others take: (its statuses, what stands in the message, the reason).
LINE = rb"(?m)^[^\r\n]* "
REFUSALS = (
    ((501, 405), rb"", "methods and codings that are not served"),
    ((505,), rb"", "another major version"),
    ((414, 431), rb"", "max_header_size, 128 fields"),
    ((413,), rb"", "the largest content"),
    ((417,), rb"(?i)expect:", "an expectation but 100-continue"),
    ((421,), rb"://", "absolute-form of another scheme"),
    ((400,), LINE + rb"[^ \r\n]*#", "# in the target"),
    ((400,), LINE + rb"[^ \r\n]*\\", "a backslash in the target"),
    ((400,), LINE + rb"[^ ?\r\n]*%(?![0-9A-Fa-f]{2})", "a broken escape in the path"),
    ((400,), LINE + rb"[^ ?\r\n]*%([01][0-9A-Fa-f]|7[Ff])", "an escaped control character in the path"),
    ((400,), LINE + rb"[^\r\n]*[^\x21-\x7e\r\n][^\r\n]* HTTP/", "a target that is not visible ASCII"),
    ((400,), rb"(?m)^[A-Z]+ [^/* \r\n]", "a target that is neither a path nor an absolute URI"),
    ((400,), rb"(?m)^(CONNECT|OPTIONS|[A-Z]+ \*)", "CONNECT and * have rules of their own"),
    ((400,), rb"://[^/ ]*@|:// |:///", "userinfo, or an empty host in the target"),
    ((400,), rb"(?i)\ncontent-length:[^\r]*\r\n(.*\r\n)*content-length:", "two Content-Length"),
    ((400,), rb"(?i)\ncontent-length:[ \t]*(0[0-9]|[0-9]+[ \t]*,|[0-9]{19})",
     "zeros before a length, a list, more than 18 digits"),
    ((400,), rb"(?i)\ntransfer-encoding:[ \t]*[^c \t]", "Transfer-Encoding is exactly chunked"),
    ((400,), rb"(?i)\ntransfer-encoding:(.*\r\n)*(content-length|transfer-encoding):", "framed twice"),
    ((400,), rb"(?i)\ncontent-length:(.*\r\n)*transfer-encoding:", "framed twice"),
    ((400,), rb"(?i)HTTP/1\.0\r\n(.*\r\n)*transfer-encoding:", "a coding in HTTP/1.0"),
    ((400,), rb"(?i)\nhost:[ \t]*[^\r\n]*[^A-Za-z0-9.\-:\[\]% \t\r\n]", "the grammar of Host"),
    ((400,), rb"(?i)\nhost:[ \t]*(\r|:|[^\r]*:[^\r]*[^0-9\r \t\]])",
     "the grammar of Host: a host, a port of digits"),
    ((400,), rb"(?i)\nhost:[ \t]*[^ \t\r\n]+[ \t]+[^ \t\r\n]", "the grammar of Host: no blanks"),
    ((400,), rb"(?i)\nhost:[^\r]*\r\n(.*\r\n)*host:", "two Host"),
    ((400,), rb"(?i)\nhost:[ \t]*[^\[\r]*[\[\]]|\nhost:[ \t]*\[(?![0-9a-f:.]*\])",
     "the grammar of Host: IPv6"),
    ((400,), rb"\r\n\r\n\r\n\r\n", "more than a few empty lines"),
    ((400,), rb"(?<!\r)\n[A-Z]+ [^\r\n]* HTTP/", "a bare LF before a request line"),
    ((400,), rb"(?i)\r\n0[^\r]*\r\n(.*\r\n)*(host|content-[a-z]+|transfer-encoding|expect|cookie):",
     "a field that may not stand in a trailer section"),
    ((400,), rb"(?m)^ *[0-9A-Fa-f]+[ \t]*;", "the grammar of chunk extensions"),
    ((400,), rb"(?m)^[0-9A-Fa-f]+[ \t]+\r$|^[0-9A-Fa-f]{16}",
     "blanks behind a chunk size, more than 15 digits"),
)
# What httpd.py takes and the others refuse.
ACCEPTED = (
    (rb"HTTP/1\.[2-9]", "later minor versions are served as 1.1"),
    (rb"(?i)\nconnection:[^\r]*,[ \t]*,", "empty members of a list"),
    (rb"(?m)^[0-9A-Fa-f]+([ \t]+;|;[^\r]*[ \t])", "blanks around ; and = of a chunk extension: 9112, 7.1.1"),
)


class Verdict:
    """The requests that were taken, each (method, target, digest of its content), and how it ended.

    `error` and `incomplete` are refusals, `closed` is a Connection: close, `end` the end of the bytes."""

    def __init__(self, taken, end):
        self.taken, self.end = taken, end

    def at(self, number):
        """The request of that number; "refused"; or None if nothing was to come."""
        if number < len(self.taken):
            return self.taken[number]
        return None if self.end in ("closed", "end") else "refused"


def digest(content):
    return hashlib.sha1(content).hexdigest()


def ask_h11(raw):
    import h11
    connection, taken, request, content = h11.Connection(h11.SERVER,
                                                         max_incomplete_event_size=65536), [], None, b""
    connection.receive_data(raw)
    connection.receive_data(b"")
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return Verdict(taken, "error")
        if type(event) is h11.Request:
            request, content = event, b""
        elif type(event) is h11.Data:
            content += event.data
        elif type(event) is h11.EndOfMessage:
            taken.append((request.method.decode(), request.target.decode(), digest(content)))
            if connection.their_state is h11.MUST_CLOSE:
                return Verdict(taken, "closed")
            connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                return Verdict(taken, "closed")
            connection.start_next_cycle()
        elif type(event) is h11.ConnectionClosed:
            return Verdict(taken, "end")
        else:
            return Verdict(taken, "incomplete")


NODE = r"""
const { HTTPParser, methods } = require('_http_common');
const crypto = require('crypto');
function judge(raw) {
  const parser = new HTTPParser(), taken = [];
  let request = null, url = '', closed = false;
  parser.initialize(HTTPParser.REQUEST, {});
  parser[HTTPParser.kOnHeaders | 0] = (headers, part) => { url += part; };
  parser[HTTPParser.kOnHeadersComplete | 0] = (_1, _2, _3, method, target, _4, _5, _6, keep) => {
    const hash = crypto.createHash('sha1');
    request = { method: methods[method], target: target === undefined ? url : target, hash, keep };
    return request.method === 'CONNECT' ? 2 : 0;
  };
  parser[HTTPParser.kOnBody | 0] = (piece) => { request.hash.update(piece); };
  parser[HTTPParser.kOnMessageComplete | 0] = () => {
    if (closed) return;
    taken.push([request.method, request.target, request.hash.digest('hex')]);
    closed = !request.keep;
    request = null;
    url = '';
  };
  let result = parser.execute(raw);
  if (!(result instanceof Error)) result = parser.finish();
  const end = closed ? 'closed' : result instanceof Error ? 'error' : request ? 'incomplete' : 'end';
  return { taken, end, why: result instanceof Error ? result.code : '' };
}
require('readline').createInterface({ input: process.stdin }).on('line', (line) => {
  console.log(JSON.stringify(judge(Buffer.from(line, 'hex'))));
});
"""


class Node:
    """llhttp in a Node process: a line of hexadecimal in, a line of JSON out."""

    def __init__(self):
        self.process = subprocess.Popen(["node", "--no-deprecation", "-e", NODE], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def __call__(self, raw):
        self.process.stdin.write(raw.hex() + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Verdict([tuple(each) for each in answer["taken"]], answer["end"])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class HTTPTools:
    """llhttp in this process."""

    def __init__(self):
        import httptools
        self.tools = httptools

    def __call__(self, raw):
        self.taken, self.end, self.begun = [], "end", False
        self.parser = self.tools.HttpRequestParser(self)
        try:
            self.parser.feed_data(raw)
        except self.tools.HttpParserUpgrade:
            self.end = "closed"
        except self.tools.HttpParserError:
            self.end = "closed" if self.end == "closed" else "error"
        if self.begun and self.end == "end":
            self.end = "incomplete"
        return Verdict(self.taken, self.end)

    def on_message_begin(self):
        self.begun, self.target, self.content = True, b"", b""

    def on_url(self, part):
        self.target += part

    def on_body(self, piece):
        self.content += piece

    def on_message_complete(self):
        if self.end == "closed":
            return
        self.begun = False
        self.taken.append((self.parser.get_method().decode(), self.target.decode("latin-1"),
                           digest(self.content)))
        if not self.parser.should_keep_alive():
            self.end = "closed"

    def close(self):
        pass


class Server:
    """httpd.py, over a socket."""

    def __init__(self, tests):
        import httpd
        self.split = tests.split_replies

        def answer(request, page):
            page.set_header("X-To", request.method)
            page.set_header("X-Target", request.target)
            page.set_header("X-Digest", digest(request.body))
            page.write("taken")
            return 200

        httpd.register_httpdcb("differential", "", answer, methods=METHODS)
        self.server = httpd.Server(ip="127.0.0.1", port=0, receive_buf_size=65536, post_buf_size=65536)
        self.server.start()

    def __call__(self, raw):
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as client:
            data = b""
            try:
                client.sendall(raw)
                client.shutdown(socket.SHUT_WR)
                while more := client.recv(1 << 18):
                    data += more
            except ConnectionError:
                pass
        replies = self.split(data)
        taken = [(reply.fields["x-to"], reply.fields["x-target"], reply.fields["x-digest"])
                 for reply in replies if reply.status == 200]
        refused = [reply.status for reply in replies if reply.status != 200]
        closed = bool(replies) and replies[-1].fields.get("connection") == "close"
        verdict = Verdict(taken, "error" if refused else "closed" if closed else "end")
        verdict.status = refused[0] if refused else 0
        return verdict

    def close(self):
        self.server.stop(0)


def generator():
    """The module among the tests that makes the messages."""
    import test_httpd
    if hasattr(test_httpd, "make_message"):
        return test_httpd
    import fuzz_tests
    return fuzz_tests


def make_raw(tests, number):
    """A mutated message and a good one behind it, which shows where the first was thought to end."""
    chance = random.Random("differential %d" % number)
    raw = tests.make_message("first%d" % number, chance).raw
    if chance.random() < 0.9:
        raw = tests.mutate(raw, chance)
    return raw + tests.make_message("second%d" % number, chance).raw


def compare(raw, ours, h11, llhttp):
    """None, or what kind of difference it is and its reason if there is one."""
    for number in range(9):
        mine, theirs = ours.at(number), (h11.at(number), llhttp.at(number))
        if theirs[0] != theirs[1]:
            if isinstance(mine, tuple) and mine not in theirs and "refused" not in theirs:
                return "differs from both, which differ", ""
            return "undecided", "h11 and llhttp do not agree"
        if mine == theirs[0]:
            if mine is None or mine == "refused":
                return None
            continue
        if theirs[0] == "refused":
            if mine is None:
                return None
            reason = next((reason for pattern, reason in ACCEPTED if re.search(pattern, raw)), "")
            return "takes what both refuse", reason
        if mine == "refused":
            status = ours.status
            reason = next((reason for statuses, pattern,
                           reason in REFUSALS if status in statuses and re.search(pattern, raw)), "")
            return "refuses with %d what both take" % status, reason
        return "understands differently", "" if theirs[0] or mine else "nothing"
    return None


def run(count, first):
    sys.path.insert(0, str(ROOT))
    tests = generator()
    parsers = [Server(tests), Node() if shutil.which("node") else HTTPTools()]
    allowed, findings = collections.Counter(), collections.defaultdict(list)
    try:
        for number in range(first, first + count):
            raw = make_raw(tests, number)
            ours, llhttp = [parser(raw) for parser in parsers]
            found = compare(raw, ours, ask_h11(raw), llhttp)
            if found and found[1]:
                allowed[found] += 1
            elif found:
                findings[found[0]].append((number, raw, ours, llhttp))
    finally:
        for parser in parsers:
            parser.close()
    print("%d messages; llhttp by %s" % (count, type(parsers[1]).__name__))
    for (kind, reason), times in sorted(allowed.items()):
        print("%6d  %s: %s" % (times, kind, reason))
    for kind, cases in findings.items():
        print("FINDING: %s, %d times, such as" % (kind, len(cases)))
        for number, raw, ours, llhttp in cases[:SHOWN]:
            print("  case %d: %r\n    ours %r %s, llhttp %r %s"
                  % (number, raw[:600], [t[:2] for t in ours.taken], ours.end,
                                                               [t[:2] for t in llhttp.taken], llhttp.end))
    return 1 if findings else 0


def main():
    if sys.argv[1:2] == ["--inside"]:
        return run(int(sys.argv[2]), int(sys.argv[3]))
    count, first = [*sys.argv[1:], "2000", "0"][:2] if len(sys.argv) != 2 else (sys.argv[1], "0")
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = os.path.join(directory, "bin", "python")
        packages = ["h11", "pytest"] if shutil.which("node") else ["h11", "pytest", "httptools"]
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, env=environment)
        return subprocess.run([python, str(pathlib.Path(__file__).resolve()), "--inside", count, first],
                              env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
