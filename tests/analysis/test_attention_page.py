"""The page in a browser: it shows the model's numbers, what is pointed at changes it, and it is silent and alone."""

import json
import re

import numpy as np
import pytest
from chromium import chromium

from transformer.analysis.attention import AttentionMap, TextAttention
from transformer.analysis.attention_page import pack, render_page, unpack
from transformer.analysis.heads import most_concentrated_head
from transformer.types import Reading

LETTERS = list("the cat </script><b>")


def weights(layers, heads, queries, keys, *, seed=0, causal=True, sharp=2.0):
    """Rows that sum to one, of random logits."""
    logits = np.random.default_rng(seed).normal(size=(layers, heads, queries, keys)).astype(np.float32) * sharp
    if causal:
        logits = np.where(np.tri(queries, keys, keys - queries, dtype=bool), logits, -np.inf)
    found = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return tuple(found / found.sum(axis=-1, keepdims=True))


def decoder(texts, layers=2, heads=3, **how):
    ids = np.arange(len(texts), dtype=np.int32)
    maps = (AttentionMap("decoder", "decoder", weights(layers, heads, len(texts), len(texts), **how)),)
    return TextAttention(Reading({"decoder": ids}, (ids,), predicts="next token", of="decoder"), maps, None)


def data_of(text):
    """What the page's script reads."""
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


