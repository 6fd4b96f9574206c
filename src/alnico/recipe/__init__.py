"""What is asked: YAML to :class:`Recipe`. Knows the methods' signatures and the text; opens no model."""
