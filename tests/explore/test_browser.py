"""The page in a browser, as people use it: by mouse and keyboard, on a telephone, in the dark."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import pytest
from chromium import NAMES, Chromium, find_chromium
from PIL import Image

from ocvtp.cli import main
from ocvtp.explore.page import policy
from ocvtp.explore.server import PageServer
from ocvtp.slots import OCPruner, OCPrunerConfig

pytestmark = pytest.mark.slow
BAD = "<img src=x onerror=document.title='bad'>"
PROMPTS = ["What is it?", "</script><script>document.title='bad'</script>"]
FASTV = "fastv:stages=[[1,K]]"
LONG = f"fps:num_keep={'9' * 150}"  # more than there are: it is left out, and said so


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if (binary := find_chromium()) is None:
        pytest.skip(f"needs a browser ({', '.join(NAMES)}); install one: apt-get install chromium")
    made = Chromium(binary, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of two images, two prompts, two budgets, and pruners of every kind."""
    folder = tmp_path_factory.mktemp("explored")
    sizes = {"feature_dim": 64, "hidden_dim": 32, "slot_dim": 16, "ffn_dim": 32, "layer": 3}
    OCPruner(OCPrunerConfig(grid_hw=(12, 12), **sizes)).save_pretrained(folder / "slots")
    for name in (f"{BAD}.png", "z.png"):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / name)
    words = ["explore", "--model", "random:tiny-llava", "--images", str(folder / "images")]
    words += [
        "--pruners",
        "ocvtp",
        "visionzip",
        FASTV,
        "tome:num_keep=36",
        LONG,
        "--skip-unfit",
        "--checkpoint",
        str(folder / "slots"),
    ]
    words += ["--num-keep", "36", "9", "--prompt", *PROMPTS, "--max-new-tokens", "2"]
    assert main([*words, "--output", str(folder / "page.html")]) == 0
    return (folder / "page.html").as_uri()


@pytest.fixture
def opened(browser, page):
    """The page as it is at first."""
    browser.look(1280, 900)
    browser.open(page)
    drawn = "[...document.querySelectorAll('canvas')].every((one) => one.width > 1)"
    browser.until(
        f"document.querySelectorAll('.panel').length === 3 && {drawn} && pictures[0] !== null"
    )
    return browser


def panel(number):
    return f".panel:nth-child({number})"


def labels(browser):
    return browser.run("[...document.querySelectorAll('.panel h2')].map((one) => one.textContent)")


def colours(browser, number):
    """How many colours the picture of a panel has, and its mean level."""
    return browser.run(
        f"(() => {{ const canvas = document.querySelector('{panel(number)} canvas');"
        " const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        " let sum = 0; const seen = new Set();"
        " for (let i = 0; i < data.length; i += 4) {"
        "  sum += data[i] + data[i + 1] + data[i + 2]; seen.add(data.slice(i, i + 3).join()); }"
        " return [seen.size, sum / data.length]; })()"
    )


def choose(browser, selector, value):
    browser.run(
        f"(() => {{ const one = document.querySelector('{selector}'); one.value = '{value}';"
        " one.dispatchEvent(new Event('change')); })()"
    )


