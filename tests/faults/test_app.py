"""The page of `app.py`: bad requests are refused, and nothing leaves this machine.

Fault 25 of the table in `README.md` beside this file. All traffic stays on 127.0.0.1.
"""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dalle_mini_impl.cli.app import (
    CALLS_KEPT,
    MAX_PROMPT_LENGTH,
    MAX_SEED,
    MAX_WAITING,
    PageBackend,
)
from dalle_mini_impl.errors import UserError
from dalle_mini_impl.pipeline import TextToImagePipeline
from tests.reference import tiny
from tests.reference.runs import facts_of

REPOSITORY = Path(__file__).parents[2]
GOOD = ("a red disc", 1, 0, 2.0, 1.0)
XSS = "<img src=x onerror=window.__xss=1><script>window.__xss=1</script>"
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no prompt": (("", *GOOD[1:]), "prompt: got '', expected some text"),
    "spaces": (("  \n", *GOOD[1:]), "prompt: got"),
    "too long": (("x" * (MAX_PROMPT_LENGTH + 1), *GOOD[1:]), "prompt: got 501 characters"),
    "far too long": (("x" * 2_000_000, *GOOD[1:]), "prompt: got 2000000 characters"),
    "half a pair": (("\ud800", *GOOD[1:]), "prompt: got"),
    "no images": (("x", 0, *GOOD[2:]), "num_images: got '0', expected a whole number from 1 to 16"),
    "too many images": (("x", 17, *GOOD[2:]), "num_images: got '17'"),
    "10^9 images": (("x", 10**9, *GOOD[2:]), "num_images: got '1000000000'"),
    "half an image": (("x", 1.5, *GOOD[2:]), "num_images: got '1.5'"),
    "a seed below": (("x", 1, -1, 2.0, 1.0), "seed: got '-1'"),
    "a seed beyond": (("x", 1, MAX_SEED + 1, 2.0, 1.0), "seed: got '9007199254740992'"),
    "a huge seed": (("x", 1, 10**300, 2.0, 1.0), "seed: got '1000"),
    "guidance below": (("x", 1, 0, -1.0, 1.0), "guidance_scale: got '-1.0'"),
    "guidance beyond": (("x", 1, 0, 1e9, 1.0), "guidance_scale: got '1000000000.0'"),
    "no temperature": (("x", 1, 0, 2.0, 0.0), "temperature: got '0.0'"),
    "temperature beyond": (("x", 1, 0, 2.0, 99.0), "temperature: got '99.0'"),
}
# What has another type is stopped by Gradio, or by us.
ODD: dict[str, list[Any]] = {
    "a number for a prompt": [7, *GOOD[1:]],
    "a list for a prompt": [["x"], *GOOD[1:]],
    "an object for a prompt": [{"path": "/etc/passwd"}, *GOOD[1:]],
    "nothing for a prompt": [None, *GOOD[1:]],
    "a word for a count": ["x", "many", *GOOD[2:]],
    "nothing for a seed": ["x", 1, None, 2.0, 1.0],
    "a list for a seed": ["x", 1, [1], 2.0, 1.0],
    "an object for guidance": ["x", 1, 0, {}, 1.0],
    "NaN for a temperature": ["x", 1, 0, 2.0, float("nan")],
    "too few values": ["x"],
    "no values": [],
}


@pytest.fixture
def backend(model_dir: Path, tmp_path: Path) -> PageBackend:
    return PageBackend(TextToImagePipeline.from_pretrained(model_dir), tmp_path, model="tiny")


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case: str, backend: PageBackend) -> None:
    values, reason = BAD[case]
    with pytest.raises(UserError, match=f"^{re.escape(reason)}"):
        backend.generate(*values)
    assert not list(backend.folder.iterdir())


@pytest.mark.parametrize("case", [case for case in ODD if len(ODD[case]) == len(GOOD)])
@pytest.mark.usefixtures("unchecked")
def test_values_of_another_type_are_refused(case: str, backend: PageBackend) -> None:
    with pytest.raises(UserError, match=r"got .*expected "):
        backend.generate(*ODD[case])
    with pytest.raises(UserError, match="num_images: got 'True'"):
        backend.generate("x", True, *GOOD[2:])


def test_images_of_old_calls_are_deleted(backend: PageBackend) -> None:
    first = Path(backend.generate(*GOOD)[0][0])
    assert first.is_file()
    for _ in range(CALLS_KEPT):
        last = Path(backend.generate(*GOOD)[0][0])
    assert last.is_file()
    assert not first.exists()
    assert len(list(backend.folder.iterdir())) == CALLS_KEPT


