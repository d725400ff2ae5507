"""What a bit budget buys in ranks; plain Python, so that sizes can be told without torch."""


def rank_budget(bits: float, h_out: int, h_in: int) -> int:
    """Rank-bits that one matrix may spend: `floor(bits * h_in * h_out / (h_in + h_out))`."""
    return int(bits * h_in * h_out / (h_in + h_out))
