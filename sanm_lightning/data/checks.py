"""Check the common arguments of data modules."""

__all__ = ["check_arguments"]


def check_arguments(
    positive: dict[str, int], not_negative: dict[str, int], fractions: dict[str, float], seed: int | None
) -> None:
    """Raise ValueError if an argument of `NoisyDataModule`, given by name, is out of range."""
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"expected {name} of 1 or more, got {value}; choose a larger one")
    for name, value in not_negative.items():
        if value < 0:
            raise ValueError(f"expected {name} of 0 or more, got {value}; use 0 to disable it")
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"expected {name} in [0, 1), got {fraction}; use 0.1 for 10 %")
    if seed is not None and seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed}; choose another, such as 0")
