"""Plans carried out and judged."""
