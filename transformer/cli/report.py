"""`transformer report RUN [RUN ...] -o FILE.html`: a page of what runs wrote about themselves."""

from transformer.cli.pages import new_page, write_page
from transformer.cli.reading import Given
from transformer.cli.using import ReportOptions
from transformer.runs.report import report_page


def main(options: ReportOptions, given: Given) -> None:
    """Refuse what cannot be written; then read and write."""
    del given
    path = new_page(options.output)
    write_page(path, report_page(options.runs))
