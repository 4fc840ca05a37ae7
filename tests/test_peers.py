"""The peer table on a hand-driven clock, and the thread that sweeps it."""

import collections
import itertools
import random
import threading

import pytest

from counter.addresses import join_address, parse_address, split_address
from counter.roster import ACTIVE, LOST
from counter.views import RECENT_MAX, VIEW_MAX
from counter.wire import BEAT_MAX, Sender, View
from peers import Change, Heartbeat, PeerTable

ME, A, B, C = (f"{letter * 8}-{letter * 4}-8{letter * 3}" for letter in "fabc")
AT_ME, AT_A, AT_B, AT_C = (f"10.0.0.{number}:80" for number in range(4))
NOBODY = View([], [])
INTERVAL_S, TIMEOUT_S = 1, 5


@pytest.fixture
def table():
    return new_table()


def new_table(seeds=(), fanout=8):
    table = PeerTable(ME, AT_ME, seeds, INTERVAL_S, TIMEOUT_S, fanout, random.Random(1))
    table.become_ready()
    return table


def says(id, address, beat, leaving=False):
    return Sender(id, address, beat, leaving)


def answer(table, id, address, beat=1, now=0.0, at=None, view=NOBODY):
    """Let a peer answer at its address, or at another one."""
    return table.heard(says(id, address, beat), view, now, answered_at=at or address)


def sweep_through(table, start, end):
    """Sweep once an interval, as the heartbeat does; return all changes."""
    changes = []
    for now in range(start, end):
        changes += table.sweep(float(now)).changes
    return changes


def states(table, now=0.0):
    return {peer.id: peer.state for peer in table.snapshot(now)}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:8080", "localhost:8080"),
        (" LOCALHOST:08080 ", "localhost:8080"),
        ("10.0.0.1:1", "10.0.0.1:1"),
        ("[::1]:65535", "[::1]:65535"),
        ("[0:0:0:0:0:0:0:1]:80", "[::1]:80"),
        ("counter-0.counter.default.svc:8080", "counter-0.counter.default.svc:8080"),
    ],
)
def test_an_address_has_one_spelling(text, address):
    assert parse_address(text) == address
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ":80",
        "x:",
        "x:0",
        "x:65536",
        "x:-1",
        "x:8 0",
        "::1:80",
        "[::1]",
        "[x]:80",
        "x y:80",
        "http://x:80",
        "x:٣",
        "[fe80::1%eth0]:80",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError):
        parse_address(text)


def test_a_peer_that_answers_is_active(table):
    assert answer(table, A, AT_A) == ([], [Change("joined", A, AT_A)])
    assert table.active() == [(A, AT_A)]
    assert table.sweep(0.0).contact == [AT_A]


def test_a_peer_that_calls_is_active(table):
    assert table.heard(says(A, AT_A, 1), NOBODY, 0.0) == ([], [Change("joined", A, AT_A)])


def test_a_rumour_makes_nobody_active_but_is_looked_into(table):
    contact, changes = answer(table, A, AT_A, view=View([(B, AT_B, 7)], []))
    assert contact == [AT_B]
    assert changes == [Change("joined", A, AT_A)]
    assert states(table) == {A: ACTIVE}
    assert table.describe()[1].peers == [(A, AT_A, 1)]
    assert AT_B in table.sweep(0.0).contact
    answer(table, B, AT_B)
    assert states(table) == {A: ACTIVE, B: ACTIVE}


def hear_of_b(table, answering=None):
    """Hear of B in gossip alone, and then from A alone for 20 s; return all changes of the sweeps.

    After 3 s `answering`, an id, answers at the address of B.
    """
    changes = []
    answer(table, A, AT_A, view=View([(B, AT_B, 7)], []))
    for now in range(20):
        answer(table, A, AT_A, beat=now, now=float(now))
        if answering and now >= 3:
            answer(table, answering, AT_ME if answering == ME else AT_C, beat=now, now=float(now), at=AT_B)
        changes += table.sweep(float(now)).changes
    return changes


