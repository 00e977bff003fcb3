"""What the programs of `benchmarks/` say where they have nothing to work on."""

from pathlib import Path

import pytest
from tests.cli_helpers import ROOT


def test_tables_of_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One line in place of a traceback: no file, an empty one, and one without policies."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import study

    file = tmp_path / "table.csv"
    for text in (None, "", "agent,env,seed,steps,policy,rule,return\nrfm,e,0,9,random,own,1\n"):
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit, match="holds no finished run"):
            study.tables(file)
