"""The policy `alternate`."""

from megapd_outside.settings import AlternateConfig


def alternate(section: AlternateConfig, there: tuple[int, ...], steps: int) -> tuple[list[tuple[int, int]], list[str]]:
    starts = range(0, steps, section.every)
    return [(start, there[0] if number % 2 == 0 else there[-1]) for number, start in enumerate(starts)], []
