import io

from thalweg.lab.progress import PlainProgress, shown_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_off_a_terminal_a_line_is_written_at_the_ends_and_every_ten_seconds():
    now, stream = [0.0], io.StringIO()
    report = PlainProgress("toy", stream, lambda: now[0])
    for second in range(26):
        now[0] = float(second)
        report(second / 25, f"step {second}")
    lines = stream.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "toy:   0% step 0",
        "toy:  40% step 10",
        "toy:  80% step 20",
        "toy: 100% step 25",
    ]
    assert lines[1].endswith("(10 s, 15 s left)")
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_a_bar_is_drawn_and_markup_is_taken_as_text():
    stream = Terminal()
    with shown_progress("toy [bold]", stream) as report:
        report(0.5, "[red]half")
        report(1.0, "done")
    assert "toy" in stream.getvalue()