CANDIDATES = [[("q", 0.75, True), ("</script>", 0.25, False)] for _ in LETTERS]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a decoder, and of what it is."""
    seen, before = decoder(LETTERS), decoder(LETTERS, seed=1, sharp=0.1)
    about = {"heading": "a <model> & more", "about": "of two layers", "candidates": CANDIDATES}
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(
        render_page(seen, {"decoder": LETTERS}, initial=before, initial_name="before training", **about), "utf-8"
    )
    return path, seen, before


@pytest.fixture
def opened(browser, page):
    """The browser with the page in it, which must have asked for nothing else and said nothing."""
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page[0])
    browser.run(
        "document.querySelector('#thumbs button').click()"
    )  # without the pointer, which would point at something
    yield browser
    browser.run("1")
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page[0].resolve().as_uri()]


def shown(browser, name):
    """The rows of a list: token and number."""
    rows = f"[...document.querySelectorAll('#{name} li')]"
    return browser.run(
        f"{rows}.map(r => [r.querySelector('.token').textContent, +r.querySelector('output').textContent])"
    )


def test_what_it_shows_at_first(opened):
    assert opened.text("h1") == "a <model> & more"
    assert opened.run("document.querySelectorAll('#thumbs canvas').length") == 6
    assert opened.run("document.querySelectorAll('#from span').length") == len(LETTERS)
    assert opened.run("[...document.querySelectorAll('#from span')].map(s => s.textContent)") == LETTERS
    pixels = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    drawn = f"[...document.querySelectorAll('canvas')].map(c => {pixels}.some(x => x))"
    assert all(opened.run(drawn))


def test_pointing_at_a_token_shows_whom_it_attends_to_and_who_attends_to_it(opened, page):
    _, seen, _ = page
    for place in (5, 12):
        opened.hover(f"#from span[data-index='{place}']")
        row, column = seen.maps[0].weights[0][0][place], seen.maps[0].weights[0][0][:, place]
        for name, values in (("list-from", row), ("list-to", column)):
            found = shown(opened, name)
            order = np.argsort(-values, kind="stable")[:3]
            assert [token.strip("·") for token, _ in found[:3]] == [LETTERS[i].strip() for i in order]
            np.testing.assert_allclose([x for _, x in found[:3]], values[order], atol=1 / 255 + 0.005)
        assert opened.run("document.querySelector('#from span.focus').dataset.index") == str(place)
        assert f"“{LETTERS[place].replace(' ', '·')}”" in opened.text("#from-title")
    assert shown(opened, "list-next") == [["q", 0.75], ["</script>", 0.25]]
    assert opened.run("document.querySelectorAll('#list-next .right').length") == 1


def test_it_opens_on_the_most_concentrated_head(browser, page):
    layer, head = most_concentrated_head(page[1].maps[0].weights)
    browser.open(page[0])
    assert browser.text("#chosen") == f"Layer {layer + 1}, head {head + 1}" and (layer, head) != (0, 0)


def test_pointing_into_the_picture_reads_a_weight(opened, page):
    _, seen, _ = page
    expected = seen.maps[0].weights[0][0]
    for q, k in ((7, 3), (19, 19), (2, 9)):
        opened.hover("#large", (k + 0.5) / 20, (q + 0.5) / 20)
        text = opened.text("#readout")
        assert f"({q + 1}) attends to" in text and f"({k + 1}) with weight" in text
        assert abs(float(text.split()[-1]) - expected[q, k]) < 1 / 255 + 0.005
    assert expected[2, 9] == 0 and text.endswith(" 0")


def test_every_head_can_be_chosen_by_pointer_and_keys(opened, page):
    _, seen, _ = page
    before = opened.text("#numbers")
    opened.click("#thumbs button[data-layer='1'][data-head='2']")
    assert opened.text("#chosen") == "Layer 2, head 3" and opened.text("#numbers") != before
    opened.press("ArrowUp")
    opened.press("ArrowLeft")
    assert opened.text("#chosen") == "Layer 1, head 2"
    opened.hover("#from span[data-index='6']")
    row = seen.maps[0].weights[0][1][6]
    np.testing.assert_allclose(shown(opened, "list-from")[0][1], row.max(), atol=1 / 255 + 0.005)


def test_tokens_can_be_reached_by_keys(opened):
    opened.run("document.querySelector('#thumbs button[tabindex=\"0\"]').focus()")
    opened.press("Tab")  # the picture
    assert opened.run("document.activeElement.id") == "large"
    opened.press("Tab")
    for key, place in (("Home", "0"), ("ArrowRight", "1"), ("End", "19"), ("ArrowLeft", "18")):
        opened.press(key)
        assert opened.run("document.activeElement.dataset.index") == place
        assert opened.run("document.querySelector('#from span.focus').dataset.index") == place


def test_before_training(opened, page):
    _, _, before = page
    opened.hover("#from span[data-index='19']")
    trained = shown(opened, "list-from")
    opened.click("#states button:nth-child(2)")
    opened.run("new Promise(done => setTimeout(done, 200))")
    assert opened.run("document.querySelector('#states [aria-checked=true]').textContent") == "before training"
    found = shown(opened, "list-from")
    assert found != trained
    np.testing.assert_allclose(found[0][1], before.maps[0].weights[0][0][19].max(), atol=1 / 255 + 0.005)


def test_statistics_agree_with_the_weights(opened, page):
    _, seen, before = page
    cells = "[...document.querySelectorAll('#table tr')].slice(1).map(r => [...r.cells].map(c => +c.textContent))"
    table = np.array(opened.run(cells))
    assert table.shape == (6, 12)
    first = np.concatenate([w[:, 1:, 0].mean(axis=-1) for w in seen.maps[0].weights])
    at_first = np.concatenate([w[:, 1:, 0].mean(axis=-1) for w in before.maps[0].weights])
    np.testing.assert_allclose(table[:, 8], at_first, atol=6e-4)
    np.testing.assert_allclose(table[:, 9], first, atol=6e-4)
    assert opened.run("document.querySelectorAll('#charts figure').length") == 4
    assert opened.run("document.querySelectorAll('#divergence circle').length") == 12


def test_a_translator(browser, tmp_path):
    ids = {"encoder": np.arange(4, dtype=np.int32), "decoder": np.arange(3, dtype=np.int32)}
    maps = (
        AttentionMap("encoder", "encoder", weights(1, 2, 4, 4, causal=False)),
        AttentionMap("decoder", "decoder", weights(1, 2, 3, 3)),
        AttentionMap("decoder", "encoder", weights(1, 2, 3, 4, causal=False, seed=3)),
    )
    seen = TextAttention(Reading(ids, (), predicts="next token", of="decoder"), maps, None)
    texts = {"encoder": ["a", " dog", "s", "⟨end of text⟩"], "decoder": ["⟨start⟩", "ein", " Hund"]}
    path = tmp_path / "page.html"
    path.write_text(render_page(seen, texts, heading="pairs", about="", candidates=CANDIDATES[:3]), "utf-8")
    browser.problems.clear()
    browser.open(path)
    browser.click("#maps button:nth-child(3)")
    assert browser.text("#chosen") == "Decoder to encoder, layer 1, head 1"
    browser.hover("#to span[data-index='1']")
    np.testing.assert_allclose(
        [x for _, x in shown(browser, "list-from")], -np.sort(-maps[2].weights[0][0][1]), atol=0.01
    )
    assert len(shown(browser, "list-next")) == 2
    browser.hover("#from span[data-index='2']")
    np.testing.assert_allclose(
        [x for _, x in shown(browser, "list-to")], -np.sort(-maps[2].weights[0][0][:, 2]), atol=0.01
    )
    assert browser.run("document.querySelectorAll('#charts figure').length") == 2
    assert browser.problems == []


@pytest.mark.parametrize("first", ["word", "a"], ids=["words", "letters"])
def test_a_text_keeps_its_lines(browser, tmp_path, first):
    """Also where a token has the end of one line and the indentation of the next."""
    texts = [first, ":", "↵    ", "x", "↵↵  ", "y", "↵", "z"]
    path = tmp_path / "lines.html"
    path.write_text(render_page(decoder(texts), {"decoder": texts}, heading="", about=""), "utf-8")
    browser.open(path)
    boxes = "[...document.querySelectorAll('#from span')].map(s => s.getClientRects()[0])"
    left, top = np.transpose(browser.run(f"{boxes}.map(b => [b.left, b.top])"))[:, [0, 1, 3, 5, 7]]
    steps = np.diff(top) / (top[-1] - top[-2])
    np.testing.assert_allclose(steps, [0, 1, 2, 1], atol=0.1)
    assert left[0] == pytest.approx(left[-1], abs=2) and left[2] - left[0] > left[3] - left[0] > 5
    browser.hover("#from span[data-index='2']", 0.01, 0.9)  # the spaces in the second line
    assert "“↵····”" in browser.text("#from-title")


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(browser, page, dark):
    browser.problems.clear()
    browser.open(page[0], width=360, height=740, dark=dark, phone=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    light = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark and browser.problems == []


def test_a_weight_moves_by_less_than_a_255th():
    every = np.linspace(0, 1, 200_001, dtype=np.float32).reshape(1, 1, -1)
    assert np.abs(unpack(pack(every), every.shape) - every).max() < 1 / 255
    small = every[every < 0.01].reshape(1, 1, -1)
    assert np.abs(unpack(pack(small), small.shape) - small).max() < 0.1 / 255


def test_twelve_by_twelve_heads_at_300_tokens_are_15_megabytes_at_most():
    """Of random logits, whose weights compress least; an encoder has no causal half that is all zeros."""
    for causal, drawn in ((True, True), (False, False)):
        seen, before = (decoder(["word"] * 300, 12, 12, causal=causal, seed=seed, sharp=1.5) for seed in (0, 1))
        names = {"initial": before, "initial_name": "before training"}
        text = render_page(seen, {"decoder": ["word"] * 300}, heading="", about="", **names)
        assert len(text.encode()) <= 15e6
        layer = data_of(text)["maps"][0]["layers"][0]
        assert data_of(text)["drawn"] == bool(layer["initial"]) == drawn and len(layer["before"]["entropy"]) == 12


def test_nothing_in_the_text_ends_the_script(page):
    text = page[0].read_text("utf-8")
    assert data_of(text)["texts"]["decoder"] == LETTERS and "<model>" not in text
