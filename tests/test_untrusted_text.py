"""Text from outside stays text: in a terminal, in Markdown, on every page (docs/THREATS.md)."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clear.errors import say
from clear.project.scratch import write_params
from clear.report.markdown import as_prose, as_text, fenced
from clear.report.tables import Table
from tests.helpers.tables import write_tsv

ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> [a](javascript:hit) ![b](http://x.test/b.png)'


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "a\rb", "\u202eabc", "\x08"])
def test_a_terminal_is_told_nothing_it_would_obey(text, capsys):
    say(f"a{text}b")
    assert text not in capsys.readouterr().out


def test_names_that_a_terminal_would_obey_are_shown(clear, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml", ["profile=smoke"])
    evil = "a\x1b]0;owned\x07\x1b[2J"
    (tmp_path / "data/incoming" / evil).mkdir(parents=True)
    row = {"index": 1, "question": "q", "A": "x", "answer": "A", "prediction": "A"}
    file = write_tsv(tmp_path / f"{evil}.tsv", [row])
    for command in (("incoming", "list"), ("score", file), ("gate", evil), ("ask", evil, "q")):
        told = clear(*command)
        assert "\x1b" not in "".join(told[1:]) and "\\x1b]0;owned" in "".join(told[1:]), command


PIECES = ("<", ">", "[", "](", ")", "!", "`", "``", "*", "_", "~~", "\\", "&lt;", "#", "$", "|", "\n", "a", " ", "://")


@given(st.lists(st.sampled_from((*PIECES, ATTACK, "https", "www.x.test", "@you", "#12", "javascript:")), max_size=12))
@example(["`", "<", "b", ">", "`"])
@example(["\\", "`", "a", "`"])
def test_markdown_makes_nothing_of_text(pieces):
    """Read by a parser of CommonMark: text and code alone, and the empty comments that keep names from linking."""
    from markdown_it import MarkdownIt

    parser, text = MarkdownIt("commonmark").enable("strikethrough"), "".join(pieces)
    for shown in (as_text(text), as_prose(text)):
        inert = {"text", "code_inline", "html_inline", "text_special", "softbreak"}
        for token in parser.parse(f"x {shown} x"):
            assert token.type in ("paragraph_open", "inline", "paragraph_close"), shown
            for child in token.children or ():
                assert child.type in inert, (shown, child)
                assert child.type != "html_inline" or child.content == "<!-- -->", shown
    blocks = parser.parse(fenced(text))
    assert [token.type for token in blocks] == ["fence"] and blocks[0].content == f"{text}\n"


def test_no_page_runs_or_loads_what_stands_in_its_text(tmp_path):
    """Report, comparison, leaderboard and the server's page in a real browser; its own console would tell of a load."""
    from clear.project.compare.render import TEMPLATE as COMPARE
    from clear.project.compare.sections import Part
    from clear.report import leaderboard, render
    from clear.serve.page import render as docs
    from clear.serve.settings import Settings
    from tests.browser import chromium

    table = Table([ATTACK], [[ATTACK]], ATTACK)
    blocks = [ATTACK, table, render.Quote(ATTACK, ATTACK), render.Folded(ATTACK, table)]
    sections, marks = [render.Section(ATTACK, blocks)], lambda cell: ("", cell)
    parts = [Part(ATTACK, blocks, open=True), Part(ATTACK, blocks, page=True)]
    operation = {"description": ATTACK, "requestBody": {}}
    schemas = {ATTACK: {"description": ATTACK, "properties": {ATTACK: {"type": ATTACK}, "b": {"enum": [ATTACK]}}}}
    spec = {"info": {"title": ATTACK}, "paths": {ATTACK: {"post": operation}}, "components": {"schemas": schemas}}
    kinds = {"kind": ATTACK, "first": ATTACK, "lines": [ATTACK], "sections": parts}
    pages = {
        "report": render.html(ATTACK, [ATTACK], sections, tmp_path),
        "compare": render.page(COMPARE, tmp_path, marks, **kinds),
        "board": render.page(leaderboard.TEMPLATE, tmp_path, marks, reference=ATTACK, sections=sections),
        "docs": docs(spec, Settings(ATTACK)),
    }
    with chromium(tmp_path / "browser") as page:
        for name, text in pages.items():
            (tmp_path / f"{name}.html").write_text(text)
            page.open(f"file://{tmp_path}/{name}.html", 1000, 800)
            page.wait("document.readyState == 'complete' && document.title.length > 0")
            assert page.run("document.body.innerText").count("<script>window.hit=1</script>") >= 3, name
            assert page.run("[window.hit, document.querySelectorAll('img, a[href^=javascript]').length]") == [None, 0]
            assert page.run("document.scripts.length") == 0, name


def test_nobody_is_mentioned_and_nothing_is_linked():
    for shown in (as_text("@you #12 https://x.test www.x.test"), as_prose("@you #12 https://x.test www.x.test")):
        assert not re.search(r"@\w|#\d|://|www\.", shown)
    table = Table(["a"], [["@you | <b>"]], "see #12").escaped().markdown()
    assert "@you" not in table and "\\<b>" in table and "\\|" in table
