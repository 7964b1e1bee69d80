"""What a model costs and how alike two models are: by formula, by counting, by the clock, on data."""
