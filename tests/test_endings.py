"""What nodes say of replicas that ended: who may absorb them, when they do, and what others are told of it."""

from halves import A_SENDS, AT_A, AT_B, AT_ME, ME, NOBODY, A, B, C, Half, answer

from counter import Delta, wire
from counter.vectors import Vector
from counter.wire import Message, Sender


def hears(node, id, address, applied, v=wire.VERSION, beat=1):
    """Have a node hear of a peer's vector, directly."""
    return node.hear(Message(Sender(id, address, beat, False, v=v), NOBODY, applied, None, None, []))


def test_the_heir_is_who_started_last_of_those_heard_directly():
    node = Half()
    node.counter.increment("x")
    hears(node, A, AT_A, {}, beat=900)
    hears(node, B, AT_B, {}, beat=30)
    node.gossip.swept([], [], 0.0)
    assert node.gossip.leaving.end() == B
    assert node.counter.delta(ME, 1, 0.0).heir == B


def test_a_node_without_peers_or_counts_has_no_heir():
    alone, empty = Half(), Half()
    alone.counter.increment("x")
    assert alone.gossip.leaving.end() is None
    alone.counter.increment("x")
    hears(empty, A, AT_A, {})
    assert empty.gossip.leaving.end() is None


def test_there_is_no_heir_while_an_older_node_is_active():
    node = Half()
    node.counter.increment("x")
    hears(node, A, AT_A, {})
    hears(node, B, AT_B, {}, v=wire.ABSORBING - 1)
    assert node.gossip.leaving.end() is None
    hears(node, B, AT_B, {}, beat=2)
    assert node.gossip.leaving.end() in (A, B)


def test_a_replica_is_absorbed_once_it_is_gone():
    node = Half()
    ended = Message(A_SENDS, NOBODY, {A: 2}, None, None, [Delta(A, 0, 2, {"x": (1, 5)}, heir=ME)])
    node.hear(ended)
    node.gossip.swept([], [], 0.0)
    assert node.counter.vector() == {A: 2}
    node.hear(Message(A_SENDS._replace(leaving=True, beat=2), NOBODY, {A: 2}, None, None, []))
    hears(node, B, AT_B, {}, v=wire.ABSORBING - 1)
    node.gossip.swept([], [], 0.0)
    assert node.counter.vector() == {A: 2}
    hears(node, B, AT_B, {}, beat=2)
    node.gossip.swept([], [], 0.0)
    assert node.counter.vector() == {ME: 2}
    assert node.counter.value("x") == 5


def of_version_1(message):
    return message._replace(sender=message.sender._replace(v=1))


def absorbed(node):
    """Have a node absorb what A counted, x by 5."""
    node.counter.merge(Delta(A, 0, 2, {"x": (1, 5)}, heir=ME), 0.0)
    assert node.counter.absorb() == A


def test_an_older_peer_does_not_get_what_it_would_count_twice():
    """And is not asked all the time whether it has it: it is contacted as often as if nothing were to be told."""
    node = Half()
    link = node.meet(AT_B, B, {})
    node.gossip.answered(link, node.gossip.request(link, 0.0), of_version_1(answer({}, B, AT_B)), 0.0)
    node.counter.merge(Delta(C, 0, 1, {"x": (1, 1)}), 0.0)
    absorbed(node)
    node.gossip.swept([AT_B], [], 1.0)
    link = node.links.take(1.0)
    request = node.gossip.request(link, 1.0)
    assert [delta.replica for delta in request.deltas] == [C]
    node.gossip.answered(link, request, of_version_1(answer({C: 1}, B, AT_B)), 1.0)
    assert node.links.take(1.5) is None
    asked = Message(Sender(B, AT_B, 1, False), NOBODY, {C: 1}, None, None, [])
    assert node.hear(of_version_1(asked), 2.0).deltas == []
    assert [delta.replica for delta in node.hear(asked, 2.0).deltas] == [ME]


def test_an_answer_confirms_to_the_end_what_was_absorbed():
    """So nobody sends entries of it again."""
    node, late = Half(), Half(B, AT_B)
    absorbed(node)
    late.counter.merge(Delta(A, 0, 1, {"x": (1, 5)}), 0.0)
    reply = node.hear(Message(Sender(B, AT_B, 1, False), NOBODY, {A: 1}, None, None, [Delta(A, 0, 1, {"x": (1, 5)})]))
    assert reply.applied == {ME: 2}
    assert reply.confirms == {A: 2}
    link = late.meet(AT_ME, ME, {})
    request = late.gossip.request(link, 0.0)
    late.gossip.answered(link, request, answer({ME: 2}, ME, AT_ME, confirms={A: 2}), 0.0)
    assert late.confirmations.vectors[ME] == {ME: 2, A: 2}
    assert late.counter.deltas(late.confirmations.vectors[ME], 10**6, 0.0) == []


def test_what_was_absorbed_counts_as_handed_over():
    node = Half()
    node.meet(AT_A, A, {})
    node.counter.increment("x")
    node.counter.merge(Delta(B, 0, 2, {"x": (1, 5)}, heir=A), 0.0)
    assert node.gossip.unconfirmed() == {A: 3}
    node.counter.merge(Delta(A, 0, 1, {"x": (1, 5)}, absorbed={B: (2, A, 1, 1)}), 0.0)
    node.confirmations.confirm(A, Vector({A: 1, ME: 1}), 0.0)
    assert node.gossip.unconfirmed() == {A: 0}
    assert node.confirmations.holders(B, 2) == {A, B}
    assert node.confirmations.held_by_none(Vector({B: 2, ME: 1}), {A}) == 0


def test_a_node_whose_own_id_was_absorbed_takes_another():
    """Somebody else must have counted under it."""
    node = Half()
    node.counter.increment("x")
    node.hear(
        Message(
            Sender(B, AT_B, 1, False),
            NOBODY,
            {B: 1},
            None,
            None,
            [Delta(B, 0, 1, {"x": (1, 1)}, absorbed={ME: (2, B, 1, 1)})],
        )
    )
    assert node.counter.replica != ME
    assert node.table.sender().id == node.counter.replica


def test_what_a_peer_does_not_show_any_more_it_has_absorbed():
    """A process loses nothing.  So a node that stops need not wait until it knows who absorbed what it counted."""
    node = Half()
    node.counter.increment("x")
    hears(node, A, AT_A, {ME: 1})
    hears(node, A, AT_A, {A: 5}, beat=2)
    assert node.gossip.unconfirmed() == {A: 0}
    hears(node, A, AT_A, {ME: 1, A: 6}, beat=3)
    assert node.confirmations.vectors[A] == {ME: 1, A: 6}
