from optimizer.telling import Seldom


def test_seldom_passes_on_one_message_in_so_many_seconds() -> None:
    now_s, heard = 100.0, []
    seldom = Seldom(heard.append, 2.0, lambda: now_s)
    for _ in range(7):
        seldom(f"{now_s:g}")
        now_s += 1.0
    assert heard == ["100", "102", "104", "106"]
