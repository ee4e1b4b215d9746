"""Run transformers' own generic model tests with moesaic selected, and with its default beside it.

    python tools/hf_own_tests.py [--families mixtral gpt_oss] [--out FILE]

The released sources carry `tests/test_modeling_common.py`, the checks that every model of
transformers must pass, but neither the testers of the families nor the suites of generation and
export. So the sources of the installed version are downloaded with pip, those two suites become
empty classes, and each family gets a tester over its tiny configuration. With moesaic, a model for
which nothing was selected runs moesaic; the file holds what passed, failed and was skipped in both
runs. A test that fails with the default too says nothing of moesaic.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "transformers-tests"
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
CONFTEST = """
import os

import pytest

CALLS = [0]


def pytest_configure(config):
    if os.environ["MOESAIC_SELECTED"] != "moesaic":
        return
    import moesaic.integrations.transformers as adapter
    from transformers.integrations.moe import ExpertsInterface
    from transformers.modeling_utils import PreTrainedModel

    asked = PreTrainedModel.get_correct_experts_implementation
    PreTrainedModel.get_correct_experts_implementation = (
        lambda self, name: "moesaic" if name is None else asked(self, name)
    )

    def counted(self, *arguments):
        CALLS[0] += 1
        return adapter.moesaic_experts(self, *arguments)

    ExpertsInterface.register("moesaic", counted)


def pytest_unconfigure(config):
    print(f"CALLS {CALLS[0]}")
"""
TESTER = """
import unittest

from hf_families import model_class, tiny_config
from ..test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask


class Tester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        config = self.get_config()
        self.num_hidden_layers = config.num_hidden_layers
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.vocab_size = config.vocab_size

    def get_config(self):
        return tiny_config("{family}")

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {{"input_ids": ids, "attention_mask": mask}}


class FamilyTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (model_class("{family}"),)
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = Tester(self)
"""


def sources() -> Path:
    """The tests of the installed version, with stubs for what the archive does not carry."""
    import transformers

    version = transformers.__version__
    folder = CACHE / f"transformers-{version}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, f"transformers=={version}", "-d", str(CACHE)], check=True)
        with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
            wanted = [m for m in archive.getmembers() if "/tests/" in m.name]
            archive.extractall(CACHE, wanted, filter="data")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--target", str(CACHE / "packages"), "parameterized"], check=True)
    tests = folder / "tests"
    for name, text in STUBS.items():
        path = tests / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    (tests / "__init__.py").touch()
    (tests / "conftest.py").write_text(CONFTEST)
    return tests


def run(family: str, selected: str, timeout_s: float) -> dict[str, object]:
    """Outcome of every generic test of a family with an implementation selected."""
    tests = sources()
    folder = tests / "families"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    path = folder / f"test_{family}.py"
    path.write_text(textwrap.dedent(TESTER).format(family=family))
    report = CACHE / f"{family}-{selected}.xml"
    report.unlink(missing_ok=True)
    places = (ROOT / "src", ROOT / "tools", CACHE / "packages", tests.parent)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)), "MOESAIC_SELECTED": selected,
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "-s",
        "--timeout", "120", "-c", os.devnull, "--rootdir", str(tests.parent),
        f"--junit-xml={report}", str(path),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tests.parent, env=env, capture_output=True, text=True, timeout=timeout_s
    )
    if not report.exists():
        raise RuntimeError(
            f"{family}: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-500:]}"
        )
    outcome: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        outcome[kind].append(case.get("name", ""))
    calls = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("CALLS ")]
    return {**{k: sorted(v) for k, v in outcome.items()}, "calls": int(calls[-1]) if calls else 0}


def main(arguments: list[str] | None = None) -> int:
    """Run, write the file, print a table; 1 when moesaic fails what the default passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/transformers-own-tests.json")
    parser.add_argument("--timeout-s", type=float, default=900.0)
    chosen = parser.parse_args(arguments)
    found = json.loads(chosen.out.read_text("utf-8")) if chosen.out.exists() else {}
    worse = {}
    for family in chosen.families:
        both = {name: run(family, name, chosen.timeout_s) for name in ("moesaic", "default")}
        found[family] = both
        chosen.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
        ours, theirs = both["moesaic"], both["default"]
        worse[family] = sorted(set(ours["failed"]) - set(theirs["failed"]))  # type: ignore[call-overload]
        counts = {k: len(ours[k]) for k in ("passed", "failed", "skipped")}  # type: ignore[arg-type]
        print(f"{family}: {counts}, {ours['calls']} calls of moesaic", flush=True)
        print(f"  default fails {theirs['failed']}, moesaic alone {worse[family]}", flush=True)
    return int(any(worse.values()))


if __name__ == "__main__":
    sys.exit(main())
