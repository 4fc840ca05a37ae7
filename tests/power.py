"""What a power cut leaves of a node's data file, at any moment of its life.

The node runs under strace, which writes down every write, sync and answer in their order.  From
that a Disk is made as it may be after a cut: with all that was synced, and any part of the rest.
"""

import os
import random
import re
from collections import namedtuple

CALLS = "openat,pwrite64,ftruncate,fdatasync,fsync,rename,unlink,sendto"
_LINE = re.compile(r"(\d+) +(.*)")
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(<(?:\\x..)*>)?")
_TEXT = re.compile(r'[<"]((?:\\x[0-9a-f]{2})*)[>"]')

# what: "open", "write", "truncate", "sync", "rename", "unlink" or "sent"; path: bytes
Event = namedtuple("Event", "what path data offset")


def command(trace, arguments):
    """Return the command line that runs a program and writes down what it does."""
    return ["strace", "-f", "-y", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", trace, *arguments]


def events(trace):
    """Yield the Events of a trace, those that took a while at their end."""
    begun = {}  # thread -> the beginning of a call that others came in between of
    with open(trace) as lines:
        for line in lines:
            thread, rest = _LINE.match(line).groups()
            if rest.endswith("<unfinished ...>"):
                begun[thread] = rest.removesuffix("<unfinished ...>").rstrip()
                continue
            rest = re.sub(r"^<\.\.\. \w+ resumed>", lambda _, thread=thread: begun.pop(thread), rest)
            call = _CALL.match(rest)
            if call and int(call[3]) >= 0:
                yield from _event(call[1], call[2], call[4])


def _event(name, arguments, result):
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments)]
    numbers = [int(number) for number in re.findall(r", (\d+)(?=,|$)", arguments)]
    if name == "openat" and "O_CREAT" in arguments:
        yield Event("open", texts[-1], None, None)
    elif name == "pwrite64":
        yield Event("write", texts[0], texts[1], numbers[-1])
    elif name == "ftruncate":
        yield Event("truncate", texts[0], None, numbers[-1])
    elif name in ("fdatasync", "fsync"):
        yield Event("sync", texts[0], None, None)
    elif name == "rename":
        yield Event("rename", texts[0], texts[1], None)
    elif name == "unlink":
        yield Event("unlink", texts[0], None, None)
    elif name == "sendto":
        yield Event("sent", None, texts[1], None)


class Disk:
    """The files of one folder: what is on the disk for certain, and what the system may yet have to write."""

    def __init__(self, folder):
        self.folder = os.fsencode(folder)
        self.names = {}  # path -> file, a bytearray: as after the last sync of the folder
        self.current = {}  # path -> file: as programs see it
        self.moves = []  # [(path or None, path or None, file)]: changes of the folder since
        self.unsynced = {}  # id of a file -> its writes since its last sync: (offset, data), or (size, None)
        self.contents = {}  # id of a file -> its content at its last sync

    def take(self, event):
        """Take in what a program did to this folder."""
        path = event.path
        if event.what == "sync" and path == self.folder:
            self.names, self.moves = dict(self.current), []
        elif event.what == "open" and path not in self.current:
            self._move(None, path, len(self.contents))
            self.contents[self.current[path]], self.unsynced[self.current[path]] = bytearray(), []
        elif event.what == "rename":
            self._move(path, event.data, self.current[path])
        elif event.what == "unlink":
            self._move(path, None, self.current[path])
        elif path in self.current and event.what in ("write", "truncate"):
            self.unsynced[self.current[path]].append((event.offset, event.data))
        elif path in self.current and event.what == "sync":
            file = self.current[path]
            self.contents[file], self.unsynced[file] = _written(self.contents[file], self.unsynced[file]), []

    def _move(self, source, target, file):
        self.moves.append((source, target, file))
        _moved(self.current, source, target, file)

    def cut(self, target, rng=random):
        """Write to a folder what is left after a power cut now, or may be: {file name: content}."""
        names = dict(self.names)
        for move in self.moves[: rng.randint(0, len(self.moves))]:
            _moved(names, *move)
        for path, file in names.items():
            if not path.endswith(b"-shm"):  # it has no meaning but for processes that live
                writes = [write for write in self.unsynced[file] if rng.random() < 0.5]
                with open(os.path.join(os.fsencode(target), os.path.basename(path)), "wb") as copy:
                    copy.write(_written(self.contents[file], writes))


def _moved(names, source, target, file):
    names.pop(source, None)
    if target is not None:
        names[target] = file


def _written(content, writes):
    """Return the content of a file after writes and truncations."""
    content = bytearray(content)
    for offset, data in writes:
        if data is None:
            content = content[:offset].ljust(offset, b"\0")
        else:
            content = content.ljust(offset, b"\0")
            content[offset : offset + len(data)] = data
    return content