def test_a_rumour_that_nobody_confirms_is_of_a_lost_peer(table):
    """It may be counting beyond a partition, so a fresh read must not do without it."""
    assert hear_of_b(table) == [Change("lost", B, AT_B)]
    assert states(table) == {A: ACTIVE, B: LOST}
    assert answer(table, A, AT_A, beat=20, view=View([(B, AT_B, 7)], [])) == ([], [])
    assert answer(table, A, AT_A, beat=21, view=View([(B, AT_B, 8)], [])) == ([AT_B], [])


@pytest.mark.parametrize("answering", [C, ME])
def test_a_rumour_of_a_peer_where_another_answers_is_forgotten(table, answering):
    assert hear_of_b(table, answering) == []
    assert B not in states(table)
    assert answer(table, A, AT_A, beat=20, view=View([(B, AT_B, 7)], [])) == ([], [])


def test_a_rumour_of_a_predecessor_at_the_own_address_is_forgotten(table):
    answer(table, A, AT_A, view=View([(B, AT_ME, 7)], []))
    assert sweep_through(table, 0, 20) == [Change("lost", A, AT_A)]
    assert states(table) == {A: LOST}


def test_silence_makes_a_peer_lost_and_an_answer_brings_it_back(table):
    answer(table, A, AT_A)
    assert sweep_through(table, 0, TIMEOUT_S + 1) == []
    assert table.sweep(TIMEOUT_S + 1.0).changes == [Change("lost", A, AT_A)]
    assert (table.active(), states(table)) == ([], {A: LOST})
    assert answer(table, A, AT_A, now=7.0) == ([], [Change("back", A, AT_A)])
    assert states(table) == {A: ACTIVE}


@pytest.mark.parametrize("heard", ["answer", "call", "gossip"])
def test_a_greater_beat_is_a_sign_of_life_however_it_comes(table, heard):
    answer(table, A, AT_A)
    answer(table, B, AT_B)
    for now in range(20):
        table.sweep(float(now))
        if heard == "answer":
            answer(table, A, AT_A, beat=1, now=float(now))
        elif heard == "call":
            table.heard(says(A, AT_A, now + 2), NOBODY, float(now))
        else:
            answer(table, B, AT_B, now=float(now), view=View([(A, AT_A, now + 2)], []))
    assert (A, AT_A) in table.active()


def test_an_equal_beat_in_gossip_proves_nothing(table):
    answer(table, A, AT_A, beat=3)
    for now in range(7):
        table.heard(says(B, AT_B, now + 1), View([(A, AT_A, 3)], []), float(now))
        table.sweep(float(now))
    assert states(table, 7.0) == {A: LOST, B: ACTIVE}


@pytest.mark.parametrize("known", ["lost", "replaced", "active"])
def test_a_message_proves_its_sender_alive_whatever_its_beat(table, known):
    """A machine that was set back sends lower beats than others remember: it is not ignored until it has caught up."""
    answer(table, A, AT_A, beat=50)
    if known == "lost":
        sweep_through(table, 0, 8)
    elif known == "replaced":
        answer(table, B, AT_A)
    for now in range(8, 16):
        table.heard(says(A, AT_C, 3), NOBODY, float(now))
        assert (A, AT_C) in table.active()
        table.sweep(float(now))


def test_a_peer_that_advertises_the_address_of_this_node_is_reported_now_and_then(table):
    """As two nodes behind one load balancer do: each never dials its own address, and so not the other."""
    reports = [table.heard(says(A, AT_ME, now + 1), NOBODY, float(now))[1] for now in range(1500)]
    assert reports[0] == [Change("advertises this node's address", A, AT_ME), Change("joined", A, AT_ME)]
    times = [now for now, changes in enumerate(reports) if changes]
    assert times == [0, 600, 1200]
    assert table.heard(says(B, AT_B, 1), NOBODY, 2000.0)[1] == [Change("joined", B, AT_B)]


