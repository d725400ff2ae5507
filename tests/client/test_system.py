"""Children are started again, but not for ever."""

import threading
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from client.processes import Child
from client.system import MAX_RESTARTS, keep_running
from deltadock.errors import Unavailable


def test_a_child_that_keeps_ending_stops_the_system(tmp_path: Path) -> None:
    shown = StringIO()
    with (
        Child("broken", ["sh", "-c", "echo why; exit 3"], log=tmp_path / "broken.log") as child,
        pytest.raises(Unavailable, match=r"broken ended with status 3[\s\S]*why[\s\S]*keeps"),
    ):
        keep_running([child], threading.Event(), Console(file=shown))
    assert shown.getvalue().count("starting it again") == MAX_RESTARTS


def test_asking_to_stop_ends_the_watch(tmp_path: Path) -> None:
    stopping = threading.Event()
    stopping.set()
    with Child("sleeper", ["sleep", "600"], log=tmp_path / "sleeper.log") as child:
        keep_running([child], stopping, Console(file=StringIO()))
        assert child.poll() is None
