"""How far gates of inserted workspaces open."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import gates

pytestmark = pytest.mark.usefixtures("threads")


def test_gates_move_by_no_more_than_their_rate_a_step_and_the_larger_rate_opens_them_further(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gates, "BATCH", 4)
    gates.main(["--steps", "3", "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    found = [float(line.split("|g| ")[1].split()[0]) for line in lines]
    assert [line.split(":")[0] for line in lines] == [f"gates at {times:2} x 0.001, 3 steps" for times in (1, 20)]
    assert 0 < found[0] <= 3 * gates.RATE * 1.01 < found[1] <= 3 * 20 * gates.RATE * 1.01
    with pytest.raises(SystemExit):
        gates.main(["--steps", "0"])
