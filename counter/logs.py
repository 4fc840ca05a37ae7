"""How log lines look: as text, or as one JSON object per line (--log-format)."""

import json
import logging
import re
import time

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLACEHOLDER = re.compile(r"(?:(\w+)=)?%[-.0-9]*[a-z]")


class TextFormatter(logging.Formatter):
    """One line for a message, whatever others managed to put in: control characters are escaped."""

    def formatMessage(self, record):
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """The message, and once more, as fields of their own, the values it has as `key=value`."""

    def format(self, record):
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
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


def set_up(level, format):
    """Log to stderr from this level on, in this format: `text` or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # a full disk behind stderr is no reason for tracebacks
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of every quick try
