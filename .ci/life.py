"""A day's life of a server in a minute: restarts, reloads, log rotations and killed workers at random, under mixed load.

    python .ci/life.py SECONDS [WORKERS]

Every request is accounted for. With nobody killed none may fail, but for a kept connection that ends as a request is on its way
to it: at most 1 of 300 of those ends. A killed worker may take what it has in hand. At the end memory, descriptors and children
are what they were.
"""
import http.client, os, pathlib, random, re, signal, subprocess, sys, tempfile, threading, time     # noqa: E401

HERE = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import logging, httpd
logging.basicConfig(level=logging.INFO)
def large(request, page):
    page.write(b"x" * 200000)
def order(request, page):
    page.write(request.body)
httpd.register_httpdcb("life", "page", lambda request, page: page.write("hello"))
httpd.register_httpdcb("life", "large", large)
httpd.register_httpdcb("life", "order", order, methods=("POST",))
httpd.loadmodule("prometheus")
httpd.run(ip="127.0.0.1", port=%d, workers=%d, access_log="access.log", grace_timeout=5)
"""
ASKED = [("GET", "/page", None, 5), ("GET", "/large", None, 200000), ("POST", "/order", b"y" * 3000, 3000), ("GET", "/metrics", None, -1)]


class Client(threading.Thread):
    """Asks again and again, on kept connections and on new ones."""

    def __init__(self, port, seed):
        super().__init__(daemon=True)
        self.port, self.chance = port, random.Random(seed)
        self.answered = self.ends = self.crossed = 0
        self.failed = []
        self.ending = False

    def run(self):
        while not self.ending:
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            for number in range(self.chance.choice([1, 50])):
                if self.ending:
                    break
                try:
                    self.ask(client)
                except (OSError, http.client.HTTPException) as error:
                    if number and isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
                        self.crossed += 1       # the end of a kept connection, and a request, have met
                    else:
                        self.failed.append("%d %r" % (number, error))
                    break
                if client.sock is None:         # it was told that this was the last
                    self.ends += 1
                    break
            client.close()

    def ask(self, client):
        method, path, content, size = self.chance.choice(ASKED)
        client.request(method, path, content)
        answer = client.getresponse()
        data = answer.read()
        if answer.status != 200 or size not in (-1, len(data)):
            self.failed.append("%s %d %d bytes" % (path, answer.status, len(data)))
        self.answered += 1


def children(pid):
    return [int(text) for text in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def measure(pid):
    """Memory in kB and descriptors, of a process and its children; and how many there are."""
    pids = [pid, *children(pid)]
    memory = sum(int(re.search(r"Pss: +(\d+)", open("/proc/%d/smaps_rollup" % one).read())[1]) for one in pids)
    return memory, sum(len(os.listdir("/proc/%d/fd" % one)) for one in pids), len(pids)


def wait_for(condition, what):
    limit = time.monotonic() + 30
    while not condition():
        if time.monotonic() > limit:
            sys.exit("it does not come to that: " + what)
        time.sleep(0.05)


def main(seconds, workers):
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        import socket
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        pathlib.Path("program.py").write_text(PROGRAM % (port, workers))
        output = open("output", "w")
        paths = {**os.environ, "PYTHONPATH": str(HERE)}
        pid = subprocess.Popen([sys.executable, "program.py"], env=paths, stdout=output, stderr=output).pid
        said = pathlib.Path("output").read_text
        wait_for(lambda: "listens on" in said(), "the start")
        clients = [Client(port, seed) for seed in range(6)]
        for client in clients:
            client.start()
        time.sleep(2)
        before = measure(pid)
        done = {"restart": 0, "reload": 0, "rotate": 0, "kill": 0}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            what = chance.choice([name for name in done if name != "kill" or workers > 1])
            done[what] += 1
            if what == "restart":
                count = said().count("has taken over")
                os.kill(pid, signal.SIGUSR2)
                wait_for(lambda: said().count("has taken over") > count, "a restart")           # noqa: B023
                old, pid = pid, int(re.findall(r"process (\d+) has taken over", said())[-1])
                wait_for(lambda: not os.path.exists("/proc/%d" % old) or "Z" in open("/proc/%d/stat" % old).read().split(")")[1][:3],     # noqa: B023
                         "the end of what was replaced")
            elif what == "kill":
                os.kill(chance.choice(children(pid)), signal.SIGKILL)
                time.sleep(1.5)
            else:
                if what == "rotate":
                    os.rename("access.log", "access.log.1")
                os.kill(pid, signal.SIGHUP)
                wait_for(lambda: os.path.exists("access.log"), "a new log")
            time.sleep(chance.random())
        for client in clients:
            client.ending = True
        for client in clients:
            client.join(30)
        time.sleep(1.5)
        after = measure(pid)
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists("/proc/%d" % pid) or "Z" in open("/proc/%d/stat" % pid).read().split(")")[1][:3], "the end")
        answered, crossed, ends = (sum(getattr(client, name) for client in clients) for name in ("answered", "crossed", "ends"))
        failed = [text for client in clients for text in client.failed]
        print("%s; %d answered, %d last ones of a connection, %d crossed its end, %d failed; kB, descriptors, processes %s, then %s"
              % (done, answered, ends, crossed, len(failed), before, after))
        if len(failed) > 6 * done["kill"] or crossed > 6 * done["kill"] + 1 + ends / 300:
            sys.exit("requests were lost: %s" % failed[:5])
        if after[0] > 1.5 * before[0] + 4000 or after[1] > before[1] + 8 or after[2] != before[2]:
            sys.exit("something grows")
        if "Traceback" in said():
            sys.exit(said()[-2000:])


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
