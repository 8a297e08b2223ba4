"""Secrets in text that a run keeps, shows or sends: passwords and keys in URLs, commands and the environment.

All that leaves a process goes through `redact`: the stored recipe, records, logs, status, error messages, MLflow.
"""

import logging
import os
import re
from typing import Any

REDACTED = "<redacted>"

_WORD = (
    r"(?:token|secret|passw(?:or)?d|pwd|signature|sig|credentials?|api[-_]?key|access[-_]?key(?:[-_]?id)?|"
    r"private[-_]?key|auth|authorization)"
)
_URL_USER = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^\s/:@?#'\"]*):(?P<password>[^\s/?#'\"]*)@")
_URL_TOKEN = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<token>[^\s/:@?#'\"$]{16,})@")
_QUERY = re.compile(
    rf"(?P<before>://[^\s?'\"]*\?)(?P<query>[^\s'\"#|<>]*?\b[^\s=&'\"|]*{_WORD}=(?!\$)[^\s'\"|<>]*)", re.IGNORECASE
)
_HEADER = re.compile(
    r"(?P<name>\b(?:(?:proxy-)?authorization|cookie|(?:x|private|job|deploy)-[\w-]*(?:token|key|secret))\s*:\s*)"
    r"(?!(?:bearer\s+|basic\s+|token\s+)?\$)(?P<kind>(?:bearer|basic|token)\s+)?[^\s'\"][^'\"\n]*",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<kind>\bbearer\s+)(?!\$)[^\s'\"]{6,}", re.IGNORECASE)
_OPTION = re.compile(
    rf"(?P<name>(?:^|[\s;'\"(])--?[\w-]*{_WORD}(?:\s+|=))(?P<quote>['\"]?)(?!\$|-)(?P<value>[^\s'\"]+)", re.IGNORECASE
)
_USER_OPTION = re.compile(r"(?P<name>\s(?:-u|--user|--proxy-user)(?:\s+|=)?['\"]?[^\s:'\"$]+:)(?!\$)[^\s'\"]+")
_ASSIGNED = re.compile(
    rf"(?P<name>(?:^|[\s;&:'\"(])(?:[A-Za-z0-9]+_)*{_WORD}=)(?P<quote>['\"]?)(?!\$|{REDACTED})[^\s'\"]+", re.IGNORECASE
)
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}|"
    r"sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_VARIABLE = re.compile(rf"(?:^|_){_WORD}$", re.IGNORECASE)
_SHORTEST = 8


def redact(text: str) -> str:
    """`text` without the secrets in it: URLs lose passwords and signed queries, commands the credentials they are
    given, and nothing has the value of an environment variable whose name says that it is secret.

    `$NAME` stays: it names a secret, and the shell or the reader of a URL looks it up.
    """
    text = _without_shapes(text)
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    return text


def redact_values(value: Any) -> Any:
    """Nested plain values with every text in them redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: redact_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact_values(item) for item in value)
    return value


def same_address(path: str) -> str:
    """What a path, URL or command is known by, whoever signed it and whatever the environment is."""
    return _without_shapes(path)


class RedactingFormatter(logging.Formatter):
    """Formats a log record, its traceback too, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _without_shapes(text: str) -> str:
    if "://" in text:
        text = _URL_USER.sub(_without_password, text)
        text = _URL_TOKEN.sub(lambda m: f"{m['scheme']}{REDACTED}@", text)
        text = _QUERY.sub(lambda m: m["before"] + REDACTED, text)
    text = _BEARER.sub(lambda m: m["kind"] + REDACTED, text)
    text = _HEADER.sub(lambda m: m["name"] + (m["kind"] or "") + REDACTED, text)
    text = _USER_OPTION.sub(lambda m: m["name"] + REDACTED, text)
    text = _OPTION.sub(lambda m: m["name"] + m["quote"] + REDACTED, text)
    text = _ASSIGNED.sub(lambda m: m["name"] + m["quote"] + REDACTED, text)
    return _KNOWN.sub(REDACTED, text)


def _without_password(match: re.Match[str]) -> str:
    if match["password"].startswith("$") or match["password"] == REDACTED:
        return match[0]
    return f"{match['scheme']}{match['user']}:{REDACTED}@"


def _environment_secrets() -> list[str]:
    """Longest first: one may be part of another. Paths are none: they say where a secret lies."""
    found = {
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and len(value) >= _SHORTEST and value[0] not in "/.~" and not value.isdigit()
    }
    return sorted(found, key=len, reverse=True)
