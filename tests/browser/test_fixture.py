"""The fixture itself: it sees a request and an error where there is one."""

import pytest

pytestmark = pytest.mark.browser


def test_requests_and_errors_are_seen(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>x</title><p>Read me</p>")
    browser.open(page, width=400)
    assert browser.find("p").text == "Read me"
    assert browser.run("return innerWidth") == 400
    assert (browser.console(), browser.requests()) == ([], [])
    page.write_text("<!DOCTYPE html><script src='other.js'></script><script>missing()</script>")
    browser.open(page)
    (request,) = browser.requests()
    assert request.endswith("/other.js")
    assert any("missing is not defined" in line for line in browser.console())
