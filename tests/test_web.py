"The web edition and a chapter in JupyterLab, in a real browser: the system's Chromium."
import html
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import torch
from filelock import FileLock
from helpers import ROOT, Fresh
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from convnext_nb.blocks import randomize
from convnext_nb.deploy import export_model, load_exported
from convnext_nb.model import ConvNeXt

CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
browser_test = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu"]
        yield p.chromium.launch(executable_path=CHROMIUM, args=flags).new_context()


def build(folder):
    "In a process of its own: `make book`."
    sys.argv = ["book/build.py", str(folder)]
    runpy.run_path(str(ROOT / "book" / "build.py"), run_name="__main__")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the web edition, built once for all processes that test it."
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            half = folder.with_name("half a site")
            p = Fresh(build, half)
            _, err = p.communicate()
            assert p.returncode == 0 and "WARNING" not in err, err
            half.rename(folder)
    return folder


class Quiet(SimpleHTTPRequestHandler):
    "Says nothing, also where the browser has gone on to another page."
    def log_message(self, *_): pass

    def copyfile(self, source, outputfile):
        with suppress(ConnectionError): super().copyfile(source, outputfile)


@pytest.fixture(scope="module")
def address(site):
    "The site on a server of this machine."
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def opened(browser, url):
    "A page at `url`, and what went wrong on it."
    page, wrong = browser.new_page(), []
    page.set_viewport_size(dict(width=1280, height=900))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("response", lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.goto(url)
    yield page, wrong
    page.close()


def every(page, selector, value):
    "A value of every element `e` of a page."
    return page.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => {value})")


def test_every_chapter_module_and_result_has_a_page(site):
    results = (ROOT / "benchmarks" / "results").glob("*.json")
    pages = [f"nbs/{p.stem}" for p in CHAPTERS] + [f"results/{p.stem}" for p in results]
    pages += [f"api/{p.stem.partition('_')[2]}" for p in CHAPTERS]
    for name in [*pages, "index", "nbs/usage", "nbs/glossary", "CONTRIBUTING", "CHANGELOG"]:
        assert (site / f"{name}.html").exists()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.name)
def test_a_chapter_shows_what_it_should(site, path):
    page = (site / "nbs" / f"{path.stem}.html").read_text()
    body = page[page.index("<article"):page.index("</article>")]
    assert "#| " not in html.unescape(re.sub(r"<[^>]*>", "", body)), "a directive"
    assert "get_ipython" not in body and "colab-badge" not in body, "a hidden cell"
    sources = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    exported = sum(bool(re.search(r"^#\| exporti?$", source, re.M)) for source in sources
                   if not re.search(r"^#\| hide$", source, re.M))
    assert body.count("tag_exported") == exported > 1
    answers = re.findall(r"<details[^>]*>", body)
    assert len(answers) == 3 and not any("open" in tag for tag in answers)
    badge = next(c.source for c in nbformat.read(path, 4).cells if "colab-badge" in c.source)
    assert f'href="{badge[badge.rindex("(") + 1:-1]}"' in page, "the button that opens Colab"


@browser_test
def test_every_page_opens_and_every_link_leads_somewhere(browser, site, address):
    found = (p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    pages = sorted(name for name in found if not name.startswith("_"))
    problems, anchors, links = [], {}, set()
    with opened(browser, f"{address}/index.html") as (page, wrong):
        for name in pages:
            wrong.clear()
            page.goto(f"{address}/{name}")
            for width in (390, 1280):
                page.set_viewport_size(dict(width=width, height=900))
                wide = page.evaluate("document.documentElement.scrollWidth")
                if wide > width: problems.append(f"{name}: {wide} pixels wide of {width}")
            problems += [f"{name}: {text}" for text in wrong]
            anchors[name] = set(every(page, "[id]", "e.id"))
            loaded = every(page, "img, script[src], link[rel=stylesheet]", "e.src || e.href")
            problems += [f"{name} loads {u}" for u in loaded if not u.startswith(address)]
            if name.startswith("nbs/0"): assert page.locator("button.copybtn").count() > 10
            links |= {(name, u) for u in every(page, "a[href], link[href], img, script[src]",
                                               "e.href || e.src")}
    for name, url in sorted(links):
        if not url.startswith(address): continue
        parts = urlsplit(url)
        target = unquote(parts.path).strip("/") or "index.html"
        if not (site / target).is_file(): problems.append(f"{name}: {target} is not there")
        elif parts.fragment and unquote(parts.fragment) not in anchors.get(target, ()):
            problems.append(f"{name}: {target} has no #{parts.fragment}")
    assert not problems, "\n".join(problems)


@browser_test
def test_search_finds_layer_scale(browser, address):
    with opened(browser, f"{address}/search.html?q=LayerScale") as (page, wrong):
        results = page.locator("#search-results li a[href*='nbs/00_blocks.html']")
        expect(results.first).to_be_visible(timeout=30_000)
        results.first.click()
        expect(page.locator("article h1").first).to_contain_text("Blocks")
        assert not wrong


@browser_test
def test_api_page_shows_parameters(browser, address):
    with opened(browser, f"{address}/api/pretrained.html") as (page, wrong):
        heading = page.get_by_role("heading", name="load_weights", level=2)
        section = page.locator("section", has=heading).last
        for parameter in ("model", "source", "num_classes"):
            expect(section.locator("td", has_text=parameter).first).to_be_visible()
        section.get_by_role("link", name="the cell that defines it").click()
        expect(page.locator(":target ~ div.cell").first).to_contain_text("def load_weights(")
        assert not wrong


def wait_for(url, seconds=60):
    "Until the server listens: on a busy machine it tells its address before it does."
    end = time.monotonic() + seconds
    while True:
        try: return socket.create_connection((url.hostname, url.port), timeout=5).close()
        except OSError:
            if time.monotonic() > end: raise
            time.sleep(.2)


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a folder with chapter 00; its address."
    shutil.copy(CHAPTERS[0], tmp_path)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
               "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=",
               f"--notebook-dir={tmp_path}"]
    folders = {f"JUPYTER_{k}_DIR": str(tmp_path / k) for k in ("CONFIG", "RUNTIME")}
    env = os.environ | folders | dict(JUPYTER_PREFER_ENV_PATH="1")
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        words = (word for line in process.stderr for word in line.split())
        url = next(word for word in words if word.startswith("http://127"))
        Thread(target=process.stderr.read, daemon=True).start()  # so that the pipe never fills
        wait_for(urlsplit(url))
        yield url
        process.terminate()


