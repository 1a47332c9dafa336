"""The load test: bounded, on this machine alone, and right about what a server did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import serve


class Answers(BaseHTTPRequestHandler):
    """Streams like an OpenAI-like server: a role, a pause, then tokens."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        self._begin("application/json")
        self.wfile.write(json.dumps({"data": [{"id": "demo"}]}).encode())

    def do_POST(self):
        chat = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(chat)
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self._begin("text/event-stream")
        self._event(delta={"role": "assistant", "content": ""})
        time.sleep(self.server.pause)
        for _ in range(chat["max_tokens"]):
            self._event(delta={"content": "x"})
        usage = {"prompt_tokens": self.server.length, "completion_tokens": chat["max_tokens"]}
        self._event(usage=usage)
        self.wfile.write(b"data: [DONE]\n\n")
        with self.server.lock:
            self.server.now -= 1

    def _begin(self, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _event(self, delta=None, **more):
        choices = [] if delta is None else [{"index": 0, "delta": delta}]
        self.wfile.write(f"data: {json.dumps({'choices': choices, **more})}\n\n".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Start servers that take so long, of prompts of so many tokens."""
    running = []

    def start(pause: float, length: int) -> ThreadingHTTPServer:
        one = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        one.pause, one.length, one.asked, one.now, one.most = pause, length, [], 0, 0
        one.lock = threading.Lock()
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        running.append(one)
        return one

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def url(one):
    return f"http://127.0.0.1:{one.server_port}"


@pytest.mark.slow
def test_a_pruned_server_beside_an_unpruned_one(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "LEAST_REQUESTS", 2)
    fast, slow = server(0.002, 28), server(0.012, 156)
    words = ["--pruned", url(fast), "--unpruned", url(slow), "--rounds", "5", "--warmup", "0"]
    words += ["--concurrency", "1", "2", "--requests-per-client", "1", "--new-tokens", "3"]
    words += ["--pids", str(os.getpid()), str(os.getpid())]
    words += ["--pruned-body", '{"num_keep": 4}', "--output", str(tmp_path / "found.json")]
    serve.main(words)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["rounds"], found["model"]) == (5, "demo")
    assert found["prompt_tokens"] == {"unpruned": [156, 156], "pruned": [28, 28]}
    for row, concurrency in zip(found["figures"], (1, 2), strict=True):
        assert row["concurrency"] == concurrency
        assert row["ttft_ms"]["unpruned"]["value"] > 12
        ratio = row["ttft_ms"]["ratio"]
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        assert ratio["value"] < 1 < row["requests_per_second"]["ratio"]["value"]
        spent = found["samples"][str(concurrency)]["pruned"]["cpu_ms_per_request"]
        assert len(spent) == 5
        assert 0 <= min(spent) <= max(spent) < 1000
    assert (fast.most, slow.most) == (2, 2)
    images = [json.dumps(chat["messages"]) for chat in slow.asked]
    assert len(set(images)) == len(images) == 2 * 5 * 2, "a cache would answer"
    assert [json.dumps(chat["messages"]) for chat in fast.asked[:2]] == images[:2]
    assert all(chat["num_keep"] == 4 and chat["ignore_eos"] for chat in fast.asked)
    assert not any("num_keep" in chat for chat in slow.asked)
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert "pruned / unpruned" in capsys.readouterr().out

    with pytest.raises(ValueError, match=r"have \[156, 156\] tokens.*: nothing is pruned there"):
        serve.main([*words, "--pruned", url(slow)])


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:8000",
        "http://example.org",
        "https://127.0.0.1",
        "127.0.0.1:8000",
        "http://",
    ],
)
def test_no_other_machine_is_put_under_load(url):
    with pytest.raises(ValueError, match="load is put on a loopback address alone"):
        serve.find(url, 1)


def test_processor_time_has_that_of_processes_begun():
    before = serve.processor_seconds(os.getpid())
    code = "import os\nwhile sum(os.times()[:2]) < 0.1: pass\nprint(flush=True); input()"
    words = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert serve.processor_seconds(os.getpid()) >= before + 0.08
        assert 0.08 <= serve.processor_seconds(child.pid) < 5
        child.stdin.close()
    with pytest.raises(ValueError, match="there is no process 999999999"):
        serve.processor_seconds(999999999)


def test_addresses_of_this_machine():
    assert serve.address("http://localhost:81/v1") == ("127.0.0.1", 81)
    assert serve.address("http://[::1]:8000") == ("::1", 8000)
    assert serve.address("http://127.0.0.7") == ("127.0.0.7", 80)
    with pytest.raises(ValueError, match="nothing answers at http://127.0.0.1:9"):
        serve.find("http://127.0.0.1:9", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "65"], "concurrency=65; pass 1 to 64"),
        (["--rounds", "101"], "rounds=101; pass 1 to 100"),
        (["--rounds", "4"], "--rounds 4; pass at least 5"),
        (["--requests-per-client", "9"], "requests=288; pass 1 to 256"),
    ],
)
def test_a_run_is_bounded(words, message):
    with pytest.raises(ValueError, match=message):
        serve.parse(words)
