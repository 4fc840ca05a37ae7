"""Who may be connected, and who has to give way: bookkeeping on a clock that the test holds."""

import random
from types import SimpleNamespace

import pytest

from counter.places import CLIENT, GUEST, IDLE_LEAST_S, PEER, Earliest, Places, guests_for


class Connections:
    """Connections as Places sees them, which end as they are told to."""

    def __init__(self, clients_max=20, peers_max=3):
        self.places, self.now = Places(clients_max, lambda: peers_max), 100.0
        self.open = []

    def enter(self):
        """Return a new connection, at a time of its own."""
        self.now += 0.001
        connection = SimpleNamespace(kind=None, active_at=self.now, busy=False, closed=False)
        # As objects are, it is only equal to itself.
        connection = type("Connection", (), vars(connection))()
        self.open.append(connection)
        self.end(self.places.enter(connection, self.now))
        return connection

    def client(self):
        connection = self.enter()
        assert self.ask(connection)
        return connection

    def ask(self, connection):
        """Have a connection send a request of a client; return whether there was a place for it."""
        connection.active_at = self.now
        if connection.kind != GUEST:
            return True
        has_place, victim = self.places.take_client(connection, self.now)
        self.end(victim)
        return has_place

    def peer(self):
        connection = self.enter()
        self.end(self.places.take_peer(connection, self.now))
        return connection

    def end(self, connection):
        if connection is not None and not connection.closed:
            connection.closed = True
            self.open.remove(connection)
            self.places.leave(connection)

    def numbers(self):
        numbers = {kind: sum(each.kind == kind for each in self.open) for kind in (GUEST, CLIENT, PEER)}
        assert numbers == self.places.numbers
        return tuple(numbers.values())


@pytest.fixture
def connections():
    return Connections()


def test_guests_have_what_clients_leave_free_and_some_more(connections):
    """Beyond that the one that has been silent for longest gives way."""
    guests = [connections.enter() for _ in range(20 + guests_for(20))]
    assert connections.numbers() == (36, 0, 0)
    connections.enter()
    assert connections.numbers() == (36, 0, 0)
    assert [guest.closed for guest in guests[:3]] == [True, False, False]


def test_guests_keep_no_client_out(connections):
    """A client takes the place of a guest; guests have places of their own besides."""
    for _ in range(100):
        connections.enter()
    clients = [connections.client() for _ in range(20)]
    for _ in range(100):
        connections.enter()
    assert connections.numbers() == (16, 20, 0)
    assert not any(client.closed for client in clients)


def test_the_client_that_is_idle_for_longest_gives_way(connections):
    """Its latest request counts, not when it came."""
    clients = [connections.client() for _ in range(20)]
    connections.now += 5
    for client in clients[:7]:
        connections.ask(client)
    connections.now += 5
    assert connections.client().kind == CLIENT
    assert [client for client in clients if client.closed] == [clients[7]]
    assert not connections.places.full


def test_no_client_gives_way_that_was_just_served(connections):
    """The one too many is sent away, and stays a guest."""
    clients = [connections.client() for _ in range(20)]
    further = connections.enter()
    assert not connections.ask(further)
    assert (connections.places.full, further.kind) == (True, GUEST)
    connections.now = clients[0].active_at + IDLE_LEAST_S
    assert connections.ask(further)
    assert [client.closed for client in clients] == [True] + [False] * 19


def test_there_is_room_again_once_a_tenth_has_left(connections):
    """Until then it counts as full, so that it is not logged time and again."""
    clients = [connections.client() for _ in range(20)]
    connections.ask(connections.enter())
    for left, client in enumerate(clients[:3], 1):
        connections.end(client)
        assert connections.places.full == (left < 3)


def test_who_is_being_answered_does_not_give_way(connections):
    """Though its request came long ago; afterwards it has just been active."""
    clients = [connections.client() for _ in range(20)]
    clients[0].busy = True
    connections.now += 50
    connections.client()
    assert [client.closed for client in clients[:3]] == [False, True, False]
    clients[0].busy = False
    for _ in range(18):
        connections.client()
    assert not clients[0].closed


def test_where_all_are_being_answered_the_new_one_goes(connections):
    """Guests ask for what takes long as well: messages of peers, metrics."""
    for _ in range(36):
        connections.enter().busy = True
    assert connections.enter().closed
    assert connections.numbers() == (36, 0, 0)


def test_connections_of_peers_are_bounded_by_the_known_peers(connections):
    """They take no place of a client, and the one idle for longest gives way."""
    peers = [connections.peer() for _ in range(3)]
    peers[0].active_at = connections.now
    further = connections.peer()
    assert connections.numbers() == (0, 0, 3)
    assert [peer.closed for peer in [*peers, further]] == [False, True, False, False]


def test_a_peer_that_came_as_a_client_frees_its_place(connections):
    """It shows what it is later."""
    clients = [connections.client() for _ in range(20)]
    connections.end(connections.places.take_peer(clients[0], connections.now))
    assert connections.numbers() == (0, 19, 1)
    connections.client()
    assert not any(client.closed for client in clients)


@pytest.mark.parametrize("seed", range(20))
def test_the_bounds_hold_whatever_happens(seed):
    """Random connections come, ask, are answered and go; active clients are never hung up on."""
    rng, connections = random.Random(seed), Connections(clients_max=30)
    for _ in range(3000):
        connections.now += rng.expovariate(20)
        connection = rng.choice(connections.open) if connections.open else None
        step = rng.randrange(6)
        if step < 3 or not connection:
            connection = connections.enter()
            if step == 1:
                connections.ask(connection)
            elif step == 2 and not connection.closed:
                connections.end(connections.places.take_peer(connection, connections.now))
        elif step == 3:
            connections.ask(connection)
        elif step == 4:
            connection.busy = not connection.busy
        else:
            connections.end(connection)
        guests, clients, peers = connections.numbers()
        assert clients <= 30
        assert guests + clients <= 30 + guests_for(30)
        assert peers <= 3 + sum(each.busy for each in connections.open)


# The earliest.


def test_the_earliest_is_found_though_times_move():
    """The same as by looking at all of them, whether times move on or back."""
    rng = random.Random(1)
    times, gone = {}, set()
    earliest = Earliest(times.get, lambda item: item not in gone)
    for item in range(2000):
        times[item] = rng.random()
        earliest.add(item)
        for moved in rng.sample(range(item + 1), min(3, item)):
            if rng.random() < 0.7:
                times[moved] += rng.random()
            else:
                times[moved] -= rng.random()
                earliest.add(moved)
        gone.add(rng.randrange(item + 1))
        left = {item: time for item, time in times.items() if item not in gone}
        first = earliest.first()
        assert (first is None) == (not left)
        assert first is None or left[first] == min(left.values())
        assert earliest.bound() <= min(left.values(), default=float("inf"))


def test_what_has_ended_is_forgotten():
    """Thousands may come and go before the first in line."""
    gone = set()
    earliest = Earliest(lambda item: item, lambda item: item not in gone)
    for item in range(10_000):
        earliest.add(item)
        if item:
            gone.add(item)
    assert len(earliest._heap) < 200
    assert earliest.first() == 0