@browser_test
def test_run_all_in_jupyterlab(browser, lab, tmp_path):
    "As a reader runs chapter 00: opened in JupyterLab, Run All, no error, every cell run."
    with opened(browser, f"{lab}/tree/{CHAPTERS[0].name}") as (page, _):
        expect(page.get_by_text("| Idle")).to_be_visible(timeout=60_000)
        page.locator(".jp-Notebook").click()
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile(r"^Run All( Cells)?$")).click()
        end, code = time.monotonic() + 120, []
        while not code or not (code[-1].execution_count or errors(code)):
            assert time.monotonic() < end, "the last cell was not reached"
            page.wait_for_timeout(1000)
            page.keyboard.press("Control+s")
            # while it is written, it is no notebook yet
            try: saved = nbformat.read(tmp_path / CHAPTERS[0].name, as_version=4)
            except nbformat.reader.NotJSONError: continue
            code = [c for c in saved.cells if c.cell_type == "code"]
        assert not errors(code)
        assert all(c.execution_count for c in code if c.source)


def errors(cells):
    return [o for c in cells for o in c.outputs if o.output_type == "error"]


PAGE = """<!doctype html><link rel="icon" href="data:,">{snippet}
<script>
async function ask(pixels) {{
  ort.env.wasm.numThreads = 1;
  return Array.from(await classify("net.onnx", new Uint8Array(pixels), 32, 32));
}}
</script>"""


@pytest.fixture(scope="module")
def onnxruntime_web(tmp_path_factory):
    "The files of ONNX Runtime Web, from the registry that npm knows."
    folder = tmp_path_factory.mktemp("web")
    npm = shutil.which("npm")
    if not npm: pytest.skip("needs npm")
    command = [npm, "pack", "onnxruntime-web@1.30.0", "--fetch-retries", "0"]
    try: subprocess.run(command, cwd=folder, timeout=120, capture_output=True, check=True)
    except subprocess.SubprocessError as e: pytest.skip(f"npm cannot get onnxruntime-web: {e}")
    with tarfile.open(next(folder.glob("*.tgz"))) as tar: tar.extractall(folder, filter="data")
    return folder / "package" / "dist"


@browser_test
def test_the_chapters_page_answers_as_python_does(browser, onnxruntime_web):
    "Int8 and float32 files of chapter 09 in ONNX Runtime Web."
    chapter = (ROOT / "nbs" / "09_deploy.ipynb").read_text()
    text = next("".join(c["source"]) for c in json.loads(chapter)["cells"]
                if "```html" in "".join(c["source"]))
    snippet = re.search("```html\n(.*?)```", text, re.S)[1]
    (onnxruntime_web / "index.html").write_text(PAGE.format(snippet=snippet))
    net = randomize(ConvNeXt(depths=(1, 1), dims=(16, 32), patch_size=2, num_classes=10)).eval()
    net.pretrained_cfg = dict(input_size=(3, 32, 32), crop_pct=1.)
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (1, 32, 32, 3), generator=g, dtype=torch.uint8)
    pictures = torch.randint(256, (32, 32, 32, 3), generator=g, dtype=torch.uint8)
    images = [Image.fromarray(x.numpy()) for x in pictures]
    serve = partial(Quiet, directory=onnxruntime_web)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for int8 in (False, True):
            path = onnxruntime_web / "net.onnx"
            export_model(net, path, pixels=True, calibrate=images if int8 else None)
            url = f"http://127.0.0.1:{server.server_port}/index.html"
            with opened(browser, url) as (page, wrong):
                there = page.evaluate("pixels => ask(pixels)", pixels.flatten().tolist())
            here = load_exported(path)(pixels)[0]
            assert not wrong
            there = torch.tensor(there)
            assert there.argmax() == here.argmax()
            assert torch.allclose(there, here, atol=.02 if int8 else 1e-4)
        server.shutdown()
