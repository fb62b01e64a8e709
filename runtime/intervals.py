"""How sure a mean is: Student's t."""

import statistics

FEW = 10  # values; fewer get no interval: their mean may be far from normal


def t_quantile(freedom: float, comparisons: int = 1) -> float:
    """How many standard errors the 95 % interval of a mean reaches to each side, with so many
    degrees of freedom; of one of several comparisons 1 − 0.05/comparisons (Bonferroni).

    Student's t by Fisher's expansion about the normal quantile (Abramowitz & Stegun 1964, 26.7.5):
    within 0.1 % from 9 degrees of freedom on, within 1.5 % from 4 on, up to fifty comparisons.
    """
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / max(1, comparisons))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
