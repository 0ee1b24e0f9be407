"""What bgtasks costs, as ratios against what it replaces, measured in one run. Nothing imports this."""
