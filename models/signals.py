"""Ctrl-C and SIGTERM, noticed between the steps of a loop that wants to save what it has."""

import signal


def catch_signals() -> list[int]:
    """A list that a Ctrl-C or SIGTERM is put into; the loop looks at it between steps. A second one ends at once."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def release_signals() -> None:
    """Let them end the program again, as they do where nobody catches them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