def test_gossip_shows_that_a_node_advertises_the_address_of_this_one(table):
    """A predecessor at this address may be in gossip for a moment, but its beat does not go on rising."""
    answer(table, A, AT_A, view=View([(B, AT_ME, 7)], []))
    sweep_through(table, 0, 8)
    assert answer(table, A, AT_A, view=View([(B, AT_ME, 7)], []))[1] == [Change("back", A, AT_A)]
    changes = answer(table, A, AT_A, view=View([(B, AT_ME, 8)], []))[1]
    assert changes == [Change("advertises this node's address", B, AT_ME)]


def test_gossip_about_a_lost_peer_has_it_asked_but_not_believed(table):
    answer(table, A, AT_A)
    answer(table, B, AT_B)
    for now in range(7):
        answer(table, B, AT_B, now=float(now))
        table.sweep(float(now))
    assert answer(table, B, AT_B, now=7.0, view=View([(A, AT_A, 9)], [])) == ([AT_A], [])
    assert states(table)[A] == LOST


def test_lost_peers_are_probed_for_ever_at_intervals_that_grow(table):
    answer(table, A, AT_A)
    probes = [now for now in range(1000) if table.sweep(float(now)).contact == [AT_A] and now > TIMEOUT_S]
    gaps = [after - before for before, after in itertools.pairwise(probes)]
    assert gaps[0] <= 2
    assert min(gaps[10:]) >= 8
    assert max(gaps) <= 10
    assert probes[-1] > 980


def test_only_the_latest_lost_peers_are_kept(table):
    for number in range(100):
        id = f"{number:08x}-0000-8000"
        answer(table, id, f"10.1.0.{number}:80", now=number / 1000)
    sweep_through(table, 0, 8)
    assert sorted(states(table)) == [f"{number:08x}-0000-8000" for number in range(36, 100)]


def test_who_says_leave_is_dropped_at_once_and_stays_away(table):
    answer(table, A, AT_A)
    assert table.heard(says(A, AT_A, 2, leaving=True), NOBODY, 0.0) == ([], [Change("left", A, AT_A)])
    assert states(table) == {}
    assert table.heard(says(A, AT_A, 2), NOBODY, 0.0) == ([], [])
    assert answer(table, A, AT_A, beat=2) == ([], [])  # it was on its way as the peer said that
    assert table.heard(says(B, AT_B, 1), View([(A, AT_A, 2)], []), 0.0)[0] == []
    assert states(table) == {B: ACTIVE}
    assert AT_A not in table.sweep(1.0).contact


def test_a_departure_is_passed_on_for_a_while(table):
    answer(table, A, AT_A)
    answer(table, B, AT_B)
    assert answer(table, B, AT_B, view=View([], [(A, 2)]))[1] == [Change("left", A, AT_A)]
    assert table.describe()[1].left == [(A, 2)]
    sweep_through(table, 0, 60)
    assert table.describe()[1].left == []


def test_saying_leave_raises_the_beat(table):
    before = table.describe()[0]
    table.leave()
    sender = table.describe()[0]
    assert sender.leaving
    assert sender.beat > before.beat


def test_a_new_id_at_a_known_address_is_a_restart(table):
    answer(table, A, AT_A)
    assert answer(table, B, AT_A)[1] == [Change("restarted", A, AT_A), Change("joined", B, AT_A)]
    assert table.active() == [(B, AT_A)]
    assert table.heard(says(A, AT_A, 1), NOBODY, 0.0) == ([AT_A], [])  # two nodes may claim one address
    answer(table, B, AT_A, beat=2)
    assert table.active() == [(B, AT_A)]


def test_a_lost_peer_is_not_looked_for_where_another_answers(table):
    table.heard(says(A, AT_A, 1), NOBODY, 0.0)
    sweep_through(table, 0, 8)
    assert states(table) == {A: LOST}
    answer(table, B, AT_A, now=8.0)
    assert states(table) == {B: ACTIVE}


