"""Every benchmark can be asked what it measures; the figures are theirs to measure."""

import importlib
import re
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "jobs/benchmarks"
NAMES = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if re.search(r"(figures|student_quality)\.run\(", path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_measures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    benchmark = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert " ".join(benchmark.__doc__.split()) in told
    assert "--quick" in told
