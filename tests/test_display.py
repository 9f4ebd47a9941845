from __future__ import annotations

import pytest

from popart_func.display.progress import show_progress
from popart_func.display.table import make_table, print_table


def test_a_table(capsys):
    rows = [[("sgd", "1.5"), ("popart", "20")], [("art", "3")]]
    print_table(make_table(("name", "error"), rows, words=("name",), title="Errors", notes=["in units"]))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Errors",
        "",
        " name   error",
        " ────────────",
        " sgd      1.5",
        " popart    20",
        "",
        " art        3",
        "",
        "in units",
    ]


def test_a_table_of_a_given_width_wraps_one_column(capsys):
    row = ("check", "a claim of many words that do not fit")
    print_table(make_table(("name", "claim"), [[row]], words=("name",), wrapped="claim", width=30), 30)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 30
    assert lines[3:5] == [" check a claim of many words", "       that do not fit"]


@pytest.mark.parametrize(("terminal", "drawn"), [(True, True), (False, False)])
def test_bars_are_drawn_on_a_terminal_and_messages_everywhere(capsys, monkeypatch, terminal, drawn):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "01"[terminal])
    monkeypatch.setattr("popart_func.display.progress.SECONDS", 0.0)
    with show_progress("samples") as progress:
        progress.show("one", 0, 4000)
        progress.say("half of it is done")
        progress.show("one", 2000, 4000, "one, halfway")
        progress.show("two", 5, 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert "half of it is done" in err
    assert ("one, halfway" in err and "2,000 of 4,000 samples" in err and "5 of 10 samples" in err) == drawn
    assert ("one, halfway: 50% after" in err) != drawn


def test_a_quiet_display_shows_nothing(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with show_progress("samples", quiet=True) as progress:
        progress.show("one", 1, 2)
        progress.say("nobody reads this")
    assert capsys.readouterr() == ("", "")


def test_a_rate_in_millions(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with show_progress("M lane-steps", rate=10**6) as progress:
        for done in (0, 10**6, 5 * 10**6, 10**7):
            progress.show("sweep", done, 10**7)
    assert " M lane-steps/s" in capsys.readouterr().err


def test_without_a_terminal_there_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    now = iter([0.0, 10.0, 31.0, 40.0, 70.0])
    monkeypatch.setattr("popart_func.display.progress.time.monotonic", lambda: next(now))
    with show_progress("samples") as progress:
        for done in (10, 20, 30, 40):
            progress.show("sweep", done, 40)
    assert capsys.readouterr().err == "sweep: 50% after 31 s\nsweep: 100% after 70 s\n"
