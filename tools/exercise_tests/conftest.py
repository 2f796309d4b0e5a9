"""At the end: which functions are right, which are wrong, and which are still empty."""

from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the result of every test say which function it is about."""
    for item in items:
        item.user_properties += [("function", mark.args[0]) for mark in item.iter_markers("exercise")]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per function."""
    found: dict[str, list[Any]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for _, function in getattr(report, "user_properties", []):
                found.setdefault(function, []).append(report)
    terminalreporter.section("which functions are right")
    for function, reports in sorted(found.items(), key=lambda pair: pair[1][0].nodeid):
        failed = [report for report in reports if report.failed]
        empty = any(f"{function.partition('.')[2]} is still empty" in str(report.longrepr) for report in failed)
        need = "" if empty or not failed else f", {len(failed)} of {len(reports)} tests fail"
        blocked = any("is still empty" in str(report.longrepr) for report in failed) and not empty
        state = "right" if not failed else "empty" if empty else "not right yet"
        terminalreporter.line(f"{function:24} {state}{need}{' (it calls one that is still empty)' if blocked else ''}")
    right = sum(not any(report.failed for report in reports) for reports in found.values())
    terminalreporter.line(f"{right} of {len(found)} right")
