"""Colour repeats what words say: on terminals only, and never where NO_COLOR is set."""

from __future__ import annotations

import io
import sys

import pytest

from orchestrator.cli import render


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


RED, YELLOW, GREEN, DIM = "\x1b[1;31m", "\x1b[33m", "\x1b[32m", "\x1b[2m"


@pytest.mark.parametrize(
    ("word", "tone", "code"),
    [
        *((word, None, RED) for word in ("damaged", "quarantined", "BAD", "DAMAGE", "frozen", "aborted")),
        *((word, None, YELLOW) for word in ("WARN", "slow", "late: 3 s")),
        *((word, None, GREEN) for word in ("ok", "verified", "good")),
        ("quarantined: the loss had diverged", None, RED),
        ("step 40", "dim", DIM),
        ("step 40", None, ""),
        ("okay", None, ""),
    ],
)
@pytest.mark.usefixtures("output")
def test_a_word_has_its_colour_on_a_terminal(
    word: str, tone: render.Tone | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (render.toned(word, tone), render.table(["what"], [[render.toned(word, tone)]])):
        monkeypatch.setattr(sys, "stdout", screen := Screen())
        render.write([value])
        line = screen.getvalue().splitlines()[-1].rstrip()
        assert word in line and line.startswith(code or word), line


@pytest.mark.usefixtures("output")
@pytest.mark.parametrize("forced", ["", "FORCE_COLOR", "CLICOLOR_FORCE"])
def test_a_pipe_gets_words_only(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if forced:
        monkeypatch.setenv(forced, "1")
    monkeypatch.setattr(sys, "stdout", pipe := io.StringIO())
    render.write([render.toned("BAD"), render.table(["what"], [[render.toned("aborted")]])])
    assert "\x1b" not in pipe.getvalue() and "aborted" in pipe.getvalue()


@pytest.mark.usefixtures("output")
def test_no_color_leaves_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    render.write([render.toned("WARN"), render.toned("BAD")])
    assert "BAD" in screen.getvalue()
    assert not any(code in screen.getvalue() for code in ("[31m", "[1;31m", "[33m"))


@pytest.mark.usefixtures("output")
def test_what_a_run_has_stored_still_cannot_speak_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    render.write([render.toned("quarantined: \x1b[2J")])
    assert "\x1b[2J" not in screen.getvalue()
