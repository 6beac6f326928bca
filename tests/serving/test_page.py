"""The page in a browser: what is typed is continued, and each token shows what it took."""

import pytest
from browser import PROGRAM, Browser
from serving_cases import Engine, while_serving

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
TEXT = " wörd <b>&\n".encode()


def test_the_page():
    engine = Engine(TEXT, end=False)

    def use(address):
        with Browser() as browser:
            browser.open(address)
            browser.until("document.title == 'made'")
            assert "64 tokens of context, 3 passes for a token at most" in browser.run("at('facts').textContent")
            browser.run("at('prompt').select()")
            browser.type("The <i>")
            browser.run("at('tokens').value = 12; at('seed').value = 5; at('go').click()")
            browser.until("document.body.dataset.done")
            shown = browser.run("[...document.querySelectorAll('.token')].map((node) => [node.textContent, "
                                "node.className, node.dataset.depth, node.dataset.flops])")  # fmt: skip
            all_of_it, costs = browser.run("at('text').textContent"), browser.run("at('sums').textContent")
            browser.until("!at('costs').hidden")
            colours = browser.run("[...document.querySelectorAll('.token')].map((node) => "
                                  "getComputedStyle(node).backgroundColor)")  # fmt: skip
            browser.run(
                "at('text').querySelector('.token').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
            )
            about = browser.run("at('about').textContent")
            browser.run("at('tokens').value = 100; at('go').click()")
            browser.until("!at('error').hidden")
            return shown, all_of_it, costs, colours, about, browser.run("at('error').textContent")

    (shown, all_of_it, costs, colours, about, error), _ = while_serving(use, engine)
    assert all_of_it == "The <i>" + TEXT.decode()  # as text, whatever it looks like
    assert [text for text, *_ in shown] == list(TEXT.decode())
    depths = [1 + i % 3 for i, byte in enumerate(TEXT) if byte != 0xC3]  # the first half of ö shows nothing
    assert [int(depth) for _, _, depth, _ in shown] == depths
    assert [float(cost) for *_, cost in shown] == [1e6 * depth for depth in depths]
    assert [("chunk" in kind) for _, kind, *_ in shown[:4]] == [True, False, True, True]  # ö begins within itself
    assert "12 tokens" in costs and "of 3 passes on average" in costs and "FLOP for a token on average" in costs
    assert len({*zip(depths, colours, strict=True)}) == len({*colours}) == 3
    assert 'token 32: " "' in about and "1 of 3 passes" in about and "1.00 MFLOP" in about
    assert "the context of this model is 64 tokens" in error
    request = engine.taken[0].request
    assert bytes(request.prompt.tolist()) == b"The <i>" and request.seed == 5 and request.tokens == 12


def test_the_page_asks_for_a_key_and_stops():
    engine = Engine(b"ab", end=False)
    engine.hang = True

    def use(address):
        with Browser() as browser:
            browser.open(address)
            browser.until("document.body.classList.contains('locked')")
            browser.run("at('key').value = 's3cret'; at('key').dispatchEvent(new Event('change'))")
            browser.until("document.title == 'made'")
            browser.run("at('go').click()")
            browser.until("document.querySelectorAll('.token').length == 2")
            assert browser.run("at('go').textContent") == "Stop"
            browser.run("at('go').click()")
            browser.until("document.body.dataset.done")
            return browser.run("at('go').textContent"), browser.run("at('error').hidden")

    assert while_serving(use, engine, key="s3cret") == (("Continue", True), True)
    assert engine.ended.get(timeout=5) == "cancelled"
