"""Files on Google Drive: the address to ask, and what its pages in front of a file say.

Reading those pages is gdown's; the transfer itself is `zoo.transfer`'s, because gdown cannot be given another server,
resumes only what its own process left, and writes cookies into the home folder.
"""

import re
from urllib.parse import urlencode, urljoin

from zoo.transfer import Source, Unavailable

ENDPOINT = "https://drive.google.com/uc"
HOSTS = ("google.com", "googleusercontent.com")  # and their subdomains: where Drive sends its visitors
REASON_LENGTH = 200  # characters of Google's own words in a message


def drive_source(drive_id: str, endpoint: str = ENDPOINT) -> Source:
    """Where to ask for a file by its id.  endpoint: another server that imitates Drive, for tests."""
    url = f"{endpoint}?{urlencode({'export': 'download', 'id': drive_id})}"
    return Source(url, browser_page(drive_id), HOSTS, confirmed_address)


def browser_page(drive_id: str) -> str:
    """The address a person opens to get the file by hand."""
    return f"https://drive.google.com/file/d/{drive_id}/view"


def confirmed_address(page: str, url: str) -> str:
    """The address behind "cannot be scanned for viruses, download anyway?".  url: of the page itself.

    Raises Unavailable with Google's own words where the page offers no file: quota used up, no permission, removed.
    """
    from gdown.download import get_url_from_gdrive_confirmation
    from gdown.exceptions import FileURLRetrievalError

    try:
        return urljoin(url, get_url_from_gdrive_confirmation(page))
    except FileURLRetrievalError as error:
        words = " ".join(re.sub(r"<[^>]*>", " ", str(error)).split())
        raise Unavailable(f"Google Drive says: {words[:REASON_LENGTH]}") from error
    except (AssertionError, KeyError, ValueError) as error:
        raise Unavailable("Google Drive answers with a page that has no link to the file") from error
