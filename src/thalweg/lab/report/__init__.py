"""Reports: one self-contained page for one or several runs."""

from thalweg.lab.report.page import Section as Section
from thalweg.lab.report.page import TextTable as TextTable
from thalweg.lab.report.page import render as render
from thalweg.lab.report.page import section_of as section_of
from thalweg.lab.report.page import write_report as write_report

__all__ = ["Section", "TextTable", "render", "section_of", "write_report"]