@pytest.mark.usefixtures("compiler")
def test_metadata_names_the_compiled_pass(backend: PageBackend) -> None:
    backend.pipeline = tiny.build_pipeline(hidden_size=32)  # heads of 16, which it can compute
    assert "native" not in facts_of(backend.generate(*GOOD)[0][0])
    assert backend.pipeline.use_native("int8")
    assert facts_of(backend.generate(*GOOD)[0][0])["native"] == "int8"


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_page_with_a_compiled_pass(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    tiny.build_pipeline(hidden_size=32).save_pretrained(tmp_path / "model")
    number = free_port()
    server = start(tmp_path / "model", number, tmp_path, "--native", "float32")
    wait_until_served(server, number)
    try:
        status, kind, (_, files, _) = call(number, list(GOOD))
        assert (status, kind) == (200, "complete")
        _, content = request(number, "GET", f"/gradio_api/file={files[0]['path']}")
        assert facts_of(io.BytesIO(content))["native"] == "float32"
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(model: Path, port: int, folder: Path, *options: str) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    env |= {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    env |= {"GRADIO_ANALYTICS_ENABLED": "True"}
    env |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "scripts/app.py", "--model", str(model), "--port", str(port)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *options], env=env, cwd=REPOSITORY, **pipes)


def wait_until_served(server: "subprocess.Popen[str]", port: int) -> None:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert f"the page is at http://127.0.0.1:{port}" in line, line + server.stdout.read()