def test_who_only_claims_the_address_of_another_is_asked_there_first(table):
    answer(table, A, AT_A)
    assert table.heard(says(B, AT_A, 1), NOBODY, 0.0) == ([AT_A], [])
    assert table.active() == [(A, AT_A)]
    answer(table, A, AT_A, beat=2)
    assert table.active() == [(A, AT_A)]


def test_who_has_restarted_where_nobody_can_dial_it_is_taken_at_its_word(table):
    """Its predecessor, which answered there, is lost, and nobody can ask who is there now."""
    answer(table, A, AT_A)
    sweep_through(table, 0, 8)
    assert table.heard(says(B, AT_A, 1), NOBODY, 8.0) == ([], [Change("joined", B, AT_A)])


def test_who_goes_on_under_an_id_that_has_left_hears_so_and_outlives_it(table):
    """It is a clone, or was set back to before it left: its beat is raised above the last one of that other life."""
    answer(table, A, AT_A)
    table.heard(says(A, AT_A, 9, leaving=True), NOBODY, 0.0)
    clone = PeerTable(A, AT_A, [], INTERVAL_S, TIMEOUT_S, 8)
    table.heard(*clone.describe(), 1.0)
    assert table.active() == []
    clone.heard(*table.describe(), 1.0)
    assert table.heard(*clone.describe(), 1.0)[1] == [Change("joined", A, AT_A)]
    assert table.describe()[1].left == []


def test_a_departure_that_was_outlived_is_not_believed(table):
    answer(table, A, AT_A, beat=10)
    assert answer(table, B, AT_B, view=View([], [(A, 9)]))[1] == [Change("joined", B, AT_B)]
    assert states(table) == {A: ACTIVE, B: ACTIVE}


def test_a_node_that_was_set_back_catches_up_with_its_own_beat(table):
    """What others say of it shows how far it was."""
    answer(table, A, AT_A, view=View([(ME, AT_ME, 70)], []))
    assert table.describe()[0].beat == 70
    answer(table, A, AT_A, beat=2, view=View([(ME, AT_ME, BEAT_MAX)], []))  # which would leave it none to raise
    table.sweep(0.0)
    assert table.describe()[0].beat == 71


def test_two_addresses_of_one_id_are_one_peer_and_what_it_advertises_wins(table):
    answer(table, A, AT_A, at="localhost:80")
    answer(table, A, AT_A, at="[::1]:80")
    assert table.active() == [(A, AT_A)]


def test_without_an_advertised_address_the_one_that_answered_is_taken(table):
    answer(table, A, None, at=AT_A)
    assert table.active() == [(A, AT_A)]


def test_the_own_id_is_oneself_at_whatever_address():
    table = new_table(seeds=["localhost:80"])
    assert table.sweep(0.0).seeds == ["localhost:80"]
    assert table.resolved("localhost:80", ["127.0.0.1:80", AT_ME]) == ["127.0.0.1:80"]
    assert answer(table, ME, AT_ME, at="127.0.0.1:80") == ([], [])
    assert table.active() == []


def test_a_seed_that_led_to_oneself_may_lead_to_another_node_later():
    table = new_table(seeds=["balancer:80"])
    table.resolved("balancer:80", ["10.9.9.9:80"])
    answer(table, ME, AT_ME, at="10.9.9.9:80")
    assert any(table.sweep(float(now)).seeds for now in range(20))
    assert table.resolved("balancer:80", ["10.9.9.9:80"]) == ["10.9.9.9:80"]
    answer(table, A, AT_A, at="10.9.9.9:80")
    assert table.active() == [(A, AT_A)]


def test_the_own_address_is_not_contacted_for_a_rumour(table):
    assert answer(table, A, AT_A, view=View([(B, AT_ME, 5)], []))[0] == []
    assert table.sweep(0.0).contact == [AT_A]


