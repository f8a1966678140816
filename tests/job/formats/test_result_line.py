"""Result lines have the keys of the OpenAI batch API, whatever became of the row."""

from batchwright.errors import RequestError
from batchwright.job.formats.result_line import error_line, success_line


def test_a_row_that_succeeded() -> None:
    line = success_line("a", {"x": "é"})
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert (line["custom_id"], line["error"]) == ("a", None)
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"] == {"x": "é"}


def test_a_row_that_failed() -> None:
    line = error_line("b", 2, RequestError("bad", code="c", param="p"))
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert (line["custom_id"], line["response"]) == ("b", None)
    assert line["error"] == {"code": "c", "message": "bad", "param": "p", "line": 2}


def test_ids_are_functions_of_the_row_alone() -> None:
    assert success_line("a", {})["id"] == success_line("a", {"x": 1})["id"]
    assert success_line("a", {})["id"] != success_line("b", {})["id"]
    error = RequestError("bad")
    assert error_line(None, 1, error)["id"] != error_line(None, 2, error)["id"]
    again = RequestError("used", code="duplicate_custom_id")
    ids = {error_line("a", line, again)["id"] for line in (2, 3)} | {success_line("a", {})["id"]}
    assert len(ids) == 3


def test_columns_pass_through() -> None:
    assert success_line("a", {}, {"stars": 5})["columns"] == {"stars": 5}
    assert error_line("a", 1, RequestError("bad"), {"stars": 5})["columns"] == {"stars": 5}
