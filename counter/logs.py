"""How log lines look: as text, or as one JSON object per line (--log-format).  Times are in UTC in both."""

import json
import logging
import re
import time

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLACEHOLDER = re.compile(r"(?:(\w+)=)?%[-.0-9]*[a-z]")


class TextFormatter(logging.Formatter):
    """One line per message.  Control characters are escaped: parts of a message may come from a stranger."""

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record, datefmt=None):
        return _utc(record)

    def formatMessage(self, record):
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per message.  Each `key=value` in the message is a field of its own as well."""

    def format(self, record):
        line = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record.args, tuple):
            keys = _PLACEHOLDER.findall(str(record.msg))
            line.update((key, value) for key, value in zip(keys, record.args, strict=False) if key)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _utc(record):
    """Return the time of a record as RFC 3339 text with milliseconds, as in 2023-11-14T22:13:20.250Z."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def set_up(level, format):
    """Log to stderr from this level on; `format` is "text" or "json"."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # print no traceback when stderr cannot be written to, as on a full disk
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every quick try