def test_a_seed_is_tried_until_it_is_met_and_again_once_it_is_lost():
    table = new_table(seeds=["a:80", "a:80"])
    table.resolved("a:80", [AT_A])
    tries = []
    for now in range(60):
        if now == 30:
            answer(table, A, AT_A, now=30.0)
        tries += [now] * len(table.sweep(float(now)).seeds)
    assert tries[0] == 0
    assert 5 < len([now for now in tries if now < 30]) < 15
    assert not [now for now in tries if 30 <= now <= 35]
    assert next(now for now in tries if now > 35) == 36


def test_a_node_that_is_not_ready_tries_its_seeds_in_every_interval():
    table = PeerTable(ME, AT_ME, ["a:80"], INTERVAL_S, TIMEOUT_S, 8, random.Random(1))
    assert all(table.sweep(float(now)).seeds == ["a:80"] for now in range(10))


def test_a_seed_that_was_met_is_looked_up_now_and_then():
    """Its name may lead to further nodes, whom nobody here has met; those it is known to lead to are left alone."""
    table = new_table(seeds=["nodes:80"])
    table.resolved("nodes:80", [AT_ME, AT_A])
    answer(table, A, AT_A)
    tries = []
    for now in range(300):
        answer(table, A, AT_A, now=float(now))
        tries += [now] * len(table.sweep(float(now)).seeds)
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert 20 < min(gaps) <= max(gaps) <= 30
    assert table.resolved("nodes:80", [AT_ME, AT_A]) == []
    assert table.resolved("nodes:80", [AT_ME, AT_A, AT_B]) == [AT_B]


def test_a_seed_where_somebody_answered_who_is_elsewhere_may_lead_to_another():
    """It may be a load balancer's."""
    table = new_table(seeds=["balancer:80"])
    table.resolved("balancer:80", ["10.9.9.9:80"])
    answer(table, A, AT_A, at="10.9.9.9:80")
    assert table.resolved("balancer:80", ["10.9.9.9:80"]) == ["10.9.9.9:80"]


def test_a_late_sweep_forgives_no_more_than_its_own_lateness(table):
    """Who is heard again between waking up and the first sweep has as much time as ever."""
    answer(table, A, AT_A)
    table.sweep(0.0)
    answer(table, A, AT_A, now=60.0)
    assert table.sweep(60.0).changes == []
    assert sweep_through(table, 61, 67) == [Change("lost", A, AT_A)]


def test_a_late_sweep_accuses_nobody(table):
    answer(table, A, AT_A)
    table.sweep(0.0)
    assert table.sweep(100.0).changes == []
    assert sweep_through(table, 101, 104) == []
    assert sweep_through(table, 104, 108) == [Change("lost", A, AT_A)]


def test_beyond_the_fanout_a_sweep_picks_peers_at_random():
    table = new_table(fanout=3)
    for number in range(20):
        answer(table, f"{number:08x}-0000-8000", f"10.1.0.{number}:80")
    picked = [table.sweep(now / 20).contact for now in range(100)]
    assert {len(contact) for contact in picked} == {3}
    assert len({address for contact in picked for address in contact}) == 20


def test_in_a_large_cluster_a_beat_that_rises_twice_is_enough():
    table = new_table(fanout=2)
    for number in range(3):
        answer(table, f"{number:08x}-0000-8000", f"10.1.0.{number}:80")
    id = "00000000-0000-8000"
    answer(table, id, "10.1.0.0:80", beat=2, view=View([(A, AT_A, 5)], []))
    assert A not in states(table)
    changes = answer(table, id, "10.1.0.0:80", beat=3, view=View([(A, AT_A, 6)], []))[1]
    assert changes == [Change("joined", A, AT_A)]


def crowded(size, fanout=8):
    """Return a table with that many active peers, met at time 0."""
    table = new_table(fanout=fanout)
    for number in range(size):
        answer(table, *peer(number))
    return table


def peer(number):
    return f"{number:08x}-0000-8000", f"10.1.{number // 250}.{number % 250}:80"


