"""Secrets in text that a run keeps, shows or sends: passwords and keys in URLs, commands and the environment.

All that leaves a process goes through `redact`: the stored recipe, records, logs, status, error messages, MLflow.
"""

import logging
import os
import re
from typing import Any

REDACTED = "<redacted>"

_KEY_OF = "api|access|account|auth|deploy|encryption|private|secret|shared[-_]?access|signing|storage|subscription"
_WORD = (
    r"(?:[a-z0-9]*(?:token|passw(?:or)?d|passphrase)|secret|(?:user|ssh)?pass|pwd|pw|signature|sig|sas|hmac|jwt|"
    rf"credentials?|auth|authorization|sse-c-key|(?:{_KEY_OF})[-_.]?key)(?:[-_.](?:key|id|value))?"
)
"""What names of secrets end in."""
_NAME = rf"(?:[a-z0-9]*[-_.])*{_WORD}"
_HARMLESS_HEADER = (
    r"(?:accept|accept-\w+|user-agent|range|host|content-\w+|referer|origin|if-[\w-]+|cache-control|connection|date|"
    r"expect|pragma|te|transfer-encoding|x-requested-with)"
)
_HARMLESS_PARAMETER = re.compile(
    r"(?:version-?id|generation|id|(?:file)?name|file|path|prefix|dataset|split|revision|ref|driver|charset|mode|"
    r"sslmode|response-.*|alt|download|raw|dl)",
    re.IGNORECASE,
)

