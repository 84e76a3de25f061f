"""A model that asks for code of its own to be run: nothing of it is, whatever its JSON files say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.flux2.micro import make_micro
from tests.faults.children import Bench, result
from tests.faults.conftest import Measured
from tests.faults.judge import STAGES
from tests.stages.project import edit

# What loaders that run a model's code look for, by the file it stands in.
ASKING: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "trust_remote_code": True,
        "custom_pipelines": {"default": "evil"},
        "transformer": ["evil", "Evil"],
        "scheduler": ["evil", "Evil"],
    },
    "transformer/config.json": {
        "auto_map": {"AutoModel": "evil.Evil"},
        "trust_remote_code": True,
        "_diffusers_version": "$(touch canary)",
    },
    "vae/config.json": {"auto_map": {"AutoModel": "evil.Evil"}, "_module": "evil"},
    "text_encoder/config.json": {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "nobody/evil--evil.Evil"},
        "architectures": ["evil.Evil"],
        "torch_dtype": "__import__('evil')",
        "custom_generate": "evil.py",
    },
    "tokenizer/tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "evil.Evil",
        "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    },
}
CODE = "from pathlib import Path\nPath({canary!r}).touch()\nclass Evil: pass\n"
# A module of the model's that is imported shows as such, even where its canary could not be made.
WATCHED = """
import sys
def hear(event, given):
    if event == "import" and given[0].partition(".")[0] in ("evil", "transformers", "diffusers", "torch"):
        raise SystemError(f"imports {given[0]}")
    if event in ("exec", "compile") and "evil" in str(given[-1]):
        raise SystemError(f"runs {given[-1]}")
sys.addaudithook(hear)
"""


def asking(folder: Path, canary: Path) -> Iterator[Path]:
    """Let every JSON file of a model ask for its code, which lies beside it; yield the files that say something."""
    for name, more in ASKING.items():
        path = folder / name
        own = json.loads(path.read_bytes()) if path.is_file() else {}
        path.write_text(json.dumps({**own, **more}))
        (path.parent / "evil.py").write_text(CODE.format(canary=str(canary)))
        yield path


def chain(bench: Bench) -> tuple[list[int], str]:
    """Run every stage; return the exit codes, and the LoRA's digest when there is one."""
    ran = [bench.stage(stage, script=WATCHED) for stage in STAGES]
    assert not any("Traceback" in each.err for each in ran), ran[-1].err
    trained = result(ran[STAGES.index("train")])
    return [each.code for each in ran], trained.get("digest") or ""


@pytest.mark.bar("L12")
def test_no_file_of_a_model_gets_code_of_its_own_to_run(bench: Bench, measured: Measured) -> None:
    bench.put(bench.after["nothing"])
    edit(bench.project.config, "[validate]", '[model]\nsource = "model"\n\n[validate]')
    make_micro(bench.root / "model")
    canary = bench.root / "canary"
    files = list(asking(bench.root / "model", canary))
    codes, digest = chain(bench)
    measured("L12", f"{len(files)} files ask for code: none imported, none run, the LoRA is the same ({codes})")
    assert not canary.exists()
    assert (codes, digest) == ([0] * len(STAGES), result(bench.ran["train"])["digest"])


@pytest.mark.bar("L12")
def test_tokenizer_that_names_code_is_read_as_data_or_refused(bench: Bench, measured: Measured) -> None:
    bench.put(bench.after["nothing"])
    edit(bench.project.config, "[validate]", '[model]\nsource = "model"\n\n[validate]')
    make_micro(bench.root / "model")
    bench.keep("own tokenizer")
    ended: dict[str, int] = {}
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
        bench.put(bench.after["own tokenizer"])
        path = bench.root / "model" / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps({**content, part: {"type": "Custom", "module": "evil", "code": CODE}}))
        assert bench.stage("validate", script=WATCHED).code == 0
        ran = bench.stage("encode-text", script=WATCHED)
        ended[part] = ran.code
        assert ran.code == 0 or "fix: " in ran.err
        assert "Traceback" not in ran.err
    measured("L12", f"tokenizer.json with a part of its own code, refused (4) or of no use here (0): {ended}")
    assert set(ended.values()) <= {0, 4}
    assert ended["model"] == ended["normalizer"] == 4
