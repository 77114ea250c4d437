"""The settings of evaluation."""

from pathlib import Path

import pytest
from command_lines import URL, parsed
from pydantic import ValidationError


@pytest.mark.parametrize(
    "url", ["https://host/w.pth?token=s3cret", "https://me:s3cret@host/w.pth", "http://s3cret@host/w.pth"]
)
def test_weights_urls_with_a_secret_are_refused(url):
    with pytest.raises(ValidationError, match="must not bear a query or a password"):
        parsed("--config", "lol_v1", *URL, "--evaluation.lpips-weights", url)


def test_weights_come_from_a_file_wherever_the_command_runs_or_from_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"w.pth": str(tmp_path / "w.pth"), "https://host/w.pth": "https://host/w.pth", "s3://b/w": "s3://b/w"}
    given |= {"HTTPS://Host/W.pth": "https://Host/W.pth", "S3://b/w": "s3://b/w", "~/w": str(Path.home() / "w")}
    for url, resolved in given.items():
        config = parsed("--config", "lol_v1", *URL, "--evaluation.lpips-weights", url)
        assert config.evaluation.lpips_weights == resolved
