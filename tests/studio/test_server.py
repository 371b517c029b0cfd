"""``badit studio``: the command, and its HTTP server with streamed and refused requests."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from contextlib import closing

import httpx2
import pytest

from badit.integrations.studio.server import MAX_BODY, application
from badit.integrations.studio.session import MAX_CHARACTERS, MAX_NEW_TOKENS
from badit.integrations.web import listen
from badit.support.errors import BaditError
from studio.conftest import BADIT, served

ASK = {"text": "land 3", "task": "rivers", "sides": ["router", "base"], "max_new_tokens": 6}
FILES = ("/", "/studio.js", "/studio.css", "/look.css")
TIMEOUT = 60


@pytest.fixture
def client(session):
    with served(application(session)) as port:
        page = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=page, headers={"Origin": page}, timeout=TIMEOUT) as client:
            yield client


def parse_events(body):
    """Returns server-sent events as pairs of name and data."""
    events = [event.split("\n") for event in body.split("\n\n")[:-1]]
    assert all(name.startswith("event: ") and data.startswith("data: ") for name, data in events)
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in events
    ]


def test_answers_and_errors_during_an_answer_are_streamed_as_events(client, session, monkeypatch):
    response = client.post("/api/answer", json=ASK)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parse_events(response.text)
    one_side = ["text"] * 6 + ["end"]
    assert [name for name, _ in events] == ["prompt", "gates", *one_side, *one_side, "done"]

    def fail(question, show):
        show("text", {"side": "router", "text": "so far"})
        raise BaditError("the model\nbroke")

    monkeypatch.setattr(session, "answer", fail)
    events = parse_events(client.post("/api/answer", json=ASK).text)
    assert events[-1] == ("error", {"message": "the model\\nbroke"})


def test_responses_have_security_headers_and_files_have_no_external_urls(client):
    for path in (*FILES, "/api/run", "/api/nothing", "/../x"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
    for path in FILES:
        response = client.get(path)
        assert response.status_code == 200
        assert not [word for word in ("://", "innerHTML", "style=") if word in response.text], path


def test_foreign_hosts_and_origins_are_refused(client):
    page = client.headers.pop("Origin")
    for host in ("evil.example:8642", "127.0.0.1.evil.example", "192.168.1.5", "", "["):
        for method, path in (("GET", "/"), ("GET", "/api/run"), ("POST", "/api/answer")):
            response = client.request(
                method, path, headers={"Host": host, "Origin": f"http://{host}"}, json=ASK
            )
            assert response.status_code == 400, host
            assert "cities" not in response.text
    for headers in (
        {},
        {"Origin": "null"},
        {"Origin": page.replace("http", "https")},
        {"Origin": page.replace("127.0.0.1", "localhost")},
        {"Origin": f"{page}1"},
        {"Origin": "http://evil.example"},
    ):
        response = client.post("/api/answer", json=ASK, headers=headers)
        assert response.status_code == 403, headers
        assert "does not come from this page" in response.json()["error"]
    for host in ("localhost:8642", "127.0.0.1:9000"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        response = client.post("/api/answer", json={**ASK, "sides": ["base"]}, headers=headers)
        assert response.status_code == 200


def test_invalid_requests_are_refused_with_one_line(client):
    for question, problem in (
        ({"text": "x" * (MAX_CHARACTERS + 1)}, "request: text: "),
        ({"sides": []}, "request: sides: "),
        ({"sides": ["adapter"]}, "request: sides.0: "),
        ({"max_new_tokens": MAX_NEW_TOKENS + 1}, "request: max_new_tokens: "),
        ({"task": "<b>\n"}, "task: unknown '<b>\\n'"),
        ({"temperature": 1}, "request: temperature: "),
        (b"[1]", "request: "),
        (b" " * (MAX_BODY + 1), "the request is larger than 128 KiB"),
        (b'{"text": "\xff"}', "request: not UTF-8"),
        (b'{"text": "a", "text": "b"}', "request: the key 'text' is there twice"),
        (b'{"text": "a", "sides": ["hand"], "gates": [1e999, 1, 1, 1]}', "request: gates.0: "),
    ):
        body = question if isinstance(question, bytes) else json.dumps({**ASK, **question}).encode()
        headers = {"Content-Type": "application/json"}
        response = client.post("/api/answer", content=body, headers=headers)
        message = response.json()["error"]
        assert message.startswith(problem)
        assert message.isprintable()
        assert response.status_code == (413 if "larger" in problem else 400)
    assert client.post("/api/answer", data={"text": "a"}).status_code == 415
    for method, path in (("POST", "/api/run"), ("DELETE", "/")):
        response = client.request(method, path)
        assert (response.status_code, response.json()) == (405, {"error": "Method Not Allowed"})


class Slow:
    """A session whose answers run until ``goes_on`` is set; it counts the running answers."""

    def __init__(self):
        self.running = self.most_running = 0
        self.began = threading.Semaphore(0)
        self.goes_on, self.stopped = threading.Event(), threading.Event()
        self.about, self.check = dict, lambda question: None

    def answer(self, question, show):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.began.release()
        try:
            show("text", {"side": "router", "text": question.text})
            while not self.goes_on.wait(0.01):
                show("text", {"side": "router", "text": "…"})
        except BaseException:
            self.stopped.set()
            raise
        finally:
            self.running -= 1


@pytest.fixture
def slow():
    session = Slow()
    with served(application(session)) as port:
        yield session, port


def ask(port, text, **question):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    headers = {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    body = json.dumps({**ASK, "text": text, **question})
    connection.request("POST", "/api/answer", body, headers)
    return closing(connection)


def test_events_are_sent_during_the_answer_and_other_requests_wait(slow):
    session, port = slow
    with (
        ask(port, "number 0") as first,
        ask(port, "number 1") as second,
        closing(first.getresponse()) as response,
    ):
        assert response.readline() == b"event: text\n"
        assert b"number 0" in response.readline()
        assert session.began.acquire(timeout=TIMEOUT)
        assert not session.began.acquire(timeout=0.3), "the second request waits"
        session.goes_on.set()
        assert response.read().endswith(b"event: done\ndata: {}\n\n")
        with closing(second.getresponse()) as later:
            assert b"number 1" in later.read()
    assert session.most_running == 1


def test_answer_stops_when_the_client_disconnects(slow):
    session, port = slow
    with ask(port, "first") as first, closing(first.getresponse()) as response:
        assert response.readline()
        with ask(port, "gone before its turn"):
            pass
    assert session.stopped.wait(TIMEOUT)
    session.goes_on.set()
    with ask(port, "last") as last, closing(last.getresponse()) as response:
        assert b"last" in response.read(), "the lock is released"
    assert session.running == 0
    # The one that was gone before its turn never started.
    assert [session.began.acquire(blocking=False) for _ in range(3)] == [True, True, False]


def test_studio_serves_until_interrupted(trained):
    command = [sys.executable, "-m", "badit", "studio", str(trained(BADIT).path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--port=0", "--no-browser"], **pipes) as process:
        line = process.stdout.readline()
        assert line.startswith("Studio: http://127.0.0.1:")
        port = int(line.split()[1].rpartition(":")[2])
        assert httpx2.get(f"http://127.0.0.1:{port}/api/run").json()["run"] == "run"
        # A running answer does not delay the shutdown.
        with (
            ask(port, "land", task=None, max_new_tokens=512) as asking,
            closing(asking.getresponse()) as response,
        ):
            assert response.readline() == b"event: prompt\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert b"the studio was stopped" in response.read()
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_errors_are_one_line_and_reported_before_a_model_is_loaded(monkeypatch, command, tmp_path):
    run = str(tmp_path)
    (tmp_path / "config.yaml").touch()
    with listen(0) as taken:
        host, port = taken.getsockname()
        assert host == "127.0.0.1", "only this machine can reach it"
        in_use = f"--port: {port} cannot be used (Address already in use); use another port, or 0"
        for arguments, expected in (
            ([run, f"--port={port}"], in_use),
            ([run, "--port=-1"], 'Invalid value "-1" for --port. Must be >= 0.'),
            (["no-run", "--port=0"], "no-run: has no config.yaml"),
        ):
            assert command("studio", *arguments, code=2).startswith(f"badit: {expected}")
    monkeypatch.delitem(sys.modules, "badit.integrations.web")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    message = "module uvicorn is not installed; run pip install 'badit[studio]'"
    assert message in command("studio", run, code=2)
