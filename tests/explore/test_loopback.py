"""The page on the loopback address, and on no other."""

from __future__ import annotations

import socket
from http.client import HTTPConnection
from threading import Thread

import pytest

from ocvtp.explore.server import PageServer


@pytest.fixture(scope="module")
def server():
    with PageServer() as made:
        thread = Thread(target=made.serve_page, args=("<p>\u00e4</p>", "default-src 'none'"))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server, path="/", method="GET", **headers):
    """The answer with exactly these headers."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        for one in value if isinstance(value, list) else [value]:
            connection.putheader(name, one)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_it_listens_on_the_loopback_address_alone(server):
    assert server.socket.getsockname() == ("127.0.0.1", server.server_port)
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_names_of_this_machine_get_the_page(server, name):
    answer, body = ask(server, Host=f"{name}:{server.server_port}")
    assert (answer.status, body) == (200, "<p>\u00e4</p>")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert policy == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Python" not in answer.headers["Server"]


@pytest.mark.parametrize(
    "name",
    [
        "evil.example:{}",
        "127.0.0.1.evil.example:{}",
        "localhost",
        "127.0.0.1:1",
        "",
        "127.0.0.2:{}",
    ],
)
def test_other_names_are_refused(server, name):
    """A page of others whose name was made to lead here says that name."""
    answer, body = ask(server, Host=name.format(server.server_port))
    assert answer.status == 403
    assert body == f"this is {server.url}, by no other name\n"


def test_requests_without_a_name_or_with_two_are_refused(server):
    own = f"localhost:{server.server_port}"
    assert ask(server)[0].status == 403
    assert ask(server, Host=["evil.example", own])[0].status == 403


def test_there_is_one_page(server):
    own = {"Host": f"localhost:{server.server_port}"}
    assert ask(server, "/?a=b", **own)[0].status == 200
    for path in ("/page.html", "/../etc/passwd", "//etc", "/%2e%2e/"):
        assert ask(server, path, **own)[0].status == 404
    answer, body = ask(server, method="HEAD", **own)
    assert (answer.status, body) == (200, "")
    assert answer.headers["Content-Length"] == "9"
    assert ask(server, method="POST", **own)[0].status == 501


def test_ports_that_cannot_be_had_are_refused(server):
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{server.server_port} cannot be listened"):
        PageServer(server.server_port)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=f"--serve {port}; pass a port up to 65535"):
            PageServer(port)


def test_a_browser_that_goes_away_is_nothing_to_tell(server, capsys):
    with socket.create_connection(("127.0.0.1", server.server_port)) as gone:
        gone.sendall(b"GET / HT")
    own = f"127.0.0.1:{server.server_port}"
    assert ask(server, Host=own)[0].status == 200
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_it(monkeypatch):
    with PageServer() as server:
        monkeypatch.setattr(
            server, "serve_forever", lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        server.serve_page("", "")
    assert server.socket.fileno() == -1
