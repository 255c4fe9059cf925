"""Addresses at Google Drive, and its pages as gdown reads them."""

import pytest

from zoo import drive
from zoo.transfer import Unavailable

FORM = (
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="abc"><input type="hidden" name="confirm" value="t"></form>'
)


def test_the_address_of_a_file() -> None:
    assert drive.drive_source("abc").url == "https://drive.google.com/uc?export=download&id=abc"
    assert drive.drive_source("abc", "http://127.0.0.1:1/uc").url == "http://127.0.0.1:1/uc?export=download&id=abc"
    assert drive.browser_page("abc") == "https://drive.google.com/file/d/abc/view"


def test_a_page_to_confirm() -> None:
    address = drive.confirmed_address(f"<html>{FORM}</html>", "https://drive.google.com/uc?id=abc")
    assert address == "https://drive.usercontent.google.com/download?id=abc&confirm=t"
    relative = FORM.replace("https://drive.usercontent.google.com", "")
    assert drive.confirmed_address(relative, "http://127.0.0.1:1/uc?id=abc") == (
        "http://127.0.0.1:1/download?id=abc&confirm=t"
    )


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ('<p class="uc-error-subcaption">Too many <b>users</b></p>', "Google Drive says: Too many users$"),
        ("<html>Sign in</html>", "Google Drive says: Cannot retrieve the public link of the file"),
        ('<form id="download-form"></form>', "a page that has no link to the file"),
    ],
)
def test_a_page_without_a_file(page: str, expected: str) -> None:
    with pytest.raises(Unavailable, match=expected):
        drive.confirmed_address(page, "https://drive.google.com/uc?id=abc")


def test_long_reasons_are_cut() -> None:
    with pytest.raises(Unavailable) as caught:
        drive.confirmed_address(f'<p class="uc-error-subcaption">{"x" * 1000}</p>', "https://drive.google.com/uc")
    assert len(str(caught.value)) < 300
