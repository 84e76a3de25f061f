"""Mistral's real vocabulary (Tekken) as a `tokenizer.json`, from the ranks that the package `mistral-common` has."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

from tests.golden import byte_pairs
from tests.golden.byte_pairs import added_token

# The first of Tekken's 1000 control tokens in the order of their ids; the ranks follow all of them.
CONTROL_TOKENS = """
<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS]
[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]
"""


def tekken_file() -> Path | None:
    """Return Tekken's file, without importing the package; None where it is not installed."""
    found = importlib.util.find_spec("mistral_common")
    return Path(found.submodule_search_locations[0]) / "data" / "tekken_240911.json" if found else None


def tokenizer_json(path: Path) -> dict[str, Any]:
    """Return the content of Mistral Small 3's tokenizer file as far as ids depend on it."""
    tekken = json.loads(path.read_bytes())
    config, controls = tekken["config"], CONTROL_TOKENS.split()
    count = config["default_num_special_tokens"]
    controls += [f"<SPECIAL_{index}>" for index in range(len(controls), count)]
    ranks = {
        base64.b64decode(token["token_bytes"]): token["rank"]
        for token in tekken["vocab"][: config["default_vocab_size"] - count]
    }
    # Like tiktoken, a word that is a token needs no merges.
    content = byte_pairs.tokenizer_json(ranks, config["pattern"], first_id=count, ignore_merges=True)
    content["model"]["vocab"] |= {token: index for index, token in enumerate(controls)}
    return content | {"added_tokens": [added_token(index, token) for index, token in enumerate(controls)]}
