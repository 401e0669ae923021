"""Courses of runs as a picture: the buckets over tokens, what gates said, and where a run went back."""

from collections.abc import Mapping
from pathlib import Path

from gate_courses import Course, Look

from cpt_mega.gates.rules import GAIN, PERPLEXITY, PRICE
from cpt_mega.gates.verdict import HARD, SOFT

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:olive")
MARKS = {HARD: "X", SOFT: "v"}
ITEMS = "items"
LABELS = {
    "domain": "domain perplexity since step 0, %",
    "general": "general perplexity since step 0, %",
    ITEMS: "right general items since step 0, points",
}
PLACES = {GAIN: "domain", PRICE: "domain", PERPLEXITY: "general"}  # of a rule's marks; others are of items
LEAST_POINTS = 3.0  # that the panel of items shows both ways: a few items are no course


def draw_courses(
    courses: Mapping[int, Course], path: Path, title: str, others: Mapping[int, Course] | None = None
) -> None:
    """Writes a picture of runs by seed, by the suffix of its name; ``others`` are dotted, for comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (panel, label) in zip(panels, LABELS.items(), strict=True):
        axes.axhline(0, color="grey", linewidth=0.8)
        for number, (seed, course) in enumerate(courses.items()):
            colour = COLOURS[number % len(COLOURS)]
            _draw(axes, course, panel, colour, f"seed {seed}: {course.state}")
            if others:
                points = [_point(others[seed], look, panel) for look in others[seed].looks]
                axes.plot(*zip(*points, strict=True), ".:", color=colour, label=f"seed {seed}, gates only warn")
        _draw_limit(axes, next(iter(courses.values())), panel)
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    low, high = panels[-1].get_ylim()
    panels[-1].set(xlabel="tokens of the run, thousands", ylim=(min(low, -LEAST_POINTS), max(high, LEAST_POINTS)))
    _legend(figure, panels[0], courses)
    figure.savefig(path, dpi=110)


def _draw(axes, course: Course, panel: str, colour: str, label: str) -> None:
    """A line from look to look; where the run went back, an arrow to there, and what was given up is pale."""
    points: list[tuple[float, float]] = []
    for look in course.looks:
        point = _point(course, look, panel)
        points.append(point)
        levels = {level for rule, level in look.levels.items() if PLACES.get(rule, ITEMS) == panel}
        for level, mark in MARKS.items():
            if level in levels:
                axes.plot(*point, mark, color=colour, markersize=11, markeredgecolor="black", zorder=5)
        if look.back_to is not None:
            kept = next(n for n, one in enumerate(points) if one[0] == look.back_to / 1000)
            axes.plot(*zip(*points[: kept + 1], strict=True), ".-", color=colour)
            axes.plot(*zip(*points[kept:], strict=True), ".-", color=colour, alpha=0.4)
            arrow = {"arrowstyle": "->", "color": colour, "linestyle": "--", "connectionstyle": "arc3,rad=0.3"}
            axes.annotate("", points[kept], point, arrowprops=arrow)
            points = points[: kept + 1]
    axes.plot(*zip(*points, strict=True), ".-", color=colour, label=label)


def _draw_limit(axes, course: Course, panel: str) -> None:
    """Where the gates say no, and where the budget ends."""
    limit, words = {
        "domain": (course.gain_limit, "least gain"),
        "general": (course.perplexity_limit, "limit"),
        ITEMS: (course.items_threshold and -course.items_threshold, "what the gate is for"),
    }[panel]
    if limit is not None:
        axes.axhline(100 * limit, color="tab:red", linestyle="-.", linewidth=1)
        axes.set_title(f"{words}: {100 * limit:+.1f}", loc="right", fontsize="small", color="tab:red", pad=3)
    if course.budget_tokens:
        axes.axvline(course.budget_tokens / 1000, color="grey", linestyle="-.", linewidth=1)


def _point(course: Course, look: Look, panel: str) -> tuple[float, float]:
    value = course.change(panel, look) if panel != ITEMS else look.accuracy - course.looks[0].accuracy
    return look.tokens / 1000, 100 * value


def _legend(figure, axes, courses: Mapping[int, Course]) -> None:
    """Below all panels, where it hides nothing; of marks only those that are there."""
    for level, mark in MARKS.items():
        if any(course.ever(level) for course in courses.values()):
            axes.plot([], [], mark, color="white", markersize=9, markeredgecolor="black", label=f"a {level} verdict")
    if any(course.rollbacks for course in courses.values()):
        axes.plot([], [], "--", color="black", label="went back to a checkpoint")
    axes.plot([], [], "-.", color="grey", label="the budget")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
