"""Turns text from clients into values; raises Refused, which says what to send instead."""

import json
import re

from counter import http1
from counter.http1 import Refused
from counter.ids import AMOUNT_MAX, NAME, parse_increment_id
from counter.windows import canonical, is_series, parse_series

WAIT_DEFAULT_S, WAIT_MAX_S = 5.0, 60.0  # of ?timeout=
COUNTS_MAX = 1000  # counters in one answer
ACTIVE = "active"  # of ?fresh=: peers that are lost are not asked
BY_NAME, BY_VALUE = "name", "value"  # orders of counters

BATCH_MAX = 1000  # names in a batch

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})\Z", re.ASCII)
_NAMES = re.compile(r"(?:(?!\.\.?/)[A-Za-z0-9._:-]{1,128}/)+\Z")  # many, each with a slash after it
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,9})?\Z", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9._:@-]{0,144}\Z")
_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")


def idempotency_key(text):
    key = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
    if not _KEY.match(key):
        raise Refused(400, "an Idempotency-Key is 1 to 255 visible ASCII characters, in double quotes or not")
    return key


def acks(text):
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise Refused(400, "acks must be an integer of at least 1: on how many nodes, this one included")
    return int(text)


def name(text):
    return checked_name(http1.decode_component(text))


def checked_name(name):
    if is_series(name):
        try:
            parse_series(name)
        except ValueError as error:
            raise Refused(400, str(error)) from None
    elif not NAME.match(name):
        raise Refused(400, "a counter's name is 1 to 128 of A-Z a-z 0-9 . _ : - and neither . nor ..")
    return name


def amount(text):
    return checked_amount(int(text) if _INTEGER.match(text) else None)


def checked_amount(amount):
    if type(amount) is not int or not 0 < abs(amount) <= AMOUNT_MAX:
        raise Refused(400, "amount must be an integer other than 0, from -(2**53-1) to 2**53-1")
    return amount


def body_amount(body, in_query):
    """Return the amount in a JSON body; without one there, that of the query (None: not given), or 1."""
    fields = _fields(body, 'such as {"amount": 5}, or empty')
    if fields.keys() - {"amount"}:
        raise Refused(400, 'the body must be a JSON object with no other field than "amount"')
    if not fields:
        return in_query or 1
    if in_query is not None:
        raise Refused(400, "send amount in the query or in the body, not in both")
    return checked_amount(fields["amount"])


def batch(body):
    """Return the amounts in a JSON body, {name: amount}."""
    amounts = _fields(body, 'such as {"visits": 1, "clicks": 3}')
    if not 1 <= len(amounts) <= BATCH_MAX:
        raise Refused(400, f"a batch has 1 to {BATCH_MAX:,} names, this one has {len(amounts):,}")
    # All at once: one by one, checking took longer than counting.
    names, values = "/".join(amounts) + "/", amounts.values()
    are_names = names.count("/") == len(amounts) and _NAMES.match(names)
    if not are_names or set(map(type, values)) != {int} or 0 in values or max(map(abs, values)) > AMOUNT_MAX:
        _check_items(amounts)
    return amounts


def _check_items(amounts):
    """Raise the Refused that says which item of a batch is bad, if one is."""
    spellings = {}
    for name, amount in amounts.items():
        try:
            checked_name(name)
            checked_amount(amount)
            if (other := spellings.setdefault(canonical(name), name)) is not name:
                raise Refused(400, f"it is the same counter as {other}, which is there as well")
        except Refused as refused:
            shown = name if len(name) <= http1.NAMED_MAX else f"{name[: http1.NAMED_MAX]}…"
            raise Refused(400, f"{shown}: {refused.detail}") from None


def _fields(body, example):
    """Return the JSON object in a body as a dictionary."""
    try:
        fields = _JSON.decode(body.decode())
    except (ValueError, RecursionError):
        fields = None
    if type(fields) is not dict:
        raise Refused(400, f"the body must be a JSON object in UTF-8, {example}")
    return fields


def _distinct(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Refused(400, "a field of the JSON body is there more than once")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_distinct)


def dot(text):
    try:
        return parse_increment_id(text)
    except ValueError:
        raise Refused(400, 'an increment id is a UUIDv8 as POST /increment answers it in "id"') from None


def prefix(text):
    if not _PREFIX.match(text):
        raise Refused(400, "a prefix is up to 144 of A-Z a-z 0-9 . _ : @ -")
    return text


def last(query, name):
    """Return how many windows `last` asks for, of a query about a counter; None if it does not."""
    text = query.get("last")
    if text is None:
        return None
    if not is_series(name):
        raise Refused(400, f"last goes with a windowed counter, such as {name}@1h")
    most = parse_series(name).keep + 1
    if not re.fullmatch("[1-9][0-9]{0,3}", text) or int(text) > most:
        raise Refused(
            400, f"last must be an integer from 1 to {most}: how many windows of {name}, the present one included"
        )
    return int(text)


def limit(text):
    if not re.fullmatch("[1-9][0-9]{0,3}", text) or int(text) > COUNTS_MAX:
        raise Refused(400, f"limit must be an integer from 1 to {COUNTS_MAX}")
    return int(text)


def fresh(text):
    if text not in ("true", "false", ACTIVE):
        raise Refused(400, f"fresh must be true, false or {ACTIVE}")
    return text if text != "false" else None


def order(text):
    if text not in (BY_NAME, BY_VALUE):
        raise Refused(400, f"order must be {BY_NAME} or {BY_VALUE}")
    return text


def durable(text):
    if text not in ("true", "false"):
        raise Refused(400, "durable must be true or false")
    return text == "true"


def timeout_s(query, *goes_with):
    """Return the seconds that `timeout` says, of a query in which it is allowed only beside one of `goes_with`."""
    text = query.get("timeout")
    if text is None:
        return WAIT_DEFAULT_S
    if not query.keys() & set(goes_with):
        raise Refused(400, f"timeout goes with {' or '.join(goes_with)}")
    if not _SECONDS.match(text) or float(text) > WAIT_MAX_S:
        raise Refused(400, f"timeout must be a number of seconds from 0 to {WAIT_MAX_S:.0f}")
    return float(text)
