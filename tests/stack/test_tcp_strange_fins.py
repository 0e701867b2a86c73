"""FINs that come early or contradict each other, and what a stranger may not change with them."""

from __future__ import annotations

from conversation import Client
from packets import ACK, FIN, RST, SYN

from ztun.stack import Closed


def test_of_two_fins_the_one_that_is_reached_first_counts(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, b"x", seq=3001)
    client.hears(ACK, ack=1)
    client.says(ACK | FIN, b"abc", seq=1)
    client.hears(ACK, ack=5)
    assert app.received == b"abc"
    assert app.events == ["established", "eof"]


def test_what_waits_behind_a_fin_is_given_up(client: Client) -> None:
    app = client.connects(sack_ok=True)
    client.says(ACK, b"beyond", seq=4)
    client.hears(ACK, ack=1, sack=[(4, 10)])
    client.says(ACK | FIN, b"abc", seq=1)
    client.hears(ACK, ack=5, sack=None)
    assert app.received == b"abc"


def test_data_after_an_early_fin_is_dropped_and_answered(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, b"c", seq=3)
    client.hears(ACK, ack=1)
    client.says(ACK, b"never", seq=5)
    client.hears(ACK, ack=1)
    assert client.dropped("tcp-after-fin") == 1
    client.says(ACK, b"ab", seq=1)
    client.hears(ACK, ack=5)
    assert app.received == b"abc"


def test_a_reset_with_the_number_of_the_fin_counts(client: Client) -> None:
    """macOS sends it when a program is ended in the middle, and answers few challenges after."""
    app = client.connects()
    client.says(ACK | FIN)
    client.hears(ACK, ack=2)
    client.says(RST, seq=1)
    assert app.how is Closed.RESET_BY_CLIENT


def test_a_wrong_ack_cannot_poison_the_timestamp(client: Client) -> None:
    client.connects_like_linux()
    client.says(ACK, b"forged", ack=9999, ts=(client.clock() + (1 << 30), 0))
    client.hears(ACK, ack=1)
    client.says(ACK, b"genuine", seq=1)
    client.waits(0.04)
    client.hears(ACK, ack=8)


def test_an_ack_from_the_right_edge_counts(client: Client) -> None:
    """There a client stands that has filled the window and lost something of it."""
    app = client.connects()
    app.sends(b"download")
    client.hears_all()
    client.says(ACK, seq=client.conn.rx.edge - client.isn, ack=9)
    assert client.conn.tx.una == client.net.iss + 9


def test_the_window_of_a_syn_ack_is_all_that_is_taken(client: Client) -> None:
    app = client.connects(wscale=7, sack_ok=True)
    client.says(ACK, b"too far", seq=65536)
    client.hears(ACK, ack=1, sack=None)
    assert app.received == b""
    assert client.dropped("tcp-window") == 1


def test_syn_with_ack_is_no_repeated_syn(client: Client) -> None:
    client.opens()
    client.hears(SYN | ACK)
    client.says(SYN | ACK, seq=0, ack=1)
    client.hears(ACK, seq=1, ack=1)


def test_abort_when_both_ends_have_closed_says_nothing(client: Client) -> None:
    """RFC 9293 section 3.10.5, LAST-ACK and CLOSING."""
    app = client.connects()
    client.says(ACK | FIN)
    client.hears(ACK, ack=2)
    app.shuts_down()
    client.hears(ACK | FIN)
    app.resets()
    client.hears_nothing()
    assert app.how is Closed.ABORTED


def test_what_is_sent_while_data_is_taken_tells_the_true_window(client: Client) -> None:
    app = client.connects()
    app.holds = True
    app.on_data = lambda: app.sends(b"answer")
    client.says(ACK, bytes(1000))
    free = client.conn.rx.capacity - 1000
    assert client.hears(ACK).window <= free
