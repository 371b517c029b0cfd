"""``badit studio`` on the command line: an address in a line, an end by Ctrl-C, and mistakes in one line."""

import http.client
import json
import signal
import subprocess
import sys
import webbrowser
from contextlib import closing

import pytest

from badit.cli import main
from badit.studio import server
from studio.conftest import BADIT


def test_it_serves_until_it_is_interrupted(trained):
    run = trained(BADIT)
    command = [sys.executable, "-m", "badit", "studio", str(run.path), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Studio: http://127.0.0.1:")
        port = int(line.split()[1].rpartition(":")[2])
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/api/run")
            assert json.load(connection.getresponse())["run"] == "run"
            # An answer that is still being written does not delay the end.
            headers = {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
            question = {"text": "land", "sides": ["router", "base"], "max_new_tokens": 512}
            connection.request("POST", "/api/answer", json.dumps(question), headers)
            with closing(connection.getresponse()) as response:
                assert response.readline() == b"event: prompt\n"
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_mistakes_are_told_in_one_line_before_a_model_is_loaded(monkeypatch, capsys):
    with server.listen(0) as taken:
        host, port = taken.getsockname()
        assert host == "127.0.0.1", "only this machine can reach it"
        for arguments, expected in (
            ([f"--port={port}"], f"--port: {port} cannot be used (Address already in use); give another one, or 0"),
            (["--port=-1"], "--port: must be from 0 to 65535, not -1"),
            (["--port=0"], "no-run: has no config.yaml"),
        ):
            assert main(["studio", "no-run", *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"badit: {expected}")
    monkeypatch.delitem(sys.modules, "badit.studio.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["studio", "no-run"]) == 2
    assert "the studio needs its extra (uvicorn is missing): pip install 'badit[studio]'" in capsys.readouterr().err


@pytest.mark.parametrize(("display", "opened"), [("", []), (":0", ["http://127.0.0.1:1"])])
def test_a_browser_is_opened_if_there_is_a_screen(display, opened, monkeypatch):
    seen = []
    monkeypatch.setattr(webbrowser, "open", seen.append)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    server.open_browser("http://127.0.0.1:1")
    assert seen == opened
