"""How much is held of whom, and the warning about it."""

from halves import AT_A, NOBODY, A, B, Half

from counter import Delta, cancelling_replica, past
from counter.histories import Weight
from counter.past import LOOK_S, SMALL, TIMES
from counter.wire import Sender


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "outweighs" in record.getMessage()]


def test_what_is_held_is_told_by_whether_its_replica_is_active():
    node = Half()
    assert node.gossip.past.weight() == Weight(0, 0, 0, 0, 0)
    for name in "xyz":
        node.counter.increment(name)
    assert node.gossip.past.weight() == Weight(1, 0, 0, 3, 0)
    for replica in (A, B):
        node.counter.merge(Delta(replica, 0, 2, {"x": (1, 5), "y": (2, 1)}), 0)
    node.counter.merge(Delta(cancelling_replica((B, 1)), 0, 1, {"x": (1, -5)}, (), ((A, 1), (B, 1))), 0)
    assert node.gossip.past.weight() == Weight(1, 2, 1, 3, 4)
    node.table.heard(Sender(A, AT_A, 1, False), NOBODY, 0.0, answered_at=AT_A)
    assert node.gossip.past.weight() == Weight(2, 1, 1, 5, 2)
    assert len(node.counter.vector()) == 4


def test_a_past_that_outweighs_the_present_is_one_line(caplog, monkeypatch):
    """With the commands that are a remedy."""
    monkeypatch.setattr(past, "SMALL", 25)
    node = Half()
    node.counter.increment("a")
    node.counter.increment("b")
    for number in range(1, 2 * TIMES + 10):
        node.counter.merge(Delta(f"{number:08x}-1111-8111", 0, 1, {"a": (1, 1)}), 0)
        node.gossip.swept([], [], number * LOOK_S)
        assert len(warnings(caplog)) == (number > 25)
    (line,) = warnings(caplog)
    assert "inactive_entries=26 cancellations=0 counters=2" in line
    assert "export --data FILE --values" in line
    assert "import --data NEW --cluster NAME --values" in line


def test_where_there_is_little_nothing_outweighs_anything():
    assert not past.outweighs(Weight(1, 900, 0, 1, SMALL), 1)
    assert past.outweighs(Weight(1, 900, 1, 1, SMALL), 1)
    assert not past.outweighs(Weight(1, 900, 5000, 1, 5000), 2000)
    assert not past.outweighs(Weight(3, 30, 0, 6000, TIMES * 2000), 2000)
    assert past.outweighs(Weight(3, 30, 0, 6000, TIMES * 2000 + 1), 2000)


def test_it_is_looked_at_now_and_then(monkeypatch):
    """Adding up what every replica has takes milliseconds where there are many."""
    node, looks = Half(), []
    weight = node.gossip.past.weight
    monkeypatch.setattr(node.gossip.past, "weight", lambda: looks.append(1) or weight())
    for now in range(130):
        node.gossip.swept([], [], float(now))
    assert len(looks) == 3
