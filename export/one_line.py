"""What another library says on many lines, on one."""

from __future__ import annotations

import re

_LONGEST = 300
_TOOL = re.compile(r"^\W*(?:output|\w+\W? stderr):$", re.I | re.M)
"""After which torch and Triton quote a compiler, linker or assembler."""
# collect2 says no more than that ld failed.
_COMPLAINT = re.compile(
    r"^(?!collect2).*?((?:fatal )?\b(?:error|fatal) *: .+|\bld(?:\.\w+)?: (?!warning).+)$", re.M
)


def one_line(error: Exception) -> str:
    """The beginning of the message, or the name of the error when it has none; with a compiler's own first error."""
    text = str(error).strip()
    line = text.partition("\n")[0] or type(error).__name__
    quoted = _TOOL.search(text)
    if quoted and (complaint := _COMPLAINT.search(text, quoted.end())):
        line = f"{line}: {complaint[1].strip()}"
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
