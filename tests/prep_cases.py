"""Pieces of a Project Gutenberg book, and the command that prepares books; used by several tests."""

from conftest import run

PROSE = (
    "It was a bright cold day in April, and the old clock of the tower struck thirteen "
    "over the quiet roofs of the town.\n\n"
)
HEADER = "The Project Gutenberg EBook of A Day, by Nobody\n\nTitle: A Day\n\nLanguage: English\n\n"
START = "*** START OF THE PROJECT GUTENBERG EBOOK A DAY ***\n\n"
END = "*** END OF THE PROJECT GUTENBERG EBOOK A DAY ***\n\n"


def prepare(tmp_path, *arguments, **options):
    """Run `prep_dataset.py gutenberg` with these arguments in tmp_path."""
    return run("prep_dataset.py", "gutenberg", *arguments, cwd=tmp_path, **options)
