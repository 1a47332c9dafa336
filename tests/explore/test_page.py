"""The page without a browser: what it holds, and that nothing in it gets out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from ocvtp.explore import page
from ocvtp.explore.kept import Stage

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(1)>',
    "]]>&lt;b&gt;&amp;\u2028\u2029",
    "{{script}}{{data}}\\g<0>",
    "\u202ecod.exe\x1b[2J\x00\ud800",
]


class Elements(HTMLParser):
    """All elements of a page, and what is in them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.inside, self.last = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside.setdefault(tag, []).append("")
        self.last = tag

    def handle_endtag(self, tag):
        self.last = None

    def handle_data(self, data):
        if self.last is not None:
            self.inside[self.last][-1] += data


def facts(text):
    return {"model": text, "pruners": [{"label": text, "note": ""}], "prompts": [text, "b"]}


@pytest.mark.parametrize("text", HOSTILE)
def test_words_of_others_stay_words(text):
    plain, made = (Elements(page.to_html(facts(one))) for one in ("a", text))
    assert [tag for tag, _ in made.found] == [tag for tag, _ in plain.found]
    assert [names.keys() for _, names in made.found] == [names.keys() for _, names in plain.found]
    data, script = made.inside["script"]
    spelled = {"\u202e": "\\u202e", "\x1b": "\\x1b", "\x00": "\\x00", "\ud800": "\\ud800"}
    told = "".join(spelled.get(c, c) for c in text.replace("\u2028", "\\u2028"))
    told = told.replace("\u2029", "\\u2029")
    assert json.loads(data) == facts(told)
    assert not set("<>&") & set(data)
    assert script == plain.inside["script"][1]
    assert made.inside["title"] == [f"What pruners keep: {told}"]


def test_the_policy_allows_its_own_style_and_script_alone():
    text = page.to_html(facts("a"))
    made = Elements(text)
    (meta,) = (n for tag, n in made.found if tag == "meta" and "http-equiv" in n)
    rules = dict(rule.split(" ", 1) for rule in meta["content"].split("; "))

    def hashed(words):
        return f"'sha256-{base64.b64encode(hashlib.sha256(words.encode()).digest()).decode()}'"

    assert meta["http-equiv"] == "Content-Security-Policy"
    assert meta["content"] == page.policy()
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["script-src"] == hashed(made.inside["script"][1])
    assert rules["style-src"] == hashed(made.inside["style"][0])
    assert not any(name.startswith("on") or name == "style" for _, n in made.found for name in n)
    links = [n[name] for _, n in made.found for name in ("href", "src") if name in n]
    assert links == ["data:,", "#panels"]
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text


@pytest.mark.parametrize(("size", "expected"), [((900, 1800), (640, 320)), ((60, 40), (40, 60))])
def test_pictures_are_bounded(size, expected):
    pixels = np.full((*size, 3), (200, 30, 30), np.uint8)
    made = page.picture(pixels)
    kind, data = made["picture"].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64"
    assert image.format == "JPEG"
    assert image.size == (made["width"], made["height"]) == expected
    np.testing.assert_allclose(np.asarray(image)[5, 5], (200, 30, 30), atol=4)


def unpacked(text, total):
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))
    assert len(bits) < total + 8
    return bits[:total].nonzero()[0].tolist()


def numbers(text):
    return np.frombuffer(base64.b64decode(text), "<u2").tolist()


def test_stages_are_packed():
    masks = torch.zeros(300, 11)
    masks[299, :7], masks[4, 7:10] = 0.5, 0.2
    merged = torch.tensor([0, 0, 0, 3, 3, -1, -1, -1, 8, 8, 8])  # the last cell has no token
    stage = Stage(((2, 3), (2, 3)), torch.tensor([0, 3, 8]), masks, merged, ", layer 2")
    (made,) = page.look([stage])
    assert made["grids"] == [[2, 3], [2, 3]]
    assert made["place"] == ", layer 2"
    assert made["numSlots"] == 300
    assert unpacked(made["kept"], 12) == [0, 3, 8]
    assert numbers(made["slots"]) == [299] * 7 + [4] * 3 + [65535] * 2
    assert numbers(made["merged"]) == [0, 0, 0, 3, 3, 65535, 65535, 65535, 8, 8, 8, 65535]
    (plain,) = page.look([Stage(((1, 2),), torch.tensor([1]))])
    assert plain == {"grids": [[1, 2]], "place": "", "kept": "QA=="}
    assert page.palette([[plain]]) == []
    assert len(set(page.palette([[plain], [made]]))) == 256
    assert len(page.palette([[{"numSlots": 5}]])) == 5
