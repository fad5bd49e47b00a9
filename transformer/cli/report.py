"""`transformer report RUN [RUN ...] -o FILE.html`: write a page of the metrics, samples and scores of runs."""

from transformer.cli.pages import new_page, write_page
from transformer.cli.reading import Given
from transformer.cli.using import ReportOptions
from transformer.runs.report import report_page


def main(options: ReportOptions, given: Given) -> None:
    """Check the output path, read the runs, and write the page."""
    del given
    path = new_page(options.output)
    write_page(path, report_page(options.runs))
