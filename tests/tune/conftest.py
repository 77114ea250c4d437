"""What tests of a search's trials share: studies in which trials are played."""

import pytest
import sqlalchemy
from searches import PlayedSearch
from studies import Searches


@pytest.fixture(scope="module")
def without_waiting_for_the_disk():
    """SQLite does not wait until what it writes has come to the disk, which takes most of these tests' time."""

    def hurry(connection, _):
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", hurry)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", hurry)


@pytest.fixture
def search(tmp_path):
    """Begins a search with these settings of ``search``."""
    return lambda **settings: PlayedSearch(tmp_path, **settings)


@pytest.fixture
def searches(tmp_path):
    return Searches(tmp_path)