def test_many_who_died_do_not_keep_others_from_being_looked_for():
    """With one probe a sweep, all of the lost get theirs: those lost early may live, behind a partition."""
    table, probed, early, late = crowded(30), collections.Counter(), range(10), range(10, 22)
    for now in range(1, 300):
        alive = range(22 if now > 20 else 10, 30)
        for number in alive:
            answer(table, *peer(number), beat=now + 1, now=float(now))
        probed.update(table.sweep(float(now)).contact)
    assert len(table.active()) == 8
    assert min(probed[peer(number)[1]] for number in [*early, *late]) > 8


def test_a_message_shows_a_bounded_part_of_the_membership_and_everyone_in_turn():
    table = crowded(1000)
    views = [table.describe()[1].peers for _ in range(8)]
    assert {len(view) for view in views} <= {VIEW_MAX, RECENT_MAX + 1000 % (VIEW_MAX - RECENT_MAX)}
    assert {id for view in views for id, _, _ in view} == {peer(number)[0] for number in range(1000)}


def test_whom_one_met_last_is_in_every_message():
    table = crowded(1000)
    answer(table, *peer(77), beat=5)
    assert all((*peer(77), 5) in table.describe()[1].peers for _ in range(20))


def test_up_to_its_bound_a_message_shows_all():
    table = crowded(VIEW_MAX)
    assert sorted(id for id, _, _ in table.describe()[1].peers) == [peer(number)[0] for number in range(VIEW_MAX)]


def test_departures_in_a_message_are_bounded_the_newest_first():
    table = crowded(300)
    for number in range(300):
        id, address = peer(number)
        table.heard(says(id, address, 2, leaving=True), NOBODY, 0.0)
    assert table.describe()[1].left == [(peer(number)[0], 2) for number in range(299, 299 - VIEW_MAX, -1)]
    assert table.active() == []


@pytest.mark.parametrize(("size", "allowed_s"), [(8, 5), (100, 6), (1000, 9)])
def test_the_silence_allowed_grows_with_the_logarithm_of_the_peers(size, allowed_s):
    table = crowded(size)
    lost_at = next(now for now in range(1, 20) if table.sweep(float(now)).changes)
    assert lost_at == int(allowed_s) + 1


def test_the_silent_are_asked_before_they_are_given_up_but_others_as_well():
    table = crowded(30)
    for now in range(4):
        for number in range(1, 30):
            answer(table, *peer(number), beat=now + 2, now=float(now))
        asked = table.sweep(float(now)).contact
        assert len(asked) == 8
    assert peer(0)[1] in asked
    for number in range(30):
        answer(table, *peer(number), beat=9, now=3.0)
    contacts = [table.sweep(now).contact for now in (4.0, 5.0, 6.0)]  # now all are silent, as in a partition
    assert {len(contact) for contact in contacts} == {8}
    assert table.sweep(7.0).changes == []


def test_probing_and_heartbeats_share_the_fanout_of_a_large_cluster():
    table = crowded(60)
    for now in range(1, 60):
        for number in range(30):
            answer(table, *peer(number), beat=now + 1, now=float(now))
        assert len(table.sweep(float(now)).contact) == 8
    assert list(states(table).values()).count(LOST) == 30


def test_in_a_large_cluster_a_lost_peer_is_back_once_its_beat_has_risen_twice():
    table = crowded(20)
    for now in range(1, 8):
        for number in range(1, 20):
            answer(table, *peer(number), beat=now + 1, now=float(now))
        table.sweep(float(now))
    id, address = peer(0)
    assert states(table)[id] == LOST
    assert answer(table, *peer(1), beat=9, view=View([(id, address, 5)], [])) == ([], [])
    assert answer(table, *peer(1), beat=10, view=View([(id, address, 6)], []))[1] == [Change("back", id, address)]
    assert (id, address, 6) in table.describe()[1].peers


