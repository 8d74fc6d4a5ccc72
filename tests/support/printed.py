"""What a command prints, and streams that say whether they are a terminal."""

import io


def lines(text: str) -> list[str]:
    """Return the lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()]


class Stream(io.StringIO):
    """Keeps what is written, and says whether somebody watches."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal
