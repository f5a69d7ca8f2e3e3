"""Extension of Griffe: docstrings in the form in which it shows them best."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Changes the titles of sections before docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename `Example:`, whose doctests would be text, and `Args:` of a named tuple, which has no constructor."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, griffe.Class) and any(str(base) == "NamedTuple" for base in obj.bases):
            text = re.sub(r"^Args:$", "Attributes:", text, flags=re.MULTILINE)
        obj.docstring.value = text
