"""Settings as the command line gives them."""

from pipeline.settings.command_line import argument_parser
from pipeline.settings.config import Config
from pipeline.settings.files import parse_config

URL = ("--data.url", "/data")


def parsed(*options):
    return parse_config(argument_parser("test"), Config, list(options))[0]