_URL_USER = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s/:@?#'\"]*):"
    r"(?P<password>[^\s/?#'\"]*|(?!\d{1,5}[/?#])[^\s@'\"]*)@",
    re.IGNORECASE,
)
_URL_TOKEN = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<token>[^\s/:@?#'\"$]{16,})@")
_QUERY = re.compile(r"(?P<before>://[^\s?#;'\"|]{0,2000}[?#;])(?P<query>[^\s'\"|<>]*)")
_PARAMETER = re.compile(r"(?P<name>[^=&?#;]+)=(?P<value>[^&#;]*)")
_SIGNED = re.compile(rf"{_NAME}", re.IGNORECASE)
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{8,}|.{20,}", re.DOTALL)
"""A value of a parameter that may be a secret, whatever it is called."""
_HEADER_OPTION = re.compile(
    rf"(?P<name>\s(?:-[a-zA-Z]*H|--(?:proxy-)?header)(?:\s+|=)?['\"]?(?!{_HARMLESS_HEADER}\s*:)[\w-]+\s*:\s*)"
    r"(?!(?:bearer\s+|basic\s+|token\s+)?\$)(?P<kind>(?:bearer|basic|token)\s+)?[^\s'\"][^'\"\n]*",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(?P<name>\b(?:(?:proxy-)?authorization|(?:set-)?cookie|(?:x|private|job|deploy)-[\w-]*(?:token|key|secret))\s*:"
    r"\s*)(?!(?:bearer\s+|basic\s+|token\s+)?\$)(?P<kind>(?:bearer|basic|token)\s+)?[^\s'\"][^'\"\n]*",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<kind>\bbearer\s+)(?!\$)[^\s'\"]{6,}", re.IGNORECASE)
_OPTION = re.compile(
    rf"(?P<name>(?:^|[\s;'\"(])--?(?:[\w-]*[-_])?{_WORD}(?:\s+|=))(?P<quote>['\"]?)"
    rf"(?!\$|-|/|\./|~|(?:env|file|fd):|stdin\b)(?:pass:)?(?P<value>[^\s'\"]+)",
    re.IGNORECASE,
)
_USER_OPTION = re.compile(
    r"(?P<name>\s(?:-u|--user|--proxy-user)(?:\s+|=)?['\"]?(?!\d+:\d+\b)[^\s:,'\"$-][^\s:,'\"$]*[:,])(?!\$|/)[^\s'\"]+"
)
_PROGRAMS = [
    re.compile(rf"(?P<name>\b(?:{program})\b[^|;&\n]*?\s{option}['\"]?)(?!\$){value}")
    for program, option, value in (
        ("sshpass", r"-p\s*", r"[^\s'\"]+"),
        ("openssl", r"-[kK]\s+", r"[^\s'\"]+"),
        ("7z[az]?|7zr|mysql|mysqldump", r"-p", r"[^\s'\"]+"),
        ("unzip", r"-P\s*", r"[^\s'\"]+"),
        ("swift", r"-K\s*", r"[^\s'\"]+"),
        ("curl|smbclient", r"-[a-zA-Z]*[uU]\s*['\"]?[^\s:%'\"$-][^\s:%'\"$]*[:%]", r"[^\s'\"]+"),
        ("curl", r"(?:-b|--cookie)(?:\s+|=)?", r"[^\s'\"]+=[^'\"\n]+"),
        ("curl", r"(?:-E|--cert)(?:\s+|=)?[^\s:'\"]+:", r"[^\s'\"]+"),
        ("curl", r"(?:-x|--proxy)(?:\s+|=)?['\"]?[^\s:@/'\"$]+:", r"[^\s@'\"]+(?=@)"),
        ("curl", r"(?:-[a-zA-Z]*u|--user)(?:\s+|=)?['\"]?:", r"[^\s'\"]+"),
        ("curl", r"(?:-[a-zA-Z]*u|--user)(?:\s+|=)?['\"]?", r"[^\s:'\"]{16,}(?=:(?:['\"\s]|$))"),
        (r"https?(?=\s)", r"(?:-a|--auth)(?:\s+|=)?['\"]?[^\s:'\"$]+:", r"[^\s'\"]+"),
        ("openssl", r"-pass(?:in|out)\s+", r"pass:[^\s'\"]+"),
        ("aws", r"configure\s+set\s+\S*(?:secret|token)\S*\s+", r"[^\s'\"]+"),
        ("mc", r"(?:alias\s+set|config\s+host\s+add)(?:\s+\S+){3}\s+", r"[^\s'\"]+"),
        ("b2", r"(?:authorize-account|account\s+authorize)\s+\S+\s+", r"[^\s'\"]+"),
        ("ncftpget|ncftpput", r"-p\s+", r"[^\s'\"]+"),
        ("redis-cli", r"-a\s+", r"[^\s'\"]+"),
        ("kinit", r"<<<\s*", r"[^\s'\"]+"),
        ("hdfs|hadoop", r"-Dfs\.[\w.-]*(?:key|secret|password|token)[\w.-]*=", r"[^\s'\"]+"),
    )
]
"""What single programs call their secrets."""
_PIPED = re.compile(
    r"(?P<name>\b(?:echo|printf)\s+(?:-\w+\s+)*['\"]?)(?!\$)(?P<value>[^|'\"\n]+?)(?P<rest>['\"]?\s*\|[^|;\n]*"
    r"(?:-fd\b|-stdin\b|\bstdin\b|\bsudo\s+-S\b|\bkinit\b))"
)
_ASSIGNED = re.compile(
    rf"(?P<name>(?:^|[\s;&:,'\"(]){_NAME}=)(?P<quote>['\"]?)(?!\$|{REDACTED}|(?:true|false)(?:[\s;&,:|)'\"]|$))[^\s;'\"]+",
    re.IGNORECASE,
)
_ENTRY = re.compile(
    rf"(?P<name>(?P<quote>['\"]){_NAME}(?P=quote)\s*[:=]\s*['\"])(?!\$|{REDACTED})[^'\"\n]+", re.IGNORECASE
)
_LINE = re.compile(
    rf"(?P<name>\b(?:[a-z0-9]*password|passphrase|(?:access|auth)[-_]?token|(?:{_KEY_OF})[-_]?key)\s*[:=]\s*)"
    r"(?!\$)(?=[^\s'\"]*\d)[^\s'\"]{8,}",
    re.IGNORECASE,
)
"""An entry of YAML or INI; of other text only what looks like a secret."""
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}|"
    r"sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_VARIABLE = re.compile(rf"{_NAME}", re.IGNORECASE)
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
    """Nested plain values with every text in them redacted, and whole what a key says is a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: _entry(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redact_values(item) for item in value)
    return value


def _entry(key: Any, value: Any) -> Any:
    secret = isinstance(key, str) and isinstance(value, str) and _SIGNED.fullmatch(key)
    return REDACTED if secret and value and not value.startswith("$") else redact_values(value)


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
        text = _QUERY.sub(_without_signature, text)
    text = _BEARER.sub(lambda m: m["kind"] + REDACTED, text)
    for header in (_HEADER_OPTION, _HEADER):
        text = header.sub(lambda m: m["name"] + (m["kind"] or "") + REDACTED, text)
    for option in (_USER_OPTION, *_PROGRAMS):
        text = option.sub(lambda m: m["name"] + REDACTED, text)
    text = _PIPED.sub(lambda m: m["name"] + REDACTED + m["rest"], text)
    for given in (_OPTION, _ASSIGNED):
        text = given.sub(lambda m: m["name"] + m["quote"] + REDACTED, text)
    for entry in (_ENTRY, _LINE):
        text = entry.sub(lambda m: m["name"] + REDACTED, text)
    return _KNOWN.sub(REDACTED, text)


def _without_password(match: re.Match[str]) -> str:
    if match["password"].startswith("$") or match["password"] == REDACTED:
        return match[0]
    return f"{match['scheme']}{match['user']}:{REDACTED}@"


def _without_signature(match: re.Match[str]) -> str:
    """A query goes as a whole: what it is signed with may be spread over its parameters."""
    for parameter in _PARAMETER.finditer(match["query"]):
        name, value = parameter["name"], parameter["value"]
        if not value or value.startswith("$") or _HARMLESS_PARAMETER.fullmatch(name):
            continue
        if _SIGNED.fullmatch(name) or _RANDOM.fullmatch(value):
            return match["before"] + REDACTED
    return match[0]


def _environment_secrets() -> list[str]:
    """Longest first: one may be part of another. Paths are none: they say where a secret lies."""
    found = {
        value
        for name, value in os.environ.items()
        if _VARIABLE.fullmatch(name) and len(value) >= _SHORTEST and value[0] not in "/.~" and not value.isdigit()
    }
    return sorted(found, key=len, reverse=True)
