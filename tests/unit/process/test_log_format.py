"""Log lines: what a request wrote cannot end a line or steer a terminal."""

import logging

from hbserve.process import child
from hbserve.process.log_format import TextFormatter


def test_control_characters_of_a_message_are_escaped(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    record = logging.makeLogRecord(
        {"msg": "name %s", "args": ("a\n12:00 E api: forged\x1b[2J\x9b\r",), "levelname": "I"}
    )
    line = TextFormatter("api").format(record)
    assert line.endswith(r"I api: name a\n12:00 E api: forged\x1b[2J\x9b\x0d")
    own = logging.makeLogRecord({"msg": "two\nlines: %s", "args": (ValueError("a\nb"),), "levelname": "I"})
    assert TextFormatter("api").format(own).endswith("I api: two\n  | lines: a\n  | b")
    monkeypatch.setenv("HBSERVE_API_KEYS", "sk-secret-1")
    monkeypatch.setenv("OTHER", "kept")
    values = child.environment(3)
    assert "HBSERVE_API_KEYS" not in values
    assert values["OTHER"] == "kept"
