"""When messages were cut, by the clock of the node that receives them."""

import pytest

from counter.clocks import DRIFT, Clocks


def test_what_exceeds_the_fastest_message_is_the_time_one_waited():
    clocks = Clocks()
    assert clocks.cut_at("a", 1000.0, 5.0) == 5.0
    assert clocks.cut_at("a", 1001.0, 9.0) == pytest.approx(6.0, abs=0.01)
    assert clocks.cut_at("b", 0.0, 9.0) == 9.0


def test_a_faster_message_mends_what_a_late_first_one_made_believe():
    clocks = Clocks()
    assert clocks.cut_at("a", 1000.0, 25.0) == 25.0  # it waited for 20 s, which nobody can know
    assert clocks.cut_at("a", 1021.0, 26.0) == 26.0
    assert clocks.cut_at("a", 1022.0, 47.0) == pytest.approx(27.0, abs=0.02)


def test_clocks_may_drift_apart():
    clocks = Clocks()
    clocks.cut_at("a", 0.0, 0.0)
    assert clocks.cut_at("a", 1000.0, 1000.4) == 1000.4
    assert clocks.cut_at("a", 2000.0, 2100.0) == pytest.approx(2000.4 + DRIFT * 1100)


def test_an_answer_shows_that_a_clock_stood_still():
    clocks = Clocks()
    clocks.cut_at("a", 100.0, 100.0)
    assert clocks.cut_at("a", 101.0, 201.0) == pytest.approx(101, abs=0.1)
    assert clocks.cut_at("a", 102.0, 202.0, asked_at=201.5) == 201.5
    assert clocks.cut_at("a", 103.0, 203.0) == pytest.approx(202.5, abs=0.01)


def test_a_sender_that_does_not_say_its_clock_is_believed_to_be_fast():
    assert Clocks().cut_at("a", None, 5.0) == 5.0


def test_the_peers_that_were_heard_last_are_remembered():
    clocks = Clocks(peers_max=2)
    for peer in "abac":
        clocks.cut_at(peer, 0.0, 1.0)
    assert clocks.cut_at("a", 0.0, 9.0) == pytest.approx(1.0, abs=0.01)
    assert clocks.cut_at("b", 0.0, 9.0) == 9.0
