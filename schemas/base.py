"""The base every schema stands on: strict in, immutable after."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import msgspec

# What decoding JSON that anybody may have written raises: msgspec's own error, but others where text is no UTF-8 and
# where lists lie in lists without end.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

# What no editor writes and some terminals obey; line ends and tabs are text, and so are marks of direction.
CONTROL = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
TEXT = rf"^[^{CONTROL}]*\Z"


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen struct that refuses unknown fields and positional arguments.

    `NEUTRAL` of a settings table names the fields added after a release, with the value at which they change
    nothing: there they are left out of keys, so that what was made before the field existed stays valid.
    """

    NEUTRAL: ClassVar[Mapping[str, object]] = MappingProxyType({})
