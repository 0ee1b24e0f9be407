"""What bgtasks costs, as ratios against what it replaces, measured in one run.

The package imports nothing of this. Of the demo only `manage.py compare` does, which measures with
`benchmarks/comparison.py`.
"""
