"""Turns the equations of a page into MathML while the site is built; browsers draw it themselves.

`pymdownx.arithmatex` marks them; nothing is loaded from another host when a page is read.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page's HTML with every marked equation as MathML (mkdocs calls this).

    Raises PluginError for an equation that is marked in another form than the one expected.
    """
    content = _EQUATION.sub(_mathml, content)
    if 'class="arithmatex"' in content:
        raise PluginError(
            f"{page.file.src_uri}: an equation is not MathML; see docs/hooks/mathml.py"
        )
    return content


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["open"] == "[" else "inline"
    return convert(html.unescape(match["tex"]).strip(), display=display)
