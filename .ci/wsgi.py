"""Flask, Bottle and prometheus_client under httpd.register_wsgi: one line `name: ok` each. httpd.py must be importable."""
import contextlib, faulthandler, hashlib, http.client, json, sys, threading, time, urllib.parse     # noqa: E401

import bottle
import flask
import prometheus_client

import httpd

faulthandler.dump_traceback_later(60, exit=True)
DOWNLOAD = 20 * 2**20
site, told, hits = flask.Flask("site"), threading.Semaphore(0), prometheus_client.Counter("hits", "Requests.")


@site.route("/form", methods=["GET", "POST"])
def form():
    hits.inc()
    if flask.request.method == "POST":
        return {name: flask.request.form.getlist(name) for name in flask.request.form}
    return "<form method=post>"


@site.route("/file", methods=["POST", "PUT"])
def file():
    if flask.request.method == "PUT":
        data = iter(lambda: flask.request.stream.read(65536), b"")
        return digest(data)
    upload = flask.request.files["upload"]
    return {"name": upload.filename, "comment": flask.request.form["comment"], "sha256": digest(iter(lambda: upload.stream.read(65536), b""))}


@site.route("/download")
def download():
    def pieces():
        for number in range(DOWNLOAD >> 16):
            yield bytes([number % 251]) * 65536
    return flask.Response(pieces(), mimetype="application/octet-stream", headers={"Content-Length": DOWNLOAD} if "length" in flask.request.args else {})


@site.route("/events")
def events():
    def pieces():
        for number in range(5):
            yield "data: %d %s\n\n" % (number, flask.request.args["name"])
            assert told.acquire(timeout=10)
    return flask.Response(flask.stream_with_context(pieces()), mimetype="text/event-stream")


@site.route("/session")
def session():
    flask.session["count"] = flask.session.get("count", 0) + 1
    return flask.redirect("/form", 303) if flask.session["count"] > 1 else flask.jsonify(flask.session["count"])


@site.route("/fails")
def fails():
    raise KeyError("planned")


site.secret_key = "x"
drinks = bottle.Bottle()


@drinks.route("/<name:path>", method=["GET", "POST"])
def drink(name):
    bottle.response.set_header("X-Mount", bottle.request.script_name)
    return {"name": name, "query": dict(bottle.request.query.decode()), "json": bottle.request.json}


def digest(pieces):
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


@contextlib.contextmanager
def asked(port, method, path, body=None, headers=None, chunked=False):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        client.request(method, path, body, headers or {}, encode_chunked=chunked)
        yield client.getresponse()
    finally:
        client.close()


def answer(port, *arguments, **options):
    with asked(port, *arguments, **options) as response:
        content = response.read()
        return response.status, response.headers, content


