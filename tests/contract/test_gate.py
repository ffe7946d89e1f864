"""P19: the gate is shut, and each way through it would be seen."""

from __future__ import annotations

import pathlib

import pytest

from tests.contract import gate
from tests.house import ROOT


def test_nothing_in_the_tree_runs_what_came_from_outside() -> None:
    count, found = gate.walk(ROOT)
    assert found == []
    assert count >= 150


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "f(**{'trust_remote_code': True})",
        "numpy.load('x', allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "eval('1')",
        "exec(text)",
        "subprocess.run('x', shell=True)",
        "os.system('x')",
    ],
)
def test_a_planted_danger_is_seen(tmp_path: pathlib.Path, line: str) -> None:
    (tmp_path / "services" / "x").mkdir(parents=True)
    (tmp_path / "services" / "x" / "y.py").write_text(line + "\n")
    count, found = gate.walk(tmp_path)
    assert count == 1 and len(found) == 1


@pytest.mark.parametrize(
    "line",
    [
        "torch.load('x', weights_only=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile('x')",
        "subprocess.run(['x'])",
    ],
)
def test_the_safe_way_is_free(tmp_path: pathlib.Path, line: str) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "y.py").write_text(line + "\n")
    assert gate.walk(tmp_path) == (1, [])
