"""Text by its origin, drafted or the target's own: in colour, in HTML, and the tree of a round."""

import re
from xml.etree import ElementTree

import pytest
from decode_cases import MARKOV, letters, right_draft, target_of

from beagle_jax import SpeculativeDecoder, chain, draw, dynamic_tree
from beagle_jax.commands.generate import show
from beagle_jax.decoding import origin
from beagle_jax.decoding.drawing import answer_html, tree_svg
from beagle_jax.decoding.origin import Origins, Span

LIMIT = {"max_new_tokens": 24}


def decoder_of(tree=None) -> SpeculativeDecoder:
    target = target_of(MARKOV, tokenizer=letters())
    return SpeculativeDecoder(target, right_draft(0.02), tree or chain(3))


def check_spans(spans: list[Span], answer) -> None:
    """One character is one token here, so the accepted drafts can be counted."""
    assert "".join(text for text, _ in spans) == answer.text
    drafted = sum(len(text) for text, is_drafted in spans if is_drafted)
    assert drafted == sum(depth * count for depth, count in enumerate(answer.accepted)) > 0
    assert not spans[0].drafted  # the prefill's token


def test_spans_are_the_text_by_origin():
    stream = decoder_of().stream("AB", **LIMIT)
    spans = list(stream.spans())
    check_spans(spans, stream.answer)


def test_an_origin_that_is_off_by_one_is_seen(monkeypatch):
    right = origin.origins
    monkeypatch.setattr(origin, "origins", lambda *args: [*right(*args)[1:], True])
    with pytest.raises(AssertionError):
        test_spans_are_the_text_by_origin()


def test_spans_end_before_a_stop_string_like_the_text():
    decoder = decoder_of()
    text = decoder.generate(["AB"], **LIMIT)[0].text
    stop = text[7:9]
    stream = decoder.stream("AB", stop=[stop], **LIMIT)
    spans = list(stream.spans())
    assert "".join(span.text for span in spans) == stream.answer.text == text.partition(stop)[0]


def test_colours_on_the_terminal(capsys):
    stream = decoder_of().stream("AB", **LIMIT)
    [answer] = show(stream, colour=True)
    printed = capsys.readouterr().out.removesuffix("\n")
    assert re.sub(r"\x1b\[\d+m", "", printed) == answer.text
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", printed))
    assert len(green) == sum(depth * count for depth, count in enumerate(answer.accepted))


def test_html_of_a_notebook_has_the_text_and_the_tree_of_a_round():
    decoder = decoder_of(dynamic_tree(2, 2, 4))
    drawing = draw(decoder, "AB", **LIMIT)
    check_spans(drawing.spans, drawing.answer)
    assert drawing.answer.tokens == decoder.generate(["AB"], **LIMIT)[0].tokens
    page = drawing._repr_html_()
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    names = [element.tag.rpartition("}")[2] for element in svg]
    assert names.count("rect") == names.count("text") == decoder.tree.size == 4
    assert names.count("path") == 3
    assert sum(drawing.tree.accepted) == 1 + max(
        depth for depth, count in enumerate(drawing.answer.accepted) if count
    )


def test_plain_decoding_has_no_tree():
    drawing = draw(SpeculativeDecoder(target_of(tokenizer=letters())), "AB", max_new_tokens=4)
    assert drawing.tree is None and "<svg" not in drawing._repr_html_()
    assert not any(span.drafted for span in drawing.spans)


def test_html_is_escaped():
    assert answer_html([Span("<b>&", True)]).endswith(">&lt;b&gt;&amp;</span>")
    svg = tree_svg(["<", '"a long text of a token"', "b"], [0, 0, 0], [True, True, False])
    texts = [element.text for element in ElementTree.fromstring(svg) if element.text]
    assert texts == ["<", '\\"a␣long␣te…', "b"]


def test_pieces_of_a_target_without_a_tokenizer_have_no_spans():
    decoder = SpeculativeDecoder(target_of(MARKOV), right_draft(0.02), chain(3))
    made = Origins(decoder.codec)
    for piece in decoder.session([[5, 6]], max_new_tokens=6):
        assert made.add(piece) == []