def test_nothing_is_asked_of_anybody_and_words_stay_words(opened, page):
    asked = [url for url in opened.requests() if not url.startswith("data:")]
    assert asked == [page]
    assert opened.complaints() == []
    assert opened.run("document.title") == "What pruners keep: random:tiny-llava"
    assert opened.run("document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
    assert opened.text("#image-name") == f"1 of 2: {BAD}.png"
    choose(opened, "#prompt", 1)
    assert opened.run("document.querySelector('#prompt').selectedOptions[0].text") == PROMPTS[1]
    assert opened.run("document.title") == "What pruners keep: random:tiny-llava"
    assert opened.complaints() == []


def test_a_page_that_is_served_works_as_well(browser, page):
    text = Path(url2pathname(urlparse(page).path)).read_text(encoding="utf-8")
    with PageServer() as server:
        thread = Thread(target=server.serve_page, args=(text, policy()))
        thread.start()
        browser.look(1280, 900)
        browser.open(server.url)
        browser.until("document.querySelectorAll('.panel').length === 3")
        assert [url for url in browser.requests() if not url.startswith("data:")] == [server.url]
        assert browser.complaints() == []
        server.shutdown()
        thread.join()


def test_scripts_of_others_do_not_run(opened):
    """The policy holds in a browser: what gets into the page by whatever way is refused."""
    bad = "document.title = 'bad'"
    ways = [
        "const one = document.createElement('img'); one.src = 'http://127.0.0.1:9/x.png';"
        " document.body.append(one)",
        f"document.body.setAttribute('onclick', \"{bad}\"); document.body.click()",
        f"const two = document.createElement('script'); two.textContent = \"{bad}\";"
        " document.body.append(two)",
        f'document.body.innerHTML += "<b onclick={bad}>x</b>"',
    ]
    tried = "".join(f"try {{ {way} }} catch (error) {{ thrown.push(error.name) }} " for way in ways)
    assert (
        opened.run(f"(() => {{ const thrown = []; {tried} return thrown; }})()")
        == ["TypeError"] * 3
    )
    assert opened.run("document.title") == "What pruners keep: random:tiny-llava"
    assert "img-src" in " ".join(map(str, opened.complaints()))
    assert not any(url.startswith("http:") for url in opened.requests())


def test_clicks_and_choices(opened):
    assert labels(opened) == ["unpruned", "ocvtp", "visionzip"]
    assert opened.text(f"{panel(2)} .note").startswith("network: ")
    assert opened.text(f"{panel(1)} .counts") == "144 of 144 tokens kept"
    assert opened.text(f"{panel(2)} .counts") == "36 of 144 tokens kept"
    whole, pruned = colours(opened, 1), colours(opened, 2)
    assert pruned[1] < 0.75 * whole[1]  # what is dropped is dark
    opened.click("#strip button:nth-child(2)")
    assert opened.text("#image-name") == "2 of 2: z.png"
    opened.until("document.querySelector('#next').disabled")
    opened.click("#pruners label:nth-of-type(1)")
    opened.click("#pruners label:nth-of-type(4)")
    assert labels(opened) == ["ocvtp", "visionzip", FASTV]
    assert opened.text(f"{panel(3)} .counts") == "36 of 144 tokens kept, layer 1"
    opened.click("#pruners label:nth-of-type(5)")
    assert opened.text(f"{panel(4)} .counts") == "36 of 144 tokens kept"
    assert opened.text(f"{panel(4)} .note").startswith("merges inside the tower")
    choose(opened, "#against", 1)
    words = opened.text(f"{panel(2)} .key").replace(";", "").split()
    here, there, both = (int(word) for word in words if word.isdecimal())
    assert here + both == there + both == 36
    assert opened.run(f"document.querySelector('{panel(1)} .key').hidden")


def test_slots_and_what_is_merged(opened):
    plain = colours(opened, 2)
    choose(opened, "#mode", "slots")
    assert (
        opened.text(f"{panel(2)} .key") == "each token in the colour of its strongest of 36 slots"
    )
    assert colours(opened, 2) != plain
    opened.click(f"{panel(2)} canvas", 0.5 / 12, 0.5 / 12)
    assert opened.text(f"{panel(2)} .cell").startswith("row 1, column 1: ")
    assert ", of " in opened.text(f"{panel(2)} .cell")
    choose(opened, "#mode", "merged")
    assert "merged into the token with the dot" in opened.text(f"{panel(3)} .key")
    told = opened.text(f"{panel(3)} .cell")
    assert "merged into" in told or "kept alone" in told


def test_keys(opened):
    opened.press("ArrowRight")
    assert opened.text("#image-name") == "2 of 2: z.png"
    opened.press("ArrowLeft")
    assert opened.text("#image-name") == f"1 of 2: {BAD}.png"
    opened.press("ArrowDown")
    assert opened.text("#budget-name") == "9"
    assert opened.text(f"{panel(2)} .counts") == "9 of 144 tokens kept"
    opened.press("ArrowDown")
    assert opened.text("#budget-name") == "9"
    places = []
    for _ in range(15):
        opened.press("Tab")
        place = "document.activeElement.id || document.activeElement.tagName"
        places.append(opened.run(place))
        outline = opened.run(
            "getComputedStyle(document.activeElement.closest('.chip') ?? document.activeElement)"
            ".outlineStyle"
        )
        assert outline == "solid", places
    order = ["next", "budget", "mode", "against", "prompt"]
    assert [place for place in places if place in order] == order
    assert places.count("INPUT") == 5
    opened.run("document.querySelector('#budget').focus()")
    opened.press("ArrowRight")  # the slider's own
    assert (opened.text("#budget-name"), opened.text("#image-name")[0]) == ("36", "1")
    opened.run(f"document.querySelector('{panel(2)} canvas').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        opened.press(key)
    assert opened.text(f"{panel(3)} .cell").startswith("row 2, column 2: ")
    assert opened.text("#image-name")[0] == "1"
    opened.press("Escape")
    assert opened.text(f"{panel(3)} .cell") == ""
    opened.run("document.querySelector('#pruners input').focus()")
    opened.press(" ")
    assert labels(opened) == ["ocvtp", "visionzip"]


def luminance(colour):
    levels = np.array([int(level) for level in colour[4:-1].split(",")[:3]]) / 255
    linear = np.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("width", "dark"), [(400, True), (400, False), (1280, True)])
def test_small_windows_and_the_dark(opened, width, dark):
    opened.look(width, 800, dark=dark)
    opened.until("document.querySelector('canvas').width > 1")
    assert LONG in opened.text("#unfit li")
    assert opened.run("document.documentElement.scrollWidth") <= width
    widths = opened.run("[...document.querySelectorAll('canvas')].map((one) => one.clientWidth)")
    assert min(widths) > 250
    for selector in ("body", ".panel h2", ".time", ".key", "#about", ".answer"):
        colour, paper = opened.run(
            f"(() => {{ let one = document.querySelector('{selector}');"
            " const ink = getComputedStyle(one).color; const clear = 'rgba(0, 0, 0, 0)';"
            " while (getComputedStyle(one).backgroundColor === clear) one = one.parentElement;"
            " return [ink, getComputedStyle(one).backgroundColor]; })()"
        )
        light, deep = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) > 4.5, selector  # WCAG AA
        assert (luminance(paper) < 0.1) == dark
