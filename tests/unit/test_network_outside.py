"""Name server sockets outside of a container's namespace."""

from __future__ import annotations

from pathlib import Path

from dolium.network.dns.outside import Outside, OutsideTable, open_sockets, table_text


def test_the_table() -> None:
    text = table_text("dolium-1-names", [Outside("10.0.0.2", "10.0.0.1", 5), Outside("10.0.1.2", "10.0.1.1", 6)])
    assert "10.0.0.2 : 10.0.0.1 . 5, 10.0.1.2 : 10.0.1.1 . 6" in text and text.count("dport 53") == 2
    assert "10.0.0.2 . 10.0.0.1 . 5, 10.0.1.2 . 10.0.1.1 . 6" in text and "!= @theirs drop" in text  # nobody else is answered
    assert table_text("t", []) == "add table ip t\ndelete table ip t\n"


def test_sockets_have_one_port_and_get_it_again() -> None:
    one = Outside("127.0.0.2", "127.0.0.1")
    for sock in (first := open_sockets(one)):
        assert sock.getsockname() == ("127.0.0.1", one.port)
    port = one.port
    for sock in first:
        sock.close()
    for sock in open_sockets(one):
        assert sock.getsockname() == ("127.0.0.1", port)
        sock.close()


def test_without_anybody_nothing_is_touched(tmp_path: Path) -> None:
    OutsideTable("0", str(tmp_path / "marker")).write([])  # as any user
    assert not (tmp_path / "marker").exists()
