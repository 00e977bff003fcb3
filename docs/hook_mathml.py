"""MkDocs hook: formulas between $...$ and $$...$$ become MathML when the site is built, so pages need no script.

`pymdownx.arithmatex` (generic) marks the formulas; browsers draw MathML themselves. A command that latex2mathml does
not know, or TeX that no formula took in, is a warning, hence an error under `--strict`, not a backslash on the page.
"""

import html
import logging
import re

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.mathml")
LITERAL = re.compile(r"<(pre|code|math)\b.*?</\1>", re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, page, **_) -> str:
    """Replace every marked formula of one page's HTML."""

    def formula(match: re.Match) -> str:
        tag, tex = match[1], html.unescape(match[2]).strip()
        try:
            mathml = convert(tex, display="block" if tag == "div" else "inline")
        except Exception as error:
            log.warning("%s: formula %r: %s: %s", page.file.src_path, tex, type(error).__name__, error)
            return match[0]
        if unknown := re.search(r">\s*(\\[A-Za-z]+)\s*<", mathml):
            log.warning("%s: formula %r: unknown command %s", page.file.src_path, tex, unknown[1])
        return f"<{tag}>{mathml}</{tag}>"

    content = FORMULA.sub(formula, content)
    if left := re.search(r"\\[A-Za-z]+", LITERAL.sub("", content)):
        log.warning("%s: %s outside of a formula: is a $ or a brace missing?", page.file.src_path, left[0])
    return content
