import io
import json
import logging

import pytest

from adapter import logs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(stream, work) -> str:
    logs.setup(stream=stream)
    work(logging.getLogger("adapter.test"))
    return stream.getvalue()


def test_services_log_one_json_line_an_event():
    text = written(
        io.StringIO(), lambda log: log.info("snapshot published", extra={"fields": {"key": "ab12", "bytes": 3}})
    )
    line = json.loads(text)
    assert (line["event"], line["level"], line["key"], line["bytes"]) == ("snapshot published", "info", "ab12", 3)
    assert line["ts"].endswith("Z")


def test_a_traceback_stays_on_the_line():
    def fail(log):
        try:
            raise KeyError("gone")
        except KeyError:
            log.exception("failed")

    text = written(io.StringIO(), fail)
    assert text.count("\n") == 1
    assert "KeyError" in json.loads(text)["traceback"]


def test_people_get_aligned_text():
    text = written(Terminal(), lambda log: log.warning("slow", extra={"fields": {"seconds": 2}}))
    assert "warning slow  seconds=2" in text


@pytest.mark.parametrize("level", ["warning", "WARNING"])
def test_a_level_may_be_written_in_any_case(level):
    stream = io.StringIO()
    logs.setup(level=level, stream=stream)
    logging.getLogger("adapter.test").info("quiet")
    assert stream.getvalue() == ""
