"""launch/audit_packages.py against a database on loopback, and against none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

from click.testing import CliRunner

from launch.audit_packages import main, needed


def ask(answer: bytes, length: int | None = None):
    """(what the command did, the queries that it sent)"""
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"])
            self.send_response(200)
            if length:  # more than comes
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        done = CliRunner().invoke(main, ["--url", f"http://127.0.0.1:{server.server_address[1]}/"])
    return done, sent


def test_packages_with_known_weaknesses_are_named():
    names = list(needed())
    assert {"torch", "transformers", "numpy", "click"} <= set(names) and "cellpuzzles-grpo" not in names
    results = [{"vulns": [{"id": "GHSA-1"}, {"id": "GHSA-2"}]} if name == "click" else {} for name in names]
    done, sent = ask(json.dumps({"results": results}).encode())
    assert done.exit_code == 1 and f"click {version('click')}: GHSA-1, GHSA-2\n1 packages have" in done.output
    assert {"package": {"name": "numpy", "ecosystem": "PyPI"}, "version": version("numpy")} in sent
    assert [query["package"]["name"] for query in sent] == names
    assert not [query for query in sent if "+" in query["version"]]


def test_without_weaknesses_and_without_the_database_the_exit_code_is_0():
    done, _ = ask(json.dumps({"results": [{} for _ in needed()]}).encode())
    assert done.exit_code == 0 and "none has a known weakness" in done.output
    for answer in (b"<html>", b"[]", b'{"results": [{}]}', b'{"results": null}'):
        done, _ = ask(answer)
        assert done.exit_code == 0 and "nothing was checked: http://127.0.0.1" in done.output
    for url in ("http://127.0.0.1:9/", "api.osv.dev/v1/querybatch"):
        done = CliRunner().invoke(main, ["--url", url])
        assert done.exit_code == 0 and "nothing was checked" in done.output
    done, _ = ask(b"{}", length=100)
    assert done.exit_code == 0 and "nothing was checked" in done.output
