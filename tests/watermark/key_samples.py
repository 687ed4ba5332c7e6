"""Keys for tests: any key, and one whose numbers occur nowhere else, so that a leak can be seen."""

from hypothesis import strategies as st

from meadef_lightning.watermark import DEFAULT_COMBINERS, WatermarkKey

SECRET = WatermarkKey((8363, 7457), 6869, 9973, combiner=DEFAULT_COMBINERS[3], seed=55837, salt="deadbeefcafe4711" * 2)
SECRETS = ("8363", "7457", "6869", "55837", "deadbeefcafe4711", "Diagonal")

KEYS = st.builds(
    lambda classes, seed, way, salt, drawn: WatermarkKey(
        classes[:2], classes[2], 12, DEFAULT_COMBINERS[way], seed, DEFAULT_COMBINERS, drawn, salt
    ),
    st.permutations(range(12)).map(lambda order: tuple(order[:3])),
    st.integers(0, 2**63 - 1),
    st.integers(0, 7),
    st.text("0123456789abcdef", min_size=32, max_size=40),
    st.booleans(),
)