@pytest.mark.parametrize("seed", range(20))
def test_the_indexes_of_a_table_agree_whatever_it_is_told(seed):
    rng, table = random.Random(seed), new_table(fanout=3)
    roster = table._roster
    for step in range(400):
        id, address = peer(rng.randrange(12))[0], peer(rng.randrange(12))[1]
        told = [(*peer(rng.randrange(12)), rng.randrange(step + 1)) for _ in range(3)]
        left = [(peer(rng.randrange(12))[0], rng.randrange(step + 1))] if rng.random() < 0.01 else []
        answered_at = address if rng.random() < 0.5 else None
        sender = says(id, address, rng.randrange(step + 1), rng.random() < 0.01)
        table.heard(sender, View(told, left), step / 4, answered_at)
        table.sweep(step / 4)
        peers = roster.peers.values()
        assert all(peer.id == id for id, peer in roster.peers.items())
        assert sorted(peer.id for peer in roster.active) == sorted(peer.id for peer in peers if peer.state == ACTIVE)
        assert all(roster.active[peer.index] is peer for peer in roster.active)
        at = {(peer.address, peer.id) for peer in peers}
        assert {(address, id) for address, ids in roster._ids_at.items() for id in ids} == at
        assert not roster.tombstones.keys() & roster.peers.keys()
        assert set(roster.owners.values()) <= roster.peers.keys()


def test_a_new_replica_id_of_this_node_is_not_taken_for_a_peer(table):
    table.rename(C)
    assert table.describe()[0].id == C
    assert table.heard(says(B, AT_B, 1), View([(ME, AT_ME, 9)], []), 0.0)[0] == []
    assert states(table) == {B: ACTIVE}


def test_the_original_of_a_clone_is_a_peer_like_others(table):
    """A node that finds another to use its id draws a new one, and may meet the other under the old."""
    for now in range(3):
        table.sweep(float(now))
    table.rename(C)
    assert table.heard(says(ME, AT_B, 4), NOBODY, 3.0)[1] == [Change("joined", ME, AT_B)]
    assert states(table) == {ME: ACTIVE}


def test_an_address_is_advertised_once():
    table = PeerTable(ME, None, [], INTERVAL_S, TIMEOUT_S, 8)
    assert table.describe()[0].address is None
    table.advertise(AT_A)
    table.advertise(AT_B)
    assert table.address == table.describe()[0].address == AT_A


def test_the_heartbeat_sweeps_until_it_is_stopped():
    table, beats, enough = new_table(), [], threading.Event()

    def contact(addresses, seeds):
        beats.append((addresses, seeds, table.describe()[0].beat))
        if len(beats) == 3:
            enough.set()
            raise RuntimeError("a failure does not end the heartbeats")
        if len(beats) == 5:
            more.set()

    more = threading.Event()
    heartbeat = Heartbeat(table, 0.01, contact)
    heartbeat.start()
    assert enough.wait(10)
    assert more.wait(10)
    assert heartbeat.stop(10)
    assert [beat for _, _, beat in beats] == list(range(1, len(beats) + 1))


def test_how_wall_clocks_differ_is_known_and_reported_once():
    """Half of the time that an answer took is taken off; less than it took proves nothing."""
    table = PeerTable(ME, AT_ME, [], INTERVAL_S, TIMEOUT_S, 8, wall=lambda: 1000.0)
    answer(table, A, AT_A)
    reports = []
    for wall, took_s in (
        (1000.5, 1.0),
        (1003.0, 0.4),
        (1003.0, 0.4),
        (1000.1, 0.2),
        (999.5, 5.0),
        (1000.1, 0.2),
        (998.0, 0.1),
    ):
        sender = says(A, AT_A, 2)._replace(wall=wall)
        reports.append(table.compare_clocks(table.sender(), sender, took_s))
    assert reports[0] is reports[2] is reports[3] is reports[4] is reports[5] is None
    assert (reports[1], reports[6]) == (pytest.approx(2.8), pytest.approx(-2.05))
    assert table.snapshot(0.0)[0].skew_s == pytest.approx(-2.05)
    assert table.compare_clocks(table.sender(), says(B, AT_B, 1)._replace(wall=9.0), 0.1) is None
    assert table.compare_clocks(table.sender(), says(A, AT_A, 1), 0.1) is None
