"""Text from questions, models, files and branches in Markdown, where it must stay text: no markup, no HTML, no link.

`as_text` for a name or a sentence, `as_prose` for a sentence of this project with code between backticks and words from
outside, `fenced` for many lines, `without_markup` on a page of Streamlit.
"""

import re

_ACTIVE = re.compile(
    r"""([\\`*<&~$]                    # code, emphasis, HTML, entities, mathematics
    |(?<![^\W_])_|_(?![^\W_])         # not inside a word, where it means nothing
    |\](?=[(\[:])|\[(?=\^)            # the middle of a link, the start of a footnote
    |(?<!\S)\#|^[>+-])""",
    re.VERBOSE,
)
_LINKED = re.compile(r"((?<!\w)@|#)(?=\w)|(:)(?=//)|(\bwww)(?=\.)", re.IGNORECASE)
_DIRECTIVE = re.compile(r":(?=[a-z])", re.IGNORECASE)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def as_text(text: str) -> str:
    """Text that GitHub's Markdown shows as it is, in one line: no markup, no link, nobody mentioned. Bars are escaped
    by the table."""
    return _literal(" ".join(text.split()))


def without_markup(text: str) -> str:
    """Text that Streamlit's Markdown shows as it is, in one line, but that addresses in it may become links."""
    return _DIRECTIVE.sub(r"\\:", _ACTIVE.sub(r"\\\1", " ".join(text.split())))


def _literal(text: str) -> str:
    return _LINKED.sub(lambda match: f"{match[0]}<!-- -->", _ACTIVE.sub(r"\\\1", text))


def as_prose(text: str) -> str:
    """As `as_text`, but what stands between backticks remains code, in which nothing is active."""
    parts, end, text = [], 0, " ".join(text.split())
    for code in _CODE.finditer(text):
        parts += [_literal(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _literal(text[end:])])


def fenced(text: str) -> str:
    """Text letter by letter in a block of code that it cannot end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
