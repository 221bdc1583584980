"""The whole journeys: fit all stages in a row, evaluate a model, the demo, and the report that they write."""