@pytest.fixture(scope="module")
def port(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real server; afterwards it must end well and leave nothing behind."""
    pytest.importorskip("gradio")
    number, folder = free_port(), tmp_path_factory.mktemp("temporary")
    server = start(model_dir, number, folder)
    wait_until_served(server, number)
    yield number
    server.send_signal(signal.SIGTERM)
    rest, _ = server.communicate(timeout=60)
    assert (server.returncode, rest.splitlines()[-1]) == (0, "stopped"), rest
    assert not list(folder.glob("dalle-app-*"))


def request(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def call(port: int, values: list[Any], *, keep_seed: bool = True) -> tuple[int, str, Any]:
    """One request by the raw API: (status, "complete" or "error", what came back)."""
    data = {"data": [*values, keep_seed]}
    status, content = request(port, "POST", "/gradio_api/call/generate", data)
    if status != http.client.OK:
        return status, "refused", content.decode()
    event = json.loads(content)["event_id"]
    status, stream = request(port, "GET", f"/gradio_api/call/generate/{event}")
    kind, data = re.findall(r"event: (\w+)\ndata: (.*)", stream.decode())[-1]
    return status, kind, json.loads(data)


@pytest.mark.slow
def test_files_hold_prompt_and_seed(port: int, model_dir: Path) -> None:
    status, kind, (gallery, files, _) = call(port, [XSS, 2, 5, 1.5, 0.9])
    assert (status, kind) == (200, "complete")
    assert [shown["caption"] for shown in gallery] == [f"{XSS} · seed {seed}" for seed in (5, 6)]
    pipeline = TextToImagePipeline.from_pretrained(model_dir)
    expected = pipeline(XSS, num_images=2, seed=5, guidance_scale=1.5, temperature=0.9).images
    for index, each in enumerate(expected):
        for file in (gallery[index]["image"], files[index]):
            status, content = request(port, "GET", f"/gradio_api/file={file['path']}")
            assert status == 200
            with Image.open(io.BytesIO(content)) as image:
                assert image.tobytes() == each.tobytes()
            facts = facts_of(io.BytesIO(content))
            assert (facts["prompt"], facts["seed"]) == (XSS, 5 + index)
            assert (facts["guidance_scale"], facts["temperature"]) == (1.5, 0.9)


@pytest.mark.slow
def test_every_press_gives_new_images_unless_the_seed_is_kept(port: int) -> None:
    shown = [call(port, list(GOOD), keep_seed=False)[2] for _ in range(3)]
    seeds = [seed for _, _, seed in shown]
    assert len({0, *seeds}) == 4
    assert [gallery[0]["caption"] for gallery, _, _ in shown] == [
        f"{GOOD[0]} · seed {seed}" for seed in seeds
    ]
    (gallery, _, seed), (again, _, _) = (call(port, list(GOOD))[2] for _ in range(2))
    assert (seed, gallery[0]["caption"]) == (0, again[0]["caption"])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*BAD, *ODD])
def test_the_raw_api_refuses_bad_values_and_goes_on(case: str, port: int) -> None:
    values = list(BAD[case][0]) if case in BAD else ODD[case]
    status, kind, data = call(port, values)
    becomes_text = case in ODD and values and isinstance(values[0], int | list | dict)
    assert kind in (("complete",) if becomes_text else ("error", "refused")), data
    assert status < 500
    assert "Traceback" not in str(data)
    assert call(port, list(GOOD))[1] == "complete"


@pytest.mark.slow
def test_of_fifty_requests_at_once_a_bounded_number_waits(port: int) -> None:
    values = ["a red disc", 16, 0, 2.0, 1.0]
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda _: call(port, values), range(50)))
    kinds = Counter((status, kind) for status, kind, _ in results)
    assert set(kinds) <= {(200, "complete"), (503, "refused")}
    assert kinds[200, "complete"] >= MAX_WAITING
    assert kinds[503, "refused"] > 0
    assert call(port, list(GOOD))[1] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=//etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/file=README.md",
        "/gradio_api/file=scripts/app.py",
        "/gradio_api/file=https://example.invalid/x.png",
        "/gradio_api/proxy=http://127.0.0.1:22/",
        "/static/../../../../etc/passwd",
        "/assets/../../../../etc/passwd",
        "/svelte/../../../../etc/passwd",
    ],
)
def test_no_file_of_the_machine_is_served(path: str, port: int) -> None:
    status, content = request(port, "GET", path)
    assert 400 <= status < 500 or (path.count("..") and b"root:" not in content), content[:300]
    assert b"root:" not in content
    assert b"import" not in content
    assert not content.startswith(b"# dalle")


@pytest.mark.slow
def test_no_way_around_the_queue_and_no_upload(port: int) -> None:
    status, _ = request(port, "POST", "/gradio_api/run/generate", {"data": [*GOOD, True]})
    assert 400 <= status < 500
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../x"\r\n\r\n'
    body = head + b"A" * 100_000 + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/gradio_api/upload", body, headers)
    assert 400 <= connection.getresponse().status < 500
    connection.close()


@pytest.mark.slow
def test_a_client_that_leaves_frees_the_worker(port: int) -> None:
    for _ in range(5):
        values = {"data": ["a red disc", 16, 0, 2.0, 1.0, True]}
        _, content = request(port, "POST", "/gradio_api/call/generate", values)
        event = json.loads(content)["event_id"]
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(f"GET /gradio_api/call/generate/{event} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        gone.recv(10)
        gone.close()
    before = time.monotonic()
    assert call(port, list(GOOD))[1] == "complete"
    assert time.monotonic() - before < 60


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux lists its sockets")
def test_it_listens_on_this_machine_alone(port: int) -> None:
    sockets = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    listening = [place for _, place, _, state, *_ in sockets if state == "0A"]
    assert [at for at in listening if at.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


@pytest.mark.slow
def test_page_loads_from_no_other_host(port: int) -> None:
    status, content = request(port, "GET", "/")
    assert status == 200
    assert not re.findall(rb'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:)?//', content)
    _, theme = request(port, "GET", "/theme.css")
    assert not re.search(rb"(@import|url\()\s*[\"']?(https?:)?//", theme)
    config = json.loads(request(port, "GET", "/config")[1])
    assert not config["analytics_enabled"]
    assert not config.get("stylesheets")
    kinds = {component["type"] for component in config["components"]}
    (gallery,) = (each for each in config["components"] if each["type"] == "gallery")
    assert gallery["props"]["buttons"] == ["download", "fullscreen"]  # none that shares
    assert not kinds & {"html", "markdown"}


@pytest.mark.slow
def test_browser_asks_no_other_host_and_runs_no_prompt(port: int, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda sent: asked.append(sent.url))
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("Prompt").fill(XSS)
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector("img[src*='file=']", timeout=60_000)
        page.locator("img[src*='file=']").first.click()
        page.wait_for_timeout(1000)
        page.screenshot(path=tmp_path / "page.png")
        assert page.evaluate("window.__xss") is None
        # An error, too, shows its text as text.
        page.get_by_label("Prompt").fill(" ")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("expected some text").first.wait_for(timeout=30_000)
        browser.close()
    hosts = {re.sub(r"^(\w+:(?://[^/]*)?).*", r"\1", url) for url in asked}
    assert f"http://127.0.0.1:{port}" in hosts
    assert hosts <= {f"http://127.0.0.1:{port}", "data:", "blob:http://127.0.0.1", "blob:"}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no model", "port taken"])
def test_unservable_is_one_line(case: str, model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = (tmp_path, free_port()) if case == "no model" else (model_dir, taken.getsockname()[1])
        server = start(*at, tmp_path)
        output, _ = server.communicate(timeout=300)
    assert server.returncode == 2, output
    assert output.startswith("error: model: " if case == "no model" else "error: port: ")
    assert output.count("\n") == 1