def check_form(port):
    fields = [("comment", "Grüße, %20 & more\r\n" * 300), ("button", "one"), ("button", "two"), ("empty", "")]
    browser = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": "a=b; c=d", "Accept": "text/html,*/*;q=0.8", "Origin": "http://127.0.0.1:%d" % port,
               "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0", "Accept-Language": "de,en-US;q=0.7", "DNT": "1"}
    status, _, content = answer(port, "POST", "/form", urllib.parse.urlencode(fields, encoding="utf-8"), browser)
    assert status == 200 and json.loads(content) == {"comment": [fields[0][1]], "button": ["one", "two"], "empty": [""]}
    assert answer(port, "GET", "/form")[2] == b"<form method=post>"
    status, headers, content = answer(port, "HEAD", "/form")
    assert status == 200 and headers["Content-Length"] == "18" and content == b""
    status, headers, _ = answer(port, "OPTIONS", "/form")
    assert status == 200 and set(headers["Allow"].replace(" ", "").split(",")) == {"GET", "HEAD", "POST", "OPTIONS"}
    assert answer(port, "GET", "/nowhere")[0] == 404 and answer(port, "DELETE", "/form")[0] == 405 and answer(port, "GET", "/fails")[0] == 500


def check_file(port):
    content = bytes(range(256)) * 16384                     # 4 MiB
    body = (b'--cut\r\nContent-Disposition: form-data; name="comment"\r\n\r\nbesides\r\n--cut\r\nContent-Disposition: form-data; name="upload"; '
            b'filename="a.bin"\r\nContent-Type: application/octet-stream\r\n\r\n' + content + b"\r\n--cut--\r\n")
    status, _, told_back = answer(port, "POST", "/file", body, {"Content-Type": "multipart/form-data; boundary=cut"})
    expected = hashlib.sha256(content).hexdigest()
    assert status == 200 and json.loads(told_back) == {"name": "a.bin", "comment": "besides", "sha256": expected}
    parts = (content[i:i + 50000] for i in range(0, len(content), 50000))
    assert answer(port, "PUT", "/file", parts, {"Transfer-Encoding": "chunked"}, chunked=True)[::2] == (200, expected.encode())


def check_download(port):
    expected = digest(bytes([number % 251]) * 65536 for number in range(DOWNLOAD >> 16))
    for query, field, value in (("", "Transfer-Encoding", "chunked"), ("?length", "Content-Length", str(DOWNLOAD))):
        with asked(port, "GET", "/download" + query) as response:
            assert response.headers[field] == value
            assert digest(iter(lambda: response.read(1 << 16), b"")) == expected    # noqa: B023


def check_events(port):
    with asked(port, "GET", "/events?name=first") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for number in range(5):
            assert (response.readline(), response.readline()) == (b"data: %d first\n" % number, b"\n")
            begin = time.monotonic()
            assert answer(port, "GET", "/metrics")[0] == 200 and time.monotonic() - begin < 5       # while the application waits
            told.release()
        assert response.read() == b""


def check_session(port):
    status, headers, content = answer(port, "GET", "/session")
    assert status == 200 and content.strip() == b"1"
    status, headers, content = answer(port, "GET", "/session", headers={"Cookie": headers["Set-Cookie"].partition(";")[0]})
    assert status == 303 and headers["Location"] == "/form"


def check_bottle(port):
    status, headers, content = answer(port, "GET", "/drinks/" + urllib.parse.quote("Glühwein/50%/a b") + "?q=" + urllib.parse.quote("süß"))
    assert status == 200 and headers["X-Mount"] == "/drinks/"
    assert json.loads(content) == {"name": "Glühwein/50%/a b", "query": {"q": "süß"}, "json": None}
    content = answer(port, "POST", "/drinks/x", b'{"a": [1]}', {"Content-Type": "application/json"})[2]
    assert json.loads(content)["json"] == {"a": [1]}


def check_prometheus(port):
    status, headers, content = answer(port, "GET", "/metrics")
    lines = content.decode().splitlines()
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=") and "# TYPE hits_total counter" in lines
    before = next(float(line.split()[1]) for line in lines if line.startswith("hits_total "))
    answer(port, "GET", "/form")
    content = answer(port, "GET", "/metrics?name[]=hits_total", headers={"Accept-Encoding": "identity"})[2]
    assert b"hits_total %.1f\n" % (before + 1) in content


def main():
    httpd.register_wsgi("flask", "", site, threads=4)
    httpd.register_wsgi("bottle", "drinks", drinks)
    httpd.register_wsgi("prometheus_client", "metrics", prometheus_client.make_wsgi_app())
    with httpd.Server(ip="127.0.0.1", port=0) as server:
        for name, check in (("Flask, a browser's form", check_form), ("Flask, a file upload", check_file), ("Flask, a streamed download", check_download),
                            ("Flask, Server-Sent Events", check_events), ("Flask, a session and a redirect", check_session),
                            ("Bottle", check_bottle), ("prometheus_client", check_prometheus)):
            check(server.port)
            print(name + ": ok", flush=True)
        httpd.unregister_httpdcb("")
        httpd.register_wsgi("flask", "", site)              # and in the server's thread
        for name, check in (("form", check_form), ("file upload", check_file), ("streamed download", check_download)):
            check(server.port)
            print("Flask without threads, %s: ok" % name, flush=True)
        server.stop(0)


if __name__ == "__main__":
    sys.exit(main())
