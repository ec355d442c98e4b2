"""What counts as a word of a text."""

import re

# Thai and Lao, Myanmar, Khmer, kana, Han: written without spaces between words.
_SPACELESS = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff])"
)


def words_of(text: str) -> list[str]:
    """Return what stands between spaces; of scripts that have none, each sign."""
    return _SPACELESS.sub(r" \1 ", text).split()
